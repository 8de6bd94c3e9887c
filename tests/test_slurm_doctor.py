"""The doctor on a real SLURM of two nodes: what a healthy one says, and what is said of nodes, queues and users that go wrong."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bed import Bed

from galaxydist.cluster.doctor.job import doctor_cluster
from galaxydist.cluster.profile import load_cluster
from tests.slurm_bed import job_state, processes_left, submit, wait_for, wait_state

pytestmark = [pytest.mark.slurm, pytest.mark.xdist_group("slurm"), pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[1]
TWO_NODES = ("cluster=cpu", "cluster.nodes=2", "cluster.tasks_per_node=1", "cluster.cpus_per_task=1", "cluster.memory=2")


def start(folder: Path, *options: str) -> "subprocess.Popen[str]":
    """``galaxydist doctor`` for two nodes of one rank each, its run folders in ``folder``."""
    command = [sys.executable, "-m", "galaxydist.cli.main", "doctor", *TWO_NODES, *options, "--json", "--run-root", str(folder)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}
    return subprocess.Popen(command, env=environ, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: "subprocess.Popen[str]") -> tuple[int, dict[str, dict[str, Any]], str]:
    """Its exit code, the checks of the cluster by name, and what it said beside them."""
    out, err = process.communicate(timeout=400)
    sections = json.loads(out)["sections"] if out else {}
    return process.returncode, {check["name"]: check for check in sections.get("cluster=cpu", [])}, err


def job_of(said: str) -> str:
    """The number in "job 7, 2 processes"."""
    return said.partition("job ")[2].partition(",")[0]


def test_two_healthy_nodes(slurm_bed: Bed, tmp_path: Path) -> None:
    code, checks, said = finish(start(tmp_path))
    assert code == 0, (checks, said)
    assert checks["ranks"]["text"] == "2 on n1, n2: all came to the end"
    assert checks["signal"]["level"] == "ok" and "SIGUSR2 from SLURM reached all ranks" in checks["signal"]["text"]
    # The bed's own settings: a grace of 15 s and preempt_send_user_signal.
    assert checks["preemption"]["level"] == "ok"
    assert checks["preemption"]["text"] == "partition low: SLURM sends SIGUSR2 15 s before it ends and requeues the job"
    assert "n1" in checks["interface"]["text"] and "n2" in checks["interface"]["text"]
    assert "asked for 1" in checks["cores a rank"]["text"]
    for name in ("versions", "rendezvous", "clocks", "shared files", "all-reduce, gloo", "flock there"):
        assert checks[name]["level"] == "ok", checks[name]
    wait_state(slurm_bed, job_of(said), "COMPLETED")
    assert "Requeue=0" in slurm_bed.run("scontrol", "show", "job", job_of(said))
    assert not processes_left(slurm_bed)


def test_gpus_that_slurm_gives_and_torch_does_not_see(slurm_bed: Bed, tmp_path: Path) -> None:
    """The bed's GPUs are pretended: SLURM sets CUDA_VISIBLE_DEVICES, but there is no device."""
    code, checks, _ = finish(start(tmp_path, "cluster.gpus_per_node=1", "cluster.interface=nosuch0"))
    assert code == 1
    assert checks["GPUs"]["level"] == checks["GPUs a rank"]["level"] == "failure"
    assert "nosuch0" in checks["interface"]["text"] and "nosuch0" in checks["all-reduce, gloo"]["text"]
    assert checks["ranks"]["level"] == checks["signal"]["level"] == "ok"
    (report, *_) = (json.loads(path.read_text()) for path in sorted(tmp_path.glob("doctor/cpu-*/rank-*.json")))
    assert report["visible_gpus"] is not None and report["host"] == "n1"
    assert not processes_left(slurm_bed)


def test_a_job_that_does_not_start_is_explained_and_cancelled(slurm_bed: Bed, tmp_path: Path) -> None:
    other = submit(slurm_bed, "sleep 300", "--nodes=2", "--exclusive", folder=tmp_path)
    wait_state(slurm_bed, other, "RUNNING")
    code, checks, said = finish(start(tmp_path / "runs", "--wait", "2"))
    assert code == 1 and list(checks) == ["job", "preemption"]
    assert (
        "did not start within 2 s: state PENDING, reason Resources" in checks["job"]["text"]
        and "--wait" in checks["job"]["remedy"]
    )
    assert wait_state(slurm_bed, job_of(said), "CANCELLED")
    assert job_state(slurm_bed, other) == "RUNNING"


@pytest.mark.usefixtures("slurm_bed")
def test_what_sbatch_refuses_is_told(tmp_path: Path) -> None:
    code, checks, _ = finish(start(tmp_path, "cluster.partition=nosuch"))
    assert code == 1 and "nosuch" in checks["job"]["text"] and "cluster.partition" in checks["job"]["remedy"]


def test_an_interrupted_doctor_cancels_its_job(slurm_bed: Bed, tmp_path: Path) -> None:
    """By each of three signals, at the same time; the nodes have room for two of the jobs, so that one is waiting."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    doctors = [start(tmp_path / str(int(number))) for number in numbers]
    jobs = []
    for process, number in zip(doctors, numbers, strict=True):
        # The line about the job comes after the submission.
        assert process.stderr is not None
        jobs.append(job_of(process.stderr.readline()))
        process.send_signal(number)
    for job_id, process in zip(jobs, doctors, strict=True):
        assert finish(process)[0] == 130
        assert wait_state(slurm_bed, job_id, "CANCELLED")
    wait_for(lambda: not processes_left(slurm_bed))


def test_a_folder_that_one_node_does_not_see(slurm_bed: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """n2 has something else mounted where the run folders are."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    runs = tmp_path / "runs"
    runs.mkdir()
    (slurmd, *_) = slurm_bed.processes("n2")
    within = ["nsenter", f"--target={slurmd}", "--mount"]
    if subprocess.run([*within, "mount", "-t", "tmpfs", "tmpfs", str(runs)], capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting is not allowed here")
    cluster = load_cluster(TWO_NODES).config
    try:
        # Rank 0 need not wait as long as it takes to load torch over a slow network.
        found = doctor_cluster(cluster, runs=runs, data_dir=None, wait_s=60, say=lambda _: None, meeting_s=5)
    finally:
        subprocess.run([*within, "umount", str(runs)], check=True)
    failed = " ".join(check.text + check.remedy for check in found if check.level == "failure")
    assert "ranks 1 wrote nothing" in failed and "file system that all nodes share" in failed
    wait_for(lambda: not processes_left(slurm_bed))
