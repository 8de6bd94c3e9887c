"""``galaxydist status``, ``logs`` and ``cancel``, without SLURM: folders, and jobs of submitit's local executor."""

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from galaxydist.cli.main import main
from galaxydist.cluster import running_jobs
from galaxydist.cluster.records import JobFiles, JobRecord
from tests.helpers.status_runs import add_job

HEAVY = {"torch", "numpy", "pydantic", "wandb", "accelerate", "timm", "submitit", "yaml"}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, on a machine without SLURM."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def run_files(here: Path) -> JobFiles:
    """A run that was submitted and has printed a little."""
    files = JobFiles(here / "runs" / "vit")
    add_job(files, job_id="77")
    files.slurm_dir.mkdir(parents=True)
    files.rank_log(0).write_text("".join(f"line {number}\n" for number in range(100)))
    return files


def test_status_without_runs_names_the_searched_folder(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["status"]) == 0
    assert "no runs under ./runs" in capfd.readouterr().out
    assert main(["status", "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == []
    assert main(["status", "nowhere"]) == 2
    assert "nowhere: there is no such folder, nor runs/nowhere" in capfd.readouterr().err


@pytest.mark.usefixtures("run_files")
@pytest.mark.parametrize("words", [[], ["vit"], ["runs/vit"], ["runs", "runs/vit"], ["."]])
def test_status_finds_runs_by_folder_and_name(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["status", *words]) == 0
    out = capfd.readouterr().out
    assert "UNKNOWN" in out
    assert "There is no SLURM on this machine" in out
    assert "1 run: 1 unknown" in out


def test_status_labels_runs_of_a_folder_by_the_keys_that_differ(run_files: JobFiles, capfd: pytest.CaptureFixture[str]) -> None:
    folder = run_files.run_dir.parent / "sweep"
    for model, variant, seed in (("vit", "original", 0), ("vit", "original", 1), ("resnet50", "balanced", 0)):
        arguments = (f"recipe=/x/{model}.yaml", f"data.variant={variant}", "optim.lr=0.1", f"seed={seed}", f"run.dir=/{seed}")
        add_job(JobFiles(folder / f"{model}-{seed}"), arguments=arguments)
    assert main(["status", "runs/sweep", "--json"]) == 0
    labels = {status["name"]: status["label"] for status in json.loads(capfd.readouterr().out)}
    assert labels == {"vit-0": "vit original seed=0", "vit-1": "vit original seed=1", "resnet50-0": "resnet50 balanced seed=0"}
    assert main(["status", "runs/sweep"]) == 0
    assert "vit original seed=1" in capfd.readouterr().out
    assert main(["status", "runs/vit", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)[0]["label"] == ""


@pytest.mark.usefixtures("run_files")
def test_status_json_prints_only_json_on_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--json"]) == 0
    printed = capfd.readouterr()
    (status,) = json.loads(printed.out)
    assert (status["name"], status["job_id"], status["state"], status["group"]) == ("vit", "77", "UNKNOWN", "unknown")
    assert "no SLURM on this machine" in printed.err
    assert main(["status", "--json", "--watch"]) == 2


@pytest.mark.usefixtures("run_files")
@pytest.mark.parametrize("command", ["status", "logs", "cancel"])
def test_status_logs_and_cancel_import_no_heavy_library(command: str) -> None:
    code = (
        f"import sys; from galaxydist.cli.main import main; main(['{command}', 'vit']); print(sorted(set(sys.modules) & {HEAVY}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_status_watch_refreshes_until_the_run_is_finished(run_files: JobFiles) -> None:
    command = [sys.executable, "-m", "galaxydist.cli.main", "status", "--watch", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "1 unknown" in line:
                run_files.run_dir.joinpath("result.json").write_text("{}")
            if "1 finished" in line:
                break
        process.send_signal(2)
        assert process.wait(300) == 0


def test_logs_prints_the_last_lines_of_the_chosen_rank(run_files: JobFiles, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    run_files.rank_log(3).write_bytes(b"rank 3 \xff\nepoch 1\r 50%\repoch 1\r100%\nlast")
    assert main(["logs", "vit", "--lines", "2"]) == 0
    assert capfdbinary.readouterr().out == b"line 98\nline 99\n"
    assert main(["logs", "runs/vit", "--rank", "3"]) == 0
    assert capfdbinary.readouterr().out == b"rank 3 \xff\n100%\nlast\n"
    assert main(["logs", "vit", "--rank", "1"]) == 2
    assert b"there are logs of rank 0, 3" in capfdbinary.readouterr().err
    assert main(["logs", "runs"]) == 2
    assert b"is not a run folder" in capfdbinary.readouterr().err


def test_logs_prints_exactly_the_requested_number_of_last_lines(run_files: JobFiles, capfd: pytest.CaptureFixture[str]) -> None:
    run_files.rank_log(0).write_text("".join(f"{number:0500d}\n" for number in range(1000)))
    for count in (1, 400, 1000, 2000):
        assert main(["logs", "vit", "--lines", str(count)]) == 0
        assert [int(line) for line in capfd.readouterr().out.split()] == list(range(max(0, 1000 - count), 1000))


def test_logs_without_rank_logs_shows_the_logs_of_submitit(run_files: JobFiles, capfd: pytest.CaptureFixture[str]) -> None:
    run_files.rank_log(0).write_text("")
    assert main(["logs", "vit"]) == 2
    assert "has printed nothing yet (job 77)" in capfd.readouterr().err
    (run_files.slurm_dir / "77_0_log.out").write_text("")
    (run_files.slurm_dir / "77_0_log.err").write_text("srun: error: no such python\n")
    add_job(run_files, job_id="78")  # the newest has printed nothing
    assert main(["logs", "vit"]) == 0
    out = capfd.readouterr().out
    assert "77_0_log.err <==" in out
    assert "srun: error: no such python" in out
    assert ".out" not in out


def test_logs_follow_prints_new_lines_and_survives_truncation(run_files: JobFiles) -> None:
    command = [sys.executable, "-m", "galaxydist.cli.main", "logs", "vit", "--lines", "1", "--follow"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "line 99\n"
        with run_files.rank_log(0).open("a") as file:
            file.write("line 100\n")
        assert process.stdout.readline() == "line 100\n"
        run_files.rank_log(0).write_text("anew\n")
        assert process.stdout.readline() == "anew\n"
        process.send_signal(2)
        assert process.wait(300) == 0


@pytest.fixture(params=[(), ("true",)], ids=["process", "shell"])
def local_run(
    here: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[JobFiles, JobRecord]]:
    """A run in submitit's local executor, with and without setup lines, which sleeps."""
    import submitit

    monkeypatch.undo()  # its programs are needed
    monkeypatch.chdir(here)
    files = JobFiles(here / "runs" / "local run's")
    executor = submitit.AutoExecutor(files.slurm_dir, cluster="local")
    executor.update_parameters(timeout_min=5, **({"local_setup": list(request.param)} if request.param else {}))
    # A program of its own, because submitit's handler would ignore a SIGTERM that comes while the task runs.
    submitted = executor.submit(os.execv, "/bin/sleep", ["/bin/sleep", "120"])
    job = add_job(files, job_id=submitted.job_id, scheduler="local", time=time.time(), time_limit_min=5)
    monkeypatch.setenv("PATH", str(here / "nothing"))
    started = [psutil.Process(int(submitted.job_id))]
    yield files, job
    started += started[0].children(recursive=True) if started[0].is_running() else []
    for process in started:
        if process.is_running():
            process.kill()
    submitted._process.wait(300)


@pytest.mark.multiprocess
def test_local_job_is_shown_as_running_and_ended_by_cancel(
    local_run: tuple[JobFiles, JobRecord], capfd: pytest.CaptureFixture[str]
) -> None:
    _, job = local_run
    assert main(["status", "--json"]) == 0
    (status,) = json.loads(capfd.readouterr().out)
    assert (status["state"], status["job_id"], status["scheduler"]) == ("RUNNING", job.job_id, "local")
    assert status["time_left_s"] is None  # processes of this machine have no limit
    controller = psutil.Process(int(job.job_id))
    deadline = time.monotonic() + 300
    while not any(child.cmdline()[:1] == ["/bin/sleep"] for child in controller.children(recursive=True)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    tasks = controller.children(recursive=True)
    assert main(["cancel", "local run's"]) == 0
    assert f"local job {job.job_id} (runs/local run's): got the signal to save and exit" in capfd.readouterr().out
    assert psutil.wait_procs([*tasks], timeout=120)[1] == []
    deadline = time.monotonic() + 300
    while running_jobs.find_controller(job) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert main(["cancel", "local run's"]) == 0
    assert "it has no job that waits or runs" in capfd.readouterr().out
    assert main(["status"]) == 0
    assert "NEW" in capfd.readouterr().out


def test_process_with_a_reused_pid_is_not_taken_for_the_local_job(here: Path) -> None:
    files = JobFiles(here / "runs" / "local")
    mine = add_job(files, job_id=str(os.getpid()), scheduler="local", time=time.time())
    assert running_jobs.find_controller(mine) is None
    assert not running_jobs.stop(mine)
    assert running_jobs.find_controller(add_job(files, job_id="no number", scheduler="local")) is None


def test_cancel_without_slurm_or_runs_exits_with_2_and_the_reason(run_files: JobFiles, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["cancel", "vit"]) == 2
    assert "no SLURM on this machine" in capfd.readouterr().err
    assert main(["cancel", "123_4"]) == 2
    assert "no SLURM on this machine" in capfd.readouterr().err
    (run_files.run_dir.parent / "empty").mkdir()
    assert main(["cancel", "empty"]) == 2
    assert "contains no runs" in capfd.readouterr().err


def test_cancel_of_several_jobs_without_terminal_requires_yes(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))  # no terminal
    assert main(["cancel", "1", "2"]) == 2
    assert "This would end 2 jobs (job 1, job 2). Add --yes to do so." in capfd.readouterr().err
