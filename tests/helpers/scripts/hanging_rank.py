"""A rank of a run that goes wrong, for tests of the watchdog: ``hanging_rank.py FAULT FAULTY_RANK STACKS_DIR TIMEOUT``.

Runs under torchrun, or alone. Says ``step N`` on standard output as it goes.
"""

import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from galaxydist.rank_store import RankStore
from galaxydist.training.health.watchdog import SAVING, VALIDATION, Watchdog, collective_timeout, phase_allowances

STEPS_BEFORE = 5


def sleep_forever_in_data() -> None:
    time.sleep(1000)


def hold_the_lock_in_c() -> None:
    """A regular expression that needs exponential time: the matcher is C code and never lets the lock go."""
    re.match(r"(a+)+$", "a" * 60 + "b")


def work_slowly(watchdog: Watchdog) -> None:
    """A healthy rank with heartbeats that takes longer than the timeout in a phase of a step, while the others wait for it."""
    for _ in range(8):
        time.sleep(0.5)
        watchdog.beat(STEPS_BEFORE, "data")


def go_wrong(fault: str, watchdog: Watchdog) -> None:
    if fault == "sleep":
        sleep_forever_in_data()
    elif fault == "lock":
        hold_the_lock_in_c()
    elif fault == "slow":
        work_slowly(watchdog)
    elif fault == VALIDATION:
        sleep_forever_in_data()
    elif fault == SAVING:
        time.sleep(2.5 * watchdog.timeout_s)


def main(fault: str, faulty_rank: int, stacks_dir: Path, timeout_s: float, allowances: Mapping[str, float] | None = None) -> None:
    """Take steps, until the fault comes.

    Args:
        fault, faulty_rank, stacks_dir, timeout_s: see above.
        allowances: seconds of phases that differ from the watchdog's own.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        dist.init_process_group("gloo", timeout=collective_timeout(timeout_s))
    store = RankStore.of_group(rank, world_size) if world_size > 1 else None
    allowed = {**phase_allowances(timeout_s), **(allowances or {})}
    with Watchdog(rank, world_size, timeout_s, store, stacks_dir, allowances=allowed) as watchdog:
        for step in range(STEPS_BEFORE + 5 if fault in ("slow", "start", "saving") else 1000):
            watchdog.beat(step, "data")
            if fault == "start" and step == 0:
                time.sleep(3 * timeout_s)
            if step == STEPS_BEFORE and fault in (VALIDATION, SAVING):
                watchdog.beat(step, fault)
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
