"""Exact evaluation over a split: every galaxy is counted once, on any number of ranks."""

import contextlib
import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn import functional

from galaxydist.distributed import World
from galaxydist.evaluation.counts import BatchPredictions, Counts, SubsetCounts
from galaxydist.evaluation.metrics import metrics_from_counts
from galaxydist.evaluation.predictions import NAMES, PredictionsInfo, RankFile, merge_rank_files, part_row, write_predictions
from galaxydist.loading.augment import Augment
from galaxydist.loading.device_prefetch import DevicePrefetcher
from galaxydist.loading.loader import Batch, EvalLoader
from galaxydist.models.build import evaluation_mode
from galaxydist.models.performance import images_channels_last
from galaxydist.recipe.schema import Recipe
from galaxydist.shards.manifest import Manifest
from galaxydist.surveys.photometry import Measurements, measure_images

if TYPE_CHECKING:
    import pyarrow as pa


# Keeping what an evaluation predicts, and beside it how large, and on how bright a sky, each galaxy appears; then one file.

# What of a catalogue is needed beside the predictions.
CATALOGUE_COLUMNS = ("id", "ra", "dec", "redshift", "pxscale", *NAMES)
# Images are measured at most so wide: a quarter of the time at 256 pixels, and sizes that are the same to a part of a pixel.
MEASURED_WIDTH, LEAST_WIDTH = 128, 64


