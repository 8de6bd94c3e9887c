"""Weights in files: safetensors, and making them fit a model with another head or another image size."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from galaxydist.errors import UserError
from galaxydist.models.registry import ARCHITECTURES, recipe_of, timm_name
from galaxydist.recipe.schema import ModelConfig

if TYPE_CHECKING:  # a submission looks for weights and needs no torch
    from torch import Tensor, nn

# What torch.compile and DistributedDataParallel put in front of a parameter's name.
WRAPPER_PREFIXES = ("_orig_mod.", "module.")
# Names listed in a message before it says "and N more".
NAMES_SHOWN = 5
# Where a file that we wrote says how the images were normalised.
STATISTICS_KEY = "input_statistics"

Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]


def write_weights(path: Path, tensors: Mapping[str, "Tensor"], statistics: Statistics | None = None) -> None:
    """Write a model's ``state_dict`` as safetensors, under the names of the bare model; whole or not at all.

    Args:
        statistics: channel mean and deviation (0..1, RGB) that the images were normalised with; whoever starts from this file
            gets them back from ``read_statistics``.
    """
    from safetensors.torch import save_file

    bare = {_bare(name): tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt"} | ({STATISTICS_KEY: json.dumps(statistics)} if statistics is not None else {})
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file(bare, partial, metadata)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_weights(path: Path) -> dict[str, "Tensor"]:
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
    model: "nn.Module",
    tensors: Mapping[str, "Tensor"],
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


def _resample_positions(
    model: "nn.Module", own: Mapping[str, "Tensor"], given: dict[str, "Tensor"], source: str, say: Callable[[str], None]
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


def _refuse_misfits(own: Mapping[str, "Tensor"], given: Mapping[str, "Tensor"], wanted: set[str], source: str) -> None:
    shapes = [
        f"{name} (file {tuple(given[name].shape)}, model {tuple(own[name].shape)})"
        for name in sorted(own.keys() & given.keys())
        if own[name].shape != given[name].shape
    ]
    import torch

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


# Published weights: fetched once on a machine with a network, found afterwards in the cache on any.

HUB_FILE = "model.safetensors"


def weights_file(config: ModelConfig, weights_dir: Path) -> Path:
    """Where the cache keeps the published weights of ``config``'s architecture: named by timm's name and tag."""
    return weights_dir / f"{_published_name(config)}.safetensors"


def fetch_command(config: ModelConfig) -> str:
    """What to type on a machine with network to get the published weights of ``config``'s architecture."""
    size = "" if config.size == "small" else f" model.size={config.size}"
    return f"galaxydist weights fetch recipe={recipe_of(config.name)}{size}"


def find_weights(config: ModelConfig, weights_dir: Path | None) -> Path:
    """The published weights on this machine: in ``weights_dir``, else in the local Hugging Face cache. Never the network.

    Raises:
        UserError: where they are in neither, with the commands that help.
    """
    places = []
    if weights_dir is not None:
        path = weights_file(config, weights_dir)
        if path.is_file():
            return path
        places.append(str(path))
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(_hub_id(config), HUB_FILE)
    if isinstance(cached, str):
        return Path(cached)
    places.append("the Hugging Face cache")
    raise UserError(
        f"model.pretrained=true, but the published weights {_published_name(config)} are not on this machine "
        f"(looked in {' and '.join(places)}). Either run, on a machine with network and the same data root,\n"
        f"  {fetch_command(config)}\n"
        "or start from random weights: model.pretrained=false; model.weights=FILE loads a safetensors file of your own"
    )


def fetch_weights(config: ModelConfig, weights_dir: Path, *, timeout: float = 10.0, endpoint: str | None = None) -> Path:
    """Download the published weights of ``config``'s architecture into ``weights_dir``, unless they are there.

    Run it on one process of a machine. ``config.pretrained`` need not be set.

    Args:
        timeout: seconds to wait for the hub's answer before giving up; the download itself may take as long as it moves.
        endpoint: the hub's address, if not the public one.

    Returns:
        The file. It appears under its name only when it is whole and its SHA-256 is the one that the hub states.

    Raises:
        UserError: where the architecture has no published weights, the hub does not answer, or the file is damaged.
    """
    path = weights_file(config, weights_dir)
    if path.is_file():
        return path
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    weights_dir.mkdir(parents=True, exist_ok=True)
    repo = _hub_id(config)
    try:
        # Asked first, once and with a short timeout: the download itself would retry for minutes where there is no network.
        metadata: Any = get_hf_file_metadata(hf_hub_url(repo, HUB_FILE, endpoint=endpoint), timeout=timeout)
        with tempfile.TemporaryDirectory(dir=weights_dir, prefix=".fetch-") as folder:
            download = hf_hub_download(repo, HUB_FILE, local_dir=folder, revision=metadata.commit_hash, endpoint=endpoint)
            _verify(Path(download), metadata.etag)
            Path(download).replace(path)
    except UserError:
        raise
    except Exception as error:  # the hub's library changed its transport, and so its errors, with every major version
        raise UserError(
            f"weights {path.stem}: could not be downloaded from {endpoint or 'the Hugging Face hub'} into {weights_dir} "
            f"({type(error).__name__}: {error}). Run `{fetch_command(config)}` on a machine with network and copy {path.name} "
            "into that folder, or train with model.pretrained=false"
        ) from error
    return path


def _verify(path: Path, etag: str | None) -> None:
    """The hub's etag of a large file is its SHA-256; a small one's is something else and says nothing."""
    if etag is not None and len(etag) == 64:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != etag:
            raise UserError(f"weights {path.name}: damaged on the way (SHA-256 {found}, the hub says {etag}); try again")

    read_weights(path)


def _published_name(config: ModelConfig) -> str:
    name = timm_name(config)
    if name is None or not ARCHITECTURES[config.name].has_published_weights:
        raise UserError(f"{config.name} has no published weights: set model.pretrained=false; model.weights=FILE loads your own")
    return name


def _hub_id(config: ModelConfig) -> str:
    return f"timm/{_published_name(config)}"
