"""A real SLURM of several nodes on one machine, for tests and experiments.

    eval "$(python slurm/mini_cluster/mini_cluster.py start DIR)"    # some 4 s; sets SLURM_CONF
    srun -N2 hostname
    python slurm/mini_cluster/mini_cluster.py status DIR
    python slurm/mini_cluster/mini_cluster.py stop DIR

All daemons belong to the mini cluster and keep their files in DIR: a munged with its own key, a mariadbd that listens on a socket
only, slurmdbd, slurmctld, and one slurmd for each node. They use free ports of 127.0.0.1, so mini clusters disturb neither each
other nor a SLURM of the machine. Nodes are called n1, n2, ... Each has its own host name and its own view of /etc/hosts (UTS and
mount namespaces), so that the names resolve inside jobs while the machine's files stay unchanged. GPUs are simulated: a job gets
a CUDA_VISIBLE_DEVICES that no other job on the node has, but no device.

It runs as root, or as an ordinary user where the kernel allows user namespaces (then for jobs of this user only).
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from config_files import ConfigFiles, MiniClusterError, Settings

PROGRAMS = ("munged", "mariadbd", "mariadb-install-db", "slurmdbd", "slurmctld", "slurmd", "sbatch", "unshare")
INSTALL = "apt-get install --no-install-recommends slurm-wlm slurmdbd munge mariadb-server"
# Processes are found by their environment, which is empty for a moment while they start, on a busy machine for longer.
MISSING_S = 1.0
TIMEOUT_S = 180
FOREIGN_VARIABLES = re.compile("(SLURM|SLURMD|SBATCH|SRUN|SALLOC|SQUEUE|SACCT|SINFO)_")
# Nothing here has to survive a power failure, and waiting for the disk would take most of the start.
DATABASE_OPTIONS = ("--no-defaults", "--debug-no-sync", "--innodb-flush-method=nosync", "--innodb-log-file-size=4M")


class MiniCluster:
    """A SLURM with its own daemons, accounting database and nodes.

    Args:
        folder: a new or empty folder, or the folder of a stopped mini cluster.
        nodes, cpus, gpus: number of nodes, and CPUs and simulated GPUs of each.
        settings: of slurm.conf; they take precedence over ``config_files.SETTINGS``.
    """

    def __init__(
        self, folder: Path | str, *, nodes: int = 2, cpus: int = 2, gpus: int = 2, settings: Settings | None = None
    ) -> None:
        names = tuple(f"n{number}" for number in range(1, nodes + 1))
        self.files = ConfigFiles(Path(folder).resolve(), names, cpus, gpus, settings or {})
        self._children: list[subprocess.Popen[bytes]] = []

    @classmethod
    def find(cls, folder: Path | str) -> "MiniCluster":
        """Return the mini cluster that was started in a folder."""
        cluster = cls(folder)
        cluster.files = ConfigFiles.read(cluster.files.folder)
        return cluster

    @property
    def conf(self) -> Path:
        """Path of slurm.conf, for SLURM_CONF."""
        return self.files.folder / "slurm.conf"

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the nodes: n1, n2, ..."""
        return self.files.nodes

    @property
    def daemons(self) -> tuple[str, ...]:
        """Names of the daemons in the order of their start; a node's slurmd has the node's name."""
        return ("munged", "mariadbd", "slurmdbd", "slurmctld", *self.nodes)

    def environ(self, base: Mapping[str, str] = os.environ) -> dict[str, str]:
        """Return an environment for SLURM's programs: ``base`` with our SLURM_CONF, without variables of another SLURM or job."""
        kept = {key: value for key, value in base.items() if not FOREIGN_VARIABLES.match(key)}
        return kept | {"SLURM_CONF": str(self.conf)}

    def run(self, *command: str, text: str = "", timeout: float = TIMEOUT_S) -> str:
        """Run a command, such as ``run("sinfo", "-h")``, with ``text`` as its standard input, and return its output."""
        done = subprocess.run(
            command, input=text, env=self.environ(), capture_output=True, text=True, timeout=timeout, check=False
        )
        if done.returncode:
            message = (done.stderr or done.stdout).strip()
            raise MiniClusterError(f"{' '.join(command)} ended with code {done.returncode}: {message}")
        return done.stdout

    def start(self) -> None:
        """Start all daemons, and return once jobs can be submitted; a failed or interrupted start leaves nothing behind."""
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
        # --force: the parent folders may be readable by other users, unlike on a real cluster.
        self._launch("munged", ["munged", "--foreground", "--force", f"--socket={folder}/munge/socket", *secrets])
        database = [*DATABASE_OPTIONS, f"--datadir={folder}/database", *(["--user=root"] if os.geteuid() == 0 else [])]
        options = ["--auth-root-authentication-method=normal", "--skip-test-db", "--skip-name-resolve"]
        if self._launch("mariadb-install-db", ["mariadb-install-db", *database, *options]).wait(TIMEOUT_S):
            raise MiniClusterError(f"mariadb-install-db failed:\n{self._last_lines('mariadb-install-db')}")
        database_socket = folder / "run" / "mariadb.socket"
        self._launch("mariadbd", ["mariadbd", *database, "--skip-networking", f"--socket={database_socket}"])
        self._wait("mariadbd", lambda: _greets(database_socket))
        self._launch("slurmdbd", ["slurmdbd", "-D"], MYSQL_UNIX_PORT=str(database_socket))
        # slurmctld exits if it finds no slurmdbd at its first start.
        self._wait("slurmdbd", lambda: _listens(ports["slurmdbd"]))
        self.start_controller()
        for node in self.nodes:
            self._launch_node(node)
        for node in self.nodes:
            self._wait_node(node)

    def stop(self) -> None:
        """Kill all daemons and jobs, and remove all files except the logs; may be called twice."""
        kill_all(lambda: self.processes("slurmctld"), TIMEOUT_S)  # first, so that it starts nothing more
        kill_all(lambda: self.job_processes() | self.processes(), TIMEOUT_S)
        for child in self._children:
            child.wait()
        self._children.clear()
        self.files.remove()

    def kill_node(self, node: str, *, down: bool = False) -> None:
        """Kill a node's slurmd, its slurmstepds and the processes of its jobs.

        Args:
            node: its name.
            down: report the node's death to slurmctld, which otherwise notices it after some 27 s.
        """
        kill_all(lambda: self.job_processes(node) | self.processes(node), TIMEOUT_S)
        if down:
            self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=killed")

    def start_node(self, node: str) -> None:
        """Start the slurmd of a killed node, and wait until the node can be used."""
        self._launch_node(node)
        self._wait_node(node)

    def stop_controller(self) -> None:
        """Terminate slurmctld, which saves its state; jobs go on."""
        for pid in self.processes("slurmctld"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        self._wait(None, lambda: not self.processes("slurmctld"))

    def start_controller(self) -> None:
        """Start slurmctld, and wait until it answers and knows the states of the nodes."""
        self._launch("slurmctld", ["slurmctld", "-D", "-f", str(self.conf)])
        self._wait("slurmctld", lambda: _listens(self.files.ports["slurmctld"]))
        self._wait("slurmctld", lambda: " is UP" in self.run("scontrol", "ping"))
        for node in self.nodes:
            self._wait("slurmctld", lambda node=node: not self.processes(node) or self.node_state(node) != "unknown")  # type: ignore[misc]

    def reconfigure(self, settings: Settings) -> None:
        """Restart slurmctld with these settings over ``config_files.SETTINGS``; they replace the earlier ones."""
        self.files = dataclasses.replace(self.files, settings=settings)
        self.files.write_slurm_conf()
        self.stop_controller()
        self.start_controller()

    def node_state(self, node: str) -> str:
        """Return a node's state, such as idle, mixed, idle+completing, down+drain or unknown; ``*``: it does not answer."""
        # sinfo may show a state that is 20 s old.
        (state,) = re.findall(r"\bState=(\S+)", self.run("scontrol", "-o", "show", "node", node))
        return str(state).lower()

    def processes(self, daemon: str | None = None) -> dict[int, str]:
        """Return process id -> command line of one daemon (for a node including its slurmstepds), or of all."""
        return find_daemons(self.files.folder, daemon)

    def job_processes(self, node: str | None = None) -> dict[int, str]:
        """Return process id -> command line of the processes of jobs, on one node or on all; see ``find_job_processes``."""
        return find_job_processes(self.files.folder, node)

    def _launch(self, daemon: str, command: Sequence[str], **environ: str) -> subprocess.Popen[bytes]:
        """Start a daemon in its own session, so that it outlives this process and gets no Ctrl-C."""
        if running := self.processes(daemon):
            raise MiniClusterError(f"{daemon} runs already: {running}")
        environ = self.environ() | {"PATH": _path(), DAEMON_VARIABLE: f"{self.files.folder}:{daemon}"} | environ
        with (self.files.folder / "logs" / f"{daemon}.out").open("ab") as log:
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

    def _wait(self, daemon: str | None, is_ready: Callable[[], bool]) -> None:
        """Wait until ``is_ready``; raise MiniClusterError if the daemon ends, or after ``TIMEOUT_S``."""
        deadline, last_seen = time.monotonic() + TIMEOUT_S, time.monotonic()
        while not is_ready():
            for child in self._children:
                child.poll()
            if not daemon or self.processes(daemon):
                last_seen = time.monotonic()
            elif time.monotonic() - last_seen > MISSING_S:
                raise MiniClusterError(f"{daemon} has ended:\n{self._last_lines(daemon)}")
            if time.monotonic() > deadline:
                what = daemon or "the end of slurmctld"
                raise MiniClusterError(f"{what} is not ready after {TIMEOUT_S} s:\n{self._last_lines(daemon)}")
            time.sleep(0.1)  # each poll reads all of /proc

    def _last_lines(self, daemon: str | None) -> str:
        log = self.files.folder / "logs" / f"{daemon}.out"
        return "\n".join(log.read_text(errors="replace").splitlines()[-10:]) if log.is_file() else ""


# Processes are found by their environment, because process ids in files may be reused. Each daemon has
# DAEMON_VARIABLE=DIR:DAEMON, which slurmstepd inherits from slurmd. Processes of jobs have our SLURM_CONF and the
# SLURMD_NODENAME that slurmd sets.

DAEMON_VARIABLE = "SLURM_MINI_CLUSTER_DAEMON"


def find_daemons(folder: Path, daemon: str | None = None) -> dict[int, str]:
    """Return process id -> command line of one daemon of the mini cluster in a folder, or of all."""
    mark = f"\0{DAEMON_VARIABLE}={folder}:{daemon or ''}".encode() + (b"\0" if daemon else b"")
    return {pid: _command_line(pid) for pid, environ in _environs() if mark in environ}


def find_job_processes(folder: Path, node: str | None = None) -> dict[int, str]:
    """Return process id -> command line of the processes of jobs, with slurmstepds and orphans, on one node or on all."""
    environs = dict(_environs())
    end = f"{node}\0" if node else ""
    conf, name = f"\0SLURM_CONF={folder}/slurm.conf\0".encode(), f"\0SLURMD_NODENAME={end}".encode()
    found = {pid for pid, environ in environs.items() if conf in environ and name in environ}
    # A process that has cleared its environment is still in the namespaces of its node.
    namespaces = {_namespace(pid) for pid in found} - {_namespace(os.getpid()), None}
    found |= {pid for pid in environs if namespaces and _namespace(pid) in namespaces}
    lines = {pid: _command_line(pid) for pid in sorted(found - {os.getpid()})}
    return {pid: line for pid, line in lines.items() if not line.startswith("slurmd ")}


def kill_all(find: Callable[[], dict[int, str]], timeout_s: float) -> None:
    """Send SIGKILL to all found processes until none is found twice in a row, since a starting process may be missed once.

    Args:
        find: returns process id -> command line.
        timeout_s: seconds after which it gives up.

    Raises:
        TimeoutError: some processes are still alive.
    """
    deadline, misses = time.monotonic() + timeout_s, 0
    while misses < 2:
        found = find()
        misses = 0 if found else misses + 1
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise TimeoutError(f"alive {timeout_s} s after SIGKILL: {found}")
        time.sleep(0.02)


def _command_line(pid: int) -> str:
    """Return a process's command line; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def _environs() -> Iterator[tuple[int, bytes]]:
    """Yield the initial environment of each readable process, with a NUL before and after each variable."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            yield int(folder.name), b"\0" + (folder / "environ").read_bytes()


def _namespace(pid: int) -> str | None:
    """Return a process's mount namespace; None if it has ended or is not ours."""
    try:
        return str(Path(f"/proc/{pid}/ns/mnt").readlink())
    except OSError:
        return None


# Namespaces of a node. Ranks connect to the first node by its name, so each slurmd, with all processes of its jobs, gets a mount
# namespace in which our hosts file covers /etc/hosts, and a UTS namespace with the node's name. Without namespaces, names that
# resolve to the loopback address serve as well.

BECOME_NODE = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'


def as_node(command: Sequence[str], node: str, hosts: Path) -> list[str]:
    """Return a command that runs ``command`` in a node's namespaces; unchanged if namespaces cannot be made."""
    if not _can_unshare():
        return list(command)
    # Inside, an ordinary user must not appear as root, from whom slurmd expects all privileges.
    user = [] if os.geteuid() == 0 else ["unshare", f"--map-user={os.getuid()}", f"--map-group={os.getgid()}"]
    return ["unshare", *_namespace_options(), "sh", "-c", BECOME_NODE, "sh", str(hosts), node, *user, *command]


def check_names(nodes: Sequence[str]) -> None:
    """Raise MiniClusterError if the nodes' names would not resolve."""
    if not _can_unshare() and not all(_is_loopback(node) for node in nodes):
        raise MiniClusterError(
            f"the names {' '.join(nodes)} would not resolve, since namespaces cannot be made here ('unshare "
            f"{' '.join(_namespace_options())}' fails). Run as root, a container with --cap-add SYS_ADMIN; or add a line to "
            f"/etc/hosts: 127.0.0.1 {' '.join(nodes)}"
        )


def _namespace_options() -> list[str]:
    """Return unshare's options; an ordinary user needs a user namespace to make the others."""
    return ["--mount", "--uts", "--propagation=slave", *([] if os.geteuid() == 0 else ["--map-root-user"])]


def _can_unshare() -> bool:
    probe = ["unshare", *_namespace_options(), "mount", "--bind", "/etc/hosts", "/etc/hosts"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


def _is_loopback(name: str) -> bool:
    try:
        return socket.gethostbyname(name).startswith("127.")
    except OSError:
        return False


def check_programs() -> None:
    """Raise MiniClusterError if a program of SLURM, munge or MariaDB is missing."""
    if missing := [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]:
        raise MiniClusterError(f"not on this machine: {', '.join(missing)}. Install SLURM (Debian, Ubuntu): {INSTALL}")


def _path() -> str:
    # Ordinary users of Debian have no /usr/sbin on their PATH.
    return os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _greets(path: Path) -> bool:
    """Return True if the server behind a socket sends a byte, as mariadbd does once it is ready."""
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
        probe.settimeout(1)
        probe.connect(str(path))
        return bool(probe.recv(1))
    return False


def _print_status(cluster: MiniCluster) -> int:
    daemons = {daemon: cluster.processes(daemon) for daemon in cluster.daemons}
    for daemon, found in daemons.items():
        print(f"{daemon:10} {'runs' if found else 'does not run'} {' '.join(map(str, sorted(found)))}")
    if daemons["slurmctld"]:
        print(f"\n{cluster.run('sinfo')}\n{cluster.run('squeue').rstrip()}")
    return 0 if all(daemons.values()) else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 2 for a bad folder or a missing program, 1 if a daemon does not run."""
    parser = argparse.ArgumentParser(description="A real SLURM of several nodes on one machine.")
    parser.add_argument("action", choices=("start", "stop", "status"))
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder of its files; at most 70 characters")
    for name, meaning in (("nodes", "nodes"), ("cpus", "CPUs of a node"), ("gpus", "simulated GPUs of a node")):
        parser.add_argument(f"--{name}", type=int, default=2, help=f"{meaning} (2)")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    begin = time.monotonic()
    try:
        if options.action == "status":
            return _print_status(MiniCluster.find(options.folder))
        if options.action == "stop":
            MiniCluster.find(options.folder).stop()
            return 0
        cluster = MiniCluster(options.folder, nodes=options.nodes, cpus=options.cpus, gpus=options.gpus)
        cluster.start()
    except MiniClusterError as error:
        print(f"mini cluster: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(f"{len(cluster.nodes)} nodes are ready after {time.monotonic() - begin:.1f} s", file=sys.stderr)
    print(f"export SLURM_CONF={cluster.conf}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
