"""A run that is killed at any instant, and continued, ends bit for bit where the undisturbed one does."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from galaxydist.checkpoints import store
from galaxydist.errors import EXIT_STOPPED
from galaxydist.shards.writer.writer import write_shards
from tests.helpers.forked_runs import Ranks, forked, run_forked, train, train_watched
from tests.helpers.lively_runs import LIVELY, Untested, assert_same, wait_until
from tests.helpers.runs import quick_settings, read_losses, read_metrics
from tests.helpers.scripts.traced_launch import train_traced
from tests.helpers.traces import read_lines, read_steps

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
STEPS_PER_EPOCH, STEPS = 5, 40


@pytest.fixture(scope="module")
def galaxies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """210 galaxies: 126 in train, 5 steps of 24 an epoch."""
    folder = tmp_path_factory.mktemp("galaxies") / "shards"
    return write_shards(Untested(num_galaxies=210), folder, encoding="png", shard_size=16, workers=1).path


def finish(settings: list[str]) -> None:
    """A run of one process, to its end."""
    done = run_forked(train, settings)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def undisturbed(galaxies: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    done = run_forked(train_watched, quick_settings(galaxies, run_dir, **LIVELY), run_dir.with_name("events.jsonl"))
    assert done.returncode == 0, done.stderr[-3000:]
    return run_dir


def lines_of(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def test_undisturbed_run_has_all_steps_validations_and_an_ema(undisturbed: Path) -> None:
    lines = read_metrics(undisturbed)
    assert lines[-1]["step"] == STEPS and len({line["step"] for line in lines if "val/loss" in line}) == 8
    newest = store.load(undisturbed / "checkpoints")
    assert newest is not None and any(name.startswith("ema/") for name in newest.tensors)
    assert newest.state["progress"]["stopping"]["best"] is not None


@pytest.mark.parametrize(("kills", "epochs"), [(4, 8), pytest.param(20, 36, marks=pytest.mark.nightly)])
def test_run_killed_at_random_instants_and_continued_is_bit_equal(
    kills: int, epochs: int, galaxies: Path, undisturbed: Path, tmp_path: Path
) -> None:
    chance = random.Random(kills)
    longer = {**LIVELY, "train__epochs": epochs}
    if longer != LIVELY:
        undisturbed = tmp_path / "undisturbed"
        finish(quick_settings(galaxies, undisturbed, **longer))
    # Also saved by the clock, so at other steps each time.
    settings = quick_settings(galaxies, tmp_path / "run", **longer, train__save_minutes=0.005)
    metrics = tmp_path / "run" / "timing.jsonl"
    for kill in range(kills):
        known = lines_of(metrics)
        with forked(train, settings, folder=tmp_path / f"log-{kill}") as run:
            if kill % 5:  # each fifth comes while it starts
                wait_until(lambda known=known, run=run: lines_of(metrics) > known or run.exit_codes != [None])  # type: ignore[misc]
            time.sleep(chance.uniform(0, 0.15))
            run.kill()
        assert run.exit_codes in ([-signal.SIGKILL], [0]), run.text("err")[-3000:]
        if run.exit_codes == [0]:
            break
    assert kill >= 0.75 * kills - 1, "it was done before most of the kills came"
    finish(settings)
    assert_same(undisturbed, tmp_path / "run")


LAST_BUT_ONE = STEPS - STEPS_PER_EPOCH
TARGET = f".step-{LAST_BUT_ONE:08d}-"


def save_events(undisturbed: Path) -> list[list[str]]:
    """The changes of the disk of the save at the end of the last epoch but one."""
    events = [json.loads(line) for line in undisturbed.with_name("events.jsonl").read_text().splitlines()]
    begun = [n for n, (name, *paths) in enumerate(events) if name == "galaxydist.write" and "/.step-" in paths[0]]
    (first,) = [n for n in begun if TARGET in events[n][1] and events[n][1].endswith(".tmp")]
    last = next(n for n in begun if n > first and TARGET not in events[n][1])
    return events[first:last]


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.nightly)], ids=["one of each kind", "all"])
def test_run_killed_before_or_during_a_save_and_continued_is_bit_equal(
    every: bool, galaxies: Path, undisturbed: Path, tmp_path: Path
) -> None:
    events = save_events(undisturbed)
    assert_order(events)
    numbers = range(len(events)) if every else turning_points(events)
    before = tmp_path / "before"
    kill_before(0, quick_settings(galaxies, before, **LIVELY))
    assert read_metrics(before)[-1]["step"] == LAST_BUT_ONE and "val/loss" in read_metrics(before)[-1]
    for number in numbers:
        run_dir = tmp_path / f"run-{number}"
        settings = quick_settings(galaxies, run_dir, **LIVELY)
        shutil.copytree(before, run_dir)  # the steps before are the same for all
        if number:
            kill_before(number, settings)
        finish(settings)
        assert_same(undisturbed, run_dir)


def test_run_killed_while_it_writes_a_small_image_leaves_nothing_of_it(galaxies: Path, undisturbed: Path, tmp_path: Path) -> None:
    settings = quick_settings(galaxies, tmp_path / "run", **LIVELY)
    assert run_forked(train_watched, settings, None, ("/galaxies/.", 1)).returncode == -signal.SIGKILL
    (half,) = (tmp_path / "run" / "galaxies").iterdir()
    assert half.name.startswith(".") and half.suffix == ".tmp"
    finish(settings)
    assert_same(undisturbed, tmp_path / "run")


def turning_points(events: list[list[str]]) -> list[int]:
    """Return the numbers of the changes before which a continued run finds different things in the folder.

    They are: nothing is written; the tensors are; all is; the new checkpoint has its name; the pointer has it too; the old
    checkpoint is removed in part.
    """
    changes = [(name.removeprefix("galaxydist."), Path(paths[-1]).name) for name, *paths in events]
    described = changes.index(("write", "checkpoint.json"))
    renamed = next(number for number, (kind, name) in enumerate(changes) if kind == "rename" and name.startswith("step-"))
    pointed = changes.index(("rename", "latest"))
    removed = [number for number, (kind, _) in enumerate(changes) if kind == "unlink" and number > pointed]
    return [0, described, renamed, pointed, *removed[:2]]


def kill_before(number: int, settings: list[str]) -> None:
    """A run that is killed before a change of the disk, counted from the first of the save."""
    assert run_forked(train_watched, settings, None, (TARGET, number)).returncode == -signal.SIGKILL


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


def run_to_end(size: int, trace: Path, settings: list[str]) -> None:
    """A traced run of so many processes."""
    done = run_forked(train_traced, trace, settings, size=size)
    assert done.returncode == 0, done.stderr[-3000:]


def test_run_killed_and_continued_on_1_3_and_2_processes_has_the_same_fp64_weights(galaxies: Path, tmp_path: Path) -> None:
    """The same galaxies in every step; in double precision, without dropout and batch statistics, the same weights."""
    options = {**LIVELY, "train__precision": "fp64", "model__drop_rate": 0.0, "model__drop_path_rate": 0.0}
    options |= {"model__norm": "group", "train__epochs": 10, "train__log_every": 1}
    whole, trace = tmp_path / "whole", tmp_path / "trace"
    run_to_end(1, tmp_path / "trace-whole", quick_settings(galaxies, whole, **options))
    run_dir, log = tmp_path / "run", tmp_path / "log"
    settings = quick_settings(galaxies, run_dir, **options)
    for size in (1, 3):
        with forked(train_traced, trace, settings, folder=log, size=size):
            # Five steps further, so that something is saved.
            wait_until(lambda size=size: len({s["step"] for s in read_lines(trace) if s["world_size"] == size}) >= 5, 240)  # type: ignore[misc]
    run_to_end(2, trace, settings)
    one, other = read_steps(tmp_path / "trace-whole"), read_steps(trace)
    assert sorted(one) == list(range(50)) == sorted(other)
    assert {line["world_size"] for line in read_lines(trace)} == {1, 2, 3}
    for step, taken in one.items():
        assert (taken.samples, taken.images, taken.rate) == (other[step].samples, other[step].images, other[step].rate)
    first, second = store.load(whole / "checkpoints"), store.load(run_dir / "checkpoints")
    assert first is not None and second is not None
    for name, tensor in first.tensors.items():
        assert torch.allclose(tensor, second.tensors[name], rtol=0, atol=1e-9), name
    losses, others = read_losses(whole), read_losses(run_dir)
    assert losses.keys() == others.keys()
    assert max(abs(losses[step] - others[step]) for step in losses) < 1e-9


def wait_until_stopped_on_all(run: Ranks, number: int, run_dir: Path, trace: Path) -> None:
    """All ranks have left after the same step, which is saved."""
    size = len(run.processes)
    assert run.wait() == [EXIT_STOPPED] * size
    text = run.text("err")
    assert f"stopped by {signal.Signals(number).name} at step" in text and text.count("stopped by") == 1
    newest = store.load(run_dir / "checkpoints")
    assert newest is not None
    last = {rank: max(line["step"] for line in read_lines(trace) if line["rank"] == rank) for rank in range(size)}
    assert set(last.values()) == {newest.step - 1}


def test_sigterm_to_one_of_3_ranks_saves_the_same_step_on_all(galaxies: Path, tmp_path: Path) -> None:
    """SIGTERM to one of three, which is not the first."""
    run_dir, trace = tmp_path / "run", tmp_path / "trace"
    settings = quick_settings(galaxies, run_dir, **{**LIVELY, "train__epochs": 400})
    with forked(train_traced, trace, settings, folder=tmp_path / "log", size=3) as run:
        wait_until(lambda: any(line["step"] >= 9 for line in read_lines(trace)))
        os.kill(run.pids[1], signal.SIGTERM)
        wait_until_stopped_on_all(run, signal.SIGTERM, run_dir, trace)


def test_run_of_2_ranks_stopped_by_sigusr2_and_continued_is_bit_equal(galaxies: Path, tmp_path: Path) -> None:
    """Batch statistics are each rank's own, and come back to it."""
    options = {**LIVELY, "train__epochs": 7}
    whole, run_dir, trace = tmp_path / "whole", tmp_path / "run", tmp_path / "trace"
    run_to_end(2, tmp_path / "trace-whole", quick_settings(galaxies, whole, **options))
    settings = quick_settings(galaxies, run_dir, **options)
    with forked(train_traced, trace, settings, folder=tmp_path / "log", size=2) as run:
        wait_until(lambda: any(line["step"] >= 15 for line in read_lines(trace)))
        os.kill(run.pids[0], signal.SIGUSR2)
        wait_until_stopped_on_all(run, signal.SIGUSR2, run_dir, trace)
    newest = store.load(run_dir / "checkpoints")
    assert newest is not None and 15 < newest.step < 35
    run_to_end(2, trace, settings)
    assert_same(whole, run_dir)
