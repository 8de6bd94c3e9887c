"""Anomalies of a training run: unreadable images, steps that are not finite, and loss spikes."""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, Literal

from galaxydist.atomic_files import write_json
from galaxydist.distributed import World
from galaxydist.errors import EveryRankError, NonfiniteError, UserError
from galaxydist.loading.decode import ImageError
from galaxydist.loading.loader import Batch
from galaxydist.runs.folder import RunFolder

# Skipped galaxies that are named in the log; further ones are only counted.
MAX_SKIPPED_NAMED = 20
# Galaxies of a step that a message names; the file in the run folder has all of them.
MAX_NAMED = 8
REMEDY = (
    "The last checkpoint is from before it and stays. Lower optim.lr, lengthen optim.warmup, clip with train.clip_norm, use "
    "train.precision=no, or leave such steps out with train.on_nonfinite=skip."
)

# Losses of which a spike is compared with the median, and the number from which on that is possible.
WINDOW = 200
LEAST_KNOWN = 50
# Standard deviation of a normal distribution in median absolute deviations (Rousseeuw & Croux 1993, JASA 88, 1273).
DEVIATIONS = 1.4826
# A constant loss still differs in the last digits: a rise of less than this share of it is never a spike.
FLOOR = 0.01
TINY = 1e-9
QUIET_STEPS = 100

# Seconds of training after which waiting for data is a habit, not a shard that was fetched late.
WAIT_S = 60.0


