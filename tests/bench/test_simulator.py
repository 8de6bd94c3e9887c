"""Guard (1): the simulated classes cannot be told by colour, brightness or a thumbnail alone."""

import json
from pathlib import Path

import numpy as np
import pytest

from galaxydist.bench.simulator import (
    GUARD_LIMIT,
    TUNING_ROWS,
    colour_features,
    measure_guards,
    split_by_row,
    thumbnails,
)
from galaxydist.cli.main import main
from galaxydist.errors import UserError
from galaxydist.surveys.image_folder import open_image_folder


def test_colour_features_and_thumbnails_have_known_values() -> None:
    images = np.zeros((2, 256, 256, 3), np.uint8)
    images[1, :, :, 0] = 100
    features = colour_features(images)
    assert features.shape == (2, 21)
    assert features[0].max() == 0.0
    assert sorted(features[1].tolist()) == [0.0] * 15 + [100.0] * 6
    assert thumbnails(images).shape == (2, 768)
    assert thumbnails(images)[1].reshape(16, 16, 3)[3, 5].tolist() == [100.0, 0.0, 0.0]


def test_simulator_guard_refuses_too_few_galaxies() -> None:
    with pytest.raises(UserError, match="at least 50"):
        measure_guards(30)


# Nightly, for it takes most of a minute: the simulator changes seldom, and its draws have golden values in CI.
@pytest.mark.nightly
def test_simulated_classes_cannot_be_separated_by_colour_or_thumbnail(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "simulator", "--num-galaxies", "400"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["passed"] and 0.2 < max(result["simulated"].values()) <= GUARD_LIMIT


@pytest.mark.nightly
def test_simulated_classes_are_as_hard_as_real_galaxies_within_10_points(real_sample: Path) -> None:
    result = measure_guards(1000, seed=0, real_dir=real_sample)
    assert result["passed"] and max(result["simulated"].values()) <= GUARD_LIMIT
    # Not harder by much either: the classes' colours and sizes are the real ones'.
    for name, accuracy in result["real"].items():
        assert abs(result["simulated"][name] - accuracy) < 0.10


def test_the_tuning_half_is_the_first_rows_of_each_class(real_sample: Path) -> None:
    survey = split_by_row(open_image_folder(real_sample, fold=(0, 2)))
    tuning, held_out = survey.splits["train"], survey.splits["test"]
    assert len(tuning) == 10 * TUNING_ROWS and len(tuning) + len(held_out) == 999
    assert not set(tuning) & set(held_out)
    row_of = np.array([int(Path(file).stem) for file in survey.images.files])
    for label in range(10):
        of_class = survey.labels == label
        assert row_of[tuning][of_class[tuning]].max() < row_of[held_out][of_class[held_out]].min()
