"""Models of timm by their names: construction at the recipe's image size, with or without weights, and lists of known names."""

import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from galaxydist.errors import UserError, first_line, name_some
from galaxydist.models.registry import ModelRecord

if TYPE_CHECKING:
    from galaxydist.recipe.schema import ModelConfig

# Keys of timm's ``pretrained_cfg`` that name a source of weights, which timm would load or download by itself.
_SOURCE_KEYS = ("source", "url", "file", "state_dict", "hf_hub_id", "hf_hub_filename")
_UNKNOWN_ARGUMENT = re.compile(r"unexpected keyword argument(?:\(s\): \[| )'(\w+)'")


def check_timm_name(architecture: str, tag: str | None) -> None:
    """Refuse a name or a tag that timm does not know.

    Raises:
        UserError: the text has the nearest names, or the tags of the model.
    """
    import timm

    version = f"timm {timm.__version__}"
    if not timm.is_model(architecture):
        names = timm.list_models()
        close = get_close_matches(architecture, names, n=3) or [name for name in names if name.startswith(architecture)][:3]
        hint = f"; did you mean {' or '.join(f'timm/{name}' for name in close)}?" if close else ""
        raise UserError(f"model.name=timm/{architecture}: {version} has no such model{hint} (it has {len(names):,} models)")
    if tag is not None and tag not in (tags := list_tags(architecture)):
        close = get_close_matches(tag, tags, n=1, cutoff=0.4)
        hint = f"did you mean timm/{architecture}.{close[0]}? " if close else ""
        raise UserError(
            f"model.name=timm/{architecture}.{tag}: {version} has no such weights; {hint}{describe_tags(architecture)}"
        )


def list_tags(architecture: str) -> list[str]:
    """Return the tags of timm's published weights of a model, its default first."""
    from timm.models import get_arch_pretrained_cfgs

    configs = get_arch_pretrained_cfgs(architecture)
    return [name.partition(".")[2] for name, config in configs.items() if config.hf_hub_id and "." in name]


def describe_tags(architecture: str) -> str:
    """Return a sentence with the names of a model's published weights."""
    tags = list_tags(architecture)
    if not tags:
        return f"there are no published weights of {architecture}"
    return f"weights of {architecture}: {name_some([f'timm/{architecture}.{tag}' for tag in tags], 12)}"


def pretrained_config(architecture: str, tag: str | None) -> dict[str, Any]:
    """Return timm's ``pretrained_cfg`` of a model: input size, normalisation, classifier, licence."""
    import timm

    config: Any = timm.get_pretrained_cfg(architecture if tag is None else f"{architecture}.{tag}")
    values: dict[str, Any] = {} if config is None else config.to_dict(remove_source=True)
    return values


def build_timm_model(
    config: "ModelConfig",
    record: ModelRecord,
    num_classes: int,
    image_size: int,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    source: str = "",
) -> nn.Module:
    """Build a model of timm for square images of 3 channels.

    Args:
        config: the recipe's; its rates are passed on.
        record: timm's name of the architecture and its arguments.
        num_classes: K.
        image_size: pixels.
        tensors: weights to start from, which timm adapts to the image size; a head for another number of classes is replaced.
        source: the file of the weights, for messages.

    Raises:
        UserError: timm has no such model, or it does not take the image size or a rate, or the weights do not fit.
    """
    check_timm_name(str(record.architecture), None)
    published = without_sources(record.pretrained_cfg)
    if (published.get("input_size") or (3,))[0] != 3:
        raise UserError(f"model.name={config.name}: it takes images of {published['input_size'][0]} channels, ours have 3")
    rates = _rates(config)
    options = {**record.arguments, **rates, **size_options(config, record, image_size)}
    head_size = num_classes
    if tensors is not None:
        head_size = _stored_classes(tensors, published)
        published = {**published, "num_classes": head_size, "label_offset": 0}
    model = _load(config, record, {**options, "num_classes": head_size}, published, tensors=tensors, source=source)
    if head_size != num_classes:
        reset: Any = model
        reset.reset_classifier(num_classes)
    _check_drop_path(config, model)
    return model


