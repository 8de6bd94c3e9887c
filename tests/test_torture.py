"""A run that is killed at any instant, and continued, ends bit for bit where the undisturbed one does."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from numpy.typing import NDArray

from galaxydist.runs import checkpoints
from galaxydist.shards.write import write_shards
from tests.blobs import BlobSurvey
from tests.runs import quick_settings, read_losses, read_metrics
from tests.traces import read_lines, read_steps, traced

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

ROOT = Path(__file__).parents[1]
# Everything that draws at random or keeps a memory: dropout, drop path, mixup, moving average, early stopping, class draws.
LIVELY: Mapping[str, object] = {
    "train__epochs": 8,
    "train__log_every": 3,
    "train__save_steps": 3,
    "eval__batch_size": 32,
    "train__ema": 0.9,
    "train__mixup": 0.4,
    "train__patience": 20,
    "train__metric": "loss",
    "model__drop_rate": 0.2,
    "model__drop_path_rate": 0.2,
    "optim__lr": 0.005,
}
STEPS_PER_EPOCH, STEPS = 5, 40


class Untested(BlobSurvey):
    """Without a test split: the evaluation of each run would take as long as the run."""

    @property
    def splits(self) -> Mapping[str, NDArray[np.int64]]:
        return {name: rows for name, rows in super().splits.items() if name != "test"}


@pytest.fixture(scope="module")
def galaxies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """210 galaxies: 126 in train, 5 steps of 24 an epoch."""
    folder = tmp_path_factory.mktemp("galaxies") / "shards"
    return write_shards(Untested(num_galaxies=210), folder, encoding="png", shard_size=16, workers=1).path


@dataclass
class Forks:
    """Starts runs in forked processes (``forked_runs.py``)."""

    server: "subprocess.Popen[str]"
    log: Path

    def start(self, arguments: list[str], events: Path | None = None, kill: tuple[str, int] | None = None) -> int:
        """The process number of a new run."""
        command = {
            "arguments": arguments,
            "log": str(self.log),
            "events": str(events) if events is not None else None,
            "kill": kill,
        }
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps(command) + "\n")
        self.server.stdin.flush()
        return self._answer()

    def wait(self) -> int:
        """Its exit code; -9 where it was killed."""
        return self._answer()

    def finish(self, arguments: list[str]) -> None:
        """A run, to its end."""
        self.start(arguments)
        code = self.wait()
        assert code == 0, self.log.read_text()[-3000:]

    def _answer(self) -> int:
        assert self.server.stdout is not None
        return int(self.server.stdout.readline())


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.forked_runs"]
    server = subprocess.Popen(command, cwd=ROOT, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Forks(server, tmp_path_factory.mktemp("forks") / "log.txt")
    finally:
        assert server.stdin is not None
        server.stdin.close()
        assert server.wait(30) == 0


@pytest.fixture(scope="module")
def undisturbed(galaxies: Path, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    forks.start(quick_settings(galaxies, run_dir, **LIVELY), events=run_dir.with_name("events.jsonl"))
    assert forks.wait() == 0, forks.log.read_text()[-3000:]
    return run_dir


def result(run_dir: Path) -> dict[str, Any]:
    """All that a run leaves which does not depend on when it was stopped or how fast it was: bits of every tensor of its last and
    best checkpoints, their progress, metrics.jsonl, its result."""
    left: dict[str, Any] = {"metrics": (run_dir / "metrics.jsonl").read_text()}
    for which in ("latest", "best"):
        found = checkpoints.load(run_dir / "checkpoints", which)  # type: ignore[arg-type]
        assert found is not None
        left |= {f"{which}/{name}": tensor.numpy().tobytes() for name, tensor in found.tensors.items()}
        left |= {f"{which} progress": found.state["progress"], f"{which} step": found.step}
    return {**left, "result": json.loads((run_dir / "result.json").read_text())}


def assert_same(one: Path, other: Path) -> None:
    first, second = result(one), result(other)
    assert first.keys() == second.keys()
    assert [key for key in first if first[key] != second[key]] == []
    assert not list(other.glob("checkpoints/.*")), "a save left something behind"


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come so far in time"
        time.sleep(0.002)


def lines_of(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def test_the_undisturbed_run_is_what_the_others_are_compared_with(undisturbed: Path) -> None:
    lines = read_metrics(undisturbed)
    assert lines[-1]["step"] == STEPS and len({line["step"] for line in lines if "val/loss" in line}) == 8
    newest = checkpoints.load(undisturbed / "checkpoints")
    assert newest is not None and any(name.startswith("ema/") for name in newest.tensors)
    assert newest.state["progress"]["stopping"]["best"] is not None
    # Twice the same: else nothing below means anything.
    assert result(undisturbed) == result(undisturbed)


def test_killed_at_twenty_random_instants(galaxies: Path, forks: Forks, tmp_path: Path) -> None:
    chance = random.Random(20)
    longer = {**LIVELY, "train__epochs": 24}
    forks.finish(quick_settings(galaxies, tmp_path / "undisturbed", **longer))
    # Also saved by the clock, so at other steps each time.
    settings = quick_settings(galaxies, tmp_path / "run", **longer, train__save_minutes=0.005)
    metrics = tmp_path / "run" / "timing.jsonl"
    for kill in range(20):
        pid = forks.start(settings)
        known = lines_of(metrics)
        if kill % 5:  # each fifth comes while it starts
            wait_until(lambda known=known: lines_of(metrics) > known)  # type: ignore[misc]
        time.sleep(chance.uniform(0, 0.3))
        os.kill(pid, signal.SIGKILL)
        code = forks.wait()
        assert code in (-signal.SIGKILL, 0)
        if code == 0:
            break
    assert kill >= 15, "it was done before most of the kills came"
    forks.finish(settings)
    assert_same(tmp_path / "undisturbed", tmp_path / "run")


TARGET = f".step-{4 * STEPS_PER_EPOCH:08d}-"


def save_events(undisturbed: Path) -> list[list[str]]:
    """The changes of the disk of the save at the end of the fourth epoch."""
    events = [json.loads(line) for line in undisturbed.with_name("events.jsonl").read_text().splitlines()]
    begun = [n for n, (name, *paths) in enumerate(events) if name == "galaxydist.write" and "/.step-" in paths[0]]
    (first,) = [n for n in begun if TARGET in events[n][1] and events[n][1].endswith(".tmp")]
    last = next(n for n in begun if n > first and TARGET not in events[n][1])
    return events[first:last]


def test_killed_between_validation_and_save_and_at_every_change_of_the_disk_in_it(
    galaxies: Path, undisturbed: Path, forks: Forks, tmp_path: Path
) -> None:
    events = save_events(undisturbed)
    assert_order(events)
    before = tmp_path / "before"
    forks.start(quick_settings(galaxies, before, **LIVELY), kill=(TARGET, 0))
    assert forks.wait() == -signal.SIGKILL
    assert read_metrics(before)[-1]["step"] == 4 * STEPS_PER_EPOCH and "val/loss" in read_metrics(before)[-1]
    for number in range(len(events)):
        run_dir = tmp_path / f"run-{number}"
        settings = quick_settings(galaxies, run_dir, **LIVELY)
        shutil.copytree(before, run_dir)  # the first eighteen steps are the same for all
        if number:
            forks.start(settings, kill=(TARGET, number))
            assert forks.wait() == -signal.SIGKILL
        forks.finish(settings)
        assert_same(undisturbed, run_dir)


def assert_order(events: list[list[str]]) -> None:
    """The new checkpoint whole and on the disk, then its name, then the pointer, then the old one goes."""
    saving = [(name.removeprefix("galaxydist."), Path(paths[-1]).name) for name, *paths in events]
    target = next(name.removeprefix(".").removesuffix(".tmp") for kind, name in saving if kind == "write")
    renamed = saving.index(("rename", target))
    before, after = saving[:renamed], saving[renamed + 1 :]
    written = {name for kind, name in before if kind == "write" and name != f".{target}.tmp"}
    synced = {name for kind, name in before if kind == "fsync"}
    assert "checkpoint.json" in written and written <= synced and any(name.endswith(".safetensors") for name in synced)
    assert ("fsync", f".{target}.tmp") in before and not [kind for kind, _ in before if kind == "unlink"]
    assert after[0] == ("fsync", "checkpoints")
    pointed = after.index(("rename", "latest"))
    removed = [place for place, (kind, _) in enumerate(after) if kind == "unlink"]
    assert removed and pointed < min(removed)


@contextlib.contextmanager
def group(command: list[str], log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A launcher and its ranks (which torchrun puts into sessions of their own), all gone at the end."""
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    try:
        yield process
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(process.pid)
            for started in (launcher, *launcher.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    started.kill()
        process.wait()


def test_killed_and_continued_on_other_numbers_of_processes(galaxies: Path, tmp_path: Path) -> None:
    """The same galaxies in every step; in double precision, without dropout and batch statistics, the same weights."""
    options = {**LIVELY, "train__precision": "fp64", "model__drop_rate": 0.0, "model__drop_path_rate": 0.0}
    options |= {"model__norm": "group", "train__epochs": 24, "train__log_every": 1}
    whole, trace = tmp_path / "whole", tmp_path / "trace"
    command = traced(1, tmp_path / "trace-whole", quick_settings(galaxies, whole, **options))
    assert subprocess.run(command, capture_output=True, check=False, timeout=280).returncode == 0
    run_dir, log = tmp_path / "run", tmp_path / "log.txt"
    settings = quick_settings(galaxies, run_dir, **options)
    for num_processes in (1, 2, 3, 4):
        with group(traced(num_processes, trace, settings), log):
            # Five steps further, so that something is saved.
            wait_until(
                lambda size=num_processes: len({s["step"] for s in read_lines(trace) if s["world_size"] == size}) >= 5, 240
            )  # type: ignore[misc]
    with group(traced(2, trace, settings), log) as process:
        assert process.wait(240) == 0, log.read_text()[-3000:]
    one, other = read_steps(tmp_path / "trace-whole"), read_steps(trace)
    assert sorted(one) == list(range(120)) == sorted(other)
    assert {line["world_size"] for line in read_lines(trace)} == {1, 2, 3, 4}
    for step, taken in one.items():
        assert (taken.samples, taken.images, taken.rate) == (other[step].samples, other[step].images, other[step].rate)
    first, second = checkpoints.load(whole / "checkpoints"), checkpoints.load(run_dir / "checkpoints")
    assert first is not None and second is not None
    for name, tensor in first.tensors.items():
        assert torch.allclose(tensor, second.tensors[name], rtol=0, atol=1e-9), name
    losses, others = read_losses(whole), read_losses(run_dir)
    assert losses.keys() == others.keys()
    assert max(abs(losses[step] - others[step]) for step in losses) < 1e-9


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_to_one_rank_saves_the_same_step_on_all(number: int, galaxies: Path, tmp_path: Path) -> None:
    run_dir, trace, log = tmp_path / "run", tmp_path / "trace", tmp_path / "log.txt"
    settings = quick_settings(galaxies, run_dir, **{**LIVELY, "train__epochs": 400})
    with group(traced(3, trace, settings), log) as process:
        wait_until(lambda: any(line["step"] >= 9 for line in read_lines(trace)), 120)
        pids = {line["rank"]: line["pid"] for line in read_lines(trace)}
        sent = time.monotonic()
        os.kill(pids[1], number)
        process.wait(60)
        assert time.monotonic() - sent < 30 + 10  # the save, and the launcher's own end
        assert not [pid for pid in pids.values() if psutil.pid_exists(pid)]
    text = log.read_text()
    assert f"stopped by signal {int(number)} at step" in text and text.count("stopped by signal") == 1
    assert "exitcode  : 75" in text
    newest = checkpoints.load(run_dir / "checkpoints")
    assert newest is not None
    last = {rank: max(line["step"] for line in read_lines(trace) if line["rank"] == rank) for rank in range(3)}
    assert set(last.values()) == {newest.step - 1}


def test_two_ranks_are_stopped_and_continue_bit_for_bit(galaxies: Path, tmp_path: Path) -> None:
    """Batch statistics are each rank's own, and come back to it."""
    options = {**LIVELY, "train__epochs": 7}
    whole, run_dir, log = tmp_path / "whole", tmp_path / "run", tmp_path / "log.txt"
    with group(traced(2, tmp_path / "trace-whole", quick_settings(galaxies, whole, **options)), log) as process:
        assert process.wait(240) == 0, log.read_text()[-3000:]
    settings = quick_settings(galaxies, run_dir, **options)
    trace = tmp_path / "trace"
    with group(traced(2, trace, settings), log) as process:
        wait_until(lambda: any(line["step"] >= 15 for line in read_lines(trace)), 120)
        os.kill(next(line["pid"] for line in read_lines(trace) if line["rank"] == 0), signal.SIGUSR2)
        process.wait(60)
    newest = checkpoints.load(run_dir / "checkpoints")
    assert newest is not None and 15 < newest.step < 35
    with group(traced(2, trace, settings), log) as process:
        assert process.wait(240) == 0, log.read_text()[-3000:]
    assert_same(whole, run_dir)
