"""A published model that answers: pictures in, class probabilities, their agreement over eight views, and a saliency map out.

A picture is prepared as the training prepares its images (``PictureForm``), with numpy and Pillow alone. onnxruntime then sees
its eight flips and quarter turns, since the sky has no up and down.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .onnx_runtime import import_onnxruntime
from .pictures import Picture, Pixels, decode_smaller
from .published_model import CONFIG, ONNX, SALIENCY_SIZE, AppConfig, PictureForm, PublishedFolderError, read_config

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

VIEWS = 8
# Pictures whose views are computed at once: more take more memory and are no faster.
PICTURES_AT_ONCE = 2
# Name of the one method of saliency whose maps show shares, whose least is shown as 0; others show evidence, where 0 is none.
ROLLOUT = "attention rollout"


@dataclass(frozen=True)
class Answer:
    """A model's answer about one picture.

    Args:
        probabilities: K float32, calibrated if the model is.
        label: number of the most probable class.
        class_name: its name.
        confidence: its probability.
        views: 8 x K float32, the probabilities of each flip and quarter turn alone; the first is the picture as it is.
        embedding: D float32, the pooled features before the head.
        seen: T x T x 3 uint8, the part of the picture that the network sees, before the normalisation.
        saliency: H x W float32 of the picture, 0 to 1: the parts that spoke for the class (Grad-CAM: 0 is no evidence) or were
            most attended (rollout); 0 outside of what the network sees. None: not asked for, or the model has no such method.
        notes: sentences about the picture and its preparation.
    """

    probabilities: Floats
    label: int
    class_name: str
    confidence: float
    views: Floats
    embedding: Floats
    seen: Pixels
    saliency: Floats | None = None
    notes: tuple[str, ...] = ()

    @property
    def agreement(self) -> int:
        """Number of the eight views that give the same class."""
        return int((self.views.argmax(axis=1) == self.label).sum())

    @property
    def spread(self) -> float:
        """Largest minus smallest probability of the class over the eight views."""
        found = self.views[:, self.label]
        return float(found.max() - found.min())


class ServedModel:
    """A published model, opened; several threads may ask it at once. Made by :meth:`open`.

    Args:
        folder: the published folder.
        config: of the app.
        session: onnxruntime's session.
    """

    def __init__(self, folder: Path, config: AppConfig, session: Any) -> None:
        self.folder, self.config, self._session = folder, config, session
        size = config.form.image_size
        covered = json.loads(session.get_modelmeta().custom_metadata_map.get(SALIENCY_SIZE) or f"[{size}, {size}]")
        self._covered = int(covered[0]), int(covered[1])

    @classmethod
    def open(cls, folder: Path, threads: int | None = None) -> Self:
        """Open a published folder.

        Args:
            folder: written by ``galaxydist publish``.
            threads: cores for the network; None: all that this process may use.

        Raises:
            PublishedFolderError: it is no published model, has no ONNX file, or a file is damaged.
        """
        onnxruntime = import_onnxruntime()

        config = read_config(folder)
        path = folder / ONNX
        if not path.is_file():
            raise PublishedFolderError(f"{folder} has no {ONNX}, which the app runs: publish the run again, without --no-onnx")
        _check_hash(folder, path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or _available_cores()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Threads that wait for work sleep: another user's picture, or another program, needs the cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors have no common base
            raise PublishedFolderError(f"{path} cannot be opened by onnxruntime: {str(error).splitlines()[0]}") from error
        _check_session(path, config, session)
        return cls(folder, config, session)

    def predict(self, pictures: Sequence[Picture | Pixels], *, saliency: bool = True) -> list[Answer]:
        """Return the answers for pictures of any size.

        Args:
            pictures: from ``read_picture``, or H x W x 3 uint8 pixels in R G B.
            saliency: compute the saliency maps.
        """
        asked = [picture if isinstance(picture, Picture) else Picture("the picture", picture) for picture in pictures]
        answers: list[Answer] = []
        for first in range(0, len(asked), PICTURES_AT_ONCE):
            answers += self._answer(asked[first : first + PICTURES_AT_ONCE], saliency=saliency)
        return answers

    def _answer(self, pictures: Sequence[Picture], *, saliency: bool) -> list[Answer]:
        onnxruntime = import_onnxruntime()

        form = self.config.form
        seen = [prepare(picture, form) for picture in pictures]
        images = np.concatenate([views_of(normalise(pixels, form)) for pixels in seen])
        shows = saliency and self.config.saliency is not None
        run_options = onnxruntime.RunOptions()
        run_options.log_severity_level = 3
        names = ["logits", "embedding", *(["saliency"] if shows else [])]
        logits, embedding, *maps = self._session.run(names, {"images": images}, run_options)
        answers = []
        for number, picture in enumerate(pictures):
            mine = slice(number * VIEWS, (number + 1) * VIEWS)
            raw = maps[0][mine][0] if shows else None
            features = np.asarray(embedding[mine][0], np.float32)
            answers.append(self._one((picture, seen[number]), logits[mine], features, raw))
        return answers

    def _one(self, prepared: tuple[Picture, Pixels], logits_VK: Floats, embedding: Floats, raw_Mhw: Floats | None) -> Answer:
        config, (picture, seen) = self.config, prepared
        temperature = config.temperature or 1.0
        doubles_VK = np.asarray(logits_VK, np.float64)
        # As in an evaluation: first the mean over the views, then the temperature, which was fitted to that mean.
        log_VK = _log_softmax(doubles_VK) if config.tta == "d4" else doubles_VK[:1]
        log_K = np.asarray(np.logaddexp.reduce(log_VK, axis=0) - np.log(len(log_VK)), np.float64)
        probabilities = np.exp(_log_softmax(log_K / temperature)).astype(np.float32)
        label = int(log_K.argmax())
        shown = None
        if raw_Mhw is not None:
            raw_hw = raw_Mhw[label if len(raw_Mhw) == len(config.classes) and len(raw_Mhw) > 1 else 0]
            map_TT = scaled_map(raw_hw, config.form.image_size, self._covered, is_rollout=config.saliency == ROLLOUT)
            shown = place_map(map_TT, picture.pixels.shape[:2], config.form)
        return Answer(
            probabilities=probabilities,
            label=label,
            class_name=config.classes[label],
            confidence=float(probabilities[label]),
            views=np.exp(_log_softmax(doubles_VK / temperature)).astype(np.float32),
            embedding=embedding,
            seen=seen,
            saliency=shown,
            notes=(*picture.notes, *form_notes(picture, config.form)),
        )


def prepare(picture: Picture, form: PictureForm) -> Pixels:
    """Return a picture as the network sees it, before the normalisation: T x T x 3 uint8.

    A JPEG of the stored size is decoded smaller, as an evaluation decodes it; of other pictures the mean of blocks is taken.
    """
    size, pixels = form.stored_size, picture.pixels
    height, width = pixels.shape[:2]
    if form.factor > 1 and picture.jpeg is not None and height == width == size:
        pixels = decode_smaller(picture.jpeg, size // form.factor)
    else:
        if not height == width == size:
            side = min(height, width)
            top, left = (height - side) // 2, (width - side) // 2
            square = Image.fromarray(pixels[top : top + side, left : left + side])
            pixels = np.asarray(square.resize((size, size), Image.Resampling.LANCZOS))
        pixels = _block_mean(pixels, form.factor)
    kept, margin = _crop(form)
    pixels = pixels[margin : margin + kept, margin : margin + kept]
    return pixels if kept == form.image_size else resize_antialiased(pixels, form.image_size)


def resize_antialiased(pixels: Pixels, size: int) -> Pixels:
    """Resample square H x H x 3 pixels to ``size`` x ``size``, bilinear with antialiasing, to the very levels that torch gives.

    torch, like Pillow, weighs with a triangle that is two output pixels wide (two input pixels, if the image becomes larger) and
    rounds after the rows and after the columns; its weights are integers of 16 bits.
    """
    width = len(pixels)
    scale = width / size
    support = max(scale, 1.0)
    centres = scale * (np.arange(size) + 0.5)
    first, last = np.floor(centres - support + 0.5).clip(0), np.floor(centres + support + 0.5).clip(None, width)
    places = np.arange(width)
    weights = (1 - abs(places + 0.5 - centres[:, None]) / support).clip(0)
    weights *= (places >= first[:, None]) & (places < last[:, None])
    weights /= weights.sum(axis=1, keepdims=True)
    bits = next(bits for bits in range(21, -1, -1) if int(0.5 + weights.max() * 2**bits) < 2**15)
    whole = np.floor(weights * 2**bits + 0.5)
    across = _shifted(np.einsum("oi,hic->hoc", whole, pixels, optimize=True), bits)
    return _shifted(np.einsum("oi,iwc->owc", whole, across, optimize=True), bits).astype(np.uint8)


def _shifted(sums: Doubles, bits: int) -> Doubles:
    return np.asarray(np.floor((sums + 2 ** (bits - 1)) / 2**bits).clip(0, 255))


def normalise(pixels: Pixels, form: PictureForm) -> Floats:
    """Return T x T x 3 uint8 pixels as the network's input, 3 x T x T float32."""
    std = np.maximum(np.asarray(form.std, np.float64), 1e-3)
    gain, shift = (1 / (255 * std)).astype(np.float32), (-np.asarray(form.mean) / std).astype(np.float32)
    return np.ascontiguousarray((pixels.astype(np.float32) * gain + shift).transpose(2, 0, 1))


