"""The reliability diagram: how often a model is right, against how sure it says it is."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from galaxydist.evaluation.figures import BLUE, GREY, ORANGE, new_figure, styled, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@styled
def draw_reliability(metrics: Mapping[str, Any], title: str) -> "Figure":
    """Accuracy in bins of confidence with 95 % intervals, and below it how many galaxies a bin has; beside it the same after
    temperature scaling, where there is a temperature.

    Args:
        metrics: from ``summarise``, with ``calibration``.
        title: data set, variant, split, model and number of galaxies.
    """
    calibration = metrics["calibration"]
    panels = [("as trained", calibration)]
    if calibration["temperature"] is not None:
        panels.append((f"divided by T = {calibration['temperature']['value']:.2f}", calibration["scaled"]))
    figure = new_figure(2.7 * len(panels) + 0.5, 3.6)
    grid = figure.subplots(2, len(panels), squeeze=False, sharex=True, sharey="row", height_ratios=(3, 1))
    for (name, found), upper, lower in zip(panels, *grid, strict=True):
        _draw_bins(upper, found["reliability"])
        ece = "-" if found["ece"] is None else f"{found['ece']:.3f}"
        upper.set(title=f"{name}: ECE {ece}", xlim=(0, 1), ylim=(0, 1))
        _draw_counts(lower, found["reliability"])
    grid[0, 0].set_ylabel("accuracy")
    grid[1, 0].set_ylabel("galaxies")
    handles = grid[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3 if len(panels) > 1 else 1, frameon=False, fontsize=7)
    figure.suptitle(wrapped(title, figure))
    return figure


def _draw_bins(axes: "Axes", bins: Sequence[Mapping[str, Any]]) -> None:
    from scipy import stats

    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle="--", label="calibrated")
    filled = [found for found in bins if found["count"]]
    for number, found in enumerate(filled):
        low, accuracy, confidence = found["low"], found["accuracy"], found["confidence"]
        width = found["high"] - low
        axes.bar(low, accuracy, width, align="edge", color=BLUE, alpha=0.35, linewidth=0, label="" if number else "accuracy")
        correct = round(accuracy * found["count"])
        interval = stats.binomtest(correct, found["count"]).proportion_ci(0.95, method="wilson")
        axes.plot([confidence] * 2, interval, color=BLUE, linewidth=1.0)
    label = "at its mean confidence, 95 %"
    points = [(found["confidence"], found["accuracy"]) for found in filled]
    axes.plot(*np.transpose(points) if points else ([], []), "o", color=BLUE, markersize=3, label=label)
    axes.grid(linewidth=0.4, alpha=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_counts(axes: "Axes", bins: Sequence[Mapping[str, Any]]) -> None:
    counts = [found["count"] for found in bins]
    axes.bar(
        [found["low"] for found in bins], counts, bins[0]["high"], align="edge", color=ORANGE, edgecolor="white", linewidth=0.4
    )
    axes.set(xlabel="confidence", ylim=(0, max(1, *counts) * 1.05))
    axes.locator_params(axis="y", nbins=3, integer=True)
    axes.spines[["top", "right"]].set_visible(False)
