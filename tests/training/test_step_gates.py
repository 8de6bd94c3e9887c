"""Ctrl-C and its like: answered at once, also within a step of minutes, which all ranks leave at the same place."""

import ctypes
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from galaxydist.checkpoints import store
from galaxydist.errors import EXIT_INTERRUPTED, EXIT_STOPPED
from galaxydist.shards.writer.writer import write_shards
from tests.helpers.forked_runs import forked, run_forked, train
from tests.helpers.lively_runs import LIVELY, Untested, assert_same, wait_until
from tests.helpers.runs import quick_settings

pytestmark = pytest.mark.multiprocess

# Three micro-batches a rank, batch normalisation in each.
OPTIONS = {**LIVELY, "train__epochs": 2, "train__save_steps": 0, "train__micro_batch": 4, "data__threads": 1}


@pytest.fixture(scope="module")
def galaxies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """126 galaxies in train: 5 steps of 24 an epoch."""
    folder = tmp_path_factory.mktemp("galaxies") / "shards"
    return write_shards(Untested(num_galaxies=210), folder, encoding="png", shard_size=16, workers=1).path


def train_stopped(settings: Sequence[str], step: int, place: float, rank: int, number: int) -> int:
    """launch.py, with gates in every step; in one of them a rank gets a signal.

    Args:
        settings: its arguments.
        step: that is left.
        place: which gate of the step, as a fraction of them.
        rank: that gets it.
        number: of the signal.
    """
    from galaxydist.training import loop
    from galaxydist.training.step import TrainStep
    from galaxydist.training.stop_signals import StepGates

    loop.LONG_STEP_S = 0.0
    take_step, pass_gate = TrainStep.__call__, StepGates._pass
    now, passed, before = -1, 0, 0

    def counting_step(self: TrainStep, batch: Any, step: int) -> Any:
        nonlocal now, passed, before
        now, passed, before = step, 0, passed
        return take_step(self, batch, step)

    def counting_pass(self: StepGates) -> None:
        nonlocal passed
        passed += 1
        if now == step and passed == int(place * before) and int(os.environ.get("RANK", "0")) == rank:
            os.kill(os.getpid(), number)
            wait_until(lambda: self._stop.signal_number > 0)
        pass_gate(self)

    TrainStep.__call__, StepGates._pass = counting_step, counting_pass  # type: ignore[method-assign]
    return train(settings)


# In the first forward pass, on the way back, at the last layers of the exchange; in the first steps of a process too.
PLACES = (3, 0.1, signal.SIGINT), (5, 0.6, signal.SIGTERM), (9, 0.95, signal.SIGUSR2)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "places"), [(1, PLACES[1:2]), (2, PLACES)])
def test_step_interrupted_by_a_signal_is_repeated_and_the_run_is_bit_equal(
    size: int,
    places: Sequence[tuple[int, float, signal.Signals]],
    galaxies: Path,
    tmp_path: Path,
) -> None:
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    assert run_forked(train, quick_settings(galaxies, whole, **OPTIONS), size=size).returncode == 0
    settings = quick_settings(galaxies, run_dir, **OPTIONS)
    for step, place, number in places:
        stopped = run_forked(train_stopped, settings, step, place, size - 1, number, size=size)
        assert stopped.returncode == (EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_STOPPED), stopped.stderr
        name = "Ctrl-C" if number == signal.SIGINT else number.name
        assert f"stopped by {name} at step {step}, which is saved" in stopped.stderr
        newest = store.load(run_dir / "checkpoints", groups=())
        assert newest is not None and newest.step == step
    assert run_forked(train, settings, size=size).returncode == 0
    assert_same(whole, run_dir)


def hang_in_c() -> int:
    """A process that is asked to stop while it does not return to Python."""
    from galaxydist.training import stop_signals

    stop_signals.LEAVING_S = 0.2
    mutex = ctypes.create_string_buffer(128)
    with stop_signals.StopSignal():
        print("hangs", flush=True)
        for _ in range(2):  # the second one waits for ever, and signals do not end the wait
            ctypes.CDLL(None).pthread_mutex_lock(mutex)
    return 1


def test_ctrl_c_during_c_code_is_acknowledged_and_a_later_one_ends_the_process(tmp_path: Path) -> None:
    with forked(hang_in_c, folder=tmp_path) as process:
        wait_until(lambda: "hangs" in process.text())
        for _ in range(2):  # a launcher passes the terminal's on: it is one
            os.kill(process.pids[0], signal.SIGINT)
            wait_until(lambda: "stopping after this step; Ctrl-C again ends without saving" in process.text("err"))
        time.sleep(1.2)
        assert "ending" not in process.text("err") and process.exit_codes == [None]
        os.kill(process.pids[0], signal.SIGINT)
        assert process.wait() == [EXIT_INTERRUPTED]
        assert process.text("err").split("galaxydist: ")[-1] == "ending without saving\n"
