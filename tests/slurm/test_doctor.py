"""The doctor on a real SLURM of two nodes: what a healthy one says, and what is said of nodes, queues and users that go wrong."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from mini_cluster import MiniCluster

from galaxydist.cluster.profile import load_cluster
from galaxydist.doctor.job import doctor_cluster
from tests.helpers.forked_runs import Ranks, forked
from tests.helpers.mini_cluster import job_state, processes_left, submit, wait_for, wait_state

pytestmark = [pytest.mark.slurm, pytest.mark.xdist_group("slurm")]
TWO_NODES = ("cluster=cpu", "cluster.nodes=2", "cluster.tasks_per_node=1", "cluster.cpus_per_task=1", "cluster.memory=2")
ONE_NODE = ("cluster=cpu", "cluster.nodes=1", *TWO_NODES[2:])


def command(words: Sequence[str]) -> int:
    """``galaxydist``."""
    from galaxydist.cli.main import main

    return main(words)


@contextmanager
def started(slurm: MiniCluster, folder: Path, *options: str, cluster: Sequence[str] = TWO_NODES) -> Iterator[Ranks]:
    """``galaxydist doctor`` for nodes of one rank each, its run folders in ``folder``."""
    words = ("doctor", *cluster, *options, "--json", "--run-root", str(folder))
    environ = {"SLURM_CONF": str(slurm.conf), "WANDB_MODE": "offline"}
    with forked(command, words, folder=folder / "said", environ=environ) as doctor:
        yield doctor


def examine(
    slurm: MiniCluster, folder: Path, *options: str, cluster: Sequence[str] = TWO_NODES
) -> tuple[int | None, dict[str, dict[str, Any]], str]:
    """Its exit code, the checks of the cluster by name, and what it said beside them."""
    with started(slurm, folder, *options, cluster=cluster) as doctor:
        (code,) = doctor.wait()
        sections = json.loads(doctor.text())["sections"]
        return code, {check["name"]: check for check in sections["cluster=cpu"]}, doctor.text("err")


def job_of(said: str) -> str:
    """The number in "job 7, 2 processes"."""
    return said.partition("job ")[2].partition(",")[0]


def test_doctor_of_two_healthy_nodes_reports_no_failure_and_leaves_no_process(mini_cluster: MiniCluster, tmp_path: Path) -> None:
    code, checks, said = examine(mini_cluster, tmp_path)
    assert code == 0, (checks, said)
    assert checks["ranks"]["text"] == "2 on n1, n2: all finished"
    assert checks["signal"]["level"] == "ok" and "SIGUSR2 from SLURM reached all ranks" in checks["signal"]["text"]
    # The mini cluster's settings: a grace of 15 s and preempt_send_user_signal.
    assert checks["preemption"]["level"] == "ok"
    assert checks["preemption"]["text"] == "partition low: SLURM sends SIGUSR2 15 s before it ends and requeues the job"
    assert "n1" in checks["interface"]["text"] and "n2" in checks["interface"]["text"]
    assert "requested 1" in checks["cores a rank"]["text"]
    for name in ("versions", "rendezvous", "clocks", "shared files", "all-reduce, gloo", "flock there"):
        assert checks[name]["level"] == "ok", checks[name]
    wait_state(mini_cluster, job_of(said), "COMPLETED")
    assert "Requeue=0" in mini_cluster.run("scontrol", "show", "job", job_of(said))
    assert not processes_left(mini_cluster)


def test_doctor_fails_for_gpus_that_slurm_allocates_but_torch_cannot_see(mini_cluster: MiniCluster, tmp_path: Path) -> None:
    """The mini cluster's GPUs are simulated: SLURM sets CUDA_VISIBLE_DEVICES, but there is no device."""
    code, checks, _ = examine(mini_cluster, tmp_path, "cluster.gpus_per_node=1", cluster=ONE_NODE)
    assert code == 1
    assert checks["GPUs"]["level"] == checks["GPUs a rank"]["level"] == "failure"
    assert checks["ranks"]["level"] == checks["signal"]["level"] == "ok"
    (report, *_) = (json.loads(path.read_text()) for path in sorted(tmp_path.glob("doctor/cpu-*/rank-*.json")))
    assert report["visible_gpus"] is not None and report["host"] == "n1"
    assert not processes_left(mini_cluster)


def test_doctor_explains_and_cancels_its_job_that_does_not_start_in_time(mini_cluster: MiniCluster, tmp_path: Path) -> None:
    other = submit(mini_cluster, "sleep 300", "--nodes=2", "--exclusive", folder=tmp_path)
    wait_state(mini_cluster, other, "RUNNING")
    code, checks, said = examine(mini_cluster, tmp_path / "runs", "--wait", "2")
    assert code == 1 and list(checks) == ["job", "preemption"]
    assert (
        "did not start within 2 s: state PENDING, reason Resources" in checks["job"]["text"]
        and "--wait" in checks["job"]["remedy"]
    )
    assert wait_state(mini_cluster, job_of(said), "CANCELLED")
    assert job_state(mini_cluster, other) == "RUNNING"


def test_doctor_reports_the_refusal_of_sbatch(mini_cluster: MiniCluster, tmp_path: Path) -> None:
    code, checks, _ = examine(mini_cluster, tmp_path, "cluster.partition=nosuch")
    assert code == 1 and "nosuch" in checks["job"]["text"] and "cluster.partition" in checks["job"]["remedy"]


def test_an_interrupted_doctor_cancels_its_job(mini_cluster: MiniCluster, tmp_path: Path) -> None:
    """By each of three signals, at the same time; the nodes have room for two of the jobs, so that one is waiting."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    with ExitStack() as stack:
        doctors = [stack.enter_context(started(mini_cluster, tmp_path / number.name)) for number in numbers]
        for doctor, number in zip(doctors, numbers, strict=True):
            # The line about the job comes after the submission.
            wait_for(lambda doctor=doctor: "\n" in doctor.text("err"))  # type: ignore[misc]
            os.kill(doctor.pids[0], number)
        for doctor in doctors:
            assert doctor.wait() == [130], doctor.text("err")
            assert wait_state(mini_cluster, job_of(doctor.text("err")), "CANCELLED")
    wait_for(lambda: not processes_left(mini_cluster))


def test_doctor_fails_for_a_run_folder_that_one_node_does_not_see(
    mini_cluster: MiniCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """n2 has something else mounted where the run folders are."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    runs = tmp_path / "runs"
    runs.mkdir()
    (slurmd, *_) = mini_cluster.processes("n2")
    within = ["nsenter", f"--target={slurmd}", "--mount"]
    if subprocess.run([*within, "mount", "-t", "tmpfs", "tmpfs", str(runs)], capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting is not allowed here")
    cluster = load_cluster(TWO_NODES).config
    try:
        # Rank 0 need not wait as long as it takes to load torch over a slow network.
        found = doctor_cluster(cluster, runs=runs, data_dir=None, wait_s=60, meeting_s=5)
    finally:
        subprocess.run([*within, "umount", str(runs)], check=True)
    failed = " ".join(check.text + check.remedy for check in found if check.level == "failure")
    assert "ranks 1 wrote no report" in failed and "file system that all nodes share" in failed
    wait_for(lambda: not processes_left(mini_cluster))
