"""Published test accuracies and losses on Galaxy10 DECaLS: seven models in three settings.

In that work the ResNets had ImageNet weights, a frozen body and a new head; the VGGs too, with a head of three layers (VGG19:
two). The CNN and the ViT were trained from random weights. No repeats are given: each number is taken as that of one run.
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

# Number of galaxies in the published test sets.
TEST_SIZES: MappingProxyType[Variant, int] = MappingProxyType({"original": 1774, "balanced": 660})


@dataclass(frozen=True, slots=True, order=True)
class TrainTest:
    """Train/test setting: the variant that a model was trained on, and the variant of the test set."""

    train: Variant
    test: Variant

    def __str__(self) -> str:
        return f"trained on {self.train}, tested on {self.test}"


ON_ORIGINAL = TrainTest("original", "original")
ON_BALANCED = TrainTest("balanced", "balanced")
BALANCED_TO_ORIGINAL = TrainTest("balanced", "original")
ORIGINAL_TO_BALANCED = TrainTest("original", "balanced")
# Settings with published numbers, in the published order; the fourth setting, ORIGINAL_TO_BALANCED, has none.
PUBLISHED_SETTINGS = (ON_ORIGINAL, ON_BALANCED, BALANCED_TO_ORIGINAL)
SETTINGS = (*PUBLISHED_SETTINGS, ORIGINAL_TO_BALANCED)


@dataclass(frozen=True, slots=True)
class PublishedResult:
    """Published accuracy and loss of one model in one setting.

    Args:
        accuracy: share of the test set, 0 to 1.
        loss: mean cross-entropy in nats.
        count: number of galaxies in the test set.
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

# model.name of a recipe -> published model of the same architecture; None: the published work has no such model.
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


def published_result(dataset: str, name: DisplayName | None, setting: TrainTest) -> PublishedResult | None:
    """Return the published numbers for a cell; None if there are none, and for every data set but the real Galaxy10.

    Args:
        dataset: name of the data set, as in its manifest.
        name: of the published model; None for a model that the published work does not have.
        setting: the train/test setting.
    """
    return PUBLISHED.get((name, setting)) if dataset == REAL_DATASET and name is not None else None
