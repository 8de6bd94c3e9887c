"""What a user sees of jobs on a real SLURM."""

import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from galaxydist.cli.main import main
from galaxydist.cluster import slurm
from galaxydist.cluster.records import JobFiles
from galaxydist.cluster.slurm import JobState, SlurmUnavailableError, cancel_jobs, max_array_size, read_states
from tests.helpers.mini_cluster import submit, wait_for, wait_state
from tests.helpers.status_runs import add_job

if TYPE_CHECKING:
    from mini_cluster import MiniCluster

pytestmark = pytest.mark.slurm
ALL_CORES = ("--nodes=2", "--cpus-per-task=2", "--ntasks-per-node=1", "--mem=100")
ONE_NODE = ("--cpus-per-task=2", "--mem=100")


def wait_for_state(job_id: str, test: Callable[[JobState], bool]) -> JobState:
    return wait_for(lambda: state if test(state := read_states([job_id])[job_id]) else None, job_id)  # type: ignore[return-value]


def statuses(capfd: pytest.CaptureFixture[str], *words: str) -> dict[str, dict[str, Any]]:
    """``galaxydist status --json``, by the run's name."""
    capfd.readouterr()
    assert main(["status", *words, "--json"]) == 0
    return {status["name"]: status for status in json.loads(capfd.readouterr().out)}


def test_read_states_reports_failed_completed_running_pending_and_unknown_jobs(
    mini_cluster: "MiniCluster", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = submit(mini_cluster, "exit 3", *ONE_NODE, folder=tmp_path)
    done = submit(mini_cluster, "true", *ONE_NODE, folder=tmp_path)
    wait_state(mini_cluster, failed, "FAILED")
    wait_state(mini_cluster, done, "COMPLETED")
    running = submit(mini_cluster, "sleep 300", "--time=30", *ALL_CORES, folder=tmp_path)
    wait_state(mini_cluster, running, "RUNNING")
    array = submit(mini_cluster, "sleep 300", "--array=0-9%2", *ONE_NODE, folder=tmp_path)
    later = submit(mini_cluster, "true", "--begin=now+1hour", folder=tmp_path)
    # What a user has set for his own use must not get in the way.
    for name, value in {
        "SQUEUE_STATES": "COMPLETED",
        "SQUEUE_FORMAT": "%i",
        "SQUEUE_PARTITION": "no",
        "SACCT_FORMAT": "User",
    }.items():
        monkeypatch.setenv(name, value)
    ids = [failed, done, running, f"{array}_0", f"{array}_9", later, "999999"]
    states = read_states(ids)
    assert list(map(states.get, ids)) == [states[job_id] for job_id in ids]
    assert states[failed].state == "FAILED"
    assert states[done].state == "COMPLETED"
    assert (states[running].state, states[running].nodes) == ("RUNNING", "n[1-2]")
    assert 1500 < (states[running].time_left_s or 0) <= 1800
    assert [states[f"{array}_{index}"].state for index in (0, 9)] == ["PENDING"] * 2
    assert states[f"{array}_0"].reason in ("Resources", "Priority", "None", "")
    assert (states[later].state, states[later].reason) == ("PENDING", "BeginTime")
    assert states["999999"].state == "UNKNOWN"
    assert read_states(["999999"]) == {"999999": states["999999"]}


def test_cancelled_array_tasks_are_distinguished_from_running_and_pending_ones(
    mini_cluster: "MiniCluster", tmp_path: Path
) -> None:
    array = submit(mini_cluster, "sleep 300", "--array=0-5%1", *ONE_NODE, folder=tmp_path)
    wait_for_state(f"{array}_0", lambda state: state.state == "RUNNING")
    assert cancel_jobs([f"{array}_3", f"{array}_9", "999999"]).keys() == {f"{array}_9", "999999"}
    wait_for_state(f"{array}_3", lambda state: state == JobState("CANCELLED", "before it started"))
    states = read_states([f"{array}_{index}" for index in (0, 1, 3, 9)])
    assert [state.state for state in states.values()] == ["RUNNING", "PENDING", "CANCELLED", "CANCELLED"]
    assert cancel_jobs([array]) == {}
    wait_for_state(f"{array}_0", lambda state: state.state == "CANCELLED" and state.reason.startswith("by "))
    assert {state.state for state in read_states([f"{array}_{index}" for index in (1, 4, 5)]).values()} == {"CANCELLED"}


def test_a_requeued_job_counts_its_restarts(mini_cluster: "MiniCluster", tmp_path: Path) -> None:
    job_id = submit(mini_cluster, "sleep 300", *ONE_NODE, folder=tmp_path)
    wait_for_state(job_id, lambda state: state.state == "RUNNING")
    mini_cluster.run("scontrol", "requeue", job_id)
    assert wait_for_state(job_id, lambda state: state.state == "PENDING").restarts == 1
    assert wait_for_state(job_id, lambda state: bool(state.reason)).reason == "BeginTime"


@pytest.mark.slow
def test_preempted_job_is_pending_with_one_restart(mini_cluster: "MiniCluster", tmp_path: Path) -> None:
    victim = submit(mini_cluster, "sleep 300", *ALL_CORES, folder=tmp_path)
    wait_for_state(victim, lambda state: state.state == "RUNNING")
    submit(mini_cluster, "sleep 300", "--partition=high", *ALL_CORES, folder=tmp_path)
    assert wait_for_state(victim, lambda state: state.state == "PENDING").restarts == 1


def test_job_on_a_dead_node_has_state_node_fail(mini_cluster: "MiniCluster", tmp_path: Path) -> None:
    job_id = submit(mini_cluster, "sleep 300", "--no-requeue", "--nodelist=n2", folder=tmp_path)
    wait_for_state(job_id, lambda state: state.state == "RUNNING")
    mini_cluster.kill_node("n2", down=True)
    assert wait_for_state(job_id, lambda state: not state.is_active).state == "NODE_FAIL"


def test_sacct_reports_the_final_states_of_array_tasks(
    mini_cluster: "MiniCluster", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = submit(mini_cluster, "exit $SLURM_ARRAY_TASK_ID", "--array=0-1", folder=tmp_path)
    wait_state(mini_cluster, f"{array}_0", "COMPLETED")
    wait_state(mini_cluster, f"{array}_1", "FAILED")
    ids = [f"{array}_0", f"{array}_1"]
    # slurmctld forgets a job minutes after its end (MinJobAge); squeue then prints nothing, as for a job that never was.
    unknown = slurm._run_squeue(["999999"])
    monkeypatch.setattr(slurm, "_run_squeue", lambda _: unknown)
    ended = [("COMPLETED", False), ("FAILED", False)]
    # Accounting lags behind: a task that is not in it yet is taken for one that was cancelled before it started.
    wait_for(lambda: [(state.state, state.is_active) for state in read_states(ids).values()] == ended)
    states = read_states(ids)
    assert unknown == "" and list(states) == ids
    assert all(state.nodes.startswith("n") and state.time_left_s is None for state in states.values())


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("AccountingStorageType=accounting_storage/none", "SLURM keeps no accounting here"),
        ("AccountingStoragePort=1", "accounting did not answer"),
    ],
)
def test_unknown_job_without_accounting_has_the_reason(
    mini_cluster: "MiniCluster", tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, words: str
) -> None:
    conf = tmp_path / "slurm.conf"
    kept = [line for line in mini_cluster.conf.read_text().splitlines() if not line.startswith(setting.partition("=")[0])]
    conf.write_text("\n".join([*kept, setting, ""]))
    monkeypatch.setenv("SLURM_CONF", str(conf))
    state = read_states(["999999"])["999999"]
    assert state.state == "UNKNOWN"
    assert words in state.reason


