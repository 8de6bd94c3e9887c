"""Model weights in safetensors files: reading, writing, loading into a model, and published weights.

Published weights are downloaded once on a machine with a network; all machines find them in the cache.
"""

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from galaxydist.atomic_files import replace_bytes
from galaxydist.errors import UserError, name_some
from galaxydist.models.registry import ARCHITECTURES, recipe_of, timm_name
from galaxydist.recipe.schema import ModelConfig

if TYPE_CHECKING:  # a submission checks for weights without importing torch
    from torch import Tensor, nn

logger = logging.getLogger(__name__)

# Prefixes that torch.compile and DistributedDataParallel add to parameter names.
WRAPPER_PREFIXES = ("_orig_mod.", "module.")
# Metadata key of the image normalisation in files that we write.
STATISTICS_KEY = "input_statistics"

Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]


def write_weights(path: Path, tensors: Mapping[str, "Tensor"], statistics: Statistics | None = None) -> None:
    """Write a model's ``state_dict`` as safetensors, atomically and without the name prefixes of wrappers.

    Args:
        statistics: channel mean and standard deviation (0..1, RGB) of the image normalisation, for ``read_statistics``.
    """
    from safetensors.torch import save

    bare = {_bare(name): tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt"} | ({STATISTICS_KEY: json.dumps(statistics)} if statistics is not None else {})
    replace_bytes(path, save(bare, metadata))


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


# Published weights.

HUB_FILE = "model.safetensors"


def weights_file(config: ModelConfig, weights_dir: Path) -> Path:
    """Return the cache path of the published weights of ``config``'s architecture, with timm's name and tag."""
    return weights_dir / f"{_published_name(config)}.safetensors"


def fetch_command(config: ModelConfig) -> str:
    """Return the command that downloads the published weights of ``config``'s architecture."""
    size = "" if config.size == "small" else f" model.size={config.size}"
    return f"galaxydist weights fetch recipe={recipe_of(config.name)}{size}"


def find_weights(config: ModelConfig, weights_dir: Path | None) -> Path:
    """Find the published weights on this machine: in ``weights_dir``, else in the local Hugging Face cache.

    Raises:
        UserError: the weights are in neither; the text has the command to download them.
    """
    path = None if weights_dir is None else weights_file(config, weights_dir)
    if path is not None and path.is_file():
        return path
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(_hub_id(config), HUB_FILE)
    if isinstance(cached, str):
        return Path(cached)
    raise UserError(
        f"model.pretrained=true, but the published weights {_published_name(config)} are not on this machine "
        f"(looked in {f'{path} and ' if path else ''}the Hugging Face cache). Either run, on a machine with network and the same "
        f"data root,\n"
        f"  {fetch_command(config)}\n"
        "or start from random weights: model.pretrained=false; model.weights=FILE loads a safetensors file of your own"
    )


def fetch_weights(config: ModelConfig, weights_dir: Path, *, timeout: float = 10.0, endpoint: str | None = None) -> Path:
    """Download the published weights of ``config``'s architecture into ``weights_dir``, unless they exist.

    Call it in one process of a machine. ``config.pretrained`` need not be set.

    Args:
        timeout: seconds to wait for the hub's answer; the download itself may take longer.
        endpoint: the hub's address; default: the public hub.

    Returns:
        The file, which gets its name only when it is complete and has the SHA-256 that the hub states.

    Raises:
        UserError: the architecture has no published weights, the hub does not answer, or the file is damaged.
    """
    path = weights_file(config, weights_dir)
    if path.is_file():
        return path
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    weights_dir.mkdir(parents=True, exist_ok=True)
    repo = _hub_id(config)
    try:
        # One request with a short timeout first: without a network, the download would retry for minutes.
        metadata: Any = get_hf_file_metadata(hf_hub_url(repo, HUB_FILE, endpoint=endpoint), timeout=timeout)
        with tempfile.TemporaryDirectory(dir=weights_dir, prefix=".fetch-") as folder:
            download = hf_hub_download(repo, HUB_FILE, local_dir=folder, revision=metadata.commit_hash, endpoint=endpoint)
            _verify(Path(download), metadata.etag)
            Path(download).replace(path)
    except UserError:
        raise
    except Exception as error:  # the exceptions of huggingface_hub differ between its major versions
        raise UserError(
            f"weights {path.stem}: could not be downloaded from {endpoint or 'the Hugging Face hub'} into {weights_dir} "
            f"({type(error).__name__}: {error}). Run `{fetch_command(config)}` on a machine with network and copy {path.name} "
            "into that folder, or train with model.pretrained=false"
        ) from error
    return path


def _verify(path: Path, etag: str | None) -> None:
    """Compare a file with the hub's etag, which for large files is the SHA-256; etags of small files are ignored."""
    if etag is not None and len(etag) == 64:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != etag:
            raise UserError(f"weights {path.name}: damaged on the way (SHA-256 {found}, the hub states {etag}); try again")

    read_weights(path)


def _published_name(config: ModelConfig) -> str:
    name = timm_name(config)
    if name is None or not ARCHITECTURES[config.name].has_published_weights:
        raise UserError(f"{config.name} has no published weights: set model.pretrained=false; model.weights=FILE loads your own")
    return name


def _hub_id(config: ModelConfig) -> str:
    return f"timm/{_published_name(config)}"
