"""The exit of a rank of a training after an error: its exit tasks, and who else hears of it."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from galaxydist.distributed import World
from galaxydist.errors import PeerFailedError, is_known_to_all
from galaxydist.rank_store import SEEN_S, ExitTask, Leave, run_within

# Seconds for each exit task; all together they have ``rank_store.END_S``, after the record of the error.
CHECKPOINT_S, LOCK_S, WEBHOOK_S, TRACKER_S, STACKS_S = 15.0, 3.0, 4.0, 8.0, 3.0
NOTE_S = 3.0


@dataclass(eq=False)
class ExitTasks:
    """Tasks that a rank still does if it leaves after an error, in the order of these attributes.

    An attribute is None before there is something to do, and again once it was done.

    Args:
        checkpoint: wait until the checkpoint that is being written is complete.
        lock: release the run folder, before what may wait for a server.
        webhook: post the alerts that are left.
        tracker: end the tracker's run as failed.
        stacks: remove the file of this rank's stacks if it is empty.
    """

    checkpoint: Callable[[], Any] | None = None
    lock: Callable[[], Any] | None = None
    webhook: Callable[[], Any] | None = None
    tracker: Callable[[], Any] | None = None
    stacks: Callable[[], Any] | None = None

    def __iter__(self) -> Iterator[ExitTask]:
        tasks = [
            (self.checkpoint, CHECKPOINT_S),
            (self.lock, LOCK_S),
            (self.webhook, WEBHOOK_S),
            (self.tracker, TRACKER_S),
            (self.stacks, STACKS_S),
        ]
        return ((work, seconds) for work, seconds in tasks if work is not None)

    def end_tracker(self) -> None:
        """Do the tracker's work now, within its time, and not again."""
        if self.tracker is not None:
            run_within(TRACKER_S, self.tracker)
            self.tracker = None


@contextlib.contextmanager
def leaving_alone(world: World, leave: Leave, tasks: ExitTasks, note: Callable[[Exception], None]) -> Iterator[None]:
    """After an error of this rank alone, tell the other ranks, and leave the process if the launcher allows it.

    The contexts around this one are not closed then: that might wait for the other ranks, or for work on a GPU that does.

    Args:
        world: the processes.
        leave: ends a process of several, or returns.
        tasks: done before the process ends.
        note: writes an error that began on this rank into the run folder.

    Raises:
        PeerFailedError, OneRankFailedError: ``leave`` has returned, and the error is a consequence of another rank's.
    """
    try:
        yield
    except BaseException as error:
        if world.store is None or is_known_to_all(error):
            raise
        reported = world.store.announce_error(error)
        if isinstance(reported, Exception) and not isinstance(reported, PeerFailedError):
            run_within(NOTE_S, partial(note, reported))  # before the launcher's report, which knows less
        leave(reported, [*tasks, (world.store.wait_until_seen, SEEN_S)])
        if reported is error:
            raise
        raise reported from error
