"""Locks of the cache (flock's): they go with the process that holds them."""

import fcntl
import logging
import os
from pathlib import Path

from galaxydist.shards.openfile import OpenFile

_log = logging.getLogger(__name__)

LOCK, PARTIAL = ".lock", ".partial"


def take_claim(path: Path) -> OpenFile | None:
    """The right to fetch a file, which one process has at a time; None if another has it."""
    while True:
        file = OpenFile(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))
        if not try_lock(file.descriptor, fcntl.LOCK_EX):
            return None
        if os.fstat(file.descriptor).st_nlink:
            os.ftruncate(file.descriptor, 0)
            return file


def reserved_bytes(lock: str) -> int:
    """The bytes that the fetch behind a lock will take; nothing is behind the lock of a process that is gone."""
    try:
        with Path(lock).open("r+b") as file:
            if not try_lock(file.fileno(), fcntl.LOCK_EX):
                text = file.read()
                return int(text) if text.isdigit() else 0
            if os.fstat(file.fileno()).st_nlink:
                Path(lock.removesuffix(LOCK) + PARTIAL).unlink(missing_ok=True)
                Path(lock).unlink()
    except FileNotFoundError:
        pass
    return 0


def evict(path: str) -> bool:
    """Remove a file, unless anyone has it open."""
    try:
        file = OpenFile(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        if not try_lock(file.descriptor, fcntl.LOCK_EX):
            return False
        Path(path).unlink()
    except OSError as error:
        _log.debug("%s stays: %s", path, error)
        return False
    return True


def try_lock(descriptor: int, kind: int) -> bool:
    """Take a lock if it is to be had at once."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
