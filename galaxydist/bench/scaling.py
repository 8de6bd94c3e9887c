"""``galaxydist bench scaling``: images per second of one process and of several, each on its own core.

The measuring processes run ``python -m galaxydist.cli.bench JSON`` with the variables of a launcher.
"""

import contextlib
import dataclasses
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from galaxydist.bench.common import run_together, show, show_json, spread
from galaxydist.bench.in_memory import MemoryTrainer, write_noise, write_recipe
from galaxydist.cpus import bound_cores
from galaxydist.distributed import open_world
from galaxydist.errors import UserError
from galaxydist.recipe.resolve import load_recipe
from galaxydist.training.local_launcher import free_port

# Steps before the clock starts, which set up memory and connections, and steps after it, in which the run stops.
WARM_STEPS, LAST_STEPS = 3, 3


@dataclass(frozen=True)
class ScalingJob:
    """Work of one measuring process.

    Args:
        arguments: the recipe of the run, whose folder is new.
        steps: number of timed steps.
        num_images: in all of them, over all processes.
        cores: processes are bound to one each.
    """

    arguments: tuple[str, ...]
    steps: int
    num_images: int
    cores: tuple[int, ...]


@dataclass
class StepClock:
    """Times ``steps`` steps after the first ones; called before each step."""

    device: torch.device
    steps: int
    times: list[float] = field(default_factory=list)

    def __call__(self, step: int) -> bool:
        if step in (WARM_STEPS, WARM_STEPS + self.steps):
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.times.append(time.perf_counter())
        return step >= WARM_STEPS + self.steps


def train_in_memory(job: ScalingJob, environ: MutableMapping[str, str]) -> dict[str, Any]:
    """Train on images in memory; return the speed, and the number of processes and threads that took part."""
    with open_world("auto", environ) as world:
        clock = StepClock(world.device, job.steps)
        with contextlib.redirect_stdout(io.StringIO()) as quiet, contextlib.redirect_stderr(quiet):
            MemoryTrainer(load_recipe(job.arguments), world, environ, lambda _trainer: clock).run()
        threads = max(world.all_gather(torch.get_num_threads()))
    seconds = clock.times[1] - clock.times[0]
    return {
        "images_per_s": job.num_images / seconds,
        "world_size": world.size,
        "device": world.device.type,
        "threads": threads,
    }


def main(text: str, environ: MutableMapping[str, str]) -> int:
    """Do a job given as JSON, and print the result on rank 0; return 0, or 2 for an error that the user can mend."""
    job = ScalingJob(**json.loads(text))
    os.sched_setaffinity(0, {job.cores[int(environ["LOCAL_RANK"]) % len(job.cores)]})
    is_first = environ["RANK"] == "0"
    try:
        answer = train_in_memory(job, environ)
    except UserError as error:
        if is_first:
            sys.stderr.write(f"galaxydist: error: {error}\n")
        return 2
    if is_first:
        sys.stdout.write(f"{json.dumps(answer)}\n")
    return 0


def measure_scaling(
    environ: Mapping[str, str],
    *,
    processes: int = 2,
    model: str = "resnet18",
    image_size: int = 64,
    batch_size: int = 32,
    steps: int = 20,
    rounds: int = 3,
) -> dict[str, Any]:
    """Print a line and, last, a line of JSON.

    Args:
        environ: environment variables of the processes.
        processes: number that is compared with one.
        model: name in the recipe.
        image_size: width of the images in pixels.
        batch_size: of each process.
        steps: number of timed steps in each round.
        rounds: number of runs of each; their medians are reported.

    Returns:
        The content of the line of JSON.

    Raises:
        UserError: fewer GPUs than processes, or a training run that failed, which has printed the reason.
        AssertionError: the number of processes in a run is not the one asked for.
    """
    gpus = torch.cuda.device_count()
    if 0 < gpus < processes:
        raise UserError(f"--processes {processes} is more than the {gpus} GPUs here; CUDA_VISIBLE_DEVICES= measures on the CPU")
    cores = tuple(sorted(bound_cores()))
    speeds: dict[int, list[float]] = {1: [], processes: []}
    answers: list[dict[str, Any]] = []
    bar = tqdm(total=rounds * len(speeds), desc="measuring", unit="run", disable=None, leave=False)
    with tempfile.TemporaryDirectory(prefix="galaxydist-bench-") as name, bar:
        num_images = (WARM_STEPS + steps + LAST_STEPS) * processes * batch_size
        settings = {
            "data.image_size": image_size,
            "train.epochs": 1,
            "data.manifest": write_noise(Path(name) / "shards", num_images),
        }
        for number in range(rounds):
            for size, found in speeds.items():
                changes = {"train.batch_size": size * batch_size, "run.dir": Path(name) / f"run-{number}-{size}"}
                arguments = tuple(write_recipe(Path(name), model, {**settings, **changes}))
                answers.append(_run(ScalingJob(arguments, steps, steps * size * batch_size, cores), size, environ))
                assert answers[-1]["world_size"] == size, f"{answers[-1]['world_size']} processes ran instead of {size}"
                found.append(answers[-1]["images_per_s"])
                bar.update()
    ratios = [many / one for one, many in zip(speeds[1], speeds[processes], strict=True)]
    result: dict[str, Any] = {
        "task": "scaling",
        "model": model,
        "processes": processes,
        "image_size": image_size,
        "batch_size": batch_size,
        "steps": steps,
        "rounds": rounds,
        "world_sizes": sorted({answer["world_size"] for answer in answers}),
        "cores": len(cores),
        "one": median(speeds[1]),
        "several": median(speeds[processes]),
        "ratio": median(ratios),
        "ratio_least": min(ratios),
        "ratio_greatest": max(ratios),
        "device": answers[0]["device"],
        "threads": max(answer["threads"] for answer in answers),
    }
    shared = "" if processes <= len(cores) else f" (sharing {len(cores)} cores)"
    show(
        f"{model}, {image_size} px, batches of {batch_size} per process, {result['device']}, "
        f"{result['threads']} thread each: 1 process {result['one']:,.0f} img/s, {processes} processes "
        f"{result['several']:,.0f} img/s{shared}; ratio {spread(ratios)}"
    )
    show_json(result)
    return result


def _run(job: ScalingJob, size: int, environ: Mapping[str, str]) -> dict[str, Any]:
    """Train with ``size`` processes; return the result of rank 0."""
    command = [sys.executable, "-m", "galaxydist.cli.bench", json.dumps(dataclasses.asdict(job))]
    # The BLAS and OpenMP pools of a process are made when it starts.
    common = {**environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
    answer: dict[str, Any] = run_together([command] * size, ranks)[0]
    return answer
