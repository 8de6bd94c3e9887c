"""Predictions for images in memory or in files: ``load_predictor(RUN)(images)``."""

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from galaxydist.cpus import available_cores, bounded_map
from galaxydist.devices import own_device
from galaxydist.errors import UserError
from galaxydist.evaluation.predictions import softmax
from galaxydist.loading.device_prefetch import HostCopy
from galaxydist.prediction.image_form import ImageForm
from galaxydist.prediction.published_folder import open_model
from galaxydist.prediction.trained_model import ModelChoice, TrainedModel, resolved_precision
from galaxydist.surveys.image_arrays import PixelScaling, to_eight_bits
from galaxydist.surveys.image_files import decode_opened, read_image

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]
# Prefix of the columns of probabilities.
PROBABILITY = "p_"


@dataclass(frozen=True)
class Predictions:
    """Predictions of B images.

    Args:
        logits: B x K float32, as the model gave them.
        class_names: by label.
        temperature: by which the logits are divided; None: not calibrated.
    """

    logits: NDArray[np.float32]
    class_names: tuple[str, ...]
    temperature: float | None

    def __len__(self) -> int:
        return len(self.logits)

    @property
    def probabilities(self) -> NDArray[np.float32]:
        """B x K float32 calibrated probabilities."""
        return probabilities_of(self.logits, self.temperature)

    @property
    def labels(self) -> NDArray[np.int64]:
        """B numbers of the most probable classes."""
        return np.asarray(self.logits.argmax(axis=1), np.int64)

    @property
    def predicted(self) -> list[str]:
        """B names of the most probable classes."""
        return [self.class_names[label] for label in self.labels.tolist()]

    @property
    def confidence(self) -> NDArray[np.float32]:
        """B probabilities of the most probable classes."""
        return np.asarray(self.probabilities.max(axis=1, initial=0.0), np.float32)

    def to_table(self, *, logits: bool = False, top: int = 0) -> "pa.Table":
        """Return a row per image: ``predicted``, ``confidence``, and ``p_CLASS`` for each class.

        Args:
            logits: also ``logit_CLASS`` for each class.
            top: also ``top_1``, ``p_top_1``, ... ``top_N``, ``p_top_N``: the N most probable classes.
        """
        import pyarrow as pa

        probabilities_BK = self.probabilities
        columns: dict[str, Any] = {"predicted": pa.array(self.predicted, pa.string()), "confidence": self.confidence}
        order_BK = np.argsort(-self.logits, axis=1, kind="stable")[:, : min(top, len(self.class_names))]
        for place in range(order_BK.shape[1]):
            labels = order_BK[:, place]
            columns[f"top_{place + 1}"] = pa.array([self.class_names[label] for label in labels.tolist()], pa.string())
            columns[f"p_top_{place + 1}"] = probabilities_BK[np.arange(len(labels)), labels]
        columns |= {f"{PROBABILITY}{name}": probabilities_BK[:, label] for label, name in enumerate(self.class_names)}
        if logits:
            columns |= {f"logit_{name}": self.logits[:, label] for label, name in enumerate(self.class_names)}
        return pa.table({name: pa.array(column) for name, column in columns.items()})


def probabilities_of(logits_BK: NDArray[np.float32], temperature: float | None) -> NDArray[np.float32]:
    """Return softmax(logits / temperature), computed in float64 and rounded to float32."""
    return softmax(logits_BK.astype(np.float64) / (temperature or 1.0)).astype(np.float32)


