"""Device hours of runs: used, and of these lost to restarts, start-up, waiting for data, checkpoints and validations.

Each start of a run has its times from its events, from the records of the batch script, and from SLURM's accounting where it
exists. The parts of a start add up to its time; what nothing records is its part ``unknown``.
"""

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

from galaxydist.cluster.records import JobFiles
from galaxydist.cluster.slurm import Allocation, read_allocations
from galaxydist.errors import UserError
from galaxydist.evaluation.text_table import NOTHING, hours_text
from galaxydist.runs.events import ENDS, Event, read_events
from galaxydist.runs.folder import RunFolder
from galaxydist.runs.lock import live_owner
from galaxydist.runs.metrics_file import TIME_KEY

# Parts of a start: training steps that count, waiting for data, waiting for checkpoints, validations and the evaluation, the time
# before the first step, and steps (with their validations) that were lost.
PARTS = ("training", "data_wait", "checkpoint", "evaluation", "startup", "lost", "unknown")
CORE = "CPU core"


@dataclass(frozen=True)
class StartHours:
    """Time of one start of a run.

    Args:
        start: job and restart; None outside of a job.
        began: seconds since 1970; None if it is unknown.
        devices: kind -> number; for a start without a GPU its CPU cores.
        seconds: by part (``PARTS``).
        queued_s: seconds for which its job waited in the queue; None if it is unknown.
    """

    start: str | None
    began: float | None
    devices: Mapping[str, int]
    seconds: Mapping[str, float]
    queued_s: float | None = None

    @property
    def used_s(self) -> float:
        return sum(self.seconds.values())


@dataclass(frozen=True)
class RunHours:
    """Time of a run.

    Args:
        run: the run folder.
        name: of the run in tables.
        starts: oldest first.
        notes: on what is not known.
    """

    run: Path
    name: str
    starts: tuple[StartHours, ...]
    notes: tuple[str, ...] = ()

    def device_hours(self) -> dict[str, dict[str, float]]:
        """Return kind of device -> part -> device hours, with ``used``, the sum of the parts."""
        return _add_up(self.starts)

    @property
    def queued_hours(self) -> float | None:
        """Hours in the queue; None if no start's are known."""
        known = [start.queued_s for start in self.starts if start.queued_s is not None]
        return sum(known) / 3600 if known else None

    def to_dict(self) -> dict[str, Any]:
        """Return the hours as JSON-compatible values."""
        return {
            "run": str(self.run),
            "name": self.name,
            "device_hours": self.device_hours(),
            "queued_hours": self.queued_hours,
            "starts": [
                {"start": one.start, "began": one.began, "devices": one.devices, "seconds": one.seconds, "queued_s": one.queued_s}
                for one in self.starts
            ],
            "notes": self.notes,
        }


def total_hours(runs: Sequence[RunHours]) -> dict[str, dict[str, float]]:
    """Return kind of device -> part -> device hours of several runs."""
    return _add_up([start for run in runs for start in run.starts])


