"""What a submitted run survives, on a real SLURM of two nodes: each event costs one requeue, and nothing of the run."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bed import Bed

from galaxydist.recipe.paths import PACKAGE_DIR
from galaxydist.training.wandb_files import read_history
from tests.cluster_runs import ClusterRun, assert_equal_tensors, decisions
from tests.slurm_bed import num_restarts, processes_left, submit, tidy, wait_for, wait_state

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
DOUBLE = {"train__precision": "fp64", "model__norm": "group", "model__drop_rate": 0.0}
# SLURM looks at time limits every half minute.
LONG_S = 240
# The ranks hear nothing of what SLURM tells them: as if a step or a save took longer than they are given.
DEAF = "cluster.container=env --block-signal=USR2,TERM"
GOING_ON = re.compile(r"continuing .* from step (\d+)")
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
    stopped, saved = re.findall(r"stopped by \w+ at step (\d+), which is saved|continuing .* from step (\d+)", logs[0])
    assert stopped[0] == saved[1] and int(stopped[0]) >= 20
    assert len(logs) == 2
    for rank, log in enumerate(logs):
        assert [f"restart {number}, rank {rank} of 2, on n{rank + 1}" in log for number in (0, 1, 2)] == [True, True, False]
    curves = sorted(run.folder.rglob("offline-run-*/run-*.wandb"))
    assert len(curves) == 2 and len({path.stem for path in curves}) == 1, curves
    steps = [step for path in curves for step, times in read_history(path).items() for _ in range(times)]
    assert steps == sorted(set(steps)) and steps[-1] == 180


def start_two(first: ClusterRun, second: ClusterRun, *words: str) -> tuple[str, str]:
    """Both run beside one another on the two nodes, and have trained for a while; ``words`` are the second's."""
    ids = first.submit(), second.submit(*words)
    for run in (first, second):
        run.wait_step(20)
    return ids


@pytest.mark.slow
def test_time_limit(slurm_bed: Bed, undisturbed: ClusterRun, blobs: Path, tmp_path: Path) -> None:
    """A run that is told in time saves and queues itself again; for one that was not the batch script does, at the limit."""
    timing = map(json.loads, (undisturbed.run_dir / "timing.jsonl").read_text().splitlines())
    # As fast as it ever was: the machine may have been busy for a while.
    epochs = int(LONG_S * max(line["time/img_s"] for line in timing) / 72) + 1  # of 72 galaxies
    told, late = (ClusterRun(slurm_bed, tmp_path / name, blobs, train__epochs=epochs) for name in ("told", "late"))
    ids = start_two(told, late, DEAF)
    # Told is who has more than a minute left.
    minutes = int((time.time() - told.files.jobs()[0].time) / 60) + 2
    for job_id, limit in zip(ids, (minutes, 1), strict=True):
        slurm_bed.run("scontrol", "update", f"jobid={job_id}", f"timelimit={limit}")
    for run, job_id in ((late, ids[1]), (told, ids[0])):
        (record,) = run.wait_restarts(1, 240)
        wait_state(slurm_bed, job_id, "PENDING", "REQUEUED", "COMPLETING")
        slurm_bed.run("scontrol", "update", f"jobid={job_id}", "timelimit=10")
        assert (record.decision, record.exit_code, record.error) == ("requeue", 0, None)
        assert record.reason.startswith(
            "it was told to stop" if run is told else "the time limit came before everything was saved"
        )
        found = shown(run)
        assert found["last_error"] == (record.reason if found["group"] == "pending" else None)
    for run, job_id in zip((told, late), ids, strict=True):
        (saved,) = wait_for(lambda run=run: GOING_ON.findall(run.log(0)), 120, "going on")  # type: ignore[misc]
        # Till its end the deaf one went on.
        assert int(saved) >= (run.files.restarts()[0].saved or 0) >= 10
        run.galaxydist("cancel", str(run.run_dir))
        wait_state(slurm_bed, job_id, "CANCELLED")
        assert decisions(run.files.restarts()) in (["requeue"], ["requeue", "stop"])


def test_a_preemption_that_cancels(slurm_bed: Bed, undisturbed: ClusterRun, blobs: Path, tmp_path: Path) -> None:
    """PreemptMode=CANCEL: the batch script queues the job again, in the grace time or at its end."""
    slurm_bed.reconfigure({"PreemptMode": "CANCEL"})
    told, late = (
        ClusterRun(slurm_bed, tmp_path / "told", blobs),
        ClusterRun(slurm_bed, tmp_path / "late", blobs, train__epochs=900),
    )
    ids = start_two(told, late, DEAF)
    other = submit(slurm_bed, "sleep 1", *OTHER_JOB, folder=tmp_path)
    wait_state(slurm_bed, other, "COMPLETED", timeout_s=90)
    told.wait_finished()
    wait_for(lambda: GOING_ON.findall(late.log(0)), 120, "going on")
    late.galaxydist("cancel", str(late.run_dir))
    wait_state(slurm_bed, ids[0], "COMPLETED")
    assert decisions(told.files.restarts()) == ["requeue", "finished"]
    assert late.files.restarts()[0].decision == "requeue" and late.files.restarts()[0].reason.startswith("it was preempted")
    assert [num_restarts(slurm_bed, job_id) for job_id in ids] == [1, 1]
    check_same(told, undisturbed)


