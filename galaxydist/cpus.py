"""CPU cores and memory of a process, settings at its start, and worker processes.

The cores follow from the CPU binding, the container's CPU quota, and the processes that share both.
"""

import atexit
import contextlib
import gc
import io
import math
import os
import re
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future, ProcessPoolExecutor

T = TypeVar("T")


def bound_cores() -> frozenset[int]:
    """Return the cores that this process may run on; all cores where the system does not report a binding."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def cpu_quota(root: Path = Path("/")) -> float:
    """Return the CPU quota of this process's control groups in cores; infinity where there is no limit.

    A container of two CPUs on a node of 64 cores sees all 64, but more than two busy threads are throttled. Any group from the
    process's own up to the root may set the limit. Linux's documentation: cgroup-v2.rst, "cpu.max"; sched-bwc.rst,
    "cpu.cfs_quota_us" (version 1).

    Args:
        root: the root of the file system.
    """
    quota = math.inf
    for controllers, groups in control_groups(root):
        if not controllers:
            mounts, read = [root / "sys/fs/cgroup"], _read_max
        elif "cpu" in controllers:
            mounts, read = [root / "sys/fs/cgroup" / name for name in ("cpu", ",".join(controllers))], _read_cfs
        else:
            continue
        quota = min([quota, *(read(mount / group) for mount in mounts for group in groups)])
    return quota


def total_memory(root: Path = Path("/")) -> int:
    """Return the bytes of memory that this machine has, or fewer if the control groups of this process allow fewer.

    Memory in use counts too. Linux's documentation: cgroup-v2.rst, "memory.max"; version 1: memory.txt,
    "memory.limit_in_bytes".

    Args:
        root: the root of the file system.
    """
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for controllers, groups in control_groups(root):
        if not controllers or "memory" in controllers:
            folder, name = ("", "memory.max") if not controllers else ("memory", "memory.limit_in_bytes")
            for group in groups:
                with contextlib.suppress(OSError, ValueError):  # missing, or "max"
                    found.append(int((root / "sys/fs/cgroup" / folder / group / name).read_text()))
    return min(found)


def control_groups(root: Path = Path("/")) -> list[tuple[tuple[str, ...], tuple[Path, ...]]]:
    """Return the control groups of this process: controller names (none: version 2), and the groups from its own to the root.

    Args:
        root: the root of the file system.
    """
    try:
        text = (root / "proc/self/cgroup").read_text()
    except OSError:
        return []
    found = []
    for _, controllers, path in re.findall(r"^(\d+):([^:]*):(.*)$", text, re.MULTILINE):
        own = Path(path.lstrip("/"))
        found.append((tuple(controllers.split(",")) if controllers else (), (own, *own.parents)))
    return found


def available_cores(sharing: int = 1) -> int:
    """Return the number of cores for this process, at least 1, if ``sharing`` processes (itself included) share them."""
    return fair_share([bound_cores()] * sharing, 0, cpu_quota())


def fair_share(bound: Sequence[Collection[int]], number: int, quota: float) -> int:
    """Return the number of cores for one of the processes of a machine, at least 1.

    Launchers bind each process to its own cores (``srun``) or all processes to all cores (``torchrun``). The processes bound to
    a core share it; all processes share the quota.

    Args:
        bound: the cores that each process may run on.
        number: the index of the process in ``bound``.
        quota: CPU quota of all processes together, in cores.
    """
    shares = sum(1 / sum(core in cores for cores in bound) for core in bound[number])
    # Three floating-point thirds may sum to less than one, so a small value is added before rounding down.
    return max(1, math.floor(min(shares, math.ceil(quota) / len(bound) if math.isfinite(quota) else shares) + 1e-6))


def decoding_threads(cores: int, *, has_gpu: bool) -> int:
    """Return the number of threads that decode images, at least 1.

    With a GPU, two cores are left to the thread that launches its kernels and to what the driver and the copies need: a launch
    that waits for a core is time in which the GPU idles.

    Args:
        cores: of this process alone.
        has_gpu: True if the process computes on a GPU.
    """
    return max(1, cores - 2) if has_gpu else cores


def _read_max(group: Path) -> float:
    """Return the quota of a version 2 group in cores, from ``200000 100000`` or ``max 100000``."""
    try:
        allowed, period = (group / "cpu.max").read_text().split()
        return math.inf if allowed == "max" else int(allowed) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf


def _read_cfs(group: Path) -> float:
    """Return the quota of a version 1 group in cores, from two files; -1 means no limit."""
    try:
        allowed, period = (int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return allowed / period if allowed > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf


def set_up_process(environ: MutableMapping[str, str]) -> None:
    """Set OpenMP's wait policy, the standard streams and the garbage collection at exit; call it before importing torch.

    Idle OpenMP threads sleep: threads that spin take cores from other programs and slow themselves down (five times on a busy
    machine of two cores, not at all on an idle one). A standard stream that the caller has closed becomes the null device: a file
    would get its descriptor, and what libraries print. Characters that the terminal cannot encode are printed with backslashes.
    Python skips the garbage collection at exit, which takes one second once torch is loaded.

    Args:
        environ: the process's environment, which torch reads when it is imported.
    """
    environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = Path(os.devnull).open(mode)  # noqa: SIM115 (stays open until the process ends)
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    atexit.register(gc.freeze)


def start_workers(count: int) -> "ProcessPoolExecutor":
    """Start a pool of worker processes.

    They are spawned because threads do not survive a fork. On Ctrl-C they end their tasks at once and print nothing; they exit
    when the caller is killed.

    Args:
        count: number of processes.
    """
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context, resource_tracker

    class Pool(ProcessPoolExecutor):
        def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> "Future[T]":
            return super().submit(_run_task, fn, *args, **kwargs)

    resource_tracker.ensure_running()  # started later, it would unblock the signal
    pool = Pool(count, mp_context=get_context("spawn"), initializer=_obey_parent)
    # Ctrl-C during a worker's imports would print a traceback: the signal is blocked until ``_obey_parent`` has run.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for _ in range(count):
            pool.submit(int)  # each of the first tasks starts a process
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pool


def bounded_map(pool: "Executor", function: Callable[..., T], tasks: Iterable[tuple[Any, ...]], most_pending: int) -> Iterator[T]:
    """Yield the function's results in order, with bounded memory: ``Executor.map`` would submit all tasks at once.

    Args:
        pool: runs the tasks.
        function, tasks: called with the arguments of each task.
        most_pending: largest number of tasks submitted ahead of the result that is yielded.
    """
    pending: deque[Future[T]] = deque()
    try:
        for task in tasks:
            pending.append(pool.submit(function, *task))
            if len(pending) >= most_pending:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


# State of a worker process: it runs a task; it has received Ctrl-C.
_in_task = _is_interrupted = False


def _run_task(function: Callable[..., T], *arguments: Any, **named: Any) -> T:
    """Run a task, which Ctrl-C ends. It never ends the worker: the pool would wait forever for the rest of a result."""
    global _in_task  # noqa: PLW0603
    if _is_interrupted:
        raise KeyboardInterrupt
    _in_task = True
    try:
        return function(*arguments, **named)
    finally:
        _in_task = False


def _interrupt_task(*_: object) -> None:
    """Handle SIGINT in a worker: end its task, and refuse the tasks that follow."""
    global _is_interrupted  # noqa: PLW0603
    _is_interrupted = True
    if _in_task:
        raise KeyboardInterrupt


def _obey_parent() -> None:
    """Exit when the parent process ends; otherwise a worker would wait forever, or write the same files as the next call."""
    from multiprocessing import parent_process
    from multiprocessing.connection import wait

    signal.signal(signal.SIGINT, _interrupt_task)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    parent = parent_process()
    assert parent is not None

    def leave() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()
