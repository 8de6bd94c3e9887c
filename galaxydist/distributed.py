"""Distributed setup of a process: rank, world size, device, cores, precision and collectives.

torch's flight recorder holds the last collectives of each rank; it is written if a run hangs, and
``torchfrtrace -p flight_rank_ FOLDER`` prints which rank missed which collective.
"""

import contextlib
import logging
import math
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from queue import Empty, Queue
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, rendezvous  # type: ignore[attr-defined]

from galaxydist.cpus import bound_cores, cpu_quota, decoding_threads, fair_share
from galaxydist.devices import Precision, RankDevice, check_devices, find_device, gather_devices, resolve_precision
from galaxydist.errors import EveryRankError, OneRankFailedError, RunFailedError, UserError, first_line, mark_as_known
from galaxydist.job_environment import check_settings, find_rank, job_of, overruled_settings, restart_of, slurm_cores
from galaxydist.log import set_up_logging
from galaxydist.mixed_precision import MixedPrecision
from galaxydist.rank_store import RankStore

logger = logging.getLogger(__name__)

PREFIX = "flight_rank_"
# Number of collectives to keep: the default of torch 2.14.
BUFFER_SIZE = 2000
# Variable names that torch 2.11 and later read: the new name, then older ones.
BUFFER_NAMES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
FILE_NAMES = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
DUMP_NAMES = ("TORCH_NCCL_DUMP_ON_TIMEOUT",)


def flight_recorder_variables(folder: Path | None = None) -> dict[tuple[str, ...], str]:
    """Return the variables of torch's flight recorder: all names of a variable -> value.

    Args:
        folder: folder of the files that torch's watchdog writes when a collective times out (``flight_rank_3``); None: torch's
            default.
    """
    wanted = {BUFFER_NAMES: str(BUFFER_SIZE), DUMP_NAMES: "1"}
    return wanted if folder is None else {**wanted, FILE_NAMES: str(folder.absolute() / PREFIX)}


def set_flight_recorder(environ: MutableMapping[str, str], folder: Path | None = None) -> None:
    """Set the flight recorder variables that the user has not set under any of their names.

    Call it before the process group is created. It may be called again with a folder once the run folder is known: torch reads
    the file name when it first writes a record.
    """
    for names, value in flight_recorder_variables(folder).items():
        if not any(name in environ for name in names):
            environ[names[0]] = value


def write_flight_record(folder: Path, rank: int) -> Path | None:
    """Write the flight record of this process under the file name that torch's watchdog uses.

    Returns:
        The file, or None if nothing was recorded.
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


# Torch's default, for each of two waits; the timeout of collectives, hours, would hide that a rank never started.
MEETING_TIMEOUT = timedelta(minutes=30)
MEETING_WARNING_S = 60.0

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Describes this process among all processes of a run, and runs collectives.

    Args:
        mixed_precision: casts the forward pass and scales the gradients.
        rank, size: rank of this process and world size.
        ranks_on_node: processes on this machine.
        cores: CPU cores for this process alone.
        threads: number of torch's threads, the same in all processes.
        job_id, restart_count: the batch job, if there is one.
        store: messages to the other ranks; None for a single process.
    """

    mixed_precision: MixedPrecision
    rank: int
    size: int
    ranks_on_node: int
    cores: int
    threads: int
    job_id: str | None
    restart_count: int
    store: RankStore | None = None

    @property
    def device(self) -> torch.device:
        return self.mixed_precision.device

    @property
    def decode_threads(self) -> int:
        """Number of threads that decode images."""
        return decoding_threads(self.cores, has_gpu=self.device.type != "cpu")

    @property
    def precision(self) -> Precision:
        """Precision of the forward pass."""
        return self.mixed_precision.precision

    @property
    def dtype(self) -> torch.dtype:
        """Data type of weights and images (mixed precision casts within the forward pass)."""
        return torch.float64 if self.precision == "fp64" else torch.float32

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def run_on_main(self, work: Callable[[], T]) -> T:
        """Run a function on rank 0 and broadcast its result; the other ranks wait on the store, for hours if need be.

        Raises:
            UserError: raised on all ranks if the function raises one.
            RunFailedError: on the other ranks if rank 0 fails with another error, which rank 0 itself raises unchanged.
            PeerFailedError: a rank has failed alone meanwhile.
        """
        return work() if self.size == 1 else run_on_main(work, store=self.store)

    def run_on_all(self, work: Callable[[], T]) -> T:
        """Run a function on all ranks and return this rank's result; a rank that is done waits on the store for the others.

        Raises:
            UserError: raised on all ranks if any rank raises one: the one of the lowest rank.
            RunFailedError: on all ranks if a rank raises ``OneRankFailedError``; on the other ranks if a rank fails with another
                error, which that rank raises unchanged.
            PeerFailedError: a rank has failed outside of this.
        """
        return work() if self.size == 1 else run_on_all(work, store=self.store)

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in rank order; all ranks must call it, and wait for one another on the store."""
        self._wait_for_all()
        return [value] if self.size == 1 else all_gather(value)

    def barrier(self) -> None:
        """Wait on the store until all ranks have called it; only then the collective, so that rank 0 stays with its store."""
        self._wait_for_all()
        if self.size > 1:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks, in place; all ranks must call it, and wait for one another on the store."""
        self._wait_for_all()
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def _wait_for_all(self) -> None:
        if self.store is not None:
            self.store.wait_for_all()


