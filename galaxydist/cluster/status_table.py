"""The status table of runs for a terminal, without the columns that do not fit."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import Literal

from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from galaxydist.cluster.status import GROUPS, Group, Overview, RunStatus

COLORS: dict[Group, str] = {
    "running": "green",
    "pending": "yellow",
    "unknown": "yellow",
    "failed": "red",
    "stopped": "magenta",
    "finished": "cyan",
}
NOTHING = "-"
# Spaces between two columns.
_GAP = 2
_LEAST_NAME = 16
_ALWAYS = ("run", "state", "step", "best val")
_ERROR_WIDTH = 30
_REASON_WIDTH = 40
# Suffix of the best value; accuracy needs none.
_METRIC_NAMES = {"accuracy": "", "balanced_accuracy": " balanced", "loss": " loss"}


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Args:
        title: the heading.
        cell: returns the text for a run.
        rank: priority; columns of the highest rank are left out first.
        is_number: align to the right.
    """

    title: str
    cell: Callable[[RunStatus], str]
    rank: int
    is_number: bool = False


def _of(count: int, total: int | None) -> str:
    return f"{count}/{total}" if total is not None else str(count)


def _epoch(status: RunStatus) -> str:
    progress = status.progress
    epoch = f"{progress.epoch:.1f}" if progress.epoch is not None else "0"
    return f"{epoch}/{progress.epochs}" if progress.epochs is not None else epoch


def _best(status: RunStatus) -> str:
    progress = status.progress
    return _number(progress.best, ".4f") + (_METRIC_NAMES.get(progress.metric or "", "") if progress.best is not None else "")


def _last_event(status: RunStatus) -> str:
    event = status.last_event
    return f"{event.kind} {duration_text(max(0, time.time() - event.time))} ago" if event is not None else NOTHING


def _number(value: float | None, form: str) -> str:
    return NOTHING if value is None else format(value, form)


COLUMNS = (
    Column("run", lambda status: status.name, 0),
    Column("what", lambda status: status.label or NOTHING, 2),
    Column("job", lambda status: status.job.job_id if status.job else NOTHING, 6),
    Column("state", lambda status: status.state, 1),
    Column("why", lambda status: shorten(status.reason, _REASON_WIDTH, placeholder="...") or NOTHING, 9),
    Column("step", lambda status: _of(status.progress.step, status.progress.total_steps), 3, True),
    Column("epoch", _epoch, 11, True),
    Column("img/s", lambda status: _number(status.progress.img_s, ",.0f"), 5, True),
    Column("best val", _best, 4, True),
    Column("restarts", lambda status: str(status.restarts), 8, True),
    Column("time left", lambda status: duration_text(status.time_left_s), 7, True),
    Column("to do", lambda status: duration_text(status.to_do_s), 12, True),
    Column("last event", _last_event, 10),
    Column("nodes", lambda status: status.nodes or NOTHING, 13),
)


def render_overview(overview: Overview, width: int) -> RenderableType:
    """Render the table, errors that do not fit into it, and a summary.

    Args:
        overview: the runs.
        width: of the terminal, in characters.
    """
    columns = fitting_columns(overview.runs, width)
    used = sum(_width(column, overview.runs) + _GAP for column in columns)
    failing = [status for status in overview.runs if status.last_error]
    has_room = bool(failing) and width - used >= _ERROR_WIDTH
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    for column in columns:
        justify: Literal["left", "right"] = "right" if column.is_number else "left"
        table.add_column(column.title, justify=justify, no_wrap=column.rank > 0, overflow="fold")
    if has_room:
        table.add_column("last error", overflow="fold", min_width=_ERROR_WIDTH)
    for status in overview.runs:
        cells = [Text(column.cell(status), COLORS[status.group] if column.title == "state" else "") for column in columns]
        table.add_row(*cells, *([Text(status.last_error or "")] if has_room else []))
    lines: list[RenderableType] = [table] if overview.runs else []
    if failing and not has_room:
        lines += [Text(f"{status.name}: {status.last_error}", "red") for status in failing]
    if overview.slurm_error:
        lines.append(Text(overview.slurm_error, "bold yellow"))
    return Lines(*lines, Text(summary_text(overview.runs)))


def fitting_columns(runs: Sequence[RunStatus], width: int) -> list[Column]:
    """Return the columns that fit into a width, at least run and state."""
    filled = [
        column
        for column in COLUMNS
        if column.title in _ALWAYS or any(column.cell(status) not in (NOTHING, "0") for status in runs)
    ]
    left = width - min(_width(filled[0], runs), max(_LEAST_NAME, width // 3)) - _GAP
    kept = {0}
    for column in sorted(filled, key=lambda column: column.rank)[1:]:
        left -= _width(column, runs) + _GAP
        if left < 0 and column.rank > 1:
            break
        kept.add(column.rank)
    return [column for column in filled if column.rank in kept]


def summary_text(runs: Sequence[RunStatus]) -> str:
    """Return the number of runs, in all and by group."""
    counts = Counter(status.group for status in runs)
    parts = [f"{counts[group]} {group}" for group in GROUPS if counts[group]]
    return f"{len(runs)} run{'s' * (len(runs) != 1)}: {', '.join(parts)}" if runs else "no runs"


def duration_text(seconds: float | None) -> str:
    """Return text such as ``2d 3h``, ``3h 20m``, ``12m`` or ``40s``."""
    if seconds is None:
        return NOTHING
    if seconds < 60:
        return f"{seconds:.0f}s"
    minutes = int(seconds // 60)
    hours, days = minutes // 60, minutes // 1440
    if days:
        return f"{days}d {hours % 24}h"
    return f"{hours}h {minutes % 60:02d}m" if hours else f"{minutes}m"


def _width(column: Column, runs: Sequence[RunStatus]) -> int:
    return max(len(column.title), *(len(column.cell(status)) for status in runs)) if runs else len(column.title)
