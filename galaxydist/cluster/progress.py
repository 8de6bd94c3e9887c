"""How far a run is, from its folder alone. Only the ends of its files are read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from galaxydist.runs.folder import BEST, FOLDER_NAME, RunFolder
from galaxydist.runs.metrics_log import read_step_records, read_tail_records


@dataclass(frozen=True)
class Progress:
    """How far a run is. What its folder does not tell (yet) is None.

    Args:
        step: optimizer steps in its log.
        total_steps: of the whole run, without early stopping.
        epoch: passes over the training split.
        epochs: of the whole run.
        img_s: images a second, over all processes, when they were measured last.
        metric: the validation metric that chooses the best checkpoint.
        best: its best value.
        batch_size: galaxies in one step.
        updated: when it logged last, seconds since 1970.
    """

    step: int = 0
    total_steps: int | None = None
    epoch: float | None = None
    epochs: int | None = None
    img_s: float | None = None
    metric: str | None = None
    best: float | None = None
    batch_size: int | None = None
    updated: float | None = None

    @property
    def to_do_s(self) -> float | None:
        """Seconds that the rest of the training takes at the speed measured last, without validations."""
        if not (self.total_steps and self.batch_size and self.img_s):
            return None
        return max(0, self.total_steps - self.step) * self.batch_size / self.img_s


def read_progress(folder: RunFolder) -> Progress:
    """Read it.

    Raises:
        UserError: recipe.json is damaged.
    """
    recipe = folder.read_recipe().recipe if folder.is_started else {}
    metric, epochs, batch_size = (recipe.get(f"train.{key}") for key in ("metric", "epochs", "batch_size"))
    lines = read_tail_records(folder.metrics_path)
    timing = read_tail_records(folder.timing.path, 4096)
    last = next((line for line in reversed(lines) if _is_number(line.get("step"))), None)
    epoch = last.get("epoch") if last is not None else None
    return Progress(
        step=int(last["step"]) if last is not None else 0,
        total_steps=_total_steps(last, epochs),
        epoch=epoch if _is_number(epoch) else None,
        epochs=epochs,
        img_s=next((line["time/img_s"] for line in reversed(timing) if _is_number(line.get("time/img_s"))), None),
        metric=metric,
        best=_best(folder, metric, lines),
        batch_size=batch_size,
        updated=_modified(folder.metrics_path),
    )


def _total_steps(line: Mapping[str, Any] | None, epochs: int | None) -> int | None:
    """Step and epoch of a line tell how many steps an epoch has."""
    if line is None or not epochs or not _is_number(line.get("epoch")) or line["epoch"] <= 0:
        return None
    steps_per_epoch: int = round(line["step"] / line["epoch"])
    return steps_per_epoch * epochs


def _best(folder: RunFolder, metric: str | None, lines: list[dict[str, Any]]) -> float | None:
    """The best validation: of the checkpoint that was saved as the best, or a later one."""
    if metric is None:
        return None
    try:
        saved = FOLDER_NAME.fullmatch((folder.checkpoints_dir / BEST).read_text().strip())
    except (FileNotFoundError, UnicodeDecodeError):
        saved = None
    earlier = read_step_records(folder.metrics_path, int(saved[1])) if saved is not None else []
    values = [line[f"val/{metric}"] for line in (*earlier, *lines) if _is_number(line.get(f"val/{metric}"))]
    if not values:
        return None
    best: float = min(values) if metric == "loss" else max(values)
    return best


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
