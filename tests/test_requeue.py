"""Which runs go on after their job has ended, and why."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galaxydist.cluster.records import RestartRecord
from galaxydist.cluster.requeue import Ending, decide

POLICY: dict[str, Any] = {"policy": "auto", "max_requeues": 3}
STOPPED = Ending(exit_code=0, is_finished=False, failure=None, step=7)


def crash(error: str, step: int) -> Ending:
    return Ending(exit_code=1, is_finished=False, failure={"kind": "crash", "step": step, "error": error}, step=step)


def record(decision: str = "requeue", *, error: str | None = None, step: int | None = 3, restart: int = 0) -> RestartRecord:
    return RestartRecord("1", restart, 1, step, error, decision, "", 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("exit_code", [0, 1, 137])
def test_a_finished_run_is_finished_whatever_srun_says(exit_code: int) -> None:
    ending = Ending(exit_code=exit_code, is_finished=True, failure=None, step=9)
    assert decide(ending, [record()] * 5, **POLICY)[0] == "finished"


def test_a_stopped_run_is_requeued_until_the_cap() -> None:
    assert decide(STOPPED, [], **POLICY)[0] == "requeue"
    three = [record(restart=number, step=number) for number in range(3)]
    assert decide(STOPPED, three[:2], **POLICY)[0] == "requeue"
    decision, reason = decide(STOPPED, three, **POLICY)
    assert decision == "stop" and "cluster.max_requeues=3" in reason
    # what ended for good before somebody submitted it again does not count
    assert decide(STOPPED, [record("stop"), record("stop"), record()], **POLICY)[0] == "requeue"


@pytest.mark.parametrize("exit_code", [0, 75])
def test_a_stop_at_the_same_step_is_no_crash(exit_code: int) -> None:
    stopped = Ending(exit_code=exit_code, is_finished=False, failure=None, step=None)
    assert decide(stopped, [record(step=None)], **POLICY)[0] == "requeue"


@pytest.mark.parametrize(("kind", "text"), [("nonfinite", "not a number"), ("bad_input", "as they are")])
def test_what_would_end_the_same_way_is_not_tried(kind: str, text: str) -> None:
    for exit_code in (0, 1, 2, 143):
        ending = Ending(exit_code, False, {"kind": kind, "step": 4, "error": "e"}, 4)
        decision, reason = decide(ending, [], **POLICY)
        assert decision == "stop" and text in reason


def test_a_crash_is_requeued_unless_it_was_the_same_at_the_same_step() -> None:
    assert decide(crash("a", 3), [], **POLICY)[0] == "requeue"
    decision, reason = decide(crash("a", 3), [record(error="a", step=3)], **POLICY)
    assert decision == "stop" and "same crash at the same step (3) twice: a" in reason
    assert decide(crash("a", 4), [record(error="a", step=3)], **POLICY)[0] == "requeue"
    assert decide(crash("b", 3), [record(error="a", step=3)], **POLICY)[0] == "requeue"
    # only the last one: a stop in between shows that it went on
    assert decide(crash("a", 3), [record(error="a", step=3), record(step=3)], **POLICY)[0] == "requeue"


def test_a_killed_rank_leaves_no_failure_behind() -> None:
    killed = Ending(exit_code=137, is_finished=False, failure=None, step=None)
    assert killed.error == "a rank was ended by signal 9"
    assert decide(killed, [], **POLICY)[0] == "requeue"
    assert decide(killed, [record(error=killed.error, step=None)], **POLICY)[0] == "stop"


@pytest.mark.parametrize("error", [None, "a"])
def test_starts_that_come_no_further_are_not_tried_for_ever(error: str | None) -> None:
    """A time limit shorter than start-up, for example; crashes of changing kinds too."""
    idle = [record(error=None if error is None else f"{error}{number}", step=7, restart=number) for number in range(4)]
    policy = {**POLICY, "max_requeues": 20}
    decision, reason = decide(STOPPED, idle, **policy)
    assert decision == "stop" and "5 starts in a row came no further than step 7" in reason and "cluster.time" in reason
    assert decide(STOPPED, idle[1:], **policy)[0] == "requeue"
    assert decide(STOPPED, [record(step=6), *idle[1:]], **policy)[0] == "requeue"


def test_a_rank_that_ends_as_bad_input_ends_the_run_though_it_could_not_say_why() -> None:
    assert decide(Ending(exit_code=2, is_finished=False, failure=None, step=4), [], **POLICY)[0] == "stop"


def test_a_finished_run_that_could_not_be_judged_says_so() -> None:
    decision, reason = decide(Ending(exit_code=1, is_finished=True, failure=None, step=9), [], **POLICY)
    assert decision == "finished" and "exit code 1" in reason


def test_the_site_decides_how() -> None:
    assert decide(STOPPED, [], policy="resubmit", max_requeues=3)[0] == "resubmit"
    decision, reason = decide(STOPPED, [], policy="never", max_requeues=3)
    assert decision == "stop" and "cluster.requeue=never" in reason


def test_a_refused_requeue_and_the_job_sent_instead_count_once() -> None:
    once = [record("requeue"), record("resubmit")]
    assert decide(STOPPED, once * 3, **POLICY)[0] == "requeue"
    assert decide(STOPPED, once, policy="auto", max_requeues=1)[0] == "stop"


@given(
    st.integers(0, 5),
    st.lists(st.sampled_from(["requeue", "resubmit", "stop"]), max_size=20),
    st.sampled_from(["auto", "resubmit", "never"]),
)
def test_no_run_goes_on_for_ever(cap: int, decisions: list[str], policy: Any) -> None:
    history = [record(decision, restart=number, step=number + 8) for number, decision in enumerate(decisions)]
    decision, _ = decide(STOPPED, history, policy=policy, max_requeues=cap)
    num_requeues = sum(decision != "stop" for decision in decisions)
    assert (decision == "stop") == (policy == "never" or num_requeues >= cap)
