"""The loss scale of fp16, on a CPU: torch has its scaler and its half precision there too, only too slow to be of use."""

import functools
import sys
from pathlib import Path

import pytest
import torch

from galaxydist.checkpoints import store
from tests.helpers.runs import quick_settings, read_metrics, run_here

OVERFLOWING = """
import math
import torch
from torch import nn

def overflow(gradient):
    return torch.full_like(gradient, math.inf)

def net(num_classes: int, image_size: int, drop_rate: float = 0.0) -> nn.Module:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes))
    model[-1].bias.register_hook(overflow)
    return model
"""


@pytest.fixture
def half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a CPU train with fp16, and begin at a scale of 4."""
    monkeypatch.setattr("galaxydist.distributed.resolve_precision", lambda precision, _: precision)
    monkeypatch.setattr("torch.amp.GradScaler", functools.partial(torch.amp.GradScaler, init_scale=4.0, growth_interval=2))


@pytest.mark.usefixtures("half_precision")
def test_loss_scale_of_fp16_is_logged_and_continued(blobs: Path, tmp_path: Path) -> None:
    settings = quick_settings(blobs, tmp_path / "run", train__precision="fp16", train__epochs=1, train__log_every=1)
    assert run_here(settings) == 0
    scales = [line["train/loss_scale"] for line in read_metrics(tmp_path / "run") if "train/loss" in line]
    assert scales == [4.0, 8.0, 8.0]
    more = [word for word in settings if not word.startswith("train.epochs")]
    assert run_here([*more, "train.epochs=2", "resume.force=[train.epochs]"]) == 0
    scales = [line["train/loss_scale"] for line in read_metrics(tmp_path / "run") if "train/loss" in line]
    assert scales == [4.0, 8.0, 8.0, 16.0, 16.0, 32.0]


@pytest.mark.usefixtures("half_precision")
def test_run_whose_loss_scale_falls_below_1_stops_with_a_message(
    blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "overflowing.py").write_text(OVERFLOWING)
    monkeypatch.chdir(tmp_path)
    changes = {"model__name": "overflowing:net", "model__width": None, "train__save_steps": 1, "train__log_every": 1}
    assert run_here(quick_settings(blobs, tmp_path / "run", train__precision="fp16", **changes)) == 1
    sys.modules.pop("overflowing")
    error = capsys.readouterr().err
    assert "overflows in fp16 at step 2 (from 0), and the loss scale has fallen to 0.5" in error
    assert "train.precision=bf16" in error and error.count("galaxydist: error") == 1
    assert [line["train/loss_scale"] for line in read_metrics(tmp_path / "run") if "train/loss" in line] == [2.0, 1.0]
    newest = store.load(tmp_path / "run" / "checkpoints")
    assert newest is not None and newest.state["described"]["scaler"]["scale"] >= 1.0


def test_loss_scale_is_not_logged_with_other_precisions(blobs: Path, tmp_path: Path) -> None:
    assert run_here(quick_settings(blobs, tmp_path / "run", train__precision="bf16", train__epochs=1)) == 0
    assert not any("train/loss_scale" in line for line in read_metrics(tmp_path / "run"))
