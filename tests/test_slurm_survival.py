"""What a submitted run survives, on a real SLURM of two nodes: each event costs one requeue, and nothing of the run."""

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bed import Bed

from galaxydist.recipe.paths import PACKAGE_DIR
from tests.cluster_runs import ClusterRun, assert_equal_tensors, decisions
from tests.runs import read_metrics
from tests.slurm_bed import num_restarts, processes_left, submit, tidy, wait_for, wait_state
from tests.test_tracking import history

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
DOUBLE = {"train__precision": "fp64", "model__norm": "group", "model__drop_rate": 0.0}
# A job of a minute has some 15 to 30 seconds until it is told to save, and starts for a part of them.
LONG_S = 30
OTHER_JOB = ("--partition=high", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2", "--mem=1000", "--time=1")


@pytest.fixture(scope="module")
def undisturbed(started_bed: Bed, blobs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterRun]:
    """The run that all others must end like."""
    run = ClusterRun(started_bed, tmp_path_factory.mktemp("undisturbed"), blobs)
    run.submit()
    run.wait_finished()
    yield run
    tidy(started_bed)


@pytest.fixture(autouse=True)
def _no_process_left(slurm_bed: Bed) -> Iterator[None]:
    """By themselves: before ``slurm_bed`` tidies up."""
    yield
    wait_for(lambda: not slurm_bed.run("squeue", "-h"), what="the end of all jobs")
    wait_for(lambda: not processes_left(slurm_bed), what="the end of all processes of jobs")


def shown(run: ClusterRun) -> dict[str, Any]:
    """What ``galaxydist status`` says of a run."""
    answer = run.galaxydist("status", str(run.run_dir), "--json")
    assert answer.returncode == 0, answer.stderr
    (found,) = json.loads(answer.stdout)
    return dict(found)


def check_same(run: ClusterRun, undisturbed: ClusterRun) -> None:
    """Weights, optimizer, counters and metrics, bit for bit."""
    tensors, state, metrics = run.result()
    expected_tensors, expected_state, expected_metrics = undisturbed.result()
    assert_equal_tensors(tensors, expected_tensors)
    assert state["progress"] | {"tracker_run_id": None} == expected_state["progress"] | {"tracker_run_id": None}
    assert metrics == expected_metrics


def test_preemption(slurm_bed: Bed, undisturbed: ClusterRun, blobs: Path, tmp_path: Path) -> None:
    """All ranks save the same step, the job is requeued once and goes on with the code that was submitted, on one curve."""
    code = tmp_path / "code"
    shutil.copytree(PACKAGE_DIR, code / "galaxydist", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(PACKAGE_DIR.parent / "recipes", code / "recipes")
    run = ClusterRun(slurm_bed, tmp_path / "here", blobs, tracker__name="wandb", tracker__mode="offline")
    job_id = run.submit(code=code)
    for path in (code / "galaxydist").rglob("*.py"):  # the source is edited while the job waits and runs
        path.write_text("raise RuntimeError('this code was not submitted')\n")
    (code / "recipes" / "custom_cnn.yaml").write_text("model: {name: vit}\n")
    run.wait_step(20)
    other = submit(slurm_bed, "sleep 1", *OTHER_JOB, folder=tmp_path)
    wait_state(slurm_bed, other, "COMPLETED", timeout_s=90)
    run.wait_finished()
    wait_state(slurm_bed, job_id, "COMPLETED")
    assert decisions(run.files.restarts()) == ["requeue", "finished"]
    assert num_restarts(slurm_bed, job_id) == 1
    assert run.files.restarts()[0].exit_code == 0 and run.files.restarts()[0].error is None
    check_same(run, undisturbed)
    logs = [path.read_text() for path in run.files.rank_logs()]
    stopped, saved = re.findall(r"stopped by signal \d+ at step (\d+), which is saved|continuing .* from step (\d+)", logs[0])
    assert stopped[0] == saved[1] and int(stopped[0]) >= 20
    assert len(logs) == 2
    for rank, log in enumerate(logs):
        assert [f"restart {number}, rank {rank} of 2, on n{rank + 1}" in log for number in (0, 1, 2)] == [True, True, False]
    curves = sorted(run.folder.rglob("offline-run-*/run-*.wandb"))
    assert len(curves) == 2 and len({path.stem for path in curves}) == 1, curves
    steps = [row["step"] for path in curves for row in history(path) if "train/loss" in row]
    assert steps == sorted(set(steps)) and steps[-1] == 180


@pytest.mark.slow
def test_time_limit(slurm_bed: Bed, undisturbed: ClusterRun, blobs: Path, tmp_path: Path) -> None:
    """A run longer than its time limit ends by itself over several requeues, but not over more than the cap."""
    timing = map(json.loads, (undisturbed.run_dir / "timing.jsonl").read_text().splitlines())
    # As fast as it ever was: the machine may have been busy for a while.
    epochs = int(LONG_S * max(line["time/img_s"] for line in timing) / 72) + 1  # of 72 galaxies
    run = ClusterRun(slurm_bed, tmp_path, blobs, train__epochs=epochs, train__save_every=1000, eval__every=1000)
    # The least limit there is is a minute; SLURM gives the signal up to half a minute early.
    limits = ("cluster.time=1", "cluster.signal_s=30")
    job_id = run.submit(*limits, "cluster.max_requeues=1")
    restarts = run.wait_restarts(2)
    assert decisions(restarts) == ["requeue", "stop"] and "cluster.max_requeues=1" in restarts[-1].reason
    assert num_restarts(slurm_bed, job_id) == 1
    wait_state(slurm_bed, job_id, "FAILED")
    again = run.submit(*limits)
    wait_for(lambda: run.is_finished, 600, "the end of the run")
    wait_state(slurm_bed, again, "COMPLETED")
    ended = decisions(run.files.restarts())[2:]
    assert ended == ["requeue"] * (len(ended) - 1) + ["finished"]
    assert num_restarts(slurm_bed, again) == len(ended) - 1 >= 1
    steps = [line["step"] for line in read_metrics(run.run_dir) if "train/loss" in line]
    assert steps == sorted(set(steps)) and steps[-1] == 3 * epochs


def test_a_rank_dies(slurm_bed: Bed, undisturbed: ClusterRun, blobs: Path, tmp_path: Path) -> None:
    run = ClusterRun(slurm_bed, tmp_path, blobs)
    job_id = run.submit()
    run.wait_step(20)
    (victim,) = run.pids("n2")
    os.kill(victim, signal.SIGKILL)
    (first,) = run.wait_restarts(1, timeout_s=60)
    assert first.decision == "requeue" and first.exit_code != 0 and first.error
    run.wait_finished()
    wait_state(slurm_bed, job_id, "COMPLETED")
    assert decisions(run.files.restarts()) == ["requeue", "finished"] and num_restarts(slurm_bed, job_id) == 1
    check_same(run, undisturbed)


@pytest.mark.parametrize("node", ["n1", "n2"])
def test_a_node_dies(node: str, slurm_bed: Bed, undisturbed: ClusterRun, blobs: Path, tmp_path: Path) -> None:
    """Also the one with rank 0 and the batch script: SLURM requeues the job itself, once."""
    run = ClusterRun(slurm_bed, tmp_path, blobs)
    job_id = run.submit()
    run.wait_step(20)
    slurm_bed.kill_node(node, down=True)
    wait_state(slurm_bed, job_id, "PENDING", "COMPLETING")
    slurm_bed.start_node(node)
    run.wait_finished()
    wait_state(slurm_bed, job_id, "COMPLETED")
    assert num_restarts(slurm_bed, job_id) == 1 and shown(run)["restarts"] == 1
    assert "requeue" not in decisions(run.files.restarts())
    check_same(run, undisturbed)


def test_where_requeueing_is_forbidden_the_run_is_submitted_again(
    slurm_bed: Bed, undisturbed: ClusterRun, blobs: Path, tmp_path: Path
) -> None:
    run = ClusterRun(slurm_bed, tmp_path, blobs)
    job_id = run.submit()
    slurm_bed.run("scontrol", "update", f"jobid={job_id}", "requeue=0")
    run.wait_step(20)
    slurm_bed.run("scancel", "--signal=USR2", job_id)
    run.wait_finished()
    first, again = run.files.jobs()
    wait_state(slurm_bed, again.job_id, "COMPLETED")
    assert (first.job_id, again.resubmits) == (job_id, job_id) and again.job_id != job_id
    assert decisions(run.files.restarts()) == ["requeue", "resubmit", "finished"]
    assert num_restarts(slurm_bed, job_id) == num_restarts(slurm_bed, again.job_id) == 0 and shown(run)["restarts"] == 1
    assert again.code == first.code
    check_same(run, undisturbed)


def test_elastic(slurm_bed: Bed, blobs: Path, tmp_path: Path) -> None:
    """Two nodes, then one on the same run folder: the same galaxies in the same order, so in float64 the same weights."""
    whole = ClusterRun(slurm_bed, tmp_path / "whole", blobs, **DOUBLE)
    whole.submit()
    whole.wait_finished()
    run = ClusterRun(slurm_bed, tmp_path / "run", blobs, **DOUBLE)
    job_id = run.submit("cluster.requeue=never")
    run.wait_step(20)
    slurm_bed.run("scancel", "--signal=USR2", job_id)
    run.wait_restarts(1)
    again = run.submit("cluster.nodes=1")
    wait_for(lambda: run.is_finished, 240, "the end of the run")
    wait_state(slurm_bed, again, "COMPLETED")
    assert [job.tasks for job in run.files.jobs()] == [2, 1] and decisions(run.files.restarts()) == ["stop", "finished"]
    assert num_restarts(slurm_bed, job_id) == num_restarts(slurm_bed, again) == 0
    ours, theirs = run.result()[0], whole.result()[0]
    for name in ours:
        if name.startswith("model/") and ours[name].is_floating_point():
            assert torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-9), name


def test_a_queued_run_is_not_sent_twice(slurm_bed: Bed, blobs: Path, tmp_path: Path) -> None:
    run = ClusterRun(slurm_bed, tmp_path, blobs)
    job_id = run.submit("cluster.extra=[begin=now+600]")
    answer = run.galaxydist("submit", *run.arguments, "cluster=bed")
    assert answer.returncode == 2 and f"is pending as job {job_id} already" in answer.stderr
    assert run.galaxydist("status", str(run.run_dir), "--json").stdout.count('"PENDING"') == 1
    answer = run.galaxydist("cancel", str(run.run_dir))
    assert answer.returncode == 0, answer.stderr
    wait_state(slurm_bed, job_id, "CANCELLED")
    assert len(run.files.jobs()) == 1


def test_slurmctld_is_restarted(slurm_bed: Bed, undisturbed: ClusterRun, blobs: Path, tmp_path: Path) -> None:
    run = ClusterRun(slurm_bed, tmp_path, blobs)
    job_id = run.submit()
    run.wait_step(10)
    slurm_bed.stop_controller()
    answer = run.galaxydist("status", str(run.run_dir))
    assert answer.returncode == 0 and "SLURM could not be asked" in " ".join(answer.stdout.split()), answer.stdout + answer.stderr
    slurm_bed.start_controller()
    run.wait_finished()
    wait_state(slurm_bed, job_id, "COMPLETED")
    assert decisions(run.files.restarts()) == ["finished"] and num_restarts(slurm_bed, job_id) == 0
    check_same(run, undisturbed)


def test_slurmctld_is_away_when_a_run_must_go_on(slurm_bed: Bed, undisturbed: ClusterRun, blobs: Path, tmp_path: Path) -> None:
    """The batch script waits until somebody can requeue it."""
    run = ClusterRun(slurm_bed, tmp_path, blobs)
    job_id = run.submit()
    run.wait_step(20)
    slurm_bed.stop_controller()
    os.kill(run.pids("n2")[0], signal.SIGUSR2)
    run.wait_restarts(1)
    wait_for(lambda: "not requeued yet" in run.said(), 120, run.said())
    slurm_bed.start_controller()
    run.wait_finished()
    wait_state(slurm_bed, job_id, "COMPLETED")
    assert decisions(run.files.restarts()) == ["requeue", "finished"] and num_restarts(slurm_bed, job_id) == 1
    assert len(run.files.jobs()) == 1
    check_same(run, undisturbed)


def test_what_fails_for_good_is_not_tried_again(slurm_bed: Bed, blobs: Path, tmp_path: Path) -> None:
    run = ClusterRun(slurm_bed, tmp_path, blobs, optim__lr=1e30, optim__name="sgd", train__clip_norm=0, model__norm="group")
    job_id = run.submit()
    (only,) = run.wait_restarts(1)
    assert only.decision == "stop" and "not a number" in only.reason
    wait_state(slurm_bed, job_id, "FAILED")
    assert num_restarts(slurm_bed, job_id) == 0
    status = run.galaxydist("status", str(run.run_dir), "--json")
    assert '"FAILED"' in status.stdout and "not a number" in status.stdout, status.stdout


def test_two_jobs_of_one_node_see_different_gpus(slurm_bed: Bed, blobs: Path, tmp_path: Path) -> None:
    seen = []
    runs = [ClusterRun(slurm_bed, tmp_path / name, blobs) for name in ("a", "b")]
    for run in runs:
        run.submit("cluster.nodes=1", "cluster.gpus_per_node=1", "cluster.gpu_request=gres", "cluster.nodelist=n1")
    for run in runs:
        run.wait_step(2)
        assert ", on n1, " in run.files.rank_log(0).read_text()
        (line,) = [line for line in run.files.rank_log(0).read_text().splitlines() if "CUDA_VISIBLE_DEVICES=" in line]
        seen.append(line.partition("CUDA_VISIBLE_DEVICES=")[2].partition(",")[0])
    # submitit's default, the local rank, would be 0 for both
    assert sorted(seen) == ["0", "1"]
    for run in runs:
        run.galaxydist("cancel", str(run.run_dir))
