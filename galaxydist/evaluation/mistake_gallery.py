"""The gallery of an evaluation's mistakes and uncertain galaxies: a page, two sheets, and what they show as JSON."""

import base64
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from galaxydist import __version__
from galaxydist.atomic_files import read_json, replace_bytes, write_json
from galaxydist.errors import UserError
from galaxydist.evaluation.mistakes import Pick, Picks
from galaxydist.evaluation.predictions import PREDICTIONS, read_predictions
from galaxydist.evaluation.results_files import stem_of
from galaxydist.evaluation.text_table import readable, title_of
from galaxydist.pages.contact_sheet import SheetCell, SheetRow, compose_sheet, write_sheet
from galaxydist.pages.html import picture_uri, render

FORMAT_VERSION = 1
# Kept of each picture; the page's are so wide, or less, so that all together they take no more than so many bytes.
THUMBNAIL = 192
_WIDTHS, _PAGE_BYTES = (THUMBNAIL, 144, 112, 88, 64), 5_000_000
_SHEET_CELL, _SHEET_BYTES = 96, 600_000
# Of the files' names, after the evaluation's.
_GALLERY = "-gallery"
KINDS = {
    "mistakes": (
        "Most confident mistakes",
        "Galaxies of each class that are taken for another, the largest predicted probability first.",
    ),
    "uncertain": (
        "Least certain galaxies",
        "Galaxies of each class whose predicted probabilities have the largest entropy, whether the largest of them is right "
        "or wrong; the least certain first.",
    ),
}


@dataclass(frozen=True, slots=True)
class Seen:
    """A chosen galaxy as it is shown.

    Args:
        picture: H x W x 3 uint8, as it is stored.
        overlay: the same with the map of saliency.
        peak: of the map, see ``models.saliency.Saliency``.
    """

    picture: NDArray[np.uint8]
    overlay: NDArray[np.uint8]
    peak: float

    @classmethod
    def small(cls, picture: NDArray[np.uint8], overlay: NDArray[np.uint8], peak: float) -> "Seen":
        """No wider than ``THUMBNAIL``."""
        return cls(_small(picture), _small(overlay), peak)


@dataclass(frozen=True, slots=True)
class Gallery:
    """What is shown.

    Args:
        picks: what was chosen.
        seen: by sample number, all of it.
        context: of the predictions.
        class_names: by label.
        method: of the saliency.
        command: that makes this, for the page.
    """

    picks: Picks
    seen: Mapping[int, Seen]
    context: Mapping[str, Any]
    class_names: Sequence[str]
    method: str
    command: str

    @property
    def title(self) -> str:
        return title_of({**self.context, "count": sum(self.picks.num_galaxies)})

    def chosen(self, kind: str) -> tuple[tuple[Pick, ...], ...]:
        """By true class; ``kind`` is one of ``KINDS``."""
        return self.picks.confident if kind == "mistakes" else self.picks.uncertain

    def name(self, label: int) -> str:
        return readable(self.class_names[label])


def write_mistake_gallery(evaluation_dir: Path, gallery: Gallery, page: Path | None = None) -> Path:
    """Write ``<stem>-gallery.html``, ``<stem>-gallery-mistakes.jpg``, ``<stem>-gallery-uncertain.jpg`` and, last,
    ``<stem>-gallery.json``.

    Args:
        evaluation_dir: where the predictions lie; it exists.
        gallery: what is shown.
        page: another place for the page; its folder is made.

    Returns:
        The page.

    Raises:
        UserError: the disk is full.
    """
    context, stem = gallery.context, _stem(gallery.context["split"], gallery.context.get("tta", "none"))
    (evaluation_dir / f"{stem}.json").unlink(missing_ok=True)  # it says that the sheets are its own
    for kind in KINDS:
        compose = functools.partial(compose_sheet, list(_rows(kind, gallery)), f"{KINDS[kind][0]}: {gallery.title}")
        write_sheet(evaluation_dir / f"{stem}-{kind}.jpg", compose, cell=_SHEET_CELL, max_bytes=_SHEET_BYTES)
    page = page or evaluation_dir / f"{stem}.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    replace_bytes(page, _render(gallery).encode())
    content = {
        "format": FORMAT_VERSION,
        "galaxydist": __version__,
        **context,
        "classes": list(gallery.class_names),
        "saliency": gallery.method,
        "num_undefined": gallery.picks.num_undefined,
    }
    for kind in KINDS:
        chosen = [[asdict(pick) for pick in of_class] for of_class in gallery.chosen(kind)]
        content[kind] = {"caption": _caption(kind, gallery), "chosen": chosen}
    write_json(evaluation_dir / f"{stem}.json", content)
    return page


