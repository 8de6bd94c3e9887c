"""The figures of the exploration page: narrow enough for a phone; black is the page's text colour, the ground is clear."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from galaxydist.evaluation.exploration.population import UNLABELLED, Positions
from galaxydist.evaluation.plots import BLUE, GREEN, GREY, ORANGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Ten colours that are told apart with any kind of colour vision: Petroff (2021), arXiv:2107.02270, table 3.
PETROFF = ("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd")
_SPLIT_COLOURS = (BLUE, ORANGE, GREEN)
_CHANNELS = (("red", "#cc3311"), ("green", "#228833"), ("blue", "#4477aa"))
_WIDTH = 4.4
# Positions further apart than this (degrees) are drawn on the whole sky.
_WHOLE_SKY = 60
_MOST_POINTS = 20_000


def class_colours(labels: Sequence[int]) -> dict[int, str]:
    """Label -> colour; after ten classes they begin again. The unlabelled are grey."""
    return {label: GREY if label == UNLABELLED else PETROFF[label % len(PETROFF)] for label in labels}


def draw_counts(names: Sequence[str], counts: Mapping[str, Sequence[int]]) -> "Figure":
    """Galaxies by class, stacked by split."""
    figure = _figure(0.24 * len(names) + 1.1)
    axes = figure.subplots()
    left = np.zeros(len(names))
    for number, (split, values) in enumerate(counts.items()):
        colour = _SPLIT_COLOURS[number % len(_SPLIT_COLOURS)]
        axes.barh(names, values, left=left, label=split, color=colour, height=0.72)
        left += values
    axes.invert_yaxis()
    axes.set(xlabel="galaxies")
    axes.margins(y=0.02)
    _tidy(axes)
    axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3, frameon=False)
    return figure


def draw_ridges(
    values: Mapping[str, NDArray[np.float64]], colours: Sequence[str], label: str, *, logarithmic: bool = False
) -> "Figure | None":
    """The distribution of a number in each class: a filled histogram each, its median as a line. None without any value.

    Args:
        values: by class; nan is left out.
        colours: in the same order.
        label: of the axis, with the unit.
        logarithmic: the axis; values of 0 and less are left out.
    """
    kept = {name: _usable(numbers, logarithmic) for name, numbers in values.items()}
    together = np.concatenate([*kept.values(), np.empty(0)])
    if not len(together):
        return None
    low, high = np.percentile(together, [0.25, 99.75])
    low, high = (low - 0.5, high + 0.5) if low == high else (low, high)
    edges = np.linspace(low, high, _bins(kept.values()) + 1)
    figure = _figure(0.3 * len(kept) + 0.9)
    axes = figure.subplots()
    for row, (numbers, colour) in enumerate(zip(kept.values(), colours, strict=True)):
        if not len(numbers):
            continue
        heights = np.histogram(np.clip(numbers, low, high), edges)[0].astype(np.float64)
        heights = np.convolve(heights, (0.25, 0.5, 0.25), "same")
        heights *= 1.35 / heights.max()
        middles = (edges[1:] + edges[:-1]) / 2
        base = len(kept) - 1 - row
        axes.fill_between(middles, base, base + heights, color=colour, alpha=0.65, linewidth=0, zorder=2 * row + 2)
        axes.plot(middles, base + heights, color="black", linewidth=0.6, zorder=2 * row + 3)
        median = float(np.median(numbers))
        axes.plot([median, median], [base, base + np.interp(median, middles, heights)], color="black", lw=1.4, zorder=2 * row + 3)
    axes.set_yticks(np.arange(len(kept))[::-1], list(kept))
    axes.set(xlabel=label, xlim=(low, high), ylim=(-0.15, len(kept) + 0.45))
    if logarithmic:
        _power_ticks(axes, low, high)
    _tidy(axes)
    axes.tick_params(axis="y", length=0)
    return figure


def draw_histograms(histograms: Mapping[str, NDArray[np.int64]]) -> "Figure":
    """Shares of pixels at each of 256 levels in red, green and blue, a panel a class, all on one logarithmic scale."""
    columns = 2
    rows = -(-len(histograms) // columns)
    figure = _figure(0.95 * rows + 0.6)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    highest = max((histogram_CL / histogram_CL.sum(axis=1, keepdims=True)).max() for histogram_CL in histograms.values())
    for axes, (name, histogram_CL) in zip(grid.flat, histograms.items(), strict=False):
        shares_CL = histogram_CL / histogram_CL.sum(axis=1, keepdims=True)
        for (channel, colour), shares_L in zip(_CHANNELS, shares_CL, strict=True):
            pairs = shares_L.reshape(-1, 2).mean(axis=1)
            axes.plot(np.arange(0.5, 256, 2), np.where(pairs > 0, pairs, np.nan), color=colour, linewidth=0.9, label=channel)
        axes.set_title(name, fontsize=7.5, pad=2)
        axes.set(yscale="log", xlim=(0, 255), xticks=(0, 64, 128, 192, 255))
        axes.set_yticks([1e-6, 1e-4, 1e-2, 1], ["0.0001 %", "0.01 %", "1 %", "100 %"])
        axes.minorticks_off()
        axes.set_ylim(highest * 1e-5, highest * 2)
        _tidy(axes)
    for axes in grid.flat[len(histograms) :]:
        axes.set_axis_off()
    figure.supxlabel("pixel value", fontsize=8)
    figure.supylabel("share of pixels", fontsize=8)
    figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return figure


def draw_sky(positions: Positions) -> "tuple[Figure, int]":
    """Where the galaxies lie, coloured by redshift where that is known: on the whole sky (Mollweide), or the part they fill.

    Returns:
        The figure and the number of galaxies drawn: no more than 20,000, evenly thinned.
    """
    places = np.flatnonzero(positions.known)
    places = places[:: -(-len(places) // _MOST_POINTS)]
    ra, dec, redshift = positions.ra[places], positions.dec[places], positions.redshift[places]
    whole = max(np.ptp(ra), np.ptp(dec)) > _WHOLE_SKY
    figure = _figure(2.9)
    axes = figure.add_subplot(projection="mollweide" if whole else None)
    size = float(np.clip(4000 / max(len(places), 1), 1.0, 10))
    # East is left, as it is seen from below; the middle of the map is RA 0.
    x, y = (-np.radians((ra + 180) % 360 - 180), np.radians(dec)) if whole else (ra, dec)
    coloured = np.isfinite(redshift)
    style: dict[str, Any] = {"s": size, "linewidths": 0, "rasterized": True}
    axes.scatter(x[~coloured], y[~coloured], color=BLUE, **style)
    if coloured.any():
        top = float(np.percentile(redshift[coloured], 98))
        points = axes.scatter(x[coloured], y[coloured], c=redshift[coloured], cmap="viridis", vmin=0, vmax=top or 1, **style)
        figure.colorbar(points, label="redshift", orientation="horizontal", shrink=0.7, aspect=40, pad=0.04)
    if whole:
        axes.set_xticks(np.radians(np.arange(-120, 121, 60)), [f"{-x % 360}°" for x in range(-120, 121, 60)])
        axes.set_yticks(np.radians(np.arange(-60, 61, 30)))
        axes.tick_params(labelsize=6.5)
    else:
        axes.invert_xaxis()
        axes.set(xlabel="right ascension (deg)", ylabel="declination (deg)")
        axes.set_aspect(1 / np.cos(np.radians(np.clip(dec.mean(), -80, 80))), adjustable="datalim")
    axes.grid(linewidth=0.3, alpha=0.5)
    return figure, len(places)


def styled(draw: "Callable[[], Any]") -> Any:
    """Draw with the page's text sizes, whatever the user's matplotlibrc says."""
    import matplotlib

    with matplotlib.rc_context({"font.size": 8.0, "axes.linewidth": 0.6, "font.family": "DejaVu Sans"}):
        return draw()


def _bins(parts: Iterable[NDArray[np.float64]]) -> int:
    """Of a histogram: more where classes have more galaxies (Rice's rule is 2 n^(1/3); smoothing allows twice that)."""
    return int(np.clip(4 * max(map(len, parts)) ** (1 / 3), 12, 60))


def _usable(numbers: NDArray[np.float64], logarithmic: bool) -> NDArray[np.float64]:
    finite = numbers[np.isfinite(numbers)]
    return np.log10(finite[finite > 0]) if logarithmic else finite


def _power_ticks(axes: "Axes", low: float, high: float) -> None:
    """Round numbers (1, 2, 5 of each power of ten) on an axis of logarithms."""
    rounds = [(factor * 10.0**power) for power in range(int(np.floor(low)), int(np.ceil(high)) + 1) for factor in (1, 2, 5)]
    inside = [value for value in rounds if low <= np.log10(value) <= high]
    axes.set_xticks(np.log10(inside), [f"{value:,g}" for value in inside])


def _tidy(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", linewidth=0.3, alpha=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(length=2, pad=2)


def _figure(height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH, height), layout="constrained")
