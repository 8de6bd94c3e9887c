"""The lock of a run folder: one process at a time, dead ones never in the way. With real processes."""

import dataclasses
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from galaxydist.errors import UserError
from galaxydist.runs.lock import RunLock

HOLDER = """
import os, sys, time
from pathlib import Path
from galaxydist.runs.lock import RunLock
path, host, job_id = Path(sys.argv[1]), sys.argv[2], sys.argv[3] or None
lock = RunLock(path, host=host, pid=os.getpid(), clock=time.time, job_id=job_id, heartbeat_seconds=0.05)
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


def make_lock(
    path: Path, host: str = "node1", clock: Callable[[], float] = time.time, job_id: str | None = None, restart_count: int = 0
) -> RunLock:
    return RunLock(
        path, host=host, pid=os.getpid(), clock=clock, job_id=job_id, restart_count=restart_count, heartbeat_seconds=0.05
    )


def start_holder(path: Path, host: str = "node1", job_id: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLDER, str(path), host, job_id]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.communicate()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lock.json"


def test_patient_lock_waits_for_a_stale_lock_and_refuses_a_live_one(path: Path) -> None:
    """Its predecessor was killed on another node a moment ago: nobody can say so but the heartbeat, which stands still."""

    def patient(stale_seconds: float) -> RunLock:
        place = {"host": "node2", "pid": os.getpid(), "clock": time.time, "job_id": "8"}
        return RunLock(path, **place, stale_seconds=stale_seconds, is_patient=True)  # type: ignore[arg-type]

    path.write_text(json.dumps(dataclasses.asdict(make_lock(path, job_id="7").owner)))
    started = time.monotonic()
    with patient(1.5) as lock:
        assert lock.is_held and time.monotonic() - started > 0.5
    holder = start_holder(path, job_id="7")
    with pytest.raises(UserError, match=f"in use by process {holder.pid} on node1, job 7"):
        patient(300).acquire()  # its next heartbeat comes, however late
    end(holder)


def test_run_lock_is_exclusive_and_released_on_exit(path: Path) -> None:
    with make_lock(path) as lock:
        assert lock.is_held
        lock.check()
        with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on node1 .*run\.dir"):
            make_lock(path).acquire()
    assert not path.exists()
    assert not lock.is_held
    with make_lock(path):
        pass


def test_lock_of_a_running_process_is_refused_naming_its_job_and_remedy(path: Path) -> None:
    holder = start_holder(path, job_id="77")
    with pytest.raises(UserError) as raised:
        make_lock(path).acquire()
    assert f"in use by process {holder.pid} on node1, job 77, restart 0" in str(raised.value)
    assert "scancel 77" in str(raised.value)
    end(holder)  # leaves normally, and takes its lock with it
    assert not path.exists()
    with make_lock(path) as lock:
        assert lock.is_held


def test_a_killed_process_is_taken_over_at_once_with_a_warning(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    holder = start_holder(path)
    holder.kill()  # not reaped: even as a zombie it is dead
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    with caplog.at_level(logging.WARNING), make_lock(path) as lock:
        assert lock.is_held
        assert f"process {holder.pid} on node1 left a lock" in caplog.text
    end(holder)


def test_lock_of_a_reused_pid_is_taken_over(path: Path) -> None:
    holder = start_holder(path)
    text = path.read_text()
    end(holder)
    started = f'"after_boot": {make_lock(path).owner.after_boot - 100}'
    old = next(line for line in text.splitlines() if "after_boot" in line)
    path.write_text(text.replace(old.strip().rstrip(","), started).replace(f'"pid": {holder.pid}', f'"pid": {os.getpid()}'))
    with make_lock(path) as lock:
        assert lock.is_held


def test_lock_of_a_living_process_survives_a_step_of_the_clock(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel computes the time of boot, and so when a process began, from the present clock."""
    holder = start_holder(path)
    (tmp_path / "proc" / "self").mkdir(parents=True)
    for name in (holder.pid, os.getpid(), "self/stat"):
        (tmp_path / "proc" / str(name)).symlink_to(Path("/proc", str(name)))
    later = [
        f"btime {int(line.split()[1]) + 3600}" if line.startswith("btime") else line
        for line in Path("/proc/stat").read_text().splitlines()
    ]
    (tmp_path / "proc" / "stat").write_text("\n".join(later))
    monkeypatch.setattr("psutil.PROCFS_PATH", str(tmp_path / "proc"))
    with pytest.raises(UserError, match=f"in use by process {holder.pid} on node1"):
        make_lock(path).acquire()
    end(holder)


