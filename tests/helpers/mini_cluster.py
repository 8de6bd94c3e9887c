"""For tests on the real SLURM of ``slurm/mini_cluster``: send batch scripts, wait for their ends, and clean up."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mini_cluster import MiniCluster, kill_all

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


def submit(slurm: MiniCluster, script: str, *options: str, folder: Path) -> str:
    """sbatch for the lines of a shell script; the job's number. It runs in ``folder`` and prints to ``folder/NUMBER.out``."""
    places = (f"--chdir={folder}", f"--output={folder}/%j.out", "--open-mode=append")
    return slurm.run("sbatch", "--parsable", *places, *options, text=f"#!/bin/bash\n{script}\n").strip()


def run_batch(slurm: MiniCluster, script: str, *options: str, folder: Path) -> Ended:
    """``submit``, and wait for the end."""
    job_id = submit(slurm, script, *options, folder=folder)
    state = wait_state(slurm, job_id, *FINAL)
    return Ended(job_id, state, (folder / f"{job_id}.out").read_text())


def job_state(slurm: MiniCluster, job_id: str) -> str:
    """In SLURM's words, such as RUNNING; from slurmctld while it knows the job, then from the accounts; "" where neither does."""
    known = slurm.run("squeue", "-h", "--me", "--states=all", "-o", "%i %T", "--array")
    states = dict(line.split() for line in known.splitlines())
    return states.get(job_id) or slurm.run("sacct", "-nPX", "-j", job_id, "-o", "state").partition("\n")[0].partition(" ")[0]


def wait_state(slurm: MiniCluster, job_id: str, *states: str) -> str:
    """Until the job is in one of ``states``; which."""
    return wait_for(lambda: state if (state := job_state(slurm, job_id)) in states else "", f"{job_id} in {states}")


def num_restarts(slurm: MiniCluster, job_id: str) -> int:
    """How often SLURM has put the job into the queue again. Known for some minutes after the job's end."""
    fields = dict(word.split("=", 1) for word in slurm.run("scontrol", "-o", "show", "job", job_id).split() if "=" in word)
    return int(fields["Restarts"])


def processes_left(slurm: MiniCluster) -> dict[int, str]:
    """What jobs have left running or still run: command lines by process number."""
    return slurm.job_processes()


def tidy(slurm: MiniCluster) -> None:
    """Restore the state for the next test: all daemons run with their first settings, and no job is left."""
    if slurm.files.settings:
        slurm.reconfigure({})
    elif not slurm.processes("slurmctld"):
        slurm.start_controller()
    slurm.run("scancel", "--me")
    kill_all(lambda: {pid: line for pid, line in processes_left(slurm).items() if not line.startswith("slurmstepd")}, PATIENCE_S)
    for node in slurm.nodes:
        if not any(line.startswith("slurmd ") for line in slurm.processes(node).values()):
            slurm.start_node(node)
        if any(word in slurm.node_state(node) for word in ("down", "drain")):
            slurm.run("scontrol", "update", f"nodename={node}", "state=resume")
    wait_for(lambda: not slurm.run("squeue", "-h"), what="an empty queue")
    wait_for(lambda: {slurm.node_state(node) for node in slurm.nodes} == {"idle"}, what="idle nodes")
    wait_for(lambda: not processes_left(slurm), what="the end of slurmstepd")