def _add_up(starts: Sequence[StartHours]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for start in starts:
        for kind, number in start.devices.items():
            hours = found.setdefault(kind, dict.fromkeys(("used", *PARTS), 0.0))
            for part, seconds in start.seconds.items():
                hours[part] += number * seconds / 3600
                hours["used"] += number * seconds / 3600
    return found


# Reading of a run folder.


@dataclass
class _Start:
    """Facts of one start.

    Args:
        start: job and restart.
        events: of its ranks.
        began, ended: seconds since 1970, as far as they are known.
        allocation: from accounting.
        queued_s: seconds in the queue.
    """

    start: str | None
    events: list[Event] = field(default_factory=list)
    began: float | None = None
    ended: float | None = None
    allocation: Allocation | None = None
    queued_s: float | None = None

    @property
    def first(self) -> Event | None:
        """The event with which its training begins."""
        return next((event for event in self.events if event.kind == "start"), None)

    @property
    def clean_end(self) -> Event | None:
        """The event of an end at which everything is saved."""
        return next((event for event in self.events if event.kind in ("stop", "finish", "pruned")), None)

    def devices(self) -> dict[str, int]:
        """Return kind -> number of its devices; empty if they are not known."""
        if self.first is not None:
            details = self.first.details
            return dict(details["devices"]) if details.get("device") != "cpu" else {CORE: int(details["cores"])}
        if self.allocation is None:
            return {}
        return {"GPU": self.allocation.gpus} if self.allocation.gpus else {CORE: self.allocation.cores}


@dataclass(frozen=True)
class _Log:
    """Logs of a run.

    Args:
        timing: lines of timing.jsonl with a speed.
        validated: steps after which there was a validation.
        batch_size: galaxies of a step.
    """

    timing: Sequence[Mapping[str, Any]]
    validated: frozenset[int]
    batch_size: int

    @staticmethod
    def read(folder: RunFolder) -> "_Log":
        recipe = folder.read_recipe().recipe if folder.is_started else {}
        timing = [line for line in folder.timing.read() if _is_number(line.get("time/img_s")) and line["time/img_s"] > 0]
        validated = frozenset(line["step"] for line in folder.metrics.read() if any(key.startswith("val/") for key in line))
        return _Log(timing, validated, int(recipe.get("train.batch_size", 0)))

    def parts(self, after: float, until: float) -> dict[str, float]:
        """Return the seconds of the steps in (after, until] by part; of validations only those between two lines."""
        found: dict[str, float] = defaultdict(float)
        step, at = after, None
        for line in self.timing:
            if not after < line["step"] <= until:
                continue
            checkpoint = min(_share(line, "time/checkpoint"), 0.999)
            # Images per second leave out checkpoints, and the shares validations.
            seconds = (line["step"] - step) * self.batch_size / line["time/img_s"] / (1 - checkpoint)
            data_wait = min(_share(line, "time/data_wait"), 1 - checkpoint)
            found["data_wait"] += data_wait * seconds
            found["checkpoint"] += checkpoint * seconds
            found["training"] += (1 - checkpoint - data_wait) * seconds
            if step in self.validated and at is not None and _is_number(line.get(TIME_KEY)):
                found["evaluation"] += max(0.0, line[TIME_KEY] - at - seconds)
            step, at = line["step"], line.get(TIME_KEY)
        return dict(found)

    def points(self, after: float, until: float) -> list[tuple[float, float]]:
        """Return step and time of the lines in (after, until]."""
        return [
            (line["step"], line[TIME_KEY])
            for line in self.timing
            if after < line["step"] <= until and _is_number(line.get(TIME_KEY))
        ]

    def devices(self) -> dict[str, int]:
        """Return the devices of a run without events; without a GPU one core a process."""
        if not self.timing:
            return {}
        line = self.timing[-1]
        number = max(1, round(line["time/img_s"] / line.get("time/img_s_device", line["time/img_s"])))
        return {"GPU" if "gpu/memory_gb" in line else CORE: number}


def read_run_hours(
    run: Path, name: str, allocations: Mapping[str, Sequence[Allocation]] | None = None, *, now: float | None = None
) -> RunHours:
    """Read the hours of a run.

    Args:
        run: the run folder.
        name: of the run in tables.
        allocations: starts of its jobs from accounting, by job id.
        now: seconds since 1970; None: this moment.

    Raises:
        UserError: a file of the run is damaged.
    """
    now = time.time() if now is None else now
    folder, notes = RunFolder(run), list[str]()
    log, starts = _Log.read(folder), _read_starts(folder, allocations or {})
    told = [start for start in starts if start.events]
    first_step = min((start.first.step or 0 for start in told if start.first is not None), default=math.inf)
    begins = [start.began for start in told if start.began is not None]
    has_old = bool(log.parts(0, first_step))  # steps of a version that wrote no events
    old = [
        start
        for start in starts
        if has_old and not start.events and (not begins or (start.ended or start.began or 0.0) <= min(begins))
    ]
    found = _old_hours(old, log, first_step, notes) if has_old else []
    new = [start for start in starts if start not in old]
    devices = next((start.devices() for start in new if start.devices()), log.devices())
    for number, (start, later) in enumerate(zip(new, _later_facts(folder, new), strict=True)):
        times = [at for _, at in _points_of(start, log, later)]
        hours = _hours_of(start, log, later, _end_of(start, times, folder, now if number == len(new) - 1 else None))
        if hours is None or not (hours.devices or devices):
            lacking = "the time of its start or end is" if hours is None else "its devices are"
            notes.append(f"start {start.start or number + 1} is not counted: {lacking} unknown")
        else:
            found.append(replace(hours, devices=hours.devices or devices))
    return RunHours(run, name, tuple(found), tuple(notes))


def _read_starts(folder: RunFolder, allocations: Mapping[str, Sequence[Allocation]]) -> list[_Start]:
    """Return all starts of a run that any file or accounting tells of, oldest first."""
    files = JobFiles(folder.path)
    jobs, restarts = files.jobs(), files.restarts()
    found: dict[float | str, _Start] = {}
    for event in read_events(folder.events_path):
        began = event.details.get("began")
        if _is_number(began):
            start = found.setdefault(float(began), _Start(event.start, began=float(began)))
            start.events.append(event)
            if event.kind in ENDS:
                start.ended = event.time
    by_id = {start.start: start for start in found.values() if start.start is not None}

    def start_of(job_id: str, restart: int) -> _Start:
        key = f"{job_id}.{restart}"
        if key not in by_id:
            by_id[key] = found[key] = _Start(key)
        return by_id[key]

    for record in restarts:
        start = start_of(record.job_id, record.restart)
        start.ended = max(start.ended or 0.0, record.time)
    for job in jobs:
        for restart, allocation in enumerate(allocations.get(job.job_id, ())):
            if allocation.began is not None:  # else it still waits
                start = start_of(job.job_id, restart)
                start.allocation = allocation
                start.began, start.ended = min(start.began or math.inf, allocation.began), allocation.ended
    waiting = {f"{job.job_id}.0": job.time for job in jobs}
    waiting |= {f"{record.job_id}.{record.restart + 1}": record.time for record in restarts if record.decision == "requeue"}
    for start in found.values():
        since = waiting.get(start.start or "")
        if start.allocation is not None and start.allocation.submitted is not None:
            since = start.allocation.submitted
        if since is not None and start.began is not None:
            start.queued_s = max(0.0, start.began - since)
    return sorted(found.values(), key=lambda start: start.began or start.ended or 0.0)


@dataclass(frozen=True)
class _Later:
    """Facts of a start that the later ones tell.

    Args:
        kept: the step up to which its steps count, since no later start has taken them again.
        step: the step at which a later start begins; infinite if there is none.
        cut_points: step and time of lines of this start that were cut off.
    """

    kept: float
    step: float
    cut_points: tuple[tuple[float, float], ...] = ()


def _later_facts(folder: RunFolder, starts: Sequence[_Start]) -> list[_Later]:
    is_going = folder.is_finished or live_owner(folder.lock_path) is not None
    facts = _Later(math.inf if is_going else folder.saved_step() or 0, math.inf)
    found = []
    for start in reversed(starts):
        found.append(facts)
        if start.first is not None:
            step = float(start.first.step or 0)
            points = tuple((float(one), float(at)) for one, at in start.first.details.get("cut_points", ()))
            facts = _Later(min(facts.kept, step), min(facts.step, step), points)
    return found[::-1]


def _hours_of(start: _Start, log: _Log, later: _Later, end: float | None) -> StartHours | None:
    """Divide the time of one start into its parts; None if the time of its start or end is unknown."""
    first, clean, lost = start.first, start.clean_end, 0.0
    if start.began is None or end is None:
        return None
    used = max(0.0, end - start.began)
    if first is None:
        return StartHours(start.start, start.began, start.devices(), {"startup": used}, start.queued_s)
    startup = min(max(0.0, first.time - start.began), used)
    points = _points_of(start, log, later)
    if clean is not None and clean.step is not None:
        points.append((clean.step, clean.time))
    if clean is None or (clean.step is not None and clean.step > later.kept):
        lost = min(max(0.0, end - _time_at(later.kept, sorted(points), end)), used - startup)
    parts = log.parts(first.step or 0, min(later.kept, later.step))
    times = [at for _, at in log.points(first.step or 0, later.step)]
    if clean is not None and clean.kind in ("finish", "pruned") and times:
        parts["evaluation"] = parts.get("evaluation", 0.0) + max(0.0, clean.time - times[-1])
    seconds = _fit(parts, used - startup - lost) | {"startup": startup, "lost": lost}
    return StartHours(start.start, start.began, start.devices(), seconds, start.queued_s)


def _points_of(start: _Start, log: _Log, later: _Later) -> list[tuple[float, float]]:
    """Return steps of a start with the times at which they were done, those that were cut off included."""
    if start.first is None:
        return []
    begin = start.first.step or 0
    cut = [(step, at) for step, at in later.cut_points if at >= start.first.time]
    return [(begin, start.first.time), *log.points(begin, later.step), *cut]


def _fit(parts: Mapping[str, float], total: float) -> dict[str, float]:
    """Return the parts with the rest as ``unknown``; parts that exceed the total, measured by another clock, are scaled to it."""
    known = sum(parts.values())
    factor = 1.0 if known <= total else total / known
    return {**{part: factor * seconds for part, seconds in parts.items()}, "unknown": max(0.0, total - factor * known)}


def _end_of(start: _Start, times: Sequence[float], folder: RunFolder, now: float | None) -> float | None:
    """Return the end of a start: as it was recorded, else this moment if it still runs, else its last record."""
    if start.ended is not None:
        return max(start.ended, *times) if times else start.ended  # accounting leaves out fractions of a second
    if now is not None and (live_owner(folder.lock_path) is not None or start.allocation is not None):
        return now
    signs = [*times, *(event.time for event in start.events)]
    if now is not None:  # nothing has changed the logs and the lock since
        paths = (folder.metrics_path, folder.timing.path, folder.lock_path)
        signs += [path.stat().st_mtime for path in paths if path.exists()]
    return max(signs, default=None)


def _time_at(step: float, points: Sequence[tuple[float, float]], end: float) -> float:
    """Return the time at which a step was done, from the steps and times of a log; between and after them by the speed there."""
    if not points or step >= math.inf:
        return end
    (before, at), *rest = points
    speed = 0.0  # seconds of a step
    for next_step, next_at in rest:
        if step <= before:
            break
        if next_step > before:
            speed = (next_at - at) / (next_step - before)
        if step <= next_step:
            return at + speed * (step - before)
        before, at = next_step, next_at
    return min(end, at + speed * max(0.0, step - before))


def _old_hours(starts: Sequence[_Start], log: _Log, until: float, notes: list[str]) -> list[StartHours]:
    """Return the hours of the starts that wrote no events, as one: their steps are not told apart."""
    parts = log.parts(0, until)
    spans = [max(0.0, start.ended - start.began) for start in starts if start.ended is not None and start.began is not None]
    devices = next((start.devices() for start in starts if start.devices()), log.devices())
    if not spans and not parts:
        return []
    lacking = "which steps were lost to restarts" if spans else "start-up, validations, restarts and the wait in the queue"
    notes.append(f"starts of an earlier galaxydist wrote no events: {lacking} is unknown")
    if CORE in devices and not any(start.allocation for start in starts):
        notes.append("their number of CPU cores is unknown: one a process is counted")
    queued = [start.queued_s for start in starts if start.queued_s is not None]
    began = min((start.began for start in starts if start.began is not None), default=None)
    seconds = _fit(parts, sum(spans) if spans else sum(parts.values()))
    return [StartHours(None, began, devices, seconds, sum(queued) if queued else None)]


def read_all_hours(runs: Mapping[Path, str]) -> tuple[list[RunHours], list[str]]:
    """Return the hours of several runs, the most expensive first, and notes on what is not known; SLURM's accounting is asked.

    Args:
        runs: run folder -> name in tables.
    """
    found, notes = list[RunHours](), list[str]()
    allocations, problem = read_allocations(_slurm_jobs(runs))
    if problem:
        notes.append(f"the times of the jobs are those of the run folders: {problem}")
    for run, name in runs.items():
        try:
            found.append(read_run_hours(run, name, allocations))
        except (UserError, OSError) as error:
            notes.append(f"{run} is not counted: {error}")
    notes += [f"{hours.name}: {note}" for hours in found for note in hours.notes]
    return sorted(found, key=lambda hours: -sum(kind["used"] for kind in hours.device_hours().values())), notes


def _slurm_jobs(runs: Iterable[Path]) -> list[str]:
    """Return the ids of the runs' jobs; none for a run whose records are damaged, which is noted later."""
    ids: dict[str, None] = {}
    for run in runs:
        with contextlib.suppress(UserError, OSError):
            ids |= dict.fromkeys(job.job_id for job in JobFiles(run).jobs() if job.scheduler == "slurm")
    return list(ids)


# Tables.

HEAD = ("used", "training", "data wait", "checkpoints", "validation", "start-up", "lost", "unknown")


def hours_rows(runs: Sequence[RunHours]) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of the device hours of each run, then their sum and the share of each part, by kind of device."""
    head = ["run", "devices", *HEAD, "starts", "in the queue"]
    rows = []
    for run in runs:
        ends = [str(len(run.starts)), hours_text(run.queued_hours)]
        rows += [[run.name, kind, *_part_texts(hours), *ends] for kind, hours in run.device_hours().items()]
        rows += [[run.name, NOTHING, *[NOTHING] * len(HEAD), *ends]] * (not run.starts)
    queued = [run.queued_hours for run in runs if run.queued_hours is not None]
    ends = [str(sum(len(run.starts) for run in runs)), hours_text(sum(queued) if queued else None)]
    for kind, hours in total_hours(runs).items():
        rows.append(["all", kind, *_part_texts(hours), *ends])
        shares = [f"{100 * hours[part] / hours['used']:.1f} %" for part in ("used", *PARTS)] if hours["used"] else []
        rows += [["share", kind, *shares, "", ""]] if shares else []
    return head, rows


def _part_texts(hours: Mapping[str, float]) -> list[str]:
    return [hours_text(hours[part]) for part in ("used", *PARTS)]


def render_hours(runs: Sequence[RunHours]) -> str:
    """Return the table of ``hours_rows`` as text, without columns in which every number is 0."""
    head, rows = hours_rows(runs)
    empty = {"0 s", "0.0 %", "", NOTHING}
    shown = [n for n, name in enumerate(head) if n < 3 or name == "lost" or any(row[n] not in empty for row in rows)]
    lines = [[row[n] for n in shown] for row in (head, *rows)]
    widths = [max(len(line[n]) for line in lines) for n in range(len(shown))]
    texts = []
    for line in lines:
        cells = [cell.ljust(widths[n]) if n < 2 else cell.rjust(widths[n]) for n, cell in enumerate(line)]
        texts.append("  ".join(cells).rstrip())
    return "\n".join(texts)


def _share(line: Mapping[str, Any], name: str) -> float:
    value = line.get(name)
    return min(max(0.0, value), 1.0) if _is_number(value) else 0.0


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
