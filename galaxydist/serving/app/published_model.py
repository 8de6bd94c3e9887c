"""Format of a published folder: its files, and ``config.json`` as the app reads it.

``config.json`` has three parts. The keys at its top are timm's (``architecture``, ``num_classes``, ``pretrained_cfg``, ...), only
for timm's architectures; ``galaxydist`` is what ``load_predictor`` needs; ``app`` is what this module reads, and what a program
without galaxydist needs to prepare a picture and to name a class.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

CONFIG, CARD, RESULTS = "config.json", "README.md", "results.json"
WEIGHTS, ONNX, PROGRAM = "model.safetensors", "model.onnx", "model.pt2"
# Folder in a run that holds its publication for the app.
PUBLISHED = "published"
# Entry of the ONNX file's metadata: height and width in pixels that a saliency map covers, which is more than the image if a ViT
# pads that to whole patches.
SALIENCY_SIZE = "saliency_size"
# Training galaxies: embeddings, labels and ids; thumbnails and examples only where the licence allows it.
REFERENCE, THUMBNAILS, EXAMPLES = "reference.npz", "thumbnails", "examples"
# Version of ``config.json``.
FORMAT = 1


class PublishedFolderError(ValueError):
    """Error of a folder that is not a published model, is damaged, or was written by a later version."""


@dataclass(frozen=True)
class PictureForm:
    """The preparation of a picture for the network.

    A picture is cut to its central square and resampled to ``stored_size`` pixels (Lanczos), unless it has this size already.
    Then it is made smaller by ``factor`` (the mean of blocks), its centre is cut out (``crop``), resampled to ``image_size``
    pixels (bilinear, antialiased) and normalised: (value / 255 - mean) / std.

    Args:
        image_size: T, side of the network's input in pixels.
        stored_size: side of the training images in pixels.
        factor: 1, 2, 4 or 8, by which stored images are made smaller when they are decoded.
        crop: central fraction of the width that is kept.
        mean, std: of the channels R G B, full scale 1.
        source_sides: smallest and largest shorter side of the pictures that the training images were resampled from, in pixels;
            None: not resampled.
        pixel_scale: smallest, median and largest pixel scale of the training galaxies before resampling, in arcsec/pixel; None:
            unknown.
    """

    image_size: int
    stored_size: int
    factor: int
    crop: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    source_sides: tuple[int, int] | None = None
    pixel_scale: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class AppConfig:
    """The part ``app`` of ``config.json``.

    Args:
        title: name of the model for people.
        classes: names by label, as people read them.
        form: preparation of a picture.
        temperature: by which logits are divided before the softmax; None: not calibrated.
        tta: ``none``, or ``d4`` if the probabilities are the mean over the eight flips and quarter turns.
        saliency: name of the method of the ONNX file's output ``saliency``; None if it has none.
        dataset: name of the training data.
        licence: of the training data; None if unknown.
        citation: of the training data; None if unknown.
        is_non_commercial: the data, or the weights that the training started from, are for non-commercial use only.
        layer: layer of the Legacy Surveys' viewer that the training images were cut from, such as ``ls-dr9``; None: unknown, or
            another survey.
    """

    title: str
    classes: tuple[str, ...]
    form: PictureForm
    temperature: float | None = None
    tta: str = "none"
    saliency: str | None = None
    dataset: str = ""
    licence: str | None = None
    citation: str | None = None
    is_non_commercial: bool = False
    layer: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """Return the config of plain values.

        Raises:
            TypeError, KeyError, AttributeError: values are missing or unknown.
        """
        values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
        form: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in plain["form"].items()}
        return cls(**{**values, "form": PictureForm(**form)})


@dataclass(frozen=True)
class Share:
    """A share of test galaxies, with its 95 % interval; None where that was not computed."""

    value: float
    interval: tuple[float, float] | None

    @classmethod
    def of(cls, value: float, interval: Sequence[float] | None) -> Self:
        """Return the share of plain values.

        Raises:
            TypeError, ValueError: they are no numbers.
        """
        return cls(float(value), None if interval is None else (float(interval[0]), float(interval[1])))


@dataclass(frozen=True)
class Measured:
    """Results of a model on its test galaxies.

    Args:
        count: number of the galaxies.
        accuracy: share of them whose class it found.
        called: by label, the number of galaxies that it called so.
        precision: by label, the share of these that are of the class; None if there are none.
    """

    count: int
    accuracy: Share
    called: tuple[int, ...]
    precision: tuple[Share | None, ...]


def read_measured(folder: Path, num_classes: int) -> Measured | None:
    """Read what ``results.json`` says about the test galaxies; None if it says nothing, or has other classes."""
    try:
        test = json.loads((folder / RESULTS).read_text(encoding="utf-8"))["test"]
        intervals, per_class = test.get("intervals") or {}, test["per_class"]
        between = (per_class.get("intervals") or {}).get("precision") or [None] * num_classes
        precision = tuple(
            None if value is None else Share.of(value, interval)
            for value, interval in zip(per_class["precision"], between, strict=True)
        )
        accuracy, called = Share.of(test["accuracy"], intervals.get("accuracy")), tuple(map(int, per_class["predicted"]))
        found = Measured(int(test["count"]), accuracy, called, precision)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None
    return found if len(called) == len(precision) == num_classes else None


def read_config(folder: Path) -> AppConfig:
    """Read the part ``app`` of a published folder's ``config.json``.

    Raises:
        PublishedFolderError: there is none, it is damaged, a later version wrote it, or the folder has links to files elsewhere.
    """
    path = folder / CONFIG
    check_links(folder)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PublishedFolderError(f"{folder} is not a published model: {path.name} cannot be read ({error})") from error
    ours = content.get("galaxydist") if isinstance(content, dict) else None
    if not isinstance(ours, dict) or "app" not in content:
        raise PublishedFolderError(f"{path} was not written by `galaxydist publish`")
    if ours.get("format") != FORMAT:
        raise PublishedFolderError(
            f"{path} has format {ours.get('format')}, and galaxydist here reads {FORMAT}: install the version that wrote it "
            f"({ours.get('version')}), or publish the run again"
        )
    try:
        return AppConfig.from_dict(content["app"])
    except (TypeError, KeyError, AttributeError) as error:
        raise PublishedFolderError(f"{path} is damaged: {error!r}") from error


def check_links(folder: Path) -> None:
    """Refuse a folder with links to files outside of it: a page or a Space would show them to everybody.

    Files of a snapshot in the Hub's cache are links to the cache's own files, which are allowed.

    Raises:
        PublishedFolderError: there is such a link.
    """
    real = folder.resolve()
    cache = real.parent.parent / "blobs" if real.parent.name == "snapshots" else None
    for path in folder.rglob("*"):
        target = path.resolve()
        if not target.is_relative_to(real) and target.parent != cache:
            raise PublishedFolderError(
                f"{path} is a link to {target}, outside of the folder: put a copy of the file in its place"
            )


def read_about(folder: Path) -> str:
    """Return the text about a model in Markdown: its card without the header and the section on use; '' if there is no card.

    The card is written by ``galaxydist publish``; its publisher may have changed it since.
    """
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
    if text.startswith("---\n"):
        text = text.partition("\n---\n")[2]
    return re.sub(r"^## How to use\n.*?(?=^## |\Z)", "", text, flags=re.MULTILINE | re.DOTALL).strip()
