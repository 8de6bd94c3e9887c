"""Experiment trackers: send the metrics of a run folder to wandb, from rank 0 only.

metrics.jsonl is exact, and every tracker is derived from it. The steps that the tracker's program has *stored* decide what it is
sent: at a start the rows that it lacks, later each new row once it is complete.
"""

import contextlib
import glob
import heapq
import logging
import math
import netrc
import os
import shlex
import shutil
import socket
import struct
import time
import uuid
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from galaxydist.distributed import World
from galaxydist.errors import first_line
from galaxydist.recipe.identity import to_dict
from galaxydist.recipe.schema import Recipe, TrackerConfig
from galaxydist.runs.events import Event
from galaxydist.runs.folder import ORIGIN_KEY, RunFolder
from galaxydist.shards.manifest import Manifest
from galaxydist.tracking.sink import Row, RunEnd, Sink

WandbMode = Literal["online", "offline"]

LOG = logging.getLogger(__name__)

# wandb may take this time to write the rest of a run that has ended; it usually takes some milliseconds.
WRITING_S = 60.0

# Format of wandb's offline files, ``wandb/offline-run-TIME-ID/run-ID.wandb``: a header of seven bytes, then LevelDB's log format,
# that is blocks of 32 KiB with fragments, each with a checksum, a length and a kind. A record is a protobuf message in one or
# more fragments. wandb writes through a buffer of 32 KiB, so that a killed run leaves a file without its newest rows, often one
# of seven bytes, or one that ends within a record. At such a file ``wandb sync`` gives up the whole run; so it is repaired.
BLOCK_SIZE = 32_768
HEADER_SIZE = 7  # of the file, and of each fragment
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4
TORN_DIR = "wandb-torn"


