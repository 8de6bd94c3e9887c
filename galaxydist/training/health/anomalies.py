"""Galaxies that cannot be read while training: which there are, known to all ranks alike, and how many are too many."""

import math
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

# Galaxies that are named when they are skipped; more are only counted.
NAMED = 20


class UnreadableImages:
    """The galaxies of a run that were given weight 0, over all ranks, epochs and restarts; a galaxy counts once.

    Ranks agree each step on how many new ones there are; only when there are any they tell each other which.

    Args:
        on_error: ``raise``: the first one stops the run; ``skip``: go on without it.
        max_errors: with ``skip``, more galaxies than this stop the run.
    """

    def __init__(self, on_error: Literal["raise", "skip"], max_errors: int) -> None:
        self._on_error, self._max_errors = on_error, max_errors
        self._samples: set[int] = set()
        self._found: dict[int, tuple[int, UserError]] = {}

    def __len__(self) -> int:
        return len(self._samples)

    def record(self, step: int, batch: Batch) -> int:
        """Note what this rank's part of the batch of ``step`` could not read; the number that the ranks do not know of yet."""
        new = {sample: error for sample, error in batch.errors.items() if sample not in self._samples | self._found.keys()}
        self._found |= {sample: (step, error) for sample, error in new.items()}
        return len(new)

    def sync(self, world: World, step: int) -> list[str]:
        """All ranks come to know what any of them has found up to ``step``. Every rank calls it.

        Returns:
            What to tell the user.

        Raises:
            EveryRankError: on every rank the same: it is not to be skipped (a whole shard is missing, or ``raise``), or it is one
                too many.
        """
        mine = {
            sample: (str(error), error.what if isinstance(error, ImageError) else None)
            for sample, (found_at, error) in self._found.items()
            if found_at <= step
        }
        self._found = {sample: found for sample, found in self._found.items() if sample not in mine}
        everything: dict[int, tuple[str, str | None]] = {}
        for theirs in world.all_gather(mine):
            everything |= theirs
        found = {sample: told for sample, told in sorted(everything.items()) if sample not in self._samples}
        for text, what in found.values():
            if what is None or self._on_error == "raise":
                raise EveryRankError(text)
        before = len(self)
        self._samples |= found.keys()
        if len(self) > self._max_errors:
            text, _ = [*found.values()][-1]
            raise EveryRankError(f"{self._too_many()}; the last: {text}")
        told = [f"skipped: {what}" for _, what in found.values()][: max(0, NAMED - before)]
        if before <= NAMED < len(self):
            told.append(f"{len(self)} galaxies skipped so far; further ones are only counted (train/skipped)")
        return told

    def metrics(self) -> dict[str, float]:
        """For the log; nothing where nothing is ever skipped."""
        return {"train/skipped": float(len(self))} if self._on_error == "skip" else {}

    def state_dict(self) -> dict[str, Any]:
        return {"samples": sorted(self._samples)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting; a run that is to be strict from now on forgets what was skipped before.

        Raises:
            UserError: there were already more than are allowed now.
        """
        if self._on_error == "skip":
            self._samples = set(state["samples"])
            if len(self) > self._max_errors:
                raise UserError(f"{self._too_many()} up to the checkpoint; raise data.max_errors to go on")

    def _too_many(self) -> str:
        return f"{len(self)} galaxies could not be read, more than data.max_errors={self._max_errors}"


# Steps whose loss or gradient is not finite: which galaxies they were about, and how many of them are too many.

# Galaxies that a message names; the file beside the metrics has all.
MOST_NAMED = 8
REMEDY = (
    "The last checkpoint is from before it and stays. Lower optim.lr, lengthen optim.warmup, clip with train.clip_norm, use "
    "train.precision=no, or leave such steps out with train.on_nonfinite=skip."
)


class NonFiniteSteps:
    """The last steps' galaxies, and the number of steps that were left out. ``record`` and ``sync`` are called by all ranks.

    Args:
        on_nonfinite: stop the run, or go on without the step.
        max_nonfinite: with ``skip``, more steps than this stop the run.
        folder: of the run; the galaxies of such a step are listed in a file there.
        name_of: the name of a stored training galaxy, by its sample number.
    """

    def __init__(
        self, on_nonfinite: Literal["stop", "skip"], max_nonfinite: int, folder: RunFolder, name_of: Callable[[int], str]
    ) -> None:
        self._on_nonfinite, self._max_nonfinite = on_nonfinite, max_nonfinite
        self._folder, self._name_of = folder, name_of
        self._samples: deque[tuple[int, list[int]]] = deque(maxlen=2)
        self.num_steps = 0

    def record(self, step: int, batch: Batch) -> None:
        """Which galaxies this rank's part of the batch of a step holds, until two steps later; the images are let go."""
        self._samples.append((step, batch.samples_B.tolist()))

    def sync(self, world: World, step: int) -> str:
        """All ranks know that ``step`` is not finite: tell which galaxies it was about.

        Returns:
            What to tell the user, where the run goes on.

        Raises:
            NonfiniteError: on every rank the same.
        """
        mine = next(samples for known, samples in self._samples if known == step)
        samples = sorted(sample for part in world.all_gather(mine) for sample in part)
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
        return f"{what} The step is left out ({self.num_steps} of at most {self._max_nonfinite})."

    def _write(self, path: Path, step: int, samples: list[int]) -> list[str]:
        names = [self._name_of(sample) for sample in samples]
        write_json(path, {"step": step, "galaxies": names})
        return names[:MOST_NAMED]

    def metrics(self) -> dict[str, float]:
        """For the log; nothing where such steps end the run."""
        return {"train/nonfinite": float(self.num_steps)} if self._on_nonfinite == "skip" else {}

    def state_dict(self) -> dict[str, Any]:
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.num_steps = state["num_steps"]


# Warns of a loss that jumps, against what it was lately.

WINDOW = 200
LEAST_KNOWN = 50
# Deviation of a normal distribution, in median absolute deviations (Rousseeuw & Croux 1993, JASA 88, 1273).
DEVIATIONS = 1.4826
# A loss that does not change at all still differs in the last digits: less than this share of it is never a jump.
FLOOR = 0.01
TINY = 1e-9
QUIET_STEPS = 100


class LossSpikes:
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
