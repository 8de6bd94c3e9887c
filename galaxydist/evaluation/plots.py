"""Figures of an evaluation and of a training run, as PNG and PDF, readable in a two-column paper.

matplotlib is imported inside the functions and used without pyplot, so that there is no window and no figure to close.
"""

import contextlib
import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from galaxydist.atomic_files import replace_bytes
from galaxydist.evaluation.metrics import ClassCurves, wilson_interval
from galaxydist.evaluation.text_table import readable, three_decimals

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Palette of Okabe and Ito (2008, jfly.uni-koeln.de/color), distinct with any kind of colour vision.
BLUE, ORANGE, GREEN, VERMILLION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#555555"
# Its colours that are visible on white, with three line styles: distinct for ten classes, repeated after fifteen.
COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, "#CC79A7")
LINES = ("-", (0, (4, 1.5)), (0, (1, 1)))
PNG_DPI = 160
# With more classes, figures have no names or numbers and a constant size: matplotlib limits images to 65,536 pixels.
MOST_NAMED = 60
STYLE: Any = {
    "font.size": 8.0,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 8.0,
    "figure.titlesize": 9.0,
    "pdf.fonttype": 42,
    "axes.linewidth": 0.6,
}
LABELS = {"redshift": "redshift", "size": "half-light radius", "sky_brightness": "sky brightness"}


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Draw with ``STYLE``, independent of the user's matplotlibrc; decorates the functions that draw."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def new_figure(width: float, height: float, title: str = "") -> "Figure":
    """Return an empty figure of a size in inches, with constrained layout and a title that is wrapped to its width."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    if title:
        unbroken = title.replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}")
        figure.suptitle(textwrap.fill(unbroken, int(width * 13)))
    return figure


@styled()
def save_figure(figure: "Figure", path: Path) -> list[Path]:
    """Write a figure as PNG and PDF, each atomically.

    Args:
        figure: its layout is final afterwards.
        path: without a suffix; its folder exists.

    Returns:
        The two files.
    """
    # Compute layout and bounding box once: savefig does it again for each format, which takes longer than drawing.
    figure.set_dpi(PNG_DPI)
    if (layout := figure.get_layout_engine()) is not None:
        layout.execute(figure)
    cropped = figure.get_tightbbox().padded(0.05)
    figure.set_layout_engine(None)
    paths = [path.with_name(f"{path.name}.{kind}") for kind in ("png", "pdf")]
    for target, metadata in zip(paths, ({}, {"CreationDate": None}), strict=True):  # no date: equal figures are equal files
        buffer = io.BytesIO()
        figure.savefig(buffer, format=target.suffix[1:], dpi=PNG_DPI, bbox_inches=cropped, metadata=metadata)
        replace_bytes(target, buffer.getvalue())
    return paths


def tidy(axes: "Axes", *, grid: bool = True) -> None:
    """Remove the upper and the right line of a plot, and draw a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    if grid:
        axes.grid(linewidth=0.4, alpha=0.6)


@styled()
def draw_confusion(metrics: Mapping[str, Any], title: str) -> "Figure":
    """Draw the confusion matrix twice: numbers of galaxies, and shares of each true class.

    Args:
        metrics: from ``metrics_from_counts``.
        title: data set, variant, split, model and number of galaxies.
    """
    counts_KK = np.asarray(metrics["confusion"], dtype=np.int64)
    names = [readable(name) for name in metrics["classes"]]
    support_K1 = counts_KK.sum(axis=1, keepdims=True)
    shares_KK = np.divide(counts_KK, support_K1, out=np.zeros(counts_KK.shape), where=support_K1 > 0)
    size = max(1.6, 0.33 * min(len(names), MOST_NAMED))
    figure = new_figure(max(2 * size + 2.4, 4.0), size + 1.9, title)
    left, right = figure.subplots(1, 2)
    _draw_matrix(left, shares_KK, [[f"{value:,}" if value else "" for value in row] for row in counts_KK], names)
    _draw_matrix(right, shares_KK, [[_percent(value) for value in row] for row in shares_KK], names)
    left.set(title="galaxies", ylabel="true class", xlabel="predicted class")
    right.set(title="share of the true class (%)", xlabel="predicted class", yticklabels=[])
    return figure


def _draw_matrix(axes: "Axes", shade_KK: NDArray[Any], texts: Sequence[Sequence[str]], names: Sequence[str]) -> None:
    axes.imshow(shade_KK, cmap="Blues", vmin=0, vmax=1)
    if len(names) > MOST_NAMED:
        return
    size = 6 if len(names) > 6 else 8
    for row, line in enumerate(texts):
        for column, text in enumerate(line):
            style: Any = {
                "color": "white" if shade_KK[row, column] > 0.55 else "black",
                "fontsize": size if len(text) < 5 else size - 1,
                "in_layout": False,  # they are inside the axes: leaving them out of the layout saves time
            }
            axes.text(column, row, text, ha="center", va="center", **style)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=2, pad=2)


