"""A training run from its recipe to its result."""

import contextlib
import logging
import time
from collections.abc import Iterator, MutableMapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from galaxydist.distributed import World, keep_threads, open_world, set_flight_recorder
from galaxydist.errors import is_known_to_all
from galaxydist.evaluation.evaluator import Evaluator
from galaxydist.evaluation.galaxy_table import GalaxyTable, logged_metrics
from galaxydist.evaluation.inference import evaluate_split
from galaxydist.job_environment import start_of
from galaxydist.loading.decode import sample_key
from galaxydist.loading.device_prefetch import DevicePrefetcher
from galaxydist.loading.loader import Batch, DecodeOptions, RankInfo, TrainLoader
from galaxydist.loading.training_data import build_augment, has_split
from galaxydist.log import results
from galaxydist.models.param_groups import parameter_groups
from galaxydist.models.performance import (
    checkpoint_activations,
    choose_memory_format,
    compile_model,
    cudnn_benchmark,
    deterministic_algorithms,
    remove_broken_libraries,
    set_memory_format,
    set_tf32,
)
from galaxydist.paths import data_root
from galaxydist.rank_store import Leave
from galaxydist.recipe.identity import run_path, to_dict
from galaxydist.recipe.resolve import ResolvedRecipe
from galaxydist.recipe.rules import is_mixing
from galaxydist.runs.events import EventLog
from galaxydist.runs.folder import ORIGIN_KEY, RunFolder
from galaxydist.runs.lock import RunLock
from galaxydist.tracking.run_tracker import Tracker, complete_tracker, start_tracker
from galaxydist.tracking.webhook import Webhook, find_webhook
from galaxydist.training.batch_norm import average_statistics, synchronise_batch_norm
from galaxydist.training.checkpointer import Checkpointer, SaveSchedule, SaveTimer
from galaxydist.training.health.anomalies import DataWaits, LossSpikes, NonFiniteSteps, UnreadableImages
from galaxydist.training.health.rank_exit import ExitTasks, leaving_alone
from galaxydist.training.health.run_events import alert_early, began, cut_back, write_failure, write_start
from galaxydist.training.health.watchdog import EVALUATION, VALIDATION, build_watchdog, collective_timeout
from galaxydist.training.loop import TrainLoop
from galaxydist.training.loss import WeightedCrossEntropy, class_weights
from galaxydist.training.metric_logger import MetricLogger, RunLength
from galaxydist.training.micro_batch import choose_micro_batch, explained_out_of_memory, explained_validation_memory
from galaxydist.training.mixup import Mixup
from galaxydist.training.optimizer import LRSchedule, build_optimizer
from galaxydist.training.profiler import StepProfiler
from galaxydist.training.resume import EarlyStopping, Prune, Pruning, lock_run_folder
from galaxydist.training.run_summary import describe_end, describe_result, describe_run, describe_time, write_facts
from galaxydist.training.state import TrainState
from galaxydist.training.step import TrainStep, example_images
from galaxydist.training.stop_signals import StepGates, StopSignal, signal_name
from galaxydist.training.strategy import DDPStrategy, FSDPStrategy
from galaxydist.training.system_metrics import open_system_metrics
from galaxydist.training.throughput import StepTimer, build_utilisation
from galaxydist.training.training_inputs import check_inputs

logger = logging.getLogger(__name__)


def train(
    resolved: ResolvedRecipe, environ: MutableMapping[str, str], leave: Leave = lambda *_: None, prune: Prune | None = None
) -> int:
    """Train a recipe, continue its run, or show its result if it has one. Every process of the run calls it.

    Args:
        resolved: the recipe, with the origins of its values.
        environ: the process's environment.
        leave: ends a process of several after an error of its rank alone; by default the error is raised.
        prune: decides after each validation whether to end the run without an evaluation; given on all ranks or on none.

    Returns:
        0 after the evaluation or if the run was pruned, else the number of the signal that stopped the run (its state is saved).

    Raises:
        UserError: the recipe, its data or the run folder cannot be used; nothing was written.
    """
    config = resolved.recipe.train
    timeout = collective_timeout(config.hang_timeout)
    with (
        deterministic_algorithms(config.deterministic, environ),
        open_world(config.precision, environ, timeout=timeout, threads=config.threads) as world,
    ):
        stop_signal = Trainer(resolved, world, environ, leave).run(prune)
        world.barrier()  # launchers kill ranks that exit after the first one, which may still close their files
    return stop_signal


