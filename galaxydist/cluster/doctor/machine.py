"""Cores, threads and memory of this process."""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

import psutil

from galaxydist.cluster.doctor.check import Check, ok, warning
from galaxydist.cpus import control_groups

# Below it, a run of the smallest recipes with its readers is killed or swaps.
LEAST_MEMORY = 4e9
# NCCL passes pieces of some MB between the GPUs of a node through it; a container's default is 64 MB.
LEAST_SHARED = 0.5e9
THREAD_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# They bind the threads of every process of a node to the same first cores.
BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
HARMLESS_BINDING = {"", "false", "none", "disabled"}
# "max" in version 1 is the largest number of pages.
NO_LIMIT = 1 << 60


def check_cores(bound: int, quota: float, on_machine: int) -> Check:
    """Cores that this process may use.

    Args:
        bound: that it may run on.
        quota: that its container allows, in cores; infinity: all.
        on_machine: that there are.
    """
    allowed = f", of which its container allows {quota:g} at a time" if math.isfinite(quota) else ""
    text = f"{bound} of the machine's {on_machine}{allowed}"
    usable = min(bound, quota)
    if math.isfinite(quota) and quota < bound:
        return warning("cores", text, "give the container as many CPUs as it sees (docker run --cpus, cluster.cpus_per_task)")
    if usable < 2:
        return warning("cores", text, "decoding and training share one core: ask for more (cluster.cpus_per_task)")
    return ok("cores", text)


def check_threads(environ: Mapping[str, str], cores: int) -> Check:
    """Variables that decide how many threads libraries start, and where they run.

    Args:
        environ: the environment.
        cores: that the process may use.
    """
    counts = {name: environ[name] for name in THREAD_COUNTS if name in environ}
    told = ", ".join(f"{name}={value}" for name, value in counts.items()) or "no variable limits them (the trainer counts cores)"
    wrong = [name for name, value in counts.items() if not re.fullmatch(r"\s*\d+(\s*,\s*\d+)*\s*", value)]
    if wrong:
        return warning("threads", f"{told}: not a number", f"unset {' '.join(wrong)}")
    many = [name for name, value in counts.items() if int(value.split(",")[0]) > cores]
    if many:
        return warning("threads", f"{told}, but {cores} cores may be used", f"unset {' '.join(many)}")
    bound = [name for name in BINDING if environ.get(name, "").lower() not in HARMLESS_BINDING]
    if bound:
        text = ", ".join(f"{name}={environ[name]}" for name in bound)
        return warning("threads", f"{text}: all processes of a node may crowd onto the same cores", f"unset {' '.join(bound)}")
    if environ.get("OMP_WAIT_POLICY", "").upper() == "ACTIVE":
        text = "OMP_WAIT_POLICY=ACTIVE: threads that wait take the cores from those that decode"
        return warning("threads", text, "unset OMP_WAIT_POLICY")
    return ok("threads", told)


def check_memory(available: float, limit: float, ranks: int = 1) -> Check:
    """Memory of the machine that is free, and what the container or the job allows.

    Args:
        available: bytes free.
        limit: bytes that the control groups of this process still allow; infinity: all.
        ranks: processes that share them.
    """
    allowed = f", of which the container or the job allows {limit / 1e9:.1f} GB" if math.isfinite(limit) else ""
    text = f"{available / 1e9:.1f} GB free{allowed}"
    if min(available, limit) / ranks < LEAST_MEMORY:
        shared = f" for {ranks} processes" if ranks > 1 else ""
        remedy = f"a run takes some {LEAST_MEMORY / 1e9:g} GB a process: ask for more (cluster.memory), end what uses it"
        return warning("memory", f"{text}{shared}", remedy)
    return ok("memory", text)


def check_shared_memory(folder: Path) -> Check:
    """``/dev/shm``, through which processes of a node exchange.

    Args:
        folder: where it is mounted.
    """
    try:
        free = _free(folder)
    except OSError as error:
        remedy = "mount it: mount -t tmpfs tmpfs /dev/shm; in a container --ipc=host"
        return warning("shared memory", f"{folder} is not there ({error.strerror})", remedy)
    text = f"{folder}: {free / 1e9:.2f} GB free"
    if free < LEAST_SHARED:
        remedy = "NCCL needs it: give a container --shm-size=8g or --ipc=host, and remove what dead processes left there"
        return warning("shared memory", text, remedy)
    return ok("shared memory", text)


def memory_limit(root: Path = Path("/")) -> float:
    """Bytes that the control groups of this process still allow it; infinity where there is no limit.

    Linux's documentation: cgroup-v2.rst, "memory.max"; version 1: memory.txt, "memory.limit_in_bytes".

    Args:
        root: of the file system.
    """
    left = math.inf
    for controllers, groups in control_groups(root):
        if not controllers:
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers:
            mount, names = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        left = min([left, *(_left_in(mount / group, *names) for group in groups)])
    return left


def available_memory() -> float:
    """Bytes of this machine that are free or can be freed."""
    return float(psutil.virtual_memory().available)


def num_cores() -> int:
    """Of this machine."""
    return os.cpu_count() or 1


def _left_in(group: Path, limit_name: str, used_name: str) -> float:
    try:
        limit, used = ((group / name).read_text().strip() for name in (limit_name, used_name))
        return math.inf if limit == "max" or int(limit) >= NO_LIMIT else float(max(int(limit) - int(used), 0))
    except (OSError, ValueError):
        return math.inf


def _free(folder: Path) -> int:
    """Bytes that a user may still write there."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize
