"""What a submission needs around it: nobody else who sends the same runs, no signal between SLURM's answer and our record of it,
and no variables of the shell that would change the job."""

import errno
import fcntl
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from galaxydist.cluster.profile import ClusterConfig
from galaxydist.errors import UserError
from galaxydist.paths import DATA_VARIABLE, data_root

LOCK_NAME = ".submitting"
WAIT_S = 120.0
POLL_S = 0.5
# sbatch takes these from the shell where the profile says nothing of them.
_TAKEN = {
    "partition": "SBATCH_PARTITION",
    "account": "SBATCH_ACCOUNT",
    "qos": "SBATCH_QOS",
    "reservation": "SBATCH_RESERVATION",
}
# Which SLURM, not which job.
_KEPT = frozenset({"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT"})
_OF_A_JOB = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_", "SBATCH_")
_OF_A_RANK = frozenset({"MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"})
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def alone_in(folder: Path, wait_s: float = WAIT_S) -> Iterator[None]:
    """Keep other commands from sending runs of a folder while this one looks what is queued and sends.

    On a file system without locks it goes on without.

    Raises:
        UserError: another command has been at it for ``wait_s`` seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait_s
    with (folder / LOCK_NAME).open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    break
                if time.monotonic() > deadline:
                    raise UserError(
                        f"Another command has been submitting runs of {folder} for {wait_s:.0f} s. Wait until it has ended, or "
                        "end it, and give the command again."
                    ) from None
            time.sleep(POLL_S)
        yield


def adopt_settings(cluster: ClusterConfig, environ: Mapping[str, str]) -> ClusterConfig:
    """The profile, with what the user's shell says where it says nothing itself: to sbatch (SBATCH_ACCOUNT and the like), and of
    the data root, which was looked at here. It then stands in the batch script, and the same in that of a job sent again."""
    taken: dict[str, object] = {
        key: environ[name] for key, name in _TAKEN.items() if getattr(cluster, key) is None and environ.get(name)
    }
    if not any(item.startswith(f"{DATA_VARIABLE}=") for item in cluster.environment):
        taken["environment"] = (*cluster.environment, f"{DATA_VARIABLE}={data_root(None, environ).absolute()}")
    return cluster.model_copy(update=taken)


@contextmanager
def plain_environment() -> Iterator[None]:
    """Without variables of a job that this process is part of, and without SBATCH_*, which would win over the batch script."""
    hidden = {
        name: os.environ.pop(name)
        for name in list(os.environ)
        if (name.startswith(_OF_A_JOB) or name in _OF_A_RANK) and name not in _KEPT
    }
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextmanager
def signals_later() -> Iterator[None]:
    """Ctrl-C, SIGTERM and a lost terminal wait until this is done: a job that SLURM has taken must also stand in the run folder.

    What is started meanwhile does not hear SIGINT either: the terminal sends it to sbatch too, and a blocked signal stays blocked
    in what is started. The handlers are for threads of libraries, which may take a signal in the place of this one.
    """
    heard: list[int] = []

    def remember(number: int, _frame: FrameType | None) -> None:
        heard.append(number)

    handlers = {number: signal.signal(number, remember) for number in _SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if signal.SIGINT in heard:
        raise KeyboardInterrupt
    if heard:
        os.kill(os.getpid(), heard[0])