def test_a_rank_dies_and_a_site_forbids_requeueing(slurm_bed: Bed, undisturbed: ClusterRun, blobs: Path, tmp_path: Path) -> None:
    """Of two runs at a time: one is queued again, the other is sent again as a new job."""
    dying, forbidden = (ClusterRun(slurm_bed, tmp_path / name, blobs) for name in ("dying", "forbidden"))
    dying_id, forbidden_id = start_two(dying, forbidden)
    slurm_bed.run("scontrol", "update", f"jobid={forbidden_id}", "requeue=0")
    slurm_bed.run("scancel", "--signal=USR2", forbidden_id)
    (victim,) = dying.pids("n2")
    os.kill(victim, signal.SIGKILL)
    (first,) = dying.wait_restarts(1, timeout_s=60)
    assert first.decision == "requeue" and first.exit_code != 0
    assert str(first.error).startswith("rank 1 on n2 was ended by signal 9, SIGKILL")
    dying.wait_finished()
    wait_state(slurm_bed, dying_id, "COMPLETED")
    assert decisions(dying.files.restarts()) == ["requeue", "finished"] and num_restarts(slurm_bed, dying_id) == 1
    check_same(dying, undisturbed)

    forbidden.wait_finished()
    sent, again = forbidden.files.jobs()
    wait_state(slurm_bed, again.job_id, "COMPLETED")
    assert (sent.job_id, again.resubmits) == (forbidden_id, forbidden_id) and again.job_id != forbidden_id
    assert decisions(forbidden.files.restarts()) == ["requeue", "resubmit", "finished"]
    assert num_restarts(slurm_bed, forbidden_id) == num_restarts(slurm_bed, again.job_id) == 0
    assert shown(forbidden)["restarts"] == 1 and again.code == sent.code
    check_same(forbidden, undisturbed)


def test_nodes_die(slurm_bed: Bed, undisturbed: ClusterRun, blobs: Path, tmp_path: Path) -> None:
    """One, then the one with rank 0 and the batch script: SLURM requeues the job itself, once each."""
    run = ClusterRun(slurm_bed, tmp_path, blobs)
    job_id = run.submit()
    for number, node, said in ((0, "n2", "node n2 failed"), (1, "n1", "SLURM queued the job again itself")):
        wait_for(lambda number=number: f"restart {number}, rank 0" in run.log(0), 120, "the next start")  # type: ignore[misc]
        run.wait_step(run.step + 20)
        slurm_bed.kill_node(node, down=True)
        wait_state(slurm_bed, job_id, "PENDING")
        assert shown(run)["last_error"].startswith(said)
        slurm_bed.start_node(node)
    run.wait_finished()
    wait_state(slurm_bed, job_id, "COMPLETED")
    assert num_restarts(slurm_bed, job_id) == 2 and shown(run)["restarts"] == 2
    assert decisions(run.files.restarts()) == ["requeue", "finished"]
    check_same(run, undisturbed)


def test_elastic(slurm_bed: Bed, blobs: Path, tmp_path: Path) -> None:
    """Two nodes, then one on the same run folder: the same galaxies in the same order, so in float64 the same weights."""
    whole, run = (ClusterRun(slurm_bed, tmp_path / name, blobs, **DOUBLE) for name in ("whole", "run"))
    job_id = run.submit("cluster.requeue=never")
    whole.submit()
    run.wait_step(20)
    slurm_bed.run("scancel", "--signal=USR2", job_id)
    run.wait_restarts(1)
    again = run.submit("cluster.nodes=1")
    wait_for(lambda: run.is_finished, 240, "the end of the run")
    wait_state(slurm_bed, again, "COMPLETED")
    whole.wait_finished()
    assert [job.tasks for job in run.files.jobs()] == [2, 1] and decisions(run.files.restarts()) == ["stop", "finished"]
    assert num_restarts(slurm_bed, job_id) == num_restarts(slurm_bed, again) == 0
    ours, theirs = run.result()[0], whole.result()[0]
    for name in ours:
        if name.startswith("model/") and ours[name].is_floating_point():
            assert torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-9), name


