"""The checks of one machine, put together: on the one that the command is given on, and on each node of a job."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from galaxydist.cluster.doctor.check import Check
from galaxydist.cluster.doctor.machine import (
    available_memory,
    check_cores,
    check_memory,
    check_shared_memory,
    check_threads,
    memory_limit,
    num_cores,
)
from galaxydist.cluster.doctor.network import check_wandb
from galaxydist.cluster.doctor.places import check_data_root, check_run_folders, check_scratch, check_shards
from galaxydist.cluster.doctor.room import quota_left
from galaxydist.cluster.doctor.software import check_gpus, check_installation, check_matmul, find_gpus
from galaxydist.cpus import available_cores, bound_cores, cpu_quota

SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Place:
    """What a machine is looked at for.

    Args:
        data_root: the data root.
        runs: the folder of run folders.
        scratch: of the profile, perhaps with variables of the process; None: TMPDIR.
        gpus: that a process must see.
        ranks: processes of a job on the machine.
        devices: that a product of matrices is tried on; None: all.
    """

    data_root: Path
    runs: Path
    scratch: Path | None = None
    gpus: int = 0
    ranks: int = 1
    devices: tuple[str, ...] | None = None


def check_machine(place: Place, environ: Mapping[str, str]) -> list[Check]:
    """Everything of this machine and this process.

    Args:
        place: what it is looked at for.
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
