"""Stop signals of a training run, and gates at which all ranks abandon a long step together.

Python runs a signal handler only between two of its instructions, and a backward pass of minutes is a single one. So the C part
of the handler wakes a thread (``signal.set_wakeup_fd``), which answers the user and sets the flag that the loop reads.
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

# The terminal sends Ctrl-C to the launcher too, which may forward it: a second one within this time is the same one.
ECHO_S = 1.0
# Time in which the process may close its files after the second Ctrl-C.
LEAVING_S = 5.0


def signal_name(number: int) -> str:
    """Return ``Ctrl-C``, ``SIGTERM`` or another signal's name."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


class StopSignal:
    """Flag that Ctrl-C, SIGTERM or SIGUSR2 set while the context is open. A second Ctrl-C ends the process without saving.

    The context must be opened in the main thread.

    Args:
        is_verbose: answer each signal on stderr; one process of a run should.

    Attributes:
        signal_number: the first signal that arrived, 0 until then.
    """

    def __init__(self, *, is_verbose: bool = True) -> None:
        self.signal_number = 0
        self._is_verbose = is_verbose
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
        """Restore the former handlers. It may be called twice."""
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
        """Handle a signal in the main thread, which the thread below may have done already."""
        if self._leaves_at is not None:
            raise KeyboardInterrupt

    def _listen(self) -> None:
        """Read the numbers of signals, a byte each, until the context closes the pipe. Runs in the thread."""
        while True:
            left_s = None if self._leaves_at is None else max(0.0, self._leaves_at - time.monotonic())
            if not select.select([self._read_end], [], [], left_s)[0]:
                os._exit(EXIT_INTERRUPTED)
            numbers = os.read(self._read_end, 16)
            if not numbers:
                return
            for number in numbers:
                if number in STOP_SIGNALS:
                    self._record(number)

    def _record(self, number: int) -> None:
        now = time.monotonic()
        if number != signal.SIGINT:
            if self.signal_number == 0:
                self._answer(f"{signal_name(number)}: stopping after this step")
        elif self._interrupted_at is None:
            self._interrupted_at = now
            self._answer("stopping after this step; Ctrl-C again ends without saving")
        elif now - self._interrupted_at >= ECHO_S and self._leaves_at is None:
            self._leaves_at = now + LEAVING_S
            self._answer("ending without saving")
            _thread.interrupt_main(signal.SIGINT)
        self.signal_number = self.signal_number or number

    def _answer(self, text: str) -> None:
        if self._is_verbose:
            with contextlib.suppress(OSError):  # not through sys.stderr or logging, whose locks the main thread may hold
                os.write(2, f"\ngalaxydist: {text}\n".encode())


# Steps that take longer have gates; a shorter step is finished.
LONG_STEP_S = 2.0


class StepAbandoned(BaseException):
    """The step was abandoned at the same gate on all ranks. Not an ``Exception``, so that no handler on the way catches it."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"signal {signal_number}")
        self.signal_number = signal_number


class StepGates:
    """Gates at which all ranks abandon a long step together.

    A step that takes seconds has a gate before each micro-batch, and after each layer in the forward and in the backward pass. At
    a gate each rank sends whether it was asked to stop, and receives what the others sent at the gate before: no rank waits for
    another, and all abandon the step at the same gate. ``TrainStep`` then restores what the step has changed, so that it can be
    repeated. All ranks create the gates together, and pass the same gates in the same order.

    Args:
        world_size: number of ranks; with one, nothing is sent.
        stop: set by a signal.
        layers: the model whose layers have gates; None if only micro-batches have, because the layers are compiled together or
            sharded.
        timeout: timeout of the collectives.

    Attributes:
        is_open: True if the next step, being short, has no gates; equal on all ranks.
    """

    def __init__(
        self, world_size: int, stop: StopSignal, *, layers: nn.Module | None = None, timeout: timedelta | None = None
    ) -> None:
        self.is_open = False
        self._stop = stop
        self._layers = [module for module in layers.modules() if not any(module.children())] if layers is not None else []
        # A group of its own, on the host: its collectives do not mix with those of the gradients, and need not wait for a GPU.
        self._group: Any = dist.new_group(backend="gloo", timeout=timeout) if world_size > 1 else None
        self._sent: tuple[torch.Tensor, Any] | None = None

    @contextlib.contextmanager
    def step(self) -> Iterator[Callable[[], None]]:
        """Set up the gates of a step, and yield the function to call before each micro-batch.

        Raises:
            StepAbandoned: at a gate, on all ranks.
        """
        if self.is_open:
            yield lambda: None
            return
        hooks = [layer.register_forward_hook(self._after_layer) for layer in self._layers]
        try:
            yield self._pass
            self._receive()  # not after an error, which may have ended another rank too
        finally:
            for hook in hooks:
                hook.remove()

    def _pass(self) -> None:
        """Pass a gate, or abandon the step."""
        if number := self._receive() if self._group is not None else self._stop.signal_number:
            raise StepAbandoned(number)
        if self._group is not None:
            num_ranks = torch.tensor([float(self._stop.signal_number == number) for number in STOP_SIGNALS])
            self._sent = num_ranks, dist.all_reduce(num_ranks, group=self._group, async_op=True)

    def _receive(self) -> int:
        """Return the signal that any rank sent at the last gate, or 0."""
        if self._sent is None:
            return 0
        num_ranks, work = self._sent
        self._sent = None
        work.wait()
        return next((int(number) for number, ranks in zip(STOP_SIGNALS, num_ranks.tolist(), strict=True) if ranks), 0)

    def _after_layer(self, _layer: nn.Module, _inputs: Any, output: Any) -> None:
        self._pass()
        if isinstance(output, torch.Tensor) and output.requires_grad:
            output.register_hook(lambda _gradient: self._pass())