def test_a_queued_run_is_not_sent_twice(slurm_bed: Bed, blobs: Path, tmp_path: Path) -> None:
    run = ClusterRun(slurm_bed, tmp_path, blobs)
    asked = run.galaxydist("submit", *run.arguments, "cluster=bed", "--test")
    assert asked.returncode == 0 and re.fullmatch(r"Job \d+ to start at .* in partition low\n", asked.stdout), asked
    assert not run.run_dir.exists()
    before = submit(slurm_bed, "true", "--begin=now+600", folder=tmp_path)
    job_id = run.submit(f"cluster.after={before}")
    assert f"afterok:{before}(unfulfilled)" in slurm_bed.run("scontrol", "-o", "show", "job", job_id)
    answer = run.galaxydist("submit", *run.arguments, "cluster=bed")
    assert answer.returncode == 2 and f"is pending as job {job_id} already" in answer.stderr
    assert run.galaxydist("status", str(run.run_dir), "--json").stdout.count('"PENDING"') == 1
    answer = run.galaxydist("cancel", str(run.run_dir))
    assert answer.returncode == 0, answer.stderr
    wait_state(slurm_bed, job_id, "CANCELLED")
    slurm_bed.run("scancel", before)
    assert len(run.files.jobs()) == 1


def test_slurmctld_is_away(slurm_bed: Bed, undisturbed: ClusterRun, blobs: Path, tmp_path: Path) -> None:
    """A run goes on, a question is answered, and the batch script waits until somebody can requeue it."""
    run, other = (ClusterRun(slurm_bed, tmp_path / name, blobs) for name in ("run", "other"))
    job_id = run.submit()
    run.wait_step(10)
    slurm_bed.stop_controller()
    (pid, *_) = run.pids("n2")
    answer = run.galaxydist("status", str(run.run_dir))
    assert answer.returncode == 0 and "SLURM could not be asked" in " ".join(answer.stdout.split()), answer.stdout + answer.stderr
    os.kill(pid, signal.SIGUSR2)
    answer = other.galaxydist("submit", *other.arguments, "cluster=bed")
    assert answer.returncode == 2 and "SLURM could not be asked: slurmctld is down" in answer.stderr
    assert not other.run_dir.exists()
    run.wait_restarts(1)
    wait_for(lambda: "not requeued yet" in run.said(), 120, run.said())
    slurm_bed.start_controller()
    run.wait_finished()
    wait_state(slurm_bed, job_id, "COMPLETED")
    assert decisions(run.files.restarts()) == ["requeue", "finished"] and num_restarts(slurm_bed, job_id) == 1
    assert len(run.files.jobs()) == 1
    check_same(run, undisturbed)


def test_what_fails_for_good_is_not_tried_again(slurm_bed: Bed, blobs: Path, tmp_path: Path) -> None:
    """A loss that is not a number, and a Python that the nodes do not have: said by status, with a remedy."""
    changes = {"optim__lr": 1e30, "optim__name": "sgd", "train__clip_norm": 0, "model__norm": "group"}
    run, lacking = ClusterRun(slurm_bed, tmp_path / "run", blobs, **changes), ClusterRun(slurm_bed, tmp_path / "lacking", blobs)
    job_id = run.submit()
    lacking_id = lacking.submit("cluster.python=/nowhere/python", "cluster.srun=[cpu-bind=none]")
    wait_state(slurm_bed, lacking_id, "FAILED")
    assert "nodes do not have /nowhere/python: set cluster.python" in shown(lacking)["last_error"]
    (only,) = run.wait_restarts(1)
    assert only.decision == "stop" and only.for_good and "not a number" in only.reason
    wait_state(slurm_bed, job_id, "FAILED")
    assert num_restarts(slurm_bed, job_id) == 0
    assert shown(run)["state"] == "FAILED" and "not a number" in shown(run)["last_error"]


def test_a_run_folder_that_the_node_does_not_see(slurm_bed: Bed, blobs: Path, tmp_path: Path) -> None:
    run = ClusterRun(slurm_bed, tmp_path, blobs)
    (slurmd, *_) = slurm_bed.processes("n1")
    within = ["nsenter", f"--target={slurmd}", "--mount"]
    run.run_dir.mkdir()
    if subprocess.run([*within, "mount", "-t", "tmpfs", "tmpfs", run.run_dir], capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        job_id = run.submit("cluster.nodes=1", "cluster.nodelist=n1")
        wait_state(slurm_bed, job_id, "FAILED")
    finally:
        subprocess.run([*within, "umount", run.run_dir], check=True)
    said = shown(run)["last_error"]
    assert "does not see that folder" in said and "run.root=FOLDER" in said


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
