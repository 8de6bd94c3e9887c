"""Checks of one machine: cores, threads, memory, disk space and folders.

They run on the machine where the command is given, and on each node of the doctor's job.
"""

import fcntl
import math
import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import NamedTuple

import psutil

from galaxydist.atomic_files import fsync_file, rename, write_bytes
from galaxydist.cpus import available_cores, bound_cores, control_groups, cpu_quota
from galaxydist.doctor.check import Check, failure, ok, warning
from galaxydist.doctor.network import check_wandb
from galaxydist.doctor.software import check_gpus, check_installation, check_matmul, find_gpus
from galaxydist.loading.dataset import SOURCES, find_manifest
from galaxydist.paths import DATA_VARIABLE, find_shards
from galaxydist.recipe.schema import DataConfig

# With less memory, even a run of the smallest recipes is killed or swaps.
LEAST_MEMORY = 4e9
# NCCL exchanges buffers of some MB between the GPUs of a node through shared memory; a container's default is 64 MB.
LEAST_SHARED = 0.5e9
THREAD_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# Variables that bind the threads of all processes of a node to the same first cores.
BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
HARMLESS_BINDING = {"", "false", "none", "disabled"}
# Control groups version 1 state no limit as a number of bytes close to 2^63.
NO_LIMIT = 1 << 60


def check_cores(bound: int, quota: float, on_machine: int) -> Check:
    """Check the number of cores that this process may use.

    Args:
        bound: cores that the process may run on.
        quota: CPU quota of the container, in cores; infinity: no limit.
        on_machine: cores of the machine.
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
    """Check the variables that set the number and the binding of the libraries' threads.

    Args:
        environ: the environment.
        cores: cores that the process may use.
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
    """Check the free memory of the machine, the container and the job.

    Args:
        available: free bytes.
        limit: bytes that the control groups of this process still allow; infinity: no limit.
        ranks: processes that share the memory.
    """
    allowed = f", of which the container or the job allows {limit / 1e9:.1f} GB" if math.isfinite(limit) else ""
    text = f"{available / 1e9:.1f} GB free{allowed}"
    if min(available, limit) / ranks < LEAST_MEMORY:
        shared = f" for {ranks} processes" if ranks > 1 else ""
        remedy = f"a run takes some {LEAST_MEMORY / 1e9:g} GB a process: ask for more (cluster.memory), end what uses it"
        return warning("memory", f"{text}{shared}", remedy)
    return ok("memory", text)


def check_shared_memory(folder: Path) -> Check:
    """Check the free space of ``/dev/shm``, the shared memory of the processes of a node.

    Args:
        folder: its mount point.
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
    """Return the bytes that the control groups of this process still allow; infinity where there is no limit.

    Linux's documentation: cgroup-v2.rst, "memory.max"; version 1: memory.txt, "memory.limit_in_bytes".

    Args:
        root: the root of the file system.
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
    """Return the bytes of memory of this machine that are free or can be freed."""
    return float(psutil.virtual_memory().available)


def num_cores() -> int:
    """Return the number of cores of this machine."""
    return os.cpu_count() or 1


def _left_in(group: Path, limit_name: str, used_name: str) -> float:
    try:
        limit, used = ((group / name).read_text().strip() for name in (limit_name, used_name))
        return math.inf if limit == "max" or int(limit) >= NO_LIMIT else float(max(int(limit) - int(used), 0))
    except (OSError, ValueError):
        return math.inf


def _free(folder: Path) -> int:
    """Return the free bytes of the folder's file system."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


# Disk space: file systems, free bytes, quota of HOME.

QUOTA_S = 10.0
# Local file systems, whose mount options show quotas; the quotas of network file systems are on their servers.
LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "overlay", "tmpfs", "apfs"}


class Mount(NamedTuple):
    """A mounted file system.

    Attributes:
        kind: type of the file system, such as ``ext4``, ``nfs4``, ``lustre``; or ``unknown``.
        options: mount options, separated by commas.
    """

    kind: str
    options: str = ""

    @property
    def is_without_quota(self) -> bool:
        options = self.options.split(",")
        return self.kind in LOCAL and not any("quota" in option and option != "noquota" for option in options)


def free_bytes(folder: Path) -> float:
    """Return the free bytes of the folder's file system, without quotas."""
    found = os.statvfs(folder)
    return float(found.f_bavail * found.f_frsize)


def find_mount(folder: Path) -> Mount:
    """Return the file system of a folder."""
    mounts = {Path(part.mountpoint): Mount(part.fstype, part.opts) for part in psutil.disk_partitions(all=True)}
    path = folder.resolve()
    return next((mounts[parent] for parent in (path, *path.parents) if parent in mounts), Mount("unknown"))


