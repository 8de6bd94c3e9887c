"""Inference over a split: exact counts of every galaxy on any number of ranks, and its predictions."""

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn import functional

from galaxydist.distributed import World
from galaxydist.evaluation.counts import Counts
from galaxydist.evaluation.galaxy_table import GalaxyTable
from galaxydist.evaluation.metrics import metrics_from_counts
from galaxydist.evaluation.predictions import NAMES, PredictionsInfo, RankFile, merge_rank_files, row_dtype, write_predictions
from galaxydist.loading.augment import Augment, Normalise
from galaxydist.loading.device_prefetch import DevicePrefetcher, HostCopy
from galaxydist.loading.loader import Batch, DecodeOptions, EvalLoader, RankInfo
from galaxydist.models.build import evaluation_mode
from galaxydist.models.performance import choose_memory_format
from galaxydist.recipe.schema import Recipe
from galaxydist.shards.catalogue import number_column
from galaxydist.shards.manifest import Manifest
from galaxydist.surveys.photometry import Measurements, measure_images

if TYPE_CHECKING:
    import pyarrow as pa


# Columns of a catalogue that a file of predictions needs.
SKY = ("ra", "dec", "redshift")
CATALOGUE_COLUMNS = ("id", *SKY, "pxscale", *NAMES)
# Images wider than MEASURED_WIDTH pixels are reduced before their photometry, but not below LEAST_WIDTH: from 256 pixels this
# takes a quarter of the time, and the sizes agree to a fraction of a pixel.
MEASURED_WIDTH, LEAST_WIDTH = 128, 64
# Test-time augmentation. "d4": the eight flips and quarter turns of an image, all equally likely, since the sky has no up and
# down; each shows every pixel as it was stored.
TTA = Literal["none", "d4"]


# Images of a rank that may wait for their photometry: as many as 1,300 of Galaxy10's.
MAX_PENDING_BYTES = 256 << 20


@dataclass(frozen=True)
class _Pending:
    """A batch without its images, its logits and classes on their way to the CPU, and its measurements of ``num_bytes``."""

    batch: Batch
    copied: HostCopy
    measured: "Future[Measurements]"
    num_bytes: int


class PredictionWriter:
    """Writes one rank's predictions, and measures the images in threads while the model runs. Use as a context manager.

    The images of later batches wait for a thread: at most one batch more than there are threads, and ``MAX_PENDING_BYTES``.

    Args:
        file: the rank's file.
        image_size: width of the stored images in pixels, the unit of sizes even if images were decoded smaller.
        threads: number of measuring threads.
    """

    def __init__(self, file: RankFile, *, image_size: int, threads: int) -> None:
        self._file, self._image_size, self._max_pending = file, image_size, threads + 1
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="galaxydist-measure")
        self._pending: deque[_Pending] = deque()
        self._pending_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()

    def add(self, batch: Batch, logits_BK: Tensor, predicted_B: Tensor) -> None:
        """Add the galaxies of a batch, without its padding; the logits are read some batches later, without a wait for a GPU.

        Args:
            batch: on the CPU.
            logits_BK: on any device, any float type; stored as float32.
            predicted_B: the counted classes (rounding to float32 can make two logits equal).

        Raises:
            UserError: the disk is full.
        """
        # One copy a batch; float32 holds class numbers up to 2^24.
        copied = HostCopy(torch.cat([logits_BK.float(), predicted_B[:, None].to(logits_BK.device, torch.float32)], dim=1))
        images_BHWC = batch.images_BHWC[batch.weights_B != 0].numpy()
        measured = self._executor.submit(measure, images_BHWC, self._image_size)
        self._pending.append(_Pending(replace(batch, images_BHWC=torch.empty(0)), copied, measured, images_BHWC.nbytes))
        self._pending_bytes += images_BHWC.nbytes
        while len(self._pending) > self._max_pending or (self._pending_bytes > MAX_PENDING_BYTES and len(self._pending) > 1):
            self._write()

    def finish(self) -> None:
        """Write the pending galaxies, after which other processes may read the file.

        Raises:
            UserError: the disk is full.
        """
        while self._pending:
            self._write()
        self._file.finish()

    def _write(self) -> None:
        pending = self._pending.popleft()
        batch, measured, packed = pending.batch, pending.measured.result(), pending.copied.wait()
        self._pending_bytes -= pending.num_bytes
        columns = {
            "sample": batch.samples_B,
            "label": batch.labels_B,
            "predicted": packed[:, -1].long(),
            "logits": packed[:, :-1],
        }
        counted = {name: tensor[batch.weights_B != 0].numpy() for name, tensor in columns.items()}
        self._file.append({**counted, "size": measured.size_px, "sky_brightness": measured.sky})


