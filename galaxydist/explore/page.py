"""Self-contained HTML page about a data set, and its files: numbers, example images and counts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from galaxydist.atomic_files import replace_bytes, write_json
from galaxydist.evaluation.plots import BLUE, GREEN, GREY, ORANGE, new_figure, save_figure, styled
from galaxydist.evaluation.text_table import readable
from galaxydist.explore.analysis import Findings, analyse, label_conflicts, pixel_statistics, split_leaks, summary, widths
from galaxydist.explore.checks import ODD_KINDS
from galaxydist.explore.datasets import UNLABELLED, ExploredDataset, Positions
from galaxydist.explore.embedding import DoubtfulLabel, image_map, sprite
from galaxydist.explore.scan import THUMBNAIL
from galaxydist.pages.contact_sheet import write_class_sheet
from galaxydist.pages.html import figure_svg, image_uri, render
from galaxydist.surveys.split import CUTOUT_ARCSEC

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


PAGE, GALLERY, SUMMARY = "explore.html", "gallery.jpg", "survey.json"
GALLERY_BYTES = 600_000
# Figures are narrow enough for a phone. Black becomes the page's text colour; the background is transparent.
_WIDTH = 4.4
# Ten colours that are distinct with any kind of colour vision: Petroff (2021), arXiv:2107.02270, table 3.
PETROFF = ("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd")
_SPLIT_COLOURS = (BLUE, ORANGE, GREEN, GREY)
_CHANNELS = (("red", "#cc3311"), ("green", "#228833"), ("blue", "#4477aa"))
# Largest extent (degrees) of positions that are drawn on a partial map; larger ones are drawn on the whole sky.
_WHOLE_SKY = 60
_MOST_POINTS = 20_000


@styled()
def draw_counts(names: Sequence[str], counts: Mapping[str, Sequence[int]], title: str = "") -> "Figure":
    """Draw the number of galaxies by class, stacked by split."""
    figure = new_figure(_WIDTH, 0.24 * len(names) + 1.1, title)
    axes = figure.subplots()
    left = np.zeros(len(names))
    for number, (split, values) in enumerate(counts.items()):
        colour = _SPLIT_COLOURS[number % len(_SPLIT_COLOURS)]
        axes.barh(names, values, left=left, label=split, color=colour, height=0.72)
        left += values
    axes.invert_yaxis()
    axes.set_xlabel("galaxies")
    axes.margins(y=0.02)
    _tidy(axes)
    axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=4, frameon=False)
    return figure


@styled()
def draw_ridges(
    values: Mapping[str, NDArray[np.float64]], colours: Sequence[str], label: str, *, logarithmic: bool = False
) -> "Figure | None":
    """Draw a filled histogram of a quantity for each class, with its median as a line; None without any value.

    Args:
        values: by class; nan is left out.
        colours: in the same order.
        label: of the axis, with the unit.
        logarithmic: use a logarithmic axis; values of 0 and less are left out.
    """
    kept = {name: _usable(numbers, logarithmic) for name, numbers in values.items()}
    together = np.concatenate([*kept.values(), np.empty(0)])
    if not len(together):
        return None
    low, high = np.percentile(together, [0.25, 99.75])
    low, high = (low - 0.5, high + 0.5) if low == high else (low, high)
    # Rice's rule for the largest class is 2 n^(1/3) bins; smoothing allows twice that.
    num_bins = int(np.clip(4 * max(map(len, kept.values())) ** (1 / 3), 12, 60))
    edges = np.linspace(low, high, num_bins + 1)
    figure = new_figure(_WIDTH, 0.3 * len(kept) + 0.9)
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


@styled()
def draw_histograms(histograms: Mapping[str, NDArray[np.int64]]) -> "Figure":
    """Draw the shares of pixels at each of 256 levels in red, green and blue: one panel per class, one logarithmic scale."""
    rows = -(-len(histograms) // 2)
    figure = new_figure(_WIDTH, 0.95 * rows + 0.6)
    grid = figure.subplots(rows, 2, sharex=True, sharey=True, squeeze=False)
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


@styled()
def draw_sky(positions: Positions) -> "tuple[Figure, int]":
    """Draw a map of the sky positions, coloured by redshift where known: the whole sky (Mollweide), or the part they fill.

    Returns:
        The figure and the number of galaxies drawn: at most 20,000, evenly thinned.
    """
    drawn = np.flatnonzero(positions.known)
    drawn = drawn[:: -(-len(drawn) // _MOST_POINTS)]
    ra, dec, redshift = positions.ra[drawn], positions.dec[drawn], positions.redshift[drawn]
    around_0 = (ra + 180) % 360 - 180
    ra = around_0 if np.ptp(around_0) < np.ptp(ra % 360) else ra % 360  # a field on both sides of 0 degrees is not cut
    whole = max(np.ptp(ra), np.ptp(dec)) > _WHOLE_SKY
    figure = new_figure(_WIDTH, 2.9)
    axes = figure.add_subplot(projection="mollweide" if whole else None)
    size = float(np.clip(4000 / max(len(drawn), 1), 1.0, 10))
    # East is left, as scanned from Earth; RA 0 is in the centre.
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
    return figure, len(drawn)


def _usable(numbers: NDArray[np.float64], logarithmic: bool) -> NDArray[np.float64]:
    finite = numbers[np.isfinite(numbers)]
    return np.log10(finite[finite > 0]) if logarithmic else finite


def _power_ticks(axes: "Axes", low: float, high: float) -> None:
    """Set ticks at round numbers (1, 2, 5 of each power of ten) on an axis of logarithms."""
    rounds = [(factor * 10.0**power) for power in range(int(np.floor(low)), int(np.ceil(high)) + 1) for factor in (1, 2, 5)]
    inside = [value for value in rounds if low <= np.log10(value) <= high]
    axes.set_xticks(np.log10(inside), [f"{value:,g}" for value in inside])


def _tidy(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", linewidth=0.3, alpha=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(length=2, pad=2)


# Largest numbers of pairs, odd images and names that are shown; the rest is only counted.
PAIRS_SHOWN, ODD_SHOWN, NAMES_SHOWN = 8, 8, 20
# Example images: the first of these widths (pixels) at which all of them together stay below this number of bytes.
_EXAMPLE_WIDTHS, _EXAMPLE_BYTES = (160, 128, 96, 64, 48), 5_000_000


def render_page(findings: Findings, examples: Mapping[int, list[NDArray[np.uint8]]], provenance: Mapping[str, str]) -> str:
    """Render the page.

    Args:
        examples: label -> images of that class, in the order of ``findings.members``.
        provenance: ``command``, ``version`` and ``versions`` that made the page.
    """
    population, scan = findings.population, findings.scan
    shown = {label: readable(name) for label, name in population.groups.items()}
    scanned = {label: name for label, name in shown.items() if label in scan.histograms}
    # Colours repeat after ten classes; unlabelled galaxies are grey.
    colours = {label: GREY if label == UNLABELLED else PETROFF[label % len(PETROFF)] for label in shown}
    counts = population.counts()
    return render(
        "explore.html",
        {
            "dataset": population.dataset,
            "variant": population.variant,
            "population": population,
            "findings": findings,
            "provenance": provenance,
            "total": len(population),
            "read": len(scan),
            "chosen": findings.sample_size,
            "widths": widths(scan),
            "sampled": findings.sample_size < len(population),
            "classes": [
                {
                    "name": name,
                    "colour": colours[label],
                    "counts": [values[row] for values in counts.values()],
                    "all": sum(values[row] for values in counts.values()),
                    "scanned": int((scan.labels == label).sum()),
                    "pixels": pixel_statistics(scan, label) if label in scanned else None,
                    "examples": _examples(findings, label, examples),
                    "mean": image_uri(scan.means[label].round().astype(np.uint8), quality=90) if label in scanned else "",
                }
                for row, (label, name) in enumerate(shown.items())
            ],
            "counts": counts,
            "figures": _figures(findings, scanned, colours),
            "sky": _sky(findings),
            "duplicates": _duplicates(findings),
            "odd": _odd(findings),
            "map": _map(findings, shown, colours),
            "cutout": f"{CUTOUT_ARCSEC:.0f}",
            "medians": _medians(findings, scanned),
        },
    )


def _figures(findings: Findings, scanned: Mapping[int, str], colours: Mapping[int, str]) -> dict[str, Any]:
    scan, population = findings.scan, findings.population
    shown = [readable(name) for name in population.groups.values()]
    in_order = [colours[label] for label in scanned]

    def ridges(values_n: NDArray[np.float64], labels_n: NDArray[np.int64], label: str, *, logarithmic: bool = False) -> Any:
        values = {name: values_n[labels_n == number] for number, name in scanned.items()}
        return _svg(draw_ridges(values, in_order, label, logarithmic=logarithmic), f"{label} by class")

    labels_n = scan.labels
    return {
        "counts": _svg(draw_counts(shown, population.counts()), "galaxies by class and split"),
        "size": ridges(scan.size_n, labels_n, "half-light radius (pixels)", logarithmic=True),
        "brightness": ridges(scan.brightness_n, labels_n, "brightness (white pixels)", logarithmic=True),
        "skies": ridges(scan.sky_n, labels_n, "sky level (full scale 1)"),
        "colour": ridges(scan.colour_n, labels_n, "colour, blue minus red (mag, stretched light)"),
        "redshift": ridges(findings.positions.redshift, population.labels_N, "redshift"),
        "histograms": _svg(
            draw_histograms({name: scan.histograms[label] for label, name in scanned.items()}) if scanned else None,
            "shares of pixel values in red, green and blue, by class",
        ),
    }


def _svg(figure: "Figure | None", description: str) -> str:
    """Return a figure as SVG; empty if there is nothing to draw."""
    return "" if figure is None else figure_svg(figure, description)


def _card(findings: Findings, row: int, name: str, uri: str) -> dict[str, str]:
    """Describe one galaxy of a pair."""
    population = findings.population
    return {
        "id": name,
        "uri": uri,
        "name": readable(population.groups[int(population.labels_N[row])]),
        "split": population.split_names[population.split_N[row]],
    }


def _examples(findings: Findings, label: int, examples: Mapping[int, list[NDArray[np.uint8]]]) -> list[dict[str, str]]:
    images = examples.get(label, [])
    number = sum(map(len, examples.values()))
    # A JPEG of a galaxy takes about 0.35 bytes per pixel here, and a third more as base64.
    width = next((size for size in _EXAMPLE_WIDTHS if number * size**2 * 0.47 < _EXAMPLE_BYTES), _EXAMPLE_WIDTHS[-1])
    ids = [findings.scan.ids[index] for index in findings.members(label)[: len(images)].tolist()]
    return [{"id": name, "uri": image_uri(image, width=width)} for name, image in zip(ids, images, strict=True)]


def _medians(findings: Findings, scanned: Mapping[int, str]) -> list[dict[str, Any]]:
    """Return a row per class: median and quartiles of size and brightness."""
    scan = findings.scan
    lines = []
    for label, name in scanned.items():
        members = scan.labels == label
        sizes, brightnesses = (values[members & np.isfinite(scan.size_n)] for values in (scan.size_n, scan.brightness_n))
        quartiles = [np.percentile(values, (50, 25, 75)).tolist() if len(values) else None for values in (sizes, brightnesses)]
        lines.append({"name": name, "size": quartiles[0], "brightness": quartiles[1], "number": len(sizes)})
    return lines


def _sky(findings: Findings) -> dict[str, Any] | None:
    near, positions = findings.neighbours, findings.positions
    if near is None:
        return None
    figure, num_drawn = draw_sky(positions)
    rows_P2 = near.pairs_P2[:PAIRS_SHOWN]
    cards = {
        image.row: _card(findings, image.row, image.id, image_uri(image.image, width=128) if image.image is not None else "")
        for image in findings.population.source.images(np.unique(rows_P2))
    }
    shown = zip(rows_P2.tolist(), near.separation_P.tolist(), near.two_labels_P.tolist(), strict=False)
    return {
        "figure": _svg(figure, "map of the galaxies on the sky"),
        "drawn": num_drawn,
        "known": int(positions.known.sum()),
        "redshifts": int(np.isfinite(positions.redshift).sum()),
        "pairs": len(near.pairs_P2),
        "galaxies": near.num_galaxies,
        "two_labels": int(near.two_labels_P.sum()),
        "across": int(near.across_P.sum()),
        "shown": [
            {"sides": [cards[row] for row in pair], "separation": f"{separation:.1f}", "two_labels": two_labels}
            for pair, separation, two_labels in shown
        ],
    }


def _duplicates(findings: Findings) -> dict[str, Any]:
    scan = findings.scan

    def card(index: int) -> dict[str, str]:
        uri = image_uri(scan.thumbnails_nHWC[index], width=2 * THUMBNAIL)
        return _card(findings, int(scan.rows[index]), scan.ids[index], uri)

    return {
        "pairs": len(findings.duplicates),
        "identical": sum(pair.identical for pair in findings.duplicates),
        "two_labels": label_conflicts(findings),
        "across": split_leaks(findings),
        "shown": [
            {
                "sides": [card(pair.first), card(pair.second)],
                "identical": pair.identical,
                "distance": pair.distance,
                "correlation": f"{pair.correlation:.3f}",
            }
            for pair in findings.duplicates[:PAIRS_SHOWN]
        ],
    }


def _odd(findings: Findings) -> list[dict[str, Any]]:
    """Return an entry per kind of odd image, in the order of ``ODD_KINDS``."""
    scan, numbers = findings.scan, findings.odd_images
    return [
        {
            "kind": kind,
            "meaning": meaning,
            "number": numbers.get(kind, 0),
            "problems": list(scan.problems.values())[:NAMES_SHOWN] if kind == "unreadable" else [],
            "shown": [
                {"id": scan.ids[index], "uri": image_uri(scan.thumbnails_nHWC[index], width=96)}
                for index in scan.odd_images.get(kind, [])[:ODD_SHOWN]
            ],
        }
        for kind, meaning in ODD_KINDS.items()
    ]


def _map(findings: Findings, shown: Mapping[int, str], colours: dict[int, str]) -> dict[str, Any] | None:
    found, scan = findings.map, findings.scan
    if found is None:
        return None
    sheet, columns = sprite(found, scan)
    order = {label: number for number, label in enumerate(shown)}
    labels = scan.labels[found.indices].tolist()
    points = zip(found.indices.tolist(), found.xy_m2.tolist(), labels, strict=True)
    return {
        "number": len(found.indices),
        "features": found.features,
        "agreement": f"{100 * found.agreement:.0f}",
        "by_chance": f"{100 * found.by_chance:.0f}",
        "has_classes": found.by_chance < 1,
        "doubtful": [_doubtful(findings, one, shown) for one in found.doubtful[:ODD_SHOWN]],
        "num_doubtful": len(found.doubtful),
        "images": image_uri(image_map(found, scan, colours), quality=80),
        "sprite": image_uri(sheet, quality=75),
        "columns": columns,
        "cell": sheet.width // columns,
        "points": [
            {"x": f"{12 + 976 * x:.0f}", "y": f"{988 - 976 * y:.0f}", "class": order[label], "id": scan.ids[index]}
            for index, (x, y), label in points
        ],
    }


def _doubtful(findings: Findings, one: DoubtfulLabel, shown: Mapping[int, str]) -> dict[str, Any]:
    scan = findings.scan
    uri = image_uri(scan.thumbnails_nHWC[one.index], width=96)
    card = _card(findings, int(scan.rows[one.index]), scan.ids[one.index], uri)
    return {**card, "other": shown[one.other], "votes": one.votes}


def explore(
    population: ExploredDataset,
    *,
    page: Path,
    out_dir: Path | None,
    provenance: Mapping[str, str],
    sample: int,
    per_class: int = 8,
    seed: int = 0,
) -> Findings:
    """Analyse a data set and write the page and files.

    Args:
        page: path of the HTML page; its folder is created if needed, and an existing file is replaced.
        out_dir: folder for ``survey.json``, ``gallery.jpg`` and ``counts.png`` (also as PDF); None: these are not written.
        provenance: ``command`` and ``version``, for the page.
        sample: largest number of galaxies whose images are read.
        per_class: number of galaxies of each class in the gallery.
        seed: of the choice of galaxies and of the map.
    """
    for folder in {page.parent, *([] if out_dir is None else [out_dir])}:
        folder.mkdir(parents=True, exist_ok=True)
    findings = analyse(population, sample=sample, seed=seed)
    examples = _read_examples(findings, per_class)
    if out_dir is not None:
        _write_files(findings, examples, out_dir)
    text = render_page(findings, examples, {**provenance, "versions": _versions()})
    replace_bytes(page, text.encode())
    return findings


def _read_examples(findings: Findings, per_class: int) -> dict[int, list[NDArray[np.uint8]]]:
    """Read a few images of each class; return label -> readable images."""
    population, scan = findings.population, findings.scan
    rows = {label: scan.rows[findings.members(label)[:per_class]].tolist() for label in population.groups}
    images = {
        item.row: item.image for item in population.source.images(np.sort(np.concatenate([*rows.values()]).astype(np.int64)))
    }
    return {label: [image for row in of_class if (image := images[row]) is not None] for label, of_class in rows.items()}


def _write_files(findings: Findings, examples: Mapping[int, list[NDArray[np.uint8]]], folder: Path) -> None:
    population = findings.population
    write_json(folder / SUMMARY, summary(findings))
    title = f"{population.dataset} ({population.variant}), N = {len(population):,}"
    images = {population.groups[label]: members for label, members in examples.items() if members}
    if images:
        write_class_sheet(folder / GALLERY, images, title, max_bytes=GALLERY_BYTES)
    names = [readable(name) for name in population.groups.values()]
    save_figure(draw_counts(names, population.counts(), title), folder / "counts")


def _versions() -> str:
    from importlib.metadata import version

    return ", ".join(f"{name} {version(name)}" for name in ("numpy", "scikit-learn", "matplotlib", "ImageHash"))
