"""Labelling of a whole source by the processes of a run: each galaxy exactly once, resumable on another number of processes."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from galaxydist.devices import uses_gpu
from galaxydist.distributed import World, open_world
from galaxydist.errors import UserError
from galaxydist.loading.device_prefetch import DevicePrefetcher, HostCopy
from galaxydist.loading.loader import Batch, Chunks, RankInfo
from galaxydist.prediction.chunk_files import CSV, PARQUET, Chunk, ChunkPlan, Output, WorkFolder
from galaxydist.prediction.image_form import ImageForm
from galaxydist.prediction.published_folder import open_model, read_model_recipe
from galaxydist.prediction.sources import PredictionSource, ReadSettings, ShardsToLabel, damage_of
from galaxydist.prediction.trained_model import ModelChoice, TrainedModel, precision_on
from galaxydist.rank_store import LONG_TIMEOUT
from galaxydist.shards.writer.writer import writer_lock

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelOptions:
    """Options of the predictions of a source.

    Args:
        choice: checkpoint and test-time augmentation.
        resize, rescale: as in ``ImageForm``.
        logits, top: columns of the output.
        overwrite: replace an existing output, and the beginning of other predictions.
    """

    choice: ModelChoice = field(default_factory=ModelChoice)
    resize: bool = False
    rescale: bool = False
    logits: bool = False
    top: int = 0
    overwrite: bool = False


@dataclass(frozen=True)
class Labelled:
    """Result of the predictions of a source.

    Args:
        galaxies, damaged: numbers of labelled galaxies, and of images that could not be read.
        rows_here, seconds: rows that this process labelled now, and the time it took.
        is_main: this process is rank 0.
    """

    galaxies: int
    damaged: int
    rows_here: int
    seconds: float
    is_main: bool

    def summary(self, out: Path) -> str:
        """Return the result for the terminal."""
        speed = f" at {self.rows_here / self.seconds:,.0f} img/s per process" if self.rows_here else ""
        lines = [f"{self.galaxies:,} galaxies labelled{speed}: {out}"]
        if self.damaged:
            listed = out.with_suffix(".damaged.csv")
            lines.append(f"left out as unreadable: {self.damaged:,}, listed in {listed}")
        return "\n".join(lines)


def label_source(
    run: Path,
    open_source: Callable[[], PredictionSource],
    out: Path,
    environ: MutableMapping[str, str],
    options: LabelOptions | None = None,
) -> Labelled:
    """Label all galaxies of a source with a run's model; every process of a launcher calls it.

    Finished chunks are kept beside the output until it is complete: after a kill, the same call continues on any number of
    processes. The output does not depend on the number of processes.

    Args:
        run: the run folder, or a published folder.
        open_source: opens the galaxies, on every process.
        out: the file to write, ``.csv`` or ``.parquet``.
        environ: the process's environment.
        options: columns, sizes and checkpoint.

    Returns:
        Numbers, the same on all processes but for ``rows_here``.

    Raises:
        UserError: there is no run; the output exists; images of another size or scale; no readable image; a full disk.
    """
    options = options or LabelOptions()
    recipe = read_model_recipe(run)
    precision = precision_on(recipe, has_gpu=uses_gpu(environ))
    # A process that has labelled its share waits for the others, whose images may lie on a slower disk.
    with open_world(precision, environ, timeout=LONG_TIMEOUT, threads=recipe.train.threads) as world:
        world.run_on_main(lambda: check_output(out, overwrite=options.overwrite))
        trained = world.run_on_all(lambda: open_model(run, environ, options.choice))
        if world.is_main:
            for note in trained.notes:
                logger.warning("%s", note)
        source = world.run_on_all(open_source)
        found = Labelling(world, trained, source, out, options).run()
        world.barrier()  # launchers kill ranks that outlive the first to exit
        return found


def check_output(out: Path, *, overwrite: bool) -> None:
    """Refuse an output that cannot be written.

    Raises:
        UserError: another ending, a missing folder, or an existing file without ``overwrite``.
    """
    if out.is_dir():
        raise UserError(f"-o {out} is a folder; give the name of a file, like {out / 'predictions.csv'}")
    if out.suffix not in (CSV, PARQUET):
        raise UserError(f"-o {out}: predictions are written as {CSV} or {PARQUET}; name it like {out.with_suffix(CSV)}")
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists already: give another -o, or --overwrite to replace it")
    if not out.absolute().parent.is_dir():
        raise UserError(f"there is no folder {out.absolute().parent} for {out.name}: make it first, or give another -o")


class Labelling:
    """Labels one source with one model; every process has one, and all call ``run`` together.

    Args:
        world: the processes.
        trained: the model, on the CPU.
        source: the galaxies.
        out: the file to write.
        options: columns and sizes.

    Raises:
        UserError: shards of another size or pixel scale; an empty source.
    """

    def __init__(self, world: World, trained: TrainedModel, source: PredictionSource, out: Path, options: LabelOptions) -> None:
        self.world, self.trained, self.source, self.options = world, trained, source, options
        recipe = trained.recipe
        self.form = ImageForm.of(trained.stored, recipe.data, resize=options.resize, rescale=options.rescale)
        self.plan = ChunkPlan.of(source, recipe.eval.batch_size)
        self.work = WorkFolder(out)
        self.output = Output(out, trained.class_names, trained.temperature, options.logits, options.top)
        if not self.plan.chunks:
            raise UserError(f"{source.location} has no galaxies")
        self._forward = trained.forward_on(world.device, world.precision, threads=world.cores)

    def run(self) -> Labelled:
        """Label what is left, and write the output on rank 0."""
        world, started = self.world, time.perf_counter()
        with ExitStack() as stack:
            todo, threads = world.run_on_main(lambda: self._begin(stack))
            if world.device.type == "cpu":
                torch.set_num_threads(threads)
            try:
                rows_here = world.run_on_all(lambda: self._label(todo[world.rank :: world.size], len(todo)))
            except UserError:
                if world.is_main and len(self.work.unfinished(self.plan)) == len(self.plan.chunks):
                    self.work.remove()  # nothing to continue from
                raise
            except KeyboardInterrupt:
                if world.is_main:
                    logger.warning("interrupted: %s holds what is labelled; the same command continues", self.work.path)
                raise
            seconds = time.perf_counter() - started
            counts = world.run_on_main(lambda: self.output.merge(self.work, self.plan, self.source, self._record()))
        return Labelled(counts["galaxies"], counts["damaged"], rows_here, seconds, is_main=world.is_main)

    def _begin(self, stack: ExitStack) -> tuple[list[Chunk], int]:
        """On rank 0, lock the work folder and return the chunks to label, and the number of torch's threads of each process."""
        if isinstance(self.source, ShardsToLabel):
            self.source.check(self.form, self.trained.trained_on.manifest_hash)
        stack.enter_context(writer_lock(self.work.path))
        threads = self.work.prepare(self._settings(), threads=self.world.threads, overwrite=self.options.overwrite)
        todo = self.work.unfinished(self.plan)
        if num_done := len(self.plan.chunks) - len(todo):
            logger.info("continuing: %d of %d chunks are labelled already", num_done, len(self.plan.chunks))
        return todo, threads

    def _settings(self) -> dict[str, Any]:
        """Return everything that the numbers in the chunks depend on."""
        return {**self._record(), "batch_size": self.plan.batch_size, "chunk_batches": self.plan.length}

    def _record(self) -> dict[str, Any]:
        world, form = self.world, self.form
        return {
            **self.trained.describe(),
            "source": self.source.describe(),
            "precision": world.precision,
            "device": world.device.type,
            "resize": form.resize,
            "rescale": form.rescale,
        }

    def _label(self, chunks: list[Chunk], num_todo: int) -> int:
        """Label chunks, and return the number of rows; leave early if another process fails."""
        world, num_rows = self.world, sum(chunk.stop - chunk.start for chunk in chunks)
        share = "" if world.size == 1 else f" (share of 1 of {min(world.size, num_todo)} processes)"
        try:
            with tqdm(total=num_rows, desc=f"labelling{share}", unit="img", disable=None if world.is_main else True) as bar:
                for part in self.source.parts:
                    own = {chunk.number_in_part: chunk for chunk in chunks if chunk.part == part}
                    if own and not self._label_part(part, own, bar):
                        break
        except BaseException:
            self.work.failure_path.touch()
            raise
        return num_rows

    @torch.inference_mode()
    def _label_part(self, part: str, chunks: Mapping[int, Chunk], bar: Any) -> bool:
        """Label chunks of one part; return False if another process has failed."""
        world = self.world
        reading = ReadSettings(
            chunks=Chunks(self.plan.length, np.array([*chunks], np.int64)),
            batch_size=self.plan.batch_size,
            form=self.form,
            data=self.trained.recipe.data,
            ranks=RankInfo(world.rank, world.size, world.ranks_on_node),
            threads=self.trained.recipe.data.threads or world.decode_threads,
            pin=world.device.type == "cuda",
        )
        # A chunk is written while the next one is labelled.
        with (
            self.source.open(part, reading) as loader,
            DevicePrefetcher(loader, world.device) as batches,
            ThreadPoolExecutor(1, thread_name_prefix="galaxydist-write") as executor,
        ):
            writing: Future[None] | None = None
            for number, batches_of_chunk in groupby(self._logits(batches, bar), lambda found: found[0].step):
                labelled = [*batches_of_chunk]
                if writing is not None:
                    writing.result()
                if world.size > 1 and self.work.failure_path.exists():
                    return False
                writing = executor.submit(self._write, chunks[number], labelled)
            if writing is not None:
                writing.result()
        return True

    def _logits(self, batches: Iterator[Batch], bar: Any) -> Iterator[tuple[Batch, HostCopy]]:
        """Yield batches without their images, and their logits."""
        for batch in batches:
            yield replace(batch, images_BHWC=torch.empty(0)), HostCopy(self._forward(batch.images_BHWC).float())
            bar.update(int((batch.samples_B >= 0).sum()))

    def _write(self, chunk: Chunk, labelled: list[tuple[Batch, HostCopy]]) -> None:
        damaged = {row: damage_of(error) for batch, _ in labelled for row, error in batch.errors.items()}
        rows = torch.cat([batch.samples_B for batch, _ in labelled]).numpy()
        logits_NK = torch.cat([copied.wait() for _, copied in labelled]).numpy()
        is_readable = (rows >= 0) & ~np.isin(rows, [*damaged])
        columns = self.source.take_columns(chunk.number_in_part)
        self.work.write(chunk, rows[is_readable], logits_NK[is_readable], columns, [*damaged.values()])
