"""Which architectures there are, where they come from, and which part of each is its head."""

from dataclasses import dataclass

from galaxydist.errors import UserError
from galaxydist.recipe.schema import ModelConfig

PATCH_SIZE = 16


@dataclass(frozen=True, slots=True)
class Architecture:
    """What is known of an architecture before it is built.

    Args:
        timm_names: timm's name with the tag of its published weights, by ``model.size``; the tag is fixed here because timm's
            default tag changes between releases. None: our own.
        head: names of the modules after the backbone; ``freeze_backbone`` trains these, weights of another head are left out.
        unused: prefixes of published weights that the model here has no place for.
        has_published_weights: whether ``model.pretrained`` is possible.
        min_image_size: smallest image in pixels.
        has_drop_path: whether there are residual branches to drop.
    """

    timm_names: dict[str, str] | None
    head: tuple[str, ...]
    unused: tuple[str, ...] = ()
    has_published_weights: bool = True
    min_image_size: int = 16
    has_drop_path: bool = True

    @property
    def has_sizes(self) -> bool:
        """Whether ``model.size`` chooses between variants."""
        return self.timm_names is not None and len(self.timm_names) > 1


_VIT_NAMES = {
    "small": "vit_small_patch16_224.augreg_in21k_ft_in1k",
    "base": "vit_base_patch16_224.augreg2_in21k_ft_in1k",
}
_VIT_HEAD = ("head_drop", "head")
# The classifier of the published VGGs (two layers of 4,096 on a 7 x 7 map, 120 million parameters) is replaced, see build.py.
_VGG_UNUSED = ("pre_logits.",)

ARCHITECTURES: dict[str, Architecture] = {
    "custom_cnn": Architecture(None, ("drop", "head"), has_published_weights=False, has_drop_path=False),
    "resnet18": Architecture({"small": "resnet18.a1_in1k"}, ("fc",)),
    "resnet26": Architecture({"small": "resnet26.bt_in1k"}, ("fc",)),
    "resnet50": Architecture({"small": "resnet50.a1_in1k"}, ("fc",)),
    "vgg16": Architecture({"small": "vgg16_bn.tv_in1k"}, ("head",), _VGG_UNUSED, min_image_size=32, has_drop_path=False),
    "vgg19": Architecture({"small": "vgg19_bn.tv_in1k"}, ("head",), _VGG_UNUSED, min_image_size=32, has_drop_path=False),
    "vit": Architecture(_VIT_NAMES, _VIT_HEAD),
    "vit_scratch": Architecture(_VIT_NAMES, _VIT_HEAD, has_published_weights=False),
}
MODEL_NAMES = tuple(ARCHITECTURES)


def timm_name(config: ModelConfig) -> str | None:
    """timm's ``name.tag`` of the architecture that ``config`` asks for, or None for our own."""
    names = ARCHITECTURES[config.name].timm_names
    return None if names is None else names.get(config.size, names["small"])


def check_config(config: ModelConfig, image_size: int) -> None:
    """Refuse settings that this architecture has no use for: ignored in silence they would be believed to work.

    Raises:
        UserError: with every setting that does not fit, not only the first.
    """
    architecture = ARCHITECTURES[config.name]
    default = type(config).model_fields
    problems = []
    if config.pretrained and not architecture.has_published_weights:
        instead = (
            "recipe=vit starts from published weights" if config.name == "vit_scratch" else "model.weights=FILE loads your own"
        )
        problems.append(f"model.pretrained=true: {config.name} has no published weights; set it to false ({instead})")
    if image_size < architecture.min_image_size:
        problems.append(f"data.image_size={image_size}: {config.name} needs at least {architecture.min_image_size} pixels")
    if config.size != default["size"].default and not architecture.has_sizes:
        problems.append(f"model.size={config.size}: {config.name} has one size only; remove it")
    if config.drop_path_rate and not architecture.has_drop_path:
        problems.append(f"model.drop_path_rate={config.drop_path_rate}: {config.name} has no residual branches; set it to 0")
    if config.width != default["width"].default and config.name != "custom_cnn":
        problems.append(f"model.width={config.width}: only custom_cnn has it; remove it")
    if problems:
        raise UserError("the recipe's model cannot be built:\n  " + "\n  ".join(problems))
