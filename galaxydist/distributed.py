"""The world that a process belongs to: rank, number of processes, device, cores. The only place that reads the environment."""

import math
import os
import socket
import sys
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    TorchDynamoPlugin,
    broadcast_object_list,
)

from galaxydist.cpus import bound_cores, cpu_quota, fair_share
from galaxydist.errors import EveryRankError, RunFailedError, UserError
from galaxydist.job_environment import check_settings, find_place, job_of, overruled_settings, restart_of, slurm_cores, wants_cpu

# torch's flight recorder: the last collectives of each rank, written when a run hangs.
#
# ``torchfrtrace -p flight_rank_ FOLDER`` says which rank did not take part in which.

PREFIX = "flight_rank_"
# Collectives kept: torch 2.14's own default.
BUFFER_SIZE = 2000
# As torch 2.11 and later read them: the new name, and the older ones that also count. Whichever of them is set decides.
BUFFER_NAMES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
FILE_NAMES = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
DUMP_NAMES = ("TORCH_NCCL_DUMP_ON_TIMEOUT",)


def flight_recorder_variables(folder: Path | None = None) -> dict[tuple[str, ...], str]:
    """What torch is to be told, by all the names that a variable goes under.

    Args:
        folder: where torch's own watchdog writes when a collective times out (``flight_rank_3``); None: torch's own place.
    """
    wanted = {BUFFER_NAMES: str(BUFFER_SIZE), DUMP_NAMES: "1"}
    return wanted if folder is None else {**wanted, FILE_NAMES: str(folder.absolute() / PREFIX)}


def set_flight_recorder(environ: MutableMapping[str, str], folder: Path | None = None) -> None:
    """Set the variables that the user has not set, under any of their names.

    Called before the process group is made. It may be called again with a folder once the run folder is known: torch reads the
    file's name when it writes the first.
    """
    for names, value in flight_recorder_variables(folder).items():
        if not any(name in environ for name in names):
            environ[names[0]] = value


