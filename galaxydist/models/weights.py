"""Weights in files: safetensors, and making them fit a model with another head or another image size."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from galaxydist.errors import UserError

# What torch.compile and DistributedDataParallel put in front of a parameter's name.
WRAPPER_PREFIXES = ("_orig_mod.", "module.")
# Names listed in a message before it says "and N more".
NAMES_SHOWN = 5
# Where a file that we wrote says how the images were normalised.
STATISTICS_KEY = "input_statistics"

Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]


def write_weights(path: Path, tensors: Mapping[str, Tensor], statistics: Statistics | None = None) -> None:
    """Write a model's ``state_dict`` as safetensors, under the names of the bare model; whole or not at all.

    Args:
        statistics: channel mean and deviation (0..1, RGB) that the images were normalised with; whoever starts from this file
            gets them back from ``read_statistics``.
    """
    bare = {_bare(name): tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt"} | ({STATISTICS_KEY: json.dumps(statistics)} if statistics is not None else {})
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file(bare, partial, metadata)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, without the prefixes that wrappers leave in their names. Nothing is unpickled.

    Raises:
        UserError: where there is no such file, or it is not (whole) safetensors.
    """
    tensors: dict[str, Tensor] = _read(path, lambda file: {_bare(name): file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return tensors


def read_statistics(path: Path) -> Statistics | None:
    """The channel mean and deviation that ``write_weights`` put into a file; None in a file from elsewhere."""
    text = _read(path, lambda file: (file.metadata() or {}).get(STATISTICS_KEY))
    if text is None:
        return None
    (r, g, b), (dr, dg, db) = json.loads(text)
    return (r, g, b), (dr, dg, db)


def load_weights(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    source: str,
    *,
    head_names: tuple[str, ...] = (),
    unused: tuple[str, ...] = (),
    say: Callable[[str], None],
) -> None:
    """Copy ``tensors`` into ``model``, in place; a head of another shape stays as it is, a position embedding is resampled.

    Args:
        tensors: by parameter or buffer name; any float type.
        source: the file, for messages.
        head_names: modules that need not fit.
        unused: prefixes of names that need no place in the model.
        say: told of everything that was left out or changed.

    Raises:
        UserError: naming what is missing, left over, of another shape, or not finite. The model is then unchanged.
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
        say(f"{source}: its head does not fit this model's classes and is left out; the new head starts from random weights")
        given = {name: tensor for name, tensor in given.items() if not name.startswith(heads)}
    _resample_positions(model, own, given, source, say)
    wanted = {name for name in own if not (head_differs and name.startswith(heads)) and not name.endswith("num_batches_tracked")}
    _refuse_misfits(own, given, wanted, source)
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


def _resample_positions(
    model: nn.Module, own: Mapping[str, Tensor], given: dict[str, Tensor], source: str, say: Callable[[str], None]
) -> None:
    """Bring a ViT's position embedding (1 x tokens x D) to this model's grid of patches, in ``given``."""
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
    say(f"{source}: position embedding resampled from {side} x {side} to {grid[0]} x {grid[1]} patches")


def _refuse_misfits(own: Mapping[str, Tensor], given: Mapping[str, Tensor], wanted: set[str], source: str) -> None:
    shapes = [
        f"{name} (file {tuple(given[name].shape)}, model {tuple(own[name].shape)})"
        for name in sorted(own.keys() & given.keys())
        if own[name].shape != given[name].shape
    ]
    not_finite = sorted(name for name, tensor in given.items() if not bool(torch.isfinite(tensor).all()))
    problems = [
        f"{what}: {_listed(names)}"
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


def _listed(names: list[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