class Trainer:
    """Trains one recipe in one run folder; every process of a run has one.

    ``run`` calls the other methods in their order. All processes call each of them together.

    Args:
        resolved: the recipe, with the origins of its values.
        world: the processes.
        environ: the process's environment.
        leave: as for ``train``.

    Attributes:
        manifest: the shards of the run; ``other_manifests`` are those of ``eval.variants``.
        model: the bare model, in ``strategy``; ``model_record`` is what checkpoints keep of it, ``trained_on`` of the data.
        stop: set by a signal while the run folder is open.
        is_finished: the run has its result.
        length: number of steps.
        state: everything that a checkpoint holds.
        step: takes one optimizer step.
        checkpointer: saves ``state``.
        tracker: the run's tracker, on rank 0.
        events: what happens to the run, for its folder and its webhook.
        watchdog: ends the run if it hangs, or if another rank has failed.
        exit_tasks: what this rank still does if it leaves after a failure.
    """

    def __init__(
        self, resolved: ResolvedRecipe, world: World, environ: MutableMapping[str, str], leave: Leave = lambda *_: None
    ) -> None:
        self.resolved, self.recipe = resolved, resolved.recipe
        self.world, self.environ, self._leave = world, environ, leave
        self._lock: RunLock | None = None  # on rank 0
        self._saved_progress: dict[str, Any] = {}
        self._has_result = False
        self._galaxies: GalaxyTable | None = None  # from the first validation on
        self._webhook = Webhook(find_webhook(self.recipe.tracker.webhook, environ), run_path(self.recipe).name)
        self.exit_tasks = ExitTasks()

    def run(self, prune: Prune | None = None) -> int:
        """Train to the result, as ``train`` does, and return its result."""
        with self._noting_failure():
            self.check_inputs()
        with self.open_run_folder():
            if self.is_finished:
                logger.info("%s is finished.", self.run_folder)
                self.stop.close()  # nothing is to be saved: a signal ends an evaluation that is missing
                self.evaluate()
                tracked = partial(complete_tracker, self.world, self.recipe, self.run_folder, self.manifest, environ=self.environ)
                _log_result(self.world.run_on_main(tracked))
                return 0
            self.build()
            self.restore()
            self.pruning = Pruning(self.world, self.run_folder, self.recipe.train.metric, prune)
            with self.open_tracker(), open_system_metrics(self.world, self.run_folder, lambda: self.state.step):
                stop_signal = self.train()
                if self.pruning.is_pruned:
                    self._has_result = True
                    results.info("%s", self.pruning.finish(self.state.step, self.events))
                    return 0
                if stop_signal:
                    return stop_signal
                self.finish(self.evaluate())
        return 0

    def check_inputs(self) -> None:
        """Check the shards, the recipe and the model, before anything is written."""
        inputs = check_inputs(self.world, self.recipe, data_root(self.recipe.data.dir, self.environ))
        self.manifest, self.other_manifests = inputs.manifest, inputs.other_manifests
        self.model, self.model_record, self.trained_on = inputs.model, inputs.model_record, inputs.trained_on

    @contextlib.contextmanager
    def open_run_folder(self) -> Iterator[None]:
        """Lock the run folder; handle stop signals, and watch the ranks, while it is open."""
        with contextlib.ExitStack() as stack:
            self.stop = stack.enter_context(StopSignal(is_verbose=self.world.is_main))

            def lock() -> tuple[Path, dict[str, Any], bool, float]:
                folder = RunFolder(run_path(self.recipe))
                self._lock, progress, is_finished = lock_run_folder(folder, self.world, self.resolved, self.manifest)
                stack.callback(self._lock.release)
                self.exit_tasks.lock = self._lock.release
                folder.clear_failure()
                return folder.path, progress, is_finished, began()

            with self._noting_failure():
                path, self._saved_progress, self.is_finished, began_at = self.world.run_on_main(lock)
            self.run_folder = RunFolder(path)
            stack.callback(self._webhook.close)
            self.events = EventLog(self.run_folder.events_path, start_of(self.environ), {"began": began_at}, self._webhook.send)
            if self.recipe.train.threads == 0:
                self.world = keep_threads(self.world, self._saved_progress.get("threads"))
            set_flight_recorder(self.environ, self.run_folder.stacks_dir)
            self.watchdog = build_watchdog(
                self.world, self.recipe.train, self.run_folder, self.exit_tasks, self.events, note=self._note_failure
            )
            stack.enter_context(self.watchdog)
            self.exit_tasks.stacks, self.exit_tasks.webhook = self.watchdog.close_stacks, self._webhook.close
            with self._noting_failure(), leaving_alone(self.world, self._leave, self.exit_tasks, self._note_failure):
                yield

    def build(self) -> None:
        """Build the model on its device, the optimizer, the training state, the step and the checkpointer."""
        recipe, world, config = self.recipe, self.world, self.recipe.train
        steps_per_epoch = self.manifest.splits["train"].num_samples // config.batch_size
        self.length = RunLength(steps_per_epoch, config.epochs * steps_per_epoch, config.batch_size)
        model, micro_batch, found = self._prepare_model()
        self.strategy = FSDPStrategy(world, model, config) if config.strategy == "fsdp" else DDPStrategy(world, model, config)
        self.model = self.strategy.model
        self.augment = build_augment(recipe, self.trained_on, threads=world.cores)
        with explained_out_of_memory(recipe, world, micro_batch):
            self.strategy.warm_up(example_images(world, recipe, self.augment, micro_batch, self.memory_format))
        self.state = self._build_state(found)
        self.step = self._build_step(micro_batch)
        self.checkpointer = Checkpointer(
            world,
            self.run_folder,
            self.state,
            writer=self.strategy.open_writer(
                self.run_folder.checkpoints_dir,
                background=config.async_save,
                check=self._lock.check if self._lock is not None else lambda: None,
            ),
            is_collective=self.strategy.is_collective,
            schedule=SaveSchedule(steps_per_epoch, self.length.total_steps, config.save_steps, config.save_every),
            timer=SaveTimer(config.save_minutes, time.monotonic),
            context={
                "data": self.trained_on.to_dict(),
                "model": self.model_record.to_dict(),
                "order_version": recipe.order_version,
                "recipe": to_dict(recipe),
            },
        )
        self.exit_tasks.checkpoint = self.checkpointer.writer.wait

    def _prepare_model(self) -> tuple[nn.Module, int, dict[str, Any]]:
        """Move the model to its device, choose the micro-batch, and synchronise or compile the model if the recipe says so.

        Returns:
            The model, the micro-batch, and the micro-batch and its conditions for the checkpoint.
        """
        recipe, world, config = self.recipe, self.world, self.recipe.train
        set_tf32(config.tf32, world.device)
        model = self.model.to(device=world.device, dtype=world.dtype)
        self.memory_format = choose_memory_format(config.channels_last, model, world.device, world.dtype)
        if config.strategy == "ddp":  # FSDP shards contiguous weights only: the layers convert them
            set_memory_format(model, self.memory_format)
        if config.gradient_checkpointing:
            checkpoint_activations(model)
        self.utilisation = build_utilisation(world, recipe, model)
        micro_batch, found = choose_micro_batch(world, recipe, model, stored=self._saved_progress.get("micro_batch"))
        if config.sync_batchnorm and world.size > 1:
            model = synchronise_batch_norm(model)
        if config.compile:
            world.run_on_all(lambda: compile_model(model, world.device))
            from torch._inductor.runtime.cache_dir_utils import cache_dir as find_cache_dir

            cache_dir = Path(find_cache_dir())
            if num_removed := sum(world.all_gather(len(remove_broken_libraries(cache_dir)))):
                logger.info("removed %d incomplete libraries from torch.compile's cache %s", num_removed, cache_dir)
        return model, micro_batch, found

    def _build_state(self, micro_batch: dict[str, Any]) -> TrainState:
        recipe, world, config = self.recipe, self.world, self.recipe.train
        groups = [dict(group) for group in parameter_groups(self.model, recipe.optim.weight_decay, recipe.optim.layer_decay)]
        return TrainState(
            self.model,
            world.mixed_precision.prepare(build_optimizer(groups, recipe.optim, world.device)),
            world.mixed_precision.scaler,
            self.strategy.ema_state,
            stopping=EarlyStopping(config.metric, config.patience),
            skipped=UnreadableImages(recipe.data.on_error, recipe.data.max_errors),
            nonfinite=NonFiniteSteps(
                config.on_nonfinite, config.max_nonfinite, self.run_folder, partial(sample_key, self.manifest, "train")
            ),
            spikes=LossSpikes(config.spike_threshold),
            micro_batch=micro_batch,
            threads={"threads": world.threads, "world_size": world.size},
        )

    def _build_step(self, micro_batch: int) -> TrainStep:
        recipe, world, config = self.recipe, self.world, self.recipe.train
        weights_K = class_weights(config.class_weights, self.manifest.splits["train"].class_counts).to(world.device)
        return TrainStep(
            world,
            self.strategy,
            self.state.optimizer,
            loss=WeightedCrossEntropy(weights_K, config.label_smoothing),
            augment=self.augment,
            mixup=Mixup(config, recipe.seed, recipe.data.image_size) if is_mixing(config) else None,
            schedule=LRSchedule(recipe.optim, self.length.total_steps),
            config=config,
            micro_batch=micro_batch,
            seed=recipe.seed,
            memory_format=self.memory_format,
            timer=StepTimer(world.device, batch_size=config.batch_size, world_size=world.size),
            gates=StepGates(
                world.size,
                self.stop,
                layers=self.model if config.strategy == "ddp" and not config.compile else None,
                timeout=collective_timeout(config.hang_timeout),
            ),
        )

    def restore(self) -> None:
        """Restore the newest sound checkpoint, if there is one, and cut the metrics back to its step."""
        found = self.strategy.load(self.run_folder.checkpoints_dir)
        if found is not None:
            self.world.run_on_all(lambda: self.state.from_checkpoint(self.world, found.tensors, found.state))
            logger.info("continuing %s from step %d", self.run_folder, self.state.step)

        def prepare() -> dict[str, Any]:
            write_facts(self.run_folder, self.model)
            return cut_back(self.run_folder, self.state.step)

        self._cut = self.world.run_on_main(prepare)
        if self.state.step == 0:
            described = self.resolved, self.manifest, self.run_folder, self.model, self.length
            logger.info("%s", describe_run(*described, record=self.model_record))
            if estimate := describe_time(self.world, self.resolved, self.model, self.length, self.step.micro_batch):
                logger.info("%s", estimate)

    @contextlib.contextmanager
    def open_tracker(self) -> Iterator[None]:
        """Start the tracker; at the end finish it. An error is noted in the run folder."""

        def start() -> None:
            self.tracker = start_tracker(
                self.world,
                self.recipe,
                self.run_folder,
                self.manifest,
                run_id=self.state.tracker_run_id,
                environ=self.environ,
            )
            self.state.tracker_run_id = self.tracker.run_id

        self.tracker = Tracker()
        self.world.run_on_main(start)
        self.exit_tasks.tracker = partial(self.tracker.finish, 1)
        try:
            with self._noting_failure():
                yield
        except BaseException:
            self.exit_tasks.end_tracker()
            raise
        self.exit_tasks.tracker = None
        _log_result(self.world.run_on_main(lambda: self.tracker.finish(int(not self._has_result))))

    @contextlib.contextmanager
    def _noting_failure(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._note_failure(error)
            raise

    def _note_failure(self, error: Exception) -> None:
        """Write an error for the decision on a restart: on rank 0, and on a rank that alone knows of it."""
        if not hasattr(self, "events"):  # the run folder is not open yet
            if self.world.is_main:
                alert_early(self._webhook, error)
        elif self.world.is_main or not is_known_to_all(error):
            write_failure(self.run_folder, self.events, error, self._num_steps, self.environ)

    @property
    def _num_steps(self) -> int | None:
        """The steps done; None before the state is built."""
        return self.state.step if hasattr(self, "state") else None

    def train(self) -> int:
        """Train from the state's step on; at the end the last checkpoint is complete.

        Returns:
            The number of the signal that stopped the run, or 0.
        """
        write_start(self.events, self.world, self.state.step, self._cut)
        self.step.timer.window(1)  # the time since the step was built does not count
        with contextlib.ExitStack() as stack:
            # All passes have one shape, or two if the micro-batches differ by one.
            stack.enter_context(cudnn_benchmark(self.world.device.type == "cuda" and not self.recipe.train.deterministic))
            loader = stack.enter_context(self.world.run_on_all(self.open_loader))
            batches = stack.enter_context(DevicePrefetcher(loader, self.world.device))
            stack.enter_context(self.checkpointer.writer)
            loop = self._build_loop(stack)
            with (
                leaving_alone(self.world, self._leave, self.exit_tasks, self._note_failure),
                explained_out_of_memory(self.recipe, self.world, self.step.micro_batch),
            ):
                stop_signal = loop.run(batches, self.stop)
                self.checkpointer.wait()
        stop_signal = stop_signal or max(self.world.all_gather(self.stop.signal_number))
        if stop_signal and not self.pruning.is_pruned:
            saved = "which is saved" if self.state.step else "with nothing to save yet"
            text = f"stopped by {signal_name(stop_signal)} at step {self.state.step}, {saved}"
            logger.info("%s; the same command continues it", text)
            if self.world.is_main:
                self.events.write("stop", text, self.state.step, signal=stop_signal)
        else:
            self.stop.close()  # a signal during the evaluation may end the process: a restart evaluates again
        return stop_signal

    def open_loader(self) -> contextlib.AbstractContextManager[Iterator[Batch]]:
        """Return this rank's loader of training batches, from the state's step on."""
        data = self.recipe.data
        return TrainLoader(
            self.manifest,
            seed=self.recipe.seed,
            batch_size=self.recipe.train.batch_size,
            ranks=RankInfo(self.world.rank, self.world.size, self.world.ranks_on_node),
            decode=DecodeOptions.of(data, threads=self.world.decode_threads, pin=self.world.device.type == "cuda"),
            num_streams=data.num_streams,
            balance=data.balance,
            on_error="report",
            draw=self.step.draw,
            start_step=self.state.step,
        )

    def _build_loop(self, stack: contextlib.ExitStack) -> TrainLoop:
        config, state = self.recipe.train, self.state
        metrics = MetricLogger(
            self.world,
            self.run_folder,
            self.tracker,
            self.length,
            sums=state.window,
            timer=self.step.timer,
            utilisation=self.utilisation,
            first_step=state.step,
            log_every=config.log_every,
            events=self.events,
            data_waits=DataWaits(config.data_wait_limit),
        )
        stack.enter_context(metrics)
        profiler = StepProfiler(config.profile, self.run_folder.path, self.world.rank, start_step=state.step)
        stack.enter_context(profiler)
        return TrainLoop(
            self.world,
            self.length,
            state,
            self.step,
            metrics,
            self.checkpointer,
            validate=self._validate if has_split(self.manifest, "val") else None,
            validate_every=self.recipe.eval.every,
            watchdog=self.watchdog,
            pruning=self.pruning,
            events=self.events,
            step_done=profiler.step_done,
        )

    def _validate(self) -> tuple[dict[str, float | None], dict[str, Any]]:
        """Return the metrics of the validation split, and on rank 0 its details. All ranks take part."""
        average_statistics(self.world, *self.state.modules().values())
        if self._galaxies is None:
            self._galaxies = GalaxyTable(self.world, self.run_folder, self.manifest, "val")
        with explained_validation_memory(self.recipe, self.world), self.strategy.eval_model() as model:
            found = evaluate_split(
                self.world,
                model,
                self.manifest,
                "val",
                augment=self.augment,
                recipe=self.recipe,
                beat=lambda: self.watchdog.beat(self.state.step, VALIDATION),
                table=self._galaxies,
            )
        return logged_metrics(found), self._galaxies.details(found) if self.world.is_main else {}

    def evaluate(self) -> dict[str, Any] | None:
        """Evaluate the test splits of the run's shards and of ``eval.variants``, and return the metrics of the former."""

        def beat() -> None:
            self.watchdog.beat(self._num_steps or 0, EVALUATION)

        beat()
        evaluator = Evaluator(
            self.world,
            self.run_folder,
            self.recipe,
            find_training_shards=lambda _: self.manifest,
            trust_code=True,
            beat=beat,
        )
        metrics, *_ = [evaluator.evaluate(manifest, "test") for manifest in (self.manifest, *self.other_manifests)]
        return metrics

    def finish(self, metrics: dict[str, Any] | None) -> None:
        """Write the result of the run."""
        state = self.state
        summary = {f"test/{name}": metrics[name] for name in ("accuracy", "balanced_accuracy", "loss")} if metrics else {}
        summary |= {**state.skipped.metrics(), **state.nonfinite.metrics()}
        origin = {ORIGIN_KEY: self.manifest.origin.to_dict()} if self.manifest.origin is not None else {}
        self.world.run_on_main(lambda: self.run_folder.write_result({"step": state.step, **summary, **origin}))
        if self.world.is_main:
            self.events.write("finish", describe_result(summary), state.step, **summary)
        self._has_result = True
        results.info("%s", describe_end(self.run_folder))


def _log_result(text: str | None) -> None:
    if text is not None:
        results.info("%s", text)
