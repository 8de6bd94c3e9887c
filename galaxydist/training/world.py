"""The world that a process belongs to: rank, number of processes, device, cores. The only place that reads the environment."""

import socket
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, broadcast_object_list

from galaxydist.cores import bound_cores, cpu_quota, fair_share
from galaxydist.errors import EveryRankError, RunFailedError, UserError
from galaxydist.runs.lock_owner import job_of, restart_of
from galaxydist.training.flight import set_flight_recorder

Precision = Literal["no", "bf16", "fp16", "fp64"]
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """What a process knows of the processes around it.

    Args:
        accelerator: Hugging Face's Accelerator, which moves the model and scales the gradients.
        rank, size: this process and how many there are.
        ranks_on_node: processes on this machine.
        cores: processor cores that this process may use for itself.
        precision: of the forward pass.
        job_id, restart_count: of the batch job, where there is one.
    """

    accelerator: Accelerator
    rank: int
    size: int
    ranks_on_node: int
    cores: int
    precision: Precision
    job_id: str | None
    restart_count: int

    @property
    def device(self) -> torch.device:
        return torch.device(self.accelerator.device)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and images (mixed precision casts within the forward pass)."""
        return torch.float64 if self.precision == "fp64" else torch.float32

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print a line, once for all ranks."""
        if self.is_main:
            print(text, flush=True)

    def on_main(self, work: Callable[[], T]) -> T:
        """Rank 0 does the work; every rank gets its result, or raises its ``UserError``. Another error is rank 0's own, and the
        others, which would wait for it, fail with it."""
        if self.size == 1:
            return work()
        answer: list[Any] = [None, None, None]
        failure: Exception | None = None
        if self.is_main:
            try:
                answer[0] = work()
            except UserError as error:
                answer[1] = str(error)
            except Exception as error:
                failure, answer[2] = error, f"rank 0 failed: {type(error).__name__}: {error}"
        broadcast_object_list(answer, from_process=0)
        if failure is not None:
            raise failure
        _raise_told(answer[1], answer[2])
        result: T = answer[0]
        return result

    def together(self, work: Callable[[], T]) -> T:
        """Every rank does the work; if any raises ``UserError``, every rank raises the first of them. A rank with another error
        raises that, and the others fail with it."""
        if self.size == 1:
            return work()
        done: list[T] = []
        problem: tuple[str | None, str | None] = (None, None)
        failure: Exception | None = None
        try:
            done.append(work())
        except UserError as error:
            problem = (str(error), None)
        except Exception as error:
            failure, problem = error, (None, f"rank {self.rank} failed: {type(error).__name__}: {error}")
        told = self.gather(problem)
        if failure is not None:
            raise failure
        _raise_told(next((text for text, _ in told if text), None), next((text for _, text in told if text), None))
        return done[0]

    def gather(self, value: T) -> list[T]:
        """What every rank gives, in the order of the ranks. All ranks take part."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The element-wise sum over all ranks, in place. All ranks take part."""
        if self.size > 1:
            dist.all_reduce(values)
        return values


