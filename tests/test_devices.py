"""Device and precision of each rank, from what launchers make visible; the GPUs are pretended."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from galaxydist import distributed
from galaxydist.devices import RankDevice, check_devices, device_index, find_device, own_device, resolve_precision
from galaxydist.errors import UserError
from galaxydist.job_environment import LauncherRank
from tests.helpers.forked_runs import run_forked, train
from tests.helpers.runs import quick_settings


@pytest.mark.parametrize(
    ("precision", "capabilities", "expected"),
    [
        ("auto", [None], "no"),
        ("auto", [(9, 0)], "bf16"),
        ("auto", [(7, 5)], "fp16"),
        ("auto", [(10, 0), (8, 0), (9, 0)], "bf16"),
        ("auto", [(10, 0), (7, 5), (9, 0)], "fp16"),  # the same on all ranks
        ("bf16", [None], "bf16"),
        ("no", [(9, 0)], "no"),
        ("fp16", [(7, 0)], "fp16"),
    ],
)
def test_precision_follows_the_least_device_of_all_ranks(
    precision: Any, capabilities: list[tuple[int, int] | None], expected: str
) -> None:
    assert resolve_precision(precision, capabilities) == expected


def test_fp16_without_a_gpu_is_refused_suggesting_precision_auto() -> None:
    with pytest.raises(UserError, match=r"train\.precision=auto"):
        resolve_precision("fp16", [None, None])


@pytest.mark.parametrize(
    ("num_visible", "local_rank", "index"),
    [
        (4, 0, 0),
        (4, 3, 3),
        (1, 0, 0),
        (1, 3, 0),  # --gpus-per-task=1: each rank sees its own GPU, as number 0
        (2, 2, None),
        (0, 0, None),
    ],
)
def test_device_index_is_the_local_rank_unless_each_rank_sees_its_own_gpu(
    num_visible: int, local_rank: int, index: int | None
) -> None:
    assert device_index(num_visible, local_rank) == index
    found = RankDevice(local_rank=local_rank, num_visible=num_visible)
    assert found.device == (torch.device("cpu") if index is None else torch.device("cuda", index))


def test_process_without_a_gpu_computes_on_the_cpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    found = find_device(LauncherRank(5, 8, 4, 1), {"NCCL_HOSTID": "n2"})
    assert found == RankDevice(5, 1, "n2")


@pytest.mark.parametrize(
    ("environ", "num_visible", "index"),
    [
        ({}, 4, 0),
        ({"LOCAL_RANK": "2"}, 4, 2),
        ({"LOCAL_RANK": "2"}, 1, 0),
        ({"SLURM_LOCALID": "1"}, 2, 1),
        ({"LOCAL_RANK": "2"}, 2, None),
    ],
)
def test_process_that_works_alone_takes_the_gpu_of_its_local_rank(
    environ: dict[str, str], num_visible: int, index: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process of a launcher that labels images, too; it never takes another one's GPU."""
    found: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_visible)
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(uuid=f"GPU-{number}"))
    if index is None:
        with pytest.raises(UserError, match="is process 3 of its machine, which sees 2 GPUs"):
            own_device(environ)
    else:
        assert own_device(environ) == torch.device("cuda", index)
        assert found == [index]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() != 1, reason="needs one GPU")
def test_rank_that_sees_one_gpu_takes_it_whatever_its_local_rank() -> None:
    found = find_device(LauncherRank(3, 4, 4, 3), {})
    assert (found.device, found.capability) == (torch.device("cuda", 0), torch.cuda.get_device_capability())
    assert found.gpu == str(torch.cuda.get_device_properties(0).uuid)
    check_devices([found])


def machine(num_ranks: int, num_visible: int) -> list[RankDevice]:
    """Return the devices of ranks on two machines, one after the other."""
    half = num_ranks // 2
    return [RankDevice(rank, rank % half, f"n{rank // half}", num_visible, f"GPU-{rank}", (9, 0)) for rank in range(num_ranks)]


@pytest.mark.parametrize("num_visible", [4, 1, 8])
def test_ranks_with_a_gpu_each_pass(num_visible: int) -> None:
    check_devices(machine(8, num_visible))
    check_devices([replace(found, gpu="GPU-0") for found in machine(2, 1)])  # machines are told apart, not only GPUs
    check_devices([RankDevice(rank) for rank in range(4)])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({3: {"num_visible": 0}, 2: {"num_visible": 0}}, "2 of 4 processes see no GPU, the first is rank 2 on n1. Give each"),
        ({1: {"local_rank": 2}}, "rank 1 on n0 is process 3 of its machine, which sees 2 GPUs. Start one process for each"),
        # `torchrun --nproc-per-node 2` with one GPU, or two slices of a GPU, of which CUDA shows the first only.
        ({n: {"num_visible": 1, "gpu": "MIG-a"} for n in (2, 3)}, "rank 2 on n1 and rank 3 there have the same GPU (MIG-a). S"),
        ({1: {"problem": "CUDA error: busy"}}, "The GPU of rank 1 on n0 cannot be used: CUDA error: busy. Check"),
    ],
)
def test_wrong_distribution_of_gpus_is_refused_with_a_remedy(changes: dict[int, dict[str, Any]], expected: str) -> None:
    devices = [replace(found, **changes.get(found.rank, {})) for found in machine(4, 2)]
    with pytest.raises(UserError) as raised:
        check_devices(devices)
    assert str(raised.value).startswith(expected)


def train_pretending(settings: list[str], facts: dict[int, dict[str, Any]]) -> int:
    """Train on a rank that pretends to have the given device."""
    rank = int(os.environ["RANK"])
    distributed.find_device = lambda *_: RankDevice(rank, rank, "n0", **facts[rank])  # type: ignore[attr-defined]
    return train(settings)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_all_ranks_end_with_one_message_if_one_of_them_sees_no_gpu(blobs: Path, tmp_path: Path) -> None:
    """NCCL and gloo would wait for each other; here the ranks compare their devices first."""
    settings = quick_settings(blobs, tmp_path / "run")
    ran = run_forked(train_pretending, settings, {0: {"num_visible": 2, "gpu": "GPU-0", "capability": (9, 0)}, 1: {}}, size=2)
    assert ran.returncode == 2 and not (tmp_path / "run").exists()
    assert json.dumps(ran.stderr).count("1 of 2 processes see no GPU, the first is rank 1 on n0.") == 1
