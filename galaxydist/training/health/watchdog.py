"""Watchdog of a training: ends a run that hangs, and names the ranks that the others wait for; ends this rank if another failed.

The main thread of each rank calls ``beat`` several times a step. When it has not for the time that its phase may take, the rank
asks the others: the run hangs only if every rank is overdue or silent. Then one rank reports which ranks are behind, all ranks
dump the stacks of their threads, and all exit with ``EXIT_HUNG``. A rank that cannot run Python any more is killed by a small
process beside it (``guard_process.py``).

The time during which a process was stopped (Ctrl-Z, SIGSTOP, a suspended job) does not count as idle; the monotonic clock of
Linux stops while the machine is suspended.
"""

import contextlib
import faulthandler
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, NoReturn, TextIO

from galaxydist.distributed import World, write_flight_record
from galaxydist.errors import EXIT_FAILED, EXIT_HUNG, OneRankFailedError
from galaxydist.rank_store import END_S, LONG_TIMEOUT, SEEN_S, ExitTask, RankFailure, RankStore, end_process
from galaxydist.recipe.schema import TrainConfig
from galaxydist.runs.events import EventLog
from galaxydist.runs.folder import RunFolder
from galaxydist.training.health import guard_process
from galaxydist.training.health.heartbeats import Hang, Heartbeat, HeartbeatStore, Verdict

# Nothing else uses the last real-time signal. (macOS has none, so there is no guard.)
DUMP_SIGNAL = int(getattr(signal, "SIGRTMAX", 0))


class StacksFile:
    """The stacks file of a rank, such as ``rank-0003.txt``.

    It is opened at once, since opening a file later may hang, and removed at the end if it is empty. New stacks are appended
    to those of an earlier hang.

    Args:
        folder: created if missing.
        rank: rank of this process.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"rank-{rank:04d}.txt"
        self._file: TextIO = self.path.open("a")
        if DUMP_SIGNAL:
            faulthandler.register(DUMP_SIGNAL, file=self._file, all_threads=True, chain=False)

    def dump(self, title: str) -> None:
        """Write the stacks of all threads, the main thread's first."""
        # faulthandler stops after a hundred threads and writes the main thread last.
        main = sys._current_frames().get(threading.main_thread().ident or 0)
        stack = "".join(traceback.format_stack(main)) if main is not None else ""
        when = time.strftime("%Y-%m-%d %H:%M:%S")
        self._file.write(f"{when} {title}\n\nMain thread (most recent call last):\n{stack}\nAll threads:\n")
        self._file.flush()
        faulthandler.dump_traceback(self._file, all_threads=True)
        self._file.flush()

    def close(self) -> None:
        """Remove the file if nothing was written."""
        if DUMP_SIGNAL:
            faulthandler.unregister(DUMP_SIGNAL)
        self._file.close()
        if self.path.exists() and self.path.stat().st_size == 0:
            self.path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty, or removed by another rank
                self.path.parent.rmdir()


class HangGuard:
    """Start and feed ``guard_process.py``; do nothing where it cannot start (not Linux, no memory).

    Args:
        tick_s: seconds between two checks.
        message: printed when the guard kills this process.
    """

    def __init__(self, tick_s: float, message: str) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        if sys.platform != "linux":
            return
        script = [sys.executable, "-I", "-S", guard_process.__file__]
        arguments = [str(os.getpid()), str(DUMP_SIGNAL), str(tick_s), message]
        try:
            self._process = subprocess.Popen([*script, *arguments], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        except OSError:
            return
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)

    def feed(self, allowed_s: float) -> None:
        """Report that Python runs here, and the seconds until the next report is due."""
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(BlockingIOError, BrokenPipeError):  # the guard is stopped or was killed
                os.write(self._process.stdin.fileno(), b"%.3f\n" % allowed_s)

    def close(self) -> None:
        """Stop the guard process."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


# Phases that may take longer than a step. The first step belongs to the start: it compiles and tunes kernels, and opens files and
# connections; so does the first batch of a validation. Rank 0 draws figures and computes intervals in an evaluation.
START, VALIDATION, SAVING, EVALUATION = "start", "validation", "saving", "evaluation"
# The time that a phase may take without a beat, in timeouts of a step, and the least of it in seconds.
PHASES = {START: (3, 1800.0), VALIDATION: (3, 1800.0), SAVING: (3, 1800.0), EVALUATION: (6, 3600.0)}
# A hung file system or pipe blocks the report for at most this time; most of it would be the wait for the stacks of others.
REPORT_S = 12.0
# Seconds for the event of a hang.
TELL_S = 3.0
# A stopped process gets a whole new interval; if stops never end (time slices of a shared cluster), only running time counts.
MAX_RESTARTS = 3


class Beat(NamedTuple):
    """The position of the main thread (see ``Heartbeat``), and the number of beats so far."""

    step: int
    phase: str
    phase_index: int
    number: int


def phase_allowances(timeout_s: float) -> dict[str, float]:
    """Return the seconds that each phase may take without a beat, for the seconds that a step may take."""
    return {phase: max(factor * timeout_s, least_s) for phase, (factor, least_s) in PHASES.items()}


def collective_timeout(timeout_s: float) -> timedelta:
    """Return the timeout for the process group, longer than the watchdog's of any phase, which names the ranks behind."""
    return timedelta(seconds=max(phase_allowances(timeout_s).values()) + 600) if timeout_s > 0 else LONG_TIMEOUT


