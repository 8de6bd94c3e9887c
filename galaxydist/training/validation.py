"""Exact evaluation over a split: every galaxy is counted once, on any number of ranks."""

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from galaxydist.distributed import World
from galaxydist.evaluation.counts import Counts
from galaxydist.evaluation.metrics import metrics_from_counts
from galaxydist.evaluation.parts import PartWriter
from galaxydist.evaluation.subset import SubsetCounts
from galaxydist.evaluation.views import mean_log_probabilities, views
from galaxydist.loading.augment import Augment
from galaxydist.loading.device_prefetch import DeviceFeed
from galaxydist.loading.loader import EvalReader
from galaxydist.models.performance import images_channels_last
from galaxydist.recipe.schema import Recipe
from galaxydist.shards.manifest import Manifest
from galaxydist.training.predicting import Keeper


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
    part: PartWriter | None = None,
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
    was_training = model.training
    model.eval()
    without = SubsetCounts(manifest.num_classes, ~apart_N, world.device) if apart_N is not None and apart_N.any() else None
    # A rank that cannot read a galaxy takes the others along: they would wait for its counts.
    counts = world.together(
        lambda: _count(world, model, manifest, split, augment=augment, recipe=recipe, beat=beat, without=without, part=part)
    )
    model.train(was_training)
    vectors = torch.stack([counts.vector(), *([without.counts.vector()] if without is not None else [])])
    total, *others = (Counts.from_vector(vector) for vector in world.sum(vectors.to(world.device)))
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
    part: PartWriter | None,
) -> Counts:
    """This rank's galaxies."""
    counts = Counts(len(manifest.class_names), world.device, keep_predictions=part is not None)
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(_open_reader(world, manifest, split, recipe))
        batches = stack.enter_context(DeviceFeed(reader, world.device))
        keeper = stack.enter_context(Keeper(part, image_size=manifest.image_size, threads=world.cores)) if part else None
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


def _open_reader(world: World, manifest: Manifest, split: str, recipe: Recipe) -> EvalReader:
    return EvalReader(
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
