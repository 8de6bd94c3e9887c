"""Self-contained HTML page about a data set, and its files: numbers, gallery and counts."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from galaxydist.atomic_files import replace_bytes, write_json
from galaxydist.evaluation.plots import BLUE, GREEN, GREY, ORANGE, save_figure
from galaxydist.evaluation.text_table import readable
from galaxydist.explore.analysis import Findings, find_all, label_conflicts, pixel_statistics, split_leaks, summary, widths
from galaxydist.explore.checks import KINDS
from galaxydist.explore.datasets import UNLABELLED, ExploredDataset, Positions
from galaxydist.explore.embedding import Features, image_map, sprite
from galaxydist.explore.scan import THUMBNAIL
from galaxydist.pages.contact_sheet import write_gallery
from galaxydist.pages.html import figure_svg, image_uri, render
from galaxydist.surveys.split import CUTOUT_ARCSEC

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Figures: narrow enough for a phone; black becomes the page's text colour, the background is transparent.

# Ten colours that are distinct with any kind of colour vision: Petroff (2021), arXiv:2107.02270, table 3.
PETROFF = ("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd")
_SPLIT_COLOURS = (BLUE, ORANGE, GREEN)
_CHANNELS = (("red", "#cc3311"), ("green", "#228833"), ("blue", "#4477aa"))
_WIDTH = 4.4
# Largest extent (degrees) of positions that are drawn on a partial map; larger ones are drawn on the whole sky.
_WHOLE_SKY = 60
_MOST_POINTS = 20_000


def class_colours(labels: Sequence[int]) -> dict[int, str]:
    """Return label -> colour; colours repeat after ten classes, and unlabelled galaxies are grey."""
    return {label: GREY if label == UNLABELLED else PETROFF[label % len(PETROFF)] for label in labels}


def draw_counts(names: Sequence[str], counts: Mapping[str, Sequence[int]]) -> "Figure":
    """Draw the number of galaxies by class, stacked by split."""
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
    """Draw the shares of pixels at each of 256 levels in red, green and blue: one panel per class, one logarithmic scale."""
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
    """Draw a map of the sky positions, coloured by redshift where known: the whole sky (Mollweide), or the part they fill.

    Returns:
        The figure and the number of galaxies drawn: at most 20,000, evenly thinned.
    """
    places = np.flatnonzero(positions.known)
    places = places[:: -(-len(places) // _MOST_POINTS)]
    ra, dec, redshift = positions.ra[places], positions.dec[places], positions.redshift[places]
    whole = max(np.ptp(ra), np.ptp(dec)) > _WHOLE_SKY
    figure = _figure(2.9)
    axes = figure.add_subplot(projection="mollweide" if whole else None)
    size = float(np.clip(4000 / max(len(places), 1), 1.0, 10))
    # East is left, as seen from Earth; RA 0 is in the centre.
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
    """Draw with the page's text sizes, independent of the user's matplotlibrc."""
    import matplotlib

    with matplotlib.rc_context({"font.size": 8.0, "axes.linewidth": 0.6, "font.family": "DejaVu Sans"}):
        return draw()


def _bins(parts: Iterable[NDArray[np.float64]]) -> int:
    """Return the number of histogram bins for the largest class (Rice's rule is 2 n^(1/3); smoothing allows twice that)."""
    return int(np.clip(4 * max(map(len, parts)) ** (1 / 3), 12, 60))


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


def _figure(height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH, height), layout="constrained")


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
    population, looked = findings.population, findings.looked
    shown = {label: readable(name) for label, name in population.groups.items()}
    seen = {label: name for label, name in shown.items() if label in looked.histograms}
    colours = class_colours(list(shown))
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
            "read": len(looked),
            "chosen": findings.sample_size,
            "widths": widths(looked),
            "sampled": findings.sample_size < len(population),
            "classes": [
                {
                    "name": name,
                    "colour": colours[label],
                    "counts": [values[place] for values in counts.values()],
                    "all": sum(values[place] for values in counts.values()),
                    "looked": int((looked.labels == label).sum()),
                    "pixels": pixel_statistics(looked, label) if label in seen else None,
                    "examples": _examples(findings, label, examples),
                    "mean": image_uri(looked.means[label].round().astype(np.uint8), quality=90) if label in seen else "",
                }
                for place, (label, name) in enumerate(shown.items())
            ],
            "counts": counts,
            "figures": _figures(findings, seen, colours),
            "sky": _sky(findings),
            "duplicates": _duplicates(findings),
            "odd": _odd(findings),
            "map": _map(findings, shown, colours),
            "cutout": f"{CUTOUT_ARCSEC:.0f}",
            "medians": _medians(findings, seen),
        },
    )


