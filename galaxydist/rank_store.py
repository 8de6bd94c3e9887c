"""Messages between the ranks of a run through the process group's store, and the end of a process after a failure.

A collective is no way to wait for long, or for a rank that may fail: with NCCL it keeps a GPU busy, ends the process at the
group's timeout, and returns only once every rank has called it. So ranks wait for each other's work by asking the store, and a
rank that fails alone writes that there: the others find it within a second and leave too.
"""

import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from galaxydist.errors import (
    OneRankFailedError,
    PeerFailedError,
    RunFailedError,
    UserError,
    exit_code_of,
    first_line,
    is_known_to_all,
)

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

# For work of which nobody knows how long it takes: labelling a survey, metrics and figures of millions of galaxies.
LONG_TIMEOUT = timedelta(hours=12)
# A rank that waits asks at once, then less and less often.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.001, 0.25
# Seconds between two looks at the store for a failure of another rank.
FAILURE_POLL_S = 1.0
# The store may be rank 0's own: it stays that long until the others know of the error.
SEEN_S = 4.0
FLUSH_S = 1.0
# Seconds for all exit tasks of a process together: launchers kill it 30 s after they have asked it to end.
END_S = 22.0
# An exit task that begins later still has this time.
LEAST_S = 0.5

# Parts of the messages of gloo and NCCL about a connection to a rank that has ended.
BROKEN = ("Connection reset by peer", "Connection closed by peer", "Broken pipe", "remote process exited")

# Worlds that this process has opened; all processes of a run open the same, so that their keys never meet.
_OPENED = itertools.count()
_ENDING = threading.Lock()


@dataclass(frozen=True)
class RankFailure:
    """A failure that one rank alone knows of.

    Args:
        rank: rank of the process.
        host, pid: host name and process id.
        code: exit code of the process.
        text: first line of its error.
    """

    rank: int
    host: str
    pid: int
    code: int
    text: str

    @staticmethod
    def of(rank: int, error: BaseException) -> "RankFailure":
        """Return the failure of this process."""
        has_message = isinstance(error, UserError | RunFailedError) or not str(error)
        text = first_line(error) if has_message else f"{type(error).__name__}: {first_line(error)}"
        return RankFailure(rank, socket.gethostname(), os.getpid(), exit_code_of(error), text)

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, process {self.pid}) failed: {self.text}"

    def to_error(self) -> PeerFailedError:
        """Return the error that the other ranks raise."""
        return PeerFailedError(str(self), self.code)


