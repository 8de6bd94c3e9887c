"""What the processes of a run know of one another, and who is behind when none goes on. Pure: no clocks, no store, no files."""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Literal, Protocol

from galaxydist.errors import first_line

MOST_NAMED = 8


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The last word of a process, as it last told the others.

    Args:
        rank: of the process.
        host, pid: where it runs.
        step, phase: what it does.
        place: how many phases of this step it has left behind.
        beats: signs of life of its main thread so far.
        idle_s: seconds since the last of them.
        is_overdue: whether that is longer than it may be.
        serial: how often it has told its heartbeat; only a process that runs tells another.
        told_at: when, in seconds since 1970 by its own clock.
        ended: how it left the loop, or "" while it is in it.
    """

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    place: int
    beats: int
    idle_s: float
    is_overdue: bool
    serial: int
    told_at: float
    ended: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str | bytes) -> "Heartbeat":
        return Heartbeat(**json.loads(text))

    @property
    def whereabouts(self) -> str:
        return f"in step {self.step}, {self.phase}"

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, process {self.pid})"


Heard = Mapping[int, Heartbeat]


def silent_ranks(before: Heard, after: Heard, world_size: int) -> list[int]:
    """The ranks that told nothing between two readings: stopped, ended, not there yet, or unable to run Python."""
    return [
        rank
        for rank in range(world_size)
        if rank not in after or after[rank].ended or (rank in before and before[rank].serial == after[rank].serial)
    ]


@dataclass(frozen=True)
class Hang:
    """A run in which no process goes on.

    Args:
        heard: the last heartbeat of each rank that was ever heard of.
        silent: ranks that tell nothing any more.
        world_size: number of ranks.
    """

    heard: Heard
    silent: tuple[int, ...]
    world_size: int

    @property
    def num_living(self) -> int:
        return self.world_size - len(self.silent)

    @property
    def behind(self) -> tuple[int, ...]:
        """The ranks that the others wait for: the silent ones; else those with the fewest steps, and in it the earliest phase.
        All ranks where none is behind another."""
        if self.silent:
            return self.silent
        places = {rank: (beat.step, beat.place) for rank, beat in self.heard.items()}
        earliest = min(places.values())
        return tuple(sorted(rank for rank, place in places.items() if place == earliest))

    def message(self, *, setting: str, stacks: str, now: float) -> str:
        """What the user is told, in a few lines however many ranks there are.

        Args:
            setting: the recipe key and value that was exceeded.
            stacks: where the stacks lie.
            now: seconds since 1970.
        """
        behind, level = self.behind, len(self.behind) == self.world_size
        processes = "its process does not go on" if self.world_size == 1 else f"none of its {self.world_size} processes goes on"
        lines = [f"The run hangs: {processes} ({setting})."]
        if level and not self.silent and self.world_size > 1:
            longest = max(self.heard.values(), key=lambda beat: beat.idle_s)
            lines.append(f"  all stand in {_places(self.heard.values())}; {longest} for the longest, {longest.idle_s:.0f} s")
        else:
            lines += [f"  behind: {self._describe(rank, now)}" for rank in behind[:MOST_NAMED]]
            if more := behind[MOST_NAMED:]:
                lines.append(f"  behind: ranks {', '.join(map(str, more[:1000]))} likewise")
            if waiting := [self.heard[rank] for rank in self.heard.keys() - set(behind)]:
                lines.append(f"  waiting: {_places(waiting)}")
        lines.append(f"  Stacks of every process that can still write: {stacks}")
        return "\n".join(lines)

    def _describe(self, rank: int, now: float) -> str:
        beat = self.heard.get(rank)
        if beat is None:
            return f"rank {rank}, which was never heard of"
        text = f"{beat} {beat.whereabouts}"
        if beat.ended:
            return f"{text}, where it {beat.ended} {max(now - beat.told_at, 0.0):.0f} s ago"
        if rank in self.silent:
            silent_s = max(now - beat.told_at, 0.0)
            return f"{text}: silent for {silent_s:.0f} s (stopped, killed, or inside C code that keeps Python from running)"
        return f"{text}, for {beat.idle_s:.0f} s"


def find_hang(before: Heard, after: Heard, world_size: int) -> Hang | None:
    """Whether the run hangs, from two readings of what all ranks last told.

    It does when every rank is overdue or silent. A rank that has not been idle for long, or has gone on between the readings, may
    be what the others rightly wait for.
    """
    silent = set(silent_ranks(before, after, world_size))
    for rank, beat in after.items():
        if rank in silent:
            continue
        moved = rank not in before or before[rank].beats != beat.beats
        if moved or not beat.is_overdue:
            return None
    return Hang(dict(after), tuple(sorted(silent)), world_size)


def _places(beats: Iterable[Heartbeat]) -> str:
    """Where processes stand, counted: ``7 in step 12, forward/backward; 1 in step 12, data``."""
    counts = Counter(beat.whereabouts for beat in beats)
    return "; ".join(f"{count} {where}" for where, count in counts.most_common(MOST_NAMED))


# How processes tell one another their heartbeats through a c10d store, and agree that the run hangs.
#
# While all is well each rank writes one key every few seconds and reads none. Only a rank that is overdue asks; the first
# that asks
# reads all ranks' keys, the others wait for what it finds.

# A rank that runs but tells nothing for so many intervals counts as silent.
LOOKS = 4
LEAST_LOOKING_S = 3.0
HUNG, WAIT = "hung", "wait"


class KeyStore(Protocol):
    """What is used of ``torch.distributed.Store``."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def add(self, key: str, value: int) -> int: ...

    def check(self, keys: list[str]) -> bool: ...

    def clone(self) -> "KeyStore": ...


