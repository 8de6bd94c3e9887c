"""``galaxydist bench scaling``: images per second of one process and of several, each on a core of its own, in turn."""

import dataclasses
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from galaxydist.bench.in_memory import write_noise, write_recipe
from galaxydist.bench.scaling_worker import LAST_STEPS, WARM_STEPS, ScalingJob
from galaxydist.cpus import bound_cores
from galaxydist.errors import UserError
from galaxydist.training.processes import free_port

POLL_S, GRACE_S = 0.05, 20.0


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
        processes: how many are compared with one.
        model: name in the recipe.
        image_size: of the images, in pixels.
        batch_size: of each process.
        steps: that are timed, in each round.
        rounds: medians over them are given.

    Returns:
        What the line of JSON holds.

    Raises:
        UserError: fewer GPUs than processes; a training run that failed (it says why).
        AssertionError: not as many processes came together as were asked for.
    """
    gpus = torch.cuda.device_count()
    if 0 < gpus < processes:
        raise UserError(f"--processes {processes} is more than the {gpus} GPUs here; CUDA_VISIBLE_DEVICES= measures on the CPU")
    cores = sorted(bound_cores())
    settings: dict[str, object] = {"data.image_size": image_size, "train.epochs": 1}
    speeds: dict[int, list[float]] = {1: [], processes: []}
    answers: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="galaxydist-bench-") as name, _bar(rounds * len(speeds)) as bar:
        work_dir = Path(name)
        all_steps = WARM_STEPS + steps + LAST_STEPS
        settings["data.manifest"] = write_noise(work_dir / "shards", all_steps * processes * batch_size)
        for number in range(rounds):
            for size, found in speeds.items():
                settings |= {"train.batch_size": size * batch_size, "run.dir": work_dir / f"run-{number}-{size}"}
                arguments = write_recipe(work_dir, model, settings)
                job = ScalingJob(tuple(arguments), steps=steps, num_images=steps * size * batch_size, cores=tuple(cores))
                answer = _run(job, size, environ)
                assert answer["world_size"] == size, f"{size} processes were asked for, {answer['world_size']} came together"
                answers[answer["world_size"]] = answer
                found.append(answer["images_per_s"])
                bar.update()
    ratios = [many / one for one, many in zip(speeds[1], speeds[processes], strict=True)]
    result: dict[str, Any] = {"task": "scaling", "model": model, "processes": processes, "world_sizes": sorted(answers)}
    result |= {"one": statistics.median(speeds[1]), "several": statistics.median(speeds[processes])}
    result |= {"ratio": statistics.median(ratios), "ratio_least": min(ratios), "ratio_greatest": max(ratios)}
    result |= {"image_size": image_size, "batch_size": batch_size, "steps": steps, "rounds": rounds}
    result |= {"device": answer["device"], "threads": max(answer["threads"] for answer in answers.values()), "cores": len(cores)}
    _show(result)
    print(json.dumps({key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in result.items()}))
    return result


def _bar(total: int) -> Any:
    return tqdm(total=total, desc="measuring", unit="run", disable=None, leave=False)


def _run(job: ScalingJob, size: int, environ: Mapping[str, str]) -> dict[str, Any]:
    """Train by so many processes; what rank 0 answers."""
    command = [sys.executable, "-m", "galaxydist.cli.bench", json.dumps(dataclasses.asdict(job))]
    # The BLAS and OpenMP pools of a process are made when it starts.
    common = {**environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(size)
    ]
    deadline = math.inf
    try:
        while None in (codes := [process.poll() for process in processes]) and time.monotonic() < deadline:
            if any(codes):  # the others end too, and rank 0 says why
                deadline = min(deadline, time.monotonic() + GRACE_S)
            time.sleep(POLL_S)
        if codes != [0] * size:
            raise UserError(f"the training run by {size} processes failed: see above")
        answers = [process.communicate()[0].splitlines() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    answer: dict[str, Any] = json.loads(answers[0][-1])
    return answer


def _show(result: Mapping[str, Any]) -> None:
    shared = "" if result["processes"] <= result["cores"] else f" (they share {result['cores']} cores)"
    print(
        f"{result['model']}, {result['image_size']} px, batches of {result['batch_size']} a process, {result['device']}, "
        f"{result['threads']} thread each: 1 process {result['one']:,.0f} img/s, {result['processes']} processes "
        f"{result['several']:,.0f} img/s{shared}; ratio {result['ratio']:.3f} ({result['ratio_least']:.3f} ... "
        f"{result['ratio_greatest']:.3f})",
        flush=True,
    )
