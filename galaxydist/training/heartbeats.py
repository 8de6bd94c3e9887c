"""What the processes of a run know of one another, and who is behind when none goes on. Pure: no clocks, no store, no files."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

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
