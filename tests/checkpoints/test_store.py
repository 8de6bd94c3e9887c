"""Checkpoints: complete or not there, exact, checked, never unpickled."""

import json
import logging
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from galaxydist.checkpoints import store
from galaxydist.checkpoints.async_writer import CheckpointWriter
from galaxydist.checkpoints.store import DamagedCheckpointError, read_checkpoint
from galaxydist.checkpoints.tensor_files import flatten_state, unflatten_state
from galaxydist.errors import UserError
from tests.helpers.checkpoints import Bomb, Trainee, bits, every_kind_of_tensor, flip_bit, load_best, save, truncate


def simple(step: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return {"model/w": torch.full((3,), float(step)), "optimizer/m": torch.full((2, 2), -float(step))}, {"epoch": step}


def save_simple(folder: Path, step: int, **options: Any) -> Path:
    return save(folder, step, *simple(step), **options)


def save_behind(folder: Path, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any], **options: Any) -> None:
    """As the training does it: a thread writes."""
    with CheckpointWriter(folder, background=True, check=lambda: None) as saver:
        saver.save(step, tensors, state, **options)


def loaded_step(folder: Path) -> int | None:
    checkpoint = store.load(folder)
    if checkpoint is None:
        return None
    assert checkpoint.tensors["model/w"].tolist() == [checkpoint.step] * 3
    assert checkpoint.state == {"epoch": checkpoint.step}
    return checkpoint.step


