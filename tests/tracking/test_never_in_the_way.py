"""A tracker that hangs, is refused, dies or has no disk neither stops nor delays a training: real runs, wandb's real process."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from galaxydist.runs.folder import RunFolder
from tests.helpers.forked_runs import forked, run_forked, train
from tests.helpers.runs import quick_settings
from tests.helpers.wandb_server import WRONG_KEY, WandbServer

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]
WANDB = {"tracker__name": "wandb", "train__epochs": 2}


def train_impatiently(*arguments: str) -> int:
    """A run that gives its tracker three seconds at its end."""
    from galaxydist.cli.train import main
    from galaxydist.tracking import run_tracker, wandb_sink

    run_tracker.FINISH_S, run_tracker.QUIET_S, wandb_sink.WRITING_S = 3.0, 0.5, 2.0
    return main(list(arguments), os.environ)


def variables(home: Path, **more: str) -> dict[str, str]:
    return {"HOME": str(home), "WANDB_SERVICE": "", "WANDB_API_KEY": "", **more}


def assert_complete_and_told(run_dir: Path, text: str, reason: str) -> None:
    """The run has its result, and one line says that its tracker failed and what to do."""
    folder = RunFolder(run_dir)
    assert folder.is_finished and folder.read_tracker()["is_complete"] is False
    assert text.count("the tracker wandb failed") == 1 and reason in text, text[-3000:]
    assert f"galaxydist track push {run_dir} --to wandb" in text and "Traceback" not in text


def left_processes(home: Path) -> list[str]:
    """The names of the processes of a run, such as wandb's own, that are still there 20 seconds after it: those with its home."""

    def is_ours(process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error):
            return process.status() != psutil.STATUS_ZOMBIE and process.environ().get("HOME") == str(home)
        return False

    _, left = psutil.wait_procs([process for process in psutil.process_iter() if is_ours(process)], timeout=20)
    return [process.name() for process in left]


def run_and_leave(home: Path, *settings: str, **environ: str) -> tuple[int | None, str]:
    """Train in a new process: its exit code, and what it told. No process is left, before the test itself would end it."""
    with forked(train_impatiently, *settings, folder=home / "output", environ=variables(home, **environ)) as run:
        (code,) = run.wait()
        assert left_processes(home) == []
        return code, run.text("err")


def test_a_wrong_key_and_a_refusing_server_are_named_once(blobs: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    settings = quick_settings(blobs, run_dir, **WANDB, tracker__mode="online")
    with WandbServer() as server:
        code, text = run_and_leave(tmp_path, *settings, **server.environ(WRONG_KEY))
        assert code == 0
        assert_complete_and_told(run_dir, text, "wandb's server refuses the key")
        assert "set WANDB_API_KEY, or run `wandb login --relogin`" in text
        # The same command with the right key sends all.
        done = run_forked(train, settings, environ=variables(tmp_path, **server.environ()))
        assert done.returncode == 0 and f"wandb: {server.address}" in done.stdout, done.stderr[-3000:]
        assert server.run.steps == [2, 3, 4, 6] and RunFolder(run_dir).read_tracker()["is_complete"]


def test_a_server_that_never_answers_does_not_keep_the_process(blobs: Path, tmp_path: Path) -> None:
    """In an interpreter of its own: at its exit wandb would wait for its process, which waits for the server."""
    run_dir = tmp_path / "run"
    code = "import sys; from tests.tracking.test_never_in_the_way import train_impatiently as t; sys.exit(t(*sys.argv[1:]))"
    with WandbServer() as server:
        server.stall()
        done = subprocess.run(
            [sys.executable, "-c", code, *quick_settings(blobs, run_dir, **WANDB, tracker__mode="online")],
            env={**os.environ, **variables(tmp_path, **server.environ()), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        ended = time.time()
    assert done.returncode == 0, done.stderr[-3000:]
    assert_complete_and_told(run_dir, done.stderr, "it did not answer within 3 s")
    assert left_processes(tmp_path) == []
    finished = RunFolder(run_dir).result_path.stat().st_mtime
    assert ended - finished < 45, "wandb.init alone would wait for a minute"


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """The folder of wandb in a run folder, of 64 KiB."""
    disk = tmp_path / "run" / "wandb"
    disk.mkdir(parents=True)
    mount = shutil.which("mount")
    if mount is None or subprocess.run([mount, "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_full_disk_for_wandb_stops_only_wandb(blobs: Path, tmp_path: Path, tiny_disk: Path) -> None:
    settings = quick_settings(blobs, tiny_disk.parent, **WANDB, tracker__mode="offline")
    code, text = run_and_leave(tmp_path, *settings)
    assert code == 0, text[-3000:]
    assert_complete_and_told(tiny_disk.parent, text, "")
