"""The decisions about the runs of a sweep, their submission as arrays, and interruptions."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galaxydist.cluster.records import JobFiles, JobRecord, RestartRecord
from galaxydist.cluster.slurm import JobState
from galaxydist.cluster.submit import JobRequest, deferred_signals
from galaxydist.cluster.sweep import SweepRun, read_sweep, resolve
from galaxydist.cluster.sweep_runner import (
    SweepDecision,
    SweepRunState,
    array_of,
    decide,
    read_run_states,
    render_runs,
    run_here,
    submit_arrays,
    summarise,
)
from galaxydist.errors import UserError
from galaxydist.evaluation.results_files import FORMAT_VERSION
from galaxydist.runs.folder import RunFolder, StoredRecipe
from galaxydist.runs.lock import RunLock
from tests.helpers.runs import captured_log

RUNNING, PENDING = JobState("RUNNING", "", 60.0, "n1"), JobState("PENDING", "Resources")
FAILED, CANCELLED = JobState("FAILED", "NonZeroExitCode"), JobState("CANCELLED", "by user 1000")


def make_runs(folder: Path, count: int = 2) -> list[SweepRun]:
    path = folder / "tried.yaml"
    seeds = ", ".join(map(str, range(count)))
    path.write_text(f"root: {folder}/runs\nset: {{recipe: vit}}\ngrid: {{seed: [{seeds}]}}\nevaluate: [original, balanced]\n")
    return resolve(read_sweep(path))


def note_job(run: SweepRun, job_id: str, scheduler: str = "slurm") -> None:
    record = JobRecord(
        job_id=job_id,
        scheduler="local" if scheduler == "local" else "slurm",
        cluster="a100",
        time=time.time(),
        nodes=1,
        tasks=1,
        time_limit_min=60,
        code=run.run_dir,
        folder=run.run_dir,
    )
    JobFiles(run.run_dir).append_job(record)


def evaluate_on(run: SweepRun, variant: str, step: int = 10, dataset: str = "galaxy10_decals") -> None:
    own = run.resolved.recipe.data
    place = RunFolder(run.run_dir).evaluation_dir
    if (dataset, variant) != (own.dataset, own.variant):
        place = place / f"{dataset}-{variant}"
    place.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT_VERSION, "dataset": dataset, "variant": variant, "step": step, "confusion": [[1]]}
    (place / "test.json").write_text(json.dumps(content))


def finish(run: SweepRun) -> RunFolder:
    folder = RunFolder(run.run_dir)
    folder.create()
    folder.write_recipe(StoredRecipe({}, {}))
    folder.write_result({"step": 10})
    return folder


@pytest.mark.parametrize(
    ("facts", "state", "is_due", "reason"),
    [
        (SweepRunState(), "new", True, ""),
        (SweepRunState(is_started=True), "stopped", True, "started, not finished"),
        (SweepRunState(is_started=True, failure="loss is nan at step 3"), "stopped", True, "loss is nan at step 3"),
        (SweepRunState(job_id="7", job_state=PENDING), "queued", False, "job 7 Resources"),
        (SweepRunState(True, job_id="7_1", job_state=RUNNING), "running", False, "job 7_1"),
        (SweepRunState(True, job_id="7", job_state=JobState("COMPLETING")), "running", False, "job 7"),
        (SweepRunState(True, job_id="7", job_state=JobState("REQUEUED")), "queued", False, "job 7"),
        (SweepRunState(True, True, job_id="7", job_state=JobState("COMPLETED")), "finished", False, ""),
        (SweepRunState(True, True, job_id="7", job_state=JobState("COMPLETING")), "finished", False, ""),
        (SweepRunState(True, True), "finished", False, ""),
        (SweepRunState(True, True, job_id="7", job_state=FAILED), "finished", False, ""),
        (SweepRunState(True, True, ("balanced",)), "unevaluated", True, "finished, not evaluated on balanced yet"),
        (
            SweepRunState(True, True, ("balanced",), "7", JobState("COMPLETED")),
            "unevaluated",
            True,
            "finished, not evaluated on balanced yet",
        ),
        (SweepRunState(True, True, ("balanced",), "7", RUNNING), "running", False, "job 7"),
        (SweepRunState(True, job_id="7", job_state=FAILED), "failed", True, "job 7: NonZeroExitCode"),
        (SweepRunState(True, job_id="7", job_state=FAILED, failure="loss is nan"), "failed", True, "job 7: loss is nan"),
        (SweepRunState(job_id="7", job_state=CANCELLED), "cancelled", True, "job 7: by user 1000"),
        (
            SweepRunState(True, job_id="7", job_state=JobState("TIMEOUT")),
            "timeout",
            True,
            "job 7: ended before the run was finished",
        ),
        (
            SweepRunState(True, job_id="7", job_state=JobState("UNKNOWN", "no accounting")),
            "unknown",
            True,
            "job 7: no accounting",
        ),
        (SweepRunState(True, holder="process 3 on here"), "running", False, "process 3 on here"),
        (SweepRunState(True, job_id="7", job_state=FAILED, holder="process 3 on here"), "running", False, "process 3 on here"),
    ],
)
def test_decide_maps_the_state_of_a_run_to_its_submission(facts: SweepRunState, state: str, is_due: bool, reason: str) -> None:
    assert decide(facts) == SweepDecision(state, is_due, reason)


def test_read_run_states_of_runs_without_jobs_does_not_query_slurm(tmp_path: Path) -> None:
    def read_states(_: Sequence[str]) -> dict[str, JobState]:
        raise AssertionError("asked")

    assert read_run_states(make_runs(tmp_path), read_states) == [SweepRunState(missing=("original", "balanced"))] * 2
    assert not (tmp_path / "runs").exists()


def test_read_run_states_combines_the_run_folder_with_the_active_job(tmp_path: Path) -> None:
    first, second, third = make_runs(tmp_path, 3)
    for job_id in ("5", "7_0", "6"):
        note_job(first, job_id)
    note_job(second, "7_1")
    RunFolder(third.run_dir).create()
    RunFolder(third.run_dir).write_failure("nonfinite", 3, "The loss is not finite.\nMore of it.")
    asked: list[str] = []

    def read_states(job_ids: Sequence[str]) -> dict[str, JobState]:
        asked.extend(job_ids)
        return {"5": FAILED, "7_0": RUNNING, "6": CANCELLED, "7_1": CANCELLED}

    facts = read_run_states([first, second, third], read_states)
    assert asked == ["5", "7_0", "6", "7_1"], "one question for all"
    assert [(fact.job_id, fact.job_state) for fact in facts] == [("7_0", RUNNING), ("7_1", CANCELLED), (None, None)]
    assert facts[2].failure == "The loss is not finite. at step 3" and facts[2].for_good
    assert not decide(facts[2]).is_due and "--retry-failed" in decide(facts[2]).reason
    assert decide(facts[2], retry_failed=True).is_due
    # The same crash twice is no failure.json's word, but the batch script's; of an earlier job it says nothing.
    for run, job_id in ((second, "7_1"), (first, "5")):
        JobFiles(run.run_dir).append_restart(RestartRecord(job_id, 0, 1, 3, "a", "stop", "twice", 1.0, for_good=True))
    assert [fact.for_good for fact in read_run_states([second, first], read_states)] == [True, False]


def test_finished_run_is_missing_evaluations_of_other_steps_or_data_sets(tmp_path: Path) -> None:
    (run,) = make_runs(tmp_path, 1)

    def missing() -> tuple[str, ...]:
        return read_run_states([run], lambda _: {})[0].missing

    finish(run)
    assert missing() == ("original", "balanced")
    evaluate_on(run, "original", step=10)
    assert missing() == ("balanced",)
    evaluate_on(run, "balanced", dataset="another_survey")
    assert missing() == ("balanced",)
    evaluate_on(run, "balanced", step=8)
    assert missing() == ("balanced",), "of an earlier checkpoint"
    evaluate_on(run, "balanced", step=10)
    assert missing() == () and decide(read_run_states([run], lambda _: {})[0]).state == "finished"


def test_run_locked_by_a_live_process_is_running_and_not_submitted(tmp_path: Path) -> None:
    (run,) = make_runs(tmp_path, 1)
    RunFolder(run.run_dir).create()
    with RunLock(run.run_dir / "lock.json", host="here", pid=os.getpid(), clock=time.time):
        decision = decide(read_run_states([run], lambda _: {})[0])
        assert decision == SweepDecision("running", False, f"process {os.getpid()} on here")
    assert decide(read_run_states([run], lambda _: {})[0]).is_due


def test_state_of_the_scheduler_overrides_the_lock_of_its_job(tmp_path: Path) -> None:
    (run,) = make_runs(tmp_path, 1)
    note_job(run, "7")
    with RunLock(run.run_dir / "lock.json", host="n1", pid=os.getpid(), clock=time.time, job_id="7"):
        assert decide(read_run_states([run], lambda _: {"7": JobState("NODE_FAIL")})[0]).state == "node_fail"


def test_local_job_is_running_only_while_its_submitit_process_lives(tmp_path: Path) -> None:
    (run,) = make_runs(tmp_path, 1)
    waits = "import sys; print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", waits, "submitit.local._local", str(run.run_dir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        note_job(run, str(process.pid), "local")
        assert decide(read_run_states([run], lambda _: {})[0]).state == "running"
        process.stdin.close()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie now
        assert decide(read_run_states([run], lambda _: {})[0]) == SweepDecision(
            "ended", True, f"job {process.pid}: ended before the run was finished"
        )
    note_job(run, str(os.getpid()), "local")  # a later process of the same number, not submitit's
    assert decide(read_run_states([run], lambda _: {})[0]).state == "ended"


class Sent:
    """Stands for the scheduler: takes arrays, gives ids, notes the jobs as the real submission does."""

    def __init__(self, during: Callable[[int], None] = lambda _: None) -> None:
        self.arrays: list[tuple[list[Path], int | None, str | None]] = []
        self.during = during

    def __call__(self, requests: Sequence[JobRequest], parallel: int | None, after: str | None) -> list[str]:
        number = len(self.arrays)
        self.during(number)
        self.arrays.append(([request.run_dir for request in requests], parallel, after))
        base = 100 + number
        return [f"{base}_{task}" for task in range(len(requests))] if len(requests) > 1 else [str(base)]


@pytest.fixture(scope="module")
def thirty(tmp_path_factory: pytest.TempPathFactory) -> list[SweepRun]:
    return make_runs(tmp_path_factory.mktemp("thirty"), 30)


@given(st.integers(0, 30), st.integers(1, 31), st.integers(1, 9))
def test_submit_arrays_chunks_all_runs_in_order_and_chains_the_arrays(
    thirty: list[SweepRun], count: int, chunk_size: int, parallel: int
) -> None:
    send = Sent()
    runs = thirty[:count]
    job_ids = submit_arrays(runs, send=send, chunk_size=chunk_size, parallel=parallel)
    assert [run_dir for run_dirs, _, _ in send.arrays for run_dir in run_dirs] == [run.run_dir for run in runs]
    assert len(job_ids) == count == len(set(job_ids))
    assert all(0 < len(run_dirs) <= chunk_size for run_dirs, _, _ in send.arrays)
    assert len(send.arrays) == -(-count // chunk_size)
    assert all(limit == parallel for _, limit, _ in send.arrays)
    assert [after for _, _, after in send.arrays] == [None, *(str(100 + number) for number in range(len(send.arrays) - 1))][
        : len(send.arrays)
    ]


@pytest.mark.parametrize("has_threads", [False, True])
def test_ctrl_c_waits_for_the_array_that_is_being_sent(thirty: list[SweepRun], has_threads: bool) -> None:
    """Another thread, as libraries start them, may take the signal."""
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    if has_threads:
        thread.start()
    try:
        _interrupt_the_second_array(thirty)
    finally:
        over.set()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def _interrupt_the_second_array(runs: list[SweepRun]) -> None:
    heard = []

    def interrupt(number: int) -> None:
        if number == 1:
            os.kill(os.getpid(), signal.SIGINT)  # the terminal's, to us and to sbatch
            code = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
            heard.append(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)

    sent = Sent(interrupt)

    def send(requests: Sequence[JobRequest], parallel: int | None, after: str | None) -> list[str]:
        with deferred_signals():  # as submit_requests does
            return sent(requests, parallel, after)

    with pytest.raises(KeyboardInterrupt):
        submit_arrays(runs, send=send, chunk_size=10, parallel=2)
    assert len(sent.arrays) == 2, "the second is whole, the third was not begun"
    assert heard == ["True\n"], "what is started meanwhile does not hear it"


def test_refusal_of_a_later_array_reports_the_runs_already_submitted(thirty: list[SweepRun]) -> None:
    def refuse(number: int) -> None:
        if number == 2:
            raise UserError("SLURM did not accept the job: QOSMaxSubmitJobPerUserLimit")

    with pytest.raises(UserError, match="QOSMaxSubmitJobPerUserLimit\n20 of 30 runs were submitted before; they stay"):
        submit_arrays(thirty, send=Sent(refuse), chunk_size=10, parallel=2)


@pytest.mark.parametrize(("count", "parallel"), [(5, 1), (5, 2), (2, 9)])
def test_local_sweep_runs_at_most_parallel_runs_at_a_time(thirty: list[SweepRun], count: int, parallel: int) -> None:
    send = Sent()
    left: dict[str, int] = {}
    most = 0

    def pause() -> None:
        nonlocal most
        started = {str(100 + number) for number in range(len(send.arrays))}
        for job_id in started - set(left):
            left[job_id] = 1 + int(job_id) % 3
        most = max(most, sum(turns > 0 for turns in left.values()))
        for job_id in left:
            left[job_id] -= 1

    bad, others = thirty[1], thirty[count]  # another command has started the last one

    def decide_again(run: SweepRun) -> SweepDecision:
        if run is others:
            return SweepDecision("running", False, "job 7")
        is_over = run is not bad and left.get(str(100 + thirty.index(run))) is not None
        return SweepDecision("finished", False) if is_over else SweepDecision("failed", True, "why")

    with captured_log() as said:
        failed = run_here(
            thirty[: count + 1],
            send=send,
            lock=contextlib.nullcontext,
            parallel=parallel,
            is_running=lambda run: left[str(100 + thirty.index(run))] > 0,
            decide_again=decide_again,
            pause=pause,
        )
    assert failed == [bad]
    assert most == min(parallel, count)
    assert [run_dirs for run_dirs, _, _ in send.arrays] == [[run.run_dir] for run in thirty[:count]]
    assert sum(line.startswith("finished") for line in said) == count - 1
    assert f"running  {others.name}  {others.label}  job 7" in said


def test_array_of_strips_the_task_index() -> None:
    assert (array_of("123_4"), array_of("123")) == ("123", "123")


def test_sweep_table_and_summary_show_state_action_and_reason(thirty: list[SweepRun]) -> None:
    decisions = [
        SweepDecision("finished", False, ""),
        SweepDecision("failed", True, "job 7_1: loss is nan"),
        SweepDecision("new", True, ""),
    ]
    lines = render_runs(thirty[:3], decisions).splitlines()
    assert lines[0].split() == ["run", "settings", "state", "action", "why"]
    assert lines[2].split() == [thirty[1].name, "seed=1", "failed", "submit", "job", "7_1:", "loss", "is", "nan"]
    assert lines[1].split()[-1] == "leave" and len(lines) == 4
    assert summarise(decisions) == "3 runs: 1 finished, 2 to submit (1 failed, 1 new)"
    assert summarise(decisions[:1]) == "1 run: 1 finished"