# The collectives of ``World``, also for a process group beside that of the training; all ranks of the group must call them.


def run_on_main(work: Callable[[], T], group: dist.ProcessGroup | None = None, store: RankStore | None = None) -> T:
    """Run a function on rank 0 of a group (None: the default group) and broadcast its result.

    Args:
        work: the function.
        group: process group.
        store: the other ranks wait on it; None: in the broadcast.

    Raises:
        EveryRankError, RunFailedError: as ``World.run_on_main``.
    """
    answer: list[Any] = [None, None]
    failure: Exception | None = None
    if dist.get_rank(group) == 0:
        try:
            answer[0] = work()
        except Exception as error:
            failure, answer[1] = error, _shared_error(error, 0)
    if store is not None:
        store.wait_for_main()
    dist.broadcast_object_list(answer, group=group, group_src=0)
    _raise_shared([answer[1]], failure)
    result: T = answer[0]
    return result


def run_on_all(work: Callable[[], T], group: dist.ProcessGroup | None = None, store: RankStore | None = None) -> T:
    """Run a function on all ranks of a group and return this rank's result.

    Args:
        work, group, store: as for ``run_on_main``.

    Raises:
        EveryRankError, RunFailedError: as ``World.run_on_all``.
    """
    done: list[T] = []
    failure: Exception | None = None
    try:
        done.append(work())
    except Exception as error:
        failure = error
    if store is not None:
        store.wait_for_all()
    _raise_shared(all_gather(failure and _shared_error(failure, dist.get_rank(group)), group), failure)
    return done[0]


def all_gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return the values of all ranks of a group, in rank order."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def _shared_error(error: Exception, rank: int) -> Exception:
    """Return the error that the other ranks raise."""
    if isinstance(error, UserError):
        return EveryRankError(str(error))
    if isinstance(error, OneRankFailedError):
        return RunFailedError(f"rank {rank} failed: {error}")
    return error if type(error) is RunFailedError else RunFailedError(f"rank {rank} failed: {type(error).__name__}: {error}")


def _raise_shared(errors: Sequence[Exception | None], own: Exception | None) -> None:
    """Raise the error of the lowest rank, failures before errors of the user; a rank raises its own error if that is a bug."""
    if own is not None and not isinstance(own, UserError | OneRankFailedError):
        mark_as_known(own)
        raise own
    if found := sorted((error for error in errors if error is not None), key=lambda error: isinstance(error, UserError)):
        raise found[0] from own