def enter_world(
    precision: Precision | Literal["auto"], environ: MutableMapping[str, str], *, timeout: timedelta | None = None
) -> World:
    """Join the processes that the launcher started.

    Works under ``python``, ``accelerate launch``, ``torchrun`` and ``srun``.

    Args:
        precision: ``auto``, ``no``, ``bf16``, ``fp16`` or ``fp64``, as in the recipe.
        environ: the process's environment; torch's variables are added to it, under ``srun`` and for the flight recorder.
        timeout: of collectives; None: torch's own.

    Raises:
        UserError: fp16 without a GPU; a launcher whose number of processes did not come about.
    """
    _adopt_srun(environ)
    set_flight_recorder(environ)
    wanted = int(environ.get("WORLD_SIZE", "1"))
    has_gpu = torch.cuda.is_available()
    resolved = resolve_precision(precision, has_gpu, torch.cuda.get_device_capability() if has_gpu else None)
    local_size = int(environ.get("LOCAL_WORLD_SIZE", "0")) or wanted
    accelerator = Accelerator(
        cpu=not has_gpu,
        mixed_precision="no" if resolved == "fp64" else resolved,
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=timeout),
        ],
    )
    if accelerator.num_processes != wanted:
        raise EveryRankError(
            f"The launcher asked for {wanted} processes (WORLD_SIZE), but {accelerator.num_processes} came together. "
            "Start the processes with torchrun --nproc-per-node N launch.py, or accelerate launch --multi_gpu --num_processes N "
            "launch.py (also on machines without a GPU)."
        )
    world = World(
        accelerator=accelerator,
        rank=accelerator.process_index,
        size=accelerator.num_processes,
        ranks_on_node=local_size,
        cores=1,
        precision=resolved,
        job_id=job_of(environ),
        restart_count=restart_of(environ),
    )
    world = replace(world, cores=_share_cores(world))
    # Launchers set OMP_NUM_THREADS=1; the cores are there to be used.
    torch.set_num_threads(world.cores)
    return world


def _raise_told(by_user: str | None, by_chance: str | None) -> None:
    if by_chance is not None:
        raise RunFailedError(by_chance)
    if by_user is not None:
        raise EveryRankError(by_user)


def _share_cores(world: World) -> int:
    """This process's share of its machine's cores; all tell what they are bound to."""
    host = socket.gethostname()
    everywhere = world.gather((host, world.rank, bound_cores()))
    here = [(rank, cores) for theirs, rank, cores in everywhere if theirs == host]
    return fair_share([cores for _, cores in here], [rank for rank, _ in here].index(world.rank), cpu_quota())


def leave_world() -> None:
    """Take down the process group, where there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def resolve_precision(precision: Precision | Literal["auto"], has_gpu: bool, capability: tuple[int, int] | None) -> Precision:
    """``auto`` becomes bf16 on compute capability 8 and later, fp16 on older GPUs, fp32 without one.

    Raises:
        UserError: fp16 without a GPU.
    """
    if precision == "auto":
        if not has_gpu:
            return "no"
        return "bf16" if capability is not None and capability[0] >= 8 else "fp16"
    if precision == "fp16" and not has_gpu:
        raise EveryRankError(
            "train.precision=fp16 needs a GPU, and none is visible to this process. "
            "Use train.precision=auto (fp32 on a machine without a GPU), or check nvidia-smi and CUDA_VISIBLE_DEVICES."
        )
    return precision


def _adopt_srun(environ: MutableMapping[str, str]) -> None:
    """Under ``srun`` with several tasks and no other launcher: give torch the variables that it reads."""
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks <= 1 or "RANK" in environ:
        return
    environ.update(
        RANK=environ["SLURM_PROCID"],
        LOCAL_RANK=environ["SLURM_LOCALID"],
        WORLD_SIZE=str(tasks),
        LOCAL_WORLD_SIZE=_tasks_on_node(environ),
    )
    environ.setdefault("MASTER_ADDR", _first_host(environ))
    environ.setdefault("MASTER_PORT", str(20_000 + int(environ["SLURM_JOB_ID"]) % 20_000))


def _tasks_on_node(environ: Mapping[str, str]) -> str:
    """Tasks on this node, from SLURM's compressed list (``4(x2),3``)."""
    counts: list[str] = []
    for part in environ["SLURM_STEP_TASKS_PER_NODE"].split(","):
        number, _, times = part.partition("(x")
        counts += [number] * int(times.rstrip(")") or 1)
    return counts[int(environ["SLURM_NODEID"])]


def _first_host(environ: Mapping[str, str]) -> str:
    """The first node of the job step, by SLURM's own parser of host lists."""
    import subprocess

    nodes = environ["SLURM_STEP_NODELIST"]
    if "[" not in nodes:
        return nodes.split(",")[0]
    answer = subprocess.run(["scontrol", "show", "hostnames", nodes], check=True, capture_output=True, text=True)
    return answer.stdout.split()[0]
