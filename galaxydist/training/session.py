"""A training run from its recipe to its result: checks first, then the run folder, then the loop, then the evaluation."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch
from torch import nn

from galaxydist.checkpoints import store
from galaxydist.distributed import World, enter_world, keep_threads, leave_world, set_flight_recorder
from galaxydist.errors import NonfiniteError, OneRankFailedError, UserError
from galaxydist.evaluation.evaluator import Judge, rehearse_evaluation
from galaxydist.evaluation.inference import evaluate_split
from galaxydist.evaluation.leakage import check_before_training
from galaxydist.loading.dataset import (
    TrainingData,
    find_cache,
    find_manifest,
    find_variant,
    has_split,
    mirror_warning,
    open_manifest,
)
from galaxydist.loading.device_prefetch import DeviceFeed
from galaxydist.loading.loader import Batch, TrainReader
from galaxydist.models.build import build_model
from galaxydist.paths import data_root, weights_dir
from galaxydist.recipe.identity import run_path, to_dict
from galaxydist.recipe.resolve import ResolvedRecipe
from galaxydist.runs.folder import FailureKind, RunFolder
from galaxydist.runs.lock import RunLock, start_of
from galaxydist.runs.save_policy import SavePolicy
from galaxydist.shards.manifest import Manifest
from galaxydist.shards.remote.open import open_shards
from galaxydist.shards.verify import check_columns
from galaxydist.training.announcement import describe_end, describe_run, describe_time
from galaxydist.training.health.watchdog import build_watchdog, collective_timeout
from galaxydist.training.journal import Journal
from galaxydist.training.loop import Loop
from galaxydist.training.opening import OpenedFolder, open_run_folder
from galaxydist.training.out_of_memory import explained_out_of_memory, is_out_of_memory
from galaxydist.training.parts import Parts, build_parts, build_update, check_parts, check_passes
from galaxydist.training.profiling import StepProfiler
from galaxydist.training.saving import Saving
from galaxydist.training.statistics import average_statistics
from galaxydist.training.stop_signals import StopFlag, signal_name
from galaxydist.training.timing import StepTimer
from galaxydist.training.tracking import Tracker, complete_tracker, start_tracker


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
    world = enter_world(config.precision, environ, timeout=timeout, threads=config.threads)
    try:
        stop_signal = Session(resolved, world, environ).run()
        # Nobody leaves while another still closes its files: a launcher may end the ranks that are a moment behind.
        world.together(lambda: None)
        return stop_signal
    finally:
        leave_world()


class Session:
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
        self.world.say(f"galaxydist: {processes}, {device}, {threads}, precision {precision}")
        path, cache = find_manifest(self.recipe.data, self.root), find_cache(self.recipe.data, self.root)
        manifest = self.world.together(lambda: open_manifest(path, cache, self.recipe, self.world.size))
        self._others = self.world.together(lambda: self._open_others(manifest))
        self.world.on_main(lambda: self._check_data(manifest))
        if warning := mirror_warning(manifest, self.recipe):
            self.world.say(warning)
        check_parts(self.recipe, self.world)
        torch.manual_seed(self.recipe.seed)
        model = self.world.together(lambda: self._build_model(manifest))
        check_passes(self.recipe, self.world, model)
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(StopFlag(speaks=self.world.is_main))
            opened = self.world.on_main(lambda: self._open_folder(stack, manifest))
            folder = RunFolder(opened.path)
            if self.recipe.train.threads == 0:
                self.world = keep_threads(self.world, opened.threads)
            set_flight_recorder(self.environ, folder.stacks_dir)
            if opened.is_over:
                self.world.say(f"{folder} is finished.")
                self._judge(folder, manifest, self.world.say)
                self._say_place(complete_tracker(self.world, self.recipe, folder, manifest, environ=self.environ))
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
        return build_model(config, manifest.num_classes, size, weights_dir=weights_dir(self.root), say=self.world.say)

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
            self.world.together(lambda: state.restore(self.world, found.tensors, found.state))
            self.world.say(f"continuing {folder} from step {state.step}")
        self.world.on_main(lambda: self._cut_back(folder, state.step))

    def _announce(self, parts: Parts, manifest: Manifest, folder: RunFolder) -> None:
        model, schedule = parts.strategy.model, parts.schedule
        self.world.say(describe_run(self.resolved, manifest, folder, model, schedule))
        estimate = describe_time(self.world, self.resolved, model, schedule, parts.micro_batch)
        if estimate is not None:
            self.world.say(estimate)

    def _say_place(self, place: str | None) -> None:
        """Rank 0: where the tracker keeps the run."""
        if place is not None:
            self.world.say(place)

    @staticmethod
    def _cut_back(folder: RunFolder, step: int) -> None:
        folder.metrics.cut_back(step)
        folder.timing.cut_back(step)

    def _train(self, parts: Parts, manifest: Manifest, folder: RunFolder, tracker: Tracker, stop: StopFlag) -> int:
        world, state = self.world, parts.state
        exit_code = 1
        summary: dict[str, float] = {}
        try:
            stop_signal = self._loop(parts, manifest, folder, tracker, stop) or max(world.gather(stop.signal_number))
            if stop_signal:
                saved = "which is saved" if state.step else "with nothing to save yet"
                world.say(f"stopped by {signal_name(stop_signal)} at step {state.step}, {saved}; the same command continues it")
                return stop_signal
            stop.close()  # nothing is lost any more: a restart evaluates again
            results: list[str] = []
            metrics = self._judge(folder, manifest, results.append)
            summary = {f"test/{name}": metrics[name] for name in ("accuracy", "balanced_accuracy", "loss")} if metrics else {}
            summary |= {**state.skipped.metrics(), **state.nonfinite.metrics()}
            world.on_main(lambda: folder.write_result({"step": state.step, **summary}))
            exit_code = 0
            for text in (*results, describe_end(folder)):
                world.say(text)
        except Exception as error:
            self._note_failure(folder, state.step, error)
            raise
        finally:
            self._say_place(tracker.finish(summary, exit_code))
        return 0

    def _judge(self, folder: RunFolder, manifest: Manifest, say: Callable[[str], None]) -> dict[str, Any] | None:
        """The evaluation on the run's own test split; those of eval.variants are written beside it."""
        judge = Judge(self.world, folder, self.recipe, find_trained=lambda _: manifest, say=say)
        metrics = judge.judge(manifest, "test")
        for other in self._others:
            judge.judge(other, "test")
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
        text = (str(error).splitlines() or [type(error).__name__])[0]
        with contextlib.suppress(OSError, UserError):  # the disk may be what failed
            folder.write_failure(kind, step, text, start=start_of(self.environ))

    def _loop(self, parts: Parts, manifest: Manifest, folder: RunFolder, tracker: Tracker, stop: StopFlag) -> int:
        """Train from where the state is; the signal that stopped it, or 0. When it returns, the last checkpoint is whole."""
        world, config, state = self.world, self.recipe.train, parts.state
        timer = StepTimer(world.device, batch_size=config.batch_size, world_size=world.size)
        with contextlib.ExitStack() as stack:
            reader = stack.enter_context(world.together(lambda: self._open_reader(manifest, state.step)))
            batches = stack.enter_context(DeviceFeed(reader, world.device))
            watch = stack.enter_context(build_watchdog(world, config, folder))
            saving = stack.enter_context(self._build_saving(parts, manifest, folder))
            journal = stack.enter_context(
                Journal(
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
            profiler = stack.enter_context(
                StepProfiler(config.profile, folder.path, world.rank, start_step=state.step, say=journal.say)
            )
            validate = functools.partial(self._validate, parts, manifest, lambda: watch.beat(state.step, "validation"))
            loop = Loop(
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

    def _build_saving(self, parts: Parts, manifest: Manifest, folder: RunFolder) -> Saving:
        config, schedule = self.recipe.train, parts.schedule
        data = TrainingData.of(manifest, self.recipe).to_dict()
        return Saving(
            self.world,
            folder,
            self._lock,
            parts.state,
            strategy=parts.strategy,
            policy=SavePolicy(schedule.steps_per_epoch, schedule.total_steps, config.save_steps, config.save_every),
            context={"data": data, "order_version": self.recipe.order_version, "recipe": to_dict(self.recipe)},
            config=config,
            clock=time.monotonic,
        )

    def _open_reader(self, manifest: Manifest, start_step: int) -> contextlib.AbstractContextManager[Iterator[Batch]]:
        data = self.recipe.data
        return TrainReader(
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
