"""Folders: the data root, scratch space, shards, and what the file system of the run folders can do."""

import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from string import Template

from galaxydist.atomic_files import fsync_file, rename, write_bytes
from galaxydist.cluster.doctor.check import Check, failure, ok, warning
from galaxydist.cluster.doctor.room import find_mount, free_bytes
from galaxydist.loading.dataset import SOURCES, find_manifest
from galaxydist.paths import DATA_VARIABLE, find_shards
from galaxydist.recipe.schema import DataConfig

# Galaxy10 DECaLS as HDF5 (2.7 GB), its shards of both variants and weights, with room for checkpoints.
LEAST_IN_HOME = 20e9
LEAST_ELSEWHERE = 5e9
LEAST_SCRATCH = 5e9
IN_MEMORY = {"tmpfs", "ramfs"}


def check_data_root(root: Path, home: Path, quota_left: float | None) -> Check:
    """Where data lie, how much room is left, and whether that is a HOME with a small quota.

    Args:
        root: the data root; it may not be there yet.
        home: the user's home folder.
        quota_left: bytes of the user's quota on HOME's file system; infinity: there is none; None: it is not known.
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
    """Whether shards of the data set that recipes use by default lie in the data root."""
    config = DataConfig()
    wanted = Path(find_manifest(config, root))
    if wanted.is_file():
        return ok("shards", f"{config.dataset} ({config.variant}): {wanted}")
    others = [f"{name} ({path.parent.name})" for name, paths in find_shards(root).items() for path in paths]
    text = f"no {config.dataset} ({config.variant}) in {root / 'shards'}" + (f"; there: {', '.join(others)}" if others else "")
    return warning("shards", text, f"{SOURCES[config.dataset]}, then galaxydist data shard (with the same {DATA_VARIABLE})")


def check_scratch(told: Path, environ: Mapping[str, str]) -> Check:
    """Scratch space of a node, for caches.

    Args:
        told: the profile's, perhaps with variables (``$TMPDIR``, ``/local/${USER}``), or TMPDIR.
        environ: of the process on the node, which has the variables' values.
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
    """What run folders need of their file system: writing, fsync, rename over a file, link, flock.

    Args:
        folder: of the run folders; made if it is not there.
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
    """One operation, done for real; what it answers is wrong with it."""
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
    """Over an existing file, which a reader has open."""
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
    """The second to link the same name must fail: so a lock is taken once."""
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
    """A folder to try things in, removed afterwards."""
    inside = folder / f".doctor-{secrets.token_hex(6)}"
    inside.mkdir()
    try:
        yield inside
    finally:
        shutil.rmtree(inside, ignore_errors=True)


def _nearest(path: Path) -> Path | None:
    """The path itself or the first of its parents that is there."""
    return next((parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists()), None)