def write_flight_record(folder: Path, rank: int) -> Path | None:
    """Write the collectives of this process where torch's own watchdog would.

    Returns:
        The file, or None where nothing was recorded.
    """
    if not dist.is_initialized():
        return None
    name = "_dump_nccl_trace" if "nccl" in dist.get_backend() else "_dump_fr_trace"
    dump: Callable[..., bytes] | None = getattr(torch._C._distributed_c10d, name, None)
    if dump is None:
        return None
    path = folder / f"{PREFIX}{rank}"
    path.write_bytes(dump(includeCollectives=True, includeStackTraces=True, onlyActive=False))
    return path


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
        threads: that torch computes with, the same number in all processes.
        precision: of the forward pass.
        job_id, restart_count: of the batch job, where there is one.
    """

    accelerator: Accelerator
    rank: int
    size: int
    ranks_on_node: int
    cores: int
    threads: int
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
        """Print a line, once for all ranks. Where printing fails (a closed pipe, a full disk) nothing is printed from then on: no
        reason to end a run."""
        if self.is_main:
            try:
                print(text, flush=True)
            except OSError:
                sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 (open as long as the process runs)

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


def init_distributed(
    precision: Precision | Literal["auto"],
    environ: MutableMapping[str, str],
    *,
    timeout: timedelta | None = None,
    threads: int = 0,
) -> World:
    """Join the processes that the launcher started.

    Works under ``python``, ``accelerate launch``, ``torchrun`` and ``srun``.

    Args:
        precision: ``auto``, ``no``, ``bf16``, ``fp16`` or ``fp64``, as in the recipe.
        environ: the process's environment; torch's variables are added to it, under ``srun`` and for the flight recorder.
        timeout: of collectives; None: torch's own.
        threads: of each process (0: as many as all of them have cores).

    Raises:
        UserError: variables of a launcher that do not fit together, or that ask for what only the recipe may say; fp16 without a
            GPU; a launcher whose number of processes did not come about.
    """
    place = find_place(environ)
    check_settings(environ)
    set_flight_recorder(environ)
    if not environ.get("OMP_NUM_THREADS", "").isdecimal():
        environ["OMP_NUM_THREADS"] = "1"  # torch is loaded: this is for Accelerate, which takes a plain number only (not "4,2")
    has_gpu = torch.cuda.is_available() and not wants_cpu(environ)
    resolved = resolve_precision(precision, has_gpu, torch.cuda.get_device_capability() if has_gpu else None)
    accelerator = _build_accelerator(resolved, has_gpu, environ, timeout)
    if accelerator.num_processes != place.size:
        raise EveryRankError(
            f"The launcher asked for {place.size} processes (WORLD_SIZE), but {accelerator.num_processes} came together. "
            "Start the processes with torchrun --nproc-per-node N launch.py, or accelerate launch --multi_gpu --num_processes N "
            "launch.py (also on machines without a GPU)."
        )
    world = World(
        accelerator=accelerator,
        rank=accelerator.process_index,
        size=accelerator.num_processes,
        ranks_on_node=place.local_size,
        cores=1,
        threads=1,
        precision=resolved,
        job_id=job_of(environ),
        restart_count=restart_of(environ),
    )
    for text in overruled_settings(environ, resolved):
        world.say(f"galaxydist: {text}")
    world = replace(world, cores=threads or _share_cores(world, environ))
    # Launchers set OMP_NUM_THREADS=1; the cores are there to be used.
    return _with_threads(world, min(world.gather(world.cores)))


def keep_threads(world: World, stored: Mapping[str, int] | None) -> World:
    """The world with the threads that a run has computed with so far.

    On a CPU sums depend in the last bits on how many threads share them. On another number of processes they change anyway, and
    there the number of cores a process has counts.

    Args:
        world: the processes.
        stored: ``threads`` and ``world_size`` of an earlier start, the same on all ranks; None: there was none.
    """
    if not stored or stored["world_size"] != world.size or world.device.type != "cpu" or stored["threads"] == world.threads:
        return world
    world.say(
        f"galaxydist: computing with {stored['threads']} threads, as before, so that the numbers stay bit for bit the same "
        f"(train.threads={world.threads} takes as many as there are cores)"
    )
    return _with_threads(world, stored["threads"])


def _with_threads(world: World, threads: int) -> World:
    torch.set_num_threads(threads)
    return replace(world, threads=threads)


def _build_accelerator(precision: Precision, has_gpu: bool, environ: Mapping[str, str], timeout: timedelta | None) -> Accelerator:
    """Accelerate with all that it would otherwise read from the launcher's variables: the recipe decides."""
    try:
        return Accelerator(
            cpu=not has_gpu,
            mixed_precision="no" if precision == "fp64" else precision,
            # The plain argument gradient_accumulation_steps does not beat the variable.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            dynamo_plugin=TorchDynamoPlugin(
                backend="no", mode="default", fullgraph=False, dynamic=False, use_regional_compilation=False
            ),
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=timeout),
            ],
        )
    except (ImportError, NotImplementedError, ValueError) as error:
        given = " ".join(f"{name}={value}" for name, value in sorted(environ.items()) if name.startswith("ACCELERATE_"))
        raise UserError(f"Accelerate does not start: {error} (its settings in the environment: {given or 'none'})") from error


def _raise_told(by_user: str | None, by_chance: str | None) -> None:
    if by_chance is not None:
        raise RunFailedError(by_chance)
    if by_user is not None:
        raise EveryRankError(by_user)


def _share_cores(world: World, environ: Mapping[str, str]) -> int:
    """This process's share of its machine's cores; all tell what they are bound to."""
    host, mine = socket.gethostname(), bound_cores()
    everywhere = world.gather((host, world.rank, mine))
    here = [(rank, cores) for theirs, rank, cores in everywhere if theirs == host]
    is_bound = len(mine) < (os.cpu_count() or 1)
    quota = min(cpu_quota(), math.inf if is_bound else slurm_cores(environ))
    return fair_share([cores for _, cores in here], [rank for rank, _ in here].index(world.rank), quota)


def shutdown_distributed() -> None:
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
