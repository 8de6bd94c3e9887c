"""What a check found, and how it is told."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from galaxydist.atomic_files import read_json, write_json
from galaxydist.errors import UserError

Level = Literal["ok", "warning", "failure"]
LEVELS: tuple[Level, ...] = ("ok", "warning", "failure")


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Args:
        name: what was looked at.
        level: how it is.
        text: what was found.
        remedy: what to do; empty where all is well.
    """

    name: str
    level: Level
    text: str
    remedy: str = ""

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        return cls(plain["name"], plain["level"], plain["text"], plain["remedy"])


def ok(name: str, text: str) -> Check:
    """All is well."""
    return Check(name, "ok", text)


def warning(name: str, text: str, remedy: str) -> Check:
    """A run starts, but is slow or lacks something."""
    return Check(name, "warning", text, remedy)


def failure(name: str, text: str, remedy: str) -> Check:
    """A run would not start, or not survive."""
    return Check(name, "failure", text, remedy)


def has_failed(checks: Iterable[Check]) -> bool:
    """Whether any of them is a failure."""
    return any(check.level == "failure" for check in checks)


def worst_first(checks: Iterable[Check]) -> list[Check]:
    """By level, in their order."""
    return sorted(checks, key=lambda check: -LEVELS.index(check.level))


def to_dicts(checks: Iterable[Check]) -> list[dict[str, Any]]:
    """As JSON has it."""
    return [asdict(check) for check in checks]


def render(sections: Mapping[str, Iterable[Check]]) -> str:
    """The report as text: a title a section, a line a check, its remedy below.

    Args:
        sections: title -> checks.
    """
    sections = {title: list(checks) for title, checks in sections.items()}
    every = [check for checks in sections.values() for check in checks]
    width = max((len(check.name) for check in every), default=0)
    lines: list[str] = []
    for title, checks in sections.items():
        lines.append(f"{title}:")
        for check in checks:
            first, *rest = check.text.splitlines() or [""]
            lines.append(f"  {check.level:<7}  {check.name:<{width}}  {first}")
            lines += [f"{'':{width + 13}}{line}" for line in rest]
            lines += [f"{'':{width + 13}}-> {line}" for line in check.remedy.splitlines()]
    counts = {level: sum(check.level == level for check in every) for level in LEVELS}
    lines.append(f"{counts['ok']} ok, {_count(counts['warning'], 'warning')}, {_count(counts['failure'], 'failure')}")
    return "\n".join(lines)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


# What one rank of the doctor's job found: plain values, written as JSON after each part.
#
# So a rank that dies leaves what it knows.

FORMAT_VERSION = 1


@dataclass
class Timing:
    """All-reduces of one backend.

    Args:
        num_bytes: of the tensor.
        median_s: seconds of one, the slowest rank's, median over several.
        error: why there are none.
    """

    num_bytes: int = 0
    median_s: float = 0.0
    error: str | None = None


@dataclass
class RankReport:
    """One rank, filled in as it goes on.

    Args:
        rank, world_size: of the job.
        host: the node, as the scheduler calls it.
        machine: the same for processes of one machine (several nodes of a test bed are one).
        part: what it is about; "done" at the end.
        finished: the parts before.
        checks: of the node.
        versions: name -> version, to be equal on all ranks.
        cores: that the process may run on.
        cpus_per_task: that SLURM gave it.
        visible_gpus: CUDA_VISIBLE_DEVICES; None: not set.
        slurm_gpus: SLURM_STEP_GPUS or SLURM_JOB_GPUS, of the whole node.
        num_gpus: that torch sees.
        gpu: the unique id of the one that this rank would train on.
        interface: that gloo is told to use; None: the one that the machine's name resolves to.
        address: of this rank in the rendezvous.
        store: where the ranks met, host and port.
        meeting_s: seconds until all had met.
        timings: backend -> all-reduces.
        clock_s: this clock minus rank 0's.
        round_trip_s: within which that was measured: the clock's error is at most half of it.
        seen_s: seconds until a file written by rank 0 was seen; None: never.
        renamed_s: the same for a file replaced by the last rank.
        torn: times that neither the old nor the new contents were read meanwhile.
        signal_s: seconds until SIGUSR2 arrived; None: never.
        signal_error: why it was not sent.
        error: what ended the examination early.
    """

    rank: int
    world_size: int
    host: str
    machine: str
    part: str = "start"
    finished: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    cores: int = 0
    cpus_per_task: int | None = None
    visible_gpus: str | None = None
    slurm_gpus: str | None = None
    num_gpus: int = 0
    gpu: str | None = None
    interface: str | None = None
    address: str | None = None
    store: str = ""
    meeting_s: float | None = None
    timings: dict[str, Timing] = field(default_factory=dict)
    clock_s: float | None = None
    round_trip_s: float | None = None
    seen_s: float | None = None
    renamed_s: float | None = None
    torn: int = 0
    signal_s: float | None = None
    signal_error: str | None = None
    error: str | None = None

    @property
    def is_done(self) -> bool:
        return self.part == "done"

    def write(self, folder: Path, part: str) -> None:
        """Note that a part is begun, and those before are finished, and write everything so far."""
        if part != self.part:
            self.finished.append(self.part)
        self.part = part
        write_json(folder / f"rank-{self.rank}.json", {"format": FORMAT_VERSION, **asdict(self)})

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        values = {key: value for key, value in plain.items() if key != "format"}
        values["checks"] = [Check.from_dict(check) for check in plain["checks"]]
        values["timings"] = {name: Timing(**timing) for name, timing in plain["timings"].items()}
        return cls(**values)


def read_reports(folder: Path) -> list[RankReport]:
    """What the ranks have written so far, in their order.

    Raises:
        UserError: written by another galaxydist.
    """
    reports = []
    for path in folder.glob("rank-*.json"):
        plain = read_json(path)
        if plain.get("format") != FORMAT_VERSION:
            raise UserError(f"{path} was written by another galaxydist: remove {folder} and give the command again")
        reports.append(RankReport.from_dict(plain))
    return sorted(reports, key=lambda report: report.rank)


# Naming ranks by their hosts.

MOST_HOSTS = 4


def name_places(some: Sequence[RankReport], every: Sequence[RankReport]) -> str:
    """Where some of the ranks are: "n1, n2", or "n1 (rank 3)" where not all ranks of a host are meant.

    Args:
        some: the ranks.
        every: all of them.
    """
    if len(some) == len(every):
        return "all ranks" if len(every) > 1 else f"{every[0].host}"
    names = []
    for host in dict.fromkeys(report.host for report in some):
        here = [report.rank for report in some if report.host == host]
        whole = len(here) == sum(report.host == host for report in every)
        ranks = ", ".join(str(rank) for rank in here[:MOST_HOSTS]) + (", ..." if len(here) > MOST_HOSTS else "")
        names.append(host if whole else f"{host} (rank{'' if len(here) == 1 else 's'} {ranks})")
    shown = ", ".join(names[:MOST_HOSTS])
    return shown if len(names) <= MOST_HOSTS else f"{shown} and {len(names) - MOST_HOSTS} more hosts"
