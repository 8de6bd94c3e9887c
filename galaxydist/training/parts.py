"""What a recipe asks for, built: the model and its optimizer, what is saved of them, and the step that moves them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from galaxydist.models.groups import parameter_groups
from galaxydist.models.memory import checkpoint_activations
from galaxydist.recipe.rules import check_strategy, check_world
from galaxydist.recipe.schema import Recipe
from galaxydist.runs.folder import RunFolder
from galaxydist.shards.augment import Augment
from galaxydist.shards.decode import sample_name
from galaxydist.shards.manifest import Manifest
from galaxydist.training.data import TrainingData, build_augment
from galaxydist.training.journal import Schedule
from galaxydist.training.micro_batch import choose_micro_batch
from galaxydist.training.mixing import Mixing, count_pair_parts, split_pairs, take
from galaxydist.training.nonfinite import Nonfinite
from galaxydist.training.objective import Objective, class_weights
from galaxydist.training.optimizer import LearningRate, build_optimizer
from galaxydist.training.optimizer_names import find_optimizer
from galaxydist.training.out_of_memory import explained_out_of_memory
from galaxydist.training.skipping import Skipped
from galaxydist.training.speed import channels_last, compile_model, images_channels_last, set_tf32
from galaxydist.training.spikes import SpikeDetector
from galaxydist.training.state import TrainingState
from galaxydist.training.stopping import EarlyStopping
from galaxydist.training.strategy import Strategy, open_strategy
from galaxydist.training.syncnorm import synchronise_batch_norm
from galaxydist.training.timing import StepTimer
from galaxydist.training.update import Update, count_micro_batches, split_evenly
from galaxydist.training.utilisation import Utilisation, build_utilisation
from galaxydist.training.world import World

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
    return choose_micro_batch(world, recipe, model, stored=stored, ballast_bytes=ballast_bytes, unit=unit)


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


def build_update(world: World, recipe: Recipe, manifest: Manifest, parts: Parts, timer: StepTimer) -> Update:
    """The step."""
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
    )
