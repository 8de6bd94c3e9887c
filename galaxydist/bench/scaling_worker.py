"""One process of ``galaxydist bench scaling``: the trainer's session on images in memory, on one core.

Run as ``python -m galaxydist.cli.bench JSON`` with the variables of a launcher; rank 0 prints a line of JSON last.
"""

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch

from galaxydist.bench.in_memory import MemorySession
from galaxydist.cpus import bound_cores
from galaxydist.distributed import init_distributed, shutdown_distributed
from galaxydist.errors import UserError
from galaxydist.recipe.resolve import load_recipe

# Steps before the clock starts, which set up memory and connections, and steps to stop in after it.
WARM_STEPS, LAST_STEPS = 3, 3


@dataclass(frozen=True)
class ScalingJob:
    """What a process does.

    Args:
        arguments: the recipe of the run, whose folder is new.
        steps: that are timed.
        num_images: in all of them, over all processes.
        cores: processes are bound to one each.
    """

    arguments: tuple[str, ...]
    steps: int
    num_images: int
    cores: tuple[int, ...]


@dataclass
class StepClock:
    """Takes the time of ``steps`` steps after the first ones; called before each step."""

    device: torch.device
    steps: int
    times: list[float] = field(default_factory=list)

    def __call__(self, step: int) -> bool:
        if step in (WARM_STEPS, WARM_STEPS + self.steps):
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.times.append(time.perf_counter())
        return step >= WARM_STEPS + self.steps

    @property
    def seconds(self) -> float:
        first, last = self.times
        return last - first


def train_in_memory(job: ScalingJob, environ: MutableMapping[str, str]) -> dict[str, Any]:
    """Train; how fast it went, by how many processes, on which cores."""
    world = init_distributed("auto", environ)
    clock = StepClock(world.device, job.steps)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as quiet, contextlib.redirect_stderr(quiet):
            MemorySession(load_recipe(job.arguments), world, environ, lambda _parts, _batches: clock).run()
        everywhere = world.all_gather((sorted(bound_cores()), torch.get_num_threads()))
    finally:
        shutdown_distributed()
    return {
        "images_per_s": job.num_images / clock.seconds,
        "world_size": world.size,
        "device": world.device.type,
        "cores": [cores for cores, _ in everywhere],
        "threads": max(threads for _, threads in everywhere),
    }


def main(text: str, environ: MutableMapping[str, str]) -> int:
    """Do the job; 0, or 2 for what the user must mend."""
    job = ScalingJob(**json.loads(text))
    os.sched_setaffinity(0, {job.cores[int(environ["LOCAL_RANK"]) % len(job.cores)]})
    try:
        answer = train_in_memory(job, environ)
    except UserError as error:
        if environ["RANK"] == "0":
            print(f"galaxydist: error: {error}", file=sys.stderr, flush=True)
        return 2
    if environ["RANK"] == "0":
        print(json.dumps(answer), flush=True)
    return 0
