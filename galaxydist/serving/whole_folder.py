"""Folders that appear whole: written under a hidden name beside the final one, flushed to the disk, then renamed."""

import glob
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from galaxydist.atomic_files import explain_full_disk, fsync_file, remove_stale, rename
from galaxydist.errors import UserError, name_some


def check_target(out: Path, *, overwrite: bool, is_ours: Callable[[Path], bool], names: Collection[str]) -> None:
    """Refuse a folder that must not be written or replaced; an empty one may be.

    Args:
        out: the folder to write.
        overwrite: a folder of ours may be replaced.
        is_ours: tells if such a command has written a folder.
        names: all files and folders that it writes; a folder with others is not replaced, because they would be lost.

    Raises:
        UserError: it exists and is no folder, is not ours, has files that are not ours, or ``overwrite`` is not given.
    """
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise UserError(f"{out} exists and is no folder: give the name of a new folder")
    found = sorted(path.name for path in out.iterdir())
    if not found:
        return
    if not is_ours(out):
        raise UserError(
            f"{out} exists and was not written by this command: it would be lost. Give the name of a new folder (it has "
            f"{name_some(found)})"
        )
    if not overwrite:
        raise UserError(f"{out} exists already: give another folder, or --overwrite to replace it")
    if others := [name for name in found if name not in names]:
        raise UserError(
            f"{out} has files that this command did not write and that would be lost: {name_some(others)}. Move them, or give "
            "another folder"
        )


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Open a hidden folder beside ``out`` for writing; rename it to ``out`` at the end, or remove it if the writing fails.

    An existing ``out`` is replaced: call ``check_target`` before. After a kill at any moment, ``out`` is the old folder, the new
    one or missing, never a part of one. The next call removes the replaced folder that a killed process has left.

    Args:
        out: the final name; its parents are made.

    Raises:
        UserError: the folder cannot be made, the disk is full, or another process has written ``out`` meanwhile.
    """
    out = Path(os.path.realpath(out))
    stem = f".{out.name}.{os.getpid()}"
    temporary, old = out.with_name(f"{stem}.tmp"), out.with_name(f"{stem}.old")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(out.parent, f".{glob.escape(out.name)}.*.tmp")
        for leftover in (temporary, old):  # left by a killed process with the same id
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir()
    except OSError as error:
        raise UserError(f"{out} cannot be made: {error.strerror or error}. Give another folder") from error
    try:
        with explain_full_disk(out):
            yield temporary
            _flush(temporary)
            if out.is_dir() and any(out.iterdir()):
                rename(out, old)
            try:
                rename(temporary, out)
            except OSError as error:
                raise UserError(f"{out} is in the way ({error.strerror}): another process may have written it") from error
    finally:
        if not out.exists() and old.exists():
            old.rename(out)
        shutil.rmtree(temporary, ignore_errors=True)
        if out.exists():
            _remove_replaced(out)


def _remove_replaced(out: Path) -> None:
    """Remove the folders that ``out`` has replaced, of this process and of killed ones."""
    name = re.compile(rf"\.{re.escape(out.name)}\.\d+\.old")  # those of a folder NAME.OTHER have other names
    for path in out.parent.iterdir():
        if name.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Flush all files and folders to the disk."""
    for path in sorted(folder.rglob("*")):
        fsync_file(path)
    fsync_file(folder)
