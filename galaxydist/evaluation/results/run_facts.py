"""What is known of one run beside its place in the matrix: command, recipe, learning curves, calibration, speed and cost."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from galaxydist.errors import UserError
from galaxydist.evaluation.results_files import read_evaluation
from galaxydist.evaluation.trial import Trial
from galaxydist.recipe.resolve import COMMAND_LINE, SCHEMA_DEFAULT
from galaxydist.recipe.yaml12 import to_text
from galaxydist.runs.folder import RunFolder, StoredRecipe

# Given at the start of a run, and no property of it.
_ONE_START = ("resume.",)


@dataclass(frozen=True)
class Cost:
    """How fast a run was, and what it took.

    Args:
        img_s: images a second over all devices, the median of what was logged; without validations and checkpoints.
        devices: processes, each with a device of its own.
        kind: ``GPU`` or ``CPU``.
        hours: of training, without validations and checkpoints: galaxies seen over speed, added up line by line; what a
            restart did again is in there once.
        data_wait: share of the time that was spent waiting for data.
        memory_gb: largest that was allocated on a GPU; resident on a CPU.
        mfu: model flops utilisation; None where it is not known.
    """

    img_s: float
    devices: int
    kind: str
    hours: float
    data_wait: float | None
    memory_gb: float | None
    mfu: float | None

    @property
    def device_hours(self) -> float:
        return self.hours * self.devices


@dataclass(frozen=True)
class RunFacts:
    """One run.

    Args:
        trial: its place in the matrix.
        command: that trains it again.
        recipe: every key that does not have the schema's own value -> (value, where it came from).
        num_keys: of the whole recipe.
        forced: what ``resume.force`` changed.
        lines: of metrics.jsonl.
        cost: None where its timing was not logged.
        evaluation: on its own test set, as it was written; empty where it cannot be read.
        notes: what of it could not be read.
    """

    trial: Trial
    command: str
    recipe: Mapping[str, tuple[str, str]]
    num_keys: int
    forced: tuple[str, ...]
    lines: Sequence[Mapping[str, Any]]
    cost: Cost | None
    evaluation: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.trial.name

    @property
    def calibration(self) -> Mapping[str, Any]:
        """Of its own test set; empty where it has none."""
        found: Mapping[str, Any] = self.evaluation.get("calibration") or {}
        return found


def read_facts(trial: Trial) -> RunFacts:
    """All that its folder says. What is damaged is left out, with a note."""
    folder, notes = RunFolder(trial.run_dir), list[str]()
    stored = folder.read_recipe()
    lines, timing = (_read_lines(log, notes) for log in (folder.metrics, folder.timing))
    evaluation = read_evaluation(folder.evaluation_dir, "test", str(stored.recipe.get("eval.tta", "none")))
    changed = {
        key: (to_text(value), stored.origins.get(key, ""))
        for key, value in stored.recipe.items()
        if stored.origins.get(key, "") != SCHEMA_DEFAULT
    }
    return RunFacts(
        trial=trial,
        command=command_of(stored),
        recipe=changed,
        num_keys=len(stored.recipe),
        forced=_forced(stored),
        lines=lines,
        cost=cost_of(timing, int(stored.recipe.get("train.batch_size", 0))),
        evaluation=evaluation or {},
        notes=tuple(notes),
    )


def command_of(stored: StoredRecipe) -> str:
    """The command of the run, from where each value of its recipe came from."""
    name = str(stored.recipe.get("name", ""))
    files = {origin.rpartition(":")[0] for origin in map(str, stored.origins.values()) if ":" in origin}
    recipe = next((file for file in sorted(files) if file.endswith((".yaml", ".yml"))), "")
    words = [f"recipe={_short(recipe) or name}"]
    for key, origin in stored.origins.items():
        if origin == COMMAND_LINE and key != "name" and not key.startswith(_ONE_START):
            words.append(f"{key}={to_text(stored.recipe.get(key))}")
    return "accelerate launch launch.py " + shlex.join(words)


def _short(file: str) -> str:
    """A recipe's file as one gives it: its name where it lies in a folder ``recipes``, else its path."""
    _, found, inside = file.rpartition("recipes/")
    return inside.removesuffix(".yaml") if found else file


def cost_of(timing: Sequence[Mapping[str, Any]], batch_size: int) -> Cost | None:
    """Speed and cost from the lines of timing.jsonl; None where there are none.

    Args:
        timing: the lines.
        batch_size: global.
    """
    known = [line for line in timing if _is_number(line.get("time/img_s")) and line["time/img_s"] > 0]
    if not known or batch_size < 1:
        return None
    seconds, before = 0.0, 0
    for line in known:
        seconds += max(0, line["step"] - before) * batch_size / line["time/img_s"]
        before = max(before, line["step"])
    is_gpu = any("gpu/memory_gb" in line for line in known)
    devices = median(line["time/img_s"] / line.get("time/img_s_device", line["time/img_s"]) for line in known)
    memory = [line[key] for line in known for key in ("gpu/memory_gb", "memory/rss_gb") if _is_number(line.get(key))]
    return Cost(
        img_s=median(line["time/img_s"] for line in known),
        devices=max(1, round(devices)),
        kind="GPU" if is_gpu else "CPU",
        hours=seconds / 3600,
        data_wait=_median_of(known, "time/data_wait"),
        memory_gb=max(memory, default=None),
        mfu=_median_of(known, "gpu/mfu"),
    )


def _median_of(lines: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [line[key] for line in lines if _is_number(line.get(key))]
    return median(values) if values else None


def _read_lines(log: Any, notes: list[str]) -> list[dict[str, Any]]:
    try:
        lines: list[dict[str, Any]] = log.read()
    except UserError as error:
        notes.append(str(error))
        return []
    return lines


def _forced(stored: StoredRecipe) -> tuple[str, ...]:
    return tuple(
        f"{change['key']}: {to_text(change.get('old'))} to {to_text(change.get('new'))} at step {entry.get('step')}"
        for entry in stored.forced
        for change in entry.get("changes", ())
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
