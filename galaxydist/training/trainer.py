"""A training run from its recipe to its result: checks first, then the run folder, then the loop, then the evaluation."""

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from galaxydist.checkpoints import store
from galaxydist.distributed import World, init_distributed, keep_threads, set_flight_recorder, shutdown_distributed
from galaxydist.errors import EveryRankError, NonfiniteError, OneRankFailedError, UserError, first_line
from galaxydist.evaluation.evaluator import Evaluator, rehearse_evaluation
from galaxydist.evaluation.inference import evaluate_split
from galaxydist.evaluation.leakage import check_before_training
from galaxydist.job_environment import start_of
from galaxydist.loading.augment import Augment
from galaxydist.loading.dataset import (
    TrainingData,
    build_augment,
    find_cache,
    find_manifest,
    find_variant,
    has_split,
    mirror_warning,
    open_manifest,
)
from galaxydist.loading.decode import sample_name
from galaxydist.loading.device_prefetch import DevicePrefetcher
from galaxydist.loading.loader import Batch, TrainLoader
from galaxydist.log import results
from galaxydist.models.build import build_model, needs_two_images
from galaxydist.models.param_groups import parameter_groups
from galaxydist.models.performance import (
    channels_last,
    checkpoint_activations,
    compile_model,
    images_channels_last,
    remove_broken_libraries,
    set_tf32,
)
from galaxydist.paths import data_root, weights_dir
from galaxydist.recipe.identity import run_path, to_dict
from galaxydist.recipe.resolve import ResolvedRecipe
from galaxydist.recipe.rules import check_optimizer, check_strategy, check_world
from galaxydist.recipe.schema import Recipe
from galaxydist.runs.folder import FailureKind, RunFolder
from galaxydist.runs.lock import RunLock
from galaxydist.shards.manifest import Manifest
from galaxydist.shards.remote.open import open_shards
from galaxydist.shards.verify import check_columns
from galaxydist.training.announcement import describe_end, describe_run, describe_time
from galaxydist.training.batch_norm import average_statistics, synchronise_batch_norm
from galaxydist.training.checkpointer import Checkpointer, SaveSchedule
from galaxydist.training.ddp import Strategy, build_strategy
from galaxydist.training.health.anomalies import LossSpikes, NonFiniteSteps, UnreadableImages
from galaxydist.training.health.watchdog import build_watchdog, collective_timeout
from galaxydist.training.loop import TrainLoop
from galaxydist.training.loss import WeightedCrossEntropy, class_weights
from galaxydist.training.metric_logger import MetricLogger, RunLength
from galaxydist.training.micro_batch import choose_micro_batch, explained_out_of_memory, is_out_of_memory
from galaxydist.training.mixup import Mixup, count_pair_parts, split_pairs, take
from galaxydist.training.optimizer import LRSchedule, build_optimizer
from galaxydist.training.profiler import StepProfiler
from galaxydist.training.resume import EarlyStopping, OpenedFolder, open_run_folder
from galaxydist.training.state import TrainState
from galaxydist.training.step import TrainStep, count_micro_batches, split_evenly
from galaxydist.training.stop_signals import StepGates, StopSignal, signal_name
from galaxydist.training.throughput import StepTimer, Utilisation, build_utilisation
from galaxydist.training.trackers import Tracker, complete_tracker, start_tracker

logger = logging.getLogger(__name__)

# What a recipe asks for, built: the model and its optimizer, what is saved of them, and the step that moves them.

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
    state: TrainState
    augment: Augment
    schedule: RunLength
    micro_batch: int
    utilisation: Utilisation


