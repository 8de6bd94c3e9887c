"""Checkpoints written beside the training: the same bits, one at a time, nothing lost, every failure told once."""

import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from galaxydist.checkpoints import store
from galaxydist.checkpoints.async_writer import CheckpointWriter
from galaxydist.checkpoints.tensor_files import flatten_state
from galaxydist.errors import UserError
from galaxydist.training.checkpointer import SaveSchedule, SaveTimer
from tests.helpers.checkpoints import Trainee, bits, every_kind_of_tensor, load_best


def always_allowed() -> None:
    pass


def build_saver(folder: Path, **options: Any) -> CheckpointWriter:
    return CheckpointWriter(folder, **{"background": True, "check": always_allowed, **options})


def load(folder: Path) -> store.Checkpoint:
    checkpoint = store.load(folder)
    assert checkpoint is not None
    return checkpoint


class Gate:
    """Holds writes up until it is opened."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.reached = threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        assert self.opened.wait(300)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()


@pytest.mark.parametrize("background", [True, False])
def test_checkpoint_writer_restores_every_kind_of_tensor_bit_for_bit(background: bool, tmp_path: Path) -> None:
    with build_saver(tmp_path, background=background) as saver:
        for step in (1, 2):  # into new buffers, then into those of the first
            tensors = every_kind_of_tensor()
            expected = {name: bits(tensor.detach().resolve_conj()) for name, tensor in tensors.items()}
            saver.save(step, tensors, {"a": [1, 0.1 + 0.2, None, {"b": True}]}, best=step == 1)
            for tensor in tensors.values():
                tensor.detach().resolve_conj().contiguous().zero_()
            saver.wait()
            found = load(tmp_path)
            assert found.step == step and found.state == {"a": [1, 0.1 + 0.2, None, {"b": True}]}
            assert {name: bits(tensor) for name, tensor in found.tensors.items()} == expected
    best = load_best(tmp_path)
    assert best is not None and best.step == 1


def test_background_write_saves_the_tensors_as_they_were_at_save(tmp_path: Path, gate: Gate) -> None:
    trainee = Trainee("adamw")
    trainee.step(0)
    with build_saver(tmp_path, check=gate) as saver:
        tensors: dict[str, torch.Tensor] = {}
        for name, state in trainee.states().items():
            tensors |= flatten_state(name, state)[0]
        expected = {name: bits(tensor) for name, tensor in tensors.items()}
        saver.save(1, tensors, {})
        assert gate.reached.wait(300)
        trainee.step(1)
        assert {name: bits(tensor) for name, tensor in tensors.items()} != expected
        assert store.list_checkpoints(tmp_path) == []
        gate.opened.set()
    assert {name: bits(tensor) for name, tensor in load(tmp_path).tensors.items()} == expected


def test_background_copies_reuse_their_memory(tmp_path: Path) -> None:
    addresses = []
    with build_saver(tmp_path) as saver:
        for step, size in enumerate((4, 4, 5)):
            saver.save(step, {"model/a": torch.full((size,), float(step)), "model/b": torch.zeros(3, step + 1)}, {})
            addresses.append({name: tensor.data_ptr() for name, tensor in saver._copies._buffers.items()})
    assert addresses[0]["model/a"] == addresses[1]["model/a"]
    assert load(tmp_path).tensors["model/a"].tolist() == [2.0] * 5


def test_second_save_waits_for_the_first(tmp_path: Path, gate: Gate) -> None:
    with build_saver(tmp_path, check=gate) as saver:
        saver.save(1, {"model/w": torch.ones(2)}, {})
        assert gate.reached.wait(300)
        second = threading.Thread(target=saver.save, args=(2, {"model/w": torch.ones(2)}, {}))
        second.start()
        second.join(0.2)
        assert second.is_alive()
        gate.opened.set()
        second.join()
        assert store.read_checkpoint(store.list_checkpoints(tmp_path)[-1]).step == 1
    assert [store.read_checkpoint(path).step for path in store.list_checkpoints(tmp_path)] == [2, 1]


def test_foreground_save_is_written_when_save_returns(tmp_path: Path) -> None:
    saver = build_saver(tmp_path, background=False)
    saver.save(1, {"model/w": torch.ones(2)}, {})
    assert load(tmp_path).step == 1
    assert not saver.failed
    assert not any(thread.name == "checkpoint-writer" for thread in threading.enumerate())


def test_a_lost_lock_stops_the_write_before_and_after_it(tmp_path: Path) -> None:
    calls: list[list[str]] = []

    def lost_at(number: int) -> Callable[[], None]:
        def check() -> None:
            calls.append(sorted(path.name for path in tmp_path.iterdir()))
            if len(calls) == number:
                raise UserError("the lock was lost")

        return check

    for number in (1, 2):
        calls.clear()
        saver = build_saver(tmp_path, check=lost_at(number))
        saver.save(1, {"model/w": torch.ones(2)}, {})
        with pytest.raises(UserError, match="the lock was lost"):
            saver.wait()
        assert list(tmp_path.iterdir()) == []
    assert calls == [[], [".step-00000001-0001.tmp"]]


def broken_write(*_: Any) -> None:
    raise UserError("the disk is full")


def wait_for_failure(saver: CheckpointWriter) -> None:
    deadline = time.monotonic() + 300
    while not saver.failed and time.monotonic() < deadline:
        time.sleep(0.005)
    assert saver.failed


def test_failed_background_write_is_raised_exactly_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = build_saver(tmp_path)
    tensors = {"model/w": torch.ones(2)}
    saver.save(1, tensors, {})
    saver.wait()
    monkeypatch.setattr(store, "write_checkpoint", broken_write)
    saver.save(2, tensors, {})
    wait_for_failure(saver)
    with pytest.raises(UserError, match="the disk is full"):
        saver.wait()
    assert not saver.failed
    saver.wait()
    saver.save(3, tensors, {})
    wait_for_failure(saver)
    monkeypatch.undo()
    with pytest.raises(UserError, match="the disk is full"):
        saver.save(4, tensors, {})  # not written: the run must hear of it first
    assert load(tmp_path).step == 1
    saver.save(5, tensors, {})
    saver.wait()
    assert load(tmp_path).step == 5


def test_leaving_the_writer_finishes_the_save_and_keeps_the_original_exception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ZeroDivisionError), build_saver(tmp_path) as saver:
        saver.save(1, {"model/w": torch.ones(2)}, {})
        raise ZeroDivisionError
    assert load(tmp_path).step == 1
    monkeypatch.setattr(store, "write_checkpoint", broken_write)
    with pytest.raises(ZeroDivisionError), build_saver(tmp_path) as saver:
        saver.save(2, {"model/w": torch.ones(2)}, {})
        raise ZeroDivisionError
    assert "the disk is full" in caplog.text and caplog.records[-1].levelno == logging.ERROR
    with pytest.raises(UserError, match="the disk is full"), build_saver(tmp_path) as saver:
        saver.save(3, {"model/w": torch.ones(2)}, {})


def test_checkpoint_writer_refuses_state_that_json_cannot_hold(tmp_path: Path) -> None:
    with build_saver(tmp_path / "checkpoints") as saver:
        for state in ({"best": float("nan")}, {"path": tmp_path}):
            with pytest.raises((ValueError, TypeError)):
                saver.save(1, {}, state)
    assert not (tmp_path / "checkpoints").exists()


def test_background_writes_do_not_change_weights_or_random_numbers(tmp_path: Path) -> None:
    """Same random numbers, same weights: the thread touches nothing that the training uses."""
    results = []
    for saves in (False, True):
        trainee = Trainee("adamw")
        with build_saver(tmp_path) as saver:
            for number in range(12):
                trainee.step(number)
                if saves and number % 3 == 0:
                    saver.save(number, {f"model/{k}": v for k, v in trainee.model.state_dict().items()}, {})
        results.append([bits(value) for value in trainee.model.state_dict().values()] + [bits(torch.rand(3))])
    assert results[0] == results[1]


ENDING = """
import sys, torch
from pathlib import Path
from galaxydist.checkpoints.async_writer import CheckpointWriter
saver = CheckpointWriter(Path(sys.argv[1]), background=True, check=lambda: None)
saver.save(7, {"model/w": torch.arange(3_000_000.0), "optimizer/m": torch.ones(3)}, {"a": 1})
raise ZeroDivisionError
"""


@pytest.mark.multiprocess
def test_an_interpreter_that_ends_finishes_the_write(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", ENDING, tmp_path], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr
    assert load(tmp_path).step == 7 and load(tmp_path).tensors["model/w"][-1] == 2_999_999
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000007-0001"]


ENDLESS = """
import sys, torch
from pathlib import Path
from galaxydist.checkpoints.async_writer import CheckpointWriter
with CheckpointWriter(Path(sys.argv[1]), background=True, check=lambda: None) as saver:
    step = 0
    while True:
        step += 1
        saver.save(step, {"model/w": torch.full((400_000,), float(step)), "optimizer/m": torch.full((9,), float(step))}, {})
        if step == 2:
            print("saving", flush=True)
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_process_killed_while_saving_leaves_a_complete_checkpoint(tmp_path: Path) -> None:
    """Not at chosen events but whenever it comes, again and again in the same folder."""
    for delay_s in (0.0, 0.013, 0.031):
        process = subprocess.Popen([sys.executable, "-c", ENDLESS, tmp_path], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None and process.stdout.readline() == "saving\n"
            time.sleep(delay_s)
        finally:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        found = load(tmp_path)
        assert found.step >= 1
        assert found.tensors["model/w"].unique().tolist() == [found.step]
        assert found.tensors["optimizer/m"].tolist() == [found.step] * 9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_background_save_from_a_gpu_keeps_the_values_at_the_time_of_save(tmp_path: Path) -> None:
    weight, step = torch.randn(2000, 2000, device="cuda"), torch.tensor(3.0)
    expected = {"model/w": bits(weight.cpu()), "model/t": bits(weight.t().cpu()), "optimizer/step": bits(step)}
    with build_saver(tmp_path) as saver:
        busy = torch.randn(4000, 4000, device="cuda")
        for _ in range(50):
            busy = busy @ busy  # so that the copies wait in the stream
        saver.save(1, {"model/w": weight, "model/t": weight.t(), "optimizer/step": step}, {})
        weight.zero_()
    assert {name: bits(tensor) for name, tensor in load(tmp_path).tensors.items()} == expected


# ---- when a checkpoint is due ----

lengths = st.integers(1, 40)


@given(per_epoch=lengths, epochs=lengths, every_steps=st.integers(0, 50), every_epochs=lengths)
def test_save_schedule_is_due_at_step_and_epoch_multiples_and_at_the_end(
    per_epoch: int, epochs: int, every_steps: int, every_epochs: int
) -> None:
    total = per_epoch * epochs
    policy = SaveSchedule(per_epoch, total, every_steps, every_epochs)
    due = {step for step in range(total + 1) if policy.is_due(step)}
    expected = {per_epoch * epoch for epoch in range(every_epochs, epochs + 1, every_epochs)} | {total}
    expected |= set(range(every_steps, total + 1, every_steps)) if every_steps else set()
    assert due == expected
    assert all(policy.is_due(step, time_is_up=True) for step in range(total + 1))


@given(minutes=st.integers(0, 5), ticks=st.lists(st.tuples(st.integers(0, 200), st.booleans()), max_size=60))
def test_save_timer_is_up_when_the_last_save_is_older_than_its_minutes(minutes: int, ticks: list[tuple[int, bool]]) -> None:
    """``ticks``: seconds that pass, and whether a save is made there for another reason."""
    now = 1000.0
    timer = SaveTimer(minutes, lambda: now)
    last = now
    for seconds, is_saved in ticks:
        now += seconds
        assert timer.is_up == (minutes > 0 and now - last >= 60 * minutes)
        if is_saved or timer.is_up:
            timer.restart()
            last = now
            assert not timer.is_up
