"""Saves while an earlier checkpoint is still being written, and after a line of metrics was lost."""

import errno
from pathlib import Path
from typing import Any

import pytest

from galaxydist.checkpoints import store
from galaxydist.runs.metrics_file import MetricsFile
from galaxydist.training.checkpointer import SaveSchedule
from tests.helpers.forked_runs import forked
from tests.helpers.runs import quick_settings, read_metrics, run_here
from tests.helpers.scripts.held_launch import train_held


@pytest.mark.multiprocess
def test_epoch_that_ends_during_a_write_is_not_saved_by_any_rank_but_the_last_is(blobs: Path, tmp_path: Path) -> None:
    settings = quick_settings(blobs, tmp_path / "run", train__epochs=5, eval__every=5)
    with forked(train_held, settings, folder=tmp_path / "said", size=2) as ranks:
        assert ranks.wait() == [0, 0], ranks.text("err")
        first, second = (next(line for line in ranks.said(rank).splitlines() if line.startswith("saved")) for rank in (0, 1))
    assert first == second
    # The fourth epoch may end before the released write does.
    assert first in ("saved [3, 12, 15], left out [6, 9]", "saved [3, 15], left out [6, 9, 12]")
    newest = store.load(tmp_path / "run" / "checkpoints")
    assert newest is not None and newest.step == 15


def test_save_that_steps_ask_for_and_the_last_are_never_left_out() -> None:
    schedule = SaveSchedule(steps_per_epoch=3, total_steps=12, every_steps=6)
    assert [step for step in range(1, 13) if schedule.is_due(step) and schedule.may_skip(step)] == [3, 9]


def test_step_whose_line_could_not_be_written_is_not_saved_but_taken_again(
    blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The save is due at the same step, in the midst of an epoch."""
    settings = quick_settings(blobs, tmp_path / "run", train__epochs=2, train__log_every=1, train__save_steps=2)
    append = MetricsFile.append

    def fail_at_step_2(self: MetricsFile, step: int, values: Any) -> None:
        if step == 2:
            raise OSError(errno.ESTALE, "Stale file handle")
        append(self, step, values)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Stale file handle"):
        patch.setattr(MetricsFile, "append", fail_at_step_2)
        run_here(settings)
    assert store.load(tmp_path / "run" / "checkpoints") is None
    assert run_here(settings) == 0
    assert [line["step"] for line in read_metrics(tmp_path / "run") if "train/loss" in line] == [1, 2, 3, 4, 5, 6]
