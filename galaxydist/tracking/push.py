"""Sends run folders to a tracker from elsewhere: crashed, finished and old runs, and those that run without internet."""

import contextlib
import logging
import time
from collections.abc import Callable, Collection, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from galaxydist.errors import UserError, first_line
from galaxydist.recipe.schema import TrackerConfig
from galaxydist.runs.folder import RunFolder, TrackerName
from galaxydist.runs.lock import live_owner
from galaxydist.tracking.follower import Destination, Follower, is_writable, last_contact, tracker_run_id
from galaxydist.tracking.run_reader import RunReader
from galaxydist.tracking.run_tracker import exclusive
from galaxydist.tracking.wandb_files import has_ended, offline_files, read_project, stored_step

LOG = logging.getLogger(__name__)

# Seconds between two looks at the run folders of a watch.
INTERVAL_S = 3.0
# Seconds until a run that could not be sent is tried again: each try may open a tracker's program.
RETRY_S = 60.0


@dataclass(frozen=True)
class PushOptions:
    """Tracker and settings of a push.

    Args:
        name: of the tracker.
        environ: the process's environment.
        project, entity: of the tracker, instead of each run's own; None: the run's.
        mode: of wandb; the runs' own is that of the nodes on which they ran.
        trackio_dir: trackio's folder; None: ``trackio`` beside each run folder.
    """

    name: TrackerName
    environ: MutableMapping[str, str]
    project: str | None = None
    entity: str | None = None
    mode: Literal["auto", "online", "offline"] = "auto"
    trackio_dir: Path | None = None

    def destination(self, folder: RunFolder) -> Destination:
        """Return the tracker of one run, with the settings of its recipe where the options say nothing.

        Raises:
            UserError: recipe.json is missing or damaged.
        """
        recipe = folder.read_recipe().recipe
        given = {"project": self.project, "entity": self.entity}
        stored = {name: recipe.get(f"tracker.{name}") for name in given} | {"tags": tuple(recipe.get("tracker.tags") or ())}
        values = stored | {name: value for name, value in given.items() if value is not None}
        values = {name: value for name, value in values.items() if value is not None}
        return Destination(self.name, TrackerConfig(**values, mode=self.mode), self.environ, self.trackio_dir)


@dataclass
class PushReport:
    """Outcome of a push: a line for each run.

    Args:
        sent: that was sent.
        skipped: that its own tracker sends, or that has nothing yet.
        failed: that could not be sent.
    """

    sent: dict[Path, str] = field(default_factory=dict)
    skipped: dict[Path, str] = field(default_factory=dict)
    failed: dict[Path, str] = field(default_factory=dict)

    @property
    def done(self) -> set[Path]:
        return {*self.sent, *self.failed}


class SelfSendingError(UserError):
    """A run that is going on and sends itself to the tracker."""


def has_end(folder: RunFolder) -> bool:
    """Return True if nothing more comes: the run has its result, or a search has ended it."""
    return folder.is_finished or folder.is_pruned


def is_running(folder: RunFolder) -> bool:
    """Return True if a process holds the run folder."""
    return live_owner(folder.lock_path) is not None


def sends_itself(folder: RunFolder, name: TrackerName) -> bool:
    """Return True if a run is going on and its own process sends it to a tracker."""
    if not (folder.is_started and is_running(folder)):
        return False
    with contextlib.suppress(UserError):
        return bool(folder.read_recipe().recipe.get("tracker.name") == name)
    return False


def is_stored_offline(folder: RunFolder, project: str) -> bool:
    """Return True if wandb's offline files of a project, or what was sent of them, hold all that a run has now."""
    state = folder.read_tracker()
    run_id, has_ended_now = state.get("run_id"), has_end(folder)
    if run_id is None or state.get("is_complete") != has_ended_now:
        return False
    if folder.is_finished and folder.result_path.stat().st_mtime > folder.tracker_file("wandb").stat().st_mtime:
        return False
    files = offline_files(folder.path, run_id)
    if files and not (has_ended(files[-1]) and read_project(files[-1]) == project):
        return False
    step = max(state.get("stored_step", 0), stored_step(folder.path, run_id))
    return not any(row.step > step for row in RunReader(folder).read(has_ended=has_ended_now))


