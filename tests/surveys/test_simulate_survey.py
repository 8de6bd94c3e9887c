"""The simulated survey as a file: schema, determinism, proportions, and the places that test the split."""

import hashlib
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from galaxydist.errors import UserError
from galaxydist.galaxy import GALAXY10_COUNTS
from galaxydist.surveys.hdf5_schema import COLUMNS, IMAGE_SHAPE
from galaxydist.surveys.simulate.survey import (
    HANDFUL,
    SurveyPlan,
    class_counts,
    draw_image,
    draw_slab,
    plan_survey,
    simulate_survey,
)


def _separation(plan: SurveyPlan, one: int, other: int) -> float:
    east = ((plan.ra[one] - plan.ra[other] + 180.0) % 360.0 - 180.0) * np.cos(np.radians(plan.dec[one]))
    return float(np.hypot(east, plan.dec[one] - plan.dec[other]) * 3600.0)


def test_simulated_survey_file_has_the_galaxy10_schema(tmp_path: Path) -> None:
    path = tmp_path / "simulated.h5"
    simulate_survey(path, 40, seed=1, workers=1)
    with h5py.File(path) as file:
        assert set(file) == {"images", *COLUMNS}
        assert file["images"].shape == (40, *IMAGE_SHAPE)
        assert file["images"].dtype == np.uint8
        for name, dtype in COLUMNS.items():
            assert file[name].dtype == dtype
        assert np.array_equal(np.sort(file["ans"][:]), file["ans"][:])
        assert set(np.round(file["pxscale"][:], 3)) <= {0.262, 0.524}
        assert np.all((file["redshift"][:] > 0.0) & (file["redshift"][:] < 0.4))
        assert np.all((file["dec"][:] > -20.0) & (file["dec"][:] < 35.0))
        assert file.attrs["survey"] == "simulated"
        assert file.attrs["seed"] == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["simulated.h5"]


@pytest.mark.multiprocess
def test_simulated_survey_is_byte_equal_for_any_number_of_workers(tmp_path: Path) -> None:
    hashes = []
    for workers in (1, 2):
        path = tmp_path / f"{workers}.h5"
        simulate_survey(path, 70, seed=5, workers=workers)
        hashes.append(hashlib.sha256(path.read_bytes()).hexdigest())
    assert hashes[0] == hashes[1]


def test_simulated_image_depends_only_on_seed_and_row() -> None:
    plan = plan_survey(30, seed=2)
    images, _, _ = draw_slab(plan, 10, 12)
    assert np.array_equal(images[1], draw_image(plan, 11)[0])
    assert not np.array_equal(images[0], images[1])
    assert not np.array_equal(images[1], draw_image(plan_survey(30, seed=3), 11)[0])


def test_simulated_class_counts_have_the_proportions_of_galaxy10() -> None:
    assert class_counts(sum(GALAXY10_COUNTS)).tolist() == list(GALAXY10_COUNTS)
    assert class_counts(1000, balanced=True).tolist() == [100] * 10


@given(num=st.integers(1, 30_000), balanced=st.booleans())
def test_simulated_class_counts_sum_to_the_number_of_galaxies(num: int, balanced: bool) -> None:
    counts = class_counts(num, balanced)
    assert counts.sum() == num
    assert counts.min() >= min(HANDFUL, num // 10)
    exact = np.array(GALAXY10_COUNTS) / sum(GALAXY10_COUNTS) * num
    if not balanced and exact.min() >= HANDFUL:
        assert np.all(np.abs(counts - exact) < 1.0)


@pytest.mark.parametrize("num", [20, 250, 2500])
def test_simulated_survey_has_one_position_with_two_labels_and_close_pairs(num: int) -> None:
    plan = plan_survey(num, seed=4)
    (twice,) = np.flatnonzero(plan.shown != np.arange(num))
    assert plan.labels[twice] != plan.labels[plan.shown[twice]]
    assert _separation(plan, int(twice), int(plan.shown[twice])) < 1.0
    assert len(plan.pairs) >= 2
    assert len(np.unique(plan.pairs)) == plan.pairs.size
    close = {(int(min(pair)), int(max(pair))) for pair in plan.pairs} | {
        (int(min(twice, plan.shown[twice])), int(max(twice, plan.shown[twice])))
    }
    found = {(i, j) for i in range(num) for j in _near(plan, i) if i < j}
    assert found == close


def _near(plan: SurveyPlan, row: int) -> list[int]:
    east = ((plan.ra - plan.ra[row] + 180.0) % 360.0 - 180.0) * np.cos(np.radians(plan.dec[row]))
    close = np.hypot(east, plan.dec - plan.dec[row]) * 3600.0 < 67.0
    return [int(other) for other in np.flatnonzero(close) if other != row]


def test_simulated_position_with_two_labels_has_one_image() -> None:
    plan = plan_survey(60, seed=6)
    (twice,) = np.flatnonzero(plan.shown != np.arange(60))
    assert np.array_equal(draw_image(plan, int(twice))[0], draw_image(plan, int(plan.shown[twice]))[0])


def test_pairs_show_in_each_others_images() -> None:
    plan = plan_survey(60, seed=6)
    for one, other in plan.pairs:
        for row, there in ((int(one), int(other)), (int(other), int(one))):
            ((neighbour, east, north),) = plan.neighbours(row)
            assert neighbour == there
            image, _, pixel_scale = draw_image(plan, row)
            x, y = 127.5 - east / pixel_scale, 127.5 - north / pixel_scale
            if max(abs(x - 127.5), abs(y - 127.5)) < 120:
                spot = image[int(y) - 3 : int(y) + 4, int(x) - 3 : int(x) + 4].mean()
                assert spot > np.median(image) + 15


@pytest.mark.parametrize(("num", "seed", "word"), [(0, 1, "at least 1"), (10, -1, "seed")])
def test_simulate_survey_refuses_invalid_counts_and_seeds(tmp_path: Path, num: int, seed: int, word: str) -> None:
    with pytest.raises(UserError, match=word):
        simulate_survey(tmp_path / "x.h5", num, seed)
    assert not list(tmp_path.iterdir())


def test_interrupted_simulation_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("galaxydist.surveys.simulate.survey.draw_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        simulate_survey(tmp_path / "x.h5", 10, 1, workers=1)
    assert not list(tmp_path.iterdir())
