"""What a submitted run survives, on a real SLURM of two nodes: each event costs one requeue, and nothing of the run."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from mini_cluster import MiniCluster

from galaxydist.paths import PACKAGE_DIR
from galaxydist.tracking.wandb_files import read_history
from tests.helpers.alert_server import alert_server
from tests.helpers.cluster_runs import ClusterRun, assert_equal_tensors, decisions, go_on, is_told
from tests.helpers.mini_cluster import num_restarts, processes_left, submit, wait_for, wait_state

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
DOUBLE = {"train__precision": "fp64", "model__norm": "group", "model__drop_rate": 0.0}
# The ranks hear nothing of what SLURM tells them: as if a step or a save took longer than they are given.
DEAF = "cluster.container=env --block-signal=USR2,TERM"
GOING_ON = re.compile(r"continuing .* from step (\d+)")
OTHER_JOB = ("--partition=high", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2", "--mem=1000", "--time=1")


@pytest.fixture(scope="module")
def undisturbed(started_cluster: MiniCluster, blobs: Path, tmp_path_factory: pytest.TempPathFactory) -> ClusterRun:
    """The run that those of two nodes must end like, without SLURM."""
    run = ClusterRun(started_cluster, tmp_path_factory.mktemp("undisturbed"), blobs)
    run.train_here(2)
    return run


@pytest.fixture(scope="module")
def alone(started_cluster: MiniCluster, blobs: Path, tmp_path_factory: pytest.TempPathFactory) -> ClusterRun:
    """The run that those of one process must end like, without SLURM."""
    run = ClusterRun(started_cluster, tmp_path_factory.mktemp("alone"), blobs)
    run.train_here(1)
    return run


@pytest.fixture(autouse=True)
def _no_process_left(mini_cluster: MiniCluster) -> Iterator[None]:
    """By themselves: before ``mini_cluster`` tidies up."""
    yield
    wait_for(lambda: not mini_cluster.run("squeue", "-h"), what="the end of all jobs")
    wait_for(lambda: not processes_left(mini_cluster), what="the end of all processes of jobs")


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


def test_preempted_run_is_requeued_once_and_ends_bit_equal_with_the_submitted_code(
    mini_cluster: MiniCluster, undisturbed: ClusterRun, blobs: Path, tmp_path: Path
) -> None:
    """All ranks save the same step, the job is requeued once and goes on with the code that was submitted, on one curve."""
    code = tmp_path / "code"
    shutil.copytree(PACKAGE_DIR, code / "galaxydist", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(PACKAGE_DIR.parent / "recipes", code / "recipes")
    run = ClusterRun(mini_cluster, tmp_path / "here", blobs, tracker__name="wandb", tracker__mode="offline")
    job_id = run.submit(code=code)
    for path in (code / "galaxydist").rglob("*.py"):  # the source is edited while the job waits and runs
        path.write_text("raise RuntimeError('this code was not submitted')\n")
    (code / "recipes" / "custom_cnn.yaml").write_text("model: {name: vit}\n")
    run.wait_step(20)
    held = run.hold()
    assert len(held) == 2
    other = submit(mini_cluster, "sleep 1", *OTHER_JOB, folder=tmp_path)
    go_on(held)
    wait_state(mini_cluster, other, "COMPLETED")
    run.wait_finished()
    wait_state(mini_cluster, job_id, "COMPLETED")
    assert decisions(run.files.restarts()) == ["requeue", "finished"]
    assert num_restarts(mini_cluster, job_id) == 1
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
    assert steps == sorted(set(steps)) and steps[-1] == 120


@pytest.mark.slow
def test_run_at_its_time_limit_is_requeued_once_with_and_without_a_signal(
    mini_cluster: MiniCluster, blobs: Path, tmp_path: Path
) -> None:
    """A run that is told in time saves and queues itself again; for one that was not the batch script does, at the limit."""
    told, late = (ClusterRun(mini_cluster, tmp_path / name, blobs, train__epochs=900) for name in ("told", "late"))
    ids = told.submit("cluster.nodes=1"), late.submit("cluster.nodes=1", DEAF)
    for run in (told, late):
        run.wait_step(20)
    # Nothing but time has to go by, which needs no processor.
    waiting, deaf = told.hold(), late.hold()
    # Told is who has more than a minute left.
    minutes = int((time.time() - told.files.jobs()[0].time) / 60) + 2
    for job_id, limit in zip(ids, (minutes, 1), strict=True):
        mini_cluster.run("scontrol", "update", f"jobid={job_id}", f"timelimit={limit}")

    going_on = set[str]()

    def are_going_on() -> bool:
        for pid, number in [(pid, signal.SIGCONT) for pid in waiting if is_told(pid)] + [(pid, signal.SIGSTOP) for pid in deaf]:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        for job_id in set(ids) - going_on:
            if num_restarts(mini_cluster, job_id):
                mini_cluster.run("scontrol", "update", f"jobid={job_id}", "timelimit=10")
                going_on.add(job_id)
        return going_on == set(ids)

    wait_for(are_going_on, lambda: told.said() + late.said())
    for run in (told, late):
        (record,) = run.files.restarts()
        assert (record.decision, record.exit_code, record.error) == ("requeue", 0, None)
        assert record.reason.startswith(
            "it was stopped by a signal" if run is told else "the time limit was reached before everything was saved"
        )
        found = shown(run)
        assert found["last_error"] == (record.reason if found["group"] == "pending" else None)
    (stopped,) = re.findall(r"stopped by SIGUSR2 at step (\d+), which is saved", told.log(0))
    assert told.files.restarts()[0].saved == int(stopped) >= 20
    for run, job_id in zip((told, late), ids, strict=True):
        if run is late:
            (saved,) = wait_for(lambda: GOING_ON.findall(late.log(0)), late.said)
            assert int(saved) >= (late.files.restarts()[0].saved or 0) >= 10
        run.galaxydist("cancel", str(run.run_dir))
        wait_state(mini_cluster, job_id, "CANCELLED")
        assert num_restarts(mini_cluster, job_id) == 1
        assert decisions(run.files.restarts()) in (["requeue"], ["requeue", "stop"])


def test_runs_preempted_with_mode_cancel_are_requeued_and_use_separate_gpus(
    mini_cluster: MiniCluster, alone: ClusterRun, blobs: Path, tmp_path: Path
) -> None:
    """PreemptMode=CANCEL: the batch script queues the job again, in the grace time or at its end."""
    mini_cluster.reconfigure({"PreemptMode": "CANCEL"})
    told, late = (
        ClusterRun(mini_cluster, tmp_path / "told", blobs),
        ClusterRun(mini_cluster, tmp_path / "late", blobs, train__epochs=900),
    )
    words = ("cluster.nodes=1", "cluster.gpus_per_node=1", "cluster.gpu_request=gres", "cluster.nodelist=n1")
    ids = late.submit(*words, DEAF), told.submit(*words)
    held = list[int]()
    for run in (late, told):
        run.wait_step(20)
        held = run.hold()
    other = submit(mini_cluster, "sleep 1", *OTHER_JOB, folder=tmp_path)
    go_on(held)
    late.hold()  # of the grace time nothing is wanted but its end
    wait_state(mini_cluster, other, "COMPLETED")
    # Of submitit's default, the local rank, both would see 0.
    seen = [re.findall(r"restart 0, rank 0 of 1, on n1, .*CUDA_VISIBLE_DEVICES=(\w*),", run.log(0)) for run in (late, told)]
    assert sorted(seen) == [["0"], ["1"]]
    wait_state(mini_cluster, ids[0], "PENDING", "RUNNING")
    late.galaxydist("cancel", str(late.run_dir))
    told.wait_finished()
    wait_state(mini_cluster, ids[1], "COMPLETED")
    assert decisions(told.files.restarts()) == ["requeue", "finished"]
    assert late.files.restarts()[0].decision == "requeue" and late.files.restarts()[0].reason.startswith("it was preempted")
    assert [num_restarts(mini_cluster, job_id) for job_id in ids] == [1, 1]
    check_same(told, alone)


def test_run_whose_requeue_is_refused_is_resubmitted_and_ends_bit_equal(
    mini_cluster: MiniCluster, alone: ClusterRun, blobs: Path, tmp_path: Path
) -> None:
    """The run is sent again as a new job."""
    run = ClusterRun(mini_cluster, tmp_path, blobs)
    job_id = run.submit("cluster.nodes=1")
    run.wait_step(20)
    held = run.hold()
    mini_cluster.run("scontrol", "update", f"jobid={job_id}", "requeue=0")
    mini_cluster.run("scancel", "--signal=USR2", job_id)
    go_on(held)
    run.wait_finished()
    sent, again = run.files.jobs()
    wait_state(mini_cluster, again.job_id, "COMPLETED")
    assert (sent.job_id, again.resubmits) == (job_id, job_id) and again.job_id != job_id
    assert decisions(run.files.restarts()) == ["requeue", "resubmit", "finished"]
    assert num_restarts(mini_cluster, job_id) == num_restarts(mini_cluster, again.job_id) == 0
    assert shown(run)["restarts"] == 1 and again.code == sent.code
    check_same(run, alone)


def test_run_survives_a_killed_rank_and_two_node_failures_bit_equal(
    mini_cluster: MiniCluster, undisturbed: ClusterRun, blobs: Path, tmp_path: Path
) -> None:
    """A rank, then a node, then the one with rank 0 and the batch script: one requeue each, that of a node by SLURM itself."""
    with alert_server() as (address, received):
        run = ClusterRun(mini_cluster, tmp_path, blobs, tracker__webhook=address)
        job_id = kill_a_rank_and_two_nodes(run, mini_cluster)
    assert num_restarts(mini_cluster, job_id) == 3 and shown(run)["restarts"] == 3
    assert decisions(run.files.restarts()) == ["requeue", "requeue", "finished"]
    check_same(run, undisturbed)
    told = [alert["text"] for alert in received if alert["kind"] == "requeue"]
    assert len(told) == 2 and "rank 1 on n2 was ended by signal 9" in told[0]
    assert [alert["kind"] for alert in received].count("finish") == 1
    check_hours(run, job_id)


def check_hours(run: ClusterRun, job_id: str) -> None:
    """``galaxydist cost`` and accounting agree on each of the four starts, of which three have lost steps."""
    answer = run.galaxydist("cost", str(run.run_dir), "--json")
    assert answer.returncode == 0, answer.stderr
    content = json.loads(answer.stdout)
    starts = content["runs"][0]["starts"]
    assert [start["start"] for start in starts] == [f"{job_id}.{number}" for number in range(4)]
    used = [sum(start["seconds"].values()) for start in starts]
    elapsed = run.slurm.run("sacct", "-nPX", "--duplicates", "-j", job_id, "-o", "ElapsedRaw").split()
    # Accounting counts whole seconds; a process may have begun up to one before.
    assert sorted(used) == pytest.approx(sorted(map(float, elapsed)), abs=1.0)
    assert all(start["seconds"]["lost"] > 0 for start in starts[:3]) and starts[3]["seconds"]["lost"] == 0
    assert all(start["queued_s"] >= 0 for start in starts) and content["notes"] == []
    assert content["total"]["CPU core"]["used"] == pytest.approx(2 * sum(used) / 3600)


def kill_a_rank_and_two_nodes(run: ClusterRun, mini_cluster: MiniCluster) -> str:
    """Submit a run of two nodes, and disturb it until it has ended all the same; the job's id."""
    job_id = run.submit()
    run.wait_step(20)
    (victim,) = run.pids("n2")
    os.kill(victim, signal.SIGKILL)
    (first,) = run.wait_restarts(1)
    assert first.decision == "requeue" and first.exit_code != 0
    assert str(first.error).startswith("rank 1 on n2 was ended by signal 9, SIGKILL")
    for number, node, said in ((1, "n2", "node n2 failed"), (2, "n1", "SLURM requeued the job itself")):
        run.wait_said(f"restart {number}, rank 0")
        run.wait_step(run.step + 15)
        mini_cluster.kill_node(node, down=True)
        wait_state(mini_cluster, job_id, "PENDING")
        assert shown(run)["last_error"].startswith(said)
        mini_cluster.start_node(node)
    run.wait_finished()
    wait_state(mini_cluster, job_id, "COMPLETED")
    return job_id


