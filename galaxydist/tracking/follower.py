"""Sends a tracker what a run folder holds and gains, each step once: from the run itself, or later and from elsewhere."""

import hashlib
import os
import time
import uuid
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from galaxydist.errors import UserError
from galaxydist.recipe.schema import TrackerConfig
from galaxydist.runs.events import ALERTS
from galaxydist.runs.folder import RunFolder, TrackerName
from galaxydist.tracking.run_info import build_end, build_info
from galaxydist.tracking.run_reader import RunReader
from galaxydist.tracking.sink import RunInfo, Sink
from galaxydist.tracking.wandb_sink import WandbMode, choose_wandb_mode

TRACKERS: tuple[TrackerName, ...] = get_args(TrackerName)


@dataclass(frozen=True)
class Destination:
    """A tracker to which runs are sent.

    Args:
        name: of the tracker.
        config: its settings: project, entity, tags, mode.
        environ: the process's environment, with wandb's key if there is one; wandb's folder for its own copies is set there.
        trackio_dir: trackio's folder; None: ``trackio`` beside the run folder.
    """

    name: TrackerName
    config: TrackerConfig
    environ: MutableMapping[str, str]
    trackio_dir: Path | None = None

    @property
    def wandb_mode(self) -> WandbMode:
        """Mode in which wandb would be opened now."""
        return self.config.mode if self.config.mode != "auto" else choose_wandb_mode(self.environ)

    def open(self, info: RunInfo) -> Sink:
        """Open the tracker's program for a run.

        Raises:
            UserError: its package is not installed.
        """
        try:
            if self.name == "wandb":
                from galaxydist.tracking.wandb_sink import WandbSink

                return WandbSink(info, self.wandb_mode, self.environ)
            if self.name == "trackio":
                from galaxydist.tracking.trackio_sink import TrackioSink, trackio_folder

                return TrackioSink(info, self.trackio_dir or trackio_folder(info.folder), self.environ)
            from galaxydist.tracking.tensorboard_sink import TensorboardSink

            return TensorboardSink(info)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("galaxydist"):
                raise
            raise UserError(f"{self.name} needs {error.name}, which is not installed: pip install 'galaxydist[track]'") from error


def is_writable(folder: RunFolder) -> bool:
    """Return True if what a tracker has can be noted in a run folder; those of other users often may only be read."""
    return os.access(folder.path, os.W_OK)


def tracker_run_id(folder: RunFolder, name: TrackerName, run_id: str | None = None) -> str:
    """Return a tracker's id of a run: the given one, that of the tracker or of another one in the run folder, or a new one.

    A run folder that cannot be written keeps no id: it is made of the path.
    """
    if not is_writable(folder):
        return hashlib.sha256(os.fsencode(folder.path.resolve())).hexdigest()[:8]
    for known in (name, *TRACKERS):
        run_id = run_id or folder.read_tracker(known).get("run_id")
    return run_id or uuid.uuid4().hex[:8]


class Follower:
    """Sends a sink what its run folder gains; the sink's program may fail at any call.

    Args:
        folder: the run folder.
        destination: the tracker.
        run_id: the tracker's id of the run.
        dataset: from ``describe_dataset``; None: what the run folder says.
        alerts_since: alert of events from this time on, in seconds since 1970; None: alert of none.
    """

    def __init__(
        self,
        folder: RunFolder,
        destination: Destination,
        run_id: str,
        *,
        dataset: Mapping[str, Any] | None = None,
        alerts_since: float | None = None,
    ) -> None:
        self.folder, self.name = folder, destination.name
        self.info = build_info(folder, destination.config, run_id, dataset)
        known = folder.read_tracker(self.name)
        self._step = known.get("stored_step", 0) if known.get("run_id") == run_id else 0
        self._write_state(is_complete=False)
        self.sink = destination.open(self.info)
        self.num_rows = 0
        self._step = self.sink.stored_step
        self._reader = RunReader(folder)
        self._alerts_since = alerts_since
        self._num_events = 0
        self._write_state(is_complete=False)

    def send(self, *, has_ended: bool = False) -> None:
        """Send the rows that have become complete and that the sink lacks, and alert of new events.

        Args:
            has_ended: the run has its result, so that the last row is complete too.

        Raises:
            UserError: a file of the run folder is damaged.
        """
        before = self.num_rows
        for row in self._reader.read(has_ended=has_ended):
            if row.step > self._step:
                self.sink.send(row)
                self._step = row.step
                self.num_rows += 1
        if self.num_rows > before:
            self.sink.flush()
        events = self._reader.read_events()
        for event in events[self._num_events :]:
            if event.kind in ALERTS and self._alerts_since is not None and event.time >= self._alerts_since:
                self.sink.alert(event)
        self._num_events = len(events)

    def close(self, *, is_finished: bool) -> str:
        """Send the rest, and close the sink. The last row of a run that was killed is kept back: it may lack its validation.

        Returns:
            A line that says where the sink keeps the run.
        """
        self.send(has_ended=is_finished)
        end = build_end(self.folder, self.info, int(not is_finished), self._reader.read_events())
        location = self.sink.close(end)
        self._write_state(is_complete=is_finished)
        return location

    def _write_state(self, *, is_complete: bool) -> None:
        if is_writable(self.folder):
            self.folder.write_tracker(self.name, run_id=self.info.run_id, stored_step=self._step, is_complete=is_complete)


def last_contact(folder: RunFolder, name: TrackerName) -> float:
    """Return the time at which a tracker was last opened or closed, else now: of earlier events it knows."""
    path = folder.tracker_file(name)
    return path.stat().st_mtime if path.exists() else time.time()
