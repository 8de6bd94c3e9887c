"""The watchdog, on real processes that hang, are stopped, keep the interpreter's lock, or are merely slow."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch._C._distributed_c10d import PrefixStore
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from galaxydist.errors import EXIT_HUNG, OneRankFailedError
from galaxydist.rank_store import RankStore
from galaxydist.training.health import guard_process, heartbeats
from galaxydist.training.health.heartbeats import Hang, Heartbeat, HeartbeatStore, find_hang
from galaxydist.training.health.watchdog import SAVING, START, VALIDATION, Watchdog, collective_timeout, phase_allowances
from tests.helpers.forked_runs import Ranks, forked
from tests.helpers.runs import TORCHRUN_2
from tests.helpers.scripts.hanging_rank import main as hang

SCRIPT = Path(__file__).parents[2] / "helpers" / "scripts" / "hanging_rank.py"
TIMEOUT_S = 3.0
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc, as the guard does")


def heartbeat(rank: int, step: int = 5, place: int = 0, *, beats: int = 9, overdue: bool = True, serial: int = 1) -> Heartbeat:
    phase = ("data", "forward/backward", "optimizer")[place]
    return Heartbeat(rank, f"node{rank}", 100 + rank, step, phase, place, beats, 61.0, overdue, serial, 1000.0)


def told(*beats: Heartbeat) -> dict[int, Heartbeat]:
    return {beat.rank: beat for beat in beats}


def told_alone(serial: int) -> Heartbeat:
    return heartbeat(1, serial=serial)


def later(heard: dict[int, Heartbeat], *silent: int) -> dict[int, Heartbeat]:
    """What the same ranks told a while later, without having gone on."""
    changes = {rank: (beat.serial + (rank not in silent)) for rank, beat in heard.items()}
    return {rank: heartbeat(rank, beat.step, beat.phase_index, serial=changes[rank]) for rank, beat in heard.items()}


def test_find_hang_names_the_rank_with_the_earliest_step_and_phase() -> None:
    heard = told(heartbeat(0, 5, 1), heartbeat(1, 5, 0), heartbeat(2, 5, 1))
    hang = find_hang(heard, later(heard), 3)
    assert hang is not None and hang.behind == (1,)
    message = hang.message(setting="train.hang_timeout=60", stacks="stacks/rank-*.txt", now=1000.0)
    assert "behind: rank 1 (node1, process 101) in step 5, data, for 61 s" in message
    assert "waiting: 2 in step 5, forward/backward" in message
    heard = told(heartbeat(0, 4, 2), heartbeat(1, 5, 0))
    hang = find_hang(heard, later(heard), 2)
    assert hang is not None and hang.behind == (0,)


def test_find_hang_names_ranks_without_heartbeats() -> None:
    heard = told(heartbeat(0, 5, 1), heartbeat(2, 6, 1))
    hang = find_hang(heard, later(heard, 2), 3)
    assert hang is not None and hang.silent == hang.behind == (1, 2) and hang.num_living == 1
    message = hang.message(setting="", stacks="", now=1070.0)
    assert "behind: rank 1, which was never heard of" in message
    assert "behind: rank 2 (node2, process 102) in step 6, forward/backward: silent for 70 s" in message


def test_find_hang_names_a_rank_that_failed_with_its_error() -> None:
    heard = told(heartbeat(0), Heartbeat(1, "b", 7, 5, "data", 0, 9, 0.0, False, 3, 1000.0, "failed with OSError"))
    hang = find_hang(heard, {**later(heard), 1: heard[1]}, 2)
    assert hang is not None
    assert "rank 1 (b, process 7) in step 5, data, where it failed with OSError 5 s ago" in hang.message(
        setting="", stacks="", now=1005.0
    )


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.booleans(), st.booleans(), st.booleans()), min_size=1))
def test_find_hang_reports_a_hang_only_if_no_rank_makes_progress(ranks: list[tuple[int, int, bool, bool, bool]]) -> None:
    before = told(*(heartbeat(rank, step, place) for rank, (step, place, *_) in enumerate(ranks)))
    after = {}
    works = False
    for rank, (step, place, runs, moves, overdue) in enumerate(ranks):
        moved = runs and moves
        after[rank] = heartbeat(rank, step, place, beats=9 + moved, overdue=overdue, serial=1 + runs)
        works |= runs and (moves or not overdue)
    hang = find_hang(before, after, len(ranks))
    assert (hang is None) == works
    if hang is not None:
        silent = {rank for rank, (_, _, runs, *_) in enumerate(ranks) if not runs}
        first = min((step, place) for step, place, *_ in ranks)
        assert set(hang.behind) == (silent or {r for r, (step, place, *_) in enumerate(ranks) if (step, place) == first})


def test_hang_message_stays_short_with_thousands_of_ranks() -> None:
    heard = told(*(heartbeat(rank, 5, rank % 2) for rank in range(4096)))
    assert len(Hang(heard, (), 4096).message(setting="", stacks="", now=0.0)) < 8000
    level = told(*(heartbeat(rank) for rank in range(4096)))
    assert len(Hang(level, (), 4096).message(setting="", stacks="", now=0.0)) < 500


def test_heartbeat_survives_json_serialisation() -> None:
    beat = heartbeat(3)
    assert Heartbeat.from_json(beat.to_json()) == beat


def test_watchdog_with_timeout_0_starts_no_guard_and_writes_no_stacks(tmp_path: Path) -> None:
    before = len(psutil.Process().children())
    with Watchdog(0, 1, 0.0, None, tmp_path / "stacks") as watchdog:
        watchdog.beat(0, "data")
        assert len(psutil.Process().children()) == before
    assert not (tmp_path / "stacks").exists()


def test_watchdog_leaves_no_guard_and_no_stacks_after_a_clean_end(tmp_path: Path) -> None:
    with Watchdog(0, 1, 60.0, None, tmp_path / "stacks") as watchdog:
        watchdog.beat(0, "data")
        assert (tmp_path / "stacks" / "rank-0000.txt").exists()
        guards = guards_of(os.getpid())
        assert len(guards) == 1
    assert not (tmp_path / "stacks").exists()
    assert not guards_of(os.getpid())


def test_stacks_of_an_earlier_hang_are_kept(tmp_path: Path) -> None:
    (tmp_path / "rank-0000.txt").write_text("earlier")
    with Watchdog(0, 1, 60.0, None, tmp_path):
        pass
    assert (tmp_path / "rank-0000.txt").read_text() == "earlier"


def test_collectives_outlast_the_watchdog() -> None:
    for timeout_s in (10.0, 600.0, 7200.0):
        assert collective_timeout(timeout_s).total_seconds() > max(phase_allowances(timeout_s).values()) > timeout_s
    assert collective_timeout(0) > collective_timeout(600.0)


def test_monotonic_clock_is_clock_monotonic_which_excludes_suspend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a suspension the wall clock has leapt and CLOCK_MONOTONIC has not (clock_gettime(2)); CLOCK_BOOTTIME would have."""
    assert "CLOCK_MONOTONIC" in time.get_clock_info("monotonic").implementation
    ended: list[object] = []
    monkeypatch.setattr(Watchdog, "_end", lambda _, verdict: ended.append(verdict))
    with Watchdog(0, 1, 4.0, None, tmp_path, allowances={START: 4.0}) as watchdog:  # looks every 0.2 s
        watchdog.beat(0, "data")
        time.sleep(0.5)
        now = time.time
        monkeypatch.setattr(time, "time", lambda: now() + 86_400)
        time.sleep(0.5)
        assert not ended and 0 < watchdog._idle_s < 4


