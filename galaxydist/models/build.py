"""Construction of a recipe's model: images B x 3 x H x W in, logits B x K out."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from galaxydist.errors import UserError
from galaxydist.models.custom_cnn import CustomCNN
from galaxydist.models.d4_cnn import D4CNN
from galaxydist.models.hub_weights import find_weights, read_published, read_record, shipped_path
from galaxydist.models.own_function import build_own_model, source_hash
from galaxydist.models.performance import cudnn_benchmark
from galaxydist.models.reference import (
    VGG_HIDDEN,
    VGG_MAP,
    VIT_BASE,
    MlpHead,
    ReferenceCNN,
    build_reference_vit,
    reference_vit_arguments,
)
from galaxydist.models.registry import ARCHITECTURES, PATCH_SIZE, ModelRecord, architecture_of, check_config, timm_name
from galaxydist.models.weights import Statistics, check_settings, load_weights, read_statistics, read_weights
from galaxydist.recipe.model_names import parse_model_name
from galaxydist.recipe.schema import ModelConfig

_logger = logging.getLogger(__name__)


def freeze_backbone(model: nn.Module, head_names: Sequence[str]) -> None:
    """Freeze ``model`` in place, except the modules in ``head_names`` and their submodules.

    The frozen parameters get no gradients, and ``set_train_mode`` leaves their modules in evaluation mode.
    """
    inside = {id(parameter) for name in head_names for parameter in model.get_submodule(name).parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in inside)
    frozen: Any = model
    frozen.trained_modules = tuple(head_names)
    if model.training:
        set_train_mode(model)


def set_train_mode(model: nn.Module) -> None:
    """Put a model into training mode, except the frozen part of a model from ``freeze_backbone``.

    ``model.train()`` alone is not enough: a batch-norm layer in training mode updates its statistics even if its parameters have
    no gradient, and dropout in the backbone would change the features.
    """
    model.train()
    for root in model.modules():  # the frozen model may be inside a wrapper such as DistributedDataParallel
        for module in _outside(root, getattr(root, "trained_modules", ())):
            module.training = False


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode; afterwards each of its modules has its former mode again.

    cuDNN chooses its kernels by rule and not by timing, so that all processes compute equal logits.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with cudnn_benchmark(False):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _outside(model: nn.Module, head_names: Sequence[str]) -> Iterator[nn.Module]:
    """Yield the modules that neither contain a head module, nor are one, nor are inside one; none without ``head_names``."""
    for name, module in model.named_modules() if head_names else ():
        around = any(head == name or head.startswith(f"{name}.") or name.startswith(f"{head}.") for head in head_names)
        if name and not around:
            yield module


def build_model(
    config: ModelConfig,
    num_classes: int,
    image_size: int,
    *,
    weights_dir: Path | None = None,
    record: ModelRecord | None = None,
    trust_code: bool = False,
) -> nn.Module:
    """Build the model of ``config`` with its weights, on the CPU, in float32 and training mode.

    New weights are drawn from torch's generator: seed it before. Published weights are not downloaded: call ``fetch_weights`` on
    one process before.

    Args:
        num_classes: K.
        image_size: pixels of the square images; for the named architectures any size from 16 (reference_vit: 25; vgg and
            reference_cnn: 32). A ViT pads to a multiple of its patch.
        weights_dir: folder of published weights (see ``fetch_weights``); the local Hugging Face cache is searched after it.
        record: of the run whose checkpoint is loaded afterwards; None: ``read_record``.
        trust_code: run a function of the user's own (``model.name=package.module:function``).

    Raises:
        UserError: settings that the architecture cannot use, weights that are missing or do not fit, or code that is not trusted
            or fails.
    """
    check_config(config, image_size)
    # Read the weights first, so that an error about them does not wait for a large model.
    path = config.weights or (find_weights(config, weights_dir) if config.pretrained else None)
    tensors = None if path is None else read_weights(path) if config.weights else read_published(path)
    kind = parse_model_name(config.name).kind
    if path is not None and kind == "named":
        check_settings(path, config)
    if kind == "named":
        model = _build_named(config, num_classes, image_size)
    elif kind == "function":
        model = build_own_model(config, num_classes, image_size, trust_code=trust_code)
    else:
        from galaxydist.models.timm_models import build_timm_model

        if record is None or record.architecture is None:
            record = read_record(config, weights_dir)
        model = build_timm_model(config, record, num_classes, image_size, tensors=tensors, source=str(path))
    architecture = architecture_of(config, model)
    if tensors is not None and kind in ("named", "function"):
        load_weights(model, tensors, str(path), head_names=architecture.head, unused=architecture.unused)
    if config.freeze_backbone:
        if tensors is None:
            _logger.warning(
                "model.freeze_backbone=true without model.pretrained=true or model.weights=FILE: the frozen part stays random"
            )
        freeze_backbone(model, architecture.head)
    set_train_mode(model)
    return model


def describe_model(config: ModelConfig, weights_dir: Path | None) -> ModelRecord:
    """Return what a run's checkpoints keep of its model: timm's architecture, source and licence of weights, hash of own code.

    Raises:
        UserError: files of the model are missing or damaged, or timm has no such model.
    """
    return dataclasses.replace(read_record(config, weights_dir), code=source_hash(config.name))


def needs_two_images(model: nn.Module, image_size: int) -> bool:
    """Return True if training needs at least two images: batch normalisation would see one value per channel of one image.

    Args:
        model: in training mode; it is not changed, because it runs on the meta device.
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


