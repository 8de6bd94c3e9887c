"""A rank of a run that goes wrong, for tests of the watchdog: ``hanging_rank.py FAULT FAULTY_RANK STACKS_DIR TIMEOUT``.

Runs under torchrun, or alone. Says ``step N`` on standard output as it goes.
"""

import os
import re
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from galaxydist.training.health.watchdog import Watchdog, collective_timeout, heartbeat_store

STEPS_BEFORE = 5


def sleep_forever_in_data() -> None:
    time.sleep(1000)


def hold_the_lock_in_c() -> None:
    """A regular expression that needs exponential time: the matcher is C code and never lets the lock go."""
    re.match(r"(a+)+$", "a" * 60 + "b")


def work_slowly(watchdog: Watchdog) -> None:
    """A healthy rank that needs longer than the timeout for a long phase with signs of life, while the others wait for it."""
    for _ in range(8):
        time.sleep(0.5)
        watchdog.beat(STEPS_BEFORE, "validation")


def go_wrong(fault: str, watchdog: Watchdog) -> None:
    if fault == "sleep":
        sleep_forever_in_data()
    elif fault == "lock":
        hold_the_lock_in_c()
    elif fault == "slow":
        work_slowly(watchdog)


def main(fault: str, faulty_rank: int, stacks_dir: Path, timeout_s: float, start_s: float | None = None) -> None:
    """Take steps, until the fault comes."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        dist.init_process_group("gloo", timeout=collective_timeout(timeout_s))
    with Watchdog(rank, world_size, timeout_s, heartbeat_store(world_size), stacks_dir, start_s=start_s) as watchdog:
        for step in range(STEPS_BEFORE + 5 if fault in ("slow", "start") else 1000):
            watchdog.beat(step, "data")
            if fault == "start" and step == 0:
                time.sleep(3 * timeout_s)
            if step == STEPS_BEFORE and rank == faulty_rank:
                go_wrong(fault, watchdog)
            for _ in range(40 if fault == "coarse" else 1):  # two seconds without a beat
                time.sleep(0.05)
            watchdog.beat(step, "forward/backward")
            if world_size > 1:
                dist.all_reduce(torch.ones(3))
            print(f"rank {rank} step {step}", flush=True)
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4]))
