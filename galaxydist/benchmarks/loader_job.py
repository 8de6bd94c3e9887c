"""What a process that measures one loader is told, and what it answers: JSON on its command line, JSON on its last line."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

TASKS = ("decode", "train", "resume", "memory")
BATCH_SIZE = 64
# Width of the random crops as a fraction of the picture's: from this to the whole of it.
SMALLEST_CROP = 0.8

Action = Literal["prepare", "check", "measure", "limit", "resume", "memory"]
Task = Literal["decode", "train"]


@dataclass(frozen=True)
class Job:
    """One process's work.

    Args:
        action: ``prepare`` the loader's own form of the pictures; ``check`` that one epoch has every picture once, with our
            pixels; ``measure``; and for ours alone ``limit``, ``resume``, ``memory``.
        task: what a batch is made into.
        shards_dir: the pictures, as our shards.
        form_dir: the pictures in the loader's own form.
        ours: decode with our decoder in the loader's decode hook, instead of its own.
        cores: that the process may use.
        workers: processes or threads that decode.
        warmup: batches before the clock starts, beside those that are looked at.
        batches: that are timed.
        image_size: width of the views that ``train`` makes, in pixels.
        mean, std: of all pixels, R G B, full scale being 1.
        shard_size: pictures in a shard or chunk of the loader's own form.
        step: that ``resume`` starts at.
    """

    action: Action
    task: Task
    shards_dir: str
    form_dir: str
    ours: bool
    cores: tuple[int, ...]
    workers: int
    warmup: int
    batches: int
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    shard_size: int
    step: int = 0
    batch_size: int = BATCH_SIZE

    @property
    def shards(self) -> Path:
        return Path(self.shards_dir)

    @property
    def form(self) -> Path:
        return Path(self.form_dir)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        found: dict[str, Any] = json.loads(text)
        for key in ("cores", "mean", "std"):
            found[key] = tuple(found[key])
        return cls(**found)
