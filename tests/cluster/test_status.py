"""What a user sees of runs, told from their folders alone."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from galaxydist.cluster.records import JobFiles, RestartRecord
from galaxydist.cluster.running_jobs import newest_job
from galaxydist.cluster.slurm import JobState
from galaxydist.cluster.srun_messages import find_death
from galaxydist.cluster.status import (
    GROUPS,
    Overview,
    Progress,
    RunStatus,
    count_restarts,
    read_overview,
    read_progress,
    read_status,
)
from galaxydist.cluster.status_table import duration_text, render_overview, summary_text
from galaxydist.runs.events import Event, append_event, read_last_event
from galaxydist.runs.folder import RunFolder
from galaxydist.runs.listing import find_runs
from galaxydist.runs.lock import RunLock
from tests.helpers.runs import quick_settings, read_metrics, run_here
from tests.helpers.status_runs import JOB, add_job, add_validations, copy_run

RESTART = RestartRecord(JOB.job_id, 0, 1, 6, "rank 1 died", "requeue", "it may go better", 1.0)


@pytest.fixture(scope="module")
def finished(blobs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was started by hand and came to its end."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    assert run_here(quick_settings(blobs, run_dir, train__epochs=3)) == 0
    return run_dir


@pytest.fixture
def no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


def look(run: Path, job: JobState | None = None) -> RunStatus:
    """The run as ``status`` sees it, with what SLURM says of its job."""
    return read_status(run, run.name, JobFiles(run).jobs(), {JOB.job_id: job} if job is not None else {})


def test_status_of_a_finished_run_without_job_is_finished_with_progress(finished: Path) -> None:
    status = look(finished)
    best = max(line["val/accuracy"] for line in read_metrics(finished) if "val/accuracy" in line)
    assert (status.state, status.group, status.job, status.last_error, status.restarts) == ("FINISHED", "finished", None, None, 0)
    assert dataclasses.replace(status.progress, img_s=None, updated=None) == Progress(
        step=9, total_steps=9, epoch=3.0, epochs=3, metric="accuracy", best=best, batch_size=24
    )
    assert status.progress.img_s is not None
    assert status.progress.img_s > 0
    assert status.to_dict()["last_event"]["kind"] == "finish"


def test_last_event_is_the_newest_one_that_this_version_knows(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert read_last_event(path) is None
    for event in (Event(1.0, "start", "begins"), Event(2.0, "data_wait", "waits", 7)):
        append_event(path, event)
    with path.open("a") as file:
        file.write('{"time": 3.0, "kind": "of a later version", "text": ""}\n{"time": 4.0, "kind": "st')
    assert read_last_event(path) == event


def test_run_without_job_is_running_while_its_lock_is_held_and_stopped_after(finished: Path, tmp_path: Path) -> None:
    copy_run(finished, tmp_path / "run")
    assert look(tmp_path / "run").state == "STOPPED"
    with RunLock(tmp_path / "run" / "lock.json", host=socket.gethostname(), pid=os.getpid(), clock=time.time):
        assert look(tmp_path / "run").state == "RUNNING"
    assert look(tmp_path / "run").state == "STOPPED"


def test_a_run_whose_process_was_killed_has_failed(finished: Path, tmp_path: Path) -> None:
    copy_run(finished, tmp_path / "run")
    code = (
        "import os, socket, sys, time; from pathlib import Path; from galaxydist.runs.lock import RunLock; "
        "RunLock(Path(sys.argv[1]), host=socket.gethostname(), pid=os.getpid(), clock=time.time).acquire(); os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "run" / "lock.json"], check=False)
    status = look(tmp_path / "run")
    assert status.state == "FAILED"
    assert "is gone" in status.reason


@pytest.mark.parametrize(("age_s", "state"), [(30, "RUNNING"), (1000, "FAILED")])
def test_lock_of_another_host_counts_as_live_by_its_heartbeat_age(
    finished: Path, tmp_path: Path, age_s: float, state: str
) -> None:
    copy_run(finished, tmp_path / "run")
    path = tmp_path / "run" / "lock.json"
    lock = RunLock(path, host="elsewhere", pid=os.getpid(), clock=time.time)
    path.write_text(json.dumps(dataclasses.asdict(lock.owner)))
    os.utime(path, (time.time() - age_s,) * 2)
    assert look(tmp_path / "run").state == state


@pytest.mark.parametrize("state", ["NODE_FAIL", "TIMEOUT", "OUT_OF_MEMORY", "CANCELLED"])
def test_fresh_lock_of_an_ended_job_does_not_override_the_state_of_slurm(finished: Path, tmp_path: Path, state: str) -> None:
    """The node died a moment ago: its lock looks alive for minutes, but SLURM knows."""
    copy_run(finished, tmp_path / "run", job_id="12_3")
    path = tmp_path / "run" / "lock.json"
    owner = RunLock(path, host="elsewhere", pid=os.getpid(), clock=time.time, job_id="12_3").owner
    path.write_text(json.dumps(dataclasses.asdict(owner)))
    files = JobFiles(tmp_path / "run")
    assert read_status(tmp_path / "run", "run", files.jobs(), {"12_3": JobState(state)}).state == state
    assert read_status(tmp_path / "run", "run", files.jobs(), {"12_3": JobState("UNKNOWN")}).state == "RUNNING"
    # a process of another job is another matter
    path.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(owner, job_id="99"))))
    assert read_status(tmp_path / "run", "run", files.jobs(), {"12_3": JobState(state)}).state == "RUNNING"


def test_refused_requeue_and_its_resubmission_count_as_one_restart() -> None:
    refused, sent = RESTART, dataclasses.replace(RESTART, decision="resubmit")
    assert count_restarts([refused, sent], {}) == 1
    assert count_restarts([refused, sent, dataclasses.replace(RESTART, job_id="2")], {}) == 2


def test_unreadable_run_folder_is_skipped_and_the_others_are_listed(finished: Path, tmp_path: Path) -> None:
    copy_run(finished, tmp_path / "runs" / "mine", is_finished=True)
    copy_run(finished, tmp_path / "runs" / "theirs", is_finished=True)
    (tmp_path / "runs" / "theirs").chmod(0)
    code = (
        "import os, sys; from pathlib import Path; from galaxydist.cluster.status import read_overview; "
        "os.setuid(65534) if os.getuid() == 0 else None; "
        "print([run.name for run in read_overview([Path(sys.argv[1])]).runs])"
    )
    for place in (tmp_path, *list(tmp_path.parents)[:-2]):  # another user may look in
        place.chmod(place.stat().st_mode | 0o055)
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "runs"], capture_output=True, text=True, check=False)
    (tmp_path / "runs" / "theirs").chmod(0o755)
    assert done.stdout == "['mine']\n", done.stderr


def test_run_folder_with_only_a_recipe_is_new(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(finished / "recipe.json", tmp_path / "run")
    status = look(tmp_path / "run")
    assert (status.state, status.progress.step, status.progress.epochs, status.progress.best) == ("NEW", 0, 3, None)


@pytest.mark.parametrize(
    ("state", "shown", "group"),
    [
        ("RUNNING", "RUNNING", "running"),
        ("COMPLETING", "COMPLETING", "running"),
        ("PENDING", "PENDING", "pending"),
        ("REQUEUED", "REQUEUED", "pending"),
        ("TIMEOUT", "TIMEOUT", "failed"),
        ("NODE_FAIL", "NODE_FAIL", "failed"),
        ("OUT_OF_MEMORY", "OUT_OF_MEMORY", "failed"),
        ("PREEMPTED", "PREEMPTED", "failed"),
        ("CANCELLED", "CANCELLED", "stopped"),
        ("COMPLETED", "COMPLETED", "stopped"),
    ],
)
def test_active_or_ended_state_of_slurm_determines_state_and_group(
    finished: Path, tmp_path: Path, state: str, shown: str, group: str
) -> None:
    copy_run(finished, tmp_path / "run", job_id=JOB.job_id)
    status = look(tmp_path / "run", job=JobState(state, "why", 60.0, "n1", 2))
    assert (status.state, status.group, status.restarts, status.nodes) == (shown, group, 2, "n1")


def test_run_with_a_result_is_finished_however_its_job_ended(finished: Path, tmp_path: Path) -> None:
    copy_run(finished, tmp_path / "run", is_finished=True, job_id=JOB.job_id)
    for state in ("COMPLETED", "TIMEOUT", "NODE_FAIL"):
        assert look(tmp_path / "run", job=JobState(state)).state == "FINISHED"
    assert look(tmp_path / "run", job=JobState("COMPLETING")).state == "COMPLETING"


def test_run_with_a_job_but_without_slurm_is_unknown_until_a_stop_is_recorded(finished: Path, tmp_path: Path) -> None:
    files = copy_run(finished, tmp_path / "run", job_id=JOB.job_id)
    assert look(tmp_path / "run").state == "UNKNOWN"
    files.append_restart(dataclasses.replace(RESTART, decision="stop", reason="the same crash twice"))
    status = look(tmp_path / "run")
    assert (status.state, status.last_error) == ("FAILED", "rank 1 died")


def test_ended_job_without_accounting_gets_its_state_from_the_run_folder(finished: Path, tmp_path: Path) -> None:
    unknown = JobState("UNKNOWN", "SLURM keeps no accounting here")
    files = copy_run(finished, tmp_path / "run", job_id=JOB.job_id)
    assert look(tmp_path / "run", job=unknown).state == "STOPPED"
    RunFolder(files.run_dir).write_failure("nonfinite", 3, "the loss is not finite")
    status = look(tmp_path / "run", job=unknown)
    assert (status.state, status.reason, status.last_error) == ("FAILED", unknown.reason, "the loss is not finite")
    add_job(files, time=time.time())  # SLURM may not know it yet
    assert look(tmp_path / "run", job=unknown).state == "UNKNOWN"


def test_newest_job_prefers_the_active_job_over_later_ended_ones(tmp_path: Path) -> None:
    files = JobFiles(tmp_path)
    jobs = [add_job(files, job_id=job_id) for job_id in ("1", "2", "3")]
    states = {"1": JobState("TIMEOUT"), "2": JobState("RUNNING"), "3": JobState("CANCELLED")}
    assert newest_job(jobs, states) == (jobs[1], states["2"])
    assert newest_job(jobs, {**states, "2": JobState("FAILED")}) == (jobs[2], states["3"])
    assert newest_job([], {}) == (None, None)


def test_count_restarts_counts_requeues_resubmissions_and_preemptions_once() -> None:
    requeued = [dataclasses.replace(RESTART, restart=restart) for restart in (0, 1)]
    assert count_restarts([], {}) == 0
    assert count_restarts(requeued, {}) == 2
    assert count_restarts(requeued, {JOB.job_id: JobState("RUNNING", restarts=2)}) == 2
    # A preemption: SLURM put it back itself, and wrote nothing.
    assert count_restarts(requeued[:1], {JOB.job_id: JobState("RUNNING", restarts=3)}) == 3
    resubmitted = dataclasses.replace(RESTART, job_id="1", decision="resubmit", restart=1)
    assert count_restarts([resubmitted, *requeued], {}) == 1 + 1 + 2


def test_last_error_of_a_failed_run_comes_from_failure_restarts_and_logs(finished: Path, tmp_path: Path) -> None:
    failed = JobState("FAILED")
    files = copy_run(finished, tmp_path / "run", job_id=JOB.job_id)
    assert look(files.run_dir, job=failed).last_error is None
    files.slurm_dir.mkdir(parents=True)  # as the submission did
    assert "does not see that folder" in str(look(files.run_dir, job=failed).last_error)
    files.rank_log(1).write_bytes(b"fine\nRuntimeError: \xffirst\nstep 1\rstep 2\rValueError: last\n\x1b[31mbye\x1b[0m\n")
    assert look(files.run_dir, job=failed).last_error == "ValueError: last"
    files.rank_log(0).write_text("galaxydist: error: a disk is full\n")
    assert look(files.run_dir, job=failed).last_error == "galaxydist: error: a disk is full"
    files.append_restart(dataclasses.replace(RESTART, error=None))
    assert look(files.run_dir, job=failed).last_error == "it may go better"
    RunFolder(files.run_dir).write_failure("crash", 3, "rank 1 was killed")
    assert look(files.run_dir, job=failed).last_error == "rank 1 was killed"
    assert look(files.run_dir, job=JobState("RUNNING")).last_error is None


def test_last_error_ignores_errors_of_earlier_starts(finished: Path, tmp_path: Path) -> None:
    files = copy_run(finished, tmp_path / "run", job_id=JOB.job_id)
    folder = RunFolder(files.run_dir)
    files.slurm_dir.mkdir(parents=True)
    (files.slurm_dir / f"{JOB.job_id}_0_log.err").write_text(
        "galaxydist: start 0\nsrun: error: n1: task 0: Killed\ngalaxydist: start 1\n"
    )
    files.rank_log(0).write_text(
        f"galaxydist: job {JOB.job_id}, restart 0\nValueError: old\ngalaxydist: job {JOB.job_id}, restart 1\n"
    )
    folder.write_failure("crash", 3, "Connection reset by peer", start=f"{JOB.job_id}.0")
    files.append_restart(dataclasses.replace(RESTART, error="rank 1 on n2 was ended by signal 9, SIGKILL"))
    # While the job waits for its next start, the last one is the newest.
    assert look(files.run_dir, job=JobState("PENDING", restarts=1)).last_error == "rank 1 on n2 was ended by signal 9, SIGKILL"
    ended = {
        state: look(files.run_dir, job=JobState(state, restarts=1)).last_error for state in ("TIMEOUT", "CANCELLED", "FAILED")
    }
    assert ended == {"TIMEOUT": ended["TIMEOUT"], "CANCELLED": None, "FAILED": None}
    assert "time limit" in str(ended["TIMEOUT"])
    # A start that SLURM ended and queued again by itself: the ranks that lived on blame the connection.
    assert "one of its nodes failed" in str(look(files.run_dir, job=JobState("PENDING", restarts=2)).last_error)
    add_job(files, job_id="5")  # another job, of which nothing is known yet
    assert look(files.run_dir).last_error is None


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("slurmstepd: error: execve(): /opt/py: No such file or directory", "nodes do not have /opt/py: set cluster.python"),
        ("/spool/slurm_script: line 30: /opt/python3: No such file or directory", "do not have /opt/python3: set cluster.python"),
        ("/opt/python3: Error while finding module: No module named galaxydist", "has no galaxydist: set cluster.python"),
        ("slurmstepd-n2: error: Could not open stdout file /r/1_1_log.out: No such file", "a node does not see /r/1_1: put"),
    ],
)
def test_last_error_for_missing_python_or_folder_on_a_node_has_a_remedy(
    finished: Path, tmp_path: Path, said: str, remedy: str
) -> None:
    files = copy_run(finished, tmp_path / "run", job_id="7")
    files.slurm_dir.mkdir(parents=True)
    (files.slurm_dir / "7_0_log.err").write_text(f"galaxydist: start 0\n{said}\n")
    status = read_status(files.run_dir, "run", files.jobs(), {"7": JobState("FAILED")})
    assert remedy in str(status.last_error)


def test_find_death_names_the_first_killed_rank_not_the_later_exits() -> None:
    killed = [
        "srun: error: n2: task 1: Killed",
        "srun: Terminating StepId=5.0",
        "srun: error: n1: task 0: Exited with exit code 1",
    ]
    assert find_death(killed).startswith("rank 1 on n2 was ended by signal 9, SIGKILL")
    assert find_death(killed[::-1]) == ""  # the failure that rank 0 noted says more
    assert (
        find_death(["srun: error: n1: tasks 0-1: Segmentation fault (core dumped)"])
        == "rank 0 on n1 was ended by signal 11, SIGSEGV"
    )
    assert "raise cluster.memory" in find_death(["srun: error: n1: task 0: Out Of Memory"])
    assert find_death(["srun: error: Node failure on n2", "srun: error: n1: task 0: Terminated"]) == "node n2 failed"
    assert find_death(["slurmstepd-n1: error: *** STEP 8.0 ON n1 CANCELLED AT now ***", "srun: error: n1: task 0: Killed"]) == ""


def test_best_validation_is_found_thousands_of_lines_back_in_the_metrics(finished: Path, tmp_path: Path) -> None:
    files = copy_run(finished, tmp_path / "run")
    (best_at,) = {int(name.split("-")[1]) for name in [(files.run_dir / "checkpoints" / "best").read_text().strip()]}
    best = read_progress(RunFolder(files.run_dir)).best
    lines = read_metrics(files.run_dir)
    assert best == next(line["val/accuracy"] for line in lines if line["step"] == best_at and "val/accuracy" in line)
    add_validations(files.run_dir, dict.fromkeys(range(10, 3000), 0.01))
    progress = read_progress(RunFolder(files.run_dir))
    assert (progress.step, progress.best) == (2999, best)
    add_validations(files.run_dir, {3000: 0.99})  # not saved as the best yet
    assert read_progress(RunFolder(files.run_dir)).best == 0.99


def test_best_validation_of_a_loss_metric_is_the_smallest(finished: Path, tmp_path: Path) -> None:
    files = copy_run(finished, tmp_path / "run")
    path = files.run_dir / "recipe.json"
    path.write_text(path.read_text().replace('"train.metric": "accuracy"', '"train.metric": "loss"'))
    losses = [line["val/loss"] for line in read_metrics(files.run_dir) if "val/loss" in line]
    assert read_progress(RunFolder(files.run_dir)).best == min(losses)
    add_validations(files.run_dir, {12: 0.0, 15: 9.0}, "loss")
    assert read_progress(RunFolder(files.run_dir)).best == 0.0


def test_runs_are_found_two_levels_down(finished: Path, tmp_path: Path) -> None:
    for name in ("b", "sweep/a", "sweep/slurm/c", "deep/er/than/that", ".hidden", "sweep/run/checkpoints/x"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("b", "sweep/a", "deep/er/than/that", ".hidden", "sweep/run", "sweep/run/checkpoints/x"):
        shutil.copy(finished / "recipe.json", tmp_path / name)
    (tmp_path / "sweep" / "link").symlink_to(tmp_path / "b")
    assert [str(run.relative_to(tmp_path)) for run in find_runs(tmp_path)] == ["b", "sweep/a", "sweep/run"]
    assert find_runs(tmp_path / "b") == [tmp_path / "b"]


@pytest.mark.usefixtures("no_slurm")
def test_overview_sorts_running_first_keeps_damaged_runs_and_counts_groups(finished: Path, tmp_path: Path) -> None:
    for name in ("seed10", "seed2"):
        copy_run(finished, tmp_path / name, is_finished=True)
    copy_run(finished, tmp_path / "away", job_id="77")
    (copy_run(finished, tmp_path / "torn").run_dir / "failure.json").write_text("{")
    (copy_run(finished, tmp_path / "unreadable").run_dir / "failure.json").mkdir()  # as a file system that fails
    copy_run(finished, tmp_path / "damaged").jobs_path.write_text("{}\n")
    copy_run(finished, tmp_path / "zzz")
    with RunLock(tmp_path / "zzz" / "lock.json", host=socket.gethostname(), pid=os.getpid(), clock=time.time):
        overview = read_overview([tmp_path, tmp_path / "zzz"])
    assert [status.name for status in overview.runs] == ["zzz", "away", "damaged", "torn", "unreadable", "seed2", "seed10"]
    states = ["RUNNING", "UNKNOWN", "DAMAGED", "DAMAGED", "DAMAGED", "FINISHED", "FINISHED"]
    assert [status.state for status in overview.runs] == states
    assert "no SLURM on this machine" in overview.slurm_error
    assert "jobs.jsonl, line 1" in (overview.runs[2].last_error or "")
    assert "failure.json" in (overview.runs[3].last_error or "")
    assert summary_text(overview.runs) == "7 runs: 1 running, 1 unknown, 3 failed, 2 finished"
    json.dumps([status.to_dict() for status in overview.runs], allow_nan=False)


def show(overview: Overview, width: int) -> list[str]:
    console = Console(width=width, highlight=False)
    with console.capture() as capture:
        console.print(render_overview(overview, width))
    return [line.rstrip() for line in capture.get().splitlines()]


@pytest.mark.parametrize("width", [30, 40, 60, 80, 100, 140, 200, 300])
def test_status_table_fits_any_terminal_width_without_truncation(width: int) -> None:
    progress = Progress(120, 4800, 1.5, 60, 1234.5, "balanced_accuracy", 0.8123, 192, 1.0)
    name, error = "sweep/" + "vit_scratch-balanced-seed" * 2, "a long error " * 12 + "[red]with its end"
    event = Event(time.time() - 60, "data_wait", "waits", 7)
    runs = (
        RunStatus(Path("a"), name, "RUNNING", "", JOB, "n[1-2]", progress, 3, 3600.0, None, event),
        RunStatus(Path("b"), "b", "OUT_OF_MEMORY", "x" * 100, JOB, "n1", progress, 0, None, error),
    )
    lines = show(Overview(runs, "SLURM did not answer"), width)
    assert max(map(len, lines)) <= width
    text = "".join("".join(lines).split())
    for word in ("RUNNING", "OUT_OF_MEMORY", "SLURMdidnotanswer", "2runs:1running,1failed"):
        assert word in text
    if width >= 60:
        assert "120/4800" in text
    if width >= 200:
        for word in ("1,234", "0.8123balanced", "1h00m", "1.5/60", "n[1-2]", "data_wait1mago", JOB.job_id):
            assert word in text
    assert "".join(error.split())[-12:] in text or width >= 140  # wrapped in a column of its own there
    assert sum("…" in line for line in lines) == 0


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "-"), (0, "0s"), (59.4, "59s"), (60, "1m"), (3900, "1h 05m"), (86400 * 2 + 3600 * 3, "2d 3h")]
)
def test_duration_text_uses_seconds_minutes_hours_and_days(seconds: float | None, text: str) -> None:
    assert duration_text(seconds) == text


def test_every_run_state_maps_to_its_group() -> None:
    assert [
        RunStatus(Path("a"), "a", state).group for state in ("RUNNING", "PENDING", "UNKNOWN", "BOOT_FAIL", "NEW", "FINISHED")
    ] == [*GROUPS]


@pytest.mark.usefixtures("no_slurm")
def test_overview_of_100_runs_takes_under_two_seconds_of_cpu(finished: Path, tmp_path: Path) -> None:
    first = copy_run(finished, tmp_path / "run0").run_dir
    add_validations(first, dict.fromkeys(range(10, 5000), 0.5))
    for number in range(1, 100):
        shutil.copytree(first, tmp_path / f"run{number}", copy_function=os.link)
    start = time.process_time()
    assert len(read_overview([tmp_path]).runs) == 100
    assert time.process_time() - start < 2.0
