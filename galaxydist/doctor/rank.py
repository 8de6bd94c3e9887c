"""Checks by one rank of the doctor's job: its node, then the connections between the ranks."""

import json
import os
import signal
import socket
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from galaxydist.atomic_files import rename, unlink, write_bytes
from galaxydist.cluster.slurm import SlurmUnavailableError, last_message, run_slurm
from galaxydist.cluster.worker import set_torch_environment
from galaxydist.cpus import bound_cores
from galaxydist.devices import find_device
from galaxydist.doctor.check import RankReport, Timing
from galaxydist.doctor.machine import CheckTarget, check_machine, interface_address, machine_id, own_address
from galaxydist.doctor.software import library_versions
from galaxydist.errors import first_line
from galaxydist.job_environment import LauncherRank
from galaxydist.paths import data_root

# Round trips of a clock measurement.
PINGS = 5


@dataclass
class RankChannel:
    """Exchanges JSON values between ranks through the rendezvous store.

    A process group cannot serve here, because the ranks must be able to report that one does not work.

    Args:
        store: the store of all ranks.
        rank, size: rank and world size.
        clock: returns seconds since 1970.
    """

    store: Store
    rank: int
    size: int
    clock: Callable[[], float] = time.time

    def gather(self, name: str, value: Any) -> list[Any]:
        """Return the values of all ranks, in rank order; all ranks must call it, once for each name.

        Raises:
            RuntimeError: a rank did not call it within the store's timeout.
        """
        self.store.set(f"{name}/{self.rank}", json.dumps(value))
        return [json.loads(self.store.get(f"{name}/{rank}")) for rank in range(self.size)]

    def barrier(self, name: str) -> None:
        """Wait for all ranks; each barrier has a name of its own."""
        self.gather(name, None)

    def put(self, name: str, value: Any = None) -> None:
        """Set a key that every rank can read."""
        self.store.set(name, json.dumps(value))

    def get(self, name: str) -> Any:
        """Wait for a key and return its value."""
        return json.loads(self.store.get(name))

    def close(self) -> None:
        """Leave the channel; rank 0, which hosts the store, waits until all ranks have left."""
        self.put(f"closed/{self.rank}")
        if self.rank == 0:
            for rank in range(self.size):
                self.get(f"closed/{rank}")

    def measure_clock(self) -> tuple[float, float]:
        """Return this clock minus rank 0's, and the round trip of the measurement, in seconds.

        The shortest of several round trips is used; the error is at most half of it (F. Cristian, Distributed Computing 3, 1989,
        146-158). Rank 0 answers the ranks one by one.
        """
        if self.rank == 0:
            for rank in range(1, self.size):
                for number in range(PINGS):
                    self.get(f"clock/{rank}/{number}/ping")
                    self.put(f"clock/{rank}/{number}/time", self.clock())
            return 0.0, 0.0
        trips = []
        for number in range(PINGS):
            start, began = self.clock(), time.monotonic()
            self.put(f"clock/{self.rank}/{number}/ping")
            reference = self.get(f"clock/{self.rank}/{number}/time")
            trip = time.monotonic() - began
            trips.append((trip, start + trip / 2 - reference))
        trip, offset = min(trips)
        return offset, trip


# Tests between ranks: all-reduces, shared files, SLURM's signal.

NUM_BYTES = 64_000_000
REPEATS = 5
GROUP_S = 60.0  # of the process group, and of each all-reduce
FILE_S = 90.0  # network file systems cache folder contents for up to a minute
SIGNAL_S = 20.0
POLL_S = 0.02


def time_all_reduce(channel: RankChannel, backend: str, device: torch.device) -> Timing:
    """Create a process group and time all-reduces of a float32 tensor; all ranks must call it.

    Args:
        channel: between the ranks.
        backend: ``gloo`` or ``nccl``.
        device: device of the tensor.
    """
    try:
        store = PrefixStore(backend, channel.store)
        timeout = timedelta(seconds=GROUP_S)
        dist.init_process_group(backend, store=store, rank=channel.rank, world_size=channel.size, timeout=timeout)
        try:
            timing = _time_group(channel, device)
        except RuntimeError:
            if backend == "gloo":  # NCCL's destroy would wait for the other ranks
                dist.destroy_process_group()
            raise
        dist.destroy_process_group()
        return timing
    except RuntimeError as error:
        return Timing(error=first_line(error))


