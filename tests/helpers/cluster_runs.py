"""Runs on the real SLURM of the tests: sent as a user sends them, watched through their folders."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import chdir, suppress
from pathlib import Path
from typing import Any

import torch
from mini_cluster import MiniCluster

from galaxydist.checkpoints import store
from galaxydist.cluster.records import JobFiles, RestartRecord
from tests.helpers.forked_runs import run_forked, train
from tests.helpers.mini_cluster import wait_for
from tests.helpers.runs import quick_settings

PROFILE = """partition: low
nodes: 2
cpus_per_task: 1
memory: 1.5
time: 10
signal_s: 30
"""


def command(folder: Path, words: Sequence[str]) -> int:
    """``galaxydist`` in a folder; what sends jobs does not tell them of pytest."""
    from galaxydist.cli.main import main

    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        del os.environ[name]
    with chdir(folder):
        return main(words)


class ClusterRun:
    """One run on a mini cluster.

    Args:
        slurm: the mini cluster.
        folder: an empty folder to give commands in.
        manifest: of the shards.
        changes: keys of the recipe, with ``__`` for the dot.
    """

    def __init__(self, slurm: MiniCluster, folder: Path, manifest: Path, **changes: object) -> None:
        self.slurm, self.folder = slurm, folder
        self.run_dir = folder / "run"
        profiles = folder / "slurm" / "clusters"
        profiles.mkdir(parents=True)
        (profiles / "mini.yaml").write_text(PROFILE)
        slow = {"train__epochs": 40, "train__save_every": 5, "eval__every": 10, "model__drop_rate": 0.1, "train__ema": 0.9}
        self.arguments = quick_settings(manifest, self.run_dir, **{**slow, **changes})
        self.files = JobFiles(self.run_dir)

    def galaxydist(self, *words: str, code: Path | None = None) -> subprocess.CompletedProcess[str]:
        """A command, as on a login node; ``code``: the folder of a package, for an interpreter of its own."""
        ours = {"SLURM_CONF": str(self.slurm.conf), "WANDB_SILENT": "true"}
        if code is None:
            return run_forked(command, self.folder, words, environ=ours)
        environ = {**self.slurm.environ(), **ours, "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
        line = [sys.executable, "-P", "-m", "galaxydist.cli.main", *words]
        return subprocess.run(line, cwd=self.folder, env=environ, capture_output=True, text=True, timeout=300, check=False)

    def train_here(self, size: int) -> None:
        """The whole run without SLURM, by so many processes, each with as many threads as the profile gives it cores."""
        done = run_forked(train, [*self.arguments, "train.threads=1"], size=size)
        assert done.returncode == 0, done.stderr

    def submit(self, *words: str, code: Path | None = None) -> str:
        """``galaxydist submit``; the job's id."""
        answer = self.galaxydist("submit", *self.arguments, "cluster=mini", *words, code=code)
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

    def wait_step(self, step: int) -> None:
        """Until the run is past a step, but not finished."""
        wait_for(lambda: self.step >= step or self.is_finished, lambda: f"step {step}: {self.said()}", longest_pause_s=0.05)
        assert not self.is_finished, "the run was finished before it could be disturbed"

    def wait_finished(self) -> None:
        def look() -> bool:
            last = self.files.restarts()[-1:]
            assert not last or last[0].decision != "stop", last
            return self.is_finished

        wait_for(look, lambda: f"the end of the run: {self.said()}")

    def wait_restarts(self, number: int) -> list[RestartRecord]:
        """Until so many starts have ended."""
        return wait_for(
            lambda: found if len(found := self.files.restarts()) >= number else [], lambda: f"{number} endings: {self.said()}"
        )

    def wait_said(self, words: str) -> None:
        """Until rank 0 has printed them."""
        wait_for(lambda: words in self.log(0), lambda: f"{words!r}: {self.said()}", longest_pause_s=0.05)

    def said(self) -> str:
        """The last words of all logs, for a failure's message."""
        logs = [*self.files.rank_logs(), *sorted(self.files.slurm_dir.glob("*log.*"))]
        return "\n".join(f"{path.name}: {path.read_text()[-600:]}" for path in logs)

    def result(self) -> tuple[dict[str, torch.Tensor], dict[str, Any], str]:
        """Tensors and state of the last checkpoint, and metrics.jsonl with validation.jsonl."""
        found = store.load(self.run_dir / "checkpoints")
        assert found is not None
        state = {key: value for key, value in found.state.items() if key not in ("recipe", "versions")}
        logs = [(self.run_dir / name).read_text() for name in ("metrics.jsonl", "validation.jsonl")]
        return dict(found.tensors), state, "\n".join(logs)

    def log(self, rank: int) -> str:
        """Return the text that a rank has printed."""
        path = self.files.rank_log(rank)
        return path.read_text() if path.exists() else ""

    def hold(self) -> list[int]:
        """Stop all ranks where they are, so that they do not come to the end before they are disturbed; see ``go_on``."""
        found = [pid for node in self.slurm.nodes for pid in self.pids(node)]
        hold(found)
        return found

    def pids(self, node: str) -> list[int]:
        """The processes of this run that train on a node."""
        return find_ranks(self.slurm, node, self.files.slurm_dir)


