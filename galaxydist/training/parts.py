"""What a recipe asks for, built: the model and its optimizer, what is saved of them, and the step that moves them."""

from dataclasses import dataclass
from typing import Any

from timm.utils import ModelEmaV3
from torch import nn

from galaxydist.models.groups import parameter_groups
from galaxydist.recipe.schema import Recipe
from galaxydist.runs.folder import RunFolder
from galaxydist.shards.augment import Augment
from galaxydist.shards.decode import sample_name
from galaxydist.shards.manifest import Manifest
from galaxydist.training.data import TrainingData, build_augment
from galaxydist.training.journal import Schedule
from galaxydist.training.mixing import Mixing, check_world
from galaxydist.training.nonfinite import Nonfinite
from galaxydist.training.objective import Objective, class_weights
from galaxydist.training.optimizer import LearningRate, build_optimizer
from galaxydist.training.optimizer_names import find_optimizer
from galaxydist.training.skipping import Skipped
from galaxydist.training.spikes import SpikeDetector
from galaxydist.training.state import TrainingState
from galaxydist.training.stopping import EarlyStopping
from galaxydist.training.timing import StepTimer
from galaxydist.training.update import Update
from galaxydist.training.world import World


@dataclass
class Parts:
    """What is made before the loop.

    Args:
        model: as it takes part in a step.
        judged: the one that is validated: the moving average where there is one.
        state: what is saved.
        augment: pixels to model input.
        schedule: length of the run.
        rate: learning rate by step.
    """

    model: nn.Module
    judged: nn.Module
    state: TrainingState
    augment: Augment
    schedule: Schedule
    rate: LearningRate


def check_parts(recipe: Recipe, world_size: int) -> None:
    """Refuse what could not be built, before anything is written.

    Raises:
        EveryRankError: on every rank the same.
    """
    find_optimizer(recipe.optim.name)
    if Mixing(recipe.train, recipe.seed, recipe.data.image_size).is_on:
        check_world(recipe.train.batch_size, world_size)


def build_parts(world: World, recipe: Recipe, manifest: Manifest, model: nn.Module, folder: RunFolder) -> Parts:
    """Everything around a model, with nothing restored yet. All ranks take part.

    Args:
        world: the processes.
        recipe: what is asked for.
        manifest: the shards.
        model: built, on the CPU.
        folder: of the run.
    """
    config, train_split = recipe.train, manifest.splits["train"]
    steps_per_epoch = train_split.num_samples // config.batch_size
    schedule = Schedule(steps_per_epoch, config.epochs * steps_per_epoch, config.batch_size)
    model = model.to(device=world.device, dtype=world.dtype)
    optim = recipe.optim
    groups: list[dict[str, Any]] = [dict(group) for group in parameter_groups(model, optim.weight_decay, optim.layer_decay)]
    ema = ModelEmaV3(model, decay=config.ema, use_warmup=True) if config.ema > 0 else None
    prepared_model, optimizer = world.accelerator.prepare(model, build_optimizer(groups, optim, world.device))
    state = TrainingState(
        model,
        optimizer,
        world.accelerator.scaler,
        ema,
        stopping=EarlyStopping(config.metric, config.patience),
        skipped=Skipped(recipe.data.on_error, recipe.data.max_errors),
        nonfinite=Nonfinite(
            config.on_nonfinite, config.max_nonfinite, folder, lambda sample: sample_name(manifest, "train", sample)
        ),
        spikes=SpikeDetector(config.spike_threshold),
    )
    return Parts(
        model=prepared_model,
        judged=model if ema is None else ema.module,
        state=state,
        augment=build_augment(recipe, TrainingData.of(manifest, recipe), threads=world.cores),
        schedule=schedule,
        rate=LearningRate(recipe.optim, schedule.total_steps),
    )


def build_update(world: World, recipe: Recipe, manifest: Manifest, parts: Parts, timer: StepTimer) -> Update:
    """The step, after the state was restored."""
    counts_K = manifest.splits["train"].class_counts
    weights_K = class_weights(recipe.train.class_weights, counts_K).to(world.device)
    micro_batch = recipe.train.micro_batch
    mixing = Mixing(recipe.train, recipe.seed, recipe.data.image_size)
    return Update(
        world,
        parts.model,
        parts.state.optimizer,
        objective=Objective(weights_K, recipe.train.label_smoothing),
        augment=parts.augment,
        mixing=mixing if mixing.is_on else None,
        rate=parts.rate,
        ema=parts.state.ema,
        config=recipe.train,
        micro_batch=0 if micro_batch == "auto" else micro_batch,
        seed=recipe.seed,
        timer=timer,
    )