def quota_left(home: Path, program: str = "quota", mount: Mount | None = None) -> float | None:
    """Return the bytes that the quota of HOME still allows.

    Args:
        home: the home folder.
        program: quota(1), which reports the quotas of local disks and NFS, but not of Lustre, GPFS and the like.
        mount: the file system of HOME; default: it is looked up.

    Returns:
        Infinity if there is no quota; None if it is unknown.
    """
    mount = mount or find_mount(home)
    if mount.is_without_quota:
        return float("inf")
    is_known = mount.kind in LOCAL or mount.kind.startswith("nfs")
    if not is_known or shutil.which(program) is None:
        return None
    command = [program, "--no-wrap", "--raw-grace", "--filesystem", str(home)]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=QUOTA_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    left = read_quota(answer.stdout)
    # quota(1) also prints "none" when the server does not answer, together with an error message.
    is_told = left < float("inf") or (bool(answer.stdout.strip()) and not answer.stderr.strip())
    return left if is_told else None


def read_quota(text: str) -> float:
    """Return the bytes left by quota(1)'s table: file system, 1024-byte blocks (starred above the limit), soft and hard limit."""
    left = float("inf")
    for used, soft, hard in re.findall(r"^\s*\S+\s+(\d+)\*?\s+(\d+)\s+(\d+)", text, re.MULTILINE):
        limits = [int(limit) for limit in (soft, hard) if int(limit)]
        if limits:
            left = min(left, max(min(limits) - int(used), 0) * 1024.0)
    return left


# Folders: the data root, shards, scratch space and run folders.

# Galaxy10 DECaLS as HDF5 (2.7 GB), shards of both variants, weights and some checkpoints.
LEAST_IN_HOME = 20e9
LEAST_ELSEWHERE = 5e9
LEAST_SCRATCH = 5e9
IN_MEMORY = {"tmpfs", "ramfs"}


def check_data_root(root: Path, home: Path, quota_left: float | None) -> Check:
    """Check that the data root can be written, and its free space or, in HOME, the quota.

    Args:
        root: the data root; it need not exist.
        home: the user's home folder.
        quota_left: bytes left of the user's quota on HOME's file system; infinity: no quota; None: unknown.
    """
    name = "data root"
    move = f"set {DATA_VARIABLE}=FOLDER to a large file system (project or scratch), or give --data-dir"
    place = _nearest(root)
    if place is None or not place.is_dir():
        return failure(name, f"{root} cannot be made: {place} is not a folder", move)
    try:
        with _own_folder(place):
            pass
    except OSError as error:
        text = f"{root}: {place} cannot be written ({error.strerror})"
        if place == root.absolute() and any(root.iterdir()):
            return warning(name, f"{text}; what is there can be read", move)
        return failure(name, text, move)
    in_home = root.absolute().is_relative_to(home)
    limit = quota_left if in_home and quota_left is not None else float("inf")
    free = min(free_bytes(place), limit)
    text = f"{root}{'' if root.exists() else ' (not there yet)'}: {free / 1e9:.1f} GB free{', in HOME' if in_home else ''}"
    if free < (LEAST_IN_HOME if in_home else LEAST_ELSEWHERE):
        return warning(name, text, move)
    if in_home and quota_left is None:
        return warning(
            name,
            f"{text}, and its quota is not known here",
            f"see what your site says of HOME's quota; where it is less than {LEAST_IN_HOME / 1e9:.0f} GB, {move}",
        )
    return ok(name, text)


def check_shards(root: Path) -> Check:
    """Check that the data root has shards of the recipes' default data set."""
    config = DataConfig()
    wanted = Path(find_manifest(config, root))
    if wanted.is_file():
        return ok("shards", f"{config.dataset} ({config.variant}): {wanted}")
    others = [f"{name} ({path.parent.name})" for name, paths in find_shards(root).items() for path in paths]
    text = f"no {config.dataset} ({config.variant}) in {root / 'shards'}" + (f"; there: {', '.join(others)}" if others else "")
    return warning("shards", text, f"{SOURCES[config.dataset]}, then galaxydist data shard (with the same {DATA_VARIABLE})")


def check_scratch(told: Path, environ: Mapping[str, str]) -> Check:
    """Check the scratch space of a node, which holds the caches.

    Args:
        told: scratch folder of the profile, may contain variables (``$TMPDIR``, ``/local/${USER}``); or TMPDIR.
        environ: environment of the process on the node, with the variables' values.
    """
    remedy = "choose another folder (cluster.scratch, TMPDIR)"
    try:
        folder = Path(Template(str(told)).substitute(environ))
    except KeyError as error:
        return failure("scratch", f"{told}: ${error.args[0]} is not set there", f"set it (cluster.setup), or {remedy}")
    except ValueError:
        return failure("scratch", f"{told} cannot be read: $NAME or ${{NAME}} is replaced, nothing else", remedy)
    if not folder.is_absolute():
        return failure("scratch", f"{told} is {str(folder)!r} there, which is no whole path", remedy)
    try:
        with _own_folder(folder) as inside:
            write_bytes(inside / "trial", b"x" * 4096)
        free = free_bytes(folder)
    except OSError as error:
        return failure("scratch", f"{folder} cannot be written ({error.strerror})", remedy)
    text = f"{folder}: {free / 1e9:.1f} GB free"
    if find_mount(folder).kind in IN_MEMORY:
        return warning("scratch", f"{text}, in memory: what lies there is missing to the processes", remedy)
    return ok("scratch", text) if free >= LEAST_SCRATCH else warning("scratch", text, f"remove what is old, or {remedy}")