def test_run_of_2_nodes_continued_on_1_node_has_the_same_float64_weights(
    mini_cluster: MiniCluster, blobs: Path, tmp_path: Path
) -> None:
    """Two nodes, then one on the same run folder: the same galaxies in the same order, so in float64 the same weights."""
    whole, run = (ClusterRun(mini_cluster, tmp_path / name, blobs, **DOUBLE) for name in ("whole", "run"))
    job_id = run.submit("cluster.requeue=never")
    run.wait_step(20)
    held = run.hold()
    mini_cluster.run("scancel", "--signal=USR2", job_id)
    go_on(held)
    run.wait_restarts(1)
    again = run.submit("cluster.nodes=1")
    whole.train_here(2)
    wait_for(lambda: run.is_finished, run.said)
    wait_state(mini_cluster, again, "COMPLETED")
    assert [job.tasks for job in run.files.jobs()] == [2, 1] and decisions(run.files.restarts()) == ["stop", "finished"]
    assert num_restarts(mini_cluster, job_id) == num_restarts(mini_cluster, again) == 0
    ours, theirs = run.result()[0], whole.result()[0]
    for name in ours:
        if name.startswith("model/") and ours[name].is_floating_point():
            assert torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-9), name


def test_pending_run_cannot_be_submitted_again(mini_cluster: MiniCluster, blobs: Path, tmp_path: Path) -> None:
    run = ClusterRun(mini_cluster, tmp_path, blobs)
    asked = run.galaxydist("submit", *run.arguments, "cluster=mini", "--test")
    assert asked.returncode == 0 and re.fullmatch(r"Job \d+ to start at .* in partition low\n", asked.stdout), asked
    assert not run.run_dir.exists()
    before = submit(mini_cluster, "true", "--begin=now+600", folder=tmp_path)
    job_id = run.submit(f"cluster.after={before}")
    assert f"afterok:{before}(unfulfilled)" in mini_cluster.run("scontrol", "-o", "show", "job", job_id)
    answer = run.galaxydist("submit", *run.arguments, "cluster=mini")
    assert answer.returncode == 2 and f"is already pending as job {job_id}" in answer.stderr
    assert run.galaxydist("status", str(run.run_dir), "--json").stdout.count('"PENDING"') == 1
    answer = run.galaxydist("cancel", str(run.run_dir))
    assert answer.returncode == 0, answer.stderr
    wait_state(mini_cluster, job_id, "CANCELLED")
    mini_cluster.run("scancel", before)
    assert len(run.files.jobs()) == 1


