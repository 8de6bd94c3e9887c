"""The best validation so far, and when to stop waiting for a better one."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass
class EarlyStopping:
    """Keeps the best value of one validation metric.

    Args:
        metric: ``loss`` is better when smaller, the others when larger.
        patience: validations without a better value after which to stop (0: never).
    """

    metric: Literal["accuracy", "balanced_accuracy", "loss"]
    patience: int
    best: float | None = None
    best_step: int | None = None
    waited: int = 0

    def update(self, value: float | None, step: int) -> bool:
        """Take in a new validation. True if it is the best so far (equal is not; nor is None, of a loss that is not finite)."""
        better = value is not None and (self.best is None or (value < self.best if self.metric == "loss" else value > self.best))
        if better:
            self.best, self.best_step, self.waited = value, step, 0
        else:
            self.waited += 1
        return better

    @property
    def should_stop(self) -> bool:
        return self.patience > 0 and self.waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return {"metric": self.metric, "best": self.best, "best_step": self.best_step, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on; with another metric than before (``resume.force``) from the beginning."""
        if state.get("metric", self.metric) != self.metric:
            return
        self.best, self.best_step, self.waited = state["best"], state["best_step"], state["waited"]
