"""Device, data, processes and deadlines of the GPU checks, and the rows that they report."""

import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tests.helpers.blobs import BlobSurvey
from tests.helpers.forked_runs import Ranks, forked, wait_for_exits

Device = Literal["cuda", "cpu"]
Verdict = Literal["pass", "fail", "measured", "needs CUDA", "not possible here"]

# Number of simulated galaxies for the checks of speed; a bundle brings them along.
NUM_SIMULATED = {"cuda": 400, "cpu": 40}


class TimeUpError(Exception):
    """A check has used up its time."""


@dataclass(frozen=True)
class Row:
    """One result of a check.

    Args:
        name: of the result.
        value: number or text that was found.
        wanted: the pass mark in words; empty: there is none.
        verdict: ``measured`` if there is no pass mark, ``needs CUDA`` if a CPU cannot show it, ``not possible here`` if this
            machine lacks something.
    """

    name: str
    value: Any
    wanted: str = ""
    verdict: Verdict = "measured"


def at_most(name: str, value: float, limit: float) -> Row:
    """Return a row that passes up to a limit."""
    return Row(name, value, f"at most {limit:g}", "pass" if value <= limit else "fail")


def at_least(name: str, value: float, limit: float) -> Row:
    """Return a row that passes from a limit on."""
    return Row(name, value, f"at least {limit:g}", "pass" if value >= limit else "fail")


def equal(name: str, value: Any, wanted: Any) -> Row:
    """Return a row that passes if both are equal."""
    return Row(name, value, str(wanted), "pass" if value == wanted else "fail")


def one_of(name: str, value: Any, wanted: Mapping[Any, str]) -> Row:
    """Return a row that passes for some values, each of which has its meaning."""
    text = ", ".join(f"{one} ({meaning})" for one, meaning in wanted.items())
    return Row(name, value, f"one of {text}", "pass" if value in wanted else "fail")


def not_possible(name: str, reason: str) -> Row:
    """Return the row of something that this machine lacks the means for."""
    return Row(name, None, reason, "not possible here")


def needs_cuda(name: str, reason: str) -> Row:
    """Return the row of something that only a GPU can show."""
    return Row(name, None, reason, "needs CUDA")


@dataclass
class Rig:
    """Settings and folders of a check.

    Processes are forked from one that has imported torch and has not touched CUDA; each is killed at the deadline, with all that
    it has started.

    Args:
        device: of the trainings.
        folder: for the files of this check.
        data_dir: for the data of all checks.
        deadline: monotonic seconds at which the check ends.
    """

    device: Device
    folder: Path
    data_dir: Path
    deadline: float
    _number: int = field(default=0, init=False)

    @property
    def is_cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def environ(self) -> dict[str, str]:
        return {} if self.is_cuda else {"CUDA_VISIBLE_DEVICES": ""}

    @property
    def blobs(self) -> Path:
        """The manifest of 72 drawn blobs in three classes, all of them to train on."""
        return self._find_blobs("blobs", has_splits=False)

    @property
    def blobs_with_splits(self) -> Path:
        """The manifest of the same blobs, and others to validate and test on."""
        return self._find_blobs("blobs-with-splits", has_splits=True)

    def _find_blobs(self, name: str, *, has_splits: bool) -> Path:
        folder = self.data_dir / name
        if not (folder / "manifest.json").exists():
            self.call(write_blobs, str(folder), has_splits)
        return folder / "manifest.json"

    @property
    def galaxies(self) -> Path:
        """The manifest of simulated galaxies as JPEG."""
        count = NUM_SIMULATED[self.device]
        found = sorted(self.data_dir.glob(f"simulated-*-{count}/manifest.json"))
        if not found:
            self.call(write_galaxies, str(self.data_dir), count)
            found = sorted(self.data_dir.glob(f"simulated-*-{count}/manifest.json"))
        return found[0]

    @cached_property
    def card_bytes(self) -> int:
        """Memory of the card in bytes."""
        found: int = self.call(read_card_bytes)
        return found

    def left(self) -> float:
        """Return the seconds that are left to the check.

        Raises:
            TimeUpError: none are left.
        """
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeUpError
        return left

    def new_folder(self) -> Path:
        """Return an empty folder."""
        self._number += 1
        folder = self.folder / f"{self._number:02d}"
        folder.mkdir(parents=True)
        return folder

    @contextmanager
    def start(self, work: Any, *arguments: object, size: int = 1, environ: Mapping[str, str] | None = None) -> Iterator[Ranks]:
        """Call a function in ``size`` new processes; at the end all are gone."""
        self.left()
        options = {"folder": self.new_folder(), "size": size, "environ": {**self.environ, **(environ or {})}}
        with forked(work, *arguments, **options) as ranks:
            yield ranks

    def wait(self, ranks: Ranks, *but: int, seconds: float | None = None) -> list[int | None]:
        """Return the exit codes of all ranks but some, once these have left by themselves.

        Raises:
            TimeUpError: some still run at the deadline, or after ``seconds``.
        """
        limit = self.left() if seconds is None else min(seconds, self.left())
        waited = [rank for rank in range(len(ranks.processes)) if rank not in but]
        if not wait_for_exits([ranks.processes[rank] for rank in waited], limit):
            living = [rank for rank in waited if ranks.processes[rank].is_alive()]
            raise TimeUpError(f"rank {living} still runs: {ranks.text('err')[-1500:]}")
        return [ranks.exit_codes[rank] for rank in waited]

    def call(self, work: Any, *arguments: object, environ: Mapping[str, str] | None = None) -> Any:
        """Call a function in a new process and return its result, which is plain JSON.

        Raises:
            TimeUpError: it did not return in time.
            RuntimeError: it failed, with the end of what it printed.
        """
        self.left()
        answer = self.folder / f"answer-{self._number}.json"
        answer.parent.mkdir(parents=True, exist_ok=True)
        with self.start(write_answer, answer, (work.__module__, work.__name__), arguments, environ=environ) as ranks:
            (code,) = self.wait(ranks)
            if code:
                raise RuntimeError(f"{work.__name__} ended with {code}: {ranks.text('err').strip()[-1500:]}")
        return json.loads(answer.read_text())


def write_answer(path: Path, function: tuple[str, str], arguments: Sequence[Any]) -> int:
    """Call a function and write its result, in the new process."""
    module, name = function
    try:
        found = getattr(importlib.import_module(module), name)(*arguments)
    except Exception:
        traceback.print_exc()
        return 1
    path.write_text(json.dumps(found))
    sys.stdout.flush()
    sys.stderr.flush()
    return 0


def read_card_bytes() -> int:
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory)


class TrainBlobs(BlobSurvey):
    """Blobs without a validation or test split."""

    @property
    def splits(self) -> Mapping[str, NDArray[np.int64]]:
        return {"train": super().splits["train"]}


def write_blobs(folder: str, has_splits: bool) -> None:
    from galaxydist.shards.writer.writer import write_shards

    survey = BlobSurvey() if has_splits else TrainBlobs()
    write_shards(survey, Path(folder), encoding="png", shard_size=16, workers=1)


def write_galaxies(folder: str, count: int) -> None:
    from galaxydist.bench.loader_speed import simulated_shards

    simulated_shards(Path(folder), count, workers=os.cpu_count())
