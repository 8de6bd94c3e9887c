"""Lock of a run folder: one process at a time; a dead process never blocks the next one."""

import atexit
import errno
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from galaxydist.atomic_files import explain_full_disk
from galaxydist.errors import UserError


@dataclass(frozen=True)
class LockOwner:
    """The process that holds a lock.

    Args:
        host: name of the machine.
        pid: process id on that machine.
        after_boot: start of the process, seconds after boot; distinguishes it from a later process with the same id.
        pid_space: identifier of the boot and the container in which the process id is valid; empty if unknown.
        job_id: id of the scheduler's job, or None.
        restart_count: number of times that job was requeued.
        token: random text, unique to this lock.
    """

    host: str
    pid: int
    after_boot: float
    pid_space: str
    job_id: str | None
    restart_count: int
    token: str

    def __str__(self) -> str:
        job = f", job {self.job_id}, restart {self.restart_count}" if self.job_id is not None else ""
        return f"process {self.pid} on {self.host}{job}"


def read_owner(path: Path) -> LockOwner | None:
    """Return the owner named in a lock file; None if there is no valid lock file."""
    try:
        content: Any = json.loads(path.read_bytes())
        return LockOwner(**{field.name: content[field.name] for field in fields(LockOwner)})
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def pid_space() -> str:
    """Return an identifier of this boot and process namespace, or an empty text if unknown.

    Process ids mean the same process only if it is equal: two machines may share a name, a machine may have been restarted, and
    containers number their processes separately.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def start_after_boot(process: psutil.Process) -> float:
    """Return the start of a process in seconds after boot: in seconds since 1970 it moves when the clock is set."""
    return process.create_time() - psutil.boot_time()


def is_alive(owner: LockOwner) -> bool:
    """Return True if the process that took the lock still runs on this host; a zombie does not count."""
    try:
        process = psutil.Process(owner.pid)
        # The system gives the time of boot in whole seconds.
        is_same = abs(start_after_boot(process) - owner.after_boot) < 2.0
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def live_owner(path: Path) -> LockOwner | None:
    """Return the owner named in a lock file if it is alive: by its process on this machine, else by its heartbeat."""
    owner = read_owner(path)
    if owner is None:
        return None
    if owner.host == socket.gethostname() and owner.pid_space == pid_space():
        return owner if is_alive(owner) else None
    with suppress(FileNotFoundError):
        if time.time() - path.stat().st_mtime < STALE_SECONDS:
            return owner
    return None


_log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 20.0
STALE_SECONDS = 300.0
POLL_SECONDS = 2.0
GUARD_SECONDS = 10.0


class InUseError(UserError):
    """Another process holds the run folder."""


@dataclass(eq=False)
class RunLock:
    """Context manager that holds a run folder for this process until it is released or the process ends.

    The lock file is taken over, with a warning, from a dead process on the same host or from a process on another host with a
    stale heartbeat, and without a warning from an earlier restart of the same job. The heartbeat is the file's modification time,
    set by a thread, so that it needs no disk space; the clocks of the hosts must agree within a minute or two.

    Args:
        path: the lock file, in an existing folder.
        host, pid: this process.
        job_id, restart_count: the scheduler's job and its number of requeues, if any.
        clock: returns seconds since 1970.
        heartbeat_seconds: time between heartbeats.
        stale_seconds: age of a heartbeat from which a process on another host counts as dead.
        is_patient: if an owner on another host sends no heartbeat, wait until it is stale instead of failing: a job that starts
            just after another one was killed must not end because of its lock.
    """

    path: Path
    host: str
    pid: int
    clock: Callable[[], float]
    job_id: str | None = None
    restart_count: int = 0
    heartbeat_seconds: float = HEARTBEAT_SECONDS
    stale_seconds: float = STALE_SECONDS
    is_patient: bool = False

    def __post_init__(self) -> None:
        started = start_after_boot(psutil.Process(self.pid))
        self.owner = LockOwner(self.host, self.pid, started, pid_space(), self.job_id, self.restart_count, secrets.token_hex(8))
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._is_lost = False

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lock and start the heartbeat.

        Raises:
            UserError: another process holds the folder, or it cannot be written.
        """
        try:
            self._take_when_free()
        except PermissionError as error:
            raise UserError(
                f"The run folder {self.path.parent} cannot be written. Choose another with run.dir=FOLDER."
            ) from error
        self._stop.clear()
        self._thread = threading.Thread(target=self._beat_until_stopped, name="run-lock-heartbeat", daemon=True)
        self._thread.start()
        atexit.register(self.release)

    def _take_when_free(self) -> None:
        waited_for: float | None = None  # the heartbeat that does not change
        while True:
            try:
                with explain_full_disk(self.path), guarded(self.path):
                    self._replace_dead_owner()
                    self._create()
                return
            except InUseError as error:
                heartbeat = self._heartbeat()
                if (
                    not self.is_patient
                    or heartbeat is None
                    or waited_for not in (None, heartbeat)
                    or self._is_here(read_owner(self.path))
                ):
                    raise
                if waited_for is None:
                    _log.warning("%s This process waits for that, unless the other sends a heartbeat.", error)
                waited_for = heartbeat
            time.sleep(min(POLL_SECONDS, self.stale_seconds))

    def release(self) -> None:
        """Stop the heartbeat and remove the lock file if it is still this process's; may be called twice."""
        if os.getpid() != self.owner.pid:
            return  # a forked child inherits the object, not the lock
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        atexit.unregister(self.release)
        try:
            with guarded(self.path):
                if self._is_ours():
                    self.path.unlink()
        except OSError as error:
            _log.warning("the lock %s could not be removed: %s", self.path, error)

    @property
    def is_held(self) -> bool:
        """True while this process holds the lock and no other has taken it over (checked on disk)."""
        return self._thread is not None and not self._is_lost and self._is_ours()

    def check(self) -> None:
        """Check that the lock is still held; to be called before an irreversible change in the run folder.

        Raises:
            UserError: another process took the lock over, or the lock file was removed.
        """
        if not self.is_held:
            owner = read_owner(self.path)
            now = f"it is now held by {owner}" if owner else "its lock file is gone"
            raise UserError(
                f"This process ({self.owner}) no longer holds the run folder {self.path.parent}: {now}. It stops, so that two "
                "runs do not write there. Start the command again once nothing else uses the folder."
            )

    def _is_ours(self) -> bool:
        owner = read_owner(self.path)
        return owner is not None and owner.token == self.owner.token

    def _create(self) -> None:
        """Create the lock file and its contents atomically, if there is none; ``link`` does this on network file systems too."""
        temporary = self.path.with_name(f".{self.path.name}.{self.owner.token}.tmp")
        try:
            temporary.write_text(json.dumps(asdict(self.owner), indent=2) + "\n")
            self._touch(temporary)
            try:
                os.link(temporary, self.path)
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                    raise
                with self.path.open("x") as file:  # a file system without links
                    file.write(temporary.read_text())
                self._touch(self.path)
        except FileExistsError:
            raise self._in_use(read_owner(self.path)) from None
        finally:
            temporary.unlink(missing_ok=True)

    def _touch(self, path: Path) -> None:
        now = self.clock()
        os.utime(path, (now, now))

    def _replace_dead_owner(self) -> None:
        if not self.path.exists():
            return
        owner = read_owner(self.path)
        age = self._heartbeat_age()
        if owner is None:
            if age < self.stale_seconds:
                raise self._in_use(None)
            _log.warning("the lock %s is damaged and old: it is replaced", self.path)
        elif owner.job_id is not None and owner.job_id == self.owner.job_id and owner.restart_count < self.owner.restart_count:
            _log.debug("restart %d of job %s continues in %s", self.owner.restart_count, owner.job_id, self.path.parent)
        elif self._is_here(owner):
            if is_alive(owner):
                raise self._in_use(owner)
            _log.warning("%s left a lock in %s and is gone: it is taken over", owner, self.path.parent)
        elif age >= self.stale_seconds:
            _log.warning("%s, which holds %s, has not been heard of for %.0f s: it is taken over", owner, self.path.parent, age)
        else:
            raise self._in_use(owner)
        self._remove(owner)

    def _remove(self, examined: LockOwner | None) -> None:
        """Remove exactly the lock that was examined; without a working guard, another process may have replaced it since."""
        aside = self.path.with_name(f".{self.path.name}.{self.owner.token}.old")
        try:
            self.path.rename(aside)
        except FileNotFoundError:
            return
        moved = read_owner(aside)
        if moved is not None and (examined is None or moved.token != examined.token):
            try:
                os.link(aside, self.path)
            except FileExistsError:
                _log.warning("two processes started on %s at the same instant", self.path.parent)
            aside.unlink()
            raise self._in_use(moved)
        aside.unlink()

    def _is_here(self, owner: LockOwner | None) -> bool:
        """Return True if the owner is a process of this machine, so that ``is_alive`` applies."""
        return owner is not None and (owner.host, owner.pid_space) == (self.owner.host, self.owner.pid_space)

    def _heartbeat(self) -> float | None:
        try:
            return self.path.stat().st_mtime
        except FileNotFoundError:
            return None

    def _heartbeat_age(self) -> float:
        heartbeat = self._heartbeat()
        return self.clock() - heartbeat if heartbeat is not None else 0.0

    def _in_use(self, owner: LockOwner | None) -> InUseError:
        age = self._heartbeat_age()
        folder = self.path.parent
        if owner is None:
            return InUseError(
                f"The run folder {folder} is being taken by another process just now. "
                "Wait a minute and try again, or choose another folder with run.dir=FOLDER."
            )
        stop = f"scancel {owner.job_id}" if owner.job_id is not None else f"kill {owner.pid} on {owner.host}"
        wait = max(self.stale_seconds - age, 0)
        gone = (
            "" if self._is_here(owner) else f" If that process is gone, try again in {wait:.0f} s: the lock then counts as stale."
        )
        return InUseError(
            f"The run folder {folder} is in use by {owner} (last heartbeat {max(age, 0):.0f} s ago). "
            f"Wait until it ends, stop it ({stop}), or choose another folder with run.dir=FOLDER.{gone}"
        )

    def _beat_until_stopped(self) -> None:
        while not self._stop.wait(self.heartbeat_seconds):
            try:
                if not self._is_ours():
                    self._is_lost = True
                    _log.error("the lock %s was taken by %s", self.path, read_owner(self.path) or "no process: it was removed")
                    return
                self._touch(self.path)
            except OSError as error:
                _log.warning("no heartbeat could be left in %s: %s", self.path, error)


@contextmanager
def guarded(path: Path, *, wait_s: float = GUARD_SECONDS) -> Iterator[None]:
    """Let one process at a time examine and change a file; without ``flock`` on the file system, all of them go on.

    Args:
        path: the file or folder, in an existing folder; the guard is a hidden file beside it.
        wait_s: time after which a process goes on although another one holds the guard; a longer wait is logged.
    """
    from filelock import FileLock

    guard = FileLock(path.with_name(f".{path.name}.guard"), fallback_to_soft=False)
    with suppress(OSError, NotImplementedError):  # no flock there, or its holder hangs
        try:
            guard.acquire(timeout=min(wait_s, GUARD_SECONDS))
        except TimeoutError:
            if wait_s > GUARD_SECONDS:
                _log.warning("another process is working on %s: this one waits for it", path)
                guard.acquire(timeout=wait_s)
    try:
        yield
    finally:
        guard.release()
