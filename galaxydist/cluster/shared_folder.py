"""Whether a run folder can be seen by the nodes of a job, as far as the login node can tell."""

import socket
from pathlib import Path

import psutil

from galaxydist.cluster.programs import ask_slurm, check_controller, is_slurm_here
from galaxydist.errors import UserError

# Every node has its own.
OF_THE_NODE = (Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"), Path("/run"))
IN_MEMORY = {"tmpfs", "ramfs"}


def check_shared(folder: Path, what: str, remedy: str) -> None:
    """Refuse a folder that lies in a place which every machine has for itself.

    A local disk that the login node exports to the nodes looks like any other from here, so it is let through: `galaxydist doctor
    cluster=NAME` looks from the nodes.

    Args:
        folder: need not exist.
        what: for the message, such as ``run folder``.
        remedy: keys that name another.

    Raises:
        UserError: with where to put it; SchedulerAwayError: only SLURM could tell, and it does not answer.
    """
    why = _why_not(folder.resolve())
    if why is not None and not _is_only_host():
        raise UserError(
            f"The {what} {folder} lies {why}, which the nodes of the cluster do not see. Put it on a file system that all "
            f"of them share, such as your home or project folder: {remedy} (`galaxydist doctor cluster=NAME` looks whether the "
            "nodes see it)."
        )


def _why_not(path: Path) -> str | None:
    for place in OF_THE_NODE:
        if path.is_relative_to(place):
            return f"in {place}"
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    mount = next((parent for parent in (path, *path.parents) if parent in mounts), None)
    return f"in memory ({mounts[mount]} at {mount})" if mount is not None and mounts[mount] in IN_MEMORY else None


def _is_only_host() -> bool:
    """All nodes of the cluster are this machine (a test bed). Raises SchedulerAwayError where SLURM does not say."""
    if not is_slurm_here():
        return False
    check_controller()
    answer = ask_slurm(["sinfo", "--noheader", "--Node", "--format", "%o %n"])
    nodes = [line.split() for line in answer.stdout.splitlines()]
    own = socket.gethostname().partition(".")[0]
    return bool(nodes) and all(node[0].startswith("127.") or node[-1].partition(".")[0] == own for node in nodes)
