"""Figures of an evaluation and of a training: PNG and PDF, readable in a two-column paper, safe for the colour-blind.

matplotlib is imported by the functions, and used without pyplot: no window, and figures need not be closed.
"""

import functools
import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np

from galaxydist.atomic_files import replace_bytes
from galaxydist.evaluation.metrics import ClassCurves
from galaxydist.evaluation.text_table import readable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Okabe and Ito's palette (2008, jfly.uni-koeln.de/color): told apart with any kind of colour vision.
BLUE, ORANGE, GREEN, VERMILLION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#555555"
PNG_DPI = 160
# Of more classes the figures have neither names nor numbers, and grow no further: no image may be wider than 65,536 pixels.
MOST_NAMED = 60
_STYLE: Any = {"font.size": 8.0, "axes.titlesize": 8.0, "figure.titlesize": 9.0, "pdf.fonttype": 42, "axes.linewidth": 0.6}


_Arguments = ParamSpec("_Arguments")


def styled(draw: "Callable[_Arguments, Figure]") -> "Callable[_Arguments, Figure]":
    """Draw with our text sizes, whatever the user's matplotlibrc says."""

    @functools.wraps(draw)
    def draw_styled(*arguments: _Arguments.args, **named: _Arguments.kwargs) -> "Figure":
        import matplotlib

        with matplotlib.rc_context(_STYLE):
            return draw(*arguments, **named)

    return draw_styled


@styled
def draw_confusion(metrics: Mapping[str, Any], title: str) -> "Figure":
    """The confusion matrix twice: numbers of galaxies, and shares of each true class.

    Args:
        metrics: from ``metrics_from_counts``.
        title: data set, variant, split, model and number of galaxies.
    """
    counts_KK = np.asarray(metrics["confusion"], dtype=np.int64)
    names = [readable(name) for name in metrics["classes"]]
    support_K1 = counts_KK.sum(axis=1, keepdims=True)
    shares_KK = np.divide(counts_KK, support_K1, out=np.zeros(counts_KK.shape), where=support_K1 > 0)
    size = max(1.6, 0.33 * min(len(names), MOST_NAMED))
    figure = new_figure(max(2 * size + 2.4, 4.0), size + 1.9)
    left, right = figure.subplots(1, 2)
    _draw_matrix(left, shares_KK, [[f"{value:,}" if value else "" for value in row] for row in counts_KK], names)
    _draw_matrix(right, shares_KK, [[_share(value) for value in row] for row in shares_KK], names)
    left.set(title="galaxies", ylabel="true class", xlabel="predicted class")
    right.set(title="share of the true class (%)", xlabel="predicted class", yticklabels=[])
    figure.suptitle(wrapped(title, figure))
    return figure


