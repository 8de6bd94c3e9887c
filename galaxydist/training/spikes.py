"""Warns of a loss that jumps, against what it was lately."""

import math
from collections import deque
from statistics import median
from typing import Any

WINDOW = 200
LEAST_KNOWN = 50
# Deviation of a normal distribution, in median absolute deviations (Rousseeuw & Croux 1993, JASA 88, 1273).
DEVIATIONS = 1.4826
# A loss that does not change at all still differs in the last digits: less than this share of it is never a jump.
FLOOR = 0.01
TINY = 1e-9
QUIET_STEPS = 100


class SpikeDetector:
    """Compares each loss with the median of the 200 before it. What it saw survives a resume, so that it says the same.

    Args:
        threshold: robust standard deviations above the median that are worth a warning; 0: none ever.
        quiet_steps: steps after a warning without another.
    """

    def __init__(self, threshold: float, quiet_steps: int = QUIET_STEPS) -> None:
        self._threshold = threshold
        self._quiet_steps = quiet_steps
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._warned_step: int | None = None

    def update(self, step: int, loss: float) -> str | None:
        """Take in the global loss of a step.

        Args:
            step: steps done.
            loss: over all ranks; one that is not finite is not this class's business, and is not remembered.

        Returns:
            A warning, or None.
        """
        if self._threshold <= 0 or not math.isfinite(loss):
            return None
        warning = self._judge(step, loss)
        self._losses.append(loss)
        return warning

    def _judge(self, step: int, loss: float) -> str | None:
        if len(self._losses) < LEAST_KNOWN:
            return None
        if self._warned_step is not None and step - self._warned_step < self._quiet_steps:
            return None
        middle = median(self._losses)
        spread = DEVIATIONS * median(abs(value - middle) for value in self._losses)
        deviation = max(spread, FLOOR * abs(middle), TINY)
        if loss - middle <= self._threshold * deviation:
            return None
        self._warned_step = step
        above = (loss - middle) / deviation
        return (
            f"the loss of step {step} is {loss:.4g}, {above:.1f} robust standard deviations above the median "
            f"{middle:.4g} of the last {len(self._losses)} steps (train.spike_threshold={self._threshold:g})"
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"losses": list(self._losses), "warned_step": self._warned_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._losses = deque(state["losses"], maxlen=WINDOW)
        self._warned_step = state["warned_step"]
