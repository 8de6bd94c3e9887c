"""One rank of a submitted run: training as in launch.py, with rank and world size from the scheduler."""

import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import psutil

from galaxydist.cluster.records import JobFiles
from galaxydist.cluster.search.trial import train_trial
from galaxydist.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_STOPPED, UserError, exit_code_of, first_line
from galaxydist.job_environment import job_of, master_port, restart_of, start_of
from galaxydist.runs.events import EventLog
from galaxydist.runs.folder import FailureKind, RunFolder
from galaxydist.training.launch import RankWork, launch, train_recipe

# Nothing is sent: connecting a datagram socket only asks the kernel for the route.
ANY_PORT = 9


def find_interface(hostnames: Sequence[str], own_name: str) -> str | None:
    """Find this node's network interface with the route to another node of the job.

    By default gloo uses the interface that the node's own name resolves to, which on Debian is the loopback (127.0.1.1).

    Args:
        hostnames: the job's nodes.
        own_name: this node's name in ``hostnames``.

    Returns:
        The interface's name (``ib0``); None for a job of one node, or if it cannot be found.
    """
    others = [name for name in hostnames if name != own_name]
    if not others:
        return None
    try:
        (family, kind, _, _, address), *_ = socket.getaddrinfo(others[0], ANY_PORT, type=socket.SOCK_DGRAM)
        with socket.socket(family, kind) as route:
            route.connect(address)
            own_address = route.getsockname()[0]
    except OSError:
        return None
    return next(
        (
            name
            for name, addresses in psutil.net_if_addrs().items()
            if own_address in (found.address.partition("%")[0] for found in addresses)
        ),
        None,
    )


@contextmanager
def redirect_output(path: Path) -> Iterator[None]:
    """Append stdout and stderr of this process and its children to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(number) for number in (1, 2)]
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in (1, 2):
        os.dup2(descriptor, number)
    os.close(descriptor)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, old in zip((1, 2), kept, strict=True):
            os.dup2(old, number)
            os.close(old)


LOOPBACK = "127.0.0.1"


def train_task(arguments: tuple[str, ...], run_dir: Path, *, is_trial: bool = False) -> None:
    """Train a run; submitit calls this in every task.

    The exit code is 0 also after a signal stopped the training and everything is saved: with another code srun would end the
    ranks that exit a moment later. The batch script sees from the run folder that the run must continue.

    Args:
        arguments: ``recipe=FILE`` and ``key=value``.
        run_dir: its run folder.
        is_trial: the run is a trial of a search, from which it gets the rest of its settings.

    Raises:
        UserError: the parent of the run folder is not visible on this node.
        SystemExit: with launch.py's exit code, if that is neither 0 nor 75.
    """
    if not run_dir.parent.is_dir():
        raise UserError(
            f"{run_dir.parent} does not exist on this node: run folders must be on a file system that all nodes share"
        )
    environ = os.environ
    rank = set_torch_environment(environ)
    files, folder, start = JobFiles(run_dir), RunFolder(run_dir), start_of(environ)
    print(f"galaxydist: output goes to {files.rank_log(rank)}", flush=True)
    with redirect_output(files.rank_log(rank)):
        print(describe_task(environ), flush=True)
        if rank == 0 and start is None:
            folder.clear_failure()  # an earlier start on this machine has no name of its own either
        note = partial(_write_failure, folder, start, rank)
        code = _launch(arguments, environ, note, partial(train_trial, run_dir=run_dir) if is_trial else train_recipe)
    if code not in (0, EXIT_STOPPED):
        sys.exit(code)


def _launch(
    arguments: tuple[str, ...],
    environ: MutableMapping[str, str],
    write_failure: Callable[[BaseException], None],
    work: RankWork,
) -> int:
    try:
        return launch(arguments, environ, write_failure, work=work)
    except Exception as error:
        traceback.print_exc()  # into the rank's own log
        write_failure(error)
        return EXIT_FAILED


def _write_failure(folder: RunFolder, start: str | None, rank: int, error: BaseException) -> None:
    """Write the failure for the batch script, unless the training has done so."""
    kind: FailureKind = "bad_input" if exit_code_of(error) == EXIT_BAD_INPUT else "crash"
    text = first_line(error)
    suffix = f" (rank {rank})" if rank else ""
    with suppress(OSError, UserError):  # the disk itself may have failed
        written = folder.read_failure()
        if written is None or written["error"] != text:
            is_first = folder.write_failure(kind, None, f"{text}{suffix}", start=start)
            if is_first:
                EventLog(folder.events_path, start).write("failure", f"{text}{suffix}", failure=kind)


def set_torch_environment(environ: MutableMapping[str, str]) -> int:
    """Set torch.distributed's environment variables from submitit's job and return this process's rank.

    CUDA_VISIBLE_DEVICES stays as SLURM set it: submitit would set the local rank, which on a shared node is another job's GPU.
    """
    from submitit import JobEnvironment
    from submitit.helpers import TorchDistributedEnvironment

    job = JobEnvironment()
    # submitit would use MASTER_PORT of the submitting shell, and the same port for every restart.
    environ["MASTER_PORT"] = str(master_port(job.job_id, restart_of(environ)))
    distributed = TorchDistributedEnvironment()
    if job.num_nodes == 1:
        distributed.master_addr = LOOPBACK  # the node's name may resolve to another address
    distributed.export(set_cuda_visible_devices=False, overwrite=True)
    interface = find_interface(job.hostnames, os.environ.get("SLURMD_NODENAME", job.hostname))
    if interface is not None:
        environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    return distributed.rank


def describe_task(environ: MutableMapping[str, str]) -> str:
    """Return a log line about this rank's job, node, GPUs, interface and code."""
    parts = [
        f"job {job_of(environ) or 'local'}, restart {restart_of(environ)}",
        f"rank {environ['RANK']} of {environ['WORLD_SIZE']}",
        f"on {environ.get('SLURMD_NODENAME', 'this machine')}",
        f"process {os.getpid()}",
        f"CUDA_VISIBLE_DEVICES={environ.get('CUDA_VISIBLE_DEVICES', '')}",
        f"interface {environ.get('GLOO_SOCKET_IFNAME', '(by name)')}",
        f"code {Path(__file__).parents[2]}",
    ]
    return f"galaxydist: {', '.join(parts)}"
