"""Galaxies that cannot be read while training: which there are, known to all ranks alike, and how many are too many."""

from collections.abc import Mapping
from typing import Any, Literal

from galaxydist.distributed import World
from galaxydist.errors import EveryRankError, UserError
from galaxydist.loading.decode import PictureError
from galaxydist.loading.loader import Batch

# Galaxies that are named when they are skipped; more are only counted.
NAMED = 20


class Skipped:
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

    def take(self, step: int, batch: Batch) -> int:
        """Note what this rank's part of the batch of ``step`` could not read; the number that the ranks do not know of yet."""
        new = {sample: error for sample, error in batch.errors.items() if sample not in self._samples | self._found.keys()}
        self._found |= {sample: (step, error) for sample, error in new.items()}
        return len(new)

    def settle(self, world: World, step: int) -> list[str]:
        """All ranks come to know what any of them has found up to ``step``. Every rank calls it.

        Returns:
            What to tell the user.

        Raises:
            EveryRankError: on every rank the same: it is not to be skipped (a whole shard is missing, or ``raise``), or it is one
                too many.
        """
        mine = {
            sample: (str(error), error.what if isinstance(error, PictureError) else None)
            for sample, (found_at, error) in self._found.items()
            if found_at <= step
        }
        self._found = {sample: found for sample, found in self._found.items() if sample not in mine}
        everything: dict[int, tuple[str, str | None]] = {}
        for theirs in world.gather(mine):
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
