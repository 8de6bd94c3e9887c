"""Events that a training writes into its run folder, and the logs that a restart cuts back."""

import contextlib
import itertools
import os
import socket
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import psutil
import torch

from galaxydist.distributed import World
from galaxydist.errors import EXIT_BAD_INPUT, NonfiniteError, UserError, exit_code_of, first_line
from galaxydist.job_environment import start_of
from galaxydist.runs.events import Event, EventLog
from galaxydist.runs.folder import FailureKind, RunFolder
from galaxydist.runs.metrics_file import TIME_KEY
from galaxydist.tracking.webhook import Webhook

# Starts of this process: a notebook may train several times.
_STARTS = itertools.count()
# A process that is older when it first trains has done something else before.
LONGEST_START_S = 600.0


def began() -> float:
    """Return the time at which a start of a run begins that calls this once, in seconds since 1970.

    It is when the process began, whose imports belong to the run, unless the process has done other work before.
    """
    now, created = time.time(), psutil.Process().create_time()
    return created if next(_STARTS) == 0 and now - created < LONGEST_START_S else now


def cut_back(folder: RunFolder, step: int) -> dict[str, Any]:
    """Cut the logs of a run back to the step of its checkpoint, and return details of its start.

    Returns:
        ``cut_steps``: the logged steps that are repeated; ``cut_points``: step and time of the first and the last line of
        timing.jsonl that was cut off, which give the time that the lost steps took.
    """
    lines = folder.metrics.read()
    logged = lines[-1]["step"] if lines else 0
    timed = [line for line in folder.timing.read() if line["step"] > step and isinstance(line.get(TIME_KEY), float)]
    folder.cut_back(step)
    points = [[line["step"], line[TIME_KEY]] for line in (*timed[:1], *timed[1:][-1:])]
    return {"cut_steps": max(0, logged - step), "cut_points": points}


def write_start(events: EventLog, world: World, step: int, cut: Mapping[str, Any]) -> None:
    """Write the event of a start that begins to train. All ranks call it.

    Args:
        events: of the run.
        world: the processes.
        step: optimizer steps done.
        cut: from ``cut_back``, on rank 0.
    """
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    ranks = world.all_gather((socket.gethostname(), name, world.cores))
    if not world.is_main:
        return
    hosts = list(dict.fromkeys(host for host, _, _ in ranks))
    devices = dict(Counter(device for _, device, _ in ranks))
    processes = "1 process" if world.size == 1 else f"{world.size} processes"
    place = hosts[0] if len(hosts) == 1 else f"{len(hosts)} nodes"
    shown = ", ".join(f"{number} {device}" for device, number in devices.items()) if name != "CPU" else "CPU"
    begin = f"continues from step {step}" if step else "begins"
    again = f", {cut['cut_steps']} logged steps again" if cut["cut_steps"] else ""
    events.write(
        "start",
        f"{begin}{again}: {processes} on {place}, {shown}, precision {world.precision}",
        step,
        world_size=world.size,
        device=world.device.type,
        devices=devices,
        cores=sum(cores for _, _, cores in ranks),
        hosts=hosts,
        precision=world.precision,
        job_id=world.job_id,
        restart=world.restart_count,
        pid=os.getpid(),
        **cut,
    )


def write_failure(folder: RunFolder, events: EventLog, error: Exception, step: int | None, environ: Mapping[str, str]) -> None:
    """Write an error that ends the run, for the decision on a restart and as an event, unless this start has written one.

    Args:
        folder: the run folder.
        events: of the run.
        error: the error.
        step: optimizer steps done, if known.
        environ: the process's environment.
    """
    kind: FailureKind = "bad_input" if exit_code_of(error) == EXIT_BAD_INPUT else "crash"
    if isinstance(error, NonfiniteError):
        kind = "nonfinite"
    text, is_first = first_line(error), True
    with contextlib.suppress(OSError, UserError):  # the disk may be what failed
        is_first = folder.write_failure(kind, step, text, start=start_of(environ))
    if is_first:
        events.write("failure", text, step, failure=kind)


def alert_early(webhook: Webhook, error: Exception) -> None:
    """Post an error of a start whose run folder is not open yet, so that it cannot be an event there."""
    webhook.send(Event(time.time(), "failure", first_line(error)))
    webhook.close()
