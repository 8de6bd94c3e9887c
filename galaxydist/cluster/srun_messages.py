"""Causes of a job's end, from the messages of srun, slurmstepd and bash."""

import os
import re
import signal
import stat
from collections.abc import Sequence
from pathlib import Path

from galaxydist.runs.metrics_file import read_tail

# The batch script prints this to its stderr at every start; earlier lines belong to earlier starts.
START_MARK = "galaxydist: start "
# The argument of ``after_srun`` after SLURM has sent SIGTERM to the batch script.
TOLD_TO_END = "told-to-end"
# src/srun/libsrun/launch.c: task_exit and node failure messages.
_TASKS = re.compile(r"srun: error: (?P<node>\S+): tasks? (?P<rank>\d+)\S*: (?P<end>.+?)(?: \(core dumped\))?$")
_NODE_FAILURE = re.compile(r"srun: error: Node failure on (\S+)")
# After such a line SLURM itself ends the tasks.
_ENDED_BY_SLURM = re.compile(r"forcing job termination|CANCELLED AT|Job step aborted")
_SIGNALS = {signal.strsignal(number): number for number in signal.valid_signals()}

# Message of a job that cannot start -> cause and remedy.
_REMEDIES = (
    (
        re.compile(r"execve\(\): (?P<name>\S+): (?:No such file|Permission denied)"),
        "its nodes do not have {name}: set cluster.python to a Python that all of them have",
    ),
    (
        re.compile(r"line \d+: (?P<name>\S*python\S*): (?:No such file|command not found|Permission denied)"),
        "its nodes do not have {name}: set cluster.python to a Python that all of them have",
    ),
    (
        re.compile(r"No module named '?(?P<name>galaxydist|submitit|torch)\b"),
        "the Python of its nodes has no {name}: set cluster.python to one with galaxydist",
    ),
    (
        re.compile(r"[Cc]ould not open std(?:out|err) file (?P<name>\S+?)(?:_log\.\w+)?: (?:No such file|Permission denied)"),
        "a node does not see {name}: put the runs on a file system that all nodes share (run.root=FOLDER)",
    ),
)


def read_own_stderr() -> list[str]:
    """Return the stderr of this batch script and its srun since the start of the script."""
    stderr = Path("/proc/self/fd/2")
    try:
        if not stat.S_ISREG(os.fstat(2).st_mode):
            return []
        lines = [line.decode(errors="replace") for line in read_tail(stderr, whole=False)]
    except OSError:
        return []
    starts = [number for number, line in enumerate(lines) if line.startswith(START_MARK)]
    return lines[starts[-1] :] if starts else lines


def find_death(lines: Sequence[str]) -> str:
    """Return the node or rank that died first, with its signal; empty if none died (exiting with a code does not count).

    Args:
        lines: of one start, oldest first.
    """
    if node := next((match[1] for line in lines if (match := _NODE_FAILURE.search(line))), ""):
        return f"node {node} failed"
    for line in lines:
        if _ENDED_BY_SLURM.search(line):
            return ""
        if match := _TASKS.search(line):
            rank = f"rank {match['rank']} on {match['node']}"
            if match["end"] == "Out Of Memory":
                return f"{rank} took more memory than the job has: raise cluster.memory"
            number = _SIGNALS.get(match["end"])
            if number is None:
                return ""
            cause = " (out of memory, or killed by hand)" if number == signal.SIGKILL else ""
            return f"{rank} was ended by signal {number}, {signal.Signals(number).name}{cause}"
    return ""


def find_remedy(lines: Sequence[str]) -> str:
    """Return the defect of the nodes with its remedy; empty if the lines report none."""
    for line in lines:
        for pattern, remedy in _REMEDIES:
            if match := pattern.search(line):
                return remedy.format(name=match["name"])
    return ""
