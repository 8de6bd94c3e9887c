"""Which runs go on after their job has ended, and why."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galaxydist.cluster.records import RestartRecord
from galaxydist.cluster.requeue import Ending, decide

POLICY: dict[str, Any] = {"policy": "auto", "max_requeues": 3}
STOPPED = Ending(exit_code=0, is_finished=False, failure=None, step=7, saved=7)


def crash(error: str, step: int) -> Ending:
    return Ending(exit_code=1, is_finished=False, failure={"kind": "crash", "step": step, "error": error}, step=step, saved=step)


def record(
    decision: str = "requeue", *, error: str | None = None, step: int | None = 3, restart: int = 0, saved: int | None = None
) -> RestartRecord:
    return RestartRecord("1", restart, 1, step, error, decision, "", 1.0, saved)  # type: ignore[arg-type]


@pytest.mark.parametrize("exit_code", [0, 1, 137])
def test_finished_run_is_not_requeued_for_any_srun_exit_code(exit_code: int) -> None:
    ending = Ending(exit_code=exit_code, is_finished=True, failure=None, step=9)
    assert decide(ending, [record()] * 5, **POLICY)[0] == "finished"


@pytest.mark.parametrize("error", [None, "a"])
def test_only_starts_without_a_new_checkpoint_count_towards_max_requeues(error: str | None) -> None:
    """A time limit shorter than start-up, for example; crashes of changing kinds too."""

    def idle(count: int) -> list[RestartRecord]:
        return [record(error=error and f"{error}{number}", saved=7, restart=number) for number in range(count)]

    # The first of them saved step 7, so that it is none of the three.
    assert decide(STOPPED, idle(3), **POLICY)[0] == "requeue"
    decision, reason = decide(STOPPED, idle(4), **POLICY)
    assert decision == "stop" and "4 consecutive starts saved no new step" in reason
    assert "cluster.max_requeues=3" in reason and "cluster.time" in reason
    # A step that only the metrics have seen will be done again.
    again = Ending(exit_code=1, is_finished=False, failure=None, step=9, saved=7)
    assert decide(again, idle(4), **POLICY)[0] == "stop"
    further = Ending(exit_code=0, is_finished=False, failure=None, step=8, saved=8)
    assert decide(further, idle(4), **POLICY)[0] == "requeue"
    # What an older galaxydist wrote tells nothing of checkpoints.
    assert decide(STOPPED, [record(restart=number) for number in range(9)], **POLICY)[0] == "requeue"


@pytest.mark.parametrize("exit_code", [0, 75])
def test_stop_at_the_same_step_is_requeued_not_counted_as_a_crash(exit_code: int) -> None:
    stopped = Ending(exit_code=exit_code, is_finished=False, failure=None, step=None)
    assert decide(stopped, [record(step=None)], **POLICY)[0] == "requeue"


@pytest.mark.parametrize(("kind", "text"), [("nonfinite", "not a number"), ("bad_input", "as they are")])
def test_nonfinite_loss_and_bad_input_are_not_requeued(kind: str, text: str) -> None:
    for exit_code in (0, 1, 2, 143):
        ending = Ending(exit_code, False, {"kind": kind, "step": 4, "error": "e"}, 4)
        decision, reason = decide(ending, [], **POLICY)
        assert decision == "stop" and text in reason


def test_crash_is_requeued_unless_the_last_start_crashed_alike_at_the_same_step() -> None:
    assert decide(crash("a", 3), [], **POLICY)[0] == "requeue"
    decision, reason = decide(crash("a", 3), [record(error="a", step=3)], **POLICY)
    assert decision == "stop" and "same crash at the same step (3) twice: a" in reason
    assert decide(crash("a", 4), [record(error="a", step=3)], **POLICY)[0] == "requeue"
    assert decide(crash("b", 3), [record(error="a", step=3)], **POLICY)[0] == "requeue"
    # only the last one: a stop in between shows that it went on
    assert decide(crash("a", 3), [record(error="a", step=3), record(step=3)], **POLICY)[0] == "requeue"


def test_killed_rank_without_failure_file_is_requeued_once_and_then_stopped() -> None:
    killed = Ending(exit_code=137, is_finished=False, failure=None, step=None)
    assert killed.error == "a rank was ended by signal 9"
    assert decide(killed, [], **POLICY)[0] == "requeue"
    assert decide(killed, [record(error=killed.error, step=None)], **POLICY)[0] == "stop"


def test_reported_error_is_the_first_killed_rank_not_the_lost_connection() -> None:
    lost = {"kind": "crash", "step": 4, "error": "Connection reset by peer"}
    death = "rank 1 on n2 was ended by signal 9, SIGKILL"
    assert Ending(1, False, lost, 4, death=death).error == death
    # What would happen again is more than how it ended.
    refused = {"kind": "bad_input", "step": None, "error": "no shards"}
    assert Ending(2, False, refused, None, death=death).error == "no shards"


def test_job_ended_by_slurm_is_requeued_with_the_reason_and_the_saved_step() -> None:
    ending = Ending(0, False, None, 9, 7, ended_by_slurm="the time limit was reached before everything was saved")
    assert decide(ending, [], **POLICY) == ("requeue", "the time limit was reached before everything was saved; step 7 is saved")


def test_exit_code_2_without_failure_file_stops_the_run() -> None:
    assert decide(Ending(exit_code=2, is_finished=False, failure=None, step=4), [], **POLICY)[0] == "stop"


def test_finished_run_with_a_failed_evaluation_reports_its_exit_code() -> None:
    decision, reason = decide(Ending(exit_code=1, is_finished=True, failure=None, step=9), [], **POLICY)
    assert decision == "finished" and "exit code 1" in reason


def test_requeue_policy_selects_resubmit_or_stop() -> None:
    assert decide(STOPPED, [], policy="resubmit", max_requeues=3)[0] == "resubmit"
    decision, reason = decide(STOPPED, [], policy="never", max_requeues=3)
    assert decision == "stop" and "cluster.requeue=never" in reason


def test_refused_requeue_and_its_resubmission_count_as_one_start() -> None:
    none = Ending(exit_code=0, is_finished=False, failure=None, step=None)
    once = [record("requeue"), record("resubmit")]
    assert decide(none, once * 3, policy="auto", max_requeues=2)[0] == "requeue"
    assert decide(none, once, policy="auto", max_requeues=1)[0] == "stop"


@given(st.integers(0, 5), st.lists(st.one_of(st.none(), st.integers(0, 5)), max_size=60), st.sampled_from(["auto", "resubmit"]))
def test_number_of_restarts_is_bounded_by_checkpoints_and_max_requeues(cap: int, saved: list[int | None], policy: Any) -> None:
    """Checkpoints are finite: between two new ones there are no more starts than the cap."""
    history = list[RestartRecord]()
    for number, step in enumerate(saved):
        ending = Ending(exit_code=0, is_finished=False, failure=None, step=step, saved=step)
        decision, _ = decide(ending, history, policy=policy, max_requeues=cap)
        if decision == "stop":
            break
        history.append(record(decision, restart=number, saved=step))
    assert len(history) <= (len({step for step in saved if step is not None}) + 1) * (cap + 1)


def test_requeue_script_run_as_main_reports_errors_on_stderr(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "galaxydist.cluster.requeue", str(tmp_path / "requests.json"), "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith(f"galaxydist: error: {tmp_path}/requests.json does not exist")