def _percent(share: float) -> str:
    if share == 0:
        return ""
    return "<1" if share < 0.005 else f"{100 * share:.0f}"


@styled()
def draw_per_class(metrics: Mapping[str, Any], title: str) -> "Figure":
    """Draw precision, recall and F1 of each class as bars, with the number of galaxies.

    Args:
        metrics: from ``metrics_from_counts``.
        title: data set, variant, split, model and number of galaxies.
    """
    per_class, num_classes = metrics["per_class"], len(metrics["classes"])
    figure = new_figure(5.4, 0.36 * min(num_classes, MOST_NAMED) + 1.2, title)
    axes = figure.subplots()
    y_K = np.arange(num_classes)
    bars = (("precision", "precision", BLUE), ("recall", "recall", ORANGE), ("f1", "F1", GREEN))
    for number, (key, label, colour) in enumerate(bars):
        values_K = [np.nan if value is None else value for value in per_class[key]]
        axes.barh(y_K + 0.26 * (number - 1), values_K, height=0.24, color=colour, label=label)
    if num_classes <= MOST_NAMED:
        names = zip(metrics["classes"], per_class["support"], strict=True)
        axes.set_yticks(y_K, [f"{readable(name)} ({support:,})" for name, support in names])
    axes.set(xlim=(0, 1), ylim=(num_classes - 0.5, -0.5), axisbelow=True)
    tidy(axes, grid=False)
    axes.grid(axis="x", linewidth=0.4, alpha=0.6)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    return figure