def init_distributed(
    precision: Precision | Literal["auto"],
    environ: MutableMapping[str, str],
    *,
    timeout: timedelta | None = None,
    threads: int = 0,
) -> World:
    """Create the process group and return the ``World`` of this process.

    Works under ``python``, ``accelerate launch``, ``torchrun`` and ``srun``.

    Args:
        precision: ``auto``, ``no``, ``bf16``, ``fp16`` or ``fp64``, as in the recipe.
        environ: the process's environment; torch's variables are added to it under ``srun`` and for the flight recorder.
        timeout: timeout of collectives; None: torch's default.
        threads: threads of each process (0: the smallest number of cores of any process).

    Raises:
        UserError: launcher variables that contradict each other or set what only the recipe may set; fp16 without a GPU; ranks
            without a GPU of their own, if others have one.
        OneRankFailedError: the ranks do not meet.
        PeerFailedError: another rank has failed meanwhile.
    """
    launched = find_rank(environ)
    check_settings(environ)
    set_flight_recorder(environ)
    if not environ.get("OMP_NUM_THREADS", "").isdecimal():
        environ["OMP_NUM_THREADS"] = "1"  # for Accelerate, which accepts a plain number only (not "4,2"); torch is already loaded
    own = find_device(launched, environ)
    resolved = _join_group(own, launched.size, precision, timeout, environ)
    store = RankStore.of_group(launched.rank, launched.size) if launched.size > 1 else None
    with _announcing(store):
        mixed_precision = MixedPrecision(resolved, own.device, environ, timeout)
        assert mixed_precision.num_processes == launched.size, f"Accelerate has {mixed_precision.num_processes} processes"
        set_up_logging(launched.rank)
        world = World(
            mixed_precision=mixed_precision,
            rank=launched.rank,
            size=launched.size,
            ranks_on_node=launched.local_size,
            cores=1,
            threads=1,
            job_id=job_of(environ),
            restart_count=restart_of(environ),
            store=store,
        )
        for text in overruled_settings(environ, resolved):
            logger.warning("%s", text)
        world = replace(world, cores=threads or _share_cores(world, environ))
        # Launchers set OMP_NUM_THREADS=1, which would leave the other cores idle.
        return _with_threads(world, min(world.all_gather(world.cores)))


def keep_threads(world: World, stored: Mapping[str, int] | None) -> World:
    """Return the world with the number of threads of the run's earlier starts.

    On a CPU the last bits of a sum depend on the number of threads. With another world size the sums change anyway, and the
    threads follow from the cores.

    Args:
        world: the current processes.
        stored: ``threads`` and ``world_size`` of an earlier start, the same on all ranks; None: there was none.
    """
    if not stored or stored["world_size"] != world.size or world.device.type != "cpu" or stored["threads"] == world.threads:
        return world
    logger.info(
        "computing with %d threads, as before, so that the numbers stay bit for bit the same (train.threads=%d takes as many as "
        "there are cores)",
        stored["threads"],
        world.threads,
    )
    return _with_threads(world, stored["threads"])


def _with_threads(world: World, threads: int) -> World:
    torch.set_num_threads(threads)
    return replace(world, threads=threads)


def _join_group(
    own: RankDevice,
    size: int,
    precision: Precision | Literal["auto"],
    timeout: timedelta | None,
    environ: Mapping[str, str],
) -> Precision:
    """Meet the other ranks, compare devices, and create the process group; return the precision that suits all devices.

    What the ranks refuse they refuse before the group exists: a rank that leaves would break the connections of the others.
    """
    if size == 1:
        check_devices([own])
        return resolve_precision(precision, [own.capability])
    with _explained_meeting(own.rank, size, environ):
        store, devices = _meet(own, size)
    check_devices(devices)
    resolved = resolve_precision(precision, [found.capability for found in devices])
    if timeout is not None:
        store.set_timeout(timeout)
    backend = "gloo" if own.device.type == "cpu" else "nccl"
    # The prefix is the one that torch gives the store when it creates it.
    prefixed = PrefixStore("default_pg", store)
    with _explained_meeting(own.rank, size, environ):
        dist.init_process_group(backend, store=prefixed, rank=own.rank, world_size=size, timeout=timeout)
    return resolved


