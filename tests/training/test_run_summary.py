"""The lines that a new run prints before its first step and after its last one."""

from pathlib import Path

import pytest

from galaxydist.recipe.resolve import load_recipe
from galaxydist.training import run_summary
from galaxydist.training.run_summary import duration, smaller_command
from tests.helpers.runs import quick_settings, run_here


def test_new_run_prints_data_model_steps_and_advice_and_a_continued_one_does_not(
    blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_summary, "LONG_RUN_S", 0.0)
    run_dir = tmp_path / "run"
    settings = quick_settings(blobs, run_dir, train__epochs=2, train__batch_size=25)
    assert run_here(settings) == 0
    printed = capsys.readouterr()
    before, _ = printed.err.split("epoch 1/2", maxsplit=1)
    for line in (
        f"run folder  {run_dir}",
        "data        blobs (original), 3 classes, 72 train, 24 val, 24 test",
        "model       custom_cnn, 0.04 million parameters, images of 32 pixels",
        "steps       2 an epoch, 4 in 2 epochs, 25 galaxies each; 22 galaxies are left out of each epoch, others each time",
    ):
        assert f"\n{line}\n" in before
    assert "\ntime        about " in before and " an epoch, " in before
    # The advice is the user's own command: with its data, without the folder and the model of this run.
    (advice,) = [line for line in before.splitlines() if "a smaller run: " in line]
    assert f"recipe=custom_cnn data.manifest={blobs} data.image_size=32 " in advice and "train.epochs=2" in advice
    assert "run.dir" not in advice and "model.width" not in advice
    assert f"galaxydist gallery {run_dir}\n" in printed.out and f"galaxydist report {tmp_path}\n" in printed.out
    (run_dir / "result.json").unlink()
    assert run_here(settings) == 0
    assert "run folder  " not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "advised"),
    [
        (["vit", "data.dataset=mine", "optim.lr=1e-4"], "recipe=custom_cnn data.dataset=mine data.image_size=64 train.epochs=5"),
        (["d4_cnn", "train.epochs=3"], "recipe=d4_cnn train.epochs=3 data.image_size=64"),
    ],
)
def test_suggested_smaller_run_keeps_the_users_data(given: list[str], advised: str) -> None:
    resolved = load_recipe(given)
    words = smaller_command(resolved.recipe, resolved.origins).split()
    assert words[:2] == ["galaxydist", "train"]
    assert words[2:] == advised.split()
    load_recipe(words[2:])  # it can be typed as it is


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.04, "3.0 seconds"), (59, "59 seconds"), (150, "2.5 minutes"), (5900, "98 minutes"), (9000, "2.5 hours"), (4e5, "5 days")],
)
def test_durations_are_printed_with_two_digits(seconds: float, text: str) -> None:
    assert duration(seconds) == text