def views_of(image_CHW: Floats) -> Floats:
    """Return the eight flips and quarter turns of a square image, 8 x 3 x T x T, itself first."""
    turned = [np.rot90(image_CHW, number % 4, (1, 2)) for number in range(VIEWS)]
    return np.stack([image if number < 4 else image[:, :, ::-1] for number, image in enumerate(turned)])


def scaled_map(raw_hw: Floats, size: int, covered: tuple[int, int], *, is_rollout: bool) -> Floats:
    """Return an unscaled saliency map at the network's size, size x size, from 0 to 1.

    Grad-CAM: the largest value is 1 and 0 is no evidence. Rollout: from the least to the most attended pixel. A flat map is 0.

    Args:
        raw_hw: of the ONNX file.
        size: side of the network's input in pixels.
        covered: height and width that the map covers: the image, or more than it to the right and at the bottom.
        is_rollout: it shows shares of attention, not evidence.
    """
    rows, columns = (_interpolation(count, side)[:size] for count, side in zip(raw_hw.shape, covered, strict=True))
    map_TT = rows @ raw_hw.astype(np.float64) @ columns.T
    floor = map_TT.min() if is_rollout else 0.0
    span = map_TT.max() - floor
    scaled = (map_TT - floor) / span if span > 0 else np.zeros_like(map_TT)
    return np.asarray(scaled.clip(0, 1), np.float32)


