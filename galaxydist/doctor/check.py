"""Results of the doctor's checks, reports of the ranks, and their text.

Each rank writes its report as JSON after every part, so that the report of a rank that dies shows how far it came.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from galaxydist.atomic_files import read_json, write_json

Level = Literal["ok", "warning", "failure"]
LEVELS: tuple[Level, ...] = ("ok", "warning", "failure")


@dataclass(frozen=True)
class Check:
    """Result of one check: one line of the report.

    Args:
        name: subject of the check.
        level: severity.
        text: result of the check.
        remedy: what to do; empty for a passed check.
    """

    name: str
    level: Level
    text: str
    remedy: str = ""


def ok(name: str, text: str) -> Check:
    """Return a passed check."""
    return Check(name, "ok", text)


def warning(name: str, text: str, remedy: str) -> Check:
    """Return a warning: a run starts, but is slow or lacks something."""
    return Check(name, "warning", text, remedy)


def failure(name: str, text: str, remedy: str) -> Check:
    """Return a failed check: a run would not start, or would end early."""
    return Check(name, "failure", text, remedy)


def has_failed(checks: Iterable[Check]) -> bool:
    """Return True if any check is a failure."""
    return any(check.level == "failure" for check in checks)


def worst_first(checks: Iterable[Check]) -> list[Check]:
    """Sort checks by level, worst first; checks of one level keep their order."""
    return sorted(checks, key=lambda check: -LEVELS.index(check.level))


def render(sections: Mapping[str, Iterable[Check]]) -> str:
    """Format the report as text: a title per section, a line per check with its remedy below, and a count of the levels.

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
    plural = {level: "" if count == 1 else "s" for level, count in counts.items()}
    lines.append(
        f"{counts['ok']} ok, {counts['warning']} warning{plural['warning']}, {counts['failure']} failure{plural['failure']}"
    )
    return "\n".join(lines)


FORMAT_VERSION = 2


@dataclass
class Timing:
    """Times of all-reduces with one backend.

    Args:
        num_bytes: size of the tensor.
        median_s: seconds of one all-reduce on its slowest rank, median over several.
        error: reason of a failed measurement.
    """

    num_bytes: int = 0
    median_s: float = 0.0
    error: str | None = None


@dataclass
class RankReport:
    """Results of one rank, filled in part by part.

    Args:
        rank, world_size: rank and world size of the job.
        host: the node's name in the scheduler.
        machine: id of the machine, equal for all its processes (several nodes of a mini cluster are one machine).
        part: the current part; "done" at the end.
        finished: the earlier parts.
        checks: checks of the node.
        versions: name -> version; they must be equal on all ranks.
        cores: cores that the process may run on.
        cpus_per_task: cores that SLURM gave to the task.
        visible_gpus: CUDA_VISIBLE_DEVICES; None: not set.
        slurm_gpus: SLURM_STEP_GPUS or SLURM_JOB_GPUS, for the whole node.
        num_gpus: GPUs that torch sees.
        gpu: unique id of the GPU that this rank would train on; None: it has none, or it cannot be used.
        gpu_problem: first line of the error if its GPU cannot be used.
        interface: gloo's network interface; None: the one that the host name resolves to.
        address: network address of this rank.
        store: host and port of the rendezvous.
        meeting_s: seconds until all ranks had joined the rendezvous.
        timings: backend -> times of all-reduces.
        clock_s: this clock minus rank 0's, in seconds.
        round_trip_s: round trip of the clock measurement, in seconds; its error is at most half of it.
        seen_s: seconds until this rank saw a file written by rank 0; None: never.
        renamed_s: seconds until this rank saw the contents replaced by the last rank; None: never.
        signal_s: seconds until SIGUSR2 arrived; None: never.
        signal_error: reason why the signal was not sent.
        error: error that ended the examination early.
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
    gpu_problem: str | None = None
    interface: str | None = None
    address: str | None = None
    store: str = ""
    meeting_s: float | None = None
    timings: dict[str, Timing] = field(default_factory=dict)
    clock_s: float | None = None
    round_trip_s: float | None = None
    seen_s: float | None = None
    renamed_s: float | None = None
    signal_s: float | None = None
    signal_error: str | None = None
    error: str | None = None

    @property
    def is_done(self) -> bool:
        return self.part == "done"

    def write(self, folder: Path, part: str) -> None:
        """Start a part, mark the previous one as finished, and write the report."""
        if part != self.part:
            self.finished.append(self.part)
        self.part = part
        write_json(folder / f"rank-{self.rank}.json", {"format": FORMAT_VERSION, **asdict(self)})


def read_reports(folder: Path) -> list[RankReport]:
    """Read the reports written so far, in rank order."""
    adapter = TypeAdapter(RankReport)
    reports = [adapter.validate_python(read_json(path)) for path in folder.glob("rank-*.json")]
    return sorted(reports, key=lambda report: report.rank)


# Most hosts, and ranks of a host, that a line names.
MOST_HOSTS = 4


def describe_ranks(some: Sequence[RankReport], every: Sequence[RankReport]) -> str:
    """Describe ranks by their hosts: "n1, n2", or "n1 (rank 3)" if only some ranks of a host are meant.

    Args:
        some: the ranks to describe.
        every: all ranks.
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
