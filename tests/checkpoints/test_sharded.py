"""Checkpoints that several processes write together: complete or not there, the same for all, read by any number of processes."""

import copy
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # what DTensors and the writer import: once, before the forks
import torch.distributed as dist
import torch.distributed.checkpoint.hf_storage
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from galaxydist.checkpoints import sharded, store, tensor_files
from galaxydist.checkpoints.sharded import ShardedWriter, load_sharded, open_saving_group, save_sharded
from galaxydist.checkpoints.store import DamagedCheckpointError, encode_state, read_checkpoint
from galaxydist.errors import EveryRankError, RunFailedError, UserError
from tests.helpers.checkpoints import Bomb, bits, flip_bit, truncate
from tests.helpers.checkpoints import save as save_whole

pytestmark = pytest.mark.multiprocess
SHARDS = [f"shard-0000{rank}-model-0000{number}-of-00002.safetensors" for rank in (1, 2) for number in (1, 2)]
Work = Callable[[dist.ProcessGroup], None]


def start(folder: Path, world_size: int, work: Callable[..., None], *arguments: Any) -> list[Any]:
    """Processes of one gloo group (forks: torch is imported already) that do ``work(group, *arguments)``."""
    store = folder / f"store-{time.monotonic_ns()}"

    def enter(rank: int) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
        assert dist.get_world_size() == world_size
        work(open_saving_group(), *arguments)
        dist.barrier()
        dist.destroy_process_group()

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=enter, args=(rank,)) for rank in range(world_size)]
    for process in processes:
        process.start()
    return processes


def run(folder: Path, world_size: int, work: Callable[..., None], *arguments: Any) -> None:
    processes = start(folder, world_size, work, *arguments)
    for process in processes:
        process.join(240)
    for process in processes:
        process.kill()
        process.join()
    assert [process.exitcode for process in processes] == [0] * world_size


def draw(step: int) -> dict[str, torch.Tensor]:
    """Whole tensors of every kind; the names before the slash make two files of each process."""
    random = torch.Generator().manual_seed(step)
    return {
        "model/even": torch.randn(6, 4, generator=random),
        "model/uneven": torch.randn(5, 2, 3, generator=random),
        "model/one": torch.randn(1, 7, generator=random),  # all but one rank have nothing of it
        "model/bfloat": torch.randn(4, generator=random).bfloat16(),
        "optimizer/double": torch.randn(7, generator=random, dtype=torch.float64),
        "optimizer/special": torch.tensor([float("nan"), -0.0, float("inf"), 1e-45]),
        "optimizer/step": torch.tensor(float(step)),
        "optimizer/count": torch.tensor([step, 2]),
    }


PLAIN = ("optimizer/step", "optimizer/count")


def cut(tensors: dict[str, torch.Tensor], group: dist.ProcessGroup) -> dict[str, torch.Tensor]:
    mesh = DeviceMesh.from_group(group, "cpu")
    return {
        name: tensor if name in PLAIN else distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)
        for name, tensor in tensors.items()
    }


def save(group: dist.ProcessGroup, folder: Path, step: int, **options: Any) -> None:
    state_text = encode_state(step, {"epoch": step}, best=options.get("best", False))
    save_sharded(folder, step, cut(draw(step), group), state_text, group=group, **options)


def save_behind(group: dist.ProcessGroup, folder: Path, steps: list[int]) -> None:
    """As the training does it: a thread writes, while the tensors change and the main group is used."""
    with ShardedWriter(folder, group=group, background=True, check=lambda: None) as saver:
        for step in steps:
            tensors = cut(draw(step), group)
            saver.save(step, tensors, {"epoch": step})
            for _ in range(20):
                dist.all_reduce(torch.ones(1000))
            for tensor in tensors.values():
                (tensor.to_local() if isinstance(tensor, DTensor) else tensor).zero_()
    assert not saver.failed


def check_whole(folder: Path, step: int) -> Path:
    """One process reads it all with the ordinary reader."""
    found = store.load(folder)
    assert found is not None
    assert (found.step, found.state) == (step, {"epoch": step})
    assert {name: bits(tensor) for name, tensor in found.tensors.items()} == {n: bits(t) for n, t in draw(step).items()}
    return found.path


def check_parts(group: dist.ProcessGroup, folder: Path, step: int) -> None:
    expected = cut(draw(step), group)
    mesh = DeviceMesh.from_group(group, "cpu")

    def make(name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        whole = torch.empty(shape, dtype=dtype)
        return whole if name in PLAIN else distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)

    found = load_sharded(folder, make=make, group=group)
    assert found is not None and found.step == step and list(found.tensors) == sorted(expected)
    for name, tensor in found.tensors.items():
        parts = [(t.to_local() if isinstance(t, DTensor) else t) for t in (tensor, expected[name])]
        assert bits(parts[0]) == bits(parts[1]), name


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_sharded_checkpoint_is_read_by_any_number_of_processes(world_size: int, tmp_path: Path) -> None:
    run(tmp_path, world_size, save, tmp_path / "c", 4)
    path = check_whole(tmp_path / "c", 4)
    assert len(list(path.glob("*.safetensors"))) == 2 * world_size
    for readers in {1, 2, 3} - {world_size}:
        run(tmp_path, readers, check_parts, tmp_path / "c", 4)


