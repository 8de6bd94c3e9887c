"""Checks of several ranks: real NCCL between ranks that share one GPU (gloo on a CPU), and ranks that fail.

NCCL refuses two ranks on one GPU of one host, so each rank says that it is a host of its own, and they talk over the loopback
interface. Their kernels take turns on the GPU: a collective takes some 15 ms, and speed means nothing here.
"""

import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from galaxydist.cli.train import main
from galaxydist.errors import EXIT_FAILED, EXIT_HUNG, EXIT_STOPPED
from tests.gpu.correctness import EXACT, largest_gap
from tests.gpu.rig import Rig, Row, TimeUpError, at_most, equal, needs_cuda, one_of
from tests.helpers.forked_runs import Ranks
from tests.helpers.runs import count_errors, quick_settings, read_evaluation, read_losses

Fault = Literal["none", "sigterm", "memory", "kill", "stop"]
# Batch statistics over all ranks; a rate that does not depend on the length of the run.
SYNCHRONISED = {**EXACT, "model__norm": "batch", "train__sync_batchnorm": True, "train__ema": 0.0}
STEADY = {**EXACT, "optim__schedule": "constant", "optim__warmup": 0.0}
FAULTY_STEP = 4
# Seconds without a heartbeat after which a run counts as hung, and the most that the other ranks may take to leave after it.
HANG_S, LEAVE_S = 5.0, 60.0
# Exit codes of a rank whose peer was killed.
LOST_CODES = {EXIT_FAILED: "the connection broke", EXIT_HUNG: "no progress", -signal.SIGABRT: "torch's watchdog of NCCL"}


def nccl_variables(rank: int) -> dict[str, str]:
    """Return the variables of a rank that shares its GPU with the others."""
    return {
        "NCCL_HOSTID": f"rank-{rank}",
        "NCCL_MULTI_RANK_GPU_ENABLE": "1",
        "NCCL_NET": "Socket",
        "NCCL_SOCKET_IFNAME": "lo",
        "NCCL_P2P_DISABLE": "1",
        "NCCL_SHM_DISABLE": "1",
        "NCCL_IB_DISABLE": "1",
        "NCCL_NVLS_ENABLE": "0",
        "NCCL_MNNVL_ENABLE": "0",
        "NCCL_RAS_ENABLE": "0",
        "GLOO_SOCKET_IFNAME": "lo",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
    }