def _time_group(channel: RankChannel, device: torch.device) -> Timing:
    tensor = torch.ones(NUM_BYTES // 4, device=device)
    seconds = []
    for number in range(REPEATS + 1):
        tensor.fill_(1.0)
        dist.barrier(device_ids=[device.index or 0] if device.type == "cuda" else None)
        start = time.perf_counter()
        dist.all_reduce(tensor)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        slowest = torch.tensor(time.perf_counter() - start, dtype=torch.float64, device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        if number:  # the first all-reduce also opens the connections
            seconds.append(float(slowest))
    if not bool((tensor == channel.size).all()):
        return Timing(error="the sum over the ranks is wrong")
    return Timing(NUM_BYTES, statistics.median(seconds))


def time_shared_files(channel: RankChannel, folder: Path, *, limit_s: float = FILE_S) -> tuple[float | None, float | None]:
    """Write a file on rank 0, replace it on the last rank, and time when this rank sees both; all ranks must call it.

    Args:
        channel: between the ranks.
        folder: a shared folder.
        limit_s: seconds that a rank waits for each of the contents.

    Returns:
        Seconds until the file was seen, and seconds until the new contents were seen (None: never).
    """
    path = folder / "seen-by-all"
    if channel.rank == 0:
        write_bytes(path, b"old")
        channel.put("shared/written")
    channel.get("shared/written")
    seen_s = _time_until(path, b"old", limit_s)
    channel.barrier("shared/seen")
    if channel.rank == channel.size - 1:
        with suppress(OSError):
            temporary = path.with_name("seen-by-all.tmp")
            write_bytes(temporary, b"new")
            rename(temporary, path)
        channel.put("shared/replaced")
    channel.get("shared/replaced")
    renamed_s = _time_until(path, b"new", limit_s)
    channel.barrier("shared/done")
    if channel.rank == 0:
        unlink(path)
    return seen_s, renamed_s


def _time_until(path: Path, content: bytes, limit_s: float) -> float | None:
    """Return the seconds until a file has the content; None if it does not within the limit."""
    start = time.monotonic()
    while (passed := time.monotonic() - start) <= limit_s:
        with suppress(OSError):
            if path.read_bytes() == content:
                return passed
        time.sleep(POLL_S)
    return None


@contextmanager
def watch_signal() -> Iterator[list[float]]:
    """Replace the handler of SIGUSR2 by one that appends the time of each arrival to a list."""
    arrivals: list[float] = []
    old = signal.signal(signal.SIGUSR2, lambda _number, _frame: arrivals.append(time.monotonic()))
    try:
        yield arrivals
    finally:
        signal.signal(signal.SIGUSR2, old)


def time_signal(
    channel: RankChannel, arrivals: list[float], environ: Mapping[str, str], *, limit_s: float = SIGNAL_S
) -> tuple[float | None, str | None]:
    """Make SLURM send SIGUSR2 to the job step, as before the time limit, and wait for it; all ranks must call it.

    Args:
        channel: between the ranks.
        arrivals: times of the signal, from ``watch_signal``, which is active on all ranks.
        environ: has SLURM_JOB_ID and SLURM_STEP_ID.
        limit_s: seconds that a rank waits for the signal.

    Returns:
        Seconds until the signal arrived (None: never), and the reason if it was not sent.
    """
    if "SLURM_STEP_ID" not in environ:
        return None, "no SLURM"
    arrivals.clear()  # ignore earlier signals, such as the one before the time limit
    channel.barrier("signal/ready")
    start = time.monotonic()
    if channel.rank == 0:
        channel.put("signal/error", _send_signal(f"{environ['SLURM_JOB_ID']}.{environ['SLURM_STEP_ID']}"))
    error: str | None = channel.get("signal/error")
    while error is None and not arrivals and time.monotonic() - start < limit_s:
        time.sleep(POLL_S)
    channel.barrier("signal/done")
    return (max(arrivals[0] - start, 0.0) if arrivals else None), error


def _send_signal(step: str) -> str | None:
    """Send SIGUSR2 with scancel and return its error message, if any.

    scancel belongs to the step too, so it ignores the signal.
    """
    try:
        done = run_slurm(["sh", "-c", 'trap "" USR2; exec scancel --signal=USR2 "$1"', "sh", step])
    except SlurmUnavailableError as error:
        return str(error)
    return None if done.returncode == 0 else last_message(done)


# The ranks start at the same time, but torch may take a minute to load from a network file system.
MEETING_S = 150.0
# Limit of one part; longer than the longest limit inside a part.
PART_S = 180.0


@dataclass(frozen=True)
class Examination:
    """Settings of the checks, passed to all ranks.

    Args:
        folder: folder of the reports, visible on all nodes.
        data_dir: the data root, if given.
        scratch: scratch folder of the profile, may contain environment variables of the ranks.
        gpus_per_node: GPUs of the job per node.
        meeting_s: seconds that a rank waits for the others.
    """

    folder: Path
    data_dir: Path | None
    scratch: Path | None
    gpus_per_node: int
    meeting_s: float = MEETING_S


def examine_task(examination: Examination) -> None:
    """Run the checks on one rank; submitit calls this on every rank."""
    set_torch_environment(os.environ)
    examine(examination, os.environ)


def examine(examination: Examination, environ: Mapping[str, str]) -> RankReport:
    """Check the node, then the connections between the ranks; the report is written after each part.

    Args:
        examination: the settings.
        environ: the environment with torch's variables (RANK, WORLD_SIZE, MASTER_ADDR, ...).

    Raises:
        RuntimeError: another rank does not answer. The report has the part in which this rank failed.
    """
    host = environ.get("SLURMD_NODENAME") or socket.gethostname()
    report = RankReport(int(environ["RANK"]), int(environ["WORLD_SIZE"]), host, machine_id())
    folder = examination.folder
    try:
        with watch_signal() as arrivals:
            report.write(folder, "node")
            device = _check_node(report, examination, environ)
            report.write(folder, "rendezvous")
            channel = _join(report, environ, examination.meeting_s)
            report.write(folder, "clocks")
            report.clock_s, report.round_trip_s = channel.measure_clock()
            report.write(folder, "shared files")
            report.seen_s, report.renamed_s = time_shared_files(channel, folder)
            report.write(folder, "signal")
            report.signal_s, report.signal_error = time_signal(channel, arrivals, environ)
            _time_backends(report, channel, folder, device)
            channel.close()
            report.write(folder, "done")
    except Exception as error:
        report.error = f"{type(error).__name__}: {first_line(error)}"
        report.write(folder, report.part)
        traceback.print_exc()
        raise
    return report


def _check_node(report: RankReport, examination: Examination, environ: Mapping[str, str]) -> torch.device:
    """Check this rank's machine; return the device that a training would use."""
    report.versions = library_versions()
    report.cores = len(bound_cores())
    cpus = environ.get("SLURM_CPUS_PER_TASK")
    report.cpus_per_task = int(cpus) if cpus else None
    report.visible_gpus = environ.get("CUDA_VISIBLE_DEVICES")
    report.slurm_gpus = environ.get("SLURM_STEP_GPUS") or environ.get("SLURM_JOB_GPUS")
    found = find_device(LauncherRank(report.rank, report.world_size, local_rank=int(environ["LOCAL_RANK"])), environ)
    report.num_gpus, report.gpu, report.gpu_problem = found.num_visible, found.gpu, found.problem
    target = CheckTarget(
        data_root=data_root(examination.data_dir, environ),
        runs=examination.folder,
        scratch=examination.scratch,
        gpus=min(examination.gpus_per_node, 1),
    )
    report.checks = check_machine(target, environ)
    report.interface = environ.get("GLOO_SOCKET_IFNAME")
    report.address = interface_address(report.interface) if report.interface else own_address(socket.gethostname())
    report.store = f"{environ['MASTER_ADDR']}:{environ['MASTER_PORT']}"
    return found.device


def _join(report: RankReport, environ: Mapping[str, str], meeting_s: float) -> RankChannel:
    """Join the rendezvous; raise RuntimeError if rank 0 cannot be reached or its port is in use."""
    start = time.monotonic()
    host, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    store = TCPStore(
        host,
        port,
        report.world_size,
        is_master=report.rank == 0,
        timeout=timedelta(seconds=meeting_s),
        wait_for_workers=False,
    )
    channel = RankChannel(store, report.rank, report.world_size)
    channel.barrier("rendezvous")
    store.set_timeout(timedelta(seconds=PART_S))
    report.meeting_s = time.monotonic() - start
    return channel


def _time_backends(report: RankReport, channel: RankChannel, folder: Path, device: torch.device) -> None:
    """Time all-reduces with gloo, and with NCCL if every rank has a GPU."""
    report.write(folder, "all-reduce, gloo")
    report.timings["gloo"] = time_all_reduce(channel, "gloo", torch.device("cpu"))
    if all(channel.gather("has a GPU", report.gpu is not None and dist.is_nccl_available())):
        report.write(folder, "all-reduce, nccl")
        report.timings["nccl"] = time_all_reduce(channel, "nccl", device)