@dataclass(frozen=True)
class Answer:
    """What asking gave.

    Args:
        kind: ``hung``; ``wait``, since some rank still works; ``lost``, since the store does not answer.
        num_living: processes that will end by themselves.
        hang: what was found, on the one rank that tells the user.
        error: why the store was lost.
    """

    kind: Literal["hung", "wait", "lost"]
    num_living: int = 1
    hang: Hang | None = None
    error: str = ""


class HeartbeatStore:
    """One rank's thread that talks to the store; nothing here ever makes another thread wait.

    Args:
        store: of the process group; this thread opens a connection of its own to it.
        heartbeat: this rank's, given the number of times it was told.
        rank, world_size: of the process.
        interval_s: seconds between two tellings.
    """

    def __init__(
        self, store: KeyStore, heartbeat: Callable[[int], Heartbeat], *, rank: int, world_size: int, interval_s: float
    ) -> None:
        # Commands of one connection wait for one another: the main thread's may be what hangs.
        self._store = store.clone()
        self._heartbeat = heartbeat
        self._rank = rank
        self._world_size = world_size
        self._interval_s = interval_s
        self._num_looks = max(LOOKS, round(LEAST_LOOKING_S / interval_s))
        self._serial = 0
        self._asked = threading.Event()
        self._wake = threading.Event()
        self._closing = False
        self._answer: Answer | None = None
        self._error = ""
        self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)
        self._thread.start()

    @property
    def look_s(self) -> float:
        """How long it takes to find a rank silent."""
        return self._num_looks * self._interval_s

    @property
    def patience_s(self) -> float:
        """How long an answer may take before the store counts as lost."""
        return 3 * self.look_s + 2.0

    def ask(self) -> None:
        """Ask whether the run hangs; see ``take_answer``."""
        self._answer = None
        self._asked.set()
        self._wake.set()

    def take_answer(self) -> Answer | None:
        """What the last question gave, once; None while it is being looked into."""
        answer, self._answer = self._answer, None
        return answer or (Answer("lost", error=self._error) if self._error else None)

    def leave_together(self, num_living: int, at_most_s: float) -> None:
        """Wait until all living ranks have written their stacks: launchers end all processes as soon as one has ended, and the
        store ends with rank 0."""
        waiter = threading.Thread(target=self._count_out, args=(num_living, at_most_s), daemon=True)
        waiter.start()
        waiter.join(at_most_s)

    def close(self) -> None:
        """Stop telling, after a last word."""
        self._closing = True
        self._wake.set()
        self._thread.join(2.0)

    def _run(self) -> None:
        try:
            while not self._closing:
                self._tell()
                if self._asked.is_set():
                    self._asked.clear()
                    self._answer = self._confer()
                self._wake.wait(self._interval_s)
                self._wake.clear()
            self._tell()
        except Exception as error:  # the store went away: whatever the backend raises then
            self._error = first_line(error)

    def _tell(self) -> None:
        self._serial += 1
        self._store.set(f"rank/{self._rank}", self._heartbeat(self._serial).to_json())

    def _confer(self) -> Answer:
        episode = self._store.add("episode", 0)
        if self._store.add(f"judges/{episode}", 1) > 1:
            return self._hear(f"outcome/{episode}") or self._judge(episode)
        return self._judge(episode)

    def _judge(self, episode: int) -> Answer:
        hang = self._look()
        self._store.set(f"outcome/{episode}", f"{WAIT} 0" if hang is None else f"{HUNG} {hang.num_living}")
        if hang is None:
            self._store.add("episode", 1)
            return Answer("wait")
        return Answer("hung", hang.num_living, hang)

    def _hear(self, key: str) -> Answer | None:
        """What another rank found, or None where it does not come to an end."""
        for _ in range(2 * self._num_looks):
            if self._closing:
                break
            if self._store.check([key]):
                kind, _, num_living = self._store.get(key).decode().partition(" ")
                return Answer("hung" if kind == HUNG else "wait", int(num_living))
            self._pause()
        return None

    def _look(self) -> Hang | None:
        """Watch all ranks until each has been heard of anew, or has had the time to.

        The time is counted in looks: a process that was stopped meanwhile looks again before it calls others silent.
        """
        before = self._read()
        after = before
        for _ in range(self._num_looks):
            self._pause()
            after = self._read()
            if self._closing or not silent_ranks(before, after, self._world_size):
                break
        return find_hang(before, after, self._world_size)

    def _read(self) -> dict[int, Heartbeat]:
        keys = ((rank, f"rank/{rank}") for rank in range(self._world_size))
        return {rank: Heartbeat.from_json(self._store.get(key)) for rank, key in keys if self._store.check([key])}

    def _pause(self) -> None:
        self._wake.wait(self._interval_s)
        self._wake.clear()
        self._tell()

    def _count_out(self, num_living: int, at_most_s: float) -> None:
        pause = threading.Event()
        try:
            count = self._store.add("left", 1)
            for _ in range(int(at_most_s / 0.1)):
                if count >= num_living:
                    return
                pause.wait(0.1)
                count = self._store.add("left", 0)
        except Exception:  # rank 0 has left, and the store with it
            return
