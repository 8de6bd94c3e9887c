"""Leaving a long step in the middle, on all ranks at the same place.

A step that takes seconds has gates: before each micro-batch, and after each layer of the model on the way forward and back. At a
gate each rank tells the others whether it was asked to stop, and hears what they told at the gate before: no rank waits for
another, and all leave at the same gate. The step's gradients, batch-norm statistics and everything else that it has changed are
then put back (``Update``), so that it can be taken anew.
"""

import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from galaxydist.training.stop_signals import STOP_SIGNALS, StopFlag

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
        self, world_size: int, stop: StopFlag, *, layers: nn.Module | None = None, timeout: timedelta | None = None
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
