"""What a recipe asks for, built: the model and its optimizer, what is saved of them, and the step that moves them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from galaxydist.distributed import World
from galaxydist.errors import EveryRankError
from galaxydist.loading.augment import Augment
from galaxydist.loading.dataset import TrainingData, build_augment
from galaxydist.loading.decode import sample_name
from galaxydist.models.build import needs_two_images
from galaxydist.models.param_groups import parameter_groups
from galaxydist.models.performance import (
    channels_last,
    checkpoint_activations,
    compile_model,
    images_channels_last,
    remove_broken_libraries,
    set_tf32,
)
from galaxydist.recipe.rules import check_strategy, check_world
from galaxydist.recipe.schema import Recipe
from galaxydist.runs.folder import RunFolder
from galaxydist.shards.manifest import Manifest
from galaxydist.training.health.anomalies import Nonfinite, Skipped, SpikeDetector
from galaxydist.training.health.watchdog import collective_timeout
from galaxydist.training.journal import Schedule
from galaxydist.training.micro_batch import choose_micro_batch
from galaxydist.training.mixing import Mixing, count_pair_parts, split_pairs, take
from galaxydist.training.objective import Objective, class_weights
from galaxydist.training.optimizer import LearningRate, build_optimizer
from galaxydist.training.optimizer_names import find_optimizer
from galaxydist.training.out_of_memory import explained_out_of_memory
from galaxydist.training.state import TrainingState
from galaxydist.training.step_gates import StepGates
from galaxydist.training.stop_signals import StopFlag
from galaxydist.training.stopping import EarlyStopping
from galaxydist.training.strategy import Strategy, open_strategy
from galaxydist.training.syncnorm import synchronise_batch_norm
from galaxydist.training.timing import StepTimer
from galaxydist.training.update import Update, count_micro_batches, split_evenly
from galaxydist.training.utilisation import Utilisation, build_utilisation

# Tensors of a parameter's size that an optimizer keeps for it, at most: counted while the micro-batch is looked for.
OPTIMIZER_TENSORS = 2


@dataclass
class Parts:
    """What is made before the loop.

    Args:
        strategy: how the processes share the model.
        state: what is saved.
        augment: pixels to model input.
        schedule: length of the run.
        micro_batch: galaxies in one forward pass of one process (0: its whole share).
        utilisation: how much of its device the run uses.
    """

    strategy: Strategy
    state: TrainingState
    augment: Augment
    schedule: Schedule
    micro_batch: int
    utilisation: Utilisation


def check_parts(recipe: Recipe, world: World) -> None:
    """Refuse what could not be built, before anything is written.

    Raises:
        EveryRankError: on every rank the same.
    """
    find_optimizer(recipe.optim.name)
    check_strategy(recipe.train, world.precision)
    if Mixing(recipe.train, recipe.seed, recipe.data.image_size).is_on:
        check_world(recipe.train.batch_size, world.size)


def check_passes(recipe: Recipe, world: World, model: nn.Module) -> None:
    """Refuse a pass of a single galaxy where the model's batch normalisation needs two, before anything is written.

    Args:
        model: built, on the CPU.

    Raises:
        EveryRankError: on every rank the same.
    """
    config = recipe.train
    micro_batch = 0 if config.micro_batch == "auto" else config.micro_batch
    if not _has_single_pass(recipe, world, model, micro_batch):
        return
    text = (
        f"{recipe.model.name} at data.image_size={recipe.data.image_size} normalises over the batch what is one pixel by then, "
        f"which takes two galaxies in each forward pass; train.batch_size={config.batch_size} on {world.size} processes with "
        f"train.micro_batch={config.micro_batch} has passes of one."
    )
    if (enough := _least_micro_batch(recipe, world)) is not None:
        raise EveryRankError(f"{text} Use train.micro_batch={enough} or more.")
    remedy = ", or train.sync_batchnorm=true" if world.size > 1 else ""
    raise EveryRankError(f"{text} Use train.batch_size={2 * world.size} or more{remedy}.")


def _has_single_pass(recipe: Recipe, world: World, model: nn.Module, micro_batch: int) -> bool:
    config = recipe.train
    if Mixing(config, recipe.seed, recipe.data.image_size).is_on or (config.sync_batchnorm and world.size > 1):
        return False  # there are two galaxies in any pass, or the passes of all processes count together
    return _smallest_pass(recipe, world, micro_batch) == 1 and needs_two_images(model, recipe.data.image_size)


def _smallest_pass(recipe: Recipe, world: World, micro_batch: int) -> int:
    batch_size = recipe.train.batch_size
    return batch_size // world.size // count_micro_batches(batch_size, world.size, micro_batch)


def _least_micro_batch(recipe: Recipe, world: World) -> int | None:
    """The least micro-batch of which no pass has a single galaxy."""
    return next((size for size in (2, 3, 4) if _smallest_pass(recipe, world, size) > 1), None)


def build_parts(
    world: World,
    recipe: Recipe,
    manifest: Manifest,
    model: nn.Module,
    folder: RunFolder,
    *,
    stored_micro_batch: Mapping[str, Any] | None,
) -> Parts:
    """Everything around a model, with nothing restored yet. All ranks take part.

    Args:
        world: the processes.
        recipe: what is asked for.
        manifest: the shards.
        model: built, on the CPU.
        folder: of the run.
        stored_micro_batch: what an earlier start of the run found out.
    """
    config, optim = recipe.train, recipe.optim
    steps_per_epoch = manifest.splits["train"].num_samples // config.batch_size
    schedule = Schedule(steps_per_epoch, config.epochs * steps_per_epoch, config.batch_size)
    set_tf32(config.tf32, world.device)
    model = model.to(device=world.device, dtype=world.dtype)
    if config.channels_last:
        channels_last(model)
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    utilisation = build_utilisation(world, recipe, model)
    micro_batch, found = _micro_batch(world, recipe, model, stored_micro_batch)
    if config.sync_batchnorm and world.size > 1:
        model = synchronise_batch_norm(model)
    if config.compile:
        world.together(lambda: compile_model(model, world.device))
        from torch._inductor.runtime.cache_dir_utils import cache_dir as find_cache_dir

        cache_dir = Path(find_cache_dir())
        if num_removed := sum(world.gather(len(remove_broken_libraries(cache_dir)))):
            world.say(f"removed {num_removed} libraries from torch.compile's cache {cache_dir}: their compilation was killed")
    strategy = open_strategy(world, model, config)
    augment = build_augment(recipe, TrainingData.of(manifest, recipe), threads=world.cores)
    with explained_out_of_memory(recipe, world, micro_batch):
        strategy.settle(_example(world, recipe, augment, micro_batch))
    groups = [dict(group) for group in parameter_groups(strategy.model, optim.weight_decay, optim.layer_decay)]
    state = TrainingState(
        strategy.model,
        world.accelerator.prepare(build_optimizer(groups, optim, world.device)),
        world.accelerator.scaler,
        strategy.averages,
        stopping=EarlyStopping(config.metric, config.patience),
        skipped=Skipped(recipe.data.on_error, recipe.data.max_errors),
        nonfinite=Nonfinite(
            config.on_nonfinite, config.max_nonfinite, folder, lambda sample: sample_name(manifest, "train", sample)
        ),
        spikes=SpikeDetector(config.spike_threshold),
        micro_batch=found,
        threads={"threads": world.threads, "world_size": world.size},
    )
    return Parts(
        strategy=strategy,
        state=state,
        augment=augment,
        schedule=schedule,
        micro_batch=micro_batch,
        utilisation=utilisation,
    )


def _micro_batch(world: World, recipe: Recipe, model: nn.Module, stored: Mapping[str, Any] | None) -> tuple[int, dict[str, Any]]:
    """The recipe's, or the largest that fits beside what the optimizer will keep; and what is to be stored of it.

    A model that is to be divided is not tried: whole, it would need more than it will.
    """
    if recipe.train.strategy == "fsdp" and recipe.train.micro_batch == "auto":
        return 0, {}
    trained_bytes = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    unit = 2 if Mixing(recipe.train, recipe.seed, recipe.data.image_size).is_on else 1
    ballast_bytes = OPTIMIZER_TENSORS * trained_bytes
    found, to_store = choose_micro_batch(world, recipe, model, stored=stored, ballast_bytes=ballast_bytes, unit=unit)
    if recipe.train.micro_batch == "auto" and _has_single_pass(recipe, world, model, found):
        found = _least_micro_batch(recipe, world) or 0
        to_store = {**to_store, "micro_batch": found}
    return found, to_store


def _example(world: World, recipe: Recipe, augment: Augment, micro_batch: int) -> torch.Tensor:
    """Two empty images as the model sees them; where it is compiled, as many as in this rank's first pass of a step, since the
    first shape that comes is compiled for that shape alone."""
    config, size = recipe.train, recipe.data.image_size
    share = len(range(world.rank, config.batch_size, world.size))
    is_mixing = Mixing(config, recipe.seed, size).is_on
    count_parts, split = (count_pair_parts, split_pairs) if is_mixing else (count_micro_batches, split_evenly)
    first = split(share, count_parts(config.batch_size, world.size, micro_batch))[0]
    count = len(take(torch.arange(share), first))
    pixels_BHWC = torch.zeros(count if config.compile else min(2, count), size, size, 3, dtype=torch.uint8, device=world.device)
    images_BCHW = augment(pixels_BHWC, 0, torch.arange(len(pixels_BHWC))).to(world.dtype)
    return images_channels_last(images_BCHW) if config.channels_last else images_BCHW


def build_update(world: World, recipe: Recipe, manifest: Manifest, parts: Parts, timer: StepTimer, *, stop: StopFlag) -> Update:
    """The step. All ranks take part."""
    is_whole = recipe.train.strategy == "ddp" and not recipe.train.compile
    gates = StepGates(
        world.size,
        stop,
        layers=parts.strategy.model if is_whole else None,
        timeout=collective_timeout(recipe.train.hang_timeout),
    )
    counts_K = manifest.splits["train"].class_counts
    weights_K = class_weights(recipe.train.class_weights, counts_K).to(world.device)
    mixing = Mixing(recipe.train, recipe.seed, recipe.data.image_size)
    return Update(
        world,
        parts.strategy,
        parts.state.optimizer,
        objective=Objective(weights_K, recipe.train.label_smoothing),
        augment=parts.augment,
        mixing=mixing if mixing.is_on else None,
        rate=LearningRate(recipe.optim, parts.schedule.total_steps),
        config=recipe.train,
        micro_batch=parts.micro_batch,
        seed=recipe.seed,
        timer=timer,
        gates=gates,
    )