def place_map(map_TT: Floats, shape: tuple[int, int], form: PictureForm) -> Floats:
    """Return a map of what the network sees at its place in the user's picture; 0 outside.

    Args:
        map_TT: at the network's size.
        shape: height H and width W of the picture.
        form: preparation of the picture.
    """
    kept, margin = _crop(form)
    side = min(shape)
    unit = side / (form.stored_size // form.factor)
    matrices = []
    for length in shape:
        first, region = (length - side) // 2 + margin * unit, kept * unit
        centres = np.arange(length, dtype=np.float64) + 0.5
        inside = (centres >= first) & (centres <= first + region)
        matrix = np.zeros((length, len(map_TT)), np.float32)
        matrix[inside] = _samples((centres[inside] - first) / region * len(map_TT) - 0.5, len(map_TT))
        matrices.append(matrix)
    return np.asarray(matrices[0] @ map_TT @ matrices[1].T, np.float32)


def form_notes(picture: Picture, form: PictureForm) -> tuple[str, ...]:
    """Return sentences about how a picture was brought to the size of the training images."""
    height, width = picture.pixels.shape[:2]
    side, size = min(height, width), form.stored_size
    notes = []
    if height != width:
        notes.append(f"Only its central square of {side} x {side} pixels was used.")
    low, high = form.source_sides or (size, size)
    if not low <= side <= high:
        wanted = f"{low}" if low == high else f"{low} to {high}"
        scale = "" if form.pixel_scale is None else f" of {form.pixel_scale[1]:.3g} arcsec"
        notes.append(
            f"It is {side} pixels wide and was resampled: the training pictures had {wanted} pixels{scale}, so a galaxy should "
            "fill as much of it as of theirs."
        )
    return tuple(notes)


def _crop(form: PictureForm) -> tuple[int, int]:
    """Return the width of the central crop, and that of its margin, in pixels of the decoded picture."""
    width = form.stored_size // form.factor
    kept = max(1, round(form.crop * width))
    kept += (width - kept) % 2
    return kept, (width - kept) // 2


def _block_mean(pixels: Pixels, factor: int) -> Pixels:
    if factor == 1:
        return pixels
    height, width = (side // factor for side in pixels.shape[:2])
    blocks = pixels[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
    return np.asarray((blocks.sum(axis=(1, 3), dtype=np.uint32) + factor**2 // 2) // factor**2, np.uint8)


def _interpolation(count: int, size: int) -> Doubles:
    """Return the matrix size x count of a bilinear resampling, pixel centres at 0.5, without antialiasing."""
    return _samples((np.arange(size, dtype=np.float64) + 0.5) * count / size - 0.5, count)


def _samples(places: Doubles, count: int) -> Doubles:
    """Return the weights of ``count`` pixels in linear samples at places, pixel centres at 0, 1, ...; constant at the edges."""
    places = places.clip(0, count - 1)
    left = np.minimum(places.astype(np.int64), max(count - 2, 0))
    weight = places - left
    matrix = np.zeros((len(places), count))
    matrix[np.arange(len(places)), left] = 1 - weight
    matrix[np.arange(len(places)), np.minimum(left + 1, count - 1)] += weight
    return matrix


def _log_softmax(logits: Doubles) -> Doubles:
    """Return the logarithms of the softmax over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def _available_cores() -> int:
    """Return the number of cores that this process may use; a container sees all of the machine, and may have fewer."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return min(bound, max(1, int(quota) // int(period)))
    except (OSError, ValueError, ZeroDivisionError):  # another system, or no limit ("max")
        return bound


def _check_hash(folder: Path, path: Path) -> None:
    """Compare a file with its SHA-256 in ``config.json``, if that has one."""
    stated = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["galaxydist"].get("files", {}).get(path.name)
    if stated is None:
        return
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != stated:
        raise PublishedFolderError(f"{path} is damaged: its SHA-256 is not that of {CONFIG}; copy it again, or publish again")


def _check_session(path: Path, config: AppConfig, session: Any) -> None:
    size, num_classes = config.form.image_size, len(config.classes)
    inputs = {one.name: one.shape[1:] for one in session.get_inputs()}
    outputs = {one.name: one.shape[1:] for one in session.get_outputs()}
    is_free = not any(isinstance(one.shape[0], int) for one in session.get_inputs())
    if (
        not is_free
        or inputs != {"images": [3, size, size]}
        or outputs.get("logits") != [num_classes]
        or "embedding" not in outputs
    ):
        raise PublishedFolderError(
            f"{path} does not belong to its {CONFIG}: it takes {inputs} and gives {outputs}, where any number of images of "
            f"3 x {size} x {size} and {num_classes} classes are expected. Publish the run again"
        )
    if config.saliency is not None and "saliency" not in outputs:
        raise PublishedFolderError(f"{path} has no saliency maps, which its {CONFIG} promises. Publish the run again")
