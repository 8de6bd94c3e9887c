"""What a survey looks like: galaxies by class and split, pixel statistics of a sample, and a gallery of every class."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from galaxydist.chance import hash64
from galaxydist.evaluation.figures import BLUE, GREEN, ORANGE, save_figure
from galaxydist.evaluation.gallery import write_gallery
from galaxydist.evaluation.text import readable
from galaxydist.files import write_json
from galaxydist.galaxy import EncodedImage, Survey
from galaxydist.surveys.pictures import decode_picture

# Galaxies of each class that pixel statistics are taken from: enough for two digits, and seconds of work.
SAMPLE_PER_CLASS = 60
GALLERY = "gallery.jpg"
GALLERY_BYTES = 600_000
# Tells this choice of galaxies from every other use of the same hash.
_PURPOSE = 0x6578706C6F7265  # "explore"


@dataclass(frozen=True, slots=True)
class Exploration:
    """What was found in a survey.

    Attributes:
        counts: split name -> number of galaxies by class.
        pixels: by class, over a sample of ``galaxies``: ``mean`` and ``std`` of each channel (R G B, full scale 1), ``black`` and
            ``saturated``: shares of pixel values that are 0 and 255.
    """

    dataset: str
    variant: str
    class_names: tuple[str, ...]
    counts: dict[str, list[int]]
    pixels: dict[str, dict[str, Any]]


def explore_survey(survey: Survey, out_dir: Path, *, per_class: int = 8, seed: int = 0) -> Exploration:
    """Look at a survey and write ``survey.json``, ``gallery.jpg`` and ``counts.png`` (also as PDF) into ``out_dir``.

    Args:
        survey: to look at.
        out_dir: made if need be; older files of these names are replaced.
        per_class: galaxies of each class in the gallery.
        seed: of the choice of galaxies.

    Raises:
        UserError: a picture cannot be read.
    """
    rows_by_class = [_choose(survey, label, max(per_class, SAMPLE_PER_CLASS), seed) for label in range(len(survey.class_names))]
    pictures = dict(_read(survey, sorted(row for rows in rows_by_class for row in rows)))
    sample = [[pictures[row] for row in rows] for rows in rows_by_class]
    exploration = Exploration(
        dataset=survey.name,
        variant=survey.variant,
        class_names=survey.class_names,
        counts={split: _counts(survey, rows) for split, rows in survey.splits.items()},
        pixels={name: _statistics(images) for name, images in zip(survey.class_names, sample, strict=True) if images},
    )
    out_dir.mkdir(parents=True, exist_ok=True)
    write_json(out_dir / "survey.json", asdict(exploration))
    _write_pictures(exploration, sample, per_class, out_dir)
    return exploration


def _counts(survey: Survey, rows: NDArray[np.int64]) -> list[int]:
    counts: list[int] = np.bincount(survey.labels[rows], minlength=len(survey.class_names)).tolist()
    return counts


def _choose(survey: Survey, label: int, number: int, seed: int) -> list[int]:
    """Rows of a class in an order that depends on seed and row alone; only galaxies that stand in a split."""
    placed = np.concatenate([rows for rows in survey.splits.values() if len(rows)] or [np.empty(0, np.int64)])
    rows = placed[survey.labels[placed] == label]
    order = np.argsort(hash64(seed, _PURPOSE, rows), kind="stable")
    chosen: list[int] = rows[order][:number].tolist()
    return chosen


def _read(survey: Survey, rows: Sequence[int]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Row -> H x W x 3 pixels, reading whole slabs."""
    from tqdm import tqdm

    wanted, length = set(rows), survey.slab_length
    with tqdm(total=len(rows), desc=f"read {survey.name}", unit="galaxy", disable=None) as bar:
        for slab in sorted({row // length for row in rows}):
            start, stop = slab * length, min((slab + 1) * length, len(survey.labels))
            for row, galaxy in enumerate(survey.read(start, stop), start=start):
                if row in wanted:
                    image = galaxy.image
                    yield row, decode_picture(image.data, galaxy.id) if isinstance(image, EncodedImage) else image
                    bar.update()


def _statistics(images: Sequence[NDArray[np.uint8]]) -> dict[str, Any]:
    histogram = np.zeros((3, 256))
    for image in images:
        histogram += [np.bincount(image[..., channel].ravel(), minlength=256) for channel in range(3)]
    shares = histogram / histogram.sum(axis=1, keepdims=True)
    values = np.arange(256) / 255.0
    mean = shares @ values
    std = np.sqrt(shares @ values**2 - mean**2)
    return {
        "galaxies": len(images),
        "mean": mean.round(4).tolist(),
        "std": std.round(4).tolist(),
        "black": round(float(shares[:, 0].mean()), 4),
        "saturated": round(float(shares[:, 255].mean()), 4),
    }


def _write_pictures(
    exploration: Exploration, sample: Sequence[Sequence[NDArray[np.uint8]]], per_class: int, folder: Path
) -> None:
    title = f"{exploration.dataset} ({exploration.variant}), N = {sum(map(sum, exploration.counts.values())):,}"
    images = {name: pictures[:per_class] for name, pictures in zip(exploration.class_names, sample, strict=True) if pictures}
    write_gallery(folder / GALLERY, images, title, max_bytes=GALLERY_BYTES)
    save_figure(_draw_counts(exploration, title), folder / "counts")


def _draw_counts(exploration: Exploration, title: str) -> Any:
    from matplotlib.figure import Figure

    names = [readable(name) for name in exploration.class_names]
    figure = Figure(figsize=(5.0, 0.2 * len(names) + 1.0), layout="constrained")
    axes = figure.subplots()
    left = np.zeros(len(names))
    for (split, counts), colour in zip(exploration.counts.items(), (BLUE, ORANGE, GREEN), strict=False):
        axes.barh(names, counts, left=left, label=split, color=colour)
        left += counts
    axes.invert_yaxis()
    axes.set(xlabel="galaxies", title=title)
    axes.legend(frameon=False)
    return figure