def check_logits(name: str, model: nn.Module, num_classes: int, image_size: int) -> None:
    """Check on two images that a model takes B x 3 x H x W and returns B x K; the random state does not change.

    Raises:
        UserError: it does not.
    """
    try:
        shape = _output_shape(model, image_size, device=next((str(p.device) for p in model.parameters()), "cpu"))
    except Exception as error:  # a model may raise anything
        raise UserError(
            f"model.name={name}: it does not take images of 2 x 3 x {image_size} x {image_size} "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error
    if shape != (2, num_classes):
        raise UserError(
            f"model.name={name}: for 2 images and {num_classes} classes it returns {shape}, and must return "
            f"logits of (2, {num_classes})"
        )


def without_sources(pretrained_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return timm's facts about weights without the places from which timm would load them."""
    return {key: value for key, value in pretrained_cfg.items() if key not in _SOURCE_KEYS}


def _rates(config: "ModelConfig") -> dict[str, float]:
    return {name: rate for name in ("drop_rate", "drop_path_rate") if (rate := getattr(config, name))}


def size_options(config: "ModelConfig", record: ModelRecord, image_size: int) -> dict[str, Any]:
    """Return the arguments with which the model takes images of this size, tried on the meta device.

    Raises:
        UserError: there are none, or the model does not take a rate.
    """
    published, rates = without_sources(record.pretrained_cfg), _rates(config)
    native = int((published.get("input_size") or (3, 224, 224))[-1])
    errors: list[str] = []
    for options in _size_choices(published, image_size):
        try:
            _try_on_meta(record, {**record.arguments, **rates, **options}, image_size)
            return options
        except NotImplementedError:  # an operation without a meta kernel: the model is checked when it is built
            return options
        except Exception as error:  # a model may raise anything
            _refuse_rate(config, error)
            if not _UNKNOWN_ARGUMENT.search(str(error)) or not options:
                errors.append(first_line(error))
    steps = 32
    near = sorted({max(steps, image_size // steps * steps), (image_size // steps + 1) * steps, native} - {image_size})
    fitting = [size for size in near if _takes(record, published, size)]
    remedy = f"set data.image_size={' or '.join(map(str, fitting))}" if fitting else f"its weights are for {native} pixels"
    raise UserError(f"data.image_size={image_size}: {config.name} does not take images of this size ({errors[0]}); {remedy}")


def _size_choices(published: Mapping[str, Any], image_size: int) -> Iterator[dict[str, Any]]:
    """Yield arguments to try, the best first: other sizes at run time, one size, any size."""
    if published.get("fixed_input_size"):
        # Position embeddings are resampled at run time for other sizes than the recipe's (in the app).
        yield {"img_size": image_size, "dynamic_img_size": True}
        yield {"img_size": image_size, "dynamic_img_size": True, "dynamic_img_pad": True}
        yield {"img_size": image_size}
        yield {"img_size": image_size, "strict_img_size": False}
    yield {}


def _takes(record: ModelRecord, published: Mapping[str, Any], image_size: int) -> bool:
    for options in _size_choices(published, image_size):
        try:
            _try_on_meta(record, {**record.arguments, **options}, image_size)
        except Exception:  # a model may raise anything
            continue
        return True
    return False


def _try_on_meta(record: ModelRecord, options: Mapping[str, Any], image_size: int) -> None:
    import timm

    with torch.device("meta"):
        model: nn.Module = timm.create_model(str(record.architecture), **options)
    _output_shape(model, image_size, device="meta")


def _output_shape(model: nn.Module, image_size: int, *, device: str) -> tuple[int, ...] | None:
    """Return the shape of the output for two images; None if it is no tensor."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            out = model(torch.zeros(2, 3, image_size, image_size, device=device))
    finally:
        model.train(was_training)
    return tuple(out.shape) if isinstance(out, Tensor) else None


def _refuse_rate(config: "ModelConfig", error: Exception) -> None:
    found = _UNKNOWN_ARGUMENT.search(str(error)) if isinstance(error, TypeError) else None
    if found is not None and found[1] in ("drop_rate", "drop_path_rate"):
        raise UserError(
            f"model.{found[1]}={getattr(config, found[1])}: {config.name} does not take this setting; set it to 0"
        ) from error


def _check_drop_path(config: "ModelConfig", model: nn.Module) -> None:
    """Refuse a drop-path rate that the model took and does not use."""
    rates = [getattr(module, "drop_prob", 0) for module in model.modules() if "DropPath" in type(module).__name__]
    if config.drop_path_rate and not any(rates):
        raise UserError(
            f"model.drop_path_rate={config.drop_path_rate}: {config.name} has no residual branches to drop; set it to 0"
        )


def _stored_classes(tensors: Mapping[str, Tensor], published: Mapping[str, Any]) -> int:
    """Return the number of classes of stored weights, 0 without a head."""
    named = published.get("classifier") or ()
    for name in (named,) if isinstance(named, str) else named:
        if (weight := tensors.get(f"{name}.weight")) is not None:
            return int(weight.shape[0])
    return 0


def _load(
    config: "ModelConfig",
    record: ModelRecord,
    options: Mapping[str, Any],
    published: Mapping[str, Any],
    *,
    tensors: Mapping[str, Tensor] | None,
    source: str,
) -> nn.Module:
    """Build the model, and let timm load the weights strictly; its conversion resamples position embeddings and the like."""
    import timm

    known: dict[str, Any] = {**published, "architecture": record.architecture}
    if tensors is not None:
        known["state_dict"] = dict(tensors)
    try:
        model: Any = timm.create_model(str(record.architecture), pretrained=tensors is not None, pretrained_cfg=known, **options)
    except (RuntimeError, KeyError, AttributeError, ValueError) as error:
        if tensors is None:
            raise
        lines = [line.strip() for line in str(error).splitlines()[1:4]] or [str(error)]
        text = " ".join(line if len(line) <= 300 else f"{line[:300]}..." for line in lines)
        raise UserError(f"weights {source} do not fit {config.name} ({text}): were they saved from another model?") from error
    model.pretrained_cfg = {key: value for key, value in model.pretrained_cfg.items() if key != "state_dict"}
    model.default_cfg = model.pretrained_cfg  # timm's older name
    if tensors is not None and (bad := [name for name, p in model.state_dict().items() if not bool(torch.isfinite(p).all())]):
        raise UserError(f"weights {source}: {name_some(bad)} have nan or inf")
    built: nn.Module = model
    return built
