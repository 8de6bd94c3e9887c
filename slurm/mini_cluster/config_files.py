"""Configuration files of a mini cluster, and its folder."""

import contextlib
import dataclasses
import getpass
import json
import random
import re
import secrets
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

Settings: TypeAlias = Mapping[str, str | int]

# slurmd makes sockets such as DIR/spool/n1/n1_123456.4294967291; the kernel allows 107 characters.
LONGEST_FOLDER = 70
# Below the kernel's ephemeral ports.
PORTS = range(20000, 32000)
# JSON file of the shape and the ports; it exists while the mini cluster runs.
RECORD = "mini_cluster.json"
PROGRAM = "slurm/mini_cluster/mini_cluster.py"
FOLDERS = ("munge", "database", "state", "spool", "devices", "run", "logs")

# Short delays and no enforcement of limits; see slurm.conf(5).
SETTINGS: dict[str, str | int] = {
    "ClusterName": "mini",
    "AuthType": "auth/munge",
    "CommunicationParameters": "NoCtldInAddrAny,NoInAddrAny",  # loopback only
    "ProctrackType": "proctrack/linuxproc",
    "TaskPlugin": "task/none",
    "MpiDefault": "none",
    "SelectType": "select/cons_tres",
    "SelectTypeParameters": "CR_Core_Memory",
    "DefMemPerCPU": 1000,  # without it, a job that requests no memory gets all of a node's
    "SlurmdParameters": "config_overrides",  # nodes have the CPUs and memory given here, whatever the machine has
    "PropagateResourceLimits": "NONE",
    "JobRequeue": 1,
    "PreemptType": "preempt/partition_prio",
    "PreemptMode": "REQUEUE",
    "SchedulerParameters": "bf_interval=1,sched_interval=2",
    "SlurmctldParameters": "preempt_send_user_signal",
    "KillWait": 10,
    "SlurmdTimeout": 10,
    "ReturnToService": 2,
    "GresTypes": "gpu",
    "AccountingStorageType": "accounting_storage/slurmdbd",
    "DebugFlags": "NO_CONF_HASH",  # MiniCluster.reconfigure restarts only slurmctld
    "MailProg": "/bin/true",
}
PARTITIONS = {"low": "Default=YES PriorityTier=1 GraceTime=15", "high": "PriorityTier=10"}


class MiniClusterError(Exception):
    """The mini cluster cannot be used as requested; the message says what is wrong and what to do."""