class PredictionWriter:
    """Measures images beside the model, and writes one process's part. Use as a context manager.

    Args:
        part: to write to.
        image_size: width of the stored images in pixels: sizes are in these, however small an image was decoded.
        threads: that measure.
    """

    def __init__(self, part: RankFile, *, image_size: int, threads: int) -> None:
        self._part, self._image_size, self._most = part, image_size, threads + 1
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="galaxydist-measure")
        self._pending: deque[tuple[BatchPredictions, Future[Measurements]]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()

    def add(self, batch: Batch, predictions: BatchPredictions) -> None:
        """Keep the galaxies of a batch.

        Args:
            batch: as the model got it.
            predictions: of its galaxies, in its order.

        Raises:
            UserError: the disk is full.
        """
        images_BHWC = batch.images_BHWC.cpu().numpy()[batch.weights_B.cpu().numpy() != 0]
        self._pending.append((predictions, self._executor.submit(measure, images_BHWC, self._image_size)))
        while len(self._pending) > self._most:
            self._write()

    def finish(self) -> None:
        """Write what is still measured; other processes may read the part then.

        Raises:
            UserError: the disk is full.
        """
        while self._pending:
            self._write()
        self._part.finish()

    def _write(self) -> None:
        predictions, future = self._pending.popleft()
        measured = future.result()
        self._part.append(
            {
                "sample": predictions.samples_N.numpy(),
                "label": predictions.labels_N.numpy(),
                "predicted": predictions.predicted_N.numpy(),
                "logits": predictions.logits_NK.numpy(),
                "size": measured.size_px,
                "sky_brightness": measured.sky,
            }
        )


def measure(images_BHWC: NDArray[np.uint8], image_size: int) -> Measurements:
    """Half-light radii in pixels of the stored images, brightnesses and skies.

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
    parts: Sequence[Path],
    catalogue: "pa.Table",
    *,
    batch_size: int,
    seen_N: NDArray[np.bool_] | None = None,
) -> None:
    """One file of the parts of all processes and what the catalogue knows of the galaxies. Memory is the catalogue's.

    Sizes are in arcsec where the pixel scale of every galaxy is known, else in pixels of the stored images.

    Args:
        path: of the file, which appears whole or not at all.
        info: what it says of itself, but for units.
        parts: by rank.
        catalogue: ``CATALOGUE_COLUMNS``, a row a sample; columns that the data set does not have are left out.
        batch_size: of the evaluation.
        seen_N: which galaxies the model was chosen on; None where nobody has looked.

    Raises:
        UserError: the disk is full.
        ValueError: a galaxy is missing, or stands twice.
    """
    names = [name for name in ("id", *NAMES) if name in catalogue.column_names]
    known = {name: catalogue.column(name).to_numpy() for name in catalogue.column_names if name not in names}
    scale_N = np.asarray(known.pop("pxscale", np.full(len(catalogue), np.nan)), np.float64)
    has_scale = len(scale_N) > 0 and bool((np.isfinite(scale_N) & (scale_N > 0)).all())
    units = {"ra": "deg", "dec": "deg", "size": "arcsec" if has_scale else "pixel", "sky_brightness": "full scale = 1"}

    def blocks() -> Iterator[Mapping[str, ArrayLike]]:
        for rows in merge_rank_files(parts, info.num_classes, batch_size=batch_size, num_samples=len(catalogue)):
            here = slice(int(rows["sample"][0]), int(rows["sample"][-1]) + 1)
            block: dict[str, Any] = {name: rows[name] for name in part_row(info.num_classes).names or ()}
            block |= {name: np.asarray(values_N[here], np.float64) for name, values_N in known.items()}
            block |= {name: catalogue.column(name).slice(here.start, len(rows)).to_pylist() for name in names}
            if seen_N is not None:
                block["in_validation"] = seen_N[here]
            if has_scale:
                block["size"] = rows["size"] * scale_N[here]
            yield block

    write_predictions(path, dataclasses.replace(info, units=units), blocks())


# Test-time augmentation: a galaxy seen in the eight ways that flips and quarter turns allow, and its mean probabilities.
#
# The sky has no up and down: the eight views are as likely as one another, and each shows every pixel as it was stored.

Views = Literal["none", "d4"]


def views(images_BCHW: Tensor, kind: Views) -> Iterator[Tensor]:
    """The images themselves (``none``), or in turn all their flips and quarter turns (``d4``), in memory one view at a time.

    Args:
        images_BCHW: square; the views have the same memory format.
    """
    yield images_BCHW
    if kind == "none":
        return
    for number in range(1, 8):
        turned = torch.rot90(images_BCHW, number % 4, (2, 3))
        yield torch.empty_like(images_BCHW).copy_(turned.flip(3) if number >= 4 else turned)


def mean_log_probabilities(logits_VBK: Sequence[Tensor]) -> Tensor:
    """The logarithm of the mean over the views of the softmax probabilities; the logits of one view are returned as they are.

    ``logsumexp_v(log_softmax(logits_v)) - log V``: no probability underflows. The result serves as logits, since its own
    softmax is the mean.

    Args:
        logits_VBK: of each view, any float type.

    Returns:
        float64 B x K (on Apple's GPUs, which have none, on the CPU).
    """
    if len(logits_VBK) == 1:
        return logits_VBK[0]
    device = torch.device("cpu") if logits_VBK[0].device.type == "mps" else logits_VBK[0].device
    log_VBK = torch.stack([functional.log_softmax(logits_BK.to(device).double(), dim=1) for logits_BK in logits_VBK])
    return log_VBK.logsumexp(0) - math.log(len(logits_VBK))


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
    apart_N: NDArray[np.bool_] | None = None,
    part: RankFile | None = None,
) -> dict[str, Any]:
    """Accuracy, loss, per-class figures and confusion matrix of a split. All ranks take part and get the same.

    Args:
        world: the processes.
        model: not wrapped in DDP: ranks run different numbers of batches.
        manifest: of the data set.
        split: ``train``, ``val`` or ``test``.
        augment: for its ``normalise``.
        recipe: batch size, image size and crop, and with ``eval.tta`` the views whose mean probability is judged.
        beat: called after each batch: a sign of life.
        apart_N: stored samples without which all is given a second time, as ``without_validation``; None or none: only once.
        part: where this rank's predictions go, if they are kept.

    Raises:
        UserError: a galaxy that cannot be read (an evaluation never counts fewer), or a full disk.
    """
    without = SubsetCounts(manifest.num_classes, ~apart_N, world.device) if apart_N is not None and apart_N.any() else None
    # A rank that cannot read a galaxy takes the others along: they would wait for its counts.
    with evaluation_mode(model):
        counts = world.run_on_all(
            lambda: _count(world, model, manifest, split, augment=augment, recipe=recipe, beat=beat, without=without, part=part)
        )
    vectors = torch.stack([counts.vector(), *([without.counts.vector()] if without is not None else [])])
    total, *others = (Counts.from_vector(vector) for vector in world.all_reduce(vectors.to(world.device)))
    total.check(manifest.splits[split].num_samples, f"the {split} split of {manifest.location}")
    metrics = _metrics(total, manifest)
    for other in others:
        assert without is not None
        other.check(without.expected, f"the {split} split of {manifest.location} without validation galaxies")
        metrics["without_validation"] = _metrics(other, manifest)
    return metrics


def _metrics(total: Counts, manifest: Manifest) -> dict[str, Any]:
    return metrics_from_counts(total.confusion_KK.numpy(), float(total.loss_sum), total.count, manifest.class_names)


def _count(
    world: World,
    model: nn.Module,
    manifest: Manifest,
    split: str,
    *,
    augment: Augment,
    recipe: Recipe,
    beat: Callable[[], None],
    without: SubsetCounts | None,
    part: RankFile | None,
) -> Counts:
    """This rank's galaxies."""
    counts = Counts(len(manifest.class_names), world.device, keep_predictions=part is not None)
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(_open_reader(world, manifest, split, recipe))
        batches = stack.enter_context(DevicePrefetcher(reader, world.device))
        keeper = (
            stack.enter_context(PredictionWriter(part, image_size=manifest.image_size, threads=world.cores)) if part else None
        )
        for batch in batches:
            images_BCHW = augment.normalise(batch.images_BHWC).to(world.dtype)
            if recipe.train.channels_last:
                images_BCHW = images_channels_last(images_BCHW)
            with world.accelerator.autocast():
                logits_VBK = [model(view_BCHW) for view_BCHW in views(images_BCHW, recipe.eval.tta)]
            counted = mean_log_probabilities(logits_VBK), batch.labels_B, batch.weights_B, batch.samples_B
            counts.add(*counted)
            if without is not None:
                without.add(*counted)
            if keeper is not None:
                keeper.add(batch, counts.take_predictions())
            beat()
        if keeper is not None:
            keeper.finish()
    return counts


def _open_reader(world: World, manifest: Manifest, split: str, recipe: Recipe) -> EvalLoader:
    return EvalLoader(
        manifest,
        split,
        batch_size=recipe.eval.batch_size,
        rank=world.rank,
        world_size=world.size,
        image_size=recipe.data.image_size,
        crop=recipe.data.crop,
        max_zoom=recipe.data.augment.zoom,
        threads=recipe.data.threads or world.cores,
        ranks_on_node=world.ranks_on_node,
        prefetch=recipe.data.prefetch,
        pin=world.device.type == "cuda",
    )
