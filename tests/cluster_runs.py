"""Runs on the real SLURM of the tests: sent as a user sends them, watched through their folders."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bed import Bed

from galaxydist.cluster.records import JobFiles, RestartRecord
from galaxydist.recipe.paths import PACKAGE_DIR
from galaxydist.runs import checkpoints
from tests.runs import quick_settings
from tests.slurm_bed import wait_for

PROFILE = """partition: low
nodes: 2
cpus_per_task: 1
memory: 1.5
time: 10
signal_s: 30
"""


class ClusterRun:
    """One run on a bed.

    Args:
        bed: the SLURM.
        folder: an empty folder to give commands in.
        manifest: of the shards.
        changes: keys of the recipe, with ``__`` for the dot.
    """

    def __init__(self, bed: Bed, folder: Path, manifest: Path, **changes: object) -> None:
        self.bed, self.folder = bed, folder
        self.run_dir = folder / "run"
        profiles = folder / "slurm" / "clusters"
        profiles.mkdir(parents=True)
        (profiles / "bed.yaml").write_text(PROFILE)
        slow = {"train__epochs": 60, "train__save_every": 10, "eval__every": 10, "model__drop_rate": 0.1, "train__ema": 0.9}
        self.arguments = quick_settings(manifest, self.run_dir, **{**slow, **changes})
        self.files = JobFiles(self.run_dir)

    def galaxydist(self, *words: str, code: Path = PACKAGE_DIR.parent) -> subprocess.CompletedProcess[str]:
        """A command, as on a login node; ``code``: the folder of the package."""
        environ = {**self.bed.environ(), "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"}
        for name in ("PYTEST_CURRENT_TEST", "PYTEST_XDIST_WORKER"):
            environ.pop(name, None)
        command = [sys.executable, "-P", "-m", "galaxydist.cli.main", *words]
        return subprocess.run(command, cwd=self.folder, env=environ, capture_output=True, text=True, timeout=240, check=False)

    def submit(self, *words: str, code: Path = PACKAGE_DIR.parent) -> str:
        """``galaxydist submit``; the job's id."""
        answer = self.galaxydist("submit", *self.arguments, "cluster=bed", *words, code=code)
        assert answer.returncode == 0, answer.stderr
        return self.files.jobs()[-1].job_id

    @property
    def step(self) -> int:
        """The newest step that the metrics show."""
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return int(json.loads(lines[-1])["step"]) if lines else 0

    @property
    def is_finished(self) -> bool:
        return (self.run_dir / "result.json").exists()

    def wait_step(self, step: int, timeout_s: float = 150) -> None:
        """Until the run is past a step, but not finished."""
        wait_for(lambda: self.step >= step or self.is_finished, timeout_s, f"step {step}: {self.said()}")
        assert not self.is_finished, "the run was finished before it could be disturbed"

    def wait_finished(self, timeout_s: float = 240) -> None:
        def look() -> bool:
            last = self.files.restarts()[-1:]
            assert not last or last[0].decision != "stop", last
            return self.is_finished

        wait_for(look, timeout_s, "the end of the run")

    def wait_restarts(self, number: int, timeout_s: float = 150) -> list[RestartRecord]:
        """Until so many starts have ended."""
        return wait_for(
            lambda: found if len(found := self.files.restarts()) >= number else [], timeout_s, f"{number} endings: {self.said()}"
        )

    def said(self) -> str:
        """The last words of all logs, for a failure's message."""
        logs = [*self.files.rank_logs(), *sorted(self.files.slurm_dir.glob("*log.*"))]
        return "\n".join(f"{path.name}: {path.read_text()[-600:]}" for path in logs)

    def result(self) -> tuple[dict[str, torch.Tensor], dict[str, Any], str]:
        """Tensors and state of the last checkpoint, and metrics.jsonl."""
        found = checkpoints.load(self.run_dir / "checkpoints")
        assert found is not None
        state = {key: value for key, value in found.state.items() if key not in ("recipe", "versions")}
        return dict(found.tensors), state, (self.run_dir / "metrics.jsonl").read_text()

    def log(self, rank: int) -> str:
        """Return the text that a rank has printed."""
        path = self.files.rank_log(rank)
        return path.read_text() if path.exists() else ""

    def pids(self, node: str) -> list[int]:
        """The processes of this run that train on a node."""
        lines = self.bed.job_processes(node)
        ours = [pid for pid, line in lines.items() if "galaxydist.cluster.task" in line and str(self.files.slurm_dir) in line]
        return [pid for pid in ours if "srun" not in lines[pid].split()[0]]


def assert_equal_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert ours.keys() == theirs.keys()
    differing = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not differing, differing


def decisions(records: Sequence[RestartRecord]) -> list[str]:
    return [record.decision for record in records]


def environ_without_slurm() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
