"""What the ranks do together: all-reduces, files that one writes and the others see, a signal from SLURM."""

import secrets
import signal
import statistics
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from galaxydist.atomic_files import rename, unlink, write_bytes
from galaxydist.cluster.doctor.link import Link
from galaxydist.cluster.doctor.report import Timing

NUM_BYTES = 64_000_000
REPEATS = 5
FILE_BYTES = 1 << 16
SEEING_S = 90.0  # network file systems keep what they know of a folder for up to a minute
SIGNAL_S = 20.0
SCANCEL_S = 15.0
LOOK_S = 0.02


def time_all_reduce(link: Link, backend: str, device: torch.device, *, timeout_s: float, num_bytes: int = NUM_BYTES) -> Timing:
    """Make a process group and add float32 tensors up.

    Args:
        link: of the ranks; all take part.
        backend: ``gloo`` or ``nccl``.
        device: of the tensors.
        timeout_s: for the group and for each all-reduce.
        num_bytes: of the tensor.
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
        return Timing(error=str(error).strip().splitlines()[0])


def _time_group(link: Link, device: torch.device, num_bytes: int) -> Timing:
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
        if number:  # the first one connects
            seconds.append(float(mine))
    if not bool((tensor == link.size).all()):
        return Timing(error="the sum over the ranks is wrong")
    return Timing(num_bytes, statistics.median(seconds))


def look_at_shared_files(link: Link, folder: Path, *, limit_s: float = SEEING_S) -> tuple[float | None, float | None, int]:
    """A file that rank 0 writes, then replaces by rename from the last rank, as every rank sees it.

    Args:
        link: of the ranks; all take part.
        folder: that they share.
        limit_s: how long a rank looks.

    Returns:
        Seconds until it was seen, seconds until the new contents were seen (None: never), and how often anything but the old or
        the new contents was read meanwhile.
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
    """Seconds until the file has the wanted contents, and how often it had neither these nor those from before."""
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
    """Notes when SIGUSR2 arrives, instead of what it would do."""

    def __init__(self) -> None:
        self.arrived: float | None = None

    def note(self, _number: int, _frame: FrameType | None) -> None:
        if self.arrived is None:
            self.arrived = time.monotonic()


@contextmanager
def watch_signal() -> Iterator[SignalWatch]:
    """While it lasts, SIGUSR2 is noted."""
    watch = SignalWatch()
    old = signal.signal(signal.SIGUSR2, watch.note)
    try:
        yield watch
    finally:
        signal.signal(signal.SIGUSR2, old)


def look_for_signal(
    link: Link, watch: SignalWatch, environ: Mapping[str, str], *, limit_s: float = SIGNAL_S
) -> tuple[float | None, str | None]:
    """Ask SLURM for the signal that it sends before a preemption or the time limit, and see when it comes.

    Args:
        link: of the ranks; all take part.
        watch: notes the signal; begun by all ranks before.
        environ: SLURM_JOB_ID and SLURM_STEP_ID.
        limit_s: how long a rank waits for it.

    Returns:
        Seconds until it came (None: not), and why it was not sent.
    """
    if "SLURM_STEP_ID" not in environ:
        return None, "no SLURM"
    watch.arrived = None  # one that came before, such as the time limit's, is no answer
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
    """Words of scancel where it fails. It is a process of the step itself, so it must not die of the signal."""
    command = ["sh", "-c", 'trap "" USR2; exec scancel --signal=USR2 "$1"', "sh", step]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=SCANCEL_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None if answer.returncode == 0 else (answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"])[-1]