class Predictor:
    """Labels images with a trained model, which stays on its device; made by :func:`load_predictor`.

    Args:
        trained: the model.
        device: device of the model, a CPU or a GPU of CUDA.
    """

    def __init__(self, trained: TrainedModel, device: torch.device) -> None:
        self.trained, self.device = trained, device
        self._batch_size = trained.recipe.eval.batch_size
        self._threads = available_cores()
        precision = resolved_precision(trained.recipe, device)
        self._forward = trained.forward_on(device, precision, threads=self._threads)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names by label."""
        return self.trained.class_names

    def __call__(
        self,
        images: Any,
        *,
        scale: tuple[float, float] | PixelScaling | None = None,
        pxscale: Any = None,
        resize: bool = False,
        rescale: bool = False,
    ) -> Predictions:
        """Return the predictions of one image or of several.

        Args:
            images: uint8 pixels of shape H x W x 3 or B x H x W x 3 (RGB, as numpy array or torch tensor; a tensor also 3 x H x W
                or B x 3 x H x W), a PIL image, the path of an image file, or a sequence of these.
            scale: ``(low, high)``, for pixels of other types: the values that become black and white (linear, clipped).
            pxscale: pixel scale in arcsec/pixel, one for all images or one for each; None: unknown, not compared.
            resize: accept images of any size and scale: the central square is resampled to the stored size.
            rescale: cut and resample images to the pixel scale of the training images; needs ``pxscale``.

        Raises:
            UserError: an image of another size or pixel scale than the training images, without ``resize`` or ``rescale``; an
                image that cannot be read; pixels of another type without ``scale``.
        """
        form = ImageForm.of(self.trained.stored, self.trained.recipe.data, resize=resize, rescale=rescale)
        scaling = scale if scale is None or isinstance(scale, PixelScaling) else _scaling(scale)
        items = _items(images)
        scales = _pixel_scales(pxscale, len(items))

        def prepare(number: int) -> Pixels:
            item = items[number]
            name = str(item) if isinstance(item, str | Path) else f"image {number}"
            return form.prepare(_pixels(item, name, scaling), name, scales[number])

        logits = [np.empty((0, len(self.class_names)), np.float32)]
        with ThreadPoolExecutor(self._threads, thread_name_prefix="galaxydist-decode") as pool:
            tasks = ((number,) for number in range(len(items)))
            prepared = bounded_map(pool, prepare, tasks, self._batch_size + self._threads)
            begun: deque[HostCopy] = deque()
            while batch := [*islice(prepared, self._batch_size)]:
                begun.append(self._begin_batch(np.stack(batch)))
                if len(begun) > 1:
                    logits.append(begun.popleft().wait().numpy())
            logits += [copied.wait().numpy() for copied in begun]
        return Predictions(np.concatenate(logits), self.class_names, self.trained.temperature)

    @torch.inference_mode()
    def _begin_batch(self, images_BHWC: Pixels) -> HostCopy:
        """Begin the forward pass of prepared images; their logits B x K are read when the next batch has begun."""
        images = torch.from_numpy(images_BHWC)
        if self.device.type == "cuda":  # a copy from other memory would make the host wait
            images = images.pin_memory()
        return HostCopy(self._forward(images.to(self.device, non_blocking=True)).float())


def _find_device(device: str | torch.device | None, environ: Mapping[str, str]) -> torch.device:
    if device is None:
        return own_device(environ)
    try:
        found = torch.device(device)
        if found.type not in ("cpu", "cuda"):
            raise UserError(f"device {device!r} is not supported: galaxydist computes on cpu or cuda")
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
    return found


def _scaling(scale: Any) -> PixelScaling:
    try:
        low, high = map(float, scale)
    except (TypeError, ValueError):
        raise UserError(f"scale={scale!r} is not two numbers: the pixel values that become black and white") from None
    return PixelScaling(low, high)


def _pixel_scales(pxscale: Any, count: int) -> list[float]:
    """Return the pixel scale of each image; nan: unknown."""
    try:
        found = np.broadcast_to(np.asarray(np.nan if pxscale is None else pxscale, np.float64), count)
    except (TypeError, ValueError):
        raise UserError(f"pxscale={pxscale!r} is not a number in arcsec/pixel, or one for each of the {count} images") from None
    return [float(scale) for scale in found]


def _items(images: Any) -> Any:
    """Return a sequence of single images: arrays H x W x 3, PIL images or paths."""
    if isinstance(images, str | Path | Image.Image):
        return [images]
    if isinstance(images, torch.Tensor):
        images = _channels_last(images.detach().cpu())
        images = (images.float() if images.dtype == torch.bfloat16 else images).numpy()  # numpy has no bfloat16
    if isinstance(images, np.ndarray):
        if images.ndim not in (3, 4) or images.shape[-1] != 3:
            raise UserError(f"images of shape {images.shape} are not H x W x 3 or B x H x W x 3 (RGB)")
        return images if images.ndim == 4 else images[None]
    if isinstance(images, Sequence):
        return [item for image in images for item in _single(image)]
    raise UserError(f"{type(images).__name__} is not an image: give arrays, tensors, PIL images, paths, or a list of these")


def _single(image: Any) -> Any:
    items = _items(image)
    if len(items) != 1 or isinstance(image, list | tuple):
        raise UserError("an item of a list of images has to be a single image: H x W x 3 pixels, a PIL image or a path")
    return items


def _channels_last(images: torch.Tensor) -> torch.Tensor:
    """Return a tensor as B x H x W x 3, also from B x 3 x H x W; without B likewise."""
    if images.ndim not in (3, 4):
        return images
    is_first, is_last = images.shape[-3] == 3, images.shape[-1] == 3
    if is_first and is_last:
        shape = tuple(images.shape)
        raise UserError(f"a tensor of shape {shape} may be B x 3 x H x W or B x H x W x 3; give a numpy array, H x W x 3")
    return images.movedim(-3, -1) if is_first else images


def _pixels(item: Any, name: str, scaling: PixelScaling | None) -> Any:
    """Return H x W x 3 uint8 pixels, or the bytes of a JPEG or PNG file."""
    if isinstance(item, str | Path):
        return read_image(Path(item))
    if isinstance(item, Image.Image):
        return decode_opened(ImageOps.exif_transpose(item), name)
    return to_eight_bits(np.asarray(item), scaling, name)


def load_predictor(
    run: str | Path,
    environ: Mapping[str, str],
    *,
    device: str | torch.device | None = None,
    choice: ModelChoice | None = None,
) -> Predictor:
    """Open the model of a run folder or of a published folder; its notes are logged as warnings.

    Args:
        run: the folder.
        environ: the process's environment.
        device: device of the model; None: the GPU of this process's local rank under a launcher, else the first GPU, or the CPU.
        choice: checkpoint and test-time augmentation; None: the recipe's.

    Raises:
        UserError: there is no run or no checkpoint, a published file is damaged, or the device cannot be used.
    """
    trained = open_model(Path(run), environ, choice)
    for note in trained.notes:
        logger.warning("%s", note)
    return Predictor(trained, _find_device(device, environ))