def _meet(own: RankDevice, size: int) -> tuple[Store, list[RankDevice]]:
    """Return the store of the run and the devices of all ranks.

    This is done in a thread: torch's client waits for ever for an answer if another program has the port, also on Ctrl-C.
    """
    answers: Queue[tuple[Store, list[RankDevice]] | Exception] = Queue()

    def meet() -> None:
        try:
            store, *_ = next(rendezvous("env://", own.rank, size, timeout=MEETING_TIMEOUT))
            answers.put((store, gather_devices(own, store, size)))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=meet, name="meeting", daemon=True).start()
    answer = None
    with contextlib.suppress(Empty):
        answer = answers.get(timeout=MEETING_WARNING_S)
    if answer is None:
        logger.warning("rank %d of %d has waited for the others for %g s; were all started?", own.rank, size, MEETING_WARNING_S)
        try:
            answer = answers.get(timeout=2 * MEETING_TIMEOUT.total_seconds())
        except Empty:
            raise RuntimeError("no answer") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


@contextlib.contextmanager
def _explained_meeting(rank: int, size: int, environ: Mapping[str, str]) -> Iterator[None]:
    """Turn torch's errors of ranks that do not meet into one that says where they should have met, and what to do."""
    try:
        yield
    except RuntimeError as error:
        address = f"MASTER_ADDR={environ['MASTER_ADDR']}, MASTER_PORT={environ['MASTER_PORT']}"
        if "EADDRINUSE" in str(error):
            raise OneRankFailedError(
                f"Rank 0 cannot listen at {address}: another program, perhaps another run, uses this port. End that, or choose "
                "another port (torchrun --master-port, accelerate launch --main_process_port, else the variable MASTER_PORT)."
            ) from error
        raise OneRankFailedError(
            f"Rank {rank} has not met the other processes of the run, {size} in all, at {address}: {first_line(error)}. Check "
            "that all were started and are still running, that their machines reach this address through the firewall, and the "
            "network interface (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)."
        ) from error


def _share_cores(world: World, environ: Mapping[str, str]) -> int:
    """Return this process's share of its machine's cores; all ranks must call it."""
    host, own_cores = socket.gethostname(), bound_cores()
    on_node = {rank: cores for name, rank, cores in world.all_gather((host, world.rank, own_cores)) if name == host}
    is_bound = len(own_cores) < (os.cpu_count() or 1)
    quota = min(cpu_quota(), math.inf if is_bound else slurm_cores(environ))
    return fair_share([*on_node.values()], [*on_node].index(world.rank), quota)


@contextlib.contextmanager
def open_world(
    precision: Precision | Literal["auto"],
    environ: MutableMapping[str, str],
    *,
    timeout: timedelta | None = None,
    threads: int = 0,
) -> Iterator[World]:
    """Yield the ``World`` of ``init_distributed``, and destroy its process group at the end.

    After an error of a run of several processes the group is left as it is, since NCCL's destroy waits for the other ranks. They
    hear of the error if this rank alone raises it.
    """
    world = init_distributed(precision, environ, timeout=timeout, threads=threads)
    with _announcing(world.store):
        yield world
    shutdown_distributed()


@contextlib.contextmanager
def _announcing(store: RankStore | None) -> Iterator[None]:
    """Tell the other ranks of an error that this rank alone raises; raise that of another rank if it is a consequence of it."""
    try:
        yield
    except BaseException as error:
        if store is None:
            shutdown_distributed()
            raise
        reported = store.announce_error(error)
        store.acknowledge()
        store.wait_until_seen()
        if reported is error:
            raise
        raise reported from error


def shutdown_distributed() -> None:
    """Destroy the process group, if there is one. No rank may call it after an error, or the call may never return."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
