"""``galaxydist bench startup``: from the start of ``launch.py`` to its first step, fresh and from a checkpoint, in turn."""

import json
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from galaxydist.checkpoints import store
from galaxydist.cpus import available_cores
from galaxydist.errors import UserError
from galaxydist.paths import PACKAGE_DIR
from galaxydist.runs.folder import RunFolder
from galaxydist.shards.writer.writer import write_shards
from galaxydist.surveys.simulate.survey import SIMULATOR_VERSION, simulate_survey
from galaxydist.surveys.survey_sources import open_survey

LAUNCH = PACKAGE_DIR.parent / "launch.py"
# What launch.py does, where the package is installed without it.
LAUNCH_CODE = "import os, sys; from galaxydist.cli.train import main; sys.exit(main(sys.argv[1:], os.environ))"
# Exit codes of a run that was stopped in good order, or had come to its end.
GOOD_CODES = (75, 0)
POLL_S = 0.005
PATIENCE_S = 300.0


@dataclass(frozen=True)
class StartTime:
    """Seconds by the clock, and of the process's processor time, which other work on the machine changes less."""

    wall_s: float
    cpu_s: float


@dataclass(frozen=True)
class Launch:
    """How runs are started.

    Args:
        arguments: of launch.py, all but the run folder.
        environ: environment variables.
        log: what they print.
    """

    arguments: Sequence[str]
    environ: Mapping[str, str]
    log: Path

    def time_to(self, step: int, run_dir: Path) -> "StartTime":
        """From the start of a process to the line of a step in the run's metrics; then the run is stopped.

        Raises:
            UserError: it ended before, or did not end well; names its log.
        """
        with self._running(run_dir) as process:
            started = time.perf_counter()
            while last_step(run_dir) < step:
                if process.poll() is not None or time.perf_counter() - started > PATIENCE_S:
                    raise UserError(f"the training run did not come to step {step}: see {self.log}")
                time.sleep(POLL_S)
            used = psutil.Process(process.pid).cpu_times()
            start = StartTime(time.perf_counter() - started, used.user + used.system)
            process.send_signal(signal.SIGTERM)
            if process.wait(PATIENCE_S) not in GOOD_CODES:
                raise UserError(f"the training run did not stop well: see {self.log}")
        return start

    @contextmanager
    def _running(self, run_dir: Path) -> Iterator["subprocess.Popen[bytes]"]:
        front = [str(LAUNCH)] if LAUNCH.is_file() else ["-c", LAUNCH_CODE]
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *front, *self.arguments, f"run.dir={run_dir}"],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(self.environ),
            )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def last_step(run_dir: Path) -> int:
    """The step of the last whole line of metrics.jsonl; 0 where there is none."""
    path = RunFolder(run_dir).metrics_path
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return 0
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
        step: at which the run is saved that is continued, or soon after it.
        rounds: medians over them are given. The run that is saved before them warms up what all of them read.
        overrides: further ``key=value`` of the recipe.

    Returns:
        What the line of JSON holds.

    Raises:
        UserError: a run that failed; it names the log.
    """
    manifest = _simulated(root, num_galaxies)
    arguments = [f"recipe={recipe}", f"data.manifest={manifest}", "train.log_every=1", *overrides]
    launch = Launch(arguments, environ, root / "launch.log")
    launch.log.unlink(missing_ok=True)
    runs = root / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    runs.mkdir()
    fresh: list[StartTime] = []
    resumed: list[StartTime] = []
    with tqdm(total=2 * rounds, desc="measuring", unit="run", disable=None, leave=False) as bar:
        launch.time_to(step, runs / "saved")
        saved = store.load(RunFolder(runs / "saved").checkpoints_dir, groups=())
        assert saved is not None, "a run that is stopped is saved"
        saved_step = int(saved.state["progress"]["step"])
        for _ in range(rounds):
            fresh.append(launch.time_to(1, runs / "fresh"))
            shutil.copytree(runs / "saved", runs / "resumed")
            # What the run had written after its checkpoint is not the step that is waited for.
            RunFolder(runs / "resumed").metrics.cut_back(saved_step)
            resumed.append(launch.time_to(saved_step + 1, runs / "resumed"))
            for name in ("fresh", "resumed"):
                shutil.rmtree(runs / name)
            bar.update(2)
    shutil.rmtree(runs)
    result: dict[str, Any] = {"task": "startup", "recipe": recipe, **_medians(fresh, resumed)}
    result |= {"step": saved_step, "galaxies": num_galaxies, "rounds": rounds, "cores": available_cores()}
    _show(result)
    print(json.dumps({key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in result.items()}))
    return result


def _medians(fresh: Sequence[StartTime], resumed: Sequence[StartTime]) -> dict[str, float]:
    return {
        "fresh_s": statistics.median(start.wall_s for start in fresh),
        "resume_s": statistics.median(start.wall_s for start in resumed),
        "difference_s": statistics.median(after.wall_s - before.wall_s for before, after in zip(fresh, resumed, strict=True)),
        "fresh_least_s": min(start.wall_s for start in fresh),
        "resume_least_s": min(start.wall_s for start in resumed),
        "fresh_cpu_s": statistics.median(start.cpu_s for start in fresh),
        "resume_cpu_s": statistics.median(start.cpu_s for start in resumed),
    }


def _simulated(root: Path, num_galaxies: int) -> Path:
    """The manifest of a small simulated survey."""
    path = root / f"simulated-{SIMULATOR_VERSION}-{num_galaxies}.h5"
    if not path.exists():
        root.mkdir(parents=True, exist_ok=True)
        simulate_survey(path, num_galaxies, seed=1, balanced=True)
    return write_shards(open_survey(path), path.with_suffix("")).path


def _show(result: Mapping[str, Any]) -> None:
    print(
        f"launch.py recipe={result['recipe']}, from the start of the process until the first step is written down, medians of "
        f"{result['rounds']} (least; processor time): {result['fresh_s']:.2f} s in a new folder ({result['fresh_least_s']:.2f}; "
        f"{result['fresh_cpu_s']:.2f}), {result['resume_s']:.2f} s continued from step {result['step']} "
        f"({result['resume_least_s']:.2f}; {result['resume_cpu_s']:.2f}); difference {result['difference_s']:+.2f} s",
        flush=True,
    )
