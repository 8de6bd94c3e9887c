"""Device and precision of each rank.

The ranks compare what they see of the GPUs before their process group exists: a wrong distribution of GPUs would hang the group
or end it with an error of NCCL's.
"""

import contextlib
import json
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch.distributed import Store  # type: ignore[attr-defined]

from galaxydist.errors import EveryRankError, first_line
from galaxydist.job_environment import LauncherRank, local_rank_of, wants_cpu

Precision = Literal["no", "bf16", "fp16", "fp64"]


@dataclass(frozen=True)
class RankDevice:
    """The GPU of a rank, and what it sees of the others.

    Args:
        rank, local_rank: number of the rank among all, and among those of its machine.
        host: the machine, as NCCL tells machines apart.
        num_visible: GPUs that this rank sees; 0: it computes on the CPU.
        gpu: unique id of its GPU.
        capability: compute capability of its GPU.
        problem: first line of the error if the GPU cannot be used.
    """

    rank: int = 0
    local_rank: int = 0
    host: str = ""
    num_visible: int = 0
    gpu: str | None = None
    capability: tuple[int, int] | None = None
    problem: str | None = None

    @property
    def device(self) -> torch.device:
        index = device_index(self.num_visible, self.local_rank)
        return torch.device("cpu") if index is None else torch.device("cuda", index)

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


def uses_gpu(environ: Mapping[str, str]) -> bool:
    """Return True if this process computes on a GPU: torch can use one, and the launcher does not ask for the CPU."""
    return torch.cuda.is_available() and not wants_cpu(environ)


def device_index(num_visible: int, local_rank: int) -> int | None:
    """Return the number of a rank's GPU among those that it sees; None if it sees too few.

    A launcher shows each rank either all GPUs of the machine, or the rank's own GPU alone (``--gpus-per-task=1``).
    """
    if num_visible == 1:
        return 0
    return local_rank if local_rank < num_visible else None


def find_device(launched: LauncherRank, environ: Mapping[str, str]) -> RankDevice:
    """Choose this process's GPU, and make it torch's current one."""
    found = RankDevice(launched.rank, launched.local_rank, environ.get("NCCL_HOSTID") or socket.gethostname())
    if not uses_gpu(environ):
        return found
    facts: dict[str, Any] = {"num_visible": torch.cuda.device_count()}
    index = device_index(facts["num_visible"], launched.local_rank)
    if index is not None:
        try:
            torch.cuda.set_device(index)
            facts["capability"] = torch.cuda.get_device_capability(index)
            facts["gpu"] = str(torch.cuda.get_device_properties(index).uuid)
        except RuntimeError as error:  # in use by another process, or broken
            facts["problem"] = first_line(error)
    return RankDevice(found.rank, found.local_rank, found.host, **facts)


def own_device(environ: Mapping[str, str]) -> torch.device:
    """Return the device of a process that works alone: the GPU of its local rank under a launcher, else the first; or the CPU.

    Raises:
        EveryRankError: the GPU cannot be used, or the launcher has started more processes than there are GPUs.
    """
    found = find_device(LauncherRank(local_rank=local_rank_of(environ)), environ)
    check_devices([found])
    return found.device


def gather_devices(own: RankDevice, store: Store, size: int) -> list[RankDevice]:
    """Return the devices of all ranks, in rank order; all ranks must call it, once for each store.

    Rank 0, which may host the store, returns after all others have read it.
    """
    store.set(f"device/{own.rank}", json.dumps(asdict(own)))
    found = [json.loads(store.get(f"device/{rank}")) for rank in range(size)]
    store.set(f"device/{own.rank}/done", "")
    if own.rank == 0:
        store.wait([f"device/{rank}/done" for rank in range(size)])
    return [RankDevice(**{**facts, "capability": tuple(facts["capability"]) if facts["capability"] else None}) for facts in found]


def check_devices(devices: Sequence[RankDevice]) -> None:
    """Check that each rank has a GPU of its own, or none has one.

    Args:
        devices: of all ranks.

    Raises:
        EveryRankError: a GPU cannot be used; only some ranks have one; two ranks have the same, or too few are visible.
    """
    for found in devices:
        if found.problem is not None:
            raise EveryRankError(f"The GPU of {found} cannot be used: {found.problem}. Check it with nvidia-smi.")
    without = [found for found in devices if not found.num_visible]
    if len(without) == len(devices):
        return
    if without:
        raise EveryRankError(
            f"{len(without)} of {len(devices)} processes see no GPU, the first is {without[0]}. Give each process a GPU (check "
            "nvidia-smi and CUDA_VISIBLE_DEVICES there), or set CUDA_VISIBLE_DEVICES= for all, to compute on the CPU."
        )
    remedy = "Start one process for each GPU (torchrun --nproc-per-node, srun --ntasks-per-node), or make one visible to each."
    users: dict[tuple[str, str], RankDevice] = {}
    for found in devices:
        if device_index(found.num_visible, found.local_rank) is None:
            raise EveryRankError(
                f"{found} is process {found.local_rank + 1} of its machine, which sees {found.num_visible} GPUs. {remedy}"
            )
        other = users.setdefault((found.host, str(found.gpu)), found)
        if other is not found:
            raise EveryRankError(f"{other} and rank {found.rank} there have the same GPU ({found.gpu}). {remedy}")


def resolve_precision(precision: Precision | Literal["auto"], capabilities: Sequence[tuple[int, int] | None]) -> Precision:
    """Resolve ``auto``: bf16 from compute capability 8 on, fp16 on older GPUs, fp32 without a GPU.

    Args:
        precision: as in the recipe.
        capabilities: compute capabilities of all ranks' GPUs, of which the least decides; None for a CPU.

    Raises:
        EveryRankError: fp16 without a GPU.
    """
    least = min((capability for capability in capabilities if capability is not None), default=None)
    if precision == "auto":
        if least is None:
            return "no"
        return "bf16" if least >= (8, 0) else "fp16"
    if precision == "fp16" and least is None:
        raise EveryRankError(
            "train.precision=fp16 needs a GPU, and none is visible to this process. "
            "Use train.precision=auto (fp32 on a machine without a GPU), or check nvidia-smi and CUDA_VISIBLE_DEVICES."
        )
    return precision


def autocast(device: torch.device, precision: Precision, *, cached: bool = True) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which a forward pass computes in the given precision.

    Args:
        device: of the model.
        precision: ``no`` and ``fp64`` cast nothing.
        cached: keep the casts of the weights until the context ends.
    """
    if precision in ("no", "fp64"):
        return contextlib.nullcontext()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return torch.autocast(device.type, dtype, cache_enabled=cached)