def read_records(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the complete records of an offline file, each with its end position, up to the first damaged or incomplete one."""
    from wandb.proto import wandb_internal_pb2

    for end, message in _read_messages(path.read_bytes()):
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        record.ParseFromString(message)
        yield end, record


def _read_messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    message, is_open, position = b"", False, HEADER_SIZE
    while position + HEADER_SIZE <= len(data):
        left = BLOCK_SIZE - position % BLOCK_SIZE
        if left < HEADER_SIZE:  # too small for a fragment: filled with zeros
            position += left
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, position)
        content = data[position + HEADER_SIZE : position + HEADER_SIZE + length]
        is_sound = len(content) == length and zlib.crc32(content, zlib.crc32(bytes([kind]))) == checksum
        if not is_sound or is_open != (kind in (MIDDLE, LAST)):
            return
        position += HEADER_SIZE + length
        message += content
        is_open = kind in (FIRST, MIDDLE)  # a first fragment at the end of a block may be empty
        if not is_open:
            yield position, message
            message = b""


def has_ended(path: Path) -> bool:
    """Return True if a file holds the record that wandb writes last."""
    return any(record.WhichOneof("record_type") == "exit" for _, record in read_records(path))


def read_history(path: Path) -> Counter[int]:
    """Return the number of rows of each step in a file."""
    return Counter(record.history.step.num for _, record in read_records(path) if record.WhichOneof("record_type") == "history")


def offline_files(folder: Path, run_id: str) -> list[Path]:
    """Return the offline files of one run in a run folder, oldest first."""
    return sorted((folder / "wandb").glob(f"offline-run-*/run-{glob.escape(run_id)}.wandb"))


def mend_files(folder: Path, run_id: str) -> list[str]:
    """Repair the offline files of a run, so that ``wandb sync`` takes them all; no process may be writing them.

    A file without the record of its run is moved to ``wandb-torn``, with its folder. Other files are truncated after their last
    complete record.

    Returns:
        A sentence for each file that was changed.
    """
    changes: list[str] = []
    for path in offline_files(folder, run_id):
        end, has_run = 0, False
        for position, record in read_records(path):
            end, has_run = position, has_run or record.WhichOneof("record_type") == "run"
        if not has_run:
            aside = folder / TORN_DIR / path.parent.name
            aside.parent.mkdir(exist_ok=True)
            shutil.move(path.parent, aside)
            changes.append(f"wandb had written next to nothing of the last start to {path.name}: moved to {aside}")
        elif cut := path.stat().st_size - end:
            os.truncate(path, end)
            changes.append(f"{path} ended within a record: its last {cut} bytes, which no program can read, were cut off")
    return changes


def stored_step(folder: Path, run_id: str) -> int:
    """Return the highest step in the offline files; 0 if there is none."""
    return max((step for path in offline_files(folder, run_id) for step in read_history(path)), default=0)


class Tracker:
    """Tracker that does nothing, and base class of the others."""

    run_id: str | None = None

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Add metrics to the row of a step."""

    def finish(self, summary: Mapping[str, float], exit_code: int) -> str | None:
        """Close the tracker; after a good end, return a line that says where it keeps the run."""


class RunTracker(Tracker):
    """Sends the rows of a run to a sink, each step once. A failure is logged once and never stops the training.

    A row is complete when a higher step begins or the run has finished: a validation belongs to the row of its step.

    Args:
        sink: receives the rows; those in the run folder that it lacks are sent at once.
        folder: run folder, cut back to the step from which the run continues.
        run_id: the tracker's id of the run.
    """

    def __init__(self, sink: Sink, folder: RunFolder, run_id: str) -> None:
        self.run_id = run_id
        self._sink = sink
        self._folder = folder
        self._sent_step = sink.stored_step
        self._row: dict[str, Any] = {}
        self._row_step = 0
        self._failed = False
        folder.write_tracker(run_id=run_id, stored_step=sink.stored_step, is_complete=False)
        for step, row in read_rows(folder):
            self.log(row, step)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Add metrics to the row of a step, except stored steps and values that are not finite."""
        if self._failed or step <= self._sent_step:
            return
        if step != self._row_step:
            self._send()
        self._row_step = step
        self._row |= {name: value for name, value in metrics.items() if _is_known(value)}

    def finish(self, summary: Mapping[str, float], exit_code: int) -> str | None:
        """Close the sink. After a failure the last row, which may lack its validation, is left for the next start.

        Returns:
            After a good end, a line that says where the sink keeps the run.
        """
        if exit_code == 0:
            self._send()
        if self._failed:
            return None
        try:
            location = self._sink.close(RunEnd(exit_code, summary))
        except Exception as error:  # no error of a tracker stops the run
            self._fail(error)
            return None
        self._folder.write_tracker(run_id=self.run_id, stored_step=self._sent_step, is_complete=exit_code == 0)
        return location if exit_code == 0 else None

    def _send(self) -> None:
        if self._failed or not self._row:
            return
        try:
            self._sink.send(Row(self._row_step, self._row))
        except Exception as error:  # as above
            self._fail(error)
        self._sent_step, self._row = self._row_step, {}

    def _fail(self, error: Exception) -> None:
        self._failed = True
        LOG.warning(
            "the tracker failed (%s). metrics.jsonl has every number; what the tracker lacks is sent to it when the same command "
            "is given again",
            first_line(error),
        )
        self._sink.abandon()


def read_rows(folder: RunFolder) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the lines of metrics.jsonl and timing.jsonl in the order of their steps; a step may have several."""
    for line in heapq.merge(folder.metrics.read(), folder.timing.read(), key=lambda line: int(line["step"])):
        yield line.pop("step"), line


def _is_known(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


@dataclass(eq=False, kw_only=True)
class WandbSink:
    """Weights & Biases, online or offline.

    Args:
        config: project, entity and tags.
        mode: ``online`` or ``offline``.
        folder: run folder, in which wandb keeps its files.
        run_id: id of the run to continue, or a new id.
        name: name on the dashboard.
        recipe: the resolved recipe, stored as the run's config.
        known_step: the highest step that an earlier start knew to be stored; its files may have been removed since.
    """

    config: TrackerConfig
    mode: WandbMode
    folder: Path
    run_id: str
    name: str
    recipe: Mapping[str, Any]
    known_step: int

    def __post_init__(self) -> None:
        import wandb

        self.folder.mkdir(parents=True, exist_ok=True)
        for sentence in mend_files(self.folder, self.run_id):
            LOG.warning("%s", sentence)
        self.stored_step = max(self.known_step, stored_step(self.folder, self.run_id))
        logging.getLogger("asyncio").addFilter(_is_no_lost_connection)
        self._run = wandb.init(
            project=self.config.project,
            entity=self.config.entity,
            tags=list(self.config.tags) or None,
            mode=self.mode,
            dir=str(self.folder),
            id=self.run_id,
            name=self.name,
            resume="allow",
            config=dict(self.recipe),
            settings=wandb.Settings(silent=True, init_timeout=60),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if self.mode == "online":
            self.stored_step = self._run.starting_step - 1  # the server gives its next step

    def send(self, row: Row) -> None:
        """Send one complete row."""
        self._run.log({**row.values, "step": row.step}, step=row.step, commit=True)

    def flush(self) -> None:
        """Do nothing: wandb stores rows by itself."""

    def alert(self, event: Event) -> None:
        """Send an alert, which wandb passes on by mail or Slack."""
        self._run.alert(event.kind, event.text)

    def close(self, end: RunEnd) -> str:
        """Wait until all rows are stored; offline, wandb's process may still be writing when its ``finish`` returns."""
        self._run.summary.update(dict(end.summary))
        self._run.finish(exit_code=end.exit_code)
        if self.mode == "online":
            return f"wandb: {self._run.url}"
        file, deadline = Path(self._run.settings.sync_file), time.monotonic() + WRITING_S
        while not has_ended(file):
            if time.monotonic() > deadline:
                raise TimeoutError(f"after {WRITING_S:g} s wandb had not written the end of {file}")
            time.sleep(0.02)
        several = offline_files(self.folder, self.run_id)
        pattern = f"{shlex.quote(str(self.folder / 'wandb'))}/offline-run-*-{self.run_id}*"
        command = shlex.quote(str(several[0].parent)) if len(several) == 1 else pattern
        return f"wandb: offline, in {self.folder / 'wandb'}; to send it: wandb sync {command}"

    def abandon(self) -> None:
        """End wandb's process; if it is gone, each of these calls raises, which wandb would otherwise print at exit."""
        import wandb

        with contextlib.suppress(Exception):
            self._run.finish(exit_code=1)
        with contextlib.suppress(Exception):
            wandb.teardown(exit_code=1)


def _is_no_lost_connection(record: logging.LogRecord) -> bool:
    return "socket.send() raised" not in record.getMessage()  # printed with each line once wandb's process is gone


def start_tracker(
    world: World, recipe: Recipe, folder: RunFolder, manifest: Manifest, *, run_id: str | None, environ: Mapping[str, str]
) -> Tracker:
    """Return the tracker of a run: on rank 0 the recipe's, which continues ``run_id`` or the run folder's; else a no-op.

    A tracker that cannot start is replaced by a no-op, since a tracker must never stop a training run.
    """
    if not world.is_main or recipe.tracker.name == "none":
        return Tracker()
    values = to_dict(recipe)
    if manifest.remote is not None:
        values["data"]["manifest"] = manifest.location  # without secrets in the URL
    try:
        return open_tracker(recipe.tracker, folder, values, run_id=run_id, environ=environ)
    except Exception as error:  # as above
        LOG.warning("wandb could not start (%s); metrics.jsonl has every number", error)
        return Tracker()


def open_tracker(
    config: TrackerConfig, folder: RunFolder, recipe: Mapping[str, Any], *, run_id: str | None, environ: Mapping[str, str]
) -> RunTracker:
    """Open the tracker of a run folder, and send it the rows that it lacks.

    Args:
        config: settings of the tracker.
        folder: run folder.
        recipe: the resolved recipe, shown by the tracker.
        run_id: id of the run to continue; None: the run folder's, or a new one.
        environ: the process's environment, with wandb's key if there is one.
    """
    stored = folder.read_tracker()
    run_id = run_id or stored.get("run_id") or uuid.uuid4().hex[:8]
    mode = config.mode if config.mode != "auto" else choose_wandb_mode(environ)
    sink = WandbSink(
        config=config,
        mode=mode,
        folder=folder.path,
        run_id=run_id,
        name=folder.path.name,
        recipe=recipe,
        known_step=stored.get("stored_step", 0) if run_id == stored.get("run_id") else 0,
    )
    return RunTracker(sink, folder, run_id)


def complete_tracker(
    world: World, recipe: Recipe, folder: RunFolder, manifest: Manifest, *, environ: Mapping[str, str]
) -> str | None:
    """Send the tracker of a finished run the rows that it lacks; the run may have been killed after its result was written."""
    result = folder.read_result() or {}
    if not world.is_main or folder.read_tracker().get("is_complete", True):
        return None
    summary = {name: value for name, value in result.items() if name not in ("step", ORIGIN_KEY)}
    return start_tracker(world, recipe, folder, manifest, run_id=None, environ=environ).finish(summary, 0)


def choose_wandb_mode(environ: Mapping[str, str]) -> WandbMode:
    """Return ``online`` if there is a key and wandb's server answers within two seconds, else ``offline``."""
    if (mode := environ.get("WANDB_MODE")) in ("online", "offline"):
        return cast(WandbMode, mode)
    host, port = wandb_address(environ)
    return "online" if has_wandb_key(environ, host) and is_reachable(host, port) else "offline"


def wandb_address(environ: Mapping[str, str]) -> tuple[str, int]:
    """Return the host and port of wandb's server."""
    host = environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0]
    name, _, port = host.partition(":")
    return name, int(port or 443)


def has_wandb_key(environ: Mapping[str, str], host: str) -> bool:
    """Return True if there is a key for a server: in the environment, or in the file that ``wandb login`` writes."""
    if environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def is_reachable(host: str, port: int) -> bool:
    """Return True if a server accepts a connection within two seconds."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=2):
        return True
    return False