def find_ranks(slurm: MiniCluster, node: str, folder: Path) -> list[int]:
    """The processes that train on a node, of the submission whose files lie below a folder."""
    lines = slurm.job_processes(node)
    ours = [pid for pid, line in lines.items() if "galaxydist.cluster.task" in line and str(folder) in line]
    return [pid for pid in ours if "srun" not in lines[pid].split()[0]]


def hold(pids: Sequence[int]) -> None:
    """Stop processes where they are, those that live."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: all(read_process(pid).get("State", "T").startswith(("T", "Z")) for pid in pids), "stopped processes")


def is_training(run_dir: Path) -> bool:
    """It trains, and has not come to its end."""
    ends = ("result.json", "pruned.json")
    return (run_dir / "metrics.jsonl").exists() and not any((run_dir / name).exists() for name in ends)


def hold_trial(slurm: MiniCluster, jobs: Mapping[str, Path], *nodes: str, others: Sequence[str] = ()) -> tuple[str, list[int]]:
    """A trial of these nodes that trains, and its process, which is stopped: so it can be disturbed before its end.

    Args:
        slurm: the mini cluster.
        jobs: run folders by the job's number.
        nodes: to look at.
        others: which it shall not be.
    """

    def look() -> tuple[str, list[int]] | None:
        for node in nodes:
            ids = slurm.run("squeue", "-h", "-r", "-t", "RUNNING", "-w", node, "-o", "%i").split()
            for job in [job for job in ids if job in jobs and job not in others and is_training(jobs[job])]:
                pids = find_ranks(slurm, node, jobs[job].parent)
                hold(pids)
                if pids and is_training(jobs[job]):
                    return job, pids
                for pid in pids:
                    os.kill(pid, signal.SIGCONT)
        return None

    found = wait_for(look, "a trial that trains", longest_pause_s=0.1)
    assert found is not None
    return found


def go_on(pids: Sequence[int]) -> None:
    """Let ranks that were stopped go on once all have been told to save."""
    wait_for(lambda: all(is_told(pid) for pid in pids), "SIGUSR2")
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def is_told(pid: int) -> bool:
    """SIGUSR2 waits for a process that is stopped; or SLURM has let it go on itself, as it does before a preemption."""
    process = read_process(pid)
    pending = int(process.get("SigPnd", "0"), 16) | int(process.get("ShdPnd", "0"), 16)
    return bool(pending >> (signal.SIGUSR2 - 1) & 1) or not process.get("State", "").startswith("T")


def read_process(pid: int) -> dict[str, str]:
    """What Linux says of a process; nothing of one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def assert_equal_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert ours.keys() == theirs.keys()
    differing = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not differing, differing


def decisions(records: Sequence[RestartRecord]) -> list[str]:
    return [record.decision for record in records]
