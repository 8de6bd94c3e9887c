"""The findings as one HTML page that needs nothing else."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from galaxydist.evaluation.exploration import figures
from galaxydist.evaluation.exploration.embedding import picture_map, sprite
from galaxydist.evaluation.exploration.findings import Findings, label_conflicts, pixel_statistics, split_leaks, widths
from galaxydist.evaluation.exploration.look import THUMBNAIL
from galaxydist.evaluation.exploration.oddities import KINDS
from galaxydist.evaluation.text_table import readable
from galaxydist.pages.html import figure_svg, picture_uri, render
from galaxydist.surveys.split import CUTOUT_ARCSEC

# Pairs and pictures that are shown; the rest is counted.
PAIRS_SHOWN, ODD_SHOWN, NAMES_SHOWN = 8, 8, 20
# Example pictures: so many pixels wide, and all together no more than so many bytes, or they are made smaller.
_EXAMPLE_WIDTHS, _EXAMPLE_BYTES = (160, 128, 96, 64, 48), 5_000_000


def render_page(findings: Findings, examples: Mapping[int, list[NDArray[np.uint8]]], provenance: Mapping[str, str]) -> str:
    """The page.

    Args:
        findings: to be shown.
        examples: label -> pictures of that class, in the order of ``findings.members``.
        provenance: ``command``, ``version``: what made the page.
    """
    population, looked = findings.population, findings.looked
    shown = {label: readable(name) for label, name in population.groups.items()}
    seen = {label: name for label, name in shown.items() if label in looked.histograms}
    colours = figures.class_colours(list(shown))
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
                    "mean": picture_uri(looked.means[label].round().astype(np.uint8), quality=90) if label in seen else "",
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
        return _svg(lambda: figures.draw_ridges(values, in_order, label, logarithmic=logarithmic), f"{label} by class")

    labels_n = looked.labels
    return {
        "counts": _svg(lambda: figures.draw_counts(shown, population.counts()), "galaxies by class and split"),
        "size": ridges(looked.size_n, labels_n, "half-light radius (pixels)", logarithmic=True),
        "brightness": ridges(looked.brightness_n, labels_n, "brightness (white pixels)", logarithmic=True),
        "skies": ridges(looked.sky_n, labels_n, "sky level (full scale 1)"),
        "colour": ridges(looked.colour_n, labels_n, "colour, blue minus red (mag, stretched light)"),
        "redshift": ridges(redshift_N, population.labels_N, "redshift"),
        "histograms": _svg(
            lambda: figures.draw_histograms({name: looked.histograms[label] for label, name in seen.items()}) if seen else None,
            "shares of pixel values in red, green and blue, by class",
        ),
    }


def _svg(draw: Callable[[], Any], description: str) -> Any:
    """A figure for the page; nothing where there is nothing to draw."""
    figure = figures.styled(draw)
    return "" if figure is None else figures.styled(lambda: figure_svg(figure, description))


def _examples(findings: Findings, label: int, examples: Mapping[int, list[NDArray[np.uint8]]]) -> list[dict[str, str]]:
    pictures = examples.get(label, [])
    number = sum(map(len, examples.values()))
    # A JPEG of a galaxy takes about 0.35 bytes a pixel here, and a third more as text.
    width = next((size for size in _EXAMPLE_WIDTHS if number * size**2 * 0.47 < _EXAMPLE_BYTES), _EXAMPLE_WIDTHS[-1])
    ids = [findings.looked.ids[place] for place in findings.members(label)[: len(pictures)].tolist()]
    return [{"id": name, "uri": picture_uri(picture, width=width)} for name, picture in zip(ids, pictures, strict=True)]


def _medians(findings: Findings, seen: Mapping[int, str]) -> list[dict[str, Any]]:
    """A line a class: median and quartiles of size and brightness."""
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
        figure, drawn = figures.draw_sky(positions)
        return figure

    figure = _svg(draw, "map of the galaxies on the sky")
    rows = near.pairs_P2[:PAIRS_SHOWN]
    pictures = {picture.row: picture for picture in population.source.pictures(np.unique(rows))}
    names = [readable(name) for name in population.groups.values()]
    numbers = {label: number for number, label in enumerate(population.groups)}

    def side(row: int) -> dict[str, str]:
        picture = pictures[row]
        return {
            "id": picture.id,
            "uri": picture_uri(picture.image, width=128) if picture.image is not None else "",
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
            "uri": picture_uri(looked.thumbnails_nHWC[place], width=2 * THUMBNAIL),
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
    """A line for each kind that was looked for, in the order of ``KINDS``."""
    looked, numbers = findings.looked, findings.oddities
    return [
        {
            "kind": kind,
            "meaning": meaning,
            "number": numbers.get(kind, 0),
            "problems": list(looked.problems.values())[:NAMES_SHOWN] if kind == "unreadable" else [],
            "shown": [
                {"id": looked.ids[place], "uri": picture_uri(looked.thumbnails_nHWC[place], width=96)}
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
        "pictures": picture_uri(picture_map(found, looked, colours), quality=80),
        "sprite": picture_uri(sheet, quality=75),
        "columns": columns,
        "cell": sheet.width // columns,
        "points": [
            {"x": f"{12 + 976 * x:.0f}", "y": f"{988 - 976 * y:.0f}", "class": order[label], "id": looked.ids[place]}
            for place, (x, y), label in places
        ],
    }