def test_lock_of_another_host_is_respected_until_its_heartbeat_is_stale(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    holder = start_holder(path, host="node2")
    with pytest.raises(UserError, match=r"on node2 .*If that process is gone, try again in \d+ s"):
        make_lock(path).acquire()
    holder.kill()
    end(holder)
    with pytest.raises(UserError, match="on node2"):
        make_lock(path, clock=lambda: time.time() + 250).acquire()
    with caplog.at_level(logging.WARNING), make_lock(path, clock=lambda: time.time() + 400) as lock:
        assert lock.is_held
        assert "has not been heard of for 40" in caplog.text


def test_lock_from_before_a_reboot_is_respected_until_its_heartbeat_is_stale(path: Path) -> None:
    """Its process numbers begin anew: one that runs now says nothing about the one that took the lock."""
    end_of_text = make_lock(path).owner.pid_space
    if not end_of_text:
        pytest.skip("this system does not name its boots")
    holder = start_holder(path)
    text = path.read_text()
    holder.kill()
    end(holder)
    path.write_text(text.replace(end_of_text, "another boot"))
    with pytest.raises(UserError, match="in use"):
        make_lock(path).acquire()
    with make_lock(path, clock=lambda: time.time() + 400):
        pass


def test_a_later_restart_of_the_same_job_takes_over_at_once(path: Path) -> None:
    holder = start_holder(path, host="node2", job_id="77")
    with pytest.raises(UserError, match="job 77"):
        make_lock(path, job_id="77").acquire()
    with pytest.raises(UserError, match="job 77"):
        make_lock(path, job_id="78", restart_count=1).acquire()
    with make_lock(path, job_id="77", restart_count=1) as lock:
        lock.check()
        end(holder)  # the old one leaves later, and must not remove the new one's lock
        time.sleep(0.1)
        lock.check()


def test_lock_heartbeat_updates_the_file_and_stops_on_release(path: Path) -> None:
    now = [1000.0]
    lock = make_lock(path, clock=lambda: now[0])
    lock.acquire()
    now[0] = 2000.0
    deadline = time.monotonic() + 300
    while path.stat().st_mtime != 2000.0:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lock.release()
    lock.release()
    assert not path.exists()
    assert not any(thread.name == "run-lock-heartbeat" for thread in threading.enumerate())


def test_removed_or_replaced_lock_is_reported_as_lost_by_check(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lock = make_lock(path)
    lock.acquire()
    path.unlink()
    with pytest.raises(UserError, match="its lock file is gone"):
        lock.check()
    with make_lock(path):
        deadline = time.monotonic() + 300
        while "was taken by" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(UserError, match="it is now held by"):
            lock.check()
        lock.release()
        assert path.exists()


def test_damaged_lock_is_refused_while_fresh_and_replaced_when_stale(path: Path) -> None:
    path.write_text("{")
    with pytest.raises(UserError, match="being taken"):
        make_lock(path).acquire()
    with make_lock(path, clock=lambda: time.time() + 400):
        pass


def test_release_in_a_forked_child_does_not_release_the_parents_lock(path: Path) -> None:
    with make_lock(path) as lock:
        child = multiprocessing.get_context("fork").Process(target=lock.release)
        child.start()
        child.join()
        assert lock.is_held


def test_lock_of_a_stopped_process_is_still_in_use(path: Path) -> None:
    holder = start_holder(path)
    os.kill(holder.pid, signal.SIGSTOP)
    try:
        with pytest.raises(UserError, match="in use"):
            make_lock(path, clock=lambda: time.time() + 4000).acquire()
    finally:
        os.kill(holder.pid, signal.SIGCONT)
        end(holder)


RACER = """
import os, sys, time
from pathlib import Path
from galaxydist.errors import UserError
from galaxydist.runs import lock as module
from galaxydist.runs.lock import RunLock
if sys.argv[2] == "noflock":
    import fcntl
    def refuse(*arguments): raise OSError(95, "not supported")
    fcntl.flock = refuse
lock = RunLock(Path(sys.argv[1]), host="node1", pid=os.getpid(), clock=time.time)
print("ready", flush=True)
sys.stdin.readline()
try:
    lock.acquire()
    print("won", flush=True)
except UserError as error:
    print("lost", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("flock", ["flock", "noflock"])
@pytest.mark.parametrize("left_by", ["nobody", "a dead process"])
def test_exactly_one_of_4_processes_starting_together_gets_the_lock(path: Path, flock: str, left_by: str) -> None:
    if left_by != "nobody":
        holder = start_holder(path)
        holder.kill()
        end(holder)
    command = [sys.executable, "-c", RACER, str(path), flock]
    racers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    answers = [racer.stdout.readline() for racer in racers if racer.stdout is not None]
    for racer in racers:
        end(racer)
    assert answers.count("won\n") == 1, answers
    assert answers.count("lost\n") == 3
    assert not [file for file in path.parent.iterdir() if file.suffix in (".tmp", ".old")]
