"""Numbers as a reader of a table wants them: with their errors, signs and p values. Unicode; LaTeX gets it translated."""

from dataclasses import dataclass
from typing import Literal

from galaxydist.evaluation.matrix import NOT_RUN, Cell, Row, Table, holm_adjusted
from galaxydist.evaluation.published import Setting
from galaxydist.evaluation.sampling import ALPHA, Difference, Estimate
from galaxydist.evaluation.trial import Score

MINUS = "\N{MINUS SIGN}"
NOTHING = "\N{EN DASH}"
Quantity = Literal["accuracy", "loss"]
QUANTITIES: tuple[Quantity, ...] = ("accuracy", "loss")
Standing = Literal["", "better", "worse", "same"]


@dataclass(frozen=True, slots=True)
class Numbers:
    """A quantity of a cell, in words; what there is not is empty.

    Args:
        ours: the mean, with its standard error over seeds; ``not run`` where there is no run.
        published: the published value.
        difference: ours minus published, with its standard error.
        p: of that difference, adjusted for the number of cells.
        standing: what is significant: ours is ``better`` or ``worse``; ``same`` where neither is.
    """

    ours: str
    published: str = ""
    difference: str = ""
    p: str = ""
    standing: Standing = ""


def describe_table(table: Table) -> dict[tuple[Row, Setting, Quantity], Numbers]:
    """All numbers of a table. Accuracies and losses are each a family of tests."""
    found: dict[tuple[Row, Setting, Quantity], Numbers] = {}
    for quantity in QUANTITIES:
        adjusted = holm_adjusted(table, quantity)
        for (row, setting), cell in table.cells.items():
            found[row, setting, quantity] = describe(cell, quantity, adjusted.get((row, setting)), is_galaxy10=table.is_galaxy10)
    return found


def describe(cell: Cell, quantity: Quantity, adjusted_p: float | None, *, is_galaxy10: bool = True) -> Numbers:
    """A quantity of a cell.

    Args:
        cell: of the matrix.
        quantity: ``accuracy`` or ``loss``.
        adjusted_p: from ``holm_adjusted``; None where there is no such test.
        is_galaxy10: what was not run is called so; a user has run what is wanted.
    """
    estimate = cell.accuracy if quantity == "accuracy" else cell.loss
    test = cell.accuracy_test if quantity == "accuracy" else cell.loss_test
    value = "" if cell.published is None else f"{getattr(cell.published, quantity):.4f}"
    if not cell.trials:
        return Numbers(NOT_RUN if is_galaxy10 else NOTHING, value)
    if estimate is None:
        return Numbers("not finite", value)
    if test is None or adjusted_p is None:
        return Numbers(mean_text(estimate), value)
    standing: Standing = "same"
    if adjusted_p < ALPHA:
        standing = "better" if (test.value > 0) == (quantity == "accuracy") else "worse"
    difference = f"{signed(test.value)} ± {test.standard_error:.3f}"
    return Numbers(mean_text(estimate), value, difference, p_text(adjusted_p), standing)


def mean_text(estimate: Estimate) -> str:
    """``0.632 ± 0.004``: mean and standard error over seeds; the mean alone of a single seed."""
    error = estimate.seed_error
    return number(estimate.mean) if error is None else f"{number(estimate.mean)} ± {error:.3f}"


def interval_text(found: Difference) -> str:
    """The 95 % interval of a difference."""
    low, high = found.interval()
    return f"{signed(low)} to {signed(high)}"


def score_text(score: Score | None) -> str:
    """``0.632 [0.601, 0.660]``: a number and its 95 % interval."""
    if score is None or score.interval is None:
        return number(score.value if score is not None else None)
    low, high = score.interval
    return f"{number(score.value)} [{number(low)}, {number(high)}]"


def number(value: float | None, digits: int = 3) -> str:
    """``0.632``; a dash for what there is not."""
    return NOTHING if value is None else f"{value:.{digits}f}".replace("-", MINUS)


def signed(value: float, digits: int = 3) -> str:
    """``+0.012`` or ``−0.012``; no sign where all digits are 0."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", MINUS)


def points(share: float) -> str:
    """A difference of accuracies in points (per cent): ``+1.2``."""
    return signed(100 * share, 1)


def percent(share: float | None, digits: int = 1) -> str:
    """``63.2 %``."""
    return NOTHING if share is None else f"{100 * share:.{digits}f} %"


def p_text(p: float) -> str:
    """``p < 0.001``, ``p = 0.016``."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def hours_text(hours: float | None) -> str:
    """``3.2 h``, ``12.1 min``, ``8 s``."""
    if hours is None:
        return NOTHING
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{60 * hours:.1f} min" if hours >= 1 / 60 else f"{3600 * hours:.0f} s"
