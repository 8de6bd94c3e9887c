"""The published results on Galaxy10 DECaLS that this toolkit remakes: seven models, three settings, test accuracy and loss.

In that work the ResNets had ImageNet weights, a frozen body and a new head, the VGGs likewise with a head of three (VGG19: two)
layers; the CNN and the ViT were trained from random weights. No repeats are given: each number is taken as that of one run.
"""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from galaxydist.galaxy import Variant
from galaxydist.surveys.official_split import NAME as REAL_DATASET

DisplayName = Literal["ResNet50", "ResNet26", "ResNet18", "VGG16", "VGG19", "Custom CNN", "ViT"]
RESNETS: tuple[DisplayName, ...] = ("ResNet18", "ResNet26", "ResNet50")  # by depth
VGGS: tuple[DisplayName, ...] = ("VGG16", "VGG19")
CNNS: tuple[DisplayName, ...] = ("ResNet50", "ResNet26", "ResNet18", "VGG16", "VGG19", "Custom CNN")
MODELS: tuple[DisplayName, ...] = (*CNNS, "ViT")

# Galaxies of the published test sets.
TEST_SIZES: MappingProxyType[Variant, int] = MappingProxyType({"original": 1774, "balanced": 660})


@dataclass(frozen=True, slots=True, order=True)
class TrainTest:
    """Which variant a model was trained on, and on whose test set it was judged."""

    train: Variant
    test: Variant

    def __str__(self) -> str:
        return f"trained on {self.train}, tested on {self.test}"


ON_ORIGINAL = TrainTest("original", "original")
ON_BALANCED = TrainTest("balanced", "balanced")
BALANCED_TO_ORIGINAL = TrainTest("balanced", "original")
ORIGINAL_TO_BALANCED = TrainTest("original", "balanced")
# The settings with published numbers, in the published order; the fourth, trained on original and tested on balanced, has none.
PUBLISHED_SETTINGS = (ON_ORIGINAL, ON_BALANCED, BALANCED_TO_ORIGINAL)
SETTINGS = (*PUBLISHED_SETTINGS, ORIGINAL_TO_BALANCED)


@dataclass(frozen=True, slots=True)
class PublishedResult:
    """One published pair of numbers.

    Args:
        accuracy: share of the test set, 0 to 1.
        loss: mean cross-entropy in nats.
        count: galaxies in the test set.
    """

    accuracy: float
    loss: float
    count: int


_VALUES: dict[DisplayName, tuple[tuple[float, float], ...]] = {
    "ResNet50": ((0.5259, 1.3268), (0.4833, 1.4588), (0.4752, 1.4446)),
    "ResNet26": ((0.5169, 1.3493), (0.4924, 1.4766), (0.4899, 1.4552)),
    "ResNet18": ((0.4707, 1.4653), (0.4667, 1.5569), (0.4504, 1.5166)),
    "VGG16": ((0.6071, 1.1234), (0.5394, 1.2986), (0.5349, 1.3320)),
    "VGG19": ((0.5688, 1.2092), (0.5106, 1.3947), (0.5118, 1.3717)),
    "Custom CNN": ((0.7514, 0.8144), (0.5924, 1.1362), (0.6240, 1.0804)),
    "ViT": ((0.7638, 0.7343), (0.7500, 0.7966), (0.7694, 0.7158)),
}
PUBLISHED: MappingProxyType[tuple[DisplayName, TrainTest], PublishedResult] = MappingProxyType(
    {
        (model, setting): PublishedResult(*pair, TEST_SIZES[setting.test])
        for model, pairs in _VALUES.items()
        for setting, pair in zip(PUBLISHED_SETTINGS, pairs, strict=True)
    }
)

# model.name of a recipe -> the published model of that architecture; None: the published work has no such model.
DISPLAY_NAMES: MappingProxyType[str, DisplayName | None] = MappingProxyType(
    {
        "resnet50": "ResNet50",
        "resnet26": "ResNet26",
        "resnet18": "ResNet18",
        "vgg16": "VGG16",
        "vgg19": "VGG19",
        "custom_cnn": "Custom CNN",
        "vit": "ViT",
        "vit_scratch": "ViT",
        "reference_vgg16": "VGG16",
        "reference_vgg19": "VGG19",
        "reference_cnn": "Custom CNN",
        "reference_vit": "ViT",
        "d4_cnn": None,
    }
)


def display_name(model: str) -> DisplayName | None:
    """The published model that a recipe's ``model.name`` stands beside; None where there is none."""
    return DISPLAY_NAMES.get(model)


def published_result(dataset: str, name: DisplayName | None, setting: TrainTest) -> PublishedResult | None:
    """The published numbers beside a cell; None where nothing was published, and for every data set but the real Galaxy10.

    Args:
        dataset: the data set's name, as in its manifest.
        name: of the published model; None: of a model that it has not.
        setting: what it was trained and tested on.
    """
    return PUBLISHED.get((name, setting)) if dataset == REAL_DATASET and name is not None else None
