"""A real SLURM of several nodes on this one machine, to try things on and to test with.

    eval "$(python slurm/bed.py start DIR)"    # some 4 s; sets SLURM_CONF
    srun -N2 hostname
    python slurm/bed.py status DIR
    python slurm/bed.py stop DIR

Everything is the bed's own and lies in DIR: a munged with its key, a mariadbd that listens on a socket only, slurmdbd, slurmctld
and a slurmd a node. The ports are free ones of 127.0.0.1, so that beds disturb neither one another nor a SLURM of the machine.
Nodes are called n1, n2, ... Each has a host name and a view of /etc/hosts of its own (namespaces of hosts' names and of mounts),
so that the names resolve inside of jobs, while the machine's own files stay as they are. GPUs are pretended: a job gets a
CUDA_VISIBLE_DEVICES that no other job on the node has, but no device.

Works as root, and for an ordinary user where the kernel lets users make namespaces (then for this user's jobs alone).
"""

import argparse
import contextlib
import dataclasses
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bed_files import BedError, BedFiles, Settings
from bed_namespaces import as_node, check_names
from bed_processes import PART_VARIABLE, find_jobs, find_parts, kill_all

PROGRAMS = ("munged", "mariadbd", "mariadb-install-db", "slurmdbd", "slurmctld", "slurmd", "sbatch", "unshare")
INSTALL = "apt-get install --no-install-recommends slurm-wlm slurmdbd munge mariadb-server"
# A process has no environment, by which it is found, for an instant of its start; on a busy machine that may take long.
GONE_S = 1.0
PATIENCE_S = 180
OTHERS_VARIABLES = re.compile("(SLURM|SLURMD|SBATCH|SRUN|SALLOC|SQUEUE|SACCT|SINFO)_")
# Nothing in a bed has to survive a power failure; waiting for the disk would be most of its start.
DATABASE_OPTIONS = ("--no-defaults", "--debug-no-sync", "--innodb-flush-method=nosync", "--innodb-log-file-size=4M")


