"""Ends a run that hangs, and says whom it waits for.

Each rank beats several times a step. When its beats have stopped for ``timeout_s`` it asks the others: only when every rank is
overdue or silent does the run hang. Then one rank tells the user which ranks are behind, all write the stacks of their threads,
and all end with exit code ``EXIT_HUNG``. A rank that cannot run Python any more is ended from outside, by a small process beside
it (``guard_process.py``).

A process that was stopped (Ctrl-Z, SIGSTOP, a suspended job) is not blamed for the time in between; a suspended machine's
monotonic clock stands still on Linux.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch.distributed as dist

from galaxydist.distributed import World, write_flight_record
from galaxydist.errors import EXIT_HUNG
from galaxydist.recipe.schema import TrainConfig
from galaxydist.runs.folder import RunFolder
from galaxydist.training.health.dumps import HangGuard, StacksFile
from galaxydist.training.health.heartbeats import Answer, Hang, Heartbeat, HeartbeatStore, KeyStore

# A step compiles and tunes kernels, opens files and connections, the first time.
START_FACTOR = 3
LEAST_START_S = 1800.0
# Whatever a hung file system or pipe does to the last words, the process ends.
LAST_WORDS_S = 20.0
LEAVING_S = 5.0
# A stop gives a whole new interval; where stops never end (time slices of a shared cluster) only running time counts.
MOST_GRACES = 3


class Beat(NamedTuple):
    """Where the main thread is: see ``Heartbeat``."""

    step: int
    phase: str
    place: int
    number: int


def start_allowance(timeout_s: float) -> float:
    """Seconds that the first step may take, where nothing else is asked for."""
    return max(START_FACTOR * timeout_s, LEAST_START_S)


def collective_timeout(timeout_s: float) -> timedelta | None:
    """The timeout to give the process group: longer than the watchdog's, which knows who is behind. None: torch's own."""
    return timedelta(seconds=start_allowance(timeout_s) + 600) if timeout_s > 0 else None


def heartbeat_store(world_size: int) -> KeyStore | None:
    """A place for heartbeats in the store of the process group; None for a process alone."""
    if world_size == 1:
        return None
    from torch._C._distributed_c10d import PrefixStore

    return PrefixStore("galaxydist/heartbeats", dist.distributed_c10d._get_default_store())


def build_watchdog(world: World, config: TrainConfig, folder: RunFolder) -> "Watchdog":
    """The watchdog of a run's loop."""
    return Watchdog(world.rank, world.size, config.hang_timeout, heartbeat_store(world.size), folder.stacks_dir)


def say_on_stderr(text: str) -> None:
    """Write a line past Python's buffers and their locks, which a hung thread may hold."""
    os.write(2, f"\n{text}\n".encode())  # a progress bar may stand there