def test_guard_detects_stopped_processes() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert not guard_process.is_stopped(process.pid)
        process.send_signal(signal.SIGSTOP)
        wait_until(lambda: guard_process.is_stopped(process.pid))
    finally:
        process.kill()
        process.wait()
    assert not guard_process.is_stopped(process.pid)


def test_a_lost_store_ends_the_process_with_a_message_that_names_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later than what has broken its connection would; a watchdog that is closed first does not."""
    server, lost = TCPStore("127.0.0.1", 0, 1, True), list[str]()
    ended = threading.Event()

    def end(error: OneRankFailedError) -> None:
        lost.append(str(error))
        ended.set()

    monkeypatch.setattr(heartbeats, "LOST_S", 0.5)
    ranks = RankStore(PrefixStore("test", server), 1, 2, main="node1, process 12")
    first, closed = (HeartbeatStore(ranks, told_alone, 0.1, lambda *_: None, end) for _ in range(2))
    del ranks.store, server
    closed.close()
    assert ended.wait(60)
    first.close()
    assert len(lost) == 1 and lost[0].startswith("rank 0 cannot be reached any more (node1, process 12)")


def guards_of(pid: int) -> list[psutil.Process]:
    return [child for child in psutil.Process(pid).children() if guard_process.__file__ in child.cmdline()]


def wait_until(holds: object, seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_for_step(run: Ranks, step: int) -> None:
    for rank in range(len(run.processes)):
        wait_until(lambda rank=rank: f"step {step}\n" in run.said(rank))


def exit_codes(run: Ranks, *but: int) -> list[int | None]:
    """Once they have left by themselves."""
    for rank in set(range(len(run.processes))) - set(but):
        run.processes[rank].join(240)
    return [code for rank, code in enumerate(run.exit_codes) if rank not in but]


@contextmanager
def ranks(fault: str, tmp_path: Path, *, number: int, faulty: int = -1, **allowances: float) -> Iterator[Ranks]:
    """Start ranks; at the end no process of theirs is left, guards included."""
    arguments = fault, faulty, tmp_path / "stacks", TIMEOUT_S, allowances
    with forked(hang, *arguments, folder=tmp_path, size=number, environ={"TORCH_FR_BUFFER_SIZE": "100"}) as run:
        guards = set()
        try:
            wait_for_step(run, 0)
            guards = {guard for pid in run.pids for guard in guards_of(pid)}
            assert len(guards) == number
            yield run
        finally:
            for process in run.processes:
                process.kill()
                process.join()
            assert not psutil.wait_procs(guards, timeout=60)[1]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_sleeping_rank_is_named_once_and_all_ranks_exit_as_hung(tmp_path: Path) -> None:
    with ranks("sleep", tmp_path, number=3, faulty=1) as run:
        wait_for_step(run, 4)
        since = time.monotonic()
        assert exit_codes(run) == [EXIT_HUNG] * 3
        # By the watchdog, and not by the collective, whose time-out is ten minutes more; on a busy machine it takes its time.
        assert TIMEOUT_S - 1 < time.monotonic() - since < TIMEOUT_S + 60
        complaints = run.text("err")
    assert complaints.count("The run hangs") == 1
    assert complaints.count("behind: ") == 1 and "behind: rank 1 (" in complaints
    assert "in step 5, data, for " in complaints and "waiting: 2 in step 5, forward/backward" in complaints
    texts = [(tmp_path / "stacks" / f"rank-{rank:04d}.txt").read_text() for rank in range(3)]
    assert "sleep_forever_in_data" in texts[1] and "sleep_forever_in_data" not in texts[0] + texts[2]
    assert "all_reduce" in texts[0] and "all_reduce" in texts[2]
    assert all(b"gloo:all_reduce" in (tmp_path / "stacks" / f"flight_rank_{rank}").read_bytes() for rank in range(3))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_stopped_rank_is_named_as_silent_and_the_others_exit(tmp_path: Path) -> None:
    with ranks("none", tmp_path, number=3) as run:
        wait_for_step(run, 3)
        os.kill(run.pids[2], signal.SIGSTOP)
        assert exit_codes(run, 2) == [EXIT_HUNG] * 2
        complaints = run.text("err")
        # The guard of a stopped process does not end it.
        assert run.exit_codes[2] is None
    assert complaints.count("The run hangs") == 1
    assert complaints.count("behind: ") == 1 and "behind: rank 2 (" in complaints and "silent for " in complaints


@pytest.mark.slow
@pytest.mark.multiprocess
def test_killed_rank_is_named_at_once_by_a_rank_that_does_not_wait_for_it(tmp_path: Path) -> None:
    """Rank 0 stands outside of any collective, where no connection breaks, and may for ten minutes."""
    with ranks("sleep", tmp_path, number=2, faulty=0, **{"start": 600.0, "data": 600.0, "forward/backward": 600.0}) as run:
        wait_for_step(run, 4)
        run.processes[1].kill()
        assert exit_codes(run, 1) == [1]
        complaints = run.text("err")
    assert complaints.count("error:") == 1
    assert f"process {run.pids[1]}) failed: its process was killed or has crashed" in complaints


@pytest.mark.slow
@pytest.mark.multiprocess
def test_stopped_rank_0_is_reported_as_a_lost_store(tmp_path: Path) -> None:
    with ranks("none", tmp_path, number=2) as run:
        wait_for_step(run, 3)
        os.kill(run.pids[0], signal.SIGSTOP)
        assert exit_codes(run, 0) == [EXIT_HUNG]
        complaints = run.text("err")
    assert "rank 1 (" in complaints and "the store of rank 0 or its launcher is gone or stopped" in complaints


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("number", [1, 2])
def test_rank_holding_the_gil_in_c_is_dumped_and_killed(number: int, tmp_path: Path) -> None:
    with ranks("lock", tmp_path, number=number, faulty=number - 1) as run:
        wait_for_step(run, 4)
        assert exit_codes(run) == [EXIT_HUNG] * (number - 1) + [-signal.SIGKILL]
        complaints = run.text("err")
    assert "hold_the_lock_in_c" in (tmp_path / "stacks" / f"rank-{number - 1:04d}.txt").read_text()
    assert f"rank {number - 1} (" in complaints and "C code has kept Python from running there for " in complaints
    if number == 2:
        assert "behind: rank 1 (" in complaints and "silent for" in complaints


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("fault", ["slow", START, SAVING])
def test_slow_run_with_heartbeats_or_a_long_start_or_save_is_not_ended(fault: str, tmp_path: Path) -> None:
    """Rank 1 works longer than the timeout: with heartbeats, while rank 0 waits without any; in the first step; in a save."""
    with ranks(fault, tmp_path, number=2, faulty=1, start=20 * TIMEOUT_S, saving=20 * TIMEOUT_S) as run:
        assert exit_codes(run) == [0, 0]
        assert "hangs" not in run.text("err")
    assert not (tmp_path / "stacks").exists()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_hang_in_a_validation_is_ended_after_its_allowance_and_named(tmp_path: Path) -> None:
    with ranks(VALIDATION, tmp_path, number=2, faulty=1, start=20 * TIMEOUT_S, validation=2 * TIMEOUT_S) as run:
        wait_for_step(run, 4)
        since = time.monotonic()
        assert exit_codes(run) == [EXIT_HUNG] * 2
        assert time.monotonic() - since > 2 * TIMEOUT_S - 1
        complaints = run.text("err")
    assert "behind: rank 1 (" in complaints and "in step 5, validation, for " in complaints
    # Either rank may report, also the one that waits in a step.
    assert "(train.hang_timeout=3, which allows validation 6 s)" in complaints


@pytest.mark.slow
@pytest.mark.multiprocess
def test_run_stopped_and_continued_by_signals_is_not_taken_for_a_hang(tmp_path: Path) -> None:
    """Stopped in the middle of two seconds without a beat, for longer than the timeout."""
    with ranks("coarse", tmp_path, number=2) as run:
        wait_for_step(run, 1)
        time.sleep(0.5)
        for pid in run.pids:
            os.killpg(pid, signal.SIGSTOP)
        time.sleep(2.5 * TIMEOUT_S)
        steps = len(run.said(0).splitlines())
        for pid in run.pids:
            os.killpg(pid, signal.SIGCONT)
        wait_for_step(run, steps + 2)
        assert run.exit_codes == [None, None]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_hang_under_torchrun_writes_the_stacks_of_all_ranks(tmp_path: Path) -> None:
    command = [*TORCHRUN_2, str(SCRIPT), "sleep", "1", str(tmp_path / "stacks"), str(TIMEOUT_S)]
    environ = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[3])}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.count("The run hangs") == 1 and "behind: rank 1 (" in done.stderr
    assert "exitcode  : 70" in done.stderr
    assert "sleep_forever_in_data" in (tmp_path / "stacks" / "rank-0001.txt").read_text()
    assert "all_reduce" in (tmp_path / "stacks" / "rank-0000.txt").read_text()


def test_rank_without_a_file_left_to_look_with_takes_no_neighbour_for_dead() -> None:
    process, limits = psutil.Process(os.getppid()), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        is_gone = heartbeats._is_gone(process)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert not is_gone
