"""Runs of launch.py for tests: settings of a few seconds, in this process or through a launcher, and what a run folder holds."""

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from galaxydist.cli.train import main
from galaxydist.runs.folder import RunFolder
from galaxydist.tracking.sink import Validation, validation_of

LAUNCH = Path(__file__).parents[2] / "launch.py"
PYTHON = (sys.executable,)
TORCHRUN_2 = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch")
ACCELERATE_2 = (*ACCELERATE, "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0")


def quick_settings(manifest: Path | str, run_dir: Path, **changes: object) -> list[str]:
    """A run of a few seconds on the blobs: 36 steps of 24 galaxies, no figures. ``changes`` name keys with ``__`` for the dot."""
    settings: dict[str, object] = {
        "recipe": "custom_cnn",
        "data.manifest": manifest,
        "run.dir": run_dir,
        "data.image_size": 32,
        "data.num_streams": 8,
        "model.width": 4,
        "train.batch_size": 24,
        "train.epochs": 12,
        "train.log_every": 2,
        "eval.batch_size": 7,
        "eval.figures": "false",
        "optim.lr": 0.01,
        "tracker.name": "none",
    }
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    return [f"{key}={value}" for key, value in settings.items() if value is not None]


def run_here(arguments: Sequence[str], environ: MutableMapping[str, str] | None = None) -> int:
    """launch.py in this process, as one process of one; the exit code. It may change ``environ``; None: a copy of this one's."""
    from accelerate.state import AcceleratorState, PartialState

    if environ is None:
        environ = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    try:
        return main(list(arguments), environ)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()


@contextmanager
def captured_log() -> Iterator[list[str]]:
    """The messages that the package logs inside, in a list that grows."""
    package, messages = logging.getLogger("galaxydist"), list[str]()
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    level = package.level
    package.setLevel(logging.INFO)
    package.addHandler(handler)
    try:
        yield messages
    finally:
        package.removeHandler(handler)
        package.setLevel(level)


@contextmanager
def without_figures() -> Iterator[None]:
    """Evaluations in this process draw nothing, as with ``eval.figures=false`` in training: figures take most of their time."""
    from galaxydist.evaluation import evaluator
    from galaxydist.evaluation.evaluator import Evaluator

    def build(*arguments: Any, **named: Any) -> Evaluator:
        return Evaluator(*arguments, **{**named, "figures": False})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator, "Evaluator", build)
        yield


def launch(launcher: tuple[str, ...], arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """launch.py under a launcher, to its end."""
    command = [*launcher, str(LAUNCH), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def count_errors(text: str) -> int:
    """Return the number of errors that a run has told. The copies that torch's launcher shows in its own report are indented."""
    return len(re.findall(r"(?m)^galaxydist: error\b", text))


def read_evaluation(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "evaluation" / "test.json").read_text())
    return found


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def read_validations(folder: RunFolder) -> list[Validation]:
    """Validations with their details, oldest first."""
    return [validation_of(line, folder) for line in folder.validations.read()]


def read_losses(run_dir: Path) -> dict[int, float]:
    """Training loss by step."""
    return {line["step"]: line["train/loss"] for line in read_metrics(run_dir) if "train/loss" in line}