def measure(images_BHWC: NDArray[np.uint8], image_size: int) -> Measurements:
    """Measure half-light radii (in pixels of the stored images), brightnesses and skies.

    Args:
        images_BHWC: uint8, square.
        image_size: width of the stored images.
    """
    num, width = images_BHWC.shape[:2]
    factor = next(factor for factor in range(-(-width // MEASURED_WIDTH), width + 1) if width % factor == 0)
    if factor > 1 and width // factor >= LEAST_WIDTH:
        blocks = images_BHWC.reshape(num, width // factor, factor, width // factor, factor, 3)
        images_BHWC = np.rint(blocks.mean(axis=(2, 4), dtype=np.float32)).astype(np.uint8)
    measured = measure_images(images_BHWC)
    scale = image_size / images_BHWC.shape[1]
    return Measurements(measured.size_px * scale, measured.brightness * scale**2, measured.sky)


def merge_predictions(
    path: Path,
    info: PredictionsInfo,
    rank_files: Sequence[Path],
    catalogue: "pa.Table",
    *,
    batch_size: int,
    resampling: float | None = 1.0,
    in_validation_N: NDArray[np.bool_] | None = None,
) -> None:
    """Merge the files of all ranks and the galaxies' properties into one file; memory is that of the catalogue.

    Sizes are in arcsec if the pixel scale of every galaxy is known as it is stored, else in pixels of the stored images.

    Args:
        path: the file, written atomically.
        info: its metadata, without units.
        rank_files: by rank.
        catalogue: ``CATALOGUE_COLUMNS`` as far as the data set has them, one row per sample.
        batch_size: of the evaluation.
        resampling: pixels of the catalogue's scale per pixel of a stored image (``Manifest.resampling``).
        in_validation_N: mask of the galaxies in the run's validation split; None if unknown.

    Raises:
        UserError: the disk is full.
        ValueError: a galaxy is missing or duplicated.
    """
    names = [name for name in ("id", *NAMES) if name in catalogue.column_names]
    known = {name: number_column(catalogue, name) for name in SKY}
    scale_N = number_column(catalogue, "pxscale") * (np.nan if resampling is None else resampling)
    has_scale = len(scale_N) > 0 and bool((np.isfinite(scale_N) & (scale_N > 0)).all())
    units = {"ra": "deg", "dec": "deg", "size": "arcsec" if has_scale else "pixel", "sky_brightness": "full scale = 1"}

    def blocks() -> Iterator[Mapping[str, ArrayLike]]:
        for rows in merge_rank_files(rank_files, info.num_classes, batch_size=batch_size, num_samples=len(catalogue)):
            here = slice(int(rows["sample"][0]), int(rows["sample"][-1]) + 1)
            block: dict[str, Any] = {name: rows[name] for name in row_dtype(info.num_classes).names or ()}
            block |= {name: values_N[here] for name, values_N in known.items()}
            texts = catalogue.select(names).slice(here.start, len(rows))
            block |= {name: texts.column(name).cast("string").to_pylist() for name in names}
            if in_validation_N is not None:
                block["in_validation"] = in_validation_N[here]
            if has_scale:
                block["size"] = rows["size"] * scale_N[here]
            yield block

    write_predictions(path, replace(info, units=units), blocks())


def tta_images(images_BCHW: Tensor, tta: TTA) -> Iterator[Tensor]:
    """Yield the images themselves (``none``), or all eight flips and quarter turns of them (``d4``), one at a time.

    Args:
        images_BCHW: square; the yielded tensors have the same memory format.
        tta: kind of test-time augmentation.
    """
    yield images_BCHW
    if tta == "none":
        return
    for number in range(1, 8):
        turned = torch.rot90(images_BCHW, number % 4, (2, 3))
        yield torch.empty_like(images_BCHW).copy_(turned.flip(3) if number >= 4 else turned)


def mean_log_probabilities(logits_VBK: Sequence[Tensor]) -> Tensor:
    """Return the logarithm of the mean softmax probability over V augmented images; for V = 1 the logits unchanged.

    ``logsumexp_v(log_softmax(logits_v)) - log V``: no probability underflows. The result serves as logits, since its own softmax
    is the mean.

    Args:
        logits_VBK: logits of each augmented image, any float type.

    Returns:
        float64 B x K.
    """
    if len(logits_VBK) == 1:
        return logits_VBK[0]
    log_VBK = torch.stack([functional.log_softmax(logits_BK.double(), dim=1) for logits_BK in logits_VBK])
    return log_VBK.logsumexp(0) - math.log(len(logits_VBK))


@dataclass(frozen=True)
class ForwardPass:
    """Computes logits from stored pixels, as a run evaluates its galaxies; the caller puts the model into evaluation mode.

    Args:
        model: on the images' device.
        normalise: from stored pixels to model input.
        dtype: data type of the model's input.
        autocast: makes the context of mixed precision.
        memory_format: of the model's input.
        tta: test-time augmentation.
    """

    model: nn.Module
    normalise: Normalise
    dtype: torch.dtype
    autocast: Callable[[], contextlib.AbstractContextManager[Any]]
    memory_format: torch.memory_format
    tta: TTA

    def __call__(self, images_BHWC: Tensor) -> Tensor:
        """Return the logits B x K of uint8 images B x H x W x 3, H == W; see :func:`mean_log_probabilities` for the type."""
        images_BCHW = self.normalise(images_BHWC, memory_format=self.memory_format).to(self.dtype)
        with self.autocast():
            return mean_log_probabilities([self.model(turned_BCHW) for turned_BCHW in tta_images(images_BCHW, self.tta)])


@torch.inference_mode()
def evaluate_split(
    world: World,
    model: nn.Module,
    manifest: Manifest,
    split: str,
    *,
    augment: Augment,
    recipe: Recipe,
    beat: Callable[[], None] = lambda: None,
    in_validation_N: NDArray[np.bool_] | None = None,
    rank_file: RankFile | None = None,
    table: GalaxyTable | None = None,
) -> dict[str, Any]:
    """Return accuracy, loss, per-class metrics, confusion matrix and calibration of a split, the same on all ranks. Collective.

    Args:
        world: the processes.
        model: not wrapped in DDP, since ranks run different numbers of batches.
        manifest: of the data set.
        split: ``train``, ``val`` or ``test``.
        augment: for its ``normalise``.
        recipe: sets batch size, image size, crop and test-time augmentation.
        beat: heartbeat, called after each batch.
        in_validation_N: mask of the samples in the run's validation split. If there are any, the metrics of the others are added
            as ``without_validation``.
        rank_file: file for this rank's predictions; None to discard them.
        table: receives the predictions of its galaxies; on all ranks, or on none.

    Raises:
        UserError: a galaxy cannot be read (an evaluation never counts fewer), or the disk is full.
    """
    counters = [Counts(manifest.num_classes, world.device)]
    whole = f"the {split} split of {manifest.location}"
    expected = {whole: manifest.splits[split].num_samples}
    if in_validation_N is not None and in_validation_N.any():
        counters.append(Counts(manifest.num_classes, world.device, subset_N=~in_validation_N))
        expected[f"{whole} without validation galaxies"] = int((~in_validation_N).sum())

    layout = choose_memory_format(recipe.train.channels_last, model, world.device, world.dtype)
    forward = ForwardPass(model, augment.normalise, world.dtype, world.mixed_precision.autocast, layout, recipe.eval.tta)

    def count() -> None:
        with contextlib.ExitStack() as stack:
            loader = stack.enter_context(_eval_loader(world, manifest, split, recipe))
            noted = NotedBatches(loader)
            batches = stack.enter_context(DevicePrefetcher(noted, world.device))
            writer = None
            if rank_file is not None:
                writer = PredictionWriter(rank_file, image_size=manifest.image_size, threads=world.cores)
                stack.enter_context(writer)
            for batch in batches:
                logits_BK = forward(batch.images_BHWC)
                predicted, *_ = [counter.add(logits_BK, batch.labels_B, batch.weights_B, batch.samples_B) for counter in counters]
                source = noted.read.popleft()
                if writer is not None:
                    writer.add(source, logits_BK, predicted.classes_B)
                if table is not None:
                    table.add(source, predicted)
                beat()
            if writer is not None:
                writer.finish()

    with evaluation_mode(model):
        world.run_on_all(count)  # a rank that cannot read a galaxy also stops the ranks that would wait for its counts
    vectors = world.all_reduce(torch.stack([counter.vector() for counter in counters]).to(world.device))
    found: list[dict[str, Any]] = []
    for vector, (what, number) in zip(vectors, expected.items(), strict=True):
        total = Counts.from_vector(vector)
        total.check(number, what)
        bins = total.reliability
        metrics = metrics_from_counts(total.confusion_KK.numpy(), total.loss_sum, manifest.class_names)
        found.append({**metrics, "calibration": bins.to_json() if bins is not None else None})
    if table is not None:
        table.reduce()
    metrics, *others = found
    return metrics | ({"without_validation": others[0]} if others else {})


class NotedBatches(Iterator[Batch]):
    """A loader's batches, which are also kept in ``read`` as they are on the CPU: none has to be copied back."""

    def __init__(self, loader: EvalLoader) -> None:
        self._loader = loader
        self.read: deque[Batch] = deque()
        self.is_ready = loader.is_ready

    def __next__(self) -> Batch:
        self.read.append(batch := next(self._loader))
        return batch


def _eval_loader(world: World, manifest: Manifest, split: str, recipe: Recipe) -> EvalLoader:
    return EvalLoader(
        manifest,
        split,
        batch_size=recipe.eval.batch_size,
        ranks=RankInfo(world.rank, world.size, world.ranks_on_node),
        decode=DecodeOptions.of(recipe.data, threads=world.decode_threads, pin=world.device.type == "cuda"),
    )