def input_statistics(config: ModelConfig, model: nn.Module | None = None) -> Statistics | None:
    """Return the channel mean and standard deviation (0..1, RGB) that images are normalised with, by ``model.normalization``.

    timm and its repositories state them for published weights, and our weight files in their metadata. For random weights and
    other files the result is None: use the data set's own.

    Args:
        model: built from ``config``; needed for other models than the named ones.

    Raises:
        UserError: ``model.weights`` cannot be read, or ``model.normalization=pretrained`` and none is known.
    """
    is_forced = config.normalization == "pretrained"
    if config.normalization == "data":
        return None
    if config.weights is not None:
        found = read_statistics(config.weights)
    elif config.pretrained or is_forced:
        found = _published_statistics(config, model)
    else:
        return None
    if found is None and is_forced:
        raise UserError(
            f"model.normalization=pretrained: no normalisation is known for {config.weights or config.name}; use auto or data"
        )
    return found


def _published_statistics(config: ModelConfig, model: nn.Module | None) -> Statistics | None:
    known = ARCHITECTURES.get(config.name)
    if known is not None and known.is_shipped:
        path = shipped_path(config.name)
        return read_statistics(path) if path.is_file() else None
    name = timm_name(config)
    published: Any = getattr(model, "pretrained_cfg", {})
    if name is not None:
        import timm

        published = timm.get_pretrained_cfg(name).to_dict()
    if "mean" not in published or "std" not in published:
        return None
    (r, g, b), (dr, dg, db) = published["mean"], published["std"]
    return (r, g, b), (dr, dg, db)


def _build_named(config: ModelConfig, num_classes: int, image_size: int) -> nn.Module:
    name = timm_name(config)
    if name is None:
        return _build_own(num_classes, image_size, config)
    if "vgg" in config.name:
        return _build_vgg(name, num_classes, config)
    return _build_timm(name, num_classes, image_size, config)


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

    rates = {"drop_rate": config.drop_rate, "drop_path_rate": config.drop_path_rate}
    model: nn.Module = timm.create_model(name, num_classes=num_classes, **rates, **_timm_options(config, image_size))
    return model


def _timm_options(config: ModelConfig, image_size: int) -> dict[str, Any]:
    """Return the arguments of a named architecture of timm."""
    if not config.name.startswith("vit"):
        return {}
    # The position embedding has the recipe's image size; for other sizes (in the app) it is resampled at run time.
    options: dict[str, Any] = {"img_size": image_size, "dynamic_img_size": True, "dynamic_img_pad": image_size % PATCH_SIZE > 0}
    if config.name == "vit_scratch":
        # Without pretraining the average of all tokens learns faster than a class token (Beyer et al. 2022, arXiv:2205.01580).
        options |= {"class_token": False, "global_pool": "avg"}
    return options


def timm_arguments(config: ModelConfig, record: ModelRecord, image_size: int) -> tuple[str, dict[str, Any]] | None:
    """Return timm's name of the architecture without a tag, and its arguments beside the number of classes and the rates.

    Args:
        config: of the model.
        record: of the run's model.
        image_size: pixels.

    Returns:
        None for architectures that timm cannot build: our own, those with another head, own functions.

    Raises:
        UserError: the architecture does not take images of this size.
    """
    if config.name == "reference_vit":
        return VIT_BASE, reference_vit_arguments(image_size)
    name = timm_name(config)
    if name is not None:
        return None if "vgg" in config.name else (name.partition(".")[0], _timm_options(config, image_size))
    if record.architecture is None:
        return None
    from galaxydist.models.timm_models import size_options

    return record.architecture, {**record.arguments, **size_options(config, record, image_size)}


def _build_vgg(name: str, num_classes: int, config: ModelConfig) -> nn.Module:
    """Build a VGG with a new head in place of the published classifier (two layers of 4,096, for 7 x 7 maps only).

    ``vgg16`` and ``vgg19`` have batch normalisation, with which they train from random weights at ordinary learning rates, a
    global average and one linear layer. The reference VGGs have neither.
    """
    import timm
    from timm.layers import ClassifierHead

    # The published classifier has 120 million parameters and is replaced below: mlp_ratio makes it one channel wide.
    model: Any = timm.create_model(name, num_classes=num_classes, mlp_ratio=1 / 4096)
    model.pre_logits = nn.Identity()
    if hidden := VGG_HIDDEN.get(config.name):  # on the whole 7 x 7 map, like VGG's own classifier
        model.head = MlpHead(model.num_features, num_classes, hidden, pool_size=VGG_MAP, drop_rate=config.drop_rate)
    else:
        model.head = ClassifierHead(model.num_features, num_classes, pool_type="avg", drop_rate=config.drop_rate)
    vgg: nn.Module = model
    return vgg