@dataclass(eq=False)
class RankStore:
    """One connection to the store of the process group, under keys of this run.

    Its keys are counters and one value of each rank, so that the store does not grow. If it is lost, the methods that look for
    a failure find none.

    Args:
        store: the group's store.
        rank, size: rank of this process, and world size.
        main: host name and process id of rank 0, for messages.
    """

    store: "Store"
    rank: int
    size: int
    main: str = "unknown process"

    def __post_init__(self) -> None:
        self._num_works = {"main": 0, "all": 0}

    @staticmethod
    def of_group(rank: int, size: int) -> "RankStore":
        """Open the store of the default process group; all ranks call it equally often."""
        import torch.distributed as dist
        from torch._C._distributed_c10d import PrefixStore

        store = PrefixStore(f"galaxydist/{next(_OPENED)}", dist.distributed_c10d._get_default_store())
        if rank == 0:
            store.set("process", f"{socket.gethostname()}, process {os.getpid()}")
        return RankStore(store, rank, size, store.get("process").decode())

    def connect(self) -> "RankStore":
        """Open a further connection, for a thread: commands on one connection wait for one another."""
        return RankStore(self.store.clone(), self.rank, self.size, self.main)

    def wait_for_main(self, at_most: timedelta = LONG_TIMEOUT) -> None:
        """Wait until rank 0 has called this as often as the calling rank has.

        Raises:
            PeerFailedError: a rank has failed.
            OneRankFailedError: the store is gone, or the time is over.
        """
        self._wait("main", is_done=self.rank == 0, num_done=1, at_most=at_most)

    def wait_for_all(self, at_most: timedelta = LONG_TIMEOUT) -> None:
        """Wait until all ranks have called this as often as the calling rank has.

        Raises:
            PeerFailedError, OneRankFailedError: as ``wait_for_main``.
        """
        self._wait("all", is_done=True, num_done=self.size, at_most=at_most)

    def _wait(self, key: str, *, is_done: bool, num_done: int, at_most: timedelta) -> None:
        """Count this rank's work if ``is_done``, and wait until ``num_done`` ranks have done theirs."""
        self._num_works[key] += 1
        pause, deadline, next_look = FIRST_PAUSE_S, time.monotonic() + at_most.total_seconds(), 0.0
        own = int(is_done)
        while True:
            try:
                if self.store.add(key, own) >= num_done * self._num_works[key]:
                    return
            except RuntimeError as error:  # torch's DistError
                raise self.lost(error) from error
            own = 0
            now = time.monotonic()
            if now >= next_look and (failure := self.failure()) is not None:
                self.acknowledge()
                raise failure.to_error()
            if now >= next_look:
                next_look = now + FAILURE_POLL_S
            if now >= deadline:
                raise OneRankFailedError(f"another rank has not finished its work within {at_most}")
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_PAUSE_S)

    def announce(self, failure: RankFailure) -> RankFailure:
        """Write that this rank has failed, and return the first failure of any rank, of which others may be consequences.

        Raises:
            RuntimeError: the store is lost.
        """
        self.acknowledge()
        return RankFailure(**json.loads(self.store.compare_set("failed", "", json.dumps(asdict(failure)))))

    def announce_error(self, error: BaseException) -> BaseException:
        """Tell the other ranks of an error, and return the error to report here.

        That is the error itself if all ranks know of it, or if this rank has failed first. Otherwise it is that of the rank which
        has, or the loss of rank 0; a broken connection is a consequence of either, or of the death of a rank that could not tell.
        """
        if is_known_to_all(error):
            return error
        is_torch_error = isinstance(error, RuntimeError) and not isinstance(error, RunFailedError)
        if is_torch_error and any(text in str(error) for text in BROKEN):
            self._wait_for_failure()
            cause: BaseException = OneRankFailedError(
                "the connection to another rank has broken: that process was killed (for lack of memory?) or crashed, or its "
                f"machine is down; see what the launcher or the scheduler says ({first_line(error)})"
            )
        else:
            cause = error
        try:
            first = self.announce(RankFailure.of(self.rank, cause))
        except RuntimeError as lost:
            return self.lost(lost) if is_torch_error else error
        if first.rank == self.rank:
            return cause
        return first.to_error() if isinstance(error, Exception) else error

    def _wait_for_failure(self) -> None:
        """Wait until a rank is found dead, which takes two looks; that explains more than a broken connection."""
        deadline = time.monotonic() + 3 * FAILURE_POLL_S
        while self.failure() is None and time.monotonic() < deadline:
            time.sleep(0.05)

    def lost(self, error: Exception) -> OneRankFailedError:
        """Return the error of a rank that has lost the store, for the error of a command."""
        who = (
            f"rank 0 cannot be reached any more ({self.main}): it or its launcher"
            if self.rank
            else "the launcher cannot be reached: it"
        )
        return OneRankFailedError(f"{who} was killed, or its machine is down ({first_line(error)})")

    def failure(self) -> RankFailure | None:
        """Return the failure that a rank has announced first."""
        try:
            return RankFailure(**json.loads(self.store.get("failed"))) if self.store.check(["failed"]) else None
        except RuntimeError:
            return None

    def acknowledge(self) -> None:
        """Record that this rank knows of the error."""
        with contextlib.suppress(RuntimeError):
            self.store.set(f"seen/{self.rank}", "")

    def wait_until_seen(self) -> None:
        """Keep rank 0 and its store until the other ranks know of the error, at most ``SEEN_S`` seconds.

        With NCCL a broadcast of an error returns on rank 0 before it begins elsewhere, and never ends there if rank 0 is gone.
        """
        deadline, others = time.monotonic() + SEEN_S, [f"seen/{rank}" for rank in range(1, self.size)]
        with contextlib.suppress(RuntimeError):
            while self.rank == 0 and time.monotonic() < deadline and not self.store.check(others):
                time.sleep(0.02)


# An exit task of a process that ends, and the seconds that it may take.
ExitTask = tuple[Callable[[], Any], float]
# Ends the process after an error, with exit tasks; returns if the process is the only one, whose error is raised as usual.
Leave = Callable[[BaseException, Iterable[ExitTask]], None]


def run_within(seconds: float, work: Callable[[], Any]) -> None:
    """Run a function in a thread and wait for it, but no longer than ``seconds``; its errors are lost."""

    def quietly() -> None:
        with contextlib.suppress(Exception, SystemExit):  # wandb ends its work with sys.exit
            work()

    thread = threading.Thread(target=quietly, name="exit-task", daemon=True)
    thread.start()
    thread.join(seconds)


def end_process(code: int, tasks: Iterable[ExitTask] = ()) -> NoReturn:
    """Do some exit tasks, each within its time and all within ``END_S``, and end the process without the interpreter's own end.

    That would wait for threads, and with NCCL for the other ranks. Of several threads that call this the first one ends the
    process; the others wait.
    """
    if not _ENDING.acquire(blocking=False):
        threading.Event().wait()
    deadline = time.monotonic() + END_S
    try:
        for work, seconds in (*tasks, (sys.stdout.flush, FLUSH_S), (sys.stderr.flush, FLUSH_S)):
            run_within(min(seconds, max(deadline - time.monotonic(), LEAST_S)), work)
    finally:
        os._exit(code)
