"""For tests on the real SLURM of ``slurm/bed.py``: send batch scripts, wait, look what became of them, and tidy up."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from bed import Bed
from bed_processes import kill_all

# States of a job on which SLURM itself will not act any more.
FINAL = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"})

Found = TypeVar("Found")
# No test says how fast a machine is: a condition is waited for as long as this.
PATIENCE_S = 300.0


@dataclass(frozen=True)
class Ended:
    """A job that is over: its number, its last state, and what it printed."""

    job_id: str
    state: str
    output: str


def wait_for(look: Callable[[], Found], what: str | Callable[[], str] = "", longest_pause_s: float = 0.3) -> Found:
    """What ``look`` finds, as soon as that is true (not empty, not None).

    Args:
        look: asked again and again, less often as time goes by: a question to SLURM costs two processes.
        what: is waited for, for the message of a failure.
        longest_pause_s: between two looks.
    """
    deadline, pause_s = time.monotonic() + PATIENCE_S, 0.05
    while not (found := look()):
        if time.monotonic() > deadline:
            words = what() if callable(what) else what
            raise AssertionError(f"not within {PATIENCE_S:g} s: {words or 'what the test waits for'}")
        time.sleep(min(pause_s, longest_pause_s))
        pause_s *= 1.1
    return found


def submit(bed: Bed, script: str, *options: str, folder: Path) -> str:
    """sbatch for the lines of a shell script; the job's number. It runs in ``folder`` and prints to ``folder/NUMBER.out``."""
    places = (f"--chdir={folder}", f"--output={folder}/%j.out", "--open-mode=append")
    return bed.run("sbatch", "--parsable", *places, *options, text=f"#!/bin/bash\n{script}\n").strip()


def run_batch(bed: Bed, script: str, *options: str, folder: Path) -> Ended:
    """``submit``, and wait for the end."""
    job_id = submit(bed, script, *options, folder=folder)
    state = wait_state(bed, job_id, *FINAL)
    return Ended(job_id, state, (folder / f"{job_id}.out").read_text())


def job_state(bed: Bed, job_id: str) -> str:
    """In SLURM's words, such as RUNNING; from slurmctld while it knows the job, then from the accounts; "" where neither does."""
    known = bed.run("squeue", "-h", "--me", "--states=all", "-o", "%i %T", "--array")
    states = dict(line.split() for line in known.splitlines())
    return states.get(job_id) or bed.run("sacct", "-nPX", "-j", job_id, "-o", "state").partition("\n")[0].partition(" ")[0]


def wait_state(bed: Bed, job_id: str, *states: str) -> str:
    """Until the job is in one of ``states``; which."""
    return wait_for(lambda: state if (state := job_state(bed, job_id)) in states else "", f"{job_id} in {states}")


def num_restarts(bed: Bed, job_id: str) -> int:
    """How often SLURM has put the job into the queue again. Known for some minutes after the job's end."""
    fields = dict(word.split("=", 1) for word in bed.run("scontrol", "-o", "show", "job", job_id).split() if "=" in word)
    return int(fields["Restarts"])


def processes_left(bed: Bed) -> dict[int, str]:
    """What jobs have left running or still run: command lines by process number."""
    return bed.job_processes()


def tidy(bed: Bed) -> None:
    """What the next test expects: all daemons run, with the bed's settings; no job, no process of one; all nodes idle."""
    if bed.files.settings:
        bed.reconfigure({})
    elif not bed.processes("slurmctld"):
        bed.start_controller()
    bed.run("scancel", "--me")
    kill_all(lambda: {pid: line for pid, line in processes_left(bed).items() if not line.startswith("slurmstepd")}, PATIENCE_S)
    for node in bed.nodes:
        if not any(line.startswith("slurmd ") for line in bed.processes(node).values()):
            bed.start_node(node)
        if any(word in bed.node_state(node) for word in ("down", "drain")):
            bed.run("scontrol", "update", f"nodename={node}", "state=resume")
    wait_for(lambda: not bed.run("squeue", "-h"), what="an empty queue")
    wait_for(lambda: {bed.node_state(node) for node in bed.nodes} == {"idle"}, what="idle nodes")
    wait_for(lambda: not processes_left(bed), what="the end of slurmstepd")
