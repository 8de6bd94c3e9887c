"""Steps whose loss or gradient is not finite: which galaxies they were about, and how many of them are too many."""

from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from galaxydist.atomic_files import write_json
from galaxydist.distributed import World
from galaxydist.errors import NonfiniteError
from galaxydist.loading.loader import Batch
from galaxydist.runs.folder import RunFolder

# Galaxies that a message names; the file beside the metrics has all.
NAMED = 8
REMEDY = (
    "The last checkpoint is from before it and stays. Lower optim.lr, lengthen optim.warmup, clip with train.clip_norm, use "
    "train.precision=no, or leave such steps out with train.on_nonfinite=skip."
)


class Nonfinite:
    """The last steps' galaxies, and the number of steps that were left out. ``remember`` and ``settle`` are called by all ranks.

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

    def remember(self, step: int, batch: Batch) -> None:
        """Which galaxies this rank's part of the batch of a step holds, until two steps later; the pictures are let go."""
        self._samples.append((step, batch.samples_B.tolist()))

    def settle(self, world: World, step: int) -> str:
        """All ranks know that ``step`` is not finite: tell which galaxies it was about.

        Returns:
            What to tell the user, where the run goes on.

        Raises:
            NonfiniteError: on every rank the same.
        """
        mine = next(samples for known, samples in self._samples if known == step)
        samples = sorted(sample for part in world.gather(mine) for sample in part)
        path = self._folder.path / f"nonfinite-step-{step:08d}.json"
        names = world.on_main(lambda: self._write(path, step, samples))
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
        return f"warning: {what} The step is left out ({self.num_steps} of at most {self._max_nonfinite})."

    def _write(self, path: Path, step: int, samples: list[int]) -> list[str]:
        names = [self._name_of(sample) for sample in samples]
        write_json(path, {"step": step, "galaxies": names})
        return names[:NAMED]

    def metrics(self) -> dict[str, float]:
        """For the log; nothing where such steps end the run."""
        return {"train/nonfinite": float(self.num_steps)} if self._on_nonfinite == "skip" else {}

    def state_dict(self) -> dict[str, Any]:
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.num_steps = state["num_steps"]
