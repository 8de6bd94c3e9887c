"""The number of processor cores that a process may use, from its binding, its container's CPU quota and who shares both; and
what each of our processes sets at its start."""

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
from collections.abc import Collection, MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from concurrent.futures import ProcessPoolExecutor


def bound_cores() -> frozenset[int]:
    """The cores that this process may run on; where the system does not tell, all of them."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def cpu_quota(root: Path = Path("/")) -> float:
    """CPU time a second that the control groups of this process allow it, in cores; infinity where there is no limit.

    A container of two CPUs on a node of 64 cores sees all 64, but more than two busy threads are stopped for part of the time.
    The limit may stand at any group from the process's own up to the root. Linux's documentation: cgroup-v2.rst, "cpu.max";
    sched-bwc.rst, "cpu.cfs_quota_us" (version 1).

    Args:
        root: of the file system.
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
    """Bytes of memory that this machine has, or that the control groups of this process allow it, whatever is in use.

    Linux's documentation: cgroup-v2.rst, "memory.max"; version 1: memory.txt, "memory.limit_in_bytes".

    Args:
        root: of the file system.
    """
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for controllers, groups in control_groups(root):
        if not controllers or "memory" in controllers:
            folder, name = ("", "memory.max") if not controllers else ("memory", "memory.limit_in_bytes")
            for group in groups:
                with contextlib.suppress(OSError, ValueError):  # not there, or "max"
                    found.append(int((root / "sys/fs/cgroup" / folder / group / name).read_text()))
    return min(found)


def control_groups(root: Path = Path("/")) -> list[tuple[tuple[str, ...], tuple[Path, ...]]]:
    """The control groups of this process: names of the controllers (none: version 2), and the groups from its own up to the root.

    Args:
        root: of the file system.
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
    """Cores that this process may use for itself, at least 1, where it shares them with so many processes (itself counted)."""
    return fair_share([bound_cores()] * sharing, 0, cpu_quota())


def fair_share(bound: Sequence[Collection[int]], number: int, quota: float) -> int:
    """Cores for one of the processes of a machine, at least 1.

    Launchers bind processes to cores of their own (``srun``) or leave all of them on all cores (``torchrun``): each core is
    shared by those that are bound to it, the quota by all.

    Args:
        bound: the cores that each of the processes may run on.
        number: which of them.
        quota: of all of them together, in cores.
    """
    shares = sum(1 / sum(core in theirs for theirs in bound) for core in bound[number])
    # Thirds do not add up to one: a hair more before rounding down.
    return max(1, math.floor(min(shares, math.ceil(quota) / len(bound) if math.isfinite(quota) else shares) + 1e-6))


def _read_max(group: Path) -> float:
    """Version 2: "200000 100000", or "max 100000"."""
    try:
        allowed, period = (group / "cpu.max").read_text().split()
        return math.inf if allowed == "max" else int(allowed) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf


def _read_cfs(group: Path) -> float:
    """Version 1: two files; -1 is no limit."""
    try:
        allowed, period = (int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return allowed / period if allowed > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf


def set_up_process(environ: MutableMapping[str, str]) -> None:
    """Make three settings of a process of ours; to be called before torch is imported.

    Idle OpenMP threads sleep: those that spin while they wait take the cores from whatever else runs on the machine, and are then
    slower themselves: five times on a busy machine of two cores, none on an idle one. Text that the terminal's encoding lacks is
    printed with backslashes, instead of failing. At its end Python does not search for garbage once more, which takes a second of
    a core where torch is loaded.

    Args:
        environ: the process's environment, which torch reads when it is imported.
    """
    environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    atexit.register(gc.freeze)


def start_workers(count: int) -> "ProcessPoolExecutor":
    """Start processes for work on several cores.

    They are spawned: a fork would copy the caller's threads, which do not survive it. They end at once, and print nothing, on
    Ctrl-C and when the caller is killed.

    Args:
        count: of processes.
    """
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context, resource_tracker

    resource_tracker.ensure_running()  # its own start would let signals through
    pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_obey_parent)
    # A process that Ctrl-C reaches while it imports prints a traceback. The signal waits until ``_obey_parent`` has run.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for _ in range(count):
            pool.submit(int)  # a process starts with each of the first tasks
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pool


def _obey_parent() -> None:
    """End with the caller: else a worker would wait for tasks for ever, or write the same files as the next call."""
    from multiprocessing import parent_process
    from multiprocessing.connection import wait

    signal.signal(signal.SIGINT, lambda *_: os._exit(1))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    parent = parent_process()
    assert parent is not None

    def leave() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()
