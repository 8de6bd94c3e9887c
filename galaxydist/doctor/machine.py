"""Checks of one machine: cores, disk space, folders, tracker and network addresses.

They run on the machine where the command is given, and on each node of the doctor's job.
"""

import fcntl
import ipaddress
import math
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from string import Template

import psutil

from galaxydist.atomic_files import rename, write_bytes
from galaxydist.cluster.preflight import IN_MEMORY, file_system
from galaxydist.cpus import bound_cores, cpu_quota
from galaxydist.doctor.check import Check, failure, ok, warning
from galaxydist.doctor.software import check_gpus, check_installation, find_gpus
from galaxydist.errors import UserError
from galaxydist.loading.training_data import SOURCES, find_manifest
from galaxydist.paths import DATA_VARIABLE, find_shards
from galaxydist.recipe.schema import DataConfig
from galaxydist.tracking.wandb_sink import has_wandb_key, is_reachable, wandb_address

# Galaxy10 DECaLS as HDF5 (2.7 GB), shards of both variants, weights and some checkpoints.
MIN_FREE_IN_HOME = 20e9
MIN_FREE = 5e9
FIXED_MODES = ("online", "offline", "disabled")


@dataclass(frozen=True)
class CheckTarget:
    """Folders and GPUs to check on a machine.

    Args:
        data_root: the data root.
        runs: the folder of run folders.
        scratch: scratch folder of the profile, may contain environment variables; None: TMPDIR.
        gpus: GPUs that a process must see.
    """

    data_root: Path
    runs: Path
    scratch: Path | None = None
    gpus: int = 0


def check_machine(target: CheckTarget, environ: Mapping[str, str]) -> list[Check]:
    """Run all checks of this machine and this process.

    Args:
        target: the folders and GPUs to check.
        environ: the process's environment.
    """
    scratch = target.scratch or Path(environ.get("TMPDIR") or "/tmp")
    return [
        *check_installation(),
        check_gpus(find_gpus(), target.gpus),
        check_cores(len(bound_cores()), cpu_quota(), os.cpu_count() or 1),
        check_data_root(target.data_root, Path(environ.get("HOME") or "~")),
        check_shards(target.data_root),
        check_scratch(scratch, environ),
        *check_run_folders(target.runs),
        check_wandb(environ),
    ]


def check_cores(bound: int, quota: float, on_machine: int) -> Check:
    """Check the number of cores that this process may use.

    Args:
        bound: cores that the process may run on.
        quota: CPU quota of the container, in cores; infinity: no limit.
        on_machine: cores of the machine.
    """
    allowed = f", of which its container allows {quota:g} at a time" if math.isfinite(quota) else ""
    text = f"{bound} of the machine's {on_machine}{allowed}"
    if quota < bound:
        return warning("cores", text, "give the container as many CPUs as it sees (docker run --cpus, cluster.cpus_per_task)")
    if bound < 2:
        return warning("cores", text, "decoding and training share one core: request more (cluster.cpus_per_task)")
    return ok("cores", text)


def check_data_root(root: Path, home: Path) -> Check:
    """Check that the data root can be written, and its free space.

    Args:
        root: the data root; it need not exist.
        home: the user's home folder, where data sets and checkpoints of all runs usually share the space.
    """
    name = "data root"
    remedy = f"set {DATA_VARIABLE}=FOLDER to a large file system (project or scratch), or give --data-dir"
    parents = (root.absolute(), *root.absolute().parents)
    nearest = next(folder for folder in parents if folder.exists())
    if not nearest.is_dir():
        return failure(name, f"{root} cannot be made: {nearest} is not a folder", remedy)
    try:
        with _temporary_folder(nearest):
            free = shutil.disk_usage(nearest).free
    except OSError as error:
        text = f"{root}: {nearest} cannot be written ({error.strerror})"
        if nearest == root.absolute() and any(root.iterdir()):
            return warning(name, f"{text}; its files can be read", remedy)
        return failure(name, text, remedy)
    in_home = root.absolute().is_relative_to(home)
    text = f"{root}{'' if root.exists() else ' (does not exist yet)'}: {free / 1e9:.1f} GB free{', in HOME' if in_home else ''}"
    return ok(name, text) if free >= (MIN_FREE_IN_HOME if in_home else MIN_FREE) else warning(name, text, remedy)


def check_shards(root: Path) -> Check:
    """Check that the data root has shards of the recipes' default data set."""
    config = DataConfig()
    manifest = Path(find_manifest(config, root))
    if manifest.is_file():
        return ok("shards", f"{config.dataset} ({config.variant}): {manifest}")
    others = [f"{name} ({path.parent.name})" for name, paths in find_shards(root).items() for path in paths]
    text = f"no {config.dataset} ({config.variant}) in {root / 'shards'}" + (f"; there: {', '.join(others)}" if others else "")
    return warning("shards", text, f"{SOURCES[config.dataset]}, then galaxydist data shard (with the same {DATA_VARIABLE})")


