"""The figures of the results page: narrow enough for a phone; black is the page's text colour, the ground is clear."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from galaxydist.evaluation.plots import BLUE, GREEN, GREY, ORANGE, VERMILLION, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VARIANT_COLOURS = {"original": BLUE, "balanced": VERMILLION}
_WIDTH = 4.4
# Points that a curve is drawn with, at most: a page holds many runs.
_MOST_POINTS = 200
_PANELS = (("accuracy", "val/accuracy", "train/accuracy"), ("loss", "val/loss", "train/loss"))


@dataclass(frozen=True)
class Curve:
    """The log of a run.

    Args:
        variant: that it was trained on.
        lines: of metrics.jsonl.
    """

    variant: str
    lines: Sequence[Mapping[str, Any]]


@styled
def draw_curves(curves: Sequence[Curve]) -> "Figure":
    """Accuracy and loss of the runs of one model: validation as lines, training as thin dotted ones.

    Args:
        curves: one a run.
    """
    lines = [line for curve in curves for line in curve.lines]
    over = "epoch" if all("epoch" in line for line in lines) else "step"
    figure = new_figure(_WIDTH, 2.3)
    named: dict[str, Any] = {}
    for axes, (label, validation, training) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
        for curve in curves:
            colour = VARIANT_COLOURS.get(curve.variant, GREEN)
            _draw(axes, curve.lines, over, training, color=colour, linewidth=1.1, linestyle=":")
            drawn = _draw(axes, curve.lines, over, validation, color=colour, linewidth=1.2, marker="o", markersize=2)
            named |= {f"trained on {curve.variant}": drawn} if drawn is not None else {}
        axes.set(xlabel=over, title=label)
        axes.set_ylim(bottom=0, top=1 if label == "accuracy" else None)
        axes.locator_params(axis="x", nbins=5, integer=True)
        _tidy(axes)
    if named:
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def _draw(axes: "Axes", lines: Sequence[Mapping[str, Any]], over: str, name: str, **style: Any) -> Any:
    found = [(line[over], line[name]) for line in lines if isinstance(line.get(name), int | float)]
    if not found:
        return None
    kept = found[:: -(-len(found) // _MOST_POINTS)]
    points = np.array(kept if kept[-1] == found[-1] else [*kept, found[-1]], dtype=np.float64)
    return axes.plot(points[:, 0], points[:, 1], **style)[0]


@styled
def draw_reliability(calibrations: Mapping[str, Mapping[str, Any]]) -> "Figure":
    """How often a model is right against how sure it is, as trained and after temperature scaling, a panel a training variant.

    Args:
        calibrations: by variant, as ``summarise`` has them.
    """
    figure = new_figure(_WIDTH, 3.0)
    named: dict[str, Any] = {}
    panels = figure.subplots(1, max(2, len(calibrations)), sharey=True, squeeze=False)[0]
    for axes, (variant, calibration) in zip(panels, calibrations.items(), strict=False):
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle="--")
        named["as trained"] = _draw_bins(axes, calibration["reliability"], BLUE, "o")
        if scaled := calibration.get("scaled"):
            named["after temperature scaling"] = _draw_bins(axes, scaled["reliability"], ORANGE, "s")
        axes.set(title=f"trained on {variant}", xlabel="confidence", xlim=(0, 1), ylim=(0, 1), aspect="equal")
        _tidy(axes)
    for axes in panels[len(calibrations) :]:
        axes.set_axis_off()
    panels[0].set_ylabel("accuracy")
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def _draw_bins(axes: "Axes", bins: Sequence[Mapping[str, Any]], colour: str, marker: str) -> Any:
    filled = [found for found in bins if found["count"]]
    most = max((found["count"] for found in filled), default=1)
    x, y = [found["confidence"] for found in filled], [found["accuracy"] for found in filled]
    axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.7)
    sizes = [4 + 26 * found["count"] / most for found in filled]
    return axes.scatter(x, y, s=sizes, color=colour, marker=marker, linewidths=0)


def _tidy(axes: "Axes") -> None:
    axes.grid(linewidth=0.3, alpha=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=2, pad=2)
