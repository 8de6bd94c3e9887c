"""ROC and precision-recall curves, each class against all others."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from galaxydist.evaluation.areas import Curve
from galaxydist.evaluation.figures import BLUE, GREEN, GREY, MOST_NAMED, ORANGE, VERMILLION, new_figure, styled, wrapped
from galaxydist.evaluation.text import readable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours that show on white, in two kinds of line: ten classes can be told apart, more begin again.
COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, "#CC79A7")
LINES = ("-", (0, (4, 1.5)), (0, (1, 1)))


@styled
def draw_areas(metrics: Mapping[str, Any], curves: Sequence[Curve | None], title: str) -> "Figure":
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