@styled()
def draw_learning_curves(lines: Sequence[Mapping[str, Any]], title: str) -> "Figure":
    """Draw loss, accuracy and learning rate over the steps of a run.

    Args:
        lines: of metrics.jsonl: ``step`` and metrics such as ``train/loss`` and ``val/accuracy``.
        title: data set, variant and model.
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
        ("learning rate", (("train/lr", "", GREY),)),
    )
    panels = [(label, known) for label, curves in wanted if (known := [curve for curve in curves if curve[0] in names])]
    columns = max(len(panels), 1)
    figure = new_figure(2.6 * columns + 0.4, 2.6, title)
    for axes, (label, curves) in zip(np.ravel(figure.subplots(1, columns)), panels, strict=False):
        for name, legend, colour in curves:
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            marker = "o" if len(points) < 30 else ""
            axes.plot(*zip(*points, strict=True), color=colour, label=legend, linewidth=1.2, marker=marker, markersize=2.5)
        axes.set(xlabel="step", ylabel=label)
        axes.set_ylim(bottom=0, top=1 if label == "accuracy" else None)
        tidy(axes)
        axes.locator_params(axis="x", nbins=5)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=7)
    return figure


@styled()
def draw_roc_and_pr(metrics: Mapping[str, Any], curves: Sequence[ClassCurves | None], title: str) -> "Figure":
    """Draw the ROC and precision-recall curves of each class against all others, with the areas under them.

    Args:
        metrics: from ``summarise``, with ``roc_auc`` and ``average_precision``.
        curves: by label.
        title: data set, variant, split, model and number of galaxies.
    """
    figure = new_figure(7.6, 3.2, title)
    left, right = figure.subplots(1, 2)
    areas = zip(metrics["roc_auc"]["per_class"], metrics["average_precision"]["per_class"], strict=True)
    for label, (name, curve, (roc, precision)) in enumerate(zip(metrics["classes"], curves, areas, strict=True)):
        if curve is None:
            continue
        linestyle = LINES[label // len(COLOURS) % len(LINES)]
        style: Any = {"color": COLOURS[label % len(COLOURS)], "linestyle": linestyle, "linewidth": 1.1}
        left.plot(*curve.roc, **style, label=f"{readable(name)} ({roc:.3f}, {precision:.3f})")
        right.plot(*curve.precision_recall, **style)
    left.plot([0, 1], [0, 1], color=GREY, linewidth=0.6, linestyle="--")
    roc_mean, precision_mean = (three_decimals(metrics[name]["macro"]) for name in ("roc_auc", "average_precision"))
    left.set(xlabel="false positive rate", ylabel="true positive rate", title=f"ROC: mean area {roc_mean}")
    right.set(xlabel="recall", ylabel="precision", title=f"precision-recall: mean area {precision_mean}")
    for axes in (left, right):
        axes.set(xlim=(0, 1), ylim=(0, 1.01))
        tidy(axes)
    if left.get_legend_handles_labels()[0] and len(curves) <= MOST_NAMED:
        figure.legend(loc="outside right center", frameon=False, fontsize=7, title="class (area left, right)", title_fontsize=7)
    return figure


@styled()
def draw_reliability(metrics: Mapping[str, Any], title: str) -> "Figure":
    """Draw a reliability diagram: accuracy in bins of confidence with 95 % intervals, above the number of galaxies per bin.

    If there is a temperature, a second diagram shows the same after temperature scaling.

    Args:
        metrics: from ``summarise``, with ``calibration``.
        title: data set, variant, split, model and number of galaxies.
    """
    calibration = metrics["calibration"]
    panels = [("as trained", calibration)]
    if calibration["temperature"] is not None:
        panels.append((f"divided by T = {calibration['temperature']['value']:.2f}", calibration["scaled"]))
    figure = new_figure(2.7 * len(panels) + 0.5, 3.6, title)
    grid = figure.subplots(2, len(panels), squeeze=False, sharex=True, sharey="row", height_ratios=(3, 1))
    for (name, found), upper, lower in zip(panels, *grid, strict=True):
        _draw_accuracies(upper, [row for row in found["reliability"] if row["count"]])
        upper.set(title=f"{name}: ECE {three_decimals(found['ece'])}", xlim=(0, 1), ylim=(0, 1))
        _draw_counts(lower, found["reliability"])
    grid[0, 0].set_ylabel("accuracy")
    grid[1, 0].set_ylabel("galaxies")
    handles = grid[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3 if len(panels) > 1 else 1, frameon=False, fontsize=7)
    return figure


def _draw_accuracies(axes: "Axes", bins: Sequence[Mapping[str, Any]]) -> None:
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle="--", label="calibrated")
    for number, row in enumerate(bins):
        style: Any = {"align": "edge", "color": BLUE, "alpha": 0.35, "linewidth": 0, "label": "" if number else "accuracy"}
        axes.bar(row["low"], row["accuracy"], row["high"] - row["low"], **style)
        interval = wilson_interval(round(row["accuracy"] * row["count"]), row["count"])
        axes.plot([row["confidence"]] * 2, interval, color=BLUE, linewidth=1.0)
    points = [row["confidence"] for row in bins], [row["accuracy"] for row in bins]
    axes.plot(*points, "o", color=BLUE, markersize=3, label="at its mean confidence, 95 %")
    tidy(axes)


def _draw_counts(axes: "Axes", bins: Sequence[Mapping[str, Any]]) -> None:
    counts = [row["count"] for row in bins]
    style: Any = {"align": "edge", "color": ORANGE, "edgecolor": "white", "linewidth": 0.4}
    axes.bar([row["low"] for row in bins], counts, bins[0]["high"], **style)
    axes.set(xlabel="confidence", ylim=(0, max(1, *counts) * 1.05))
    axes.locator_params(axis="y", nbins=3, integer=True)
    tidy(axes, grid=False)


@styled()
def draw_accuracy_by_property(metrics: Mapping[str, Any], title: str) -> "Figure":
    """Draw accuracy in bins of each property, with 95 % intervals and the range of each bin (cut where outliers extend it).

    Args:
        metrics: from ``summarise``; ``against`` is not empty.
        title: data set, variant, split, model and number of galaxies.
    """
    against = metrics["against"]
    figure = new_figure(2.4 * len(against) + 0.6, 2.7, title)
    panels = figure.subplots(1, len(against), sharey=True, squeeze=False)[0]
    for axes, (name, found) in zip(panels, against.items(), strict=True):
        bins = found["bins"]
        x, y = np.array([row["median"] for row in bins]), np.array([row["accuracy"] for row in bins])
        ranges = np.abs(np.array([[row["low"], row["high"]] for row in bins]).T - x)
        intervals = np.abs(np.array([row["interval"] for row in bins]).T - y)
        axes.errorbar(x, y, xerr=ranges, color=BLUE, fmt="none", elinewidth=0.5, alpha=0.7)
        axes.errorbar(x, y, yerr=intervals, color=BLUE, fmt="o", markersize=3, elinewidth=1.1)
        axes.axhline(metrics["accuracy"], color=GREY, linewidth=0.8, linestyle="--", label="all galaxies")
        unit = f" ({found['unit']})" if found["unit"] else ""
        axes.set(xlabel=f"{LABELS[name]}{unit}", title=f"{found['count']:,} galaxies", xlim=_limits(bins), ylim=(0, 1))
        axes.locator_params(axis="x", nbins=5)
        tidy(axes)
    panels[0].set_ylabel("accuracy")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower right", frameon=False, fontsize=7)
    return figure


def _limits(bins: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Return the x-limits: beyond an outer bin's median, at most twice the distance from it to the bin's inner edge."""
    first, last = bins[0], bins[-1]
    left = max(first["low"], first["median"] - 2 * (first["high"] - first["median"]))
    right = min(last["high"], last["median"] + 2 * (last["median"] - last["low"]))
    margin = 0.03 * (right - left) or 0.5
    return left - margin, right + margin
