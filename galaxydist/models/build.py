"""From a recipe's model section to a model: images B x 3 x H x W in, logits B x K out."""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from galaxydist.models.custom_cnn import CustomCNN
from galaxydist.models.d4_cnn import D4CNN
from galaxydist.models.reference import VGG_HIDDEN, ReferenceCNN, build_reference_vit, build_vgg_head
from galaxydist.models.registry import ARCHITECTURES, PATCH_SIZE, check_config, timm_name
from galaxydist.models.weights import Statistics, find_weights, load_weights, read_statistics, read_weights
from galaxydist.recipe.schema import ModelConfig

# Training the head alone: what is frozen has no gradient and stays in evaluation mode, so that no statistic of it moves.


class FrozenBackbone(nn.Module):
    """Put in front of a model's class by ``freeze_backbone``: ``train()`` leaves everything but the head in evaluation mode.

    Setting the mode once is not enough: every epoch calls ``model.train()``, and a batch-norm layer in training mode moves its
    statistics even where its parameters have no gradient.
    """

    head_names: tuple[str, ...]

    def train(self, mode: bool = True) -> "FrozenBackbone":
        super().train(mode)
        for module in _outside(self, self.head_names):
            module.training = False
        return self


def freeze_backbone(model: nn.Module, head_names: Sequence[str]) -> None:
    """Freeze all of ``model``, in place, except the modules named in ``head_names`` (and what is in them).

    The model keeps its parameter names, and a copy of it (the moving average) stays frozen, because the class itself changes
    and not the object's methods.
    """
    inside = {id(parameter) for name in head_names for parameter in model.get_submodule(name).parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in inside)
    frozen = type(f"Frozen{type(model).__name__}", (FrozenBackbone, type(model)), {"head_names": tuple(head_names)})
    model.__class__ = frozen
    model.train(model.training)


def _outside(model: nn.Module, head_names: Sequence[str]) -> Iterator[nn.Module]:
    """The modules that neither hold a head module, nor are one, nor lie in one."""
    for name, module in model.named_modules():
        around = any(head == name or head.startswith(f"{name}.") or name.startswith(f"{head}.") for head in head_names)
        if name and not around:
            yield module


_logger = logging.getLogger(__name__)


def build_model(
    config: ModelConfig,
    num_classes: int,
    image_size: int,
    *,
    weights_dir: Path | None = None,
    say: Callable[[str], None] = _logger.warning,
) -> nn.Module:
    """The model that ``config`` asks for, on the CPU, in float32 and training mode, with its weights in place.

    New weights are drawn from torch's generator: seed it before. Nothing here waits for a network; call ``fetch_weights`` before,
    on one process, where the machine may have one.

    Args:
        num_classes: K.
        image_size: pixels of the square images; any size from 16 (reference_vit: 25; vgg and reference_cnn: 32). A ViT pads to a
            multiple of its patch.
        weights_dir: where ``fetch_weights`` put published weights; the local Hugging Face cache is looked in after it.
        say: told what was left out of a file or changed; only one process of many need listen.

    Raises:
        UserError: for settings that the architecture cannot use, and for weights that are missing or do not fit.
    """
    check_config(config, image_size)
    architecture = ARCHITECTURES[config.name]
    # Looked for first: an error about weights should not wait for a large model.
    path = config.weights or (find_weights(config, weights_dir) if config.pretrained else None)
    tensors = None if path is None else read_weights(path)
    name = timm_name(config)
    model: nn.Module
    if name is None:
        model = _build_own(num_classes, image_size, config)
    elif "vgg" in config.name:
        model = _build_vgg(name, num_classes, config)
    else:
        model = _build_timm(name, num_classes, image_size, config)
    if tensors is not None:
        load_weights(model, tensors, str(path), head_names=architecture.head, unused=architecture.unused, say=say)
    if config.freeze_backbone:
        if tensors is None:
            say("model.freeze_backbone=true without model.pretrained=true or model.weights=FILE: the frozen part stays random")
        freeze_backbone(model, architecture.head)
    return model.train()


def needs_two_images(model: nn.Module, image_size: int) -> bool:
    """Return True where a single image cannot be trained on: batch normalisation of a map of one pixel has only one value.

    Args:
        model: in training mode; it is not changed, and nothing is computed.
        image_size: pixels of the square images.
    """
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return False
    shapes = {name: tensor.to("meta") for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    try:
        torch.func.functional_call(model, shapes, (torch.empty(1, 3, image_size, image_size, device="meta"),))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        return True
    return False


def input_statistics(config: ModelConfig) -> Statistics | None:
    """Channel mean and deviation (0..1, RGB) that the model's images are normalised with, or None for the data set's own.

    Weights expect what they were trained with: published ones say it in timm, a file of ours in its metadata; other files do not.

    Raises:
        UserError: where ``model.weights`` cannot be read.
    """
    name = timm_name(config)
    if config.weights is not None:
        return read_statistics(config.weights)
    if not config.pretrained or name is None:
        return None
    import timm

    published: Any = timm.get_pretrained_cfg(name)
    (r, g, b), (dr, dg, db) = published.mean, published.std
    return (r, g, b), (dr, dg, db)


def _build_own(num_classes: int, image_size: int, config: ModelConfig) -> nn.Module:
    rates = config.drop_rate, config.drop_path_rate
    if config.name == "reference_cnn":
        return ReferenceCNN(num_classes, config.drop_rate)
    if config.name == "reference_vit":
        return build_reference_vit(num_classes, image_size, *rates)
    if config.name == "d4_cnn":
        return D4CNN(num_classes, config.width, *rates)
    return CustomCNN(num_classes, config.width, *rates, norm=config.norm)


def _build_timm(name: str, num_classes: int, image_size: int, config: ModelConfig) -> nn.Module:
    import timm

    options: dict[str, Any] = {}
    if config.name.startswith("vit"):
        # The position embedding is made for the recipe's size; other sizes (the app's) are resampled as they come.
        options = {"img_size": image_size, "dynamic_img_size": True, "dynamic_img_pad": image_size % PATCH_SIZE > 0}
    if config.name == "vit_scratch":
        # Without pretraining the average of all tokens learns faster than a class token (Beyer et al. 2022, arXiv:2205.01580).
        options |= {"class_token": False, "global_pool": "avg"}
    rates = {"drop_rate": config.drop_rate, "drop_path_rate": config.drop_path_rate}
    model: nn.Module = timm.create_model(name, num_classes=num_classes, **rates, **options)
    return model


def _build_vgg(name: str, num_classes: int, config: ModelConfig) -> nn.Module:
    """VGG's convolutions under another head than the published two layers of 4,096 for 7 x 7 maps only.

    Ours are the variants with batch normalisation, which train at ordinary learning rates also from random weights, under a
    global average and one linear layer. The reference ones have neither.
    """
    import timm
    from timm.layers import ClassifierHead

    # The published classifier would be 120 million parameters, made to be thrown away: mlp_ratio makes it one channel wide.
    model: Any = timm.create_model(name, num_classes=num_classes, mlp_ratio=1 / 4096)
    model.pre_logits = nn.Identity()
    if config.name in VGG_HIDDEN:
        model.head = build_vgg_head(config.name, model.num_features, num_classes, config.drop_rate)
    else:
        model.head = ClassifierHead(model.num_features, num_classes, pool_type="avg", drop_rate=config.drop_rate)
    model.head_hidden_size = model.num_features
    vgg: nn.Module = model
    return vgg