def test_status_without_slurmctld_shows_unknown_within_15_seconds(
    mini_cluster: "MiniCluster", tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    job_id = submit(mini_cluster, "sleep 300", *ONE_NODE, folder=tmp_path)
    files = JobFiles(tmp_path / "runs" / "vit")
    add_job(files, job_id=job_id)
    wait_for_state(job_id, lambda state: state.state == "RUNNING")
    mini_cluster.stop_controller()
    start = time.monotonic()
    with pytest.raises(SlurmUnavailableError, match="slurmctld is down"):
        read_states([job_id])
    assert time.monotonic() - start < 15  # squeue itself takes 18 s to find out
    assert main(["status", str(files.run_dir)]) == 0
    out = capfd.readouterr().out
    assert "UNKNOWN" in out
    assert "SLURM did not answer" in out
    assert main(["cancel", str(files.run_dir)]) == 2
    with pytest.raises(SlurmUnavailableError):
        max_array_size()
    mini_cluster.start_controller()
    assert wait_for_state(job_id, lambda state: state.state == "RUNNING").nodes in mini_cluster.nodes


@pytest.mark.usefixtures("mini_cluster")
def test_slurm_program_that_exceeds_its_timeout_raises_slurm_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "TIMEOUT_S", 0.0001)
    with pytest.raises(SlurmUnavailableError, match="did not finish within"):
        read_states(["1"])


def test_max_array_size_equals_the_slurm_configuration(mini_cluster: "MiniCluster") -> None:
    assert f"MaxArraySize            = {max_array_size()}" in mini_cluster.run("scontrol", "show", "config")


def test_sweep_runs_are_listed_and_cancelled_singly_and_together(
    mini_cluster: "MiniCluster", tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    array = submit(mini_cluster, "sleep 300", "--array=0-3%1", "--time=5", *ONE_NODE, folder=tmp_path)
    for index in range(4):
        add_job(JobFiles(tmp_path / "runs" / "sweep" / f"seed{index}"), job_id=f"{array}_{index}")
    wait_for_state(f"{array}_0", lambda state: state.state == "RUNNING")
    shown = statuses(capfd)
    assert {name: status["state"] for name, status in shown.items()} == {
        "sweep/seed0": "RUNNING",
        **{f"sweep/seed{index}": "PENDING" for index in (1, 2, 3)},
    }
    assert 0 < shown["sweep/seed0"]["time_left_s"] <= 300
    assert main(["cancel", "runs/sweep/seed2"]) == 0
    assert f"job {array}_2 (runs/sweep/seed2): cancelled" in capfd.readouterr().out
    assert main(["cancel", f"{array}_3"]) == 0
    assert statuses(capfd, "sweep")["seed2"]["group"] == "stopped"
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))  # no terminal
    assert main(["cancel", "sweep"]) == 2
    assert statuses(capfd)["sweep/seed1"]["state"] == "PENDING"
    assert main(["cancel", "sweep", "--yes"]) == 0
    out = capfd.readouterr().out
    assert [index for index in range(4) if f"job {array}_{index} (" in out] == [0, 1]
    wait_for(lambda: {status["state"] for status in statuses(capfd).values()} == {"CANCELLED"})