def train_rank(settings: list[str], fault: Fault = "none") -> int:
    """Train as launch.py does; of several ranks, which share a GPU as hosts of their own, the last one has the fault."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and os.environ.get("CUDA_VISIBLE_DEVICES", "all"):
        os.environ.update(nccl_variables(rank))
    if rank == size - 1 and fault != "none":
        go_wrong_at_step(fault)
    return main(settings, os.environ)


def go_wrong_at_step(fault: Fault) -> None:
    """Let this rank go wrong between the images and the forward pass of a step."""
    import torch

    from galaxydist.training.step import TrainStep

    images_of = TrainStep.augmented

    def faulty(self: TrainStep, batch: Any, *others: Any) -> Any:
        images_BCHW = images_of(self, batch, *others)
        if batch.step == FAULTY_STEP:
            if fault == "memory":
                torch.empty(1 << 50, dtype=torch.uint8, device=images_BCHW.device)
            else:
                numbers = {"sigterm": signal.SIGTERM, "kill": signal.SIGKILL, "stop": signal.SIGSTOP}
                os.kill(os.getpid(), numbers[fault])
        return images_BCHW

    TrainStep.augmented = faulty  # type: ignore[method-assign]


def train_ranks(rig: Rig, size: int, run_dir: Path, changes: Mapping[str, Any], fault: Fault = "none") -> list[int | None]:
    """Train on several ranks to the end; return their exit codes."""
    settings = quick_settings(rig.blobs_with_splits, run_dir, **changes)
    with rig.start(train_rank, settings, fault, size=size) as ranks:
        codes = rig.wait(ranks)
        if fault == "none" and any(codes):
            raise RuntimeError(f"{size} ranks ended with {codes}: {ranks.text('err').strip()[-1500:]}")
        return codes


def check_ranks(rig: Rig) -> Iterator[Row]:
    """Compare runs of several ranks with one process, in double precision."""
    folder = rig.new_folder()
    backend = "NCCL" if rig.is_cuda else "gloo"
    if not rig.is_cuda:
        yield needs_cuda("NCCL", "the ranks talk through gloo")
    losses, evaluations = {}, {}
    sizes = (2, 3) if rig.is_cuda else (2,)
    for size in (1, *sizes):
        run_dir = folder / f"synchronised-{size}"
        train_ranks(rig, size, run_dir, SYNCHRONISED)
        losses[size], evaluations[size] = read_losses(run_dir), read_evaluation(run_dir)
    for size in sizes:
        name = f"{backend}, {size} ranks, synchronised batch norm"
        yield at_most(f"{name}: fp64 losses against one process", largest_gap(losses[1], losses[size]), 1e-9)
        yield equal(f"{name}: confusion matrix", evaluations[size]["confusion"], evaluations[1]["confusion"])
    train_ranks(rig, 1, folder / "whole", STEADY)
    sharded = {**STEADY, "train__strategy": "fsdp"}
    codes = train_ranks(rig, 2, folder / "sharded", sharded, "sigterm")
    yield equal(f"{backend}, FSDP on 2 ranks, SIGTERM to one: exit codes", codes, [EXIT_STOPPED] * 2)
    train_ranks(rig, sizes[-1], folder / "sharded", sharded)
    gap = largest_gap(read_losses(folder / "whole"), read_losses(folder / "sharded"))
    yield at_most(f"{backend}, FSDP continued on {sizes[-1]} ranks: fp64 losses against one process", gap, 1e-9)


# ---- ranks that fail ----


@contextmanager
def failing(rig: Rig, run_dir: Path, fault: Fault) -> Iterator[Ranks]:
    """Start two ranks, the second of which goes wrong in a step."""
    changes = {**EXACT, "train__hang_timeout": HANG_S, "train__epochs": 40, "eval__every": 40, "train__save_every": 40}
    with rig.start(train_rank, quick_settings(rig.blobs_with_splits, run_dir, **changes), fault, size=2) as ranks:
        yield ranks


def check_failures(rig: Rig) -> Iterator[Row]:
    """One rank fails: the other one must leave soon, and the reason must be on record."""
    for fault in ("memory", "kill", "stop"):
        run_dir = rig.new_folder() / "run"
        with failing(rig, run_dir, fault) as ranks:
            if fault == "memory":
                yield from out_of_memory(rig, ranks, run_dir)
            else:
                yield from lost_rank(rig, ranks, fault)
    if rig.is_cuda:
        run_dir = rig.new_folder() / "run"
        settings = quick_settings(rig.blobs_with_splits, run_dir, **EXACT)
        environ = nccl_variables(0)
        del environ["LOCAL_RANK"], environ["LOCAL_WORLD_SIZE"], environ["NCCL_HOSTID"]
        with rig.start(train_one_visible, settings, size=2, environ=environ) as ranks:
            yield equal("one visible GPU a task, LOCAL_RANK 0 and 1: exit codes", rig.wait(ranks), [0, 0])
    else:
        yield needs_cuda("one visible GPU a task, LOCAL_RANK 0 and 1", "a CPU has no device map")


def train_one_visible(settings: list[str]) -> int:
    """Train on the only GPU that this task sees, with the local rank that the launcher gave."""
    os.environ["NCCL_HOSTID"] = f"rank-{os.environ['RANK']}"
    return main(settings, os.environ)


def out_of_memory(rig: Rig, ranks: Ranks, run_dir: Path) -> Iterator[Row]:
    """Yield the rows of a rank without memory: its message, and how soon both have left."""
    ranks.processes[1].join(rig.left())
    since = time.monotonic()
    codes = leave_within(rig, ranks)
    yield at_most("out of memory on rank 1: seconds until rank 0 has left", round(time.monotonic() - since, 1), LEAVE_S)
    yield equal("out of memory on rank 1: exit codes", codes, [EXIT_FAILED] * 2)
    said = ranks.said(1, "err")
    yield equal("out of memory on rank 1: it says so, once", (said.count("Out of memory on rank 1"), count_errors(said)), (1, 1))
    failure = json.loads((run_dir / "failure.json").read_text()) if (run_dir / "failure.json").exists() else {}
    yield equal("out of memory on rank 1: failure.json", "Out of memory on rank 1" in failure.get("error", ""), True)


def lost_rank(rig: Rig, ranks: Ranks, fault: Fault) -> Iterator[Row]:
    """Yield the rows of a rank that was killed or stopped: how soon the other has left."""
    name = {"kill": "SIGKILL to rank 1", "stop": "SIGSTOP to rank 1"}[fault]
    while not is_gone(ranks.pids[1]):
        rig.left()
        time.sleep(0.05)
    since = time.monotonic()
    (code,) = leave_within(rig, ranks, 1)
    yield at_most(f"{name}: seconds until rank 0 has left", round(time.monotonic() - since, 1), HANG_S + LEAVE_S)
    if fault == "stop":
        yield equal(f"{name}: exit code of rank 0", code, EXIT_HUNG)
        yield equal(f"{name}: rank 0 names it", "behind: rank 1 (" in ranks.said(0, "err"), True)
    else:
        lost = LOST_CODES if rig.is_cuda else {code: LOST_CODES[code] for code in (EXIT_FAILED, EXIT_HUNG)}
        yield one_of(f"{name}: exit code of rank 0", code, lost)


def leave_within(rig: Rig, ranks: Ranks, *but: int) -> list[int | None]:
    """Return the exit codes of the ranks that leave by themselves; None for those that do not."""
    try:
        return rig.wait(ranks, *but, seconds=HANG_S + LEAVE_S)
    except TimeUpError:
        rig.left()
        return [code for rank, code in enumerate(ranks.exit_codes) if rank not in but]


def is_gone(pid: int) -> bool:
    """Return True once a process is dead or stopped."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state in "TZX"
