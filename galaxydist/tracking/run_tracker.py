"""The tracker of a run while it trains: a thread of rank 0 that follows the run folder, so that no step waits for it.

metrics.jsonl is exact, and every tracker is derived from it. The steps that the tracker's program has *stored* decide what it is
sent: at a start the rows that it lacks, later each new row once it is complete. The files are the queue: a program that hangs or
is slow is sent the rest later, by ``galaxydist track push`` if need be.
"""

import contextlib
import logging
import shlex
import threading
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path

from galaxydist.distributed import World
from galaxydist.errors import first_line
from galaxydist.recipe.schema import Recipe
from galaxydist.runs.folder import RunFolder, TrackerName
from galaxydist.shards.manifest import Manifest
from galaxydist.tracking.follower import Destination, Follower, last_contact, tracker_run_id
from galaxydist.tracking.run_info import describe_dataset

LOG = logging.getLogger(__name__)

# Seconds between two looks at the run folder.
INTERVAL_S = 2.0
# The end of a finished run, and of one that was stopped or failed, waits for its tracker no longer than this.
FINISH_S, STOP_S = 120.0, 8.0
# After this time the wait is logged.
QUIET_S = 10.0


class Tracker:
    """Tracker that does nothing, and base class of the others."""

    run_id: str | None = None

    def wake(self) -> None:
        """Tell the tracker that the run folder has a new line. Returns at once."""

    def finish(self, exit_code: int) -> str | None:
        """Close the tracker; after a good end, return a line that says where it keeps the run.

        Args:
            exit_code: 0 if the run has its result.
        """


class RunTracker(Tracker):
    """Follows a run folder in a thread. A failure is logged once, and never stops or delays the training.

    Args:
        open_follower: opens the tracker's program, which may take any time.
        folder: run folder, cut back to the step from which the run continues.
        name: of the tracker.
        run_id: the tracker's id of the run.
    """

    def __init__(self, open_follower: Callable[[], Follower], folder: RunFolder, name: TrackerName, run_id: str) -> None:
        self.run_id = run_id
        self.interval_s = INTERVAL_S
        self._open, self._folder, self._name = open_follower, folder, name
        self._news, self._is_ending, self._is_over = threading.Event(), threading.Event(), threading.Event()
        self._exit_code = 1
        self._has_failed = False
        self._location: str | None = None
        threading.Thread(target=self._follow, name="tracker", daemon=True).start()

    def wake(self) -> None:
        """Tell the thread that the run folder has a new line."""
        self._news.set()

    def finish(self, exit_code: int) -> str | None:
        """Send the rest and close the tracker's program, within ``FINISH_S``, or ``STOP_S`` if the run has no result.

        Returns:
            After a good end, a line that says where the tracker keeps the run.
        """
        self._exit_code = exit_code
        self._is_ending.set()
        self._news.set()
        limit = FINISH_S if exit_code == 0 else STOP_S
        if not self._is_over.wait(min(QUIET_S, limit)) and limit > QUIET_S:
            LOG.info("waiting for %s, %g s at most", self._name, limit)
            self._is_over.wait(limit - QUIET_S)
        if not self._is_over.is_set():
            self._fail(f"it did not answer within {limit:g} s")
            _end_program(self._name)
        return self._location if exit_code == 0 else None

    def _follow(self) -> None:
        follower: Follower | None = None
        try:
            with exclusive(self._folder, self._name):
                follower = self._open()
                while not self._is_ending.is_set():
                    follower.send()
                    self._news.wait()
                    self._news.clear()
                    self._is_ending.wait(self.interval_s)
                self._location = follower.close(is_finished=self._exit_code == 0)
        except Exception as error:  # no error of a tracker stops the run
            self._fail(first_line(error))
            if follower is not None:
                follower.sink.abandon()
        self._is_over.set()

    def _fail(self, text: str) -> None:
        if self._has_failed:
            return
        self._has_failed = True
        LOG.warning(
            "the tracker %s failed (%s). metrics.jsonl has every number; what the tracker lacks is sent to it when the same "
            "command is given again, or with: galaxydist track push %s --to %s",
            self._name,
            text,
            shlex.quote(str(self._folder.path)),
            self._name,
        )


def _end_program(name: TrackerName) -> None:
    if name == "wandb":
        from galaxydist.tracking.wandb_sink import end_service

        end_service()


@contextlib.contextmanager
def exclusive(folder: RunFolder, name: TrackerName, *, waits: bool = True) -> Iterator[None]:
    """Hold a run's tracker for one process at a time; where the file system has no locks, the run folder's own lock has to do.

    Args:
        folder: the run folder.
        name: of the tracker.
        waits: wait until another process is done.

    Raises:
        filelock.Timeout: another process holds it, and ``waits`` is False.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(guard_path(folder, name), timeout=-1 if waits else 0, thread_local=False, fallback_to_soft=False)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock)
        except Timeout:
            raise
        except (OSError, NotImplementedError) as error:
            LOG.debug("no lock of %s: %s", folder, error)
        yield


def guard_path(folder: RunFolder, name: TrackerName) -> Path:
    """Return the path of the file that is locked while a process sends a run to a tracker."""
    return folder.path / f".tracker-{name}.guard"


def start_tracker(
    world: World,
    recipe: Recipe,
    folder: RunFolder,
    manifest: Manifest,
    *,
    run_id: str | None,
    environ: MutableMapping[str, str],
) -> Tracker:
    """Return the tracker of a run: on rank 0 the recipe's, which continues ``run_id`` or the run folder's; else a no-op."""
    name = recipe.tracker.name
    if not world.is_main or name == "none":
        return Tracker()
    run_id = tracker_run_id(folder, name, run_id)
    destination = Destination(name, recipe.tracker, environ)
    since, dataset = last_contact(folder, name), describe_dataset(manifest)
    return RunTracker(lambda: Follower(folder, destination, run_id, dataset=dataset, alerts_since=since), folder, name, run_id)


def complete_tracker(
    world: World, recipe: Recipe, folder: RunFolder, manifest: Manifest, *, environ: MutableMapping[str, str]
) -> str | None:
    """Send the tracker of a finished run the rows that it lacks; the run may have been killed after its result was written."""
    name = recipe.tracker.name
    if not world.is_main or name == "none" or folder.read_tracker(name).get("is_complete", True):
        return None
    return start_tracker(world, recipe, folder, manifest, run_id=None, environ=environ).finish(0)