class Watchdog:
    """A context around the loop of one rank.

    Args:
        rank, world_size: of the process.
        timeout_s: seconds without a beat on any rank after which the run is ended; 0: never.
        store: see ``heartbeat_store``; None for a process alone.
        stacks_dir: where ``rank-0003.txt`` is written.
        host: of this process.
        say: tells the user, on whichever rank found out.
        start_s: seconds that the first step may take (see ``start_allowance``).
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        timeout_s: float,
        store: KeyStore | None,
        stacks_dir: Path,
        *,
        host: str | None = None,
        say: Callable[[str], None] = say_on_stderr,
        start_s: float | None = None,
    ) -> None:
        self._rank = rank
        self._world_size = world_size
        self._timeout_s = timeout_s
        self._store = store
        self._stacks_dir = stacks_dir
        self._host = host or socket.gethostname()
        self._say = say
        self._start_s = start_allowance(timeout_s) if start_s is None else start_s
        self._tick_s = min(max(timeout_s / 20, 0.05), 5.0)
        self._beat = Beat(-1, "start", 0, 0)
        self._first_step = -1
        self._idle_s = 0.0
        self._ended = ""
        self._closing = threading.Event()
        self._others: HeartbeatStore | None = None

    def beat(self, step: int, phase: str) -> None:
        """A sign of life of the main thread: cheap, to be given several times a step and once a batch in long phases.

        Beat with another phase before waiting for other ranks, so that who waits and who is waited for stand in different places.
        Ranks pass through the same phases in the same order, each as often as it likes.

        Args:
            step: steps done.
            phase: what begins now, such as ``data``, ``forward/backward`` or ``saving``.
        """
        last = self._beat
        if step != last.step:
            place = 0
            if last.step == -1:
                self._first_step = step
        else:
            place = last.place + (phase != last.phase)
        self._beat = Beat(step, phase, place, last.number + 1)

    def __enter__(self) -> "Watchdog":
        if self._timeout_s > 0:
            self._stacks = StacksFile(self._stacks_dir, self._rank)
            self._guard = HangGuard(
                self._tick_s,
                f"galaxydist: rank {self._rank} ({self._host}, process {os.getpid()}) is ended; its stacks: {self._stacks.path}; "
                "C code has kept Python from running there",
            )
            if self._store is not None and self._world_size > 1:
                self._others = HeartbeatStore(
                    self._store,
                    self._heartbeat,
                    rank=self._rank,
                    world_size=self._world_size,
                    interval_s=min(max(self._timeout_s / 60, 0.1), 10.0),
                )
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._timeout_s > 0:
            self._ended = "left the loop" if kind is None else f"failed with {kind.__name__}"
            self._closing.set()
            self._thread.join()
            if self._others is not None:
                self._others.close()
            self._guard.close()
            self._stacks.close()

    @property
    def _allowed_s(self) -> float:
        return self._start_s if self._beat.step == self._first_step else self._timeout_s

    def _heartbeat(self, serial: int) -> Heartbeat:
        beat = self._beat
        return Heartbeat(
            rank=self._rank,
            host=self._host,
            pid=os.getpid(),
            step=beat.step,
            phase=beat.phase,
            place=beat.place,
            beats=beat.number,
            idle_s=self._idle_s,
            is_overdue=self._idle_s >= self._allowed_s,
            serial=serial,
            told_at=time.time(),
            ended=self._ended,
        )

    def _watch(self) -> None:
        """The watching thread: counts the time since the last beat in which this process could run."""
        last, count, graces = time.monotonic(), -1, 0
        asked_at: float | None = None
        recheck_s = 2 * self._tick_s
        # The others name this rank before it is ended and they see their connections to it break.
        guard_margin_s = 4 * self._tick_s + (2.0 + self._others.look_s if self._others is not None else 0.0)
        while not self._closing.wait(self._tick_s):
            now = time.monotonic()
            gap, last = now - last, now
            if self._beat.number != count:
                count, graces, self._idle_s = self._beat.number, 0, 0.0
            elif gap > 5 * self._tick_s and graces < MOST_GRACES:
                graces, self._idle_s = graces + 1, 0.0
            else:
                self._idle_s += min(gap, 2 * self._tick_s)
            self._guard.feed(self._allowed_s + guard_margin_s)
            if self._idle_s < self._allowed_s:
                asked_at = None
            elif asked_at is None:
                asked_at = self._idle_s
                self._ask()
            elif (answer := self._take_answer(self._idle_s - asked_at)) is not None:
                if answer.kind != "wait":
                    self._end(answer)
                # Some rank still works, and this one rightly waits for it.
                asked_at = None
                self._closing.wait(recheck_s)

    def _ask(self) -> None:
        if self._others is not None:
            self._others.ask()

    def _take_answer(self, waited_s: float) -> Answer | None:
        if self._others is None:
            alone = {self._rank: self._heartbeat(0)}
            return Answer("hung", 1, Hang(alone, (), 1))
        answer = self._others.take_answer()
        if answer is None and waited_s > self._others.patience_s:
            return Answer("lost", error="no answer")
        return answer

    def _end(self, answer: Answer) -> NoReturn:
        """The last words of this process."""
        self._guard.feed(LAST_WORDS_S)
        deadline = threading.Timer(LAST_WORDS_S, os._exit, (EXIT_HUNG,))
        deadline.daemon = True
        deadline.start()
        try:
            if (text := self._message(answer)) is not None:
                self._say(text)
            beat = self._heartbeat(0)
            self._stacks.dump(f"{beat} {beat.whereabouts}, for {beat.idle_s:.0f} s")
            write_flight_record(self._stacks_dir, self._rank)
            if self._others is not None and answer.kind == "hung":
                self._others.leave_together(answer.num_living, LEAVING_S)
            for stream in (sys.stdout, sys.stderr):
                flushing = threading.Thread(target=stream.flush, daemon=True)
                flushing.start()
                flushing.join(1.0)
        finally:
            os._exit(EXIT_HUNG)

    def _message(self, answer: Answer) -> str | None:
        setting = f"train.hang_timeout={self._timeout_s:g}"
        if answer.hang is not None:
            stacks = str(self._stacks_dir / "rank-*.txt")
            return f"galaxydist: error: {answer.hang.message(setting=setting, stacks=stacks, now=time.time())}"
        if answer.kind == "lost":
            beat = self._heartbeat(0)
            return (
                f"galaxydist: error: {beat} hangs {beat.whereabouts}, for {beat.idle_s:.0f} s ({setting}), and "
                f"the others cannot be asked, since the store of rank 0 or its launcher is gone or stopped ({answer.error}). "
                f"Stacks: {self._stacks.path}"
            )
        return None