def test_run_stopped_without_slurmctld_is_requeued_when_the_controller_returns(
    mini_cluster: MiniCluster, alone: ClusterRun, blobs: Path, tmp_path: Path
) -> None:
    """A run goes on, a question is answered, and the batch script waits until somebody can requeue it."""
    run, other = (ClusterRun(mini_cluster, tmp_path / name, blobs) for name in ("run", "other"))
    job_id = run.submit("cluster.nodes=1")
    run.wait_step(10)
    held = run.hold()
    mini_cluster.stop_controller()
    answer = run.galaxydist("status", str(run.run_dir))
    assert answer.returncode == 0 and "SLURM did not answer" in " ".join(answer.stdout.split()), answer.stdout + answer.stderr
    os.kill(held[0], signal.SIGUSR2)
    go_on(held)
    answer = other.galaxydist("submit", *other.arguments, "cluster=mini")
    assert answer.returncode == 2 and "SLURM did not answer: slurmctld is down" in answer.stderr
    assert not other.run_dir.exists()
    run.wait_restarts(1)
    wait_for(lambda: "not requeued yet" in run.said(), run.said)
    mini_cluster.start_controller()
    run.wait_finished()
    wait_state(mini_cluster, job_id, "COMPLETED")
    assert decisions(run.files.restarts()) == ["requeue", "finished"] and num_restarts(mini_cluster, job_id) == 1
    assert len(run.files.jobs()) == 1
    check_same(run, alone)