class Bed:
    """A SLURM of its own.

    Args:
        folder: where it lies; new, empty, or of a bed that was stopped.
        nodes, cpus, gpus: how many nodes, and what each has.
        settings: of slurm.conf, put over ``bed_files.SETTINGS``.
    """

    def __init__(
        self, folder: Path | str, *, nodes: int = 2, cpus: int = 2, gpus: int = 2, settings: Settings | None = None
    ) -> None:
        names = tuple(f"n{number}" for number in range(1, nodes + 1))
        self.files = BedFiles(Path(folder).resolve(), names, cpus, gpus, settings or {})
        self._children: list[subprocess.Popen[bytes]] = []

    @classmethod
    def find(cls, folder: Path | str) -> "Bed":
        """The bed that was started in ``folder``."""
        bed = cls(folder)
        bed.files = BedFiles.read(bed.files.folder)
        return bed

    @property
    def conf(self) -> Path:
        """What SLURM_CONF has to name."""
        return self.files.folder / "slurm.conf"

    @property
    def nodes(self) -> tuple[str, ...]:
        """n1, n2, ..."""
        return self.files.nodes

    @property
    def parts(self) -> tuple[str, ...]:
        """The daemons, in the order in which they are started; a node's slurmd is called as the node."""
        return ("munged", "mariadbd", "slurmdbd", "slurmctld", *self.nodes)

    def environ(self, base: Mapping[str, str] = os.environ) -> dict[str, str]:
        """``base`` for SLURM's commands: with this bed's SLURM_CONF, and without what another SLURM or a job has set."""
        kept = {key: value for key, value in base.items() if not OTHERS_VARIABLES.match(key)}
        return kept | {"SLURM_CONF": str(self.conf)}

    def run(self, *command: str, text: str = "", timeout: float = PATIENCE_S) -> str:
        """What a command prints, as in ``bed.run("sinfo", "-h")``; ``text`` is its standard input."""
        done = subprocess.run(
            command, input=text, env=self.environ(), capture_output=True, text=True, timeout=timeout, check=False
        )
        if done.returncode:
            raise BedError(f"{' '.join(command)} ended with code {done.returncode}: {(done.stderr or done.stdout).strip()}")
        return done.stdout

    # Starting and stopping

    def start(self) -> None:
        """Start everything, and return once jobs can be submitted. Leaves nothing behind where that fails or is interrupted."""
        check_programs()
        check_names(self.nodes)
        self.files.claim()
        try:
            self.files = self.files.write()
            self._start_daemons()
        except BaseException:
            self.stop()
            raise

    def _start_daemons(self) -> None:
        folder, ports = self.files.folder, self.files.ports
        secrets = [f"--{name}-file={folder}/munge/{name}" for name in ("key", "pid", "seed", "log")]
        # Forced: what lies above need not be closed to others as on a real cluster.
        self._launch("munged", ["munged", "--foreground", "--force", f"--socket={folder}/munge/socket", *secrets])
        database = [*DATABASE_OPTIONS, f"--datadir={folder}/database", *(["--user=root"] if os.geteuid() == 0 else [])]
        options = ["--auth-root-authentication-method=normal", "--skip-test-db", "--skip-name-resolve"]
        if self._launch("mariadb-install-db", ["mariadb-install-db", *database, *options]).wait(PATIENCE_S):
            raise BedError(f"mariadb-install-db failed:\n{self._last_words('mariadb-install-db')}")
        door = folder / "run" / "mariadb.socket"
        self._launch("mariadbd", ["mariadbd", *database, "--skip-networking", f"--socket={door}"])
        self._wait("mariadbd", lambda: _greets(door))
        self._launch("slurmdbd", ["slurmdbd", "-D"], MYSQL_UNIX_PORT=str(door))
        # A slurmctld that finds no slurmdbd when it starts for the first time gives up.
        self._wait("slurmdbd", lambda: _listens(ports["slurmdbd"]))
        self.start_controller()
        for node in self.nodes:
            self._launch_node(node)
        for node in self.nodes:
            self._wait_node(node)

    def stop(self) -> None:
        """Kill all that runs in the bed, jobs too, and remove its files but for the logs. To stop twice does no harm."""
        kill_all(lambda: self.processes("slurmctld"), PATIENCE_S)  # first: nothing is started any more
        kill_all(lambda: self.job_processes() | self.processes(), PATIENCE_S)
        for child in self._children:
            child.wait()
        self._children.clear()
        self.files.remove()

    def kill_node(self, node: str, *, down: bool = False) -> None:
        """The node dies: SIGKILL for its slurmd, its slurmstepds and what its jobs run there.

        The controller notices after some 27 s; ``down`` tells it at once.
        """
        kill_all(lambda: self.job_processes(node) | self.processes(node), PATIENCE_S)
        if down:
            self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=killed")

    def start_node(self, node: str) -> None:
        """Start the slurmd of a node that was killed, and wait until the node can be used."""
        self._launch_node(node)
        self._wait_node(node)

    def stop_controller(self) -> None:
        """End slurmctld in the proper way: it saves its state. Jobs go on."""
        for pid in self.processes("slurmctld"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        self._wait(None, lambda: not self.processes("slurmctld"))

    def start_controller(self) -> None:
        """Start slurmctld, and wait until it answers."""
        self._launch("slurmctld", ["slurmctld", "-D", "-f", str(self.conf)])
        self._wait("slurmctld", lambda: _listens(self.files.ports["slurmctld"]))
        self._wait("slurmctld", lambda: " is UP" in self.run("scontrol", "ping"))
        # After a restart it asks the nodes first.
        for node in self.nodes:
            self._wait("slurmctld", lambda node=node: not self.processes(node) or self.node_state(node) != "unknown")  # type: ignore[misc]

    def reconfigure(self, settings: Settings) -> None:
        """Restart slurmctld with these settings over ``bed_files.SETTINGS``; those given before are gone."""
        self.files = dataclasses.replace(self.files, settings=settings)
        self.files.write_slurm_conf()
        self.stop_controller()
        self.start_controller()

    # What is there

    def node_state(self, node: str) -> str:
        """Such as idle, allocated, mixed, idle+completing, down, down+drain, unknown; with a ``*`` where it does not answer."""
        # sinfo may show a state of some 20 s ago.
        (state,) = re.findall(r"\bState=(\S+)", self.run("scontrol", "-o", "show", "node", node))
        return str(state).lower()

    def processes(self, part: str | None = None) -> dict[int, str]:
        """The bed's own, command lines by process number: of one part (a node's slurmstepds are part of it), or of all."""
        return find_parts(self.files.folder, part)

    def job_processes(self, node: str | None = None) -> dict[int, str]:
        """What jobs run, slurmstepds and orphans too, command lines by process number: on one node, or on all."""
        return find_jobs(self.files.folder, node)

    # How it is done

    def _launch(self, part: str, command: Sequence[str], **environ: str) -> subprocess.Popen[bytes]:
        """Start a daemon, which outlives this process: in a session of its own, so that a Ctrl-C does not reach it."""
        if running := self.processes(part):
            raise BedError(f"{part} runs already: {running}")
        environ = self.environ() | {"PATH": _path(), PART_VARIABLE: f"{self.files.folder}:{part}"} | environ
        with (self.files.folder / "logs" / f"{part}.out").open("ab") as log:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environ, cwd="/", start_new_session=True
            )
        self._children.append(child)
        return child

    def _launch_node(self, node: str) -> None:
        slurmd = ["slurmd", "-D", "-f", str(self.conf), "-N", node]
        self._launch(node, as_node(slurmd, node, self.files.folder / "hosts"), SLURMD_NODENAME=node)

    def _wait_node(self, node: str) -> None:
        self._wait(node, lambda: self.node_state(node).split("+")[0] in {"idle", "mixed", "allocated"})

    def _wait(self, part: str | None, ready: Callable[[], bool]) -> None:
        """Until ``ready``; a ``part`` that ends instead, or three minutes, are an error."""
        deadline, last_seen = time.monotonic() + PATIENCE_S, time.monotonic()
        while not ready():
            for child in self._children:
                child.poll()
            if not part or self.processes(part):
                last_seen = time.monotonic()
            elif time.monotonic() - last_seen > GONE_S:
                raise BedError(f"{part} has ended:\n{self._last_words(part)}")
            if time.monotonic() > deadline:
                raise BedError(f"{part or 'what was ended'} is not ready after {PATIENCE_S} s:\n{self._last_words(part)}")
            time.sleep(0.1)  # each look reads all of /proc

    def _last_words(self, part: str | None) -> str:
        log = self.files.folder / "logs" / f"{part}.out"
        return "\n".join(log.read_text(errors="replace").splitlines()[-10:]) if log.is_file() else ""


