"""Model weights in safetensors files: reading, writing and loading into a model."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from galaxydist.atomic_files import replace_bytes
from galaxydist.errors import UserError, first_line, name_some
from galaxydist.recipe.schema import DataConfig, ModelConfig

if TYPE_CHECKING:  # a submission checks for weights without importing torch
    from torch import Tensor, nn

logger = logging.getLogger(__name__)

# Prefixes that torch.compile and DistributedDataParallel add to parameter names.
WRAPPER_PREFIXES = ("_orig_mod.", "module.")
# Metadata keys in files that we write: the image normalisation, and the settings of the model.
STATISTICS_KEY, MODEL_KEY = "input_statistics", "model"
MODEL_SETTINGS = ("name", "size", "width", "norm")
DATA_SETTINGS = ("image_size", "crop")

Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]


def write_weights(
    path: Path,
    tensors: Mapping[str, "Tensor"],
    statistics: Statistics | None = None,
    config: ModelConfig | None = None,
    data: DataConfig | None = None,
) -> None:
    """Write a model's ``state_dict`` as safetensors, atomically and without the name prefixes of wrappers.

    Args:
        statistics: channel mean and standard deviation (0..1, RGB) of the image normalisation, for ``read_statistics``.
        config: the model's settings, for ``check_settings``.
        data: settings of the images that the model was trained on, for ``read_settings``.
    """
    from safetensors.torch import save

    bare = {_bare(name): tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    replace_bytes(path, save(bare, describe_weights(statistics, config, data)))


def describe_weights(
    statistics: Statistics | None = None, config: ModelConfig | None = None, data: DataConfig | None = None
) -> dict[str, str]:
    """Return the metadata of a safetensors file; the arguments are those of ``write_weights``."""
    metadata = {"format": "pt"} | ({STATISTICS_KEY: json.dumps(statistics)} if statistics is not None else {})
    if config is not None:
        settings = {name: getattr(config, name) for name in MODEL_SETTINGS}
        metadata[MODEL_KEY] = json.dumps(settings | ({name: getattr(data, name) for name in DATA_SETTINGS} if data else {}))
    return metadata


def check_settings(path: Path, config: ModelConfig) -> None:
    """Refuse weights of a named model with other settings than the recipe's, if the file states its own.

    Raises:
        UserError: the file cannot be read, or another value is needed.
    """
    stored = read_settings(path)
    if stored.get("name") != config.name:
        return  # another name may be the same network; its shapes are checked
    wrong = [
        f"model.{name}={stored[name]}"
        for name in MODEL_SETTINGS
        if stored.get(name, getattr(config, name)) != getattr(config, name)
    ]
    if wrong:
        raise UserError(f"weights {path} are of {config.name} with {', '.join(wrong)}: set this, or choose other weights")


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings of model and images that ``write_weights`` stored, by name; empty for other files.

    Raises:
        UserError: the file cannot be read.
    """
    text = _read(path, lambda file: (file.metadata() or {}).get(MODEL_KEY))
    return {} if text is None else dict(json.loads(text))