@dataclasses.dataclass(frozen=True)
class ConfigFiles:
    """The shape of a mini cluster, and its files.

    Args:
        folder: of its files.
        nodes: their names.
        cpus, gpus: of each node.
        settings: of slurm.conf, over ``SETTINGS``.
        ports: daemon -> port; a node's slurmd has the node's name.
    """

    folder: Path
    nodes: tuple[str, ...]
    cpus: int
    gpus: int
    settings: Settings
    ports: dict[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.nodes or self.cpus < 1 or self.gpus < 0:
            raise MiniClusterError(f"{len(self.nodes)} nodes of {self.cpus} CPUs and {self.gpus} GPUs: at least 1, 1 and 0")

    @classmethod
    def read(cls, folder: Path) -> "ConfigFiles":
        """Read the shape of the mini cluster that was started in a folder."""
        try:
            found = json.loads((folder / RECORD).read_text())
        except (OSError, ValueError):
            raise MiniClusterError(f"there is no mini cluster in {folder}; start one: python {PROGRAM} start {folder}") from None
        return cls(folder, **found | {"nodes": tuple(found["nodes"])})

    def claim(self) -> None:
        """Create the folder.

        Raises:
            MiniClusterError: its path is too long or has other characters, or it holds other files or a mini cluster.
        """
        name = str(self.folder)
        if len(name) > LONGEST_FOLDER or not re.fullmatch(r"[\w./+-]+", name, re.ASCII):
            raise MiniClusterError(
                f"{name} cannot hold a mini cluster: give a path of at most {LONGEST_FOLDER} letters, digits and ./+-_"
            )
        if (self.folder / RECORD).exists():
            raise MiniClusterError(f"a mini cluster runs in {name} already; stop it first: python {PROGRAM} stop {name}")
        if self.folder.exists() and (not self.folder.is_dir() or {path.name for path in self.folder.iterdir()} - {"logs"}):
            raise MiniClusterError(f"{name} holds something else; give a new folder")
        self.folder.mkdir(parents=True, exist_ok=True)

    def write(self) -> "ConfigFiles":
        """Write all files into the claimed folder; the result has the free ports that were chosen."""
        shutil.rmtree(self.folder / "logs", ignore_errors=True)
        for name in (*FOLDERS, *(f"spool/{node}" for node in self.nodes)):
            (self.folder / name).mkdir(mode=0o700, exist_ok=True)
        files = dataclasses.replace(self, ports=_free_ports(("slurmdbd", "slurmctld", *self.nodes)))
        record = {key: value for key, value in vars(files).items() if key != "folder"}
        (self.folder / RECORD).write_text(json.dumps(record))
        _write_private(self.folder / "munge" / "key", secrets.token_bytes(128))
        _write_private(self.folder / "slurmdbd.conf", files._slurmdbd_conf().encode())
        files.write_slurm_conf()
        (self.folder / "hosts").write_text(f"{Path('/etc/hosts').read_text()}\n127.0.0.1 {' '.join(self.nodes)}\n")
        for number in range(self.gpus):
            # SLURM requires a device file.
            (self.folder / "devices" / f"gpu{number}").symlink_to("/dev/null")
        gres = f"Name=gpu File={self.folder}/devices/gpu[0-{self.gpus - 1}]\n"
        (self.folder / "gres.conf").write_text(gres if self.gpus else "")
        return files

    def remove(self) -> None:
        """Remove all files except the logs."""
        for name in (*FOLDERS, "slurm.conf", "slurmdbd.conf", "gres.conf", "hosts", RECORD):
            path = self.folder / name
            if path.is_dir() and name != "logs":
                shutil.rmtree(path)
            elif path.is_file():
                path.unlink()

    def write_slurm_conf(self) -> None:
        """Write slurm.conf."""
        folder, host = self.folder, socket.gethostname().split(".")[0]
        own: dict[str, str | int] = {
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmctldPort": self.ports["slurmctld"],
            "SlurmUser": getpass.getuser(),
            "SlurmdUser": getpass.getuser(),
            # A requeued job waits for these seconds and one more; SLURM replaces less than 5 by its default of 120.
            "AuthInfo": f"socket={folder}/munge/socket,cred_expire=5",
            "AccountingStorageHost": "127.0.0.1",
            "AccountingStoragePort": self.ports["slurmdbd"],
            "AccountingStoragePass": f"{folder}/munge/socket",
            "StateSaveLocation": f"{folder}/state",
            "SlurmdSpoolDir": f"{folder}/spool/%n",
            "SlurmctldPidFile": f"{folder}/run/slurmctld.pid",
            "SlurmdPidFile": f"{folder}/run/%n.pid",
            "SlurmctldLogFile": f"{folder}/logs/slurmctld.log",
            "SlurmdLogFile": f"{folder}/logs/%n.log",
        }
        shape = f"CPUs={self.cpus} Sockets=1 CoresPerSocket={self.cpus} ThreadsPerCore=1 RealMemory={5000 * self.cpus}"
        shape += f" Gres=gpu:{self.gpus}" if self.gpus else ""
        lines = [f"{key}={value}" for key, value in (own | SETTINGS | dict(self.settings)).items()]
        for name in self.nodes:
            lines.append(f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={self.ports[name]} {shape}")
        lines += [f"PartitionName={name} Nodes={','.join(self.nodes)} {options}" for name, options in PARTITIONS.items()]
        (folder / "slurm.conf").write_text("\n".join(lines) + "\n")

    def _slurmdbd_conf(self) -> str:
        settings = {
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={self.folder}/munge/socket",
            "CommunicationParameters": "NoInAddrAny",
            "DbdHost": "localhost",
            "DbdPort": self.ports["slurmdbd"],
            "SlurmUser": getpass.getuser(),
            "StorageType": "accounting_storage/mysql",
            "StorageHost": "localhost",
            "StorageUser": "root",
            "StorageLoc": "slurm",
            "PidFile": f"{self.folder}/run/slurmdbd.pid",
            "LogFile": f"{self.folder}/logs/slurmdbd.log",
        }
        return "".join(f"{key}={value}\n" for key, value in settings.items())


def _write_private(path: Path, content: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(content)


def _free_ports(names: tuple[str, ...]) -> dict[str, int]:
    found: list[int] = []
    candidates = iter(random.sample(PORTS, k=len(PORTS)))
    while len(found) < len(names):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port := next(candidates)))
            found.append(port)
    return dict(zip(names, found, strict=True))