def check_programs() -> None:
    """Raises ``BedError`` where SLURM's programs, or those that a bed needs beside them, are not on this machine."""
    if missing := [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]:
        raise BedError(f"not on this machine: {', '.join(missing)}. Install SLURM (Debian, Ubuntu): {INSTALL}")


def _path() -> str:
    # Ordinary users of Debian have no /usr/sbin on their PATH.
    return os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _greets(door: Path) -> bool:
    """Whether the server behind a socket speaks, as mariadbd does once it is ready."""
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
        probe.settimeout(1)
        probe.connect(str(door))
        return bool(probe.recv(1))
    return False


def _print_status(bed: Bed) -> int:
    parts = {part: bed.processes(part) for part in bed.parts}
    for part, found in parts.items():
        print(f"{part:10} {'runs' if found else 'does not run'} {' '.join(map(str, sorted(found)))}")
    if parts["slurmctld"]:
        print(f"\n{bed.run('sinfo')}\n{bed.run('squeue').rstrip()}")
    return 0 if all(parts.values()) else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; its exit code: 2 where something is missing or cannot be used as asked, 1 where a part does not run."""
    parser = argparse.ArgumentParser(description="A real SLURM of several nodes on this one machine.")
    parser.add_argument("action", choices=("start", "stop", "status"))
    parser.add_argument("folder", metavar="DIR", type=Path, help="where all of it lies; at most 70 characters")
    for name, meaning in (("nodes", "nodes"), ("cpus", "CPUs of a node"), ("gpus", "pretended GPUs of a node")):
        parser.add_argument(f"--{name}", type=int, default=2, help=f"{meaning} (2)")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    begin = time.monotonic()
    try:
        if options.action == "status":
            return _print_status(Bed.find(options.folder))
        if options.action == "stop":
            Bed.find(options.folder).stop()
            return 0
        bed = Bed(options.folder, nodes=options.nodes, cpus=options.cpus, gpus=options.gpus)
        bed.start()
    except BedError as error:
        print(f"slurm bed: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(f"{len(bed.nodes)} nodes are ready after {time.monotonic() - begin:.1f} s", file=sys.stderr)
    print(f"export SLURM_CONF={bed.conf}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
