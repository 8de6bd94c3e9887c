"""Runs that draw at random and keep memories of all kinds, for tests that stop and continue them."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from galaxydist.checkpoints import store
from tests.helpers.blobs import BlobSurvey
from tests.helpers.checkpoints import load_best

# Everything that draws at random or keeps a memory: dropout, drop path, mixup, moving average, early stopping, class draws.
LIVELY: Mapping[str, object] = {
    "train__epochs": 8,
    "train__log_every": 3,
    "train__save_steps": 7,  # in the midst of epochs of five steps, and at the end of the last but one
    "eval__batch_size": 32,
    "train__ema": 0.9,
    "train__mixup": 0.4,
    "train__patience": 20,
    "train__metric": "loss",
    "model__drop_rate": 0.2,
    "model__drop_path_rate": 0.2,
    "optim__lr": 0.005,
}


class Untested(BlobSurvey):
    """Without a test split: the evaluation of each run would take as long as the run."""

    @property
    def splits(self) -> Mapping[str, NDArray[np.int64]]:
        return {name: rows for name, rows in super().splits.items() if name != "test"}


def result(run_dir: Path) -> dict[str, Any]:
    """Return all that a run leaves, but for what depends on when it was stopped or how fast it was.

    These are the bits of every tensor of its last and best checkpoints, their progress, metrics.jsonl, validation.jsonl, the
    small images of galaxies and its result.
    """
    left: dict[str, Any] = {name: (run_dir / f"{name}.jsonl").read_text() for name in ("metrics", "validation")}
    left |= {f"galaxies/{path.name}": path.read_bytes() for path in sorted((run_dir / "galaxies").iterdir())}
    for which, load in (("latest", store.load), ("best", load_best)):
        found = load(run_dir / "checkpoints")
        assert found is not None
        left |= {f"{which}/{name}": tensor.numpy().tobytes() for name, tensor in found.tensors.items()}
        left |= {f"{which} progress": found.state["progress"], f"{which} step": found.step}
    return {**left, "result": json.loads((run_dir / "result.json").read_text())}


def assert_same(one: Path, other: Path) -> None:
    first, second = result(one), result(other)
    assert first.keys() == second.keys()
    assert [key for key in first if first[key] != second[key]] == []
    assert not [*other.rglob(".*.tmp"), *other.glob("checkpoints/.*")], "a killed write left something behind"


def wait_until(condition: Callable[[], bool], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come so far in time"
        time.sleep(0.002)
