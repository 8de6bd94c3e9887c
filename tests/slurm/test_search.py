"""A search as a job array on a real SLURM: trials are pruned, preempted and cancelled, and each keeps its values."""

import json
from pathlib import Path

import pytest
from mini_cluster import MiniCluster

from galaxydist.cluster.records import JobFiles
from galaxydist.cluster.search.search_files import SearchRecord, read_trial, trial_dir, trial_number
from galaxydist.cluster.search.search_space import draw
from galaxydist.cluster.search.search_study import JOURNAL_NAME
from tests.helpers.cluster_runs import ClusterRun, decisions, go_on, hold_trial
from tests.helpers.mini_cluster import processes_left, submit, wait_for, wait_state

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]
EPOCHS = 12
# Seeds by the number of trials, with few that do not learn, late.
SEEDS = {4: 17, 12: 352}


def write_search(path: Path, arguments: list[str], num_trials: int, seed: int) -> None:
    """Trials that learn, all alike, and some that do not; the seed decides which."""
    settings = dict(argument.split("=", 1) for argument in arguments if not argument.startswith(("run.", "optim.lr")))
    lines = ["parallel: 2", "set:", *(f"  {key}: {value}" for key, value in settings.items())]
    search = ["search: {optim.lr: [0.01, 1e-6]}", "method: random", "prune: asha", f"trials: {num_trials}", f"seed: {seed}"]
    path.write_text("\n".join([*lines, *search, ""]))


def reported_epochs(root: Path) -> dict[int, list[int]]:
    """The epochs that each trial has reported, from the journal's lines, by the run's number."""
    lines = [json.loads(line) for line in (root / JOURNAL_NAME).read_text().splitlines()]
    created = [line["user_attrs"]["trial"] for line in lines if line["op_code"] == 4]  # CREATE_TRIAL
    epochs: dict[int, list[int]] = {number: [] for number in created}
    for line in lines:
        if line["op_code"] == 7:  # SET_TRIAL_INTERMEDIATE_VALUE
            epochs[created[line["trial_id"]]].append(line["step"])
    return epochs


def set_nodes(slurm: MiniCluster, state: str) -> None:
    for node in slurm.nodes:
        slurm.run("scontrol", "update", f"nodename={node}", f"state={state}", "reason=test")


@pytest.mark.parametrize(("num_trials", "poor"), [(4, [3]), pytest.param(12, [8, 11], marks=pytest.mark.nightly)])
def test_search_prunes_poor_trials_and_a_preempted_one_reads_its_values_back(
    mini_cluster: MiniCluster, blobs: Path, tmp_path: Path, num_trials: int, poor: list[int]
) -> None:
    changes = {"train__epochs": EPOCHS, "eval__every": 1, "train__metric": "loss", "model__norm": "group"}
    run = ClusterRun(mini_cluster, tmp_path, blobs, train__ema=None, model__drop_rate=None, **changes)
    write_search(tmp_path / "sw.yaml", run.arguments, num_trials, SEEDS[num_trials])
    command = ("sweep", "sw.yaml", "cluster=mini", "cluster.nodes=1", "cluster.cpus_per_task=2", "--yes")
    set_nodes(mini_cluster, "drain")  # no trial starts, and ends, before the first ones are looked at
    answer = run.galaxydist(*command)
    assert answer.returncode == 0 and "best trial  none is complete yet" in answer.stdout, answer.stderr
    root = tmp_path / "runs" / "sw"
    folders = [trial_dir(root, number) for number in range(num_trials)]
    jobs = {JobFiles(folder).jobs()[0].job_id: folder for folder in folders}

    set_nodes(mini_cluster, "resume")
    not_these = [job for job, folder in jobs.items() if trial_number(folder) in poor]
    preempted, pids = hold_trial(mini_cluster, jobs, "n1", others=not_these)
    values = read_trial(jobs[preempted])
    options = ("--partition=high", "--nodelist=n1", "--cpus-per-task=2", "--mem=1000", "--time=1")
    other = submit(mini_cluster, "sleep 1", *options, folder=tmp_path)
    go_on(pids)
    wait_state(mini_cluster, other, "COMPLETED")
    (record,) = wait_for(JobFiles(jobs[preempted]).restarts)
    assert (record.job_id, record.decision) == (preempted, "requeue")
    cancelled = []
    if num_trials > 4:
        job, _ = hold_trial(mini_cluster, jobs, "n1", "n2", others=(preempted, *not_these))
        mini_cluster.run("scancel", job)
        cancelled = [jobs[job]]
    wait_for(lambda: not mini_cluster.run("squeue", "-h"), lambda: f"the end of the array: {run.said()}")
    if cancelled:
        answer = run.galaxydist(*command)  # it counts as failed until it runs again
        assert answer.returncode == 0 and "1 to submit (1 cancelled)" in answer.stdout, answer.stdout + answer.stderr
        wait_for(lambda: not mini_cluster.run("squeue", "-h"), "the end of the trial that was cancelled")

    good = [number for number in range(num_trials) if number not in poor]
    assert [number for number in range(num_trials) if (folders[number] / "pruned.json").exists()] == poor
    assert [number for number in range(num_trials) if (folders[number] / "result.json").exists()] == good
    search = SearchRecord.read(root)
    assert search is not None
    assert [read_trial(folder) for folder in folders] == [
        draw(search.space, SEEDS[num_trials], number) for number in range(num_trials)
    ]
    assert read_trial(jobs[preempted]) == values
    assert decisions(JobFiles(jobs[preempted]).restarts()) == ["requeue", "finished"]
    ends = JobFiles(folders[poor[0]]).restarts()
    assert [(end.decision, end.reason) for end in ends] == [("finished", "a search has pruned the run")], ends
    assert reported_epochs(root) == {number: [1] if number in poor else [*range(1, EPOCHS + 1)] for number in range(num_trials)}

    answer = run.galaxydist(*command)
    assert answer.returncode == 0, answer.stderr
    assert f"{num_trials} runs: {len(good)} finished, {len(poor)} pruned\n" in answer.stdout
    assert "best trial  trial-000: loss " in answer.stdout and "optim.lr=0.01\n" in answer.stdout
    assert {folder for folder in folders if len(JobFiles(folder).jobs()) == 2} == set(cancelled)
    answer = run.galaxydist("status", str(root), "--json")
    shown = {item["name"]: (item["state"], item["label"]) for item in json.loads(answer.stdout)}
    assert shown[folders[poor[0]].name] == ("PRUNED", "lr=1e-06") and shown["trial-000"] == ("FINISHED", "lr=0.01")
    wait_for(lambda: not processes_left(mini_cluster))