def build_watchdog(
    world: World,
    config: TrainConfig,
    folder: RunFolder,
    exit_tasks: Iterable[ExitTask],
    events: EventLog,
    *,
    note: Callable[[Exception], None],
) -> "Watchdog":
    """Build the watchdog of a run."""
    return Watchdog(
        world.rank,
        world.size,
        config.hang_timeout,
        world.store,
        folder.stacks_dir,
        exit_tasks=exit_tasks,
        note=note,
        # Its second line names the ranks behind.
        tell=lambda text, step: events.write("hang", " ".join(map(str.strip, text.splitlines()[:2])), step),
    )


@dataclass
class Watchdog:
    """Context manager around the training and evaluation of one rank.

    Args:
        rank, world_size: rank of this process, and world size.
        timeout_s: seconds without a beat in a step, on any rank, after which the run is ended; 0: only a failure ends it.
        store: messages to the other ranks; None for a single process.
        stacks_dir: folder of the stack dumps, such as ``rank-0003.txt``.
        exit_tasks: done before the process ends; they may change while it runs.
        allowances: seconds by phase; None: ``phase_allowances``.
        tell: called with the report of a hang and the steps done, on the rank that reports it.
        note: called with an error on the rank that has found another one dead.
    """

    rank: int
    world_size: int
    timeout_s: float
    store: RankStore | None
    stacks_dir: Path
    exit_tasks: Iterable[ExitTask] = ()
    allowances: Mapping[str, float] | None = None
    tell: Callable[[str, int | None], None] = lambda _text, _step: None
    note: Callable[[Exception], None] = lambda _error: None

    def __post_init__(self) -> None:
        self._host = socket.gethostname()
        self._allowances = phase_allowances(self.timeout_s) if self.allowances is None else self.allowances
        self._tick_s = min(max(self.timeout_s / 20, 0.05), 5.0)
        self._beat = Beat(-1, START, 0, 0)
        self._first_step = -1
        self._idle_s = 0.0
        self._ended = ""
        self._closing = threading.Event()
        self._others: HeartbeatStore | None = None

    def beat(self, step: int, phase: str) -> None:
        """Record that the main thread makes progress; cheap: call it several times a step, and once a batch in long phases.

        Begin another phase before waiting for other ranks, so that the ranks that wait differ from those that they wait for. All
        ranks pass through the same phases in the same order, with any number of beats in each.

        Args:
            step: steps done.
            phase: the phase that begins or continues now, such as ``data``, ``forward/backward`` or ``saving``.
        """
        last = self._beat
        if last.step == -1:
            self._first_step = step
        phase_index = last.phase_index + (phase != last.phase) if step == last.step else 0
        self._beat = Beat(step, phase, phase_index, last.number + 1)

    def __enter__(self) -> "Watchdog":
        if self.store is not None:
            interval_s = min(max(self.timeout_s / 60, 0.1), 10.0) if self.timeout_s > 0 else 10.0
            self._others = HeartbeatStore(
                self.store, self._heartbeat, interval_s, peer_failed=self._follow, store_lost=self._end_alone
            )
        if self.timeout_s > 0:
            self._stacks = StacksFile(self.stacks_dir, self.rank)
            self._guard = HangGuard(
                self._tick_s,
                f"galaxydist: rank {self.rank} ({self._host}, process {os.getpid()}) is ended; its stacks: {self._stacks.path}; "
                "C code has kept Python from running there",
            )
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ended = "finished" if kind is None else f"failed with {kind.__name__}"
        self._closing.set()
        if self.timeout_s > 0:
            self._thread.join()
        if self._others is not None:
            self._others.close()
        if self.timeout_s > 0:
            self._guard.close()
        self.close_stacks()

    def close_stacks(self) -> None:
        """Remove the file of this rank's stacks if it is empty."""
        if self.timeout_s > 0:
            self._stacks.close()

    @property
    def _allowed_s(self) -> float:
        return self._allowance_of(self._beat)

    def _allowance_of(self, beat: Beat | Heartbeat) -> float:
        """Return the seconds that a phase may take without a beat; all ranks have the same first step, a part of the start."""
        allowed_s = self._allowances.get(beat.phase, self.timeout_s)
        return max(allowed_s, self._allowances[START]) if beat.step == self._first_step else allowed_s

    def _heartbeat(self, serial: int) -> Heartbeat:
        beat = self._beat
        return Heartbeat(
            rank=self.rank,
            host=self._host,
            pid=os.getpid(),
            step=beat.step,
            phase=beat.phase,
            phase_index=beat.phase_index,
            beats=beat.number,
            idle_s=self._idle_s,
            is_overdue=self._idle_s >= self._allowed_s,
            serial=serial,
            sent_at=time.time(),
            ended=self._ended,
        )

    def _watch(self) -> None:
        """Count the time since the last beat in which this process could run, in a thread."""
        last, count, restarts = time.monotonic(), -1, 0
        requested_at: float | None = None
        recheck_s = 2 * self._tick_s
        # The other ranks name this rank before it is killed and they see their connections to it break.
        guard_margin_s = 4 * self._tick_s + (2.0 + self._others.observation_s if self._others is not None else 0.0)
        while not self._closing.wait(self._tick_s):
            now = time.monotonic()
            gap, last = now - last, now
            if self._beat.number != count:
                count, restarts, self._idle_s = self._beat.number, 0, 0.0
            elif gap > 5 * self._tick_s and restarts < MAX_RESTARTS:
                restarts, self._idle_s = restarts + 1, 0.0
            else:
                self._idle_s += min(gap, 2 * self._tick_s)
            self._guard.feed(self._allowed_s + guard_margin_s)
            if self._idle_s < self._allowed_s:
                requested_at = None
            elif requested_at is None:
                requested_at = self._idle_s
                if self._others is not None:
                    self._others.request_verdict()
            elif (verdict := self._poll_verdict(self._idle_s - requested_at)) is not None:
                if verdict.kind != "wait":
                    self._end(verdict)
                # Some rank still works, and this one rightly waits for it.
                requested_at = None
                self._closing.wait(recheck_s)

    def _poll_verdict(self, waited_s: float) -> Verdict | None:
        if self._others is None:
            return Verdict("hung", 1, Hang({self.rank: self._heartbeat(0)}, (), 1))
        verdict = self._others.poll_verdict()
        if verdict is None and waited_s > self._others.max_wait_s:
            return Verdict("lost", error="no answer")
        return verdict

    def _end(self, verdict: Verdict) -> NoReturn:
        """Report the hang, dump the stacks and exit."""
        text = self._message(verdict)

        def report() -> None:
            if text is not None:
                _write(text)
            beat = self._heartbeat(0)
            self._stacks.dump(f"{beat} {beat.position}, for {beat.idle_s:.0f} s")
            write_flight_record(self.stacks_dir, self.rank)
            if self._others is not None and verdict.kind == "hung":
                self._others.wait_for_exit(verdict.num_living)

        def tell() -> None:
            if text is not None:
                self.tell(text, self._beat.step if self._beat.step >= 0 else None)

        self._leave(EXIT_HUNG, [(report, REPORT_S), (tell, TELL_S), *self.exit_tasks])

    def _follow(self, failure: RankFailure, is_finder: bool) -> NoReturn:
        """Leave because another rank has failed: this one would wait for it for ever. A dead rank is reported by its finder."""
        assert self.store is not None
        report: list[ExitTask] = []
        if is_finder:
            report.append((lambda: self.note(OneRankFailedError(str(failure))), TELL_S))
        if self.rank == 0 or (is_finder and failure.rank == 0):
            report.append((lambda: _write(str(failure)), REPORT_S))
        self._leave(failure.code, [*report, *self.exit_tasks, (self.store.wait_until_seen, SEEN_S)])

    def _end_alone(self, error: OneRankFailedError) -> NoReturn:
        """Leave because no other rank can be asked any more."""
        self._leave(EXIT_FAILED, [(lambda: _write(f"rank {self.rank} ends: {error}"), REPORT_S), *self.exit_tasks])

    def _leave(self, code: int, tasks: Iterable[ExitTask]) -> NoReturn:
        if self.timeout_s > 0:
            self._guard.feed(2 * END_S)
        end_process(code, tasks)

    def _message(self, verdict: Verdict) -> str | None:
        behind = verdict.hang.heartbeats.get(verdict.hang.behind[0]) if verdict.hang is not None else None
        longest = behind or self._beat  # the rank that reports may itself wait in a shorter phase
        setting, allowed_s = f"train.hang_timeout={self.timeout_s:g}", self._allowance_of(longest)
        if allowed_s != self.timeout_s:
            phase = "the first step" if longest.step == self._first_step else longest.phase
            setting += f", which allows {phase} {allowed_s:g} s"
        if verdict.hang is not None:
            return verdict.hang.message(setting=setting, stacks=str(self.stacks_dir / "rank-*.txt"), now=time.time())
        if verdict.kind == "lost":
            beat = self._heartbeat(0)
            return (
                f"{beat} hangs {beat.position}, for {beat.idle_s:.0f} s ({setting}), and the others cannot be asked, since the "
                f"store of rank 0 or its launcher is gone or stopped ({verdict.error}). Stacks: {self._stacks.path}"
            )
        return None


def _write(text: str) -> None:
    """Write an error past Python's buffers and their locks, which a hung thread may hold; on a new line, after a progress bar."""
    os.write(2, f"\ngalaxydist: error: {text}\n".encode())
