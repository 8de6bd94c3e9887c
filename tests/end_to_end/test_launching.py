"""Every recipe through the real trainer, and every core through the real launcher."""

import os
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from galaxydist.recipe.resolve import list_recipes
from tests.helpers.runs import ACCELERATE, LAUNCH, quick_settings, read_losses, run_here

# The other networks are of the same blocks; each takes a step in tests/models/test_build.py or tests/models/test_reference.py.
# custom_cnn is trained by most tests, demo by `make demo`, and reference/vit by tests/models/test_reference.py.
IN_CI = ["d4_cnn", "resnet18", "vgg16", "vit", "reference/custom_cnn", "reference/resnet18"]
# The description of this model is on the Hub; tests/recipe/test_recipe_files.py builds and trains it.
NAMES = sorted({*list_recipes()} - {"zoobot_convnext_nano"})


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in IN_CI else pytest.mark.nightly) for name in NAMES],
)
def test_every_recipe_trains_two_steps_and_is_evaluated(name: str, blobs: Path, tmp_path: Path) -> None:
    # 72 training galaxies in batches of 36, at the smallest size that all architectures take; no weights can be had here.
    changes = {"recipe": name, "model__width": None, "model__pretrained": "false", "train__batch_size": 36, "train__epochs": 1}
    changes |= {"train__log_every": 1, "optim__lr": None, "data__crop": 1.0, "model__freeze_backbone": "false"}
    changes |= {"eval__tta": "none"}
    if name == "reference/vit":
        changes["data__image_size"] = 50  # of patches of 25 pixels
    assert run_here(quick_settings(blobs, tmp_path / "run", **changes)) == 0
    losses = read_losses(tmp_path / "run")
    assert list(losses) == [1, 2] and all(0 < loss < 20 for loss in losses.values())
    assert (tmp_path / "run" / "evaluation" / "test.json").exists()


@pytest.mark.slow
def test_run_with_omp_num_threads_1_of_accelerate_still_computes_on_two_cores(blobs: Path, tmp_path: Path) -> None:
    """Launchers set OMP_NUM_THREADS=1. How the threads share their work does not depend on what else the machine does."""
    if (os.cpu_count() or 1) < 2:
        pytest.skip("this machine has one core")
    settings = quick_settings(blobs, tmp_path / "run", data__image_size=64, model__width=32, train__epochs=100)
    # A worker of the test run keeps to one core; this run gets all.
    cores = ["taskset", "--cpu-list", f"0-{(os.cpu_count() or 1) - 1}"]
    command = [*cores, *ACCELERATE, "--num_processes", "1", "--num_machines", "1", str(LAUNCH), *settings]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    children: list[psutil.Process] = []
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and not metrics.exists():
            time.sleep(0.1)
        children = psutil.Process(launcher.pid).children(recursive=True)
        trainer = next(child for child in children if str(LAUNCH) in child.cmdline())
        before = {thread.id: thread.user_time for thread in trainer.threads()}
        while time.monotonic() < deadline and sum(_worked(trainer, before)) < 4:
            time.sleep(0.1)
        busiest, second, *_ = _worked(trainer, before)
        assert second > 0.4 * busiest
    finally:
        for process in [*children, launcher]:
            process.kill()
        launcher.wait()
        psutil.wait_procs(children)


def _worked(process: psutil.Process, before: dict[int, float]) -> list[float]:
    """Processor seconds of each thread since ``before``, most first."""
    return sorted((thread.user_time - before.get(thread.id, 0.0) for thread in process.threads()), reverse=True)
