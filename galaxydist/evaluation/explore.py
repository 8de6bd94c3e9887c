"""What a data set looks like: one page with everything on it, and beside it the numbers, a gallery and the counts as files."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from galaxydist.atomic_files import replace_bytes, write_json
from galaxydist.evaluation.exploration.embedding import Features
from galaxydist.evaluation.exploration.figures import draw_counts, styled
from galaxydist.evaluation.exploration.findings import Findings, find_all, summary
from galaxydist.evaluation.exploration.page import render_page
from galaxydist.evaluation.exploration.population import Population
from galaxydist.evaluation.plots import save_figure
from galaxydist.evaluation.text_table import readable
from galaxydist.pages.contact_sheet import write_gallery

PAGE = "explore.html"
GALLERY = "gallery.jpg"
GALLERY_BYTES = 600_000
SUMMARY = "survey.json"


def explore(
    population: Population,
    *,
    page: Path,
    out_dir: Path | None,
    provenance: Mapping[str, str],
    sample: int,
    per_class: int = 8,
    seed: int = 0,
    features: Features | None = None,
) -> Findings:
    """Look at a data set and write what was found.

    Args:
        population: to look at.
        page: the HTML page; its folder is made if need be, and what was there before is replaced.
        out_dir: gets ``survey.json``, ``gallery.jpg`` and ``counts.png`` (also as PDF), unless it is None.
        provenance: ``command`` and ``version``, for the page.
        sample: galaxies whose pictures are read, at most.
        per_class: galaxies of each class in the gallery.
        seed: of the choice of galaxies.
        features: of thumbnails, for the map.
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
    """Label -> a few pictures of each class, of those that could be read."""
    population, looked = findings.population, findings.looked
    places = {label: findings.members(label)[:per_class] for label in population.groups}
    rows = looked.rows[np.sort(np.concatenate([*places.values()]))]
    pictures = {picture.row: picture.image for picture in population.source.pictures(rows)}
    found: dict[int, list[NDArray[np.uint8]]] = {}
    for label, chosen in places.items():
        images = [pictures[row] for row in looked.rows[chosen].tolist()]
        found[label] = [image for image in images if image is not None]
    return found


def _write_files(findings: Findings, examples: Mapping[int, list[NDArray[np.uint8]]], folder: Path) -> None:
    population = findings.population
    write_json(folder / SUMMARY, summary(findings))
    title = f"{population.dataset} ({population.variant}), N = {len(population):,}"
    images = {population.groups[label]: pictures for label, pictures in examples.items() if pictures}
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