def read_pickled_weights(path: Path) -> dict[str, "Tensor"]:
    """Read the tensors of a file of ``torch.save``; nothing but tensors and plain values is unpickled.

    Raises:
        UserError: the file has anything else, such as code, or is damaged.
    """
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler and torch raise errors of many kinds for damaged files
        raise UserError(
            f"weights {path.name}: refused, since it is not a whole file of tensors only ({type(error).__name__}: "
            f"{first_line(error)}). "
            "A pickle can run code when it is read: use a safetensors file of these weights"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        raise UserError(f"weights {path.name}: it does not hold named tensors only, and so no weights of a model")
    return {_bare(str(name)): tensor.clone() for name, tensor in content.items()}


def read_weights(path: Path) -> dict[str, "Tensor"]:
    """Read the tensors of a safetensors file, without name prefixes of wrappers; nothing is unpickled.

    Raises:
        UserError: the file does not exist, or it is not a complete safetensors file.
    """
    tensors: dict[str, Tensor] = _read(path, lambda file: {_bare(name): file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return tensors


def read_statistics(path: Path) -> Statistics | None:
    """Read the channel mean and standard deviation that ``write_weights`` stored; None for other files."""
    text = _read(path, lambda file: (file.metadata() or {}).get(STATISTICS_KEY))
    if text is None:
        return None
    (r, g, b), (dr, dg, db) = json.loads(text)
    return (r, g, b), (dr, dg, db)


def load_weights(
    model: "nn.Module",
    tensors: Mapping[str, "Tensor"],
    source: str,
    *,
    head_names: tuple[str, ...] = (),
    unused: tuple[str, ...] = (),
) -> None:
    """Copy ``tensors`` into ``model`` in place; a head of another shape is left out, a position embedding is resampled.

    Args:
        tensors: tensors of any float type, by parameter or buffer name.
        source: the file, for messages.
        head_names: modules whose weights may be of another shape.
        unused: name prefixes of tensors to ignore.

    Raises:
        UserError: tensors are missing, superfluous, of another shape or not finite; the text names them. The model is unchanged.
    """
    own = model.state_dict()
    given = {name: tensor for name, tensor in tensors.items() if not name.startswith(unused)}
    heads = tuple(f"{name}." for name in head_names)
    head_differs = any(
        name not in given or name not in own or given[name].shape != own[name].shape
        for name in own.keys() | given.keys()
        if name.startswith(heads)
    )
    if head_differs:
        logger.warning(
            "%s: its head does not fit this model's classes and is left out; the new head starts from random weights", source
        )
        given = {name: tensor for name, tensor in given.items() if not name.startswith(heads)}
    _resample_positions(model, own, given, source)
    wanted = {name for name in own if not (head_differs and name.startswith(heads)) and not name.endswith("num_batches_tracked")}
    _refuse_misfits(own, given, wanted, source)
    import torch

    with torch.no_grad():
        for name, tensor in given.items():
            own[name].copy_(tensor)


def _read(path: Path, take: Callable[[Any], Any]) -> Any:
    if not path.is_file():
        raise UserError(f"weights {path}: {'is a folder' if path.is_dir() else 'no such file'}; give a .safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            return take(file)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"weights {path}: not a whole safetensors file ({error}); pickled files (.pt, .pth, .ckpt) are not read: "
            "save the model's state_dict with safetensors.torch.save_file"
        ) from error


def _bare(name: str) -> str:
    while name.startswith(WRAPPER_PREFIXES):
        name = name.split(".", 1)[1]
    return name


def _resample_positions(model: "nn.Module", own: Mapping[str, "Tensor"], given: dict[str, "Tensor"], source: str) -> None:
    """Resample a ViT's position embedding (1 x tokens x D) in ``given`` to this model's grid of patches."""
    name = "pos_embed"
    if name not in own or name not in given or own[name].shape == given[name].shape or given[name].ndim != 3:
        return
    from timm.layers import resample_abs_pos_embed

    num_prefix: Any = model.num_prefix_tokens
    side = round((given[name].shape[1] - num_prefix) ** 0.5)
    if side**2 != given[name].shape[1] - num_prefix or given[name].shape[2] != own[name].shape[2]:
        return
    embed: Any = model.patch_embed
    grid = list(embed.grid_size)
    given[name] = resample_abs_pos_embed(given[name].float(), new_size=grid, num_prefix_tokens=num_prefix)
    logger.info("%s: position embedding resampled from %d x %d to %d x %d patches", source, side, side, *grid)


def _refuse_misfits(own: Mapping[str, "Tensor"], given: Mapping[str, "Tensor"], wanted: set[str], source: str) -> None:
    shapes = [
        f"{name} (file {tuple(given[name].shape)}, model {tuple(own[name].shape)})"
        for name in sorted(own.keys() & given.keys())
        if own[name].shape != given[name].shape
    ]
    import torch

    not_finite = sorted(name for name, tensor in given.items() if not bool(torch.isfinite(tensor).all()))
    problems = [
        f"{what}: {name_some(names)}"
        for what, names in (
            ("missing in the file", sorted(wanted - given.keys())),
            ("not in this model", sorted(given.keys() - own.keys())),
            ("of another shape", shapes),
            ("with nan or inf", not_finite),
        )
        if names
    ]
    if problems:
        raise UserError(
            f"weights {source} do not fit the model: were they saved from another model.name, model.size or model.width?\n  "
            + "\n  ".join(problems)
        )