def gallery_sections(predictions: Path) -> list[tuple[str, str, str]]:
    """The sheets of a gallery that was written, for another page.

    Args:
        predictions: the file that it was made from, beside which it lies.

    Returns:
        (title, data URI of a JPEG, caption) of each sheet; none where there is no gallery of the predictions that lie there.
    """
    stem = f"{predictions.name.removesuffix(PREDICTIONS)}{_GALLERY}"
    try:
        content = read_json(predictions.with_name(f"{stem}.json"))
        context = read_predictions(predictions).info.context
        if content["format"] != FORMAT_VERSION or any(content.get(name) != value for name, value in context.items()):
            return []
        return [
            (KINDS[kind][0], _data_uri(predictions.with_name(f"{stem}-{kind}.jpg")), content[kind]["caption"]) for kind in KINDS
        ]
    except (OSError, UserError, KeyError, TypeError, AttributeError):
        return []


def describe(pick: Pick, class_names: Sequence[str]) -> str:
    """A galaxy in one line: id, true class, predicted class, probability."""
    true, predicted = readable(class_names[pick.label]), readable(class_names[pick.predicted])
    return f"{pick.id}: true {true}, predicted {predicted} ({_percent(pick.probability)})"


def _stem(split: str, tta: str) -> str:
    return f"{stem_of(split, tta)}{_GALLERY}"


def _rows(kind: str, gallery: Gallery) -> Iterator[SheetRow]:
    for label, of_class in enumerate(gallery.chosen(kind)):
        cells = []
        for pick in of_class:
            said = f"{'predicted' if pick.is_mistake else 'right:'} {gallery.name(pick.predicted)}"
            entropy = f", entropy {pick.entropy:.2f}" if kind == "uncertain" else ""
            seen = gallery.seen[pick.sample]
            cells.append(SheetCell(seen.picture, seen.overlay, (pick.id, said, _percent(pick.probability) + entropy)))
        yield SheetRow(gallery.name(label), _note(kind, label, gallery), cells)


def _note(kind: str, label: int, gallery: Gallery) -> str:
    count, wrong = gallery.picks.num_galaxies[label], gallery.picks.num_mistakes[label]
    shown = len(gallery.chosen(kind)[label])
    if not count:
        return "no galaxies"
    if kind == "mistakes":
        return f"{shown} of {wrong:,} mistakes among {count:,} galaxies" if wrong else f"no mistake among {count:,} galaxies"
    return f"{shown} of {count:,} galaxies"


def _section(kind: str, gallery: Gallery) -> dict[str, Any]:
    classes = [
        {
            "name": gallery.name(label),
            "note": _note(kind, label, gallery),
            "galaxies": [
                {
                    "pick": pick,
                    "text": describe(pick, gallery.class_names),
                    "predicted": gallery.name(pick.predicted),
                    "percent": _percent(pick.probability),
                    "label_percent": _percent(pick.label_probability),
                    "peak": _peak(gallery.seen[pick.sample].peak, gallery.method),
                }
                for pick in of_class
            ],
        }
        for label, of_class in enumerate(gallery.chosen(kind))
    ]
    return {"kind": kind, "title": KINDS[kind][0], "caption": _caption(kind, gallery), "classes": classes}


def _render(gallery: Gallery) -> str:
    picks, context = gallery.picks, gallery.context
    return render(
        "mistakes.html",
        {
            "title": gallery.title,
            "sections": [_section(kind, gallery) for kind in KINDS],
            "uris": _uris(gallery.seen),
            "picks": picks,
            "context": context,
            "method": gallery.method,
            "tta": context.get("tta", "none"),
            "total": sum(picks.num_galaxies),
            "mistakes": sum(picks.num_mistakes),
            "provenance": {"version": __version__, "command": gallery.command},
        },
    )


def _uris(seen: Mapping[int, Seen]) -> dict[int, tuple[str, str]]:
    """Both pictures of each galaxy, by sample number, as large as the limit allows; a galaxy may stand in both choices."""
    uris: dict[int, tuple[str, str]] = {}
    for width in _WIDTHS:
        uris = {
            sample: (picture_uri(found.picture, width=width), picture_uri(found.overlay, width=width))
            for sample, found in seen.items()
        }
        if 2 * sum(len(one) + len(other) for one, other in uris.values()) <= _PAGE_BYTES:
            break
    return uris


def _caption(kind: str, gallery: Gallery) -> str:
    num_undefined, method = gallery.picks.num_undefined, gallery.method
    left_out = f" {num_undefined:,} galaxies without finite probabilities are left out." if num_undefined else ""
    what = "evidence for the predicted class" if method == "Grad-CAM" else "the same for every class"
    return (
        f"{KINDS[kind][1]} Each as it is stored and, beside it, with the {method} of the model over it ({what}; violet little, "
        f"yellow most); below: id, predicted class, its probability.{left_out}"
    )


def _peak(peak: float, method: str) -> str:
    return f"{method}: zero everywhere" if peak == 0 else f"{method} peak {peak:.1f} × mean"


def _percent(probability: float) -> str:
    share = 100 * probability
    return f"{share:.0f} %" if share < 99.5 else ("> 99.9 %" if share > 99.9 else f"{share:.1f} %")


def _small(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if picture.shape[1] <= THUMBNAIL:
        return picture
    return np.asarray(Image.fromarray(picture).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS))


def _data_uri(path: Path) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(path.read_bytes()).decode()