def check_run_folders(folder: Path) -> list[Check]:
    """Check that the file system of the run folders supports writing, fsync, rename over a file, link and flock.

    Args:
        folder: the folder of the run folders; created if missing.
    """
    move = "put the run folders on another file system: run.root=FOLDER"
    weaker = "locks of run folders are weaker here: do not start the same run twice. Or run.root=FOLDER on another file system"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _own_folder(folder) as inside:
            checks = [
                _tried("fsync there", _try_fsync, inside, failure, move),
                _tried("rename there", _try_rename, inside, failure, move),
                _tried("link there", _try_link, inside, warning, weaker),
                _tried("flock there", _try_flock, inside, warning, weaker),
            ]
    except OSError as error:
        return [failure("run folders", f"{folder} cannot be written ({error.strerror})", move)]
    place = ok("run folders", f"{folder.absolute()}: {free_bytes(folder) / 1e9:.1f} GB free ({find_mount(folder).kind})")
    return [place, *checks]


def _tried(name: str, attempt: Callable[[Path], str], folder: Path, bad: Callable[[str, str, str], Check], remedy: str) -> Check:
    """Run one file operation and return its check; ``attempt`` returns the problem, or an empty text."""
    try:
        problem = attempt(folder)
    except OSError as error:
        problem = f"does not work: {error.strerror}"
    return bad(name, problem, remedy) if problem else ok(name, "works")


def _try_fsync(folder: Path) -> str:
    write_bytes(folder / "fsync", b"x")
    fsync_file(folder)
    return ""


def _try_rename(folder: Path) -> str:
    """Rename a file over an existing one that is open for reading."""
    path, new = folder / "rename", folder / "rename.tmp"
    write_bytes(path, b"old")
    write_bytes(new, b"new")
    with path.open("rb") as reader:
        rename(new, path)
        try:
            kept = reader.read() == b"old"
        except OSError:
            kept = False
    if path.read_bytes() != b"new" or new.exists():
        return "does not replace a file"
    return "" if kept else "takes a file away from who reads it"


def _try_link(folder: Path) -> str:
    """Link the same name twice: the second attempt must fail, because run-folder locks rely on it."""
    path, name = folder / "link", folder / "link.name"
    path.write_bytes(b"x")
    os.link(path, name)
    try:
        os.link(path, name)
    except FileExistsError:
        return ""
    return "replaces an existing name"


def _try_flock(folder: Path) -> str:
    with (folder / "flock").open("w") as first, (folder / "flock").open() as second:
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return ""
    return "is given to two at once"


@contextmanager
def _own_folder(folder: Path) -> Iterator[Path]:
    """Create a temporary folder for the tests, and remove it afterwards."""
    inside = folder / f".doctor-{secrets.token_hex(6)}"
    inside.mkdir()
    try:
        yield inside
    finally:
        shutil.rmtree(inside, ignore_errors=True)


def _nearest(path: Path) -> Path | None:
    """Return the path itself or its nearest parent that exists."""
    return next((parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists()), None)


SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class CheckTarget:
    """Folders and resources to check on a machine.

    Args:
        data_root: the data root.
        runs: the folder of run folders.
        scratch: scratch folder of the profile, may contain environment variables; None: TMPDIR.
        gpus: GPUs that a process must see.
        ranks: processes of a job on the machine.
        devices: devices for the matrix product; None: all GPUs.
    """

    data_root: Path
    runs: Path
    scratch: Path | None = None
    gpus: int = 0
    ranks: int = 1
    devices: tuple[str, ...] | None = None


def check_machine(place: CheckTarget, environ: Mapping[str, str]) -> list[Check]:
    """Run all checks of this machine and this process.

    Args:
        place: the folders and resources to check.
        environ: the process's environment.
    """
    gpus = find_gpus()
    devices = place.devices
    if devices is None:
        devices = tuple(f"cuda:{number}" for number in range(len(gpus.names)))
    home = Path(environ.get("HOME") or Path.home())
    scratch = place.scratch or Path(environ.get("TMPDIR") or "/tmp")
    return [
        *check_installation(),
        check_gpus(gpus, place.gpus),
        *(check_matmul(device) for device in devices),
        check_cores(len(bound_cores()), cpu_quota(), num_cores()),
        check_threads(environ, available_cores()),
        check_memory(available_memory(), memory_limit(), place.ranks),
        check_shared_memory(SHARED_MEMORY),
        check_data_root(place.data_root, home, quota_left(home)),
        check_shards(place.data_root),
        check_scratch(scratch, environ),
        *check_run_folders(place.runs),
        check_wandb(environ),
    ]
