"""Signals that ask a run to stop: taken at once, also while the main thread is busy in C code, and acted on by the loop.

Python runs a signal's handler only between two of its own instructions, and a backward pass of minutes is one. So the C part of
the handler wakes a thread (``signal.set_wakeup_fd``), which answers the user and sets the flag.
"""

import _thread
import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from galaxydist.errors import EXIT_INTERRUPTED
from galaxydist.job_environment import STOP_SIGNALS

# A launcher may pass on the Ctrl-C that the terminal has sent to this process too: so soon after the first it is the same one.
ECHO_S = 1.0
# After the second Ctrl-C the process closes what it has open; then it ends, wherever it is.
LEAVING_S = 5.0


def signal_name(number: int) -> str:
    """``Ctrl-C``, ``SIGTERM`` or another signal's name."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


class StopSignal:
    """Set by Ctrl-C, SIGTERM or SIGUSR2 while the context is open. A second Ctrl-C ends the process without saving.

    To be opened in the main thread.

    Args:
        speaks: tell the user on stderr that a signal has arrived; of several processes one should.

    Attributes:
        signal_number: the first signal that arrived, 0 until then.
    """

    def __init__(self, *, speaks: bool = True) -> None:
        self.signal_number = 0
        self._speaks = speaks
        self._previous: dict[int, Any] = {}
        self._interrupted_at: float | None = None
        self._leaves_at: float | None = None

    def __enter__(self) -> "StopSignal":
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._thread = threading.Thread(target=self._listen, name="stop-signals", daemon=True)
        self._thread.start()
        self._previous_wakeup = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Leave the signals to whoever had them before. May be called twice."""
        if not self._previous:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
        signal.set_wakeup_fd(self._previous_wakeup)
        os.close(self._write_end)
        self._thread.join()
        os.close(self._read_end)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        """Python's part of the handler, in the main thread."""
        if self._leaves_at is not None:
            raise KeyboardInterrupt

    def _listen(self) -> None:
        """The thread: a byte is a signal's number; at the end of the pipe the context is closed."""
        while True:
            left_s = None if self._leaves_at is None else max(0.0, self._leaves_at - time.monotonic())
            if not select.select([self._read_end], [], [], left_s)[0]:
                os._exit(EXIT_INTERRUPTED)
            numbers = os.read(self._read_end, 16)
            if not numbers:
                return
            for number in numbers:
                if number in STOP_SIGNALS:
                    self._take(number)

    def _take(self, number: int) -> None:
        now = time.monotonic()
        if number != signal.SIGINT:
            if self.signal_number == 0:
                self._say(f"{signal_name(number)}: stopping after this step")
        elif self._interrupted_at is None:
            self._interrupted_at = now
            self._say("stopping after this step; Ctrl-C again ends without saving")
        elif now - self._interrupted_at >= ECHO_S and self._leaves_at is None:
            self._leaves_at = now + LEAVING_S
            self._say("ending without saving")
            _thread.interrupt_main(signal.SIGINT)
        self.signal_number = self.signal_number or number

    def _say(self, text: str) -> None:
        if self._speaks:
            with contextlib.suppress(OSError):  # past Python's buffers, whose locks the main thread may hold
                os.write(2, f"\ngalaxydist: {text}\n".encode())


# Leaving a long step in the middle, on all ranks at the same place.
#
# A step that takes seconds has gates: before each micro-batch, and after each layer of the model on the way forward and
# back. At a
# gate each rank tells the others whether it was asked to stop, and hears what they told at the gate before: no rank waits
# for
# another, and all leave at the same gate. The step's gradients, batch-norm statistics and everything else that it has
# changed are
# then put back (``Update``), so that it can be taken anew.

# A shorter step is finished: to leave it would save nothing.
LONG_STEP_S = 2.0


class StepAbandoned(BaseException):
    """The step was left in the middle, on every rank at the same place. Not an ``Exception``: nothing on the way may keep it."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"signal {signal_number}")
        self.signal_number = signal_number


class StepGates:
    """The gates of the steps of one rank. All ranks make it together, and pass the same gates in the same order.

    Args:
        world_size: number of ranks; with one, nothing is sent.
        stop: set by a signal.
        layers: the model whose layers have gates, or None: between micro-batches only, as where the layers are compiled together
            or hold parts of one another.
        timeout: of what is sent.

    Attributes:
        is_open: no gates in the next step, which is short. The same on all ranks.
    """

    def __init__(
        self, world_size: int, stop: StopSignal, *, layers: nn.Module | None = None, timeout: timedelta | None = None
    ) -> None:
        self.is_open = False
        self._stop = stop
        self._layers = [module for module in layers.modules() if not any(module.children())] if layers is not None else []
        # On a group of its own, and on the host: what is sent cannot come between the gradients, and no GPU is waited for.
        self._group: Any = dist.new_group(backend="gloo", timeout=timeout) if world_size > 1 else None
        self._told: tuple[torch.Tensor, Any] | None = None

    @contextlib.contextmanager
    def step(self) -> Iterator[Callable[[], None]]:
        """Around a step; gives what is to be called between micro-batches.

        Raises:
            StepAbandoned: where a gate says so.
        """
        if self.is_open:
            yield _nothing
            return
        hooks = [layer.register_forward_hook(self._after_layer) for layer in self._layers]
        try:
            yield self._pass
        finally:
            for hook in hooks:
                hook.remove()
            self._hear()

    def _pass(self) -> None:
        """A gate."""
        if asked := self._hear() if self._group is not None else self._stop.signal_number:
            raise StepAbandoned(asked)
        if self._group is not None:
            ranks_asked = torch.tensor([float(self._stop.signal_number == number) for number in STOP_SIGNALS])
            self._told = ranks_asked, dist.all_reduce(ranks_asked, group=self._group, async_op=True)

    def _hear(self) -> int:
        """The signal of which any rank told at the last gate, or 0."""
        if self._told is None:
            return 0
        ranks_asked, work = self._told
        self._told = None
        work.wait()
        return next((int(number) for number, ranks in zip(STOP_SIGNALS, ranks_asked.tolist(), strict=True) if ranks), 0)

    def _after_layer(self, _layer: nn.Module, _inputs: Any, output: Any) -> None:
        self._pass()
        if isinstance(output, torch.Tensor) and output.requires_grad:
            output.register_hook(lambda _gradient: self._pass())  # type: ignore[no-untyped-call]


def _nothing() -> None:
    """A short step has no gates."""
