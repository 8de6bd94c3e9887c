"""A sweep as a job array on a real SLURM: what was killed is sent again, what was preempted goes on by itself."""

import json
from pathlib import Path

import pytest
from mini_cluster import MiniCluster

from galaxydist.cluster.records import JobFiles
from tests.helpers.cluster_runs import ClusterRun, decisions, go_on, hold_trial
from tests.helpers.mini_cluster import job_state, num_restarts, processes_left, submit, wait_for, wait_state

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]
NUM_TRIALS = 5


def write_sweep(path: Path, arguments: list[str]) -> None:
    """The settings of ``arguments`` for all, with five seeds."""
    settings = dict(argument.split("=", 1) for argument in arguments if not argument.startswith("run."))
    lines = [f"  {key}: {value}" for key, value in settings.items()]
    seeds = ", ".join(map(str, range(NUM_TRIALS)))
    path.write_text("\n".join(["parallel: 2", "set:", *lines, "grid:", f"  seed: [{seeds}]", ""]))


def statuses(run: ClusterRun) -> dict[Path, tuple[str, int]]:
    """State and number of restarts by run folder, as ``galaxydist status`` has them."""
    answer = run.galaxydist("status", "runs/sw", "--json")
    assert answer.returncode == 0, answer.stderr
    return {run.folder / item["run"]: (item["state"], item["restarts"]) for item in json.loads(answer.stdout)}


def test_sweep_of_2_arrays_requeues_the_preempted_run_and_resubmits_only_cancelled_ones(
    mini_cluster: MiniCluster, blobs: Path, tmp_path: Path
) -> None:
    mini_cluster.reconfigure({"MaxArraySize": "3"})  # which submitit does not look at
    run = ClusterRun(mini_cluster, tmp_path, blobs, train__epochs=24)
    write_sweep(tmp_path / "sw.yaml", run.arguments)
    command = ("sweep", "sw.yaml", "cluster=mini", "cluster.nodes=1", "cluster.cpus_per_task=2", "--yes")
    answer = run.galaxydist(*command)
    assert answer.returncode == 0, answer.stderr
    folders = sorted((tmp_path / "runs" / "sw").glob("custom_cnn-*"))
    jobs = {JobFiles(folder).jobs()[0].job_id: folder for folder in folders}
    first, second = sorted({job.partition("_")[0] for job in jobs}, key=int)
    assert set(jobs) == {*(f"{first}_{number}" for number in range(3)), *(f"{second}_{number}" for number in range(2))}

    # The one on n1 is preempted: it alone is requeued, by its id in the array.
    preempted, pids = hold_trial(mini_cluster, jobs, "n1")
    for array in (first, second):  # the nodes could not run more; a larger cluster would
        assert "ArrayTaskThrottle=2 " in mini_cluster.run("scontrol", "-o", "show", "job", array)
    shown = statuses(run)
    assert shown[jobs[preempted]] == ("RUNNING", 0) and shown[jobs[f"{second}_1"]] == ("PENDING", 0)
    assert sum(state == "RUNNING" for state, _ in shown.values()) <= 2 and len(shown) == NUM_TRIALS
    other = submit(
        mini_cluster,
        "sleep 1",
        "--partition=high",
        "--nodelist=n1",
        "--cpus-per-task=2",
        "--mem=1000",
        "--time=1",
        folder=tmp_path,
    )
    go_on(pids)
    wait_state(mini_cluster, other, "COMPLETED")
    files = JobFiles(jobs[preempted])
    (record,) = wait_for(files.restarts)
    assert (record.job_id, record.decision) == (preempted, "requeue")
    assert statuses(run)[jobs[preempted]] in (("PENDING", 1), ("REQUEUED", 1), ("RUNNING", 1))

    # Two are killed, one that waits and one that runs.
    waiting = f"{second}_1"
    running, _ = hold_trial(mini_cluster, jobs, "n1", "n2", others=(preempted, waiting))
    mini_cluster.run("scancel", waiting, running)
    killed = {jobs[waiting], jobs[running]}
    wait_for(lambda: all(statuses(run)[jobs[job]][0] == "CANCELLED" for job in (waiting, running)), "two cancelled trials")
    wait_for(lambda: not mini_cluster.run("squeue", "-h"), "the end of the array")
    unfinished = {folder for folder in folders if not (folder / "result.json").exists()}
    assert unfinished == killed
    assert decisions(files.restarts()) == ["requeue", "finished"]
    shown = statuses(run)
    assert {folder for folder in folders if shown[folder][0] != "FINISHED"} == killed
    assert {folder for folder in folders if shown[folder][1]} == {jobs[preempted]}
    assert num_restarts(mini_cluster, preempted) == 1

    # Again: those two, and no other.
    answer = run.galaxydist(*command)
    assert answer.returncode == 0, answer.stderr
    again = {folder for folder in folders if len(JobFiles(folder).jobs()) == 2}
    assert again == killed
    wait_for(lambda: all((folder / "result.json").exists() for folder in folders), "the end of the sweep")
    ids = [JobFiles(folder).jobs()[1].job_id for folder in sorted(killed)]
    for job_id in ids:
        wait_for(lambda job_id=job_id: job_state(mini_cluster, job_id) == "COMPLETED")  # type: ignore[misc]
    answer = run.galaxydist(*command)
    assert answer.returncode == 0 and all(len(JobFiles(folder).jobs()) <= 2 for folder in folders)
    wait_for(lambda: not processes_left(mini_cluster))