def test_unsharded_checkpoint_is_read_in_parts_by_2_processes(tmp_path: Path) -> None:
    save_whole(tmp_path / "c", 4, draw(4), {"epoch": 4})
    run(tmp_path, 2, check_parts, tmp_path / "c", 4)


def test_sharded_background_write_saves_the_tensors_as_they_were_at_save(tmp_path: Path) -> None:
    run(tmp_path, 2, save_behind, tmp_path / "c", [1, 2, 3])
    path = check_whole(tmp_path / "c", 3)
    assert [found.name for found in store.list_checkpoints(tmp_path / "c")] == [path.name, "step-00000002-0002"]


def load_nothing(group: dist.ProcessGroup, folder: Path) -> None:
    assert load_sharded(folder, make=tensor_files.whole_on_cpu, group=group) is None


def test_load_sharded_without_checkpoint_returns_none_on_every_rank(tmp_path: Path) -> None:
    run(tmp_path, 2, load_nothing, tmp_path / "nowhere")


# ---- damage ----


@pytest.fixture(scope="module")
def two_saves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 1 and 2, by two processes."""
    folder = tmp_path_factory.mktemp("sharded")

    def save_twice(group: dist.ProcessGroup) -> None:
        save(group, folder / "c", 1)
        save(group, folder / "c", 2)

    run(folder, 2, save_twice)
    return folder / "c"


@pytest.fixture
def saved(two_saves: Path, tmp_path: Path) -> Path:
    shutil.copytree(two_saves, tmp_path / "c")
    return tmp_path / "c"


@pytest.mark.parametrize("damage", [truncate, flip_bit, Path.unlink])
@pytest.mark.parametrize("name", [SHARDS[0], SHARDS[3]])
def test_damaged_shard_is_named_and_the_previous_checkpoint_is_loaded(
    name: str, damage: Callable[[Path], None], saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(saved / "step-00000002-0002" / name)
    check_whole(saved, 1)
    assert name in caplog.text
    if damage is flip_bit:
        run(saved.parent, 2, check_parts, saved, 1)


def test_sharded_checkpoint_reads_only_the_requested_group(saved: Path) -> None:
    path = saved / "step-00000002-0002"
    for name in SHARDS:
        if "model-00002" in name:  # the optimizer's
            (path / name).write_bytes((path / name).read_bytes()[:-1] + b"x")
    assert set(read_checkpoint(path, groups=("model",)).tensors) == {name for name in draw(2) if name.startswith("model/")}
    flip_bit(path / SHARDS[0])
    with pytest.raises(DamagedCheckpointError, match=SHARDS[0]):
        read_checkpoint(path, groups=("model",))


@pytest.mark.parametrize("place", [".metadata", "checkpoint.json", *SHARDS[:1], "shard-00003-model-00001-of-00002.safetensors"])
def test_a_planted_pickle_does_not_run(place: str, saved: Path) -> None:
    exploded = saved.parent / "exploded"
    pickle.loads(pickle.dumps(Bomb(exploded)))
    assert exploded.exists()  # it would
    exploded.unlink()
    (saved / "step-00000002-0002" / place).write_bytes(pickle.dumps(Bomb(exploded)))
    step = 2 if place == ".metadata" else 1
    check_whole(saved, step)
    run(saved.parent, 2, check_parts, saved, step)
    assert not exploded.exists()


def test_sharded_checkpoint_has_format_2(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved / "step-00000002-0002"
    assert json.loads((path / "checkpoint.json").read_bytes())["content"]["format"] == 2
    monkeypatch.setattr(store, "SHARDED_FORMAT_VERSION", 1)  # the older one knew format 1 alone
    for read in (read_checkpoint, store.verify_files):
        with pytest.raises(UserError, match=r"step-00000002-0002 has checkpoint format 2.* Use the version that wrote it"):
            read(path)


# ---- failures ----


def expect_failure(
    group: dist.ProcessGroup, folder: Path, kind: type[Exception], text: str, prepare: Work, **options: Any
) -> None:
    """All ranks raise the same, nothing is left, and the next save succeeds."""
    save(group, folder, 1)
    before = sorted(folder.rglob("*"))
    dist.barrier()  # no rank begins the next save while another still looks
    undo = prepare(group)
    try:
        with pytest.raises(kind) as raised:
            save(group, folder, 2, **options)
    finally:
        if undo is not None:
            undo()
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, str(raised.value))
    assert len(set(answers)) == 1 and text in answers[0], answers
    assert sorted(folder.rglob("*")) == before
    dist.barrier()
    save(group, folder, 3)


def limit_files(group: dist.ProcessGroup) -> Any:
    """Rank 1 cannot write more than a hundred bytes."""
    if dist.get_rank(group) != 1:
        return None
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def lose_files(group: dist.ProcessGroup) -> Any:
    """What rank 1 writes is not there for rank 0, as on a disk of its own."""
    original = copy.copy(sharded._sync_and_hash)

    def hash_and_remove(files: list[Path]) -> dict[str, str]:
        hashes = original(files)
        for file in files:
            file.unlink()
        return hashes

    if dist.get_rank(group) == 1:
        sharded._sync_and_hash = hash_and_remove

    def undo() -> None:
        sharded._sync_and_hash = original

    return undo


def break_writer(group: dist.ProcessGroup) -> Any:
    original = sharded.file_sha256

    def fail(_path: Path) -> str:
        raise RuntimeError("no")

    if dist.get_rank(group) == 1:
        sharded.file_sha256 = fail

    def undo() -> None:
        sharded.file_sha256 = original

    return undo


def do_nothing(_group: dist.ProcessGroup) -> None:
    return None


def lose_lock() -> None:
    raise UserError("the lock was lost")


@pytest.mark.parametrize(
    ("kind", "text", "prepare", "options"),
    [
        (EveryRankError, "the file size limit is reached. The earlier checkpoints are untouched.", limit_files, {}),
        (EveryRankError, "a file system that all nodes share", lose_files, {}),
        (EveryRankError, "the lock was lost", do_nothing, {"check": lose_lock}),
        (RunFailedError, "RuntimeError on rank 1: no", break_writer, {}),
    ],
)
def test_failure_of_one_rank_is_raised_on_all_and_leaves_no_checkpoint(
    kind: type[Exception], text: str, prepare: Work, options: dict[str, Any], tmp_path: Path
) -> None:
    run(tmp_path, 2, lambda group: expect_failure(group, tmp_path / "c", kind, text, prepare, **options))
    check_whole(tmp_path / "c", 3)


def fail_behind(group: dist.ProcessGroup, folder: Path) -> None:
    undo = limit_files(group)
    saver = ShardedWriter(folder, group=group, background=True, check=lambda: None)
    saver.save(1, cut(draw(1), group), {"epoch": 1})
    with pytest.raises(EveryRankError, match="the file size limit is reached"):
        saver.wait()
    if undo is not None:
        undo()
    dist.barrier()
    saver.save(2, cut(draw(2), group), {"epoch": 2})
    saver.wait()


def test_failure_in_a_background_sharded_write_is_raised_on_all_ranks(tmp_path: Path) -> None:
    run(tmp_path, 2, fail_behind, tmp_path / "c")
    check_whole(tmp_path / "c", 2)


def save_watched(group: dist.ProcessGroup, folder: Path, victim: int, stop_at: int | None, counts: Path) -> None:
    """Save step 3; the victim dies just before its change of the disk of number ``stop_at``, or counts them."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        writes = event == "open" and str(arguments[0]).endswith(".safetensors") and "w" in str(arguments[1])
        if not (event.startswith("galaxydist.") or writes):
            return
        if count == stop_at:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    tensors = cut(draw(3), group)
    if dist.get_rank() == victim:
        sys.addaudithook(hook)
    save_sharded(folder, 3, tensors, encode_state(3, {"epoch": 3}, best=True), group=group, best=True)
    (counts / str(dist.get_rank())).write_text(str(count))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_rank_killed_at_any_write_leaves_a_complete_sharded_checkpoint(victim: int, two_saves: Path, tmp_path: Path) -> None:
    shutil.copytree(two_saves, tmp_path / "whole")
    run(tmp_path, 2, save_watched, tmp_path / "whole", victim, None, tmp_path)
    num_changes = int((tmp_path / str(victim)).read_text())
    assert num_changes > (20 if victim == 0 else 3)
    steps = []
    for stop_at in range(num_changes):
        folder = tmp_path / f"at-{stop_at}"
        shutil.copytree(two_saves, folder)
        processes = start(tmp_path, 2, save_watched, folder, victim, stop_at, tmp_path)
        processes[victim].join(240)
        assert processes[victim].exitcode == -signal.SIGKILL
        time.sleep(0.05)
        processes[1 - victim].kill()  # as a launcher does
        processes[1 - victim].join()
        found = store.load(folder)
        assert found is not None
        check_whole(folder, found.step)
        steps.append(found.step)
        run(tmp_path, 2, save, folder, 4)
        check_whole(folder, 4)
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert steps == sorted(steps) and steps[0] == 2 and steps[-1] == (3 if victim == 0 else 2)
