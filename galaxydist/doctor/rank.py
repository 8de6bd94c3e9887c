"""Examination by one rank of the doctor's job: its node, then the connections between the ranks."""

import json
import os
import secrets
import signal
import socket
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from galaxydist.atomic_files import rename, unlink, write_bytes
from galaxydist.cluster.worker import set_torch_environment
from galaxydist.cpus import bound_cores
from galaxydist.doctor.check import RankReport, Timing
from galaxydist.doctor.machine import CheckTarget, check_machine
from galaxydist.doctor.network import interface_address, machine_id, own_address
from galaxydist.doctor.software import library_versions
from galaxydist.errors import first_line
from galaxydist.paths import data_root

# Ranks exchange results through the rendezvous store only, so that they can report a broken backend.

PINGS = 5


class RankChannel:
    """Exchanges JSON values between ranks through the rendezvous store.

    Args:
        store: the store of all ranks.
        rank, size: rank and world size.
        clock: returns seconds since 1970.
    """

    def __init__(self, store: Store, rank: int, size: int, clock: Callable[[], float] = time.time) -> None:
        self.store = store
        self.rank = rank
        self.size = size
        self._clock = clock

    def set_timeout(self, seconds: float) -> None:
        """Set how long later calls wait for another rank."""
        self.store.set_timeout(timedelta(seconds=seconds))

    def gather(self, name: str, value: Any) -> list[Any]:
        """Return the values of all ranks, in rank order; all ranks must call it, once for each name.

        Raises:
            RuntimeError: a rank did not call it within the store's timeout.
        """
        self.store.set(f"{name}/{self.rank}", json.dumps(value))
        return [json.loads(self.store.get(f"{name}/{rank}")) for rank in range(self.size)]

    def meet(self, name: str) -> None:
        """Wait for all ranks."""
        self.gather(name, None)

    def tell(self, name: str, value: Any = None) -> None:
        """Set a key that every rank can read."""
        self.store.set(name, json.dumps(value))

    def hear(self, name: str) -> Any:
        """Wait for a key and return its value."""
        return json.loads(self.store.get(name))

    def leave(self) -> None:
        """Leave the channel: rank 0, which hosts the store, waits until all ranks have left."""
        self.tell(f"left/{self.rank}")
        if self.rank == 0:
            for rank in range(self.size):
                self.hear(f"left/{rank}")

    def measure_clock(self) -> tuple[float, float]:
        """Return this clock minus rank 0's, and the round trip of the measurement, in seconds.

        The shortest of several round trips is used; the error is at most half of it (F. Cristian, Distributed Computing 3, 1989,
        146-158). Rank 0 answers the ranks one by one.
        """
        if self.rank == 0:
            for rank in range(1, self.size):
                for number in range(PINGS):
                    self.hear(f"clock/{rank}/{number}/ask")
                    self.tell(f"clock/{rank}/{number}/answer", self._clock())
            return 0.0, 0.0
        trips = []
        for number in range(PINGS):
            start, began = self._clock(), time.monotonic()
            self.tell(f"clock/{self.rank}/{number}/ask")
            theirs = self.hear(f"clock/{self.rank}/{number}/answer")
            trip = time.monotonic() - began
            trips.append((trip, start + trip / 2 - theirs))
        trip, offset = min(trips)
        return offset, trip


def open_link(host: str, port: int, rank: int, size: int, timeout_s: float) -> RankChannel:
    """Join the rendezvous.

    Args:
        host, port: address of rank 0.
        rank, size: rank and world size.
        timeout_s: seconds to wait for rank 0, and later for any other rank.

    Raises:
        RuntimeError: rank 0 cannot be reached, or the port is in use.
    """
    store = TCPStore(host, port, size, rank == 0, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)
    return RankChannel(store, rank, size)


# Tests between ranks: all-reduces, shared files, SLURM's signal.

NUM_BYTES = 64_000_000
REPEATS = 5
FILE_BYTES = 1 << 16
SEEING_S = 90.0  # network file systems cache folder contents for up to a minute
SIGNAL_S = 20.0
SCANCEL_S = 15.0
LOOK_S = 0.02


def time_all_reduce(
    link: RankChannel, backend: str, device: torch.device, *, timeout_s: float, num_bytes: int = NUM_BYTES
) -> Timing:
    """Create a process group and time all-reduces of a float32 tensor; all ranks must call it.

    Args:
        link: channel between the ranks.
        backend: ``gloo`` or ``nccl``.
        device: device of the tensor.
        timeout_s: timeout of the process group and of each all-reduce, in seconds.
        num_bytes: size of the tensor.
    """
    try:
        store = PrefixStore(backend, link.store)
        timeout = timedelta(seconds=timeout_s)
        dist.init_process_group(backend, store=store, rank=link.rank, world_size=link.size, timeout=timeout)
        try:
            return _time_group(link, device, num_bytes)
        finally:
            dist.destroy_process_group()
    except RuntimeError as error:
        return Timing(error=first_line(error))


