"""How much a user may still write to a folder: its file system, its free space, the quota of HOME."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import psutil

QUOTA_S = 10.0
# A disk of this machine has quotas where its mount options say so; elsewhere a server keeps them.
LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "overlay", "tmpfs", "apfs"}


class Mount(NamedTuple):
    """What a folder lies on.

    Attributes:
        kind: the type of file system, such as ``ext4``, ``nfs4``, ``lustre``; ``unknown``.
        options: that it is mounted with, between commas.
    """

    kind: str
    options: str = ""

    @property
    def is_without_quota(self) -> bool:
        options = self.options.split(",")
        return self.kind in LOCAL and not any("quota" in option and option != "noquota" for option in options)


def free_bytes(folder: Path) -> float:
    """What a user may still write there, without quotas."""
    found = os.statvfs(folder)
    return float(found.f_bavail * found.f_frsize)


def find_mount(folder: Path) -> Mount:
    """The file system that a folder lies on."""
    mounts = {Path(part.mountpoint): Mount(part.fstype, part.opts) for part in psutil.disk_partitions(all=True)}
    path = folder.resolve()
    return next((mounts[parent] for parent in (path, *path.parents) if parent in mounts), Mount("unknown"))


def quota_left(home: Path, program: str = "quota", mount: Mount | None = None) -> float | None:
    """Bytes that the user may still write in HOME by its quota.

    Args:
        home: the home folder.
        program: quota(1), which knows the quotas of disks and of NFS, not those of Lustre, GPFS and the like.
        mount: what HOME lies on; default: it is looked up.

    Returns:
        Infinity where there is no quota; None where nobody can tell.
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
    # It says "none" too where the server did not answer, and complains beside that.
    is_told = left < float("inf") or (bool(answer.stdout.strip()) and not answer.stderr.strip())
    return left if is_told else None


def read_quota(text: str) -> float:
    """Bytes left, from quota(1)'s table: file system, blocks of 1024 bytes (with a star when over), soft limit, hard limit."""
    left = float("inf")
    for used, soft, hard in re.findall(r"^\s*\S+\s+(\d+)\*?\s+(\d+)\s+(\d+)", text, re.MULTILINE):
        limits = [int(limit) for limit in (soft, hard) if int(limit)]
        if limits:
            left = min(left, max(min(limits) - int(used), 0) * 1024.0)
    return left