def test_store_restores_every_kind_of_tensor_and_state_bit_for_bit(tmp_path: Path) -> None:
    tensors = every_kind_of_tensor()
    path = save(tmp_path, 12, tensors, {"a": [1, 0.1 + 0.2, None, "é", {"b": True}]})
    checkpoint = store.load(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 12
    assert checkpoint.path == path
    assert checkpoint.state == {"a": [1, 0.1 + 0.2, None, "é", {"b": True}]}
    assert {name: bits(tensor) for name, tensor in checkpoint.tensors.items()} == {
        name: bits(tensor.detach().resolve_conj()) for name, tensor in tensors.items()
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_tensors_are_restored_bit_for_bit_on_the_cpu(tmp_path: Path) -> None:
    tensors = {"model/w": torch.randn(50, 20, device="cuda"), "model/t": torch.randn(4, 6, device="cuda").t()}
    save(tmp_path, 1, tensors, {})
    checkpoint = store.load(tmp_path)
    assert checkpoint is not None
    assert {name: bits(tensor) for name, tensor in checkpoint.tensors.items()} == {
        name: bits(tensor.cpu()) for name, tensor in tensors.items()
    }


def test_load_without_checkpoint_is_none_and_a_checkpoint_may_have_no_tensors(tmp_path: Path) -> None:
    assert store.load(tmp_path / "nowhere") is None
    assert load_best(tmp_path) is None
    save(tmp_path / "new" / "folder", 0, {}, {})
    assert store.load(tmp_path / "new" / "folder") is not None


def test_store_load_reads_only_the_requested_group(tmp_path: Path) -> None:
    path = save_simple(tmp_path, 1)
    optimizer_file = path / "model-00002-of-00002.safetensors"  # who wants the model alone does not read it
    optimizer_file.write_bytes(optimizer_file.read_bytes()[:-1] + b"x")
    checkpoint = store.load(tmp_path, groups=("model",))
    assert checkpoint is not None
    assert list(checkpoint.tensors) == ["model/w"]


def test_save_removes_old_checkpoints_and_keeps_the_best(tmp_path: Path) -> None:
    for step in range(1, 7):
        save_simple(tmp_path, step, keep=2, best=step in (1, 3))
    steps = [read_checkpoint(path).step for path in store.list_checkpoints(tmp_path)]
    assert steps == [6, 5, 3]
    assert (tmp_path / "latest").read_text().strip() == store.list_checkpoints(tmp_path)[0].name
    best = load_best(tmp_path)
    assert best is not None
    assert best.step == 3
    store.mark_best(store.list_checkpoints(tmp_path)[0])
    save_simple(tmp_path, 7, keep=1)
    assert [read_checkpoint(path).step for path in store.list_checkpoints(tmp_path)] == [7, 6]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["best", "latest"]


def test_saving_an_earlier_step_again_removes_the_later_checkpoints(tmp_path: Path) -> None:
    for step in (10, 20, 30, 30, 15):
        save_simple(tmp_path, step, keep=3)
        assert loaded_step(tmp_path) == step
    assert [read_checkpoint(path).step for path in store.list_checkpoints(tmp_path)] == [15, 10]


def test_leftover_that_cannot_be_deleted_does_not_stop_a_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    leftover = tmp_path / ".step-00000001-0001.old"
    (leftover / "not_a_file").mkdir(parents=True)  # cannot be unlinked, like a file on NFS that another process has open
    save_simple(tmp_path, 2)
    assert loaded_step(tmp_path) == 2 and f"{leftover} could not be deleted" in caplog.text


@pytest.mark.parametrize("damage", [truncate, flip_bit, Path.unlink])
@pytest.mark.parametrize("file_name", ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "checkpoint.json"])
def test_damaged_newest_checkpoint_is_named_and_the_previous_one_is_loaded(
    tmp_path: Path, damage: Callable[[Path], None], file_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    save_simple(tmp_path, 1)
    newest = save_simple(tmp_path, 2)
    damage(newest / file_name)
    with caplog.at_level(logging.WARNING):
        assert loaded_step(tmp_path) == 1
    assert str(newest) in caplog.text
    assert file_name in caplog.text
    # The damaged one does not count among those that are kept.
    save_simple(tmp_path, 3)
    assert [read_checkpoint(path).step for path in store.list_checkpoints(tmp_path)] == [3, 1]


@pytest.mark.parametrize("pointer", ["", "step-00000099-0099\n", "../elsewhere\n", "\x00"])
def test_damaged_latest_pointer_does_not_hide_the_checkpoint(tmp_path: Path, pointer: str) -> None:
    save_simple(tmp_path, 1)
    (tmp_path / "latest").write_text(pointer)
    assert loaded_step(tmp_path) == 1


def test_load_raises_if_all_checkpoints_are_damaged(tmp_path: Path) -> None:
    for step in (1, 2):
        flip_bit(save_simple(tmp_path, step) / "model-00001-of-00002.safetensors")
    with pytest.raises(UserError) as raised:
        store.load(tmp_path)
    assert "All checkpoints" in str(raised.value)
    assert "step-00000001-0001: model-00001-of-00002.safetensors has changed" in str(raised.value)


def test_a_damaged_best_is_not_replaced_by_another(tmp_path: Path) -> None:
    best = save_simple(tmp_path, 1, best=True)
    save_simple(tmp_path, 2)
    flip_bit(best / "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match=r"eval\.checkpoint=last"):
        load_best(tmp_path)


def test_best_checkpoint_is_found_without_its_pointer(tmp_path: Path) -> None:
    save_simple(tmp_path, 1, best=True)
    pointer = (tmp_path / "best").read_bytes()
    save_simple(tmp_path, 2, best=True)
    save_simple(tmp_path, 3)
    (tmp_path / "best").write_bytes(pointer)  # as after a kill between the rename and the pointer
    best = load_best(tmp_path)
    assert best is not None
    assert best.step == 2


def test_store_refuses_state_that_json_cannot_hold_before_writing(tmp_path: Path) -> None:
    for state in ({"best": float("nan")}, {"path": tmp_path}):
        with pytest.raises((ValueError, TypeError)):
            save(tmp_path / "checkpoints", 1, {}, state)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    "place",
    [".metadata", "checkpoint.json", "model-00001-of-00002.safetensors", "extra.safetensors", "__0_0.distcp", "../latest"],
)
def test_a_planted_pickle_does_not_run(tmp_path: Path, place: str) -> None:
    folder, exploded = tmp_path / "checkpoints", tmp_path / "exploded"
    pickle.loads(pickle.dumps(Bomb(exploded)))
    assert exploded.exists()  # it would
    exploded.unlink()
    save_simple(folder, 1)
    (save_simple(folder, 2) / place).write_bytes(pickle.dumps(Bomb(exploded)))
    assert loaded_step(folder) in (1, 2)
    assert not exploded.exists()


def test_a_checkpoint_of_a_newer_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("galaxydist.checkpoints.store.FORMAT_VERSION", 3)
    save_simple(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(UserError, match="checkpoint format 3"):
        store.load(tmp_path)


# ---- killed at any instant, and a full disk ----


def in_child(function: Callable[..., None], *arguments: Any) -> int:
    """Run in a forked process (torch is imported already) and give its exit code."""

    def run() -> None:
        torch.set_num_threads(1)  # the parent's OpenMP threads are not there after a fork
        function(*arguments)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(240)
    assert process.exitcode is not None
    return process.exitcode


def save_watched(save: Callable[..., object], folder: Path, stop_at: int | None, events_path: Path) -> None:
    """Save step 4 as the best. Note each change of the disk, or die just before the one of number ``stop_at``."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if not event.startswith("galaxydist."):
            return
        if count == stop_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if stop_at is None:
            with events_path.open("a") as file:
                file.write(f"{event.removeprefix('galaxydist.')} {os.path.relpath(arguments[-1], folder)}\n")
        count += 1

    sys.addaudithook(hook)
    save(folder, 4, *simple(4), best=True)


def check_order(events: list[tuple[str, ...]]) -> int:
    """The order of a save's steps; gives the number of the one that puts the checkpoint in its place."""
    new, old = "step-00000004-0004", "step-00000003-0003"
    temporary = f".{new}.tmp"
    at = events.index
    # Files and folder are on the disk before the name, the name before the pointer, the pointer before anything goes.
    for name in ("checkpoint.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        assert at(("fsync", f"{temporary}/{name}")) < at(("fsync", temporary)) < at(("rename", new))
    assert events[at(("rename", new)) + 1] == ("fsync", ".")
    assert at(("rename", new)) < at(("rename", "latest")) < at(("rename", "best")) < at(("rename", ".step-00000002-0002.old"))
    assert all(at(("rename", "best")) < i for i, event in enumerate(events) if event[0] == "unlink")
    assert not any(old in event[1] for event in events)  # keep=2: the one before stays
    return at(("rename", new))


@pytest.mark.multiprocess
@pytest.mark.parametrize("save", [save, save_behind])
def test_killed_at_any_write_fsync_rename_or_unlink_a_complete_checkpoint_is_there(
    save: Callable[..., object], tmp_path: Path
) -> None:
    start, events_path = tmp_path / "start", tmp_path / "events"
    for step in (1, 2, 3):
        save_simple(start, step, best=step == 2, keep=3)
    shutil.copytree(start, tmp_path / "whole")
    assert in_child(save_watched, save, tmp_path / "whole", None, events_path) == 0
    events = [tuple(line.split()) for line in events_path.read_text().splitlines()]
    renamed = check_order(events)
    for stop_at in range(len(events)):
        folder = tmp_path / str(stop_at)
        shutil.copytree(start, folder)
        assert in_child(save_watched, save, folder, stop_at, events_path) == -signal.SIGKILL
        best = load_best(folder)
        assert best is not None
        assert (loaded_step(folder), best.step) == ((4, 4) if stop_at > renamed else (3, 2)), events[stop_at]
        save_simple(folder, 5)
        assert loaded_step(folder) == 5
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def save_large(save: Callable[..., object], folder: Path, limit: int | None, answer: Path) -> None:
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        save(folder, 2, {"model/w": torch.zeros(500_000)}, {})
    except UserError as error:
        answer.write_text(str(error))


def check_full_disk(save: Callable[..., object], folder: Path, limit: int | None, answer: Path, reason: str) -> None:
    save_simple(folder, 1)
    before = sorted(folder.rglob("*"))
    assert in_child(save_large, save, folder, limit, answer) == 0
    expected = f"{folder} could not be written: {reason}. The earlier checkpoints are untouched. Free some space"
    assert answer.read_text().startswith(expected)
    assert sorted(folder.rglob("*")) == before
    assert loaded_step(folder) == 1


@pytest.mark.multiprocess
@pytest.mark.parametrize("save", [save, save_behind])
def test_file_size_limit_while_saving_keeps_the_earlier_checkpoint(save: Callable[..., object], tmp_path: Path) -> None:
    check_full_disk(save, tmp_path / "checkpoints", 100_000, tmp_path / "answer", "the file size limit is reached")


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if mount is None or subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=False).returncode:
        pytest.skip("a file system of 1 MB cannot be mounted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.multiprocess
@pytest.mark.parametrize("save", [save, save_behind])
def test_full_disk_while_saving_keeps_the_earlier_checkpoint(
    save: Callable[..., object], tiny_disk: Path, tmp_path: Path
) -> None:
    check_full_disk(save, tiny_disk / "checkpoints", None, tmp_path / "answer", "the disk is full")


# ---- the states of optimizers, scalers and averages ----

leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.integers(0, 3).map(lambda n: torch.arange(n, dtype=torch.float32)),
    st.just(torch.tensor(2)),
)
keys = st.one_of(st.sampled_from(["a", "a/b", "@tensor", "@dict", "b"]), st.integers(0, 3))
states = st.recursive(
    leaves,
    lambda children: st.one_of(
        st.lists(children, max_size=3),
        st.lists(children, max_size=3).map(tuple),
        st.dictionaries(
            st.one_of(st.sampled_from(["a", "a/b", "@tensor", "@dict", "b"]), st.integers(0, 3)), children, max_size=3
        ),
    ),
    max_leaves=10,
)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and bits(a) == bits(b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and repr(a) == repr(b)  # repr: nan, -0.0


@given(states)
def test_flatten_state_and_unflatten_state_restore_any_state(state: Any) -> None:
    tensors, description = flatten_state("x", state)
    assert same(unflatten_state(json.loads(json.dumps(description, allow_nan=False)), tensors), state)


def test_flatten_state_refuses_unsupported_values_naming_them() -> None:
    with pytest.raises(TypeError, match="optimizer/groups/0/lr is a float64"):
        flatten_state("optimizer", {"groups": [{"lr": np.float64(0.1)}]})
    with pytest.raises(TypeError, match="optimizer has a key None"):
        flatten_state("optimizer", {None: 1})
    with pytest.raises(KeyError):
        unflatten_state({"@tensor": "gone"}, {})


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_training_continued_from_a_checkpoint_is_bit_equal(tmp_path: Path, optimizer: str) -> None:
    undisturbed, first = Trainee(optimizer), Trainee(optimizer)
    for number in range(8):
        undisturbed.step(number)
    for number in range(5):
        first.step(number)
    tensors: dict[str, torch.Tensor] = {}
    descriptions: dict[str, Any] = {}
    for name, state in first.states().items():
        parts, descriptions[name] = flatten_state(name, state)
        tensors |= parts
    save(tmp_path, 5, tensors, descriptions)

    checkpoint = store.load(tmp_path)
    assert checkpoint is not None
    second = Trainee(optimizer)
    second.load({name: unflatten_state(checkpoint.state[name], checkpoint.tensors) for name in descriptions})
    assert same(first.optimizer.state_dict(), second.optimizer.state_dict())
    for number in range(5, 8):
        second.step(number)
    for name, state in undisturbed.states().items():
        ours, expected = flatten_state(name, second.states()[name]), flatten_state(name, state)
        assert ours[1] == expected[1]
        assert {key: bits(value) for key, value in ours[0].items()} == {key: bits(value) for key, value in expected[0].items()}


def save_on_rank_0(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    assert dist.get_world_size() == 2
    if rank == 0:
        save_simple(folder / "checkpoints", 4)
    dist.barrier()
    assert loaded_step(folder / "checkpoints") == 4
    if rank == 1:
        assert loaded_step(folder / "checkpoints") == 4  # once more, alone
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.multiprocess
def test_checkpoint_saved_on_rank_0_is_loaded_by_each_rank_without_collectives(tmp_path: Path) -> None:
    processes = [multiprocessing.get_context("fork").Process(target=save_on_rank_0, args=(tmp_path, rank)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0, 0]


def test_an_empty_file_is_damage(tmp_path: Path) -> None:
    path = save_simple(tmp_path, 1)
    (path / "model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(DamagedCheckpointError, match="model-00001-of-00002"):
        read_checkpoint(path)