def _time_group(link: RankChannel, device: torch.device, num_bytes: int) -> Timing:
    tensor = torch.ones(num_bytes // 4, device=device)
    seconds = []
    for number in range(REPEATS + 1):
        tensor.fill_(1.0)
        dist.barrier(device_ids=[device.index or 0] if device.type == "cuda" else None)
        start = time.perf_counter()
        dist.all_reduce(tensor)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        mine = torch.tensor(time.perf_counter() - start, dtype=torch.float64, device=device)
        dist.all_reduce(mine, dist.ReduceOp.MAX)
        if number:  # the first all-reduce also opens the connections
            seconds.append(float(mine))
    if not bool((tensor == link.size).all()):
        return Timing(error="the sum over the ranks is wrong")
    return Timing(num_bytes, statistics.median(seconds))


def look_at_shared_files(link: RankChannel, folder: Path, *, limit_s: float = SEEING_S) -> tuple[float | None, float | None, int]:
    """Write a file on rank 0, replace it on the last rank, and time when this rank sees both; all ranks must call it.

    Args:
        link: channel between the ranks.
        folder: a shared folder.
        limit_s: seconds that a rank waits for each of the contents.

    Returns:
        Seconds until the file was seen, seconds until the new contents were seen (None: never), and the number of reads that
        returned neither the old nor the new contents.
    """
    path = folder / "seen-by-all"
    if link.rank == 0:
        old = secrets.token_bytes(FILE_BYTES)
        write_bytes(path, old)
        link.tell("shared/old", old.hex())
    old = bytes.fromhex(link.hear("shared/old"))
    seen, _ = _wait_for(path, old, None, limit_s)
    link.meet("shared/first")
    if link.rank == link.size - 1:
        new = secrets.token_bytes(FILE_BYTES)
        temporary = path.with_name("seen-by-all.tmp")
        try:
            write_bytes(temporary, new)
            link.tell("shared/new", new.hex())
            rename(temporary, path)
        except OSError:
            link.tell("shared/new", new.hex())
    new = bytes.fromhex(link.hear("shared/new"))
    renamed, torn = _wait_for(path, new, old, limit_s)
    link.meet("shared/second")
    if link.rank == 0:
        unlink(path)
    return seen, renamed, torn


def _wait_for(path: Path, wanted: bytes, before: bytes | None, limit_s: float) -> tuple[float | None, int]:
    """Return the seconds until a file has the wanted contents, and the number of reads that gave neither these nor ``before``."""
    start, strange = time.monotonic(), 0
    while (passed := time.monotonic() - start) <= limit_s:
        try:
            found: bytes | None = path.read_bytes()
        except OSError:
            found = None
        if found == wanted:
            return passed, strange
        strange += before is not None and found != before
        time.sleep(LOOK_S)
    return None, strange


class SignalWatch:
    """Records the arrival time of SIGUSR2."""

    def __init__(self) -> None:
        self.arrived: float | None = None

    def note(self, _number: int, _frame: FrameType | None) -> None:
        if self.arrived is None:
            self.arrived = time.monotonic()


@contextmanager
def watch_signal() -> Iterator[SignalWatch]:
    """Replace the handler of SIGUSR2 by one that records its arrival."""
    watch = SignalWatch()
    old = signal.signal(signal.SIGUSR2, watch.note)
    try:
        yield watch
    finally:
        signal.signal(signal.SIGUSR2, old)


def look_for_signal(
    link: RankChannel, watch: SignalWatch, environ: Mapping[str, str], *, limit_s: float = SIGNAL_S
) -> tuple[float | None, str | None]:
    """Make SLURM send SIGUSR2 to the job step, as before the time limit, and wait for it; all ranks must call it.

    Args:
        link: channel between the ranks.
        watch: records the signal; active on all ranks.
        environ: has SLURM_JOB_ID and SLURM_STEP_ID.
        limit_s: seconds that a rank waits for the signal.

    Returns:
        Seconds until the signal arrived (None: never), and the reason if it was not sent.
    """
    if "SLURM_STEP_ID" not in environ:
        return None, "no SLURM"
    watch.arrived = None  # ignore earlier signals, such as the one before the time limit
    link.meet("signal/ready")
    start = time.monotonic()
    if link.rank == 0:
        link.tell("signal/error", _send_signal(f"{environ['SLURM_JOB_ID']}.{environ['SLURM_STEP_ID']}"))
    error: str | None = link.hear("signal/error")
    while error is None and watch.arrived is None and time.monotonic() - start < limit_s:
        time.sleep(LOOK_S)
    link.meet("signal/over")
    return (None if watch.arrived is None else max(watch.arrived - start, 0.0)), error


def _send_signal(step: str) -> str | None:
    """Send SIGUSR2 with scancel and return its error message, if any.

    scancel belongs to the step too, so it ignores the signal.
    """
    command = ["sh", "-c", 'trap "" USR2; exec scancel --signal=USR2 "$1"', "sh", step]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=SCANCEL_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None if answer.returncode == 0 else (answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"])[-1]


# The ranks start at the same time, but torch may take a minute to load from a network file system.
MEETING_S = 150.0
# Limit of one part; longer than the longest limit inside a part.
PART_S = 180.0
GROUP_S = 60.0


@dataclass(frozen=True)
class Examination:
    """Settings of the examination, passed to all ranks.

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
    """Run the examination on one rank; submitit calls it on every rank."""
    environ = os.environ
    set_torch_environment(environ)
    examine(examination, environ)


def examine(examination: Examination, environ: Mapping[str, str]) -> RankReport:
    """Check the node, then test the connections between the ranks; the report is written after each part.

    Args:
        examination: the settings.
        environ: the environment with torch's variables (RANK, WORLD_SIZE, MASTER_ADDR, ...).

    Raises:
        RuntimeError: another rank does not answer. The report has the part in which this rank failed.
    """
    rank = int(environ["RANK"])
    host = environ.get("SLURMD_NODENAME") or socket.gethostname()
    report = RankReport(rank, int(environ["WORLD_SIZE"]), host, machine_id())
    folder = examination.folder
    try:
        with watch_signal() as watch:
            report.write(folder, "node")
            _look_at_node(report, examination, environ)
            report.write(folder, "rendezvous")
            link = _join(report, environ, examination.meeting_s)
            report.write(folder, "clocks")
            report.clock_s, report.round_trip_s = link.measure_clock()
            report.write(folder, "shared files")
            report.seen_s, report.renamed_s, report.torn = look_at_shared_files(link, folder)
            report.write(folder, "signal")
            report.signal_s, report.signal_error = look_for_signal(link, watch, environ)
            _time_backends(report, link, folder, int(environ["LOCAL_RANK"]))
            link.leave()
            report.write(folder, "done")
    except Exception as error:
        report.error = f"{type(error).__name__}: {first_line(error)}"
        report.write(folder, report.part)
        traceback.print_exc()
        raise
    return report


def _look_at_node(report: RankReport, examination: Examination, environ: Mapping[str, str]) -> None:
    local_rank, ranks = int(environ["LOCAL_RANK"]), int(environ["LOCAL_WORLD_SIZE"])
    report.versions = library_versions()
    report.cores = len(bound_cores())
    given = environ.get("SLURM_CPUS_PER_TASK")
    report.cpus_per_task = int(given) if given else None
    report.visible_gpus = environ.get("CUDA_VISIBLE_DEVICES")
    report.slurm_gpus = environ.get("SLURM_STEP_GPUS") or environ.get("SLURM_JOB_GPUS")
    report.num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices: tuple[str, ...] = ()
    if report.num_gpus:
        number = local_rank % report.num_gpus
        devices = (f"cuda:{number}",)
        report.gpu = str(torch.cuda.get_device_properties(number).uuid)
    place = CheckTarget(
        data_root=data_root(examination.data_dir, environ),
        runs=examination.folder,
        scratch=examination.scratch,
        gpus=min(examination.gpus_per_node, 1),
        ranks=ranks,
        devices=devices,
    )
    report.checks = check_machine(place, environ)
    report.interface = environ.get("GLOO_SOCKET_IFNAME")
    report.address = interface_address(report.interface) if report.interface else own_address(socket.gethostname())
    report.store = f"{environ['MASTER_ADDR']}:{environ['MASTER_PORT']}"


def _join(report: RankReport, environ: Mapping[str, str], meeting_s: float) -> RankChannel:
    start = time.monotonic()
    host, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    link = open_link(host, port, report.rank, report.world_size, meeting_s)
    link.meet("rendezvous")
    link.set_timeout(PART_S)
    report.meeting_s = time.monotonic() - start
    return link


def _time_backends(report: RankReport, link: RankChannel, folder: Path, local_rank: int) -> None:
    """Time all-reduces with gloo, and with NCCL if every rank has a GPU."""
    report.write(folder, "all-reduce, gloo")
    report.timings["gloo"] = time_all_reduce(link, "gloo", torch.device("cpu"), timeout_s=GROUP_S)
    can_nccl = report.num_gpus > 0 and dist.is_nccl_available()
    if all(link.gather("has a GPU", can_nccl)):
        report.write(folder, "all-reduce, nccl")
        device = torch.device("cuda", local_rank % report.num_gpus)
        torch.cuda.set_device(device)
        report.timings["nccl"] = time_all_reduce(link, "nccl", device, timeout_s=GROUP_S)