class Pusher:
    """Sends one run, once or for as long as it goes on. A context manager, which closes the tracker's program.

    Args:
        folder: the run folder.
        options: how it is sent.
        with_alerts: alert of new events.

    Raises:
        UserError: the run cannot be sent: it has no recipe or cannot be written, or its own tracker or another push is at work.
    """

    def __init__(self, folder: RunFolder, options: PushOptions, *, with_alerts: bool = False) -> None:
        from filelock import Timeout

        destination = options.destination(folder)
        if not is_writable(folder) and options.name != "trackio":  # which knows itself what it has
            raise UserError(
                f"{folder} cannot be written, and what {options.name} has is noted there: send a copy of the run folder, or show "
                "it with `galaxydist dashboard local`"
            )
        self.folder = folder
        self.name = options.name
        self._follower: Follower | None = None
        self._stack = contextlib.ExitStack()
        try:
            if is_writable(folder):
                self._stack.enter_context(exclusive(folder, options.name, waits=False))
        except Timeout:
            raise UserError(f"{folder} is being sent to {options.name} by another process: try again when it is done") from None
        try:
            self.check()
            is_offline = options.name == "wandb" and destination.wandb_mode == "offline"
            if not (is_offline and not with_alerts and is_stored_offline(folder, destination.config.project)):
                run_id, since = tracker_run_id(folder, options.name), last_contact(folder, options.name)
                self._follower = Follower(folder, destination, run_id, alerts_since=since if with_alerts else None)
        except BaseException:
            self._stack.close()
            raise

    def check(self) -> None:
        """Raise SelfSendingError if the run is going on and sends itself: two writers of one id would collide."""
        if sends_itself(self.folder, self.name):
            raise SelfSendingError(f"{self.folder} is running and sends itself (tracker.name={self.name}): left out")

    def send(self) -> None:
        """Send what is new."""
        self.check()
        if self._follower is not None:
            self._follower.send()

    def close(self) -> str:
        """Send the rest and return a line that says where the run is."""
        if self._follower is None:
            self._stack.close()
            if offline_files(self.folder.path, self.folder.read_tracker()["run_id"]):
                return f"{self.folder}: nothing new; wandb: offline, in {self.folder.path / 'wandb'}"
            state = self.folder.tracker_file("wandb")
            return f"{self.folder}: nothing new; by {state}, wandb has it all. To send it again as another run, remove that file"
        with self._stack:
            location = self._follower.close(is_finished=has_end(self.folder))
        rows = self._follower.num_rows
        return f"{self.folder}: {rows} {'row' if rows == 1 else 'rows'} sent; {location}"

    def abandon(self) -> None:
        """Close the tracker's program after an error."""
        with self._stack, contextlib.suppress(Exception):
            if self._follower is not None:
                self._follower.sink.abandon()


class Push:
    """Sends several runs; one that cannot be sent does not keep the others from it.

    Args:
        options: how they are sent.
        with_alerts: alert of new events.
        log: is called with a line for each run that was sent.
    """

    def __init__(self, options: PushOptions, *, with_alerts: bool = False, log: Callable[[str], None] = LOG.info) -> None:
        self.report = PushReport()
        self._options, self._with_alerts, self._log = options, with_alerts, log
        self._open: dict[Path, Pusher] = {}
        self._failed_at: dict[Path, float] = {}

    def update(self, runs: Sequence[Path], going: Collection[Path]) -> None:
        """Send what is new of each run, and close those that are not going on."""
        for run in runs:
            if run not in going and run in self.report.done and run not in self._open:
                continue
            if run in self._failed_at and time.monotonic() - self._failed_at[run] < RETRY_S:
                continue
            try:
                if (pusher := self._pusher(run, with_alerts=self._with_alerts and run in going)) is not None:
                    pusher.send()
                    self.report.failed.pop(run, None)
                    self._failed_at.pop(run, None)
                    if run not in going:
                        self._close(run)
            except SelfSendingError as error:
                self._abandon(run)
                self.report.skipped[run] = str(error)
            except Exception as error:  # a tracker's program may raise anything
                self._abandon(run)
                self._failed_at[run] = time.monotonic()
                self.report.failed[run] = f"{run}: {first_line(error)}"

    def close(self) -> None:
        """Close all runs that are still open."""
        for run in list(self._open):
            try:
                self._close(run)
            except Exception as error:  # as above
                self._abandon(run)
                self.report.failed[run] = f"{run}: {first_line(error)}"

    def _pusher(self, run: Path, *, with_alerts: bool) -> Pusher | None:
        if run not in self._open:
            folder = RunFolder(run)
            if not folder.metrics_path.exists():
                self.report.skipped[run] = f"{run}: there is nothing to send yet"
                return None
            self._open[run] = Pusher(folder, self._options, with_alerts=with_alerts)
            self.report.skipped.pop(run, None)
        return self._open[run]

    def _close(self, run: Path) -> None:
        line = self._open[run].close()
        del self._open[run]
        self.report.sent[run] = line
        self._log(line)

    def _abandon(self, run: Path) -> None:
        if (pusher := self._open.pop(run, None)) is not None:
            pusher.abandon()


def push_runs(runs: Sequence[Path], options: PushOptions, log: Callable[[str], None] = LOG.info) -> PushReport:
    """Send each run once."""
    push = Push(options, log=log)
    push.update(runs, ())
    return push.report


def watch_runs(
    find_runs: Callable[[], Sequence[Path]],
    is_going: Callable[[Path], bool],
    options: PushOptions,
    log: Callable[[str], None] = LOG.info,
) -> PushReport:
    """Send runs, and follow those that are going on until the last one ends or Ctrl-C.

    Args:
        find_runs: returns the runs; it is asked again and again, since a sweep may get more.
        is_going: returns True for a run that runs or waits for its start.
        options: how they are sent.
        log: is called with a line for each run whose end was sent, and with the number of runs whenever there are more.
    """
    push = Push(options, with_alerts=True, log=log)
    num_followed = 0
    try:
        while True:
            runs = find_runs()
            going = {run for run in runs if is_going(run)}
            count = sum(not sends_itself(RunFolder(run), options.name) for run in going)
            if count > num_followed:
                log(f"following {count} {'run' if count == 1 else 'runs'}; Ctrl-C ends it")
            num_followed = count
            push.update(runs, going)
            if not going:
                break
            time.sleep(INTERVAL_S)
    except KeyboardInterrupt:
        log("The watch ends here; the same command goes on.")
    finally:
        push.close()
    return push.report
