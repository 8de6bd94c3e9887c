"""``galaxydist train``: the trainer without a launcher, in one process or several."""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from galaxydist.cli.main import main
from tests.helpers.runs import quick_settings, read_metrics


@contextlib.contextmanager
def started(settings: list[str], log: Path) -> Iterator[tuple["subprocess.Popen[bytes]", list[psutil.Process]]]:
    """A run with two processes that has taken steps, and its ranks."""
    metrics = (
        Path(next(setting for setting in settings if setting.startswith("run.dir=")).removeprefix("run.dir=")) / "metrics.jsonl"
    )
    before = metrics.stat().st_size if metrics.exists() else 0
    with log.open("ab") as file:
        parent = subprocess.Popen(
            [sys.executable, "-m", "galaxydist", "train", *settings, "--processes", "2"], stdout=file, stderr=file
        )
    ranks: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 240
        while not metrics.exists() or metrics.stat().st_size <= before:
            assert parent.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        ranks = psutil.Process(parent.pid).children(recursive=True)
        yield parent, ranks
    finally:
        for process in (parent, *ranks):
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.kill()
        parent.wait()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_train_sigterm_saves_on_2_processes_and_no_rank_outlives_its_parent(blobs: Path, tmp_path: Path) -> None:
    settings = quick_settings(blobs, tmp_path / "run", train__epochs=4000, train__channels_last="true")
    log = tmp_path / "log.txt"
    with started(settings, log) as (parent, ranks):
        parent.send_signal(signal.SIGTERM)
        assert parent.wait(120) == 75, log.read_text()
        assert psutil.wait_procs(ranks, 60)[1] == []
    text = log.read_text()
    assert "galaxydist: 2 processes, cpu" in text and text.count("which is saved") == 1
    assert "Warning" not in text
    with started(settings, log) as (parent, ranks):
        assert read_metrics(tmp_path / "run")[-1]["step"] > 0
        parent.kill()
        assert psutil.wait_procs(ranks, 120)[1] == []
    assert log.read_text().count("which is saved") == 2


def test_train_reports_a_wrong_key_once_before_starting_processes(
    blobs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", *quick_settings(blobs, tmp_path / "run"), "optim.lrr=1", "--processes", "2"]
    assert main(arguments) == 2
    assert capfd.readouterr().err.count("did you mean optim.lr?") == 1
    assert not (tmp_path / "run").exists()


def test_train_with_processes_inside_another_launcher_is_refused(
    blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--processes", "2", *quick_settings(blobs, tmp_path / "run")]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(command) == 2
    assert "do not fit together: WORLD_SIZE=2: RANK, LOCAL_RANK" in capsys.readouterr().err
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "20000"}.items():
        monkeypatch.setenv(name, value)
    assert main(command) == 2
    assert "inside of another launcher (WORLD_SIZE=2)" in capsys.readouterr().err