class UnreadableImages:
    """The galaxies of a run that have weight 0 because they cannot be read, over all ranks, epochs and restarts.

    A galaxy counts once. The ranks add up the number of new ones each step, and exchange their names only if there are any.

    Args:
        on_error: ``raise``: the first one stops the run; ``skip``: the run continues without it.
        max_errors: with ``skip``, more galaxies than this stop the run.
    """

    def __init__(self, on_error: Literal["raise", "skip"], max_errors: int) -> None:
        self._on_error, self._max_errors = on_error, max_errors
        self._samples: set[int] = set()
        self._found: dict[int, tuple[int, UserError]] = {}

    def __len__(self) -> int:
        return len(self._samples)

    def record(self, step: int, batch: Batch) -> int:
        """Record the unreadable images of this rank's part of a batch; return the number of new ones."""
        new = {sample: error for sample, error in batch.errors.items() if sample not in self._samples | self._found.keys()}
        self._found |= {sample: (step, error) for sample, error in new.items()}
        return len(new)

    def sync(self, world: World, step: int) -> list[str]:
        """Exchange the galaxies recorded up to ``step``; all ranks must call it.

        Returns:
            The messages for the user.

        Raises:
            EveryRankError: on all ranks if a galaxy must not be skipped (a whole shard is missing, or ``raise``), or there are
                too many.
        """
        due = {sample: error for sample, (recorded_at, error) in self._found.items() if recorded_at <= step}
        self._found = {sample: found for sample, found in self._found.items() if sample not in due}
        own = {sample: (str(error), error.problem if isinstance(error, ImageError) else None) for sample, error in due.items()}
        everywhere = {sample: found for of_rank in world.all_gather(own) for sample, found in of_rank.items()}
        new = {sample: found for sample, found in sorted(everywhere.items()) if sample not in self._samples}
        for text, problem in new.values():
            if problem is None or self._on_error == "raise":
                raise EveryRankError(text)
        before = len(self)
        self._samples |= new.keys()
        if len(self) > self._max_errors:
            text, _ = [*new.values()][-1]
            raise EveryRankError(f"{self._too_many()}; the last: {text}")
        messages = [f"skipped: {what}" for _, what in new.values()][: max(0, MAX_SKIPPED_NAMED - before)]
        if before <= MAX_SKIPPED_NAMED < len(self):
            messages.append(f"{len(self)} galaxies skipped so far; further ones are only counted (train/skipped)")
        return messages

    def metrics(self) -> dict[str, float]:
        """Return the metrics for the log; none if nothing is ever skipped."""
        return {"train/skipped": float(len(self))} if self._on_error == "skip" else {}

    def state_dict(self) -> dict[str, Any]:
        return {"samples": sorted(self._samples)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the skipped galaxies; with ``on_error=raise`` they are forgotten.

        Raises:
            UserError: more galaxies were skipped than are allowed now.
        """
        if self._on_error == "skip":
            self._samples = set(state["samples"])
            if len(self) > self._max_errors:
                raise UserError(f"{self._too_many()} up to the checkpoint; raise data.max_errors to continue")

    def _too_many(self) -> str:
        return f"{len(self)} galaxies could not be read, more than data.max_errors={self._max_errors}"


class NonFiniteSteps:
    """The galaxies of the last steps, and the number of steps that were skipped because they were not finite.

    Args:
        on_nonfinite: ``stop`` the run, or ``skip`` the step.
        max_nonfinite: with ``skip``, more steps than this stop the run.
        folder: run folder; the galaxies of such a step are listed in a file there.
        name_of: returns the name of a training galaxy for its sample number.
    """

    def __init__(
        self, on_nonfinite: Literal["stop", "skip"], max_nonfinite: int, folder: RunFolder, name_of: Callable[[int], str]
    ) -> None:
        self._on_nonfinite, self._max_nonfinite = on_nonfinite, max_nonfinite
        self._folder, self._name_of = folder, name_of
        self._samples: deque[tuple[int, list[int]]] = deque(maxlen=2)
        self.num_steps = 0

    def record(self, step: int, batch: Batch) -> None:
        """Remember the galaxies of this rank's part of a batch for two steps, without their images."""
        self._samples.append((step, batch.samples_B.tolist()))

    def sync(self, world: World, step: int) -> str:
        """Handle a step that is not finite: list its galaxies in a file; all ranks must call it.

        Returns:
            The warning for the user, if the run continues.

        Raises:
            NonfiniteError: on all ranks if the run must stop.
        """
        own = next(samples for recorded, samples in self._samples if recorded == step)
        samples = sorted(sample for part in world.all_gather(own) for sample in part)
        path = self._folder.path / f"nonfinite-step-{step:08d}.json"
        names = world.run_on_main(lambda: self._write(path, step, samples))
        self.num_steps += 1
        more = f" and {len(samples) - len(names)} more" if len(samples) > len(names) else ""
        batch = ", ".join(names) + more
        what = f"The loss or its gradient is not a number at step {step} (from 0), for the batch of {batch} ({path})."
        if self._on_nonfinite == "stop":
            raise NonfiniteError(f"{what} {REMEDY}")
        if self.num_steps > self._max_nonfinite:
            raise NonfiniteError(
                f"{what} These are {self.num_steps} such steps, more than train.max_nonfinite={self._max_nonfinite}. {REMEDY}"
            )
        return f"{what} The step is skipped ({self.num_steps} of at most {self._max_nonfinite})."

    def _write(self, path: Path, step: int, samples: list[int]) -> list[str]:
        names = [self._name_of(sample) for sample in samples]
        write_json(path, {"step": step, "galaxies": names})
        return names[:MAX_NAMED]

    def metrics(self) -> dict[str, float]:
        """Return the metrics for the log; none if such steps end the run."""
        return {"train/nonfinite": float(self.num_steps)} if self._on_nonfinite == "skip" else {}

    def state_dict(self) -> dict[str, Any]:
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.num_steps = state["num_steps"]


def check_loss_scale(step: int, scale: float) -> None:
    """Check the scale of the loss with fp16, which halves with each gradient that overflows.

    Args:
        step: optimizer steps done before the step after which the loss has this scale.
        scale: equal on all ranks.

    Raises:
        NonfiniteError: the scale is below 1; unscaled gradients fit into fp16 unless the training diverges.
    """
    if scale >= 1.0:
        return
    raise NonfiniteError(
        f"The gradient overflows in fp16 at step {step} (from 0), and the loss scale has fallen to {scale:g}: the training "
        "diverges. The last checkpoint is from before it and stays. Lower optim.lr, lengthen optim.warmup, clip with "
        "train.clip_norm, or start again with train.precision=bf16 (compute capability 8 or later) or train.precision=no."
    )


class LossSpikes:
    """Compares each loss with the median of the 200 before it; its state is saved, so that a continued run warns alike.

    Args:
        threshold: robust standard deviations above the median from which on to warn; 0: never.
        quiet_steps: steps after a warning without another one.
    """

    def __init__(self, threshold: float, quiet_steps: int = QUIET_STEPS) -> None:
        self._threshold = threshold
        self._quiet_steps = quiet_steps
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._warned_step: int | None = None

    def update(self, step: int, loss: float) -> str | None:
        """Add the loss of a step.

        Args:
            step: steps done.
            loss: loss over all ranks; ignored if it is not finite.

        Returns:
            A warning, or None.
        """
        if self._threshold <= 0 or not math.isfinite(loss):
            return None
        warning = self._compare(step, loss)
        self._losses.append(loss)
        return warning

    def _compare(self, step: int, loss: float) -> str | None:
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
            f"the loss of step {step} (from 0) is {loss:.4g}, {above:.1f} robust standard deviations above the median "
            f"{middle:.4g} of the last {len(self._losses)} steps (train.spike_threshold={self._threshold:g})"
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"losses": list(self._losses), "warned_step": self._warned_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._losses = deque(state["losses"], maxlen=WINDOW)
        self._warned_step = state["warned_step"]


class DataWaits:
    """Warns once a start if the training waits for data for a minute or longer; the first line of the log does not count.

    Args:
        limit: share of the time; 0: never.
        clock: returns monotonic seconds.
    """

    def __init__(self, limit: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._clock = limit, clock
        self._since: float | None = None
        self._has_warned = limit <= 0

    def update(self, share: float) -> str | None:
        """Add the share of waiting since the last line of the log, and return a warning or None."""
        now = self._clock()
        if share <= self._limit:
            self._since = None
        elif self._since is None:
            self._since = now
        elif now - self._since >= WAIT_S and not self._has_warned:
            self._has_warned = True
            return (
                f"the training waits for data, now {share:.0%} of the time, since {now - self._since:.0f} s "
                f"(train.data_wait_limit={self._limit:g}): put the shards on a faster disk or in a cache, or give it more cores"
            )
        return None