def check_parts(recipe: Recipe, world: World) -> None:
    """Refuse what could not be built, before anything is written.

    Raises:
        EveryRankError: on every rank the same.
    """
    check_optimizer(recipe.optim.name)
    check_strategy(recipe.train, world.precision)
    if Mixup(recipe.train, recipe.seed, recipe.data.image_size).is_on:
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
    if Mixup(config, recipe.seed, recipe.data.image_size).is_on or (config.sync_batchnorm and world.size > 1):
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
    schedule = RunLength(steps_per_epoch, config.epochs * steps_per_epoch, config.batch_size)
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
        world.run_on_all(lambda: compile_model(model, world.device))
        from torch._inductor.runtime.cache_dir_utils import cache_dir as find_cache_dir

        cache_dir = Path(find_cache_dir())
        if num_removed := sum(world.all_gather(len(remove_broken_libraries(cache_dir)))):
            logger.info(
                "removed %d libraries from torch.compile's cache %s: their compilation was killed", num_removed, cache_dir
            )
    strategy = build_strategy(world, model, config)
    augment = build_augment(recipe, TrainingData.of(manifest, recipe), threads=world.cores)
    with explained_out_of_memory(recipe, world, micro_batch):
        strategy.settle(_example(world, recipe, augment, micro_batch))
    groups = [dict(group) for group in parameter_groups(strategy.model, optim.weight_decay, optim.layer_decay)]
    state = TrainState(
        strategy.model,
        world.accelerator.prepare(build_optimizer(groups, optim, world.device)),
        world.accelerator.scaler,
        strategy.averages,
        stopping=EarlyStopping(config.metric, config.patience),
        skipped=UnreadableImages(recipe.data.on_error, recipe.data.max_errors),
        nonfinite=NonFiniteSteps(
            config.on_nonfinite, config.max_nonfinite, folder, lambda sample: sample_name(manifest, "train", sample)
        ),
        spikes=LossSpikes(config.spike_threshold),
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
    unit = 2 if Mixup(recipe.train, recipe.seed, recipe.data.image_size).is_on else 1
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
    is_mixing = Mixup(config, recipe.seed, size).is_on
    count_parts, split = (count_pair_parts, split_pairs) if is_mixing else (count_micro_batches, split_evenly)
    first = split(share, count_parts(config.batch_size, world.size, micro_batch))[0]
    count = len(take(torch.arange(share), first))
    pixels_BHWC = torch.zeros(count if config.compile else min(2, count), size, size, 3, dtype=torch.uint8, device=world.device)
    images_BCHW = augment(pixels_BHWC, 0, torch.arange(len(pixels_BHWC))).to(world.dtype)
    return images_channels_last(images_BCHW) if config.channels_last else images_BCHW


def build_update(
    world: World, recipe: Recipe, manifest: Manifest, parts: Parts, timer: StepTimer, *, stop: StopSignal
) -> TrainStep:
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
    mixing = Mixup(recipe.train, recipe.seed, recipe.data.image_size)
    return TrainStep(
        world,
        parts.strategy,
        parts.state.optimizer,
        objective=WeightedCrossEntropy(weights_K, recipe.train.label_smoothing),
        augment=parts.augment,
        mixing=mixing if mixing.is_on else None,
        rate=LRSchedule(recipe.optim, parts.schedule.total_steps),
        config=recipe.train,
        micro_batch=parts.micro_batch,
        seed=recipe.seed,
        timer=timer,
        gates=gates,
    )


def train(resolved: ResolvedRecipe, environ: MutableMapping[str, str]) -> int:
    """Carry out a recipe: start it, continue it, or show its result if it has one.

    Args:
        resolved: the recipe and where its values came from.
        environ: the process's environment.

    Returns:
        0 after the evaluation, else the number of the signal that stopped the run (its state is saved).

    Raises:
        UserError: something the user must mend; nothing was written.
    """
    config = resolved.recipe.train
    timeout = collective_timeout(config.hang_timeout)
    world = init_distributed(config.precision, environ, timeout=timeout, threads=config.threads)
    try:
        stop_signal = Trainer(resolved, world, environ).run()
        # Nobody leaves while another still closes its files: a launcher may end the ranks that are a moment behind.
        world.barrier()
        return stop_signal
    finally:
        shutdown_distributed()


class Trainer:
    """One process's part in a run.

    Args:
        resolved: the recipe and where its values came from.
        world: the processes.
        environ: the process's environment.
    """

    def __init__(self, resolved: ResolvedRecipe, world: World, environ: MutableMapping[str, str]) -> None:
        self.resolved = resolved
        self.recipe = resolved.recipe
        self.world = world
        self.environ = environ
        self._lock: RunLock | None = None
        self._others: list[Manifest] = []
        self.root = data_root(self.recipe.data.dir, environ)

    def run(self) -> int:
        """See ``train``."""
        processes = "1 process" if self.world.size == 1 else f"{self.world.size} processes"
        device, precision = self.world.device.type, self.world.precision
        threads = "1 thread each" if self.world.threads == 1 else f"{self.world.threads} threads each"
        logger.info("galaxydist: %s, %s, %s, precision %s", processes, device, threads, precision)
        path, cache = find_manifest(self.recipe.data, self.root), find_cache(self.recipe.data, self.root)
        manifest = self.world.run_on_all(lambda: open_manifest(path, cache, self.recipe, self.world.size))
        self._others = self.world.run_on_all(lambda: self._open_others(manifest))
        self.world.run_on_main(lambda: self._check_data(manifest))
        if warning := mirror_warning(manifest, self.recipe):
            logger.warning("%s", warning)
        check_parts(self.recipe, self.world)
        torch.manual_seed(self.recipe.seed)
        model = self.world.run_on_all(lambda: self._build_model(manifest))
        check_passes(self.recipe, self.world, model)
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(StopSignal(speaks=self.world.is_main))
            opened = self.world.run_on_main(lambda: self._open_folder(stack, manifest))
            folder = RunFolder(opened.path)
            if self.recipe.train.threads == 0:
                self.world = keep_threads(self.world, opened.threads)
            set_flight_recorder(self.environ, folder.stacks_dir)
            if opened.is_over:
                logger.info("%s is finished.", folder)
                self._judge(folder, manifest)
                if text := complete_tracker(self.world, self.recipe, folder, manifest, environ=self.environ):
                    results.info("%s", text)
                return 0
            parts = build_parts(self.world, self.recipe, manifest, model, folder, stored_micro_batch=opened.micro_batch)
            self._restore(parts, folder)
            if parts.state.step == 0:
                self._announce(parts, manifest, folder)
            known = parts.state.tracker_run_id
            tracker = start_tracker(self.world, self.recipe, folder, manifest, run_id=known, environ=self.environ)
            parts.state.tracker_run_id = tracker.run_id
            return self._train(parts, manifest, folder, tracker, stop)

    def _check_data(self, manifest: Manifest) -> None:
        """Rank 0: tell before the training what would end it hours later."""
        folder = RunFolder(run_path(self.recipe))
        is_known = folder.is_started and bool(store.list_checkpoints(folder.checkpoints_dir))
        known = folder.read_recipe().recipe.get("eval.variants", ()) if is_known else ()
        for judged in (manifest, *self._others):
            check_columns(judged)
            if not is_known or (judged is not manifest and judged.variant not in known):
                check_before_training(manifest, judged)
        if not is_known and has_split(manifest, "test"):
            rehearse_evaluation(manifest, self.recipe)

    def _build_model(self, manifest: Manifest) -> nn.Module:
        config, size = self.recipe.model, self.recipe.data.image_size
        return build_model(config, manifest.num_classes, size, weights_dir=weights_dir(self.root))

    def _open_folder(self, stack: contextlib.ExitStack, manifest: Manifest) -> OpenedFolder:
        """Rank 0: the run folder, locked for this run."""
        opened, self._lock = open_run_folder(self.world, self.resolved, manifest)
        stack.callback(self._lock.release)
        RunFolder(opened.path).clear_failure()
        return opened

    def _restore(self, parts: Parts, folder: RunFolder) -> None:
        """Go on from the newest sound checkpoint, where there is one."""
        found, state = parts.strategy.load(folder.checkpoints_dir), parts.state
        if found is not None:
            self.world.run_on_all(lambda: state.restore(self.world, found.tensors, found.state))
            logger.info("continuing %s from step %d", folder, state.step)
        self.world.run_on_main(lambda: self._cut_back(folder, state.step))

    def _announce(self, parts: Parts, manifest: Manifest, folder: RunFolder) -> None:
        model, schedule = parts.strategy.model, parts.schedule
        logger.info("%s", describe_run(self.resolved, manifest, folder, model, schedule))
        estimate = describe_time(self.world, self.resolved, model, schedule, parts.micro_batch)
        if estimate is not None:
            logger.info("%s", estimate)

    @staticmethod
    def _cut_back(folder: RunFolder, step: int) -> None:
        folder.metrics.cut_back(step)
        folder.timing.cut_back(step)

    def _train(self, parts: Parts, manifest: Manifest, folder: RunFolder, tracker: Tracker, stop: StopSignal) -> int:
        world, state = self.world, parts.state
        exit_code = 1
        summary: dict[str, float] = {}
        try:
            stop_signal = self._loop(parts, manifest, folder, tracker, stop) or max(world.all_gather(stop.signal_number))
            if stop_signal:
                saved = "which is saved" if state.step else "with nothing to save yet"
                logger.info(
                    "stopped by %s at step %d, %s; the same command continues it", signal_name(stop_signal), state.step, saved
                )
                return stop_signal
            stop.close()  # nothing is lost any more: a restart evaluates again
            metrics = self._judge(folder, manifest)
            summary = {f"test/{name}": metrics[name] for name in ("accuracy", "balanced_accuracy", "loss")} if metrics else {}
            summary |= {**state.skipped.metrics(), **state.nonfinite.metrics()}
            world.run_on_main(lambda: folder.write_result({"step": state.step, **summary}))
            exit_code = 0
            results.info("%s", describe_end(folder))
        except Exception as error:
            self._note_failure(folder, state.step, error)
            raise
        finally:
            if text := tracker.finish(summary, exit_code):
                results.info("%s", text)
        return 0

    def _judge(self, folder: RunFolder, manifest: Manifest) -> dict[str, Any] | None:
        """The evaluation on the run's own test split; those of eval.variants are written beside it."""
        evaluator = Evaluator(self.world, folder, self.recipe, find_training_shards=lambda _: manifest)
        metrics = evaluator.evaluate(manifest, "test")
        for other in self._others:
            evaluator.evaluate(other, "test")
        return metrics

    def _open_others(self, manifest: Manifest) -> list[Manifest]:
        """The shards of eval.variants but the run's own: looked for before the training, not after it."""
        data, cache = self.recipe.data, find_cache(self.recipe.data, self.root)
        return [
            open_shards(find_variant(data, self.root, variant), cache)
            for variant in self.recipe.eval.variants
            if variant != manifest.variant
        ]

    def _note_failure(self, folder: RunFolder, step: int, error: Exception) -> None:
        """For whoever decides whether the run is started again; by rank 0, and by a rank that alone knows what happened."""
        if not self.world.is_main and not isinstance(error, OneRankFailedError):
            return
        kind: FailureKind = "nonfinite" if isinstance(error, NonfiniteError) else "crash"
        if isinstance(error, UserError):
            kind = "bad_input"
        text = first_line(error)
        with contextlib.suppress(OSError, UserError):  # the disk may be what failed
            folder.write_failure(kind, step, text, start=start_of(self.environ))

    def _loop(self, parts: Parts, manifest: Manifest, folder: RunFolder, tracker: Tracker, stop: StopSignal) -> int:
        """Train from where the state is; the signal that stopped it, or 0. When it returns, the last checkpoint is whole."""
        world, config, state = self.world, self.recipe.train, parts.state
        timer = StepTimer(world.device, batch_size=config.batch_size, world_size=world.size)
        with contextlib.ExitStack() as stack:
            reader = stack.enter_context(world.run_on_all(lambda: self._open_reader(manifest, state.step)))
            batches = stack.enter_context(DevicePrefetcher(reader, world.device))
            watch = stack.enter_context(build_watchdog(world, config, folder))
            saving = stack.enter_context(self._build_saving(parts, manifest, folder))
            journal = stack.enter_context(
                MetricLogger(
                    world,
                    folder,
                    tracker,
                    parts.schedule,
                    window=state.window,
                    timer=timer,
                    utilisation=parts.utilisation,
                    first_step=state.step,
                    log_every=config.log_every,
                )
            )
            profiler = stack.enter_context(StepProfiler(config.profile, folder.path, world.rank, start_step=state.step))
            validate = functools.partial(self._validate, parts, manifest, lambda: watch.beat(state.step, "validation"))
            loop = TrainLoop(
                world,
                parts.schedule,
                state,
                build_update(world, self.recipe, manifest, parts, timer, stop=stop),
                journal,
                saving,
                validate=validate if has_split(manifest, "val") else None,
                validate_every=self.recipe.eval.every,
                timer=timer,
                watch=watch,
                step_done=profiler.step_done,
            )
            with explained_out_of_memory(self.recipe, world, parts.micro_batch):
                stop_signal = loop.run(batches, stop)
            saving.finish()
        return stop_signal

    def _build_saving(self, parts: Parts, manifest: Manifest, folder: RunFolder) -> Checkpointer:
        config, schedule = self.recipe.train, parts.schedule
        data = TrainingData.of(manifest, self.recipe).to_dict()
        return Checkpointer(
            self.world,
            folder,
            self._lock,
            parts.state,
            strategy=parts.strategy,
            policy=SaveSchedule(schedule.steps_per_epoch, schedule.total_steps, config.save_steps, config.save_every),
            context={"data": data, "order_version": self.recipe.order_version, "recipe": to_dict(self.recipe)},
            config=config,
            clock=time.monotonic,
        )

    def _open_reader(self, manifest: Manifest, start_step: int) -> contextlib.AbstractContextManager[Iterator[Batch]]:
        data = self.recipe.data
        return TrainLoader(
            manifest,
            seed=self.recipe.seed,
            batch_size=self.recipe.train.batch_size,
            rank=self.world.rank,
            world_size=self.world.size,
            num_streams=data.num_streams,
            image_size=data.image_size,
            crop=data.crop,
            max_zoom=data.augment.zoom,
            balance=data.balance,
            on_error="report",
            threads=data.threads or self.world.cores,
            ranks_on_node=self.world.ranks_on_node,
            prefetch=data.prefetch,
            pin=self.world.device.type == "cuda",
            start_step=start_step,
        )

    def _validate(self, parts: Parts, manifest: Manifest, beat: Callable[[], None]) -> dict[str, float | None]:
        average_statistics(self.world, *parts.state.modules().values())
        try:
            with parts.strategy.judged() as model:
                found = evaluate_split(self.world, model, manifest, "val", augment=parts.augment, recipe=self.recipe, beat=beat)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            config = self.recipe.eval
            raise OneRankFailedError(
                f"No memory left on rank {self.world.rank} in a validation of eval.batch_size={config.batch_size}, eval.tta="
                f"{config.tta}: lower eval.batch_size (with resume.force=[eval.batch_size])."
            ) from error
        return {f"val/{name}": found[name] for name in ("loss", "accuracy", "balanced_accuracy")}
