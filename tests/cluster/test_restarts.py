"""A continued run ends bit for bit where the undisturbed one does.

This includes three and more processes, where the order of additions depends on DDP's buckets, and another number of cores.
"""

import shutil
from pathlib import Path

import pytest
import torch

from galaxydist.checkpoints import store
from tests.helpers.forked_runs import run_forked, train
from tests.helpers.runs import quick_settings, read_losses, run_here

# 2.7 MB of weights: DDP makes several buckets of them, the first of 1 MB.
WIDE = {"model__width": 16, "train__epochs": 2, "train__log_every": 1, "eval__every": 2}
MIDDLE, LAST = 3, 6  # steps


def read_tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    found = store.load(run_dir / "checkpoints")
    assert found is not None and found.step == LAST
    return dict(found.tensors)


def cut_off(run_dir: Path, step: int) -> None:
    """Leave a run as it was after a step that was saved."""
    for path in store.list_checkpoints(run_dir / "checkpoints"):
        if not path.name.startswith(f"step-{step:08d}"):
            shutil.rmtree(path)
    assert len(store.list_checkpoints(run_dir / "checkpoints")) == 1
    (run_dir / "result.json").unlink()


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("size", [3, pytest.param(4, marks=pytest.mark.nightly)])
def test_continued_run_of_3_or_4_processes_is_bit_equal_to_an_uninterrupted_one(blobs: Path, tmp_path: Path, size: int) -> None:
    settings = quick_settings(blobs, tmp_path / "run", **WIDE)
    assert run_forked(train, settings, size=size).returncode == 0
    whole, losses = read_tensors(tmp_path / "run"), read_losses(tmp_path / "run")
    assert sum(tensor.nbytes for name, tensor in whole.items() if name.startswith("model/")) > 2 * 2**20
    cut_off(tmp_path / "run", MIDDLE)
    done = run_forked(train, settings, size=size)
    assert done.returncode == 0 and f"from step {MIDDLE}" in done.stderr, done.stderr
    assert read_losses(tmp_path / "run") == losses
    again = read_tensors(tmp_path / "run")
    assert [name for name, tensor in whole.items() if not torch.equal(tensor, again[name])] == []


def test_continued_run_uses_the_thread_count_of_its_checkpoint_and_is_bit_equal(
    blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three, which no share of this machine's cores is by chance. The checkpoints hold the number."""
    settings = quick_settings(blobs, tmp_path / "run", **{**WIDE, "model__width": 4})
    before = torch.get_num_threads()
    try:
        assert run_here([*settings, "train.threads=3"]) == 0
        assert "cpu, 3 threads each" in capsys.readouterr().err
        whole = read_tensors(tmp_path / "run")
        for given, threads, told in (
            ("train.threads=1", 1, "cpu, 1 thread each"),
            ("", 3, "computing with 3 threads, as before"),
        ):
            cut_off(tmp_path / "run", MIDDLE)
            assert run_here([*settings, *filter(None, [given])]) == 0
            assert told in capsys.readouterr().err and torch.get_num_threads() == threads
            if given:  # the run as it was in the middle is still that of three threads
                continue
            again = read_tensors(tmp_path / "run")
            assert [name for name, tensor in whole.items() if not torch.equal(tensor, again[name])] == []
    finally:
        torch.set_num_threads(before)
