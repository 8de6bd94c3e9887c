"""Accuracy against redshift, apparent size and brightness of the sky."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from galaxydist.evaluation.figures import BLUE, GREY, new_figure, styled, wrapped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
