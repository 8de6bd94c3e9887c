"""Published weights: fetched once on a machine with a network, found afterwards in the cache on any."""

import hashlib
import tempfile
from pathlib import Path
from typing import Any

from galaxydist.errors import UserError
from galaxydist.models.registry import ARCHITECTURES, recipe_of, timm_name
from galaxydist.recipe.schema import ModelConfig

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
    from galaxydist.models.weights import read_weights  # torch

    read_weights(path)


def _published_name(config: ModelConfig) -> str:
    name = timm_name(config)
    if name is None or not ARCHITECTURES[config.name].has_published_weights:
        raise UserError(f"{config.name} has no published weights: set model.pretrained=false; model.weights=FILE loads your own")
    return name


def _hub_id(config: ModelConfig) -> str:
    return f"timm/{_published_name(config)}"
