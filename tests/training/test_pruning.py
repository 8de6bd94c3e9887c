"""A run that its caller ends after a validation: what it leaves, and that the same command trains on."""

import json
import os
from collections.abc import MutableMapping, Sequence
from pathlib import Path

import pytest

from galaxydist.cluster.status import read_status
from galaxydist.job_environment import find_rank
from galaxydist.runs.events import read_events
from galaxydist.runs.folder import RunFolder, read_newest_state
from galaxydist.training.launch import Leave, launch, train_recipe
from tests.helpers.forked_runs import run_forked
from tests.helpers.runs import quick_settings, run_here


def train_pruned(arguments: Sequence[str], epoch: int) -> int:
    """Train until so many epochs are done; the other ranks must not be asked."""
    rank = find_rank(os.environ).rank

    def prune(done: int, value: float | None) -> bool:
        assert rank == 0 and value is not None
        print(f"asked after {done}", flush=True)
        return done >= epoch

    def work(words: Sequence[str], environ: MutableMapping[str, str], leave: Leave) -> int:
        return train_recipe(words, environ, leave, prune)

    return launch(arguments, os.environ, work=work)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_pruned_run_of_2_ranks_is_saved_without_an_evaluation_and_trains_on_by_hand(blobs: Path, tmp_path: Path) -> None:
    arguments = quick_settings(blobs, tmp_path / "run", train__epochs=4)
    done = run_forked(train_pruned, arguments, 2, size=2)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("asked")] == ["asked after 1", "asked after 2"]
    folder = RunFolder(tmp_path / "run")
    pruned = json.loads(folder.pruned_path.read_text())
    assert (pruned["step"], pruned["epoch"], pruned["metric"]) == (6, 2, "accuracy")
    assert not folder.is_finished and not folder.evaluation_dir.exists() and folder.read_failure() is None
    state = read_newest_state(folder.checkpoints_dir)
    assert state is not None and state["progress"]["step"] == 6
    events = [event for event in read_events(folder.events_path) if event.kind == "pruned"]
    assert [(event.step, event.text) for event in events] == [(6, f"pruned after epoch 2: accuracy {pruned['value']:.4f} (val)")]
    assert events[0].text in done.stderr + done.stdout
    status = read_status(folder.path, "run", [], {})
    assert (status.state, status.group) == ("PRUNED", "finished")

    assert run_here(arguments) == 0
    assert folder.is_finished and not folder.is_pruned
    steps = [json.loads(line)["step"] for line in folder.metrics_path.read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 12


@pytest.mark.slow
@pytest.mark.multiprocess
def test_last_validation_is_reported_but_prunes_no_more(blobs: Path, tmp_path: Path) -> None:
    done = run_forked(train_pruned, quick_settings(blobs, tmp_path / "run", train__epochs=1), 1)
    assert done.returncode == 0, done.stderr
    assert "asked after 1" in done.stdout
    folder = RunFolder(tmp_path / "run")
    assert folder.is_finished and not folder.is_pruned