def _figures(findings: Findings, seen: Mapping[int, str], colours: Mapping[int, str]) -> dict[str, Any]:
    looked, population = findings.looked, findings.population
    shown = [readable(name) for name in population.groups.values()]
    in_order = [colours[label] for label in seen]
    redshift_N = np.full(len(population), np.nan)
    redshift_N[findings.positions.rows] = findings.positions.redshift

    def ridges(values_n: NDArray[np.float64], labels_n: NDArray[np.int64], label: str, *, logarithmic: bool = False) -> Any:
        values = {name: values_n[labels_n == number] for number, name in seen.items()}
        return _svg(lambda: draw_ridges(values, in_order, label, logarithmic=logarithmic), f"{label} by class")

    labels_n = looked.labels
    return {
        "counts": _svg(lambda: draw_counts(shown, population.counts()), "galaxies by class and split"),
        "size": ridges(looked.size_n, labels_n, "half-light radius (pixels)", logarithmic=True),
        "brightness": ridges(looked.brightness_n, labels_n, "brightness (white pixels)", logarithmic=True),
        "skies": ridges(looked.sky_n, labels_n, "sky level (full scale 1)"),
        "colour": ridges(looked.colour_n, labels_n, "colour, blue minus red (mag, stretched light)"),
        "redshift": ridges(redshift_N, population.labels_N, "redshift"),
        "histograms": _svg(
            lambda: draw_histograms({name: looked.histograms[label] for label, name in seen.items()}) if seen else None,
            "shares of pixel values in red, green and blue, by class",
        ),
    }


def _svg(draw: Callable[[], Any], description: str) -> Any:
    """Return a figure as SVG; empty if there is nothing to draw."""
    figure = styled(draw)
    return "" if figure is None else styled(lambda: figure_svg(figure, description))


def _examples(findings: Findings, label: int, examples: Mapping[int, list[NDArray[np.uint8]]]) -> list[dict[str, str]]:
    images = examples.get(label, [])
    number = sum(map(len, examples.values()))
    # A JPEG of a galaxy takes about 0.35 bytes per pixel here, and a third more as base64.
    width = next((size for size in _EXAMPLE_WIDTHS if number * size**2 * 0.47 < _EXAMPLE_BYTES), _EXAMPLE_WIDTHS[-1])
    ids = [findings.looked.ids[place] for place in findings.members(label)[: len(images)].tolist()]
    return [{"id": name, "uri": image_uri(image, width=width)} for name, image in zip(ids, images, strict=True)]


def _medians(findings: Findings, seen: Mapping[int, str]) -> list[dict[str, Any]]:
    """Return a row per class: median and quartiles of size and brightness."""
    looked = findings.looked
    lines = []
    for label, name in seen.items():
        members = looked.labels == label
        sizes, brightnesses = (values[members & np.isfinite(looked.size_n)] for values in (looked.size_n, looked.brightness_n))
        quartiles = [np.percentile(values, (50, 25, 75)).tolist() if len(values) else None for values in (sizes, brightnesses)]
        lines.append({"name": name, "size": quartiles[0], "brightness": quartiles[1], "number": len(sizes)})
    return lines


def _sky(findings: Findings) -> dict[str, Any] | None:
    near, positions, population = findings.neighbours, findings.positions, findings.population
    if near is None:
        return None
    drawn = 0

    def draw() -> Any:
        nonlocal drawn
        figure, drawn = draw_sky(positions)
        return figure

    figure = _svg(draw, "map of the galaxies on the sky")
    rows = near.pairs_P2[:PAIRS_SHOWN]
    images = {image.row: image for image in population.source.images(np.unique(rows))}
    names = [readable(name) for name in population.groups.values()]
    numbers = {label: number for number, label in enumerate(population.groups)}

    def side(row: int) -> dict[str, str]:
        image = images[row]
        return {
            "id": image.id,
            "uri": image_uri(image.image, width=128) if image.image is not None else "",
            "name": names[numbers[int(population.labels_N[row])]],
            "split": population.split_names[population.split_N[row]],
        }

    return {
        "figure": figure,
        "drawn": drawn,
        "known": int(positions.known.sum()),
        "asked": len(positions.rows),
        "redshifts": int(np.isfinite(positions.redshift).sum()),
        "pairs": len(near.pairs_P2),
        "galaxies": near.num_galaxies,
        "two_labels": int(near.two_labels_P.sum()),
        "across": int(near.across_P.sum()),
        "shown": [
            {"sides": [side(first), side(second)], "separation": f"{separation:.1f}", "two_labels": bool(two)}
            for (first, second), separation, two in zip(
                rows.tolist(), near.separation_P.tolist(), near.two_labels_P.tolist(), strict=False
            )
        ],
    }


def _duplicates(findings: Findings) -> dict[str, Any]:
    looked, population = findings.looked, findings.population

    def side(place: int) -> dict[str, str]:
        return {
            "id": looked.ids[place],
            "uri": image_uri(looked.thumbnails_nHWC[place], width=2 * THUMBNAIL),
            "name": readable(population.groups[int(looked.labels[place])]),
            "split": population.split_names[population.split_N[looked.rows[place]]],
        }

    return {
        "pairs": len(findings.duplicates),
        "identical": sum(pair.identical for pair in findings.duplicates),
        "two_labels": label_conflicts(findings),
        "across": split_leaks(findings),
        "shown": [
            {
                "sides": [side(pair.first), side(pair.second)],
                "identical": pair.identical,
                "distance": pair.distance,
                "correlation": f"{pair.correlation:.3f}",
            }
            for pair in findings.duplicates[:PAIRS_SHOWN]
        ],
    }