def check_scratch(path: Path, environ: Mapping[str, str]) -> Check:
    """Check the scratch space of a node.

    Args:
        path: scratch folder of the profile, may contain variables (``$TMPDIR``, ``/local/${USER}``); or TMPDIR.
        environ: environment of the process on the node, with the variables' values.
    """
    remedy = "choose another folder (cluster.scratch, TMPDIR)"
    try:
        folder = Path(Template(str(path)).substitute(environ))
    except KeyError as error:
        return failure("scratch", f"{path}: ${error.args[0]} is not set there", f"set it (cluster.setup), or {remedy}")
    except ValueError:
        return failure("scratch", f"{path} cannot be read: only $NAME and ${{NAME}} are replaced", remedy)
    if not folder.is_absolute():
        return failure("scratch", f"{path} is {str(folder)!r} there, which is not an absolute path", remedy)
    try:
        with _temporary_folder(folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        return failure("scratch", f"{folder} cannot be written ({error.strerror})", remedy)
    text = f"{folder}: {free / 1e9:.1f} GB free"
    if file_system(folder) in IN_MEMORY:
        return warning("scratch", f"{text}, in memory: its files take memory from the processes", remedy)
    return ok("scratch", text) if free >= MIN_FREE else warning("scratch", text, f"remove old files, or {remedy}")


def check_run_folders(folder: Path) -> list[Check]:
    """Check that the file system of the run folders supports writing, rename over an existing file, link and flock.

    Args:
        folder: the folder of the run folders; created if missing.
    """
    remedy = "put the run folders on another file system: run.root=FOLDER"
    weaker = "locks of run folders are weaker here: do not start a run twice, or use another file system (run.root=FOLDER)"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _temporary_folder(folder) as inside:
            checks = [
                _check_operation("rename there", _rename_problem, inside, failure, remedy),
                _check_operation("link there", _link_problem, inside, warning, weaker),
                _check_operation("flock there", _flock_problem, inside, warning, weaker),
            ]
    except OSError as error:
        return [failure("run folders", f"{folder} cannot be written ({error.strerror})", remedy)]
    space = f"{shutil.disk_usage(folder).free / 1e9:.1f} GB free ({file_system(folder) or 'unknown'})"
    return [ok("run folders", f"{folder.absolute()}: {space}"), *checks]


def _check_operation(
    name: str, find_problem: Callable[[Path], str], folder: Path, bad: Callable[[str, str, str], Check], remedy: str
) -> Check:
    """Return the check of one file operation; ``find_problem`` performs it and returns the problem, or an empty text."""
    try:
        problem = find_problem(folder)
    except OSError as error:
        problem = f"does not work: {error.strerror}"
    return bad(name, problem, remedy) if problem else ok(name, "works")


def _rename_problem(folder: Path) -> str:
    """Rename a file over an existing one."""
    path, new = folder / "rename", folder / "rename.tmp"
    write_bytes(path, b"old")
    write_bytes(new, b"new")
    rename(new, path)
    return "" if path.read_bytes() == b"new" and not new.exists() else "does not replace a file"


def _link_problem(folder: Path) -> str:
    """Link the same name twice: the second attempt must fail, because run-folder locks rely on it."""
    path, name = folder / "link", folder / "link.name"
    path.write_bytes(b"x")
    os.link(path, name)
    try:
        os.link(path, name)
    except FileExistsError:
        return ""
    return "replaces an existing name"


def _flock_problem(folder: Path) -> str:
    with (folder / "flock").open("w") as first, (folder / "flock").open() as second:
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return ""
    return "gives a lock to two at once"


@contextmanager
def _temporary_folder(parent: Path) -> Iterator[Path]:
    """Create a folder with a file for the tests, and remove it afterwards."""
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=parent, ignore_cleanup_errors=True) as name:
        write_bytes(Path(name) / "written", b"x" * 4096)
        yield Path(name)


def check_wandb(environ: Mapping[str, str]) -> Check:
    """Check that runs with tracker.name=wandb are tracked online; the report has no part of the key.

    Args:
        environ: may have WANDB_MODE, WANDB_API_KEY and WANDB_BASE_URL.
    """
    name, later = "wandb", "runs are tracked offline; `wandb sync` in their folders sends them later"
    if environ.get("WANDB_MODE") in FIXED_MODES:
        return ok(name, f"WANDB_MODE={environ['WANDB_MODE']}")
    try:
        host, port = wandb_address(environ)
    except UserError as error:
        return warning(name, f"{error}: {later}", "correct WANDB_BASE_URL")
    has_key = has_wandb_key(environ)
    if not is_reachable(host, port):
        text = f"{host} does not answer ({'there is a key' if has_key else 'no key either'}): {later}"
        return warning(name, text, "nothing, where nodes have no network; else check the network and WANDB_BASE_URL")
    if not has_key:
        return warning(name, f"{host} answers, but there is no key: {later}", "`wandb login`, or set WANDB_API_KEY")
    return ok(name, f"{host} answers and there is a key")


def own_address(hostname: str) -> str | None:
    """Return the address that a host name resolves to, as gloo and c10d resolve it; None if it does not resolve."""
    try:
        return str(socket.getaddrinfo(hostname, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return None


def interface_address(name: str) -> str | None:
    """Return the first IPv4 address of an interface, else the first IPv6 address; None if there is neither.

    Args:
        name: the interface, such as ``ib0``; of a list the first is used.
    """
    found = psutil.net_if_addrs().get(name.split(",", maxsplit=1)[0].lstrip("=^"), [])
    by_family = {address.family: address.address for address in reversed(found)}  # the first address of each
    address = by_family.get(socket.AF_INET) or by_family.get(socket.AF_INET6)
    return address.partition("%")[0] if address else None


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def machine_id() -> str:
    """Return the kernel's boot id, which is the same for several SLURM nodes on one machine; else the host name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
