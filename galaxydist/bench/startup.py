"""``galaxydist bench startup``: time from the start of ``launch.py`` to its first step."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from tqdm import tqdm

from galaxydist.bench.common import Lap, show, show_json
from galaxydist.bench.loader_speed import simulated_shards
from galaxydist.checkpoints import store
from galaxydist.cpus import available_cores
from galaxydist.errors import UserError
from galaxydist.paths import PACKAGE_DIR
from galaxydist.runs.folder import RunFolder
from galaxydist.runs.metrics_file import read_tail

LAUNCH = PACKAGE_DIR.parent / "launch.py"
# The content of launch.py, for an installed package without it.
LAUNCH_CODE = "import os, sys; from galaxydist.cli.train import main; sys.exit(main(sys.argv[1:], os.environ))"
# Exit codes of a run that was preempted or has finished.
GOOD_CODES = (75, 0)
POLL_S = 0.005
PATIENCE_S = 300.0


@dataclass(frozen=True)
class Launch:
    """Command of the measured runs.

    Args:
        arguments: of launch.py, without the run folder.
        environ: environment variables.
        log: file for the output of the runs.
    """

    arguments: Sequence[str]
    environ: Mapping[str, str]
    log: Path

    def time_to(self, step: int, run_dir: Path) -> Lap:
        """Return the time from the start of a process to the line of a step in the run's metrics; then stop the run.

        Raises:
            UserError: the run ended before the step or failed to stop; the error names its log.
        """
        launcher = [str(LAUNCH)] if LAUNCH.is_file() else ["-c", LAUNCH_CODE]
        command = [sys.executable, *launcher, *self.arguments, f"run.dir={run_dir}"]
        with self.log.open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=dict(self.environ))
        try:
            started = time.perf_counter()
            while last_step(run_dir) < step:
                if process.poll() is not None or time.perf_counter() - started > PATIENCE_S:
                    raise UserError(f"the training run did not reach step {step}: see {self.log}")
                time.sleep(POLL_S)
            used = psutil.Process(process.pid).cpu_times()
            start = Lap(time.perf_counter() - started, used.user + used.system)
            process.send_signal(signal.SIGTERM)
            if process.wait(PATIENCE_S) not in GOOD_CODES:
                raise UserError(f"the training run failed when it was stopped: see {self.log}")
        finally:
            process.kill()
            process.wait()
        return start


def last_step(run_dir: Path) -> int:
    """Return the step of the last complete line of metrics.jsonl; 0 if there is none."""
    lines = read_tail(RunFolder(run_dir).metrics_path)
    return int(json.loads(lines[-1])["step"]) if lines else 0


def measure_startup(
    root: Path,
    environ: Mapping[str, str],
    *,
    recipe: str = "demo",
    num_galaxies: int = 300,
    step: int = 3,
    rounds: int = 5,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Print a line and, last, a line of JSON.

    Args:
        root: folder of the benchmark's files; the shards are kept for the next time.
        environ: environment variables of the runs.
        recipe: name of the recipe.
        num_galaxies: of the simulated survey.
        step: after which the continued run is saved, at once or soon after.
        rounds: number of starts of each kind; their medians are reported. The run that is saved before them warms the caches.
        overrides: further ``key=value`` of the recipe.

    Returns:
        The content of the line of JSON.

    Raises:
        UserError: a run failed; the error names the log.
    """
    manifest = simulated_shards(root, num_galaxies)
    arguments = [f"recipe={recipe}", f"data.manifest={manifest.path}", "train.log_every=1", *overrides]
    launch = Launch(arguments, environ, root / "launch.log")
    launch.log.unlink(missing_ok=True)
    runs = root / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    runs.mkdir()
    fresh: list[Lap] = []
    resumed: list[Lap] = []
    with tqdm(total=2 * rounds, desc="measuring", unit="run", disable=None, leave=False) as bar:
        launch.time_to(step, runs / "saved")
        saved = store.load(RunFolder(runs / "saved").checkpoints_dir, groups=())
        assert saved is not None, "a stopped run has a checkpoint"
        saved_step = int(saved.state["progress"]["step"])
        for _ in range(rounds):
            fresh.append(launch.time_to(1, runs / "fresh"))
            shutil.copytree(runs / "saved", runs / "resumed")
            # Lines after the checkpoint would be taken for those of the continued run.
            RunFolder(runs / "resumed").metrics.cut_back(saved_step)
            resumed.append(launch.time_to(saved_step + 1, runs / "resumed"))
            for name in ("fresh", "resumed"):
                shutil.rmtree(runs / name)
            bar.update(2)
    shutil.rmtree(runs)
    result: dict[str, Any] = {
        "task": "startup",
        "recipe": recipe,
        "fresh_s": median(start.wall_s for start in fresh),
        "fresh_least_s": min(start.wall_s for start in fresh),
        "fresh_cpu_s": median(start.cpu_s for start in fresh),
        "resume_s": median(start.wall_s for start in resumed),
        "resume_least_s": min(start.wall_s for start in resumed),
        "resume_cpu_s": median(start.cpu_s for start in resumed),
        "difference_s": median(after.wall_s - before.wall_s for before, after in zip(fresh, resumed, strict=True)),
        "step": saved_step,
        "galaxies": num_galaxies,
        "rounds": rounds,
        "cores": available_cores(),
    }
    show(
        f"launch.py recipe={recipe}, from the start of the process to the first step in metrics.jsonl, medians of {rounds} "
        f"(least; CPU time): {result['fresh_s']:.2f} s in a new folder ({result['fresh_least_s']:.2f}; "
        f"{result['fresh_cpu_s']:.2f}), {result['resume_s']:.2f} s continued from step {saved_step} "
        f"({result['resume_least_s']:.2f}; {result['resume_cpu_s']:.2f}); difference {result['difference_s']:+.2f} s"
    )
    show_json(result)
    return result
