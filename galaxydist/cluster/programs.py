"""Asking SLURM's programs, and whether anybody answered."""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence

from galaxydist.errors import UserError

TIMEOUT_S = 30.0
# What people set for themselves changes what these programs print; 0: ids of arrays are never shortened.
_OWN_SETTINGS = ("SQUEUE_", "SACCT_", "SCANCEL_", "SINFO_")
_ENVIRONMENT = {"SLURM_BITSTR_LEN": "0", "SLURM_TIME_FORMAT": "standard", "LC_ALL": "C"}
# Of src/common/slurm_errno.c: connect failure, controller in standby, time-outs, lost connections; and our own.
_AWAY = re.compile(
    r"unable to contact|connection (refused|reset|timed out)|socket timed out|zero bytes were transmitted|in standby mode|"
    r"communication|could not be asked|try again",
    re.IGNORECASE,
)


class SchedulerAwayError(UserError):
    """SLURM cannot be asked: it is not on this machine, or does not answer."""


def is_slurm_here() -> bool:
    """SLURM's programs are on this machine."""
    return all(shutil.which(name) for name in ("sbatch", "squeue", "scontrol"))


def ask_slurm(command: Sequence[str], *, text: str = "") -> subprocess.CompletedProcess[str]:
    """What one of SLURM's programs says, whatever its exit code; without the user's own settings of what it prints.

    Args:
        command: the program and its arguments.
        text: its standard input.

    Raises:
        SchedulerAwayError: there is no such program, or it does not answer.
    """
    environ = {name: value for name, value in os.environ.items() if not name.startswith(_OWN_SETTINGS)}
    try:
        return subprocess.run(
            command,
            env=environ | _ENVIRONMENT,
            input=text,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SchedulerAwayError(
            f"SLURM could not be asked: {command[0]} did not answer within {TIMEOUT_S:.0f} s. Try again in a minute."
        ) from None
    except OSError as error:
        raise SchedulerAwayError(f"SLURM could not be asked: {command[0]}: {error.strerror or error}.") from error


def is_away(words: str) -> bool:
    """Whether what one of SLURM's programs said means that nobody answered, not that somebody refused."""
    return _AWAY.search(words) is not None


def last_words(done: subprocess.CompletedProcess[str]) -> str:
    """The last thing that a program complained of."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {done.returncode}"


def check_controller() -> None:
    """scontrol knows at once that slurmctld is down, where the other programs try for 18 s."""
    text = ask_slurm(["scontrol", "ping"]).stdout
    answers = re.findall(r"^Slurmctld\(.*\) (?:at \S+ )?is (UP|DOWN)", text, re.MULTILINE)
    if answers and "UP" not in answers:
        raise SchedulerAwayError("SLURM could not be asked: slurmctld is down. What runs goes on; try again in a minute.")
