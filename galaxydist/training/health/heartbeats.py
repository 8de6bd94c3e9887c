"""Heartbeats of the ranks of a run: exchanged through a c10d store, and compared to find a hang.

While the run is healthy each rank writes one key every few seconds, and only looks whether a rank has failed. Only a rank that is
overdue requests a verdict; the first to do so reads the keys of all ranks, and the others wait for its verdict.
"""

import contextlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

import psutil

from galaxydist.errors import EXIT_FAILED, OneRankFailedError, first_line
from galaxydist.rank_store import FAILURE_POLL_S, RankFailure, RankStore
from galaxydist.runs.lock import pid_space

# Ranks, or groups of ranks, that a message describes one by one.
MAX_NAMED = 8
# A rank that runs but sends nothing for this number of intervals, and at least this time, counts as silent.
MIN_READINGS = 4
MIN_OBSERVATION_S = 3.0
EXIT_WAIT_S = 5.0
# Seconds from the loss of the store to the end of the process: what has broken its connection may end it with a better message.
LOST_S = 20.0


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The state of a rank that it last sent to the others.

    Args:
        rank: rank of the process.
        host, pid: host name and process id.
        step, phase: the current step and its phase.
        phase_index: number of phases of this step that are complete.
        beats: calls of ``Watchdog.beat`` so far.
        idle_s: seconds since the last of them.
        is_overdue: True if this is longer than allowed.
        serial: number of heartbeats sent; it grows only while the process runs.
        sent_at: seconds since 1970 by the clock of the process.
        ended: how the process left the loop, or "" while it is in it.
    """

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    phase_index: int
    beats: int
    idle_s: float
    is_overdue: bool
    serial: int
    sent_at: float
    ended: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str | bytes) -> "Heartbeat":
        return Heartbeat(**json.loads(text))

    @property
    def position(self) -> str:
        return f"in step {self.step}, {self.phase}" if self.step >= 0 else f"in the {self.phase}"

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, process {self.pid})"


# The last heartbeat of each rank that has sent one.
Heartbeats = Mapping[int, Heartbeat]


def silent_ranks(before: Heartbeats, after: Heartbeats, world_size: int) -> list[int]:
    """Return the ranks that sent nothing between two readings: stopped, ended, not started, or unable to run Python."""
    return [
        rank
        for rank in range(world_size)
        if rank not in after or after[rank].ended or (rank in before and before[rank].serial == after[rank].serial)
    ]


@dataclass(frozen=True)
class Hang:
    """A run in which no process makes progress.

    Args:
        heartbeats: last heartbeat of each rank that has sent one.
        silent: ranks that no longer send heartbeats.
        world_size: number of ranks.
    """

    heartbeats: Heartbeats
    silent: tuple[int, ...]
    world_size: int

    @property
    def num_living(self) -> int:
        return self.world_size - len(self.silent)

    @property
    def behind(self) -> tuple[int, ...]:
        """The ranks that the others wait for.

        These are the silent ranks, or else those with the fewest steps and, among these, in the earliest phase; all ranks if they
        are all in the same phase.
        """
        if self.silent:
            return self.silent
        positions = {rank: (beat.step, beat.phase_index) for rank, beat in self.heartbeats.items()}
        earliest = min(positions.values())
        return tuple(sorted(rank for rank, position in positions.items() if position == earliest))

    def message(self, *, setting: str, stacks: str, now: float) -> str:
        """Return a report of a few lines, however many ranks there are.

        Args:
            setting: the recipe key and value that was exceeded.
            stacks: the files of the stack dumps.
            now: seconds since 1970.
        """
        behind = self.behind
        subject = f"none of its {self.world_size} processes makes" if self.world_size > 1 else "its process does not make any"
        lines = [f"The run hangs: {subject} progress ({setting})."]
        if len(behind) == self.world_size > 1 and not self.silent:
            longest = max(self.heartbeats.values(), key=lambda beat: beat.idle_s)
            lines.append(f"  all are {_count_positions(self.heartbeats.values())}; {longest} longest, {longest.idle_s:.0f} s")
        else:
            lines += [f"  behind: {self._describe(rank, now)}" for rank in behind[:MAX_NAMED]]
            if more := behind[MAX_NAMED:]:
                lines.append(f"  behind: ranks {', '.join(map(str, more[:1000]))} likewise")
            if waiting := [self.heartbeats[rank] for rank in self.heartbeats.keys() - set(behind)]:
                lines.append(f"  waiting: {_count_positions(waiting)}")
        lines.append(f"  Stacks of every process that can still write: {stacks}")
        return "\n".join(lines)

    def _describe(self, rank: int, now: float) -> str:
        beat = self.heartbeats.get(rank)
        if beat is None:
            return f"rank {rank}, which was never heard of"
        text, silent_s = f"{beat} {beat.position}", max(now - beat.sent_at, 0.0)
        if beat.ended:
            return f"{text}, where it {beat.ended} {silent_s:.0f} s ago"
        if rank in self.silent:
            return f"{text}: silent for {silent_s:.0f} s (stopped, killed, or inside C code that keeps Python from running)"
        return f"{text}, for {beat.idle_s:.0f} s"


def find_hang(before: Heartbeats, after: Heartbeats, world_size: int) -> Hang | None:
    """Compare two readings of all ranks' heartbeats; return the hang, or None if the run makes progress.

    The run hangs if every rank is overdue or silent. The others may rightly wait for a rank that is not overdue or has made
    progress between the readings.
    """
    silent = set(silent_ranks(before, after, world_size))
    for rank, beat in after.items():
        has_moved = rank not in before or before[rank].beats != beat.beats
        if rank not in silent and (has_moved or not beat.is_overdue):
            return None
    return Hang(dict(after), tuple(sorted(silent)), world_size)


def _count_positions(beats: Iterable[Heartbeat]) -> str:
    """Count the ranks at each position: ``7 in step 12, forward/backward; 1 in step 12, data``."""
    counts = Counter(beat.position for beat in beats)
    return "; ".join(f"{count} {position}" for position, count in counts.most_common(MAX_NAMED))


@dataclass(frozen=True)
class Verdict:
    """The answer to the question whether the run hangs.

    Args:
        kind: ``hung``; ``wait`` if some rank still works; ``lost`` if the store does not answer.
        num_living: number of processes that will end by themselves.
        hang: details, only on the rank that reports the hang.
        error: the reason for ``lost``.
    """

    kind: Literal["hung", "wait", "lost"]
    num_living: int = 1
    hang: Hang | None = None
    error: str = ""


@dataclass(eq=False)
class NeighbourRanks:
    """The ranks before and after this one, if they run on this machine: finds those that were killed or crashed.

    Such a rank cannot tell the others, which might wait for it until ``train.hang_timeout``.

    Args:
        ranks: the store.
    """

    ranks: RankStore

    def __post_init__(self) -> None:
        self._unknown = {(self.ranks.rank + step) % self.ranks.size for step in (-1, 1)} - {self.ranks.rank}
        self._processes: dict[int, psutil.Process] = {}
        self._gone: set[int] = set()

    def tell(self) -> None:
        """Tell the neighbours of this process."""
        self.ranks.store.set(f"pid/{self.ranks.rank}", json.dumps([pid_space(), os.getpid()]))

    def find_dead(self) -> RankFailure | None:
        """Return the failure of a neighbour whose process is gone for the second time, although it has not said that it ends."""
        store = self.ranks.store
        for rank in [rank for rank in self._unknown if store.check([f"pid/{rank}", f"rank/{rank}"])]:
            self._unknown.remove(rank)
            space, pid = json.loads(store.get(f"pid/{rank}"))
            if space and space == pid_space():
                with contextlib.suppress(psutil.Error, OSError):
                    self._processes[rank] = psutil.Process(pid)
        for rank in [rank for rank, process in self._processes.items() if _is_gone(process)]:
            beat = Heartbeat.from_json(store.get(f"rank/{rank}"))
            if beat.ended:
                del self._processes[rank]
            elif rank in self._gone:
                return RankFailure(
                    rank,
                    beat.host,
                    beat.pid,
                    EXIT_FAILED,
                    f"its process was killed or has crashed (found by rank {self.ranks.rank})",
                )
            self._gone.add(rank)
        return None


def _is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, OSError):  # it cannot be seen, or this process has no file left to look with
        return False


@dataclass(eq=False)
class HeartbeatStore:
    """Exchanges heartbeats through the process group's store, in a thread; no method makes another thread wait.

    Args:
        ranks: the store; the thread opens its own connection.
        heartbeat: returns this rank's heartbeat for a serial number.
        interval_s: seconds between two heartbeats.
        peer_failed: called in the thread when another rank has failed, and with True if this rank has found its process dead.
        store_lost: called in the thread when the store has been lost for ``LOST_S`` seconds, with the error.
    """

    ranks: RankStore
    heartbeat: Callable[[int], Heartbeat]
    interval_s: float
    peer_failed: Callable[[RankFailure, bool], None]
    store_lost: Callable[[OneRankFailedError], None]

    def __post_init__(self) -> None:
        # The main thread's command may be the one that hangs.
        self._ranks = self.ranks.connect()
        self._store, self.rank, self.world_size = self._ranks.store, self.ranks.rank, self.ranks.size
        self._num_readings = max(MIN_READINGS, round(MIN_OBSERVATION_S / self.interval_s))
        self._neighbours = NeighbourRanks(self._ranks)
        self._serial = 0
        self._requested = threading.Event()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._verdict: Verdict | None = None
        self._lost: Verdict | None = None
        self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)
        self._thread.start()

    @property
    def observation_s(self) -> float:
        """Return the seconds that it takes to find a rank silent."""
        return self._num_readings * self.interval_s

    @property
    def max_wait_s(self) -> float:
        """Return the seconds after which a store without a verdict counts as lost."""
        return 3 * self.observation_s + 2.0

    def request_verdict(self) -> None:
        """Start to find out whether the run hangs; ``poll_verdict`` gives the result."""
        self._verdict = None
        self._requested.set()
        self._wake.set()

    def poll_verdict(self) -> Verdict | None:
        """Return the verdict of the last request, once; None while it is not known."""
        verdict, self._verdict = self._verdict, None
        return verdict or self._lost

    def wait_for_exit(self, num_living: int) -> None:
        """Wait until all living ranks have written their stacks.

        Launchers end all processes as soon as one has ended, and the store ends with rank 0.
        """
        waiter = threading.Thread(target=self._count_exits, args=(num_living,), daemon=True)
        waiter.start()
        waiter.join(EXIT_WAIT_S)

    def close(self) -> None:
        """Send a last heartbeat and stop the thread."""
        self._closing.set()
        self._wake.set()
        self._thread.join(2.0)

    def _run(self) -> None:
        try:
            self._neighbours.tell()
            while not self._closing.is_set():
                self._send()
                if self._requested.is_set():
                    self._requested.clear()
                    self._verdict = self._find_verdict()
                self._wait()
            self._send()
        except Exception as error:  # the store is gone; the type of the error depends on the backend
            self._lost = Verdict("lost", error=first_line(error))
            if not self._closing.wait(LOST_S):
                self.store_lost(self._ranks.lost(error))

    def _send(self) -> None:
        self._serial += 1
        self._store.set(f"rank/{self.rank}", self.heartbeat(self._serial).to_json())

    def _wait(self) -> None:
        """Wait for the next heartbeat or a request, and look for a failure of another rank meanwhile."""
        ends_at = time.monotonic() + self.interval_s
        while not self._wake.wait(max(0.0, min(FAILURE_POLL_S, ends_at - time.monotonic()))):
            if (failure := self._ranks.failure()) is not None and failure.rank != self.rank:
                self._ranks.acknowledge()
                self.peer_failed(failure, False)
            if not self._closing.is_set() and (dead := self._neighbours.find_dead()) is not None:
                first = self._ranks.announce(dead)
                self.peer_failed(first, first == dead)
            if time.monotonic() >= ends_at:
                break
        self._wake.clear()

    def _find_verdict(self) -> Verdict:
        episode = self._store.add("episode", 0)
        is_first = self._store.add(f"requests/{episode}", 1) == 1
        return (None if is_first else self._await_verdict(f"verdict/{episode}")) or self._decide(episode)

    def _decide(self, episode: int) -> Verdict:
        hang = self._observe()
        self._store.set(f"verdict/{episode}", "wait 0" if hang is None else f"hung {hang.num_living}")
        if hang is None:
            self._store.add("episode", 1)
            return Verdict("wait")
        return Verdict("hung", hang.num_living, hang)

    def _await_verdict(self, key: str) -> Verdict | None:
        """Return the verdict of the rank that requested first, or None if it does not finish."""
        for _ in range(2 * self._num_readings):
            if self._closing.is_set():
                break
            if self._store.check([key]):
                kind, _, num_living = self._store.get(key).decode().partition(" ")
                return Verdict("hung" if kind == "hung" else "wait", int(num_living))
            self._wait()
            self._send()
        return None

    def _observe(self) -> Hang | None:
        """Read all heartbeats until each rank has sent a new one, or has had the time to.

        The time is counted in readings: a process that was stopped meanwhile reads again before it calls others silent.
        """
        before = after = self._read()
        for _ in range(self._num_readings):
            self._wait()
            self._send()
            after = self._read()
            if self._closing.is_set() or not silent_ranks(before, after, self.world_size):
                break
        return find_hang(before, after, self.world_size)

    def _read(self) -> Heartbeats:
        keys = ((rank, f"rank/{rank}") for rank in range(self.world_size))
        return {rank: Heartbeat.from_json(self._store.get(key)) for rank, key in keys if self._store.check([key])}

    def _count_exits(self, num_living: int) -> None:
        pause = threading.Event()
        try:
            count = self._store.add("exits", 1)
            for _ in range(int(EXIT_WAIT_S / 0.1)):
                if count >= num_living:
                    return
                pause.wait(0.1)
                count = self._store.add("exits", 0)
        except Exception:  # rank 0 has exited, and the store with it
            return
