"""Properties of models: the registry of named architectures, what is read from other models, and the record of a run."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from galaxydist.errors import UserError
from galaxydist.recipe.model_names import parse_model_name
from galaxydist.recipe.schema import ModelConfig

if TYPE_CHECKING:
    from torch import nn

PATCH_SIZE = 16


@dataclass(frozen=True, slots=True)
class Architecture:
    """Properties of an architecture that are needed before it is built.

    Args:
        timm_names: timm's name with the tag of its published weights, by ``model.size``; the tag is fixed because timm's default
            tag changes between releases. None: an architecture of our own.
        head: names of the modules after the backbone; ``freeze_backbone`` trains these, and weights of another head are left out.
        last_map: name of the module whose output is the last feature map before any final pooling, for Grad-CAM. None: it is
            unknown, or the model is one of the vision transformers here, for which attention rollout is used.
        unused: name prefixes of published weights that the model here does not have.
        has_published_weights: a hub has weights of the architecture.
        is_shipped: the package has a folder for weights of the architecture (``weights.shipped_path``).
        min_image_size: smallest image in pixels.
        has_drop_path: the model has residual branches to drop.
        recipe: name of the recipe that trains it; None: the name of the architecture.
    """

    timm_names: dict[str, str] | None
    head: tuple[str, ...]
    last_map: str | None
    unused: tuple[str, ...] = ()
    has_published_weights: bool = True
    is_shipped: bool = False
    min_image_size: int = 16
    has_drop_path: bool = True
    recipe: str | None = None


_VIT_NAMES = {
    "small": "vit_small_patch16_224.augreg_in21k_ft_in1k",
    "base": "vit_base_patch16_224.augreg2_in21k_ft_in1k",
}
_VIT_HEAD = ("head_drop", "head")
# Published classifier of the VGGs (two layers of 4,096 on a 7 x 7 map, 120 million parameters), replaced in build.py.
_VGG_UNUSED = ("pre_logits.",)


def _vgg(name: str, last_map: str, recipe: str | None = None) -> Architecture:
    return Architecture({"small": name}, ("head",), last_map, _VGG_UNUSED, min_image_size=32, has_drop_path=False, recipe=recipe)


ARCHITECTURES: dict[str, Architecture] = {
    "custom_cnn": Architecture(None, ("drop", "head"), "stages", has_published_weights=False, is_shipped=True),
    "d4_cnn": Architecture(None, ("drop", "head"), "stages", has_published_weights=False, is_shipped=True),
    "resnet18": Architecture({"small": "resnet18.a1_in1k"}, ("fc",), "layer4"),
    "resnet26": Architecture({"small": "resnet26.bt_in1k"}, ("fc",), "layer4"),
    "resnet50": Architecture({"small": "resnet50.a1_in1k"}, ("fc",), "layer4"),
    "vgg16": _vgg("vgg16_bn.tv_in1k", "features.42"),
    "vgg19": _vgg("vgg19_bn.tv_in1k", "features.51"),
    "vit": Architecture(_VIT_NAMES, _VIT_HEAD, None),
    "vit_scratch": Architecture(_VIT_NAMES, _VIT_HEAD, None, has_published_weights=False),
    "reference_vgg16": _vgg("vgg16.tv_in1k", "features.29", "reference/vgg16"),
    "reference_vgg19": _vgg("vgg19.tv_in1k", "features.35", "reference/vgg19"),
    "reference_cnn": Architecture(
        None,
        ("drop", "head"),
        "features.13",
        has_published_weights=False,
        min_image_size=32,
        has_drop_path=False,
        recipe="reference/custom_cnn",
    ),
    "reference_vit": Architecture(None, _VIT_HEAD, None, has_published_weights=False, min_image_size=25, recipe="reference/vit"),
}
MODEL_NAMES = tuple(ARCHITECTURES)


def recipe_of(name: str) -> str:
    """Return the name of the shipped recipe of an architecture of this package."""
    return ARCHITECTURES[name].recipe or name


def timm_name(config: ModelConfig) -> str | None:
    """Return timm's ``name.tag`` of the architecture in ``config``, or None for our own, and for models that are not named."""
    architecture = ARCHITECTURES.get(config.name)
    if architecture is None or architecture.timm_names is None:
        return None
    return architecture.timm_names.get(config.size, architecture.timm_names["small"])


def architecture_of(config: ModelConfig, model: "nn.Module") -> Architecture:
    """Return the properties of a model, from the registry or, for other models than the named ones, from the model itself.

    Args:
        config: the recipe's.
        model: as ``build_model`` made it.
    """
    known = ARCHITECTURES.get(config.name)
    if known is not None:
        return known
    is_published = parse_model_name(config.name).kind != "function"
    return Architecture(None, _find_head(model), _find_last_map(model), has_published_weights=is_published)


def _find_head(model: "nn.Module") -> tuple[str, ...]:
    """Return the classifier that timm names, with the dropout before it; for other models the last linear layer."""
    from torch import nn

    modules = dict(model.named_modules())
    named = getattr(model, "pretrained_cfg", {}).get("classifier")
    if named is None:
        return tuple([name for name, module in modules.items() if isinstance(module, nn.Linear)][-1:])
    classifiers = [name for name in ((named,) if isinstance(named, str) else named) if name in modules]
    parents = {name.rpartition(".")[0] for name in classifiers} - {""}
    dropouts = [
        name
        for name, module in modules.items()
        if isinstance(module, nn.Dropout) and (name in ("head_drop", "drop", "dropout") or name.rpartition(".")[0] in parents)
    ]
    return (*dropouts, *classifiers)


def _find_last_map(model: "nn.Module") -> str | None:
    """Return the module of timm's last feature; None for models that have no list of features."""
    features: Any = getattr(model, "feature_info", None)
    if not isinstance(features, list) or not features or "module" not in features[-1]:
        return None
    name = str(features[-1]["module"])
    return name if name in dict(model.named_modules()) else None


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """Facts about a model beyond its recipe; a checkpoint holds them as plain JSON values.

    Args:
        architecture: timm's name without a tag; None for a model of this package or of an own function.
        arguments: timm's arguments for the architecture (``model_args`` of a repository's config.json).
        pretrained_cfg: timm's facts about the weights: input size, mean, standard deviation, classifier.
        source: file or repository with revision of the published weights that the run started from.
        licence: of these weights, as their source names it.
        code: SHA-256 of the source file of an own function.
    """

    architecture: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    pretrained_cfg: Mapping[str, Any] = field(default_factory=dict)
    source: str | None = None
    licence: str | None = None
    code: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any] | None) -> Self:
        """Return the record of a checkpoint; checkpoints of older versions have none."""
        known = {item.name for item in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in (plain or {}).items() if name in known})


def check_config(config: ModelConfig, image_size: int) -> None:
    """Refuse settings that a named architecture does not support; ``recipe/rules.py`` checks the rules that need no registry.

    Raises:
        UserError: settings do not fit the architecture; the text lists all of them.
    """
    architecture = ARCHITECTURES.get(config.name)
    if architecture is None:
        return
    problems = []
    if image_size < architecture.min_image_size:
        problems.append(f"data.image_size={image_size}: {config.name} needs at least {architecture.min_image_size} pixels")
    if config.drop_path_rate and not architecture.has_drop_path:
        problems.append(f"model.drop_path_rate={config.drop_path_rate}: {config.name} has no residual branches; set it to 0")
    if problems:
        raise UserError("the recipe's model cannot be built:\n  " + "\n  ".join(problems))
