"""The galaxies of a run's table: the same ones always, spread over the classes."""

import io

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from galaxydist.evaluation.galaxy_table import IMAGE_WIDTH, choose_galaxies, small_jpeg


@given(arrays(np.int32, st.integers(0, 200), elements=st.integers(-1, 6)), st.integers(1, 40))
def test_chosen_galaxies_are_spread_over_the_classes(labels_N: np.ndarray, count: int) -> None:
    chosen = choose_galaxies(labels_N, count)
    assert np.array_equal(chosen, np.unique(chosen)) and len(chosen) == min(count, int((labels_N >= 0).sum()))
    found, there = (np.bincount(labels[labels >= 0], minlength=7) for labels in (labels_N[chosen], labels_N))
    # A class has fewer than another by two only if it has no more.
    assert all(found[label] in (there[label], found.max(), found.max() - 1) for label in range(7))
    fewer = choose_galaxies(labels_N, max(1, count - 1))
    assert set(fewer.tolist()) <= set(chosen.tolist())


def test_chosen_galaxies_do_not_change_between_versions() -> None:
    labels_N = np.arange(1000, dtype=np.int32) % 10
    assert choose_galaxies(labels_N, 5).tolist() == [48, 450, 655, 902, 947]


def test_small_images_are_bounded_also_for_noise() -> None:
    noise_HWC = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    data = small_jpeg(noise_HWC)
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (IMAGE_WIDTH, IMAGE_WIDTH)
    assert len(small_jpeg(noise_HWC[:IMAGE_WIDTH, :IMAGE_WIDTH])) < 15_000