def test_nonfinite_loss_and_missing_python_are_not_requeued(mini_cluster: MiniCluster, blobs: Path, tmp_path: Path) -> None:
    """A loss that is not a number, and a Python that the nodes do not have: said by status, with a remedy."""
    changes = {"optim__lr": 1e30, "optim__name": "sgd", "train__clip_norm": 0, "model__norm": "group"}
    run, lacking = (
        ClusterRun(mini_cluster, tmp_path / "run", blobs, **changes),
        ClusterRun(mini_cluster, tmp_path / "lacking", blobs),
    )
    job_id = run.submit("cluster.nodes=1")
    lacking_id = lacking.submit("cluster.python=/nowhere/python", "cluster.srun=[cpu-bind=none]")
    wait_state(mini_cluster, lacking_id, "FAILED")
    assert "nodes do not have /nowhere/python: set cluster.python" in shown(lacking)["last_error"]
    (only,) = run.wait_restarts(1)
    assert only.decision == "stop" and only.for_good and "not a number" in only.reason
    wait_state(mini_cluster, job_id, "FAILED")
    assert num_restarts(mini_cluster, job_id) == 0
    assert shown(run)["state"] == "FAILED" and "not a number" in shown(run)["last_error"]


def test_run_folder_missing_on_the_node_is_reported_by_status_with_a_remedy(
    mini_cluster: MiniCluster, blobs: Path, tmp_path: Path
) -> None:
    run = ClusterRun(mini_cluster, tmp_path, blobs)
    (slurmd, *_) = mini_cluster.processes("n1")
    within = ["nsenter", f"--target={slurmd}", "--mount"]
    run.run_dir.mkdir()
    if subprocess.run([*within, "mount", "-t", "tmpfs", "tmpfs", run.run_dir], capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        job_id = run.submit("cluster.nodes=1", "cluster.nodelist=n1")
        wait_state(mini_cluster, job_id, "FAILED")
    finally:
        subprocess.run([*within, "umount", run.run_dir], check=True)
    said = shown(run)["last_error"]
    assert "does not see that folder" in said and "run.root=FOLDER" in said