def _draw_matrix(axes: "Axes", shade_KK: np.ndarray[Any, Any], texts: Sequence[Sequence[str]], names: Sequence[str]) -> None:
    axes.imshow(shade_KK, cmap="Blues", vmin=0, vmax=1)
    if len(names) > MOST_NAMED:
        return
    size = 6 if len(names) > 6 else 8
    for row, line in enumerate(texts):
        for column, text in enumerate(line):
            colour = "white" if shade_KK[row, column] > 0.55 else "black"
            fontsize = size if len(text) < 5 else size - 1
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=fontsize, in_layout=False)
    places = range(len(names))
    axes.set_xticks(places, names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(places, names)
    axes.tick_params(length=2, pad=2)


def _share(value: float) -> str:
    if value == 0:
        return ""
    return "<1" if value < 0.005 else f"{100 * value:.0f}"


@styled
def draw_per_class(metrics: Mapping[str, Any], title: str) -> "Figure":
    """Precision, recall and F1 of each class as bars, with the number of galaxies.

    Args:
        metrics: from ``metrics_from_counts``.
        title: data set, variant, split, model and number of galaxies.
    """
    per_class, num_classes = metrics["per_class"], len(metrics["classes"])
    figure = new_figure(5.4, 0.36 * min(num_classes, MOST_NAMED) + 1.2)
    axes = figure.subplots()
    places_K = np.arange(num_classes)
    bars = (("precision", "precision", BLUE), ("recall", "recall", ORANGE), ("f1", "F1", GREEN))
    for number, (key, label, colour) in enumerate(bars):
        values_K = [np.nan if value is None else value for value in per_class[key]]
        axes.barh(places_K + 0.26 * (number - 1), values_K, height=0.24, color=colour, label=label)
    names = [f"{readable(name)} ({support:,})" for name, support in zip(metrics["classes"], per_class["support"], strict=True)]
    if num_classes <= MOST_NAMED:
        axes.set_yticks(places_K, names)
    axes.set(xlim=(0, 1), ylim=(num_classes - 0.5, -0.5))
    axes.grid(axis="x", linewidth=0.4, alpha=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    figure.suptitle(wrapped(title, figure))
    return figure


@styled
def draw_learning_curves(lines: Sequence[Mapping[str, Any]], title: str) -> "Figure":
    """Loss, accuracy and learning rate over the steps of a run.

    Args:
        lines: of metrics.jsonl: ``step`` and metrics such as ``train/loss`` and ``val/accuracy``.
        title: data set, variant, model and whatever tells the run.
    """
    names = {name for line in lines for name in line}
    wanted = (
        ("loss", (("train/loss", "training", BLUE), ("val/loss", "validation", VERMILLION))),
        (
            "accuracy",
            (
                ("train/accuracy", "training", BLUE),
                ("val/accuracy", "validation", VERMILLION),
                ("val/balanced_accuracy", "validation, balanced", GREEN),
            ),
        ),
        ("learning rate", (("train/lr", "", GREY), ("lr", "", GREY))),
    )
    panels = [(label, known) for label, curves in wanted if (known := [curve for curve in curves if curve[0] in names])]
    figure = new_figure(2.6 * max(len(panels), 1) + 0.4, 2.6)
    for axes, (label, curves) in zip(np.ravel(figure.subplots(1, max(len(panels), 1))), panels, strict=False):
        for name, legend, colour in curves:
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            marker = "o" if len(points) < 30 else ""
            axes.plot(*zip(*points, strict=True), color=colour, label=legend, linewidth=1.2, marker=marker, markersize=2.5)
        axes.set(xlabel="step", ylabel=label)
        axes.set_ylim(bottom=0, top=1 if label == "accuracy" else None)
        axes.grid(linewidth=0.4, alpha=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.locator_params(axis="x", nbins=5)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=7)
    figure.suptitle(wrapped(title, figure))
    return figure


def save_figure(figure: "Figure", path: Path) -> list[Path]:
    """Write a figure as PNG and PDF, each whole or not at all.

    Args:
        path: without a suffix; its folder exists.

    Returns:
        The two files.
    """
    import matplotlib

    paths = [path.with_name(f"{path.name}.{kind}") for kind in ("png", "pdf")]
    with matplotlib.rc_context(_STYLE):
        # Lay out and measure once: savefig does both anew for each format, which takes longer than drawing.
        figure.set_dpi(PNG_DPI)
        if (layout := figure.get_layout_engine()) is not None:
            layout.execute(figure)
        cropped = figure.get_tightbbox().padded(0.05)
        figure.set_layout_engine(None)
        for target, metadata in zip(paths, ({}, {"CreationDate": None}), strict=True):  # no date: equal figures are equal files
            buffer = io.BytesIO()
            figure.savefig(buffer, format=target.suffix[1:], dpi=PNG_DPI, bbox_inches=cropped, metadata=metadata)
            replace_bytes(target, buffer.getvalue())
    return paths


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of so many inches that lays itself out."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def wrapped(title: str, figure: "Figure") -> str:
    """A title broken into lines that fit the figure's width."""
    return textwrap.fill(title.replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}"), int(figure.get_figwidth() * 13))


# ROC and precision-recall curves, each class against all others.

# Okabe and Ito's colours that show on white, in two kinds of line: ten classes can be told apart, more begin again.
COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, "#CC79A7")
LINES = ("-", (0, (4, 1.5)), (0, (1, 1)))


@styled
def draw_areas(metrics: Mapping[str, Any], curves: Sequence[ClassCurves | None], title: str) -> "Figure":
    """Both kinds of curve side by side, and the areas of each class.

    Args:
        metrics: from ``summarise``, with ``roc_auc`` and ``average_precision``.
        curves: by label.
        title: data set, variant, split, model and number of galaxies.
    """
    figure = new_figure(7.6, 3.2)
    left, right = figure.subplots(1, 2)
    areas = zip(metrics["roc_auc"]["per_class"], metrics["average_precision"]["per_class"], strict=True)
    for label, (name, curve, (roc, precision)) in enumerate(zip(metrics["classes"], curves, areas, strict=True)):
        if curve is None:
            continue
        style: Any = {
            "color": COLOURS[label % len(COLOURS)],
            "linestyle": LINES[label // len(COLOURS) % len(LINES)],
            "linewidth": 1.1,
        }
        left.plot(*curve.roc, **style, label=f"{readable(name)} ({roc:.3f}, {precision:.3f})")
        right.plot(*curve.precision_recall, **style)
    left.plot([0, 1], [0, 1], color=GREY, linewidth=0.6, linestyle="--")
    left.set(xlabel="false positive rate", ylabel="true positive rate", title=f"ROC: mean area {_mean(metrics['roc_auc'])}")
    title_right = f"precision-recall: mean area {_mean(metrics['average_precision'])}"
    right.set(xlabel="recall", ylabel="precision", title=title_right)
    for axes in (left, right):
        axes.set(xlim=(0, 1), ylim=(0, 1.01))
        axes.grid(linewidth=0.4, alpha=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    if left.get_legend_handles_labels()[0] and len(curves) <= MOST_NAMED:
        figure.legend(loc="outside right center", frameon=False, fontsize=7, title="class (area left, right)", title_fontsize=7)
    figure.suptitle(wrapped(title, figure))
    return figure


def _mean(areas: Mapping[str, Any]) -> str:
    return "-" if areas["macro"] is None else f"{areas['macro']:.3f}"


# The reliability diagram: how often a model is right, against how sure it says it is.


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


# Accuracy against redshift, apparent size and brightness of the sky.

LABELS = {"redshift": "redshift", "size": "half-light radius", "sky_brightness": "sky brightness"}


@styled
def draw_dependence(metrics: Mapping[str, Any], title: str) -> "Figure":
    """A panel a property: accuracy in bins of equally many galaxies, with 95 % intervals and the range of each bin (a few
    galaxies far out leave the panel).

    Args:
        metrics: from ``summarise``; ``against`` is not empty.
        title: data set, variant, split, model and number of galaxies.
    """
    against = metrics["against"]
    figure = new_figure(2.4 * len(against) + 0.6, 2.7)
    panels = figure.subplots(1, len(against), sharey=True, squeeze=False)[0]
    for axes, (name, found) in zip(panels, against.items(), strict=True):
        bins = found["bins"]
        x, y = np.array([row["median"] for row in bins]), np.array([row["accuracy"] for row in bins])
        across = np.abs(np.array([[row["low"], row["high"]] for row in bins]).T - x)
        up = np.abs(np.array([row["interval"] for row in bins]).T - y)
        axes.errorbar(x, y, xerr=across, color=BLUE, fmt="none", elinewidth=0.5, alpha=0.7)
        axes.errorbar(x, y, yerr=up, color=BLUE, fmt="o", markersize=3, elinewidth=1.1)
        axes.axhline(metrics["accuracy"], color=GREY, linewidth=0.8, linestyle="--", label="all galaxies")
        unit = f" ({found['unit']})" if found["unit"] else ""
        axes.set(xlabel=f"{LABELS[name]}{unit}", title=f"{found['count']:,} galaxies", ylim=(0, 1))
        axes.set_xlim(*_limits(bins))
        axes.locator_params(axis="x", nbins=5)
        axes.grid(linewidth=0.4, alpha=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("accuracy")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower right", frameon=False, fontsize=7)
    figure.suptitle(wrapped(title, figure))
    return figure


def _limits(bins: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Where the panel ends: beyond the outer medians twice as far as these lie from their inner edges."""
    first, last = bins[0], bins[-1]
    left = max(first["low"], first["median"] - 2 * (first["high"] - first["median"]))
    right = min(last["high"], last["median"] + 2 * (last["median"] - last["low"]))
    margin = 0.03 * (right - left) or 0.5
    return left - margin, right + margin
