"""The published values, held by a second transcription."""

import dataclasses
from typing import get_args

import pytest

from galaxydist.models.registry import MODEL_NAMES
from galaxydist.report import published_results
from galaxydist.report.published_results import (
    MODELS,
    PUBLISHED,
    SETTINGS,
    TEST_SIZES,
    DisplayName,
    PublishedResult,
    TrainTest,
    published_result,
)
from galaxydist.surveys.official_split import read_official_split
from galaxydist.surveys.split import TEST

# As the task lists them: (accuracy, loss) trained and tested on original / balanced and balanced / balanced and original.
TRANSCRIPTION = """
ResNet50 0.5259 1.3268 / 0.4833 1.4588 / 0.4752 1.4446
ResNet26 0.5169 1.3493 / 0.4924 1.4766 / 0.4899 1.4552
ResNet18 0.4707 1.4653 / 0.4667 1.5569 / 0.4504 1.5166
VGG16 0.6071 1.1234 / 0.5394 1.2986 / 0.5349 1.3320
VGG19 0.5688 1.2092 / 0.5106 1.3947 / 0.5118 1.3717
Custom_CNN 0.7514 0.8144 / 0.5924 1.1362 / 0.6240 1.0804
ViT 0.7638 0.7343 / 0.7500 0.7966 / 0.7694 0.7158
"""


def test_published_results_equal_a_second_transcription() -> None:
    lines = TRANSCRIPTION.strip().splitlines()
    names = [line.split()[0].replace("_", " ") for line in lines]
    assert tuple(names) == MODELS == get_args(DisplayName)
    settings = [TrainTest("original", "original"), TrainTest("balanced", "balanced"), TrainTest("balanced", "original")]
    seen = 0
    for name, line in zip(names, lines, strict=True):
        for setting, pair in zip(settings, line.split(maxsplit=1)[1].split(" / "), strict=True):
            found = PUBLISHED[name, setting]  # type: ignore[index]
            assert (f"{found.accuracy:.4f}", f"{found.loss:.4f}") == tuple(pair.split())
            assert found.count == {"original": 1774, "balanced": 660}[setting.test]
            seen += 1
    assert seen == len(PUBLISHED) == 21
    assert tuple(settings) == published_results.PUBLISHED_SETTINGS == SETTINGS[:3]


def test_published_accuracies_are_fractions_of_whole_galaxies() -> None:
    """Four digits of k / N: a slip of the pen in the number or in N would show."""
    for result in PUBLISHED.values():
        correct = round(result.accuracy * result.count)
        assert abs(correct / result.count - result.accuracy) <= 0.00011, result


def test_official_split_has_the_published_numbers_of_test_galaxies() -> None:
    split = read_official_split()
    assert (split.original == TEST).sum() == TEST_SIZES["original"]
    assert (split.balanced == TEST).sum() == TEST_SIZES["balanced"]


def test_every_architecture_has_a_published_model_or_none() -> None:
    """A new architecture says which published model it stands beside, or that there is none."""
    assert set(published_results.DISPLAY_NAMES) == set(MODEL_NAMES)
    assert {name for name in published_results.DISPLAY_NAMES.values() if name} == set(MODELS)


@pytest.mark.parametrize("dataset", ["simulated", "galaxy10_decals_sample", "Galaxy10_DECaLS", ""])
def test_published_result_exists_only_for_galaxy10_decals(dataset: str) -> None:
    assert all(published_result(dataset, name, setting) is None for name in MODELS for setting in SETTINGS)
    assert published_result("galaxy10_decals", "ResNet50", SETTINGS[0]) == PublishedResult(0.5259, 1.3268, 1774)
    assert published_result("galaxy10_decals", published_results.DISPLAY_NAMES["d4_cnn"], SETTINGS[0]) is None
    assert published_result("galaxy10_decals", "ViT", SETTINGS[3]) is None


def test_published_results_are_immutable() -> None:
    with pytest.raises(TypeError):
        PUBLISHED["ViT", SETTINGS[0]] = None  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        PUBLISHED["ViT", SETTINGS[0]].accuracy = 1.0  # type: ignore[misc]