def _odd(findings: Findings) -> list[dict[str, Any]]:
    """Return an entry per kind of odd image, in the order of ``KINDS``."""
    looked, numbers = findings.looked, findings.oddities
    return [
        {
            "kind": kind,
            "meaning": meaning,
            "number": numbers.get(kind, 0),
            "problems": list(looked.problems.values())[:NAMES_SHOWN] if kind == "unreadable" else [],
            "shown": [
                {"id": looked.ids[place], "uri": image_uri(looked.thumbnails_nHWC[place], width=96)}
                for place in looked.oddities.get(kind, [])[:ODD_SHOWN]
            ],
        }
        for kind, meaning in KINDS.items()
    ]


def _map(findings: Findings, shown: Mapping[int, str], colours: dict[int, str]) -> dict[str, Any] | None:
    found, looked = findings.map, findings.looked
    if found is None:
        return None
    sheet, columns = sprite(found, looked)
    order = {label: number for number, label in enumerate(shown)}
    labels = looked.labels[found.places].tolist()
    places = zip(found.places.tolist(), found.xy_m2.tolist(), labels, strict=True)
    return {
        "number": len(found.places),
        "features": found.features,
        "agreement": f"{100 * found.agreement:.0f}",
        "by_chance": f"{100 * found.by_chance:.0f}",
        "images": image_uri(image_map(found, looked, colours), quality=80),
        "sprite": image_uri(sheet, quality=75),
        "columns": columns,
        "cell": sheet.width // columns,
        "points": [
            {"x": f"{12 + 976 * x:.0f}", "y": f"{988 - 976 * y:.0f}", "class": order[label], "id": looked.ids[place]}
            for place, (x, y), label in places
        ],
    }


PAGE = "explore.html"
GALLERY = "gallery.jpg"
GALLERY_BYTES = 600_000
SUMMARY = "survey.json"


def explore(
    population: ExploredDataset,
    *,
    page: Path,
    out_dir: Path | None,
    provenance: Mapping[str, str],
    sample: int,
    per_class: int = 8,
    seed: int = 0,
    features: Features | None = None,
) -> Findings:
    """Analyse a data set and write the page and files.

    Args:
        page: path of the HTML page; its folder is created if needed, and an existing file is replaced.
        out_dir: folder for ``survey.json``, ``gallery.jpg`` and ``counts.png`` (also as PDF); None: these are not written.
        provenance: ``command`` and ``version``, for the page.
        sample: largest number of galaxies whose images are read.
        per_class: number of galaxies of each class in the gallery.
        seed: of the choice of galaxies and of the map.
        features: of thumbnails, for the map; None: ``principal_components``.
    """
    for folder in {page.parent, *([] if out_dir is None else [out_dir])}:
        folder.mkdir(parents=True, exist_ok=True)
    findings = find_all(population, sample=sample, seed=seed, features=features)
    examples = _read_examples(findings, per_class)
    if out_dir is not None:
        _write_files(findings, examples, out_dir)
    text = render_page(findings, examples, {**provenance, "versions": _versions()})
    replace_bytes(page, text.encode())
    return findings


def _read_examples(findings: Findings, per_class: int) -> dict[int, list[NDArray[np.uint8]]]:
    """Read a few images of each class; return label -> readable images."""
    population, looked = findings.population, findings.looked
    places = {label: findings.members(label)[:per_class] for label in population.groups}
    rows = looked.rows[np.sort(np.concatenate([*places.values()]))]
    by_row = {item.row: item.image for item in population.source.images(rows)}
    found: dict[int, list[NDArray[np.uint8]]] = {}
    for label, chosen in places.items():
        images = [by_row[row] for row in looked.rows[chosen].tolist()]
        found[label] = [image for image in images if image is not None]
    return found


def _write_files(findings: Findings, examples: Mapping[int, list[NDArray[np.uint8]]], folder: Path) -> None:
    population = findings.population
    write_json(folder / SUMMARY, summary(findings))
    title = f"{population.dataset} ({population.variant}), N = {len(population):,}"
    images = {population.groups[label]: members for label, members in examples.items() if members}
    if images:
        write_gallery(folder / GALLERY, images, title, max_bytes=GALLERY_BYTES)
    names = [readable(name) for name in population.groups.values()]

    def draw() -> None:
        figure = draw_counts(names, population.counts())
        figure.suptitle(title, fontsize=9)
        save_figure(figure, folder / "counts")

    styled(draw)


def _versions() -> str:
    from importlib.metadata import version

    return ", ".join(f"{name} {version(name)}" for name in ("numpy", "scikit-learn", "matplotlib", "ImageHash"))
