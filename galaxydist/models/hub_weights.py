"""Published weights: those in the package, and those of timm and of a hub, downloaded once and found by all machines.

The folder of weights holds ``NAME.TAG.safetensors`` for timm's names, with a JSON file beside it that names source and licence,
and ``OWNER--NAME/`` for a repository, with the same files as a folder for ``local-dir:``.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from galaxydist.atomic_files import disk_error, file_sha256, read_json, remove_stale, write_json
from galaxydist.errors import UserError, first_line, name_some
from galaxydist.models.own_function import check_source
from galaxydist.models.registry import ARCHITECTURES, ModelRecord, recipe_of, timm_name
from galaxydist.models.weights import read_pickled_weights, read_weights, write_weights
from galaxydist.recipe.model_names import ModelReference, parse_model_name
from galaxydist.recipe.schema import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

HUB_FILE, PICKLED_FILE, CONFIG_FILE, SOURCE_FILE = "model.safetensors", "pytorch_model.bin", "config.json", "source.json"
SHIPPED_DIR, SHIPPED_LICENCE = Path(__file__).parent / "shipped", "MIT"


def shipped_path(name: str) -> Path:
    """Return the path of the weights that the package brings along for one of its own architectures."""
    return SHIPPED_DIR / f"{name}.safetensors"


def weights_file(config: ModelConfig, weights_dir: Path) -> Path:
    """Return the path of the published weights of ``config``'s model in the folder of weights; it need not exist."""
    reference = _published_reference(config)
    if reference.kind == "hf-hub":
        return weights_dir / reference.file_name / HUB_FILE
    return weights_dir / f"{reference.file_name}.safetensors"


def fetch_command(config: ModelConfig) -> str:
    """Return the command that downloads the published weights of ``config``'s model."""
    if config.name not in ARCHITECTURES:
        return f"galaxydist weights fetch {config.name}"
    size = "" if config.size == "small" else f" model.size={config.size}"
    return f"galaxydist weights fetch recipe={recipe_of(config.name)}{size}"


def find_weights(config: ModelConfig, weights_dir: Path | None) -> Path:
    """Find the published weights on this machine: in the package, in ``weights_dir``, or in the local Hugging Face cache.

    Raises:
        UserError: the weights are in none of them; the text has the command to download them.
    """
    known = ARCHITECTURES.get(config.name)
    if known is not None and known.is_shipped:
        path = shipped_path(config.name)
        if not path.is_file():
            raise UserError(
                f"model.pretrained=true: this version of galaxydist brings no weights of {config.name} along "
                f"(there is no {path}). Set model.pretrained=false; model.weights=FILE loads a safetensors file of your own"
            )
        return path
    reference = _published_reference(config)
    if reference.kind in ("hf-hub", "local-dir"):
        folder = _find_folder(reference, config, weights_dir)
        names = (HUB_FILE, PICKLED_FILE)
        if (found := next((folder / name for name in names if (folder / name).is_file()), None)) is not None:
            return found
        remedy = f": run `{fetch_command(config)}` again" if reference.kind == "hf-hub" else ""
        raise UserError(f"model.name={config.name}: there is neither {names[0]} nor {names[1]} in {folder}{remedy}")
    stored = None if weights_dir is None else weights_file(config, weights_dir)
    if stored is not None and stored.is_file():
        return stored
    cached = _cached(f"timm/{reference.file_name}", HUB_FILE, None)
    if cached is not None:
        return cached
    raise UserError(
        f"model.pretrained=true, but the published weights {reference.file_name} are not on this machine "
        f"(looked in {f'{stored} and ' if stored else ''}the Hugging Face cache). Either run, on a machine with "
        "network and the same data root,\n"
        f"  {fetch_command(config)}\n"
        "or start from random weights: model.pretrained=false; model.weights=FILE loads a safetensors file of your own"
    )


def read_published(path: Path) -> dict[str, "Tensor"]:
    """Read published weights from ``find_weights``; nothing is unpickled but tensors.

    Raises:
        UserError: the file is damaged, or a pickle with anything else than tensors.
    """
    return read_pickled_weights(path) if path.name == PICKLED_FILE else read_weights(path)


def read_record(config: ModelConfig, weights_dir: Path | None) -> ModelRecord:
    """Return what is known about a model before it is built; for timm's names this imports timm.

    Raises:
        UserError: the files of a repository or folder are not on this machine or damaged, or timm has no such name.
    """
    reference = parse_model_name(config.name)
    found: dict[str, Any] = {}
    if reference.kind == "timm":
        from galaxydist.models.timm_models import check_timm_name, pretrained_config

        check_timm_name(reference.name, reference.version)
        found = {
            "architecture": reference.name,
            "pretrained_cfg": json.loads(json.dumps(pretrained_config(reference.name, reference.version))),
        }
    elif reference.kind in ("hf-hub", "local-dir"):
        found = _read_config(_find_folder(reference, config, weights_dir) / CONFIG_FILE)
    return ModelRecord(**found, **_read_source(config, weights_dir, found))


def check_files(config: ModelConfig, weights_dir: Path | None) -> None:
    """Check that the files that a model needs are on this machine, without reading or importing anything large.

    Raises:
        UserError: they are not; the text has the command that downloads them.
    """
    reference = parse_model_name(config.name)
    check_source(config.name)
    if reference.kind in ("hf-hub", "local-dir"):
        _find_folder(reference, config, weights_dir)
    if config.pretrained:
        find_weights(config, weights_dir)


def _published_reference(config: ModelConfig) -> ModelReference:
    """Return the timm name or repository of ``config``'s published weights."""
    name = timm_name(config)
    if name is not None and ARCHITECTURES[config.name].has_published_weights:
        return parse_model_name(f"timm/{name}")
    reference = parse_model_name(config.name)
    if reference.kind == "named":
        raise UserError(f"{config.name} has no published weights: set model.pretrained=false; model.weights=FILE loads your own")
    if reference.kind == "timm" and reference.version is None:
        from galaxydist.models.timm_models import check_timm_name, describe_tags

        check_timm_name(reference.name, None)
        raise UserError(f"model.name={config.name} does not name its weights: add their tag; {describe_tags(reference.name)}")
    return reference


def _find_folder(reference: ModelReference, config: ModelConfig, weights_dir: Path | None) -> Path:
    """Return the folder of a model's ``config.json``."""
    if reference.kind == "local-dir":
        folder = Path(reference.name).expanduser()
        if not (folder / CONFIG_FILE).is_file():
            problem = f"{folder} has no {CONFIG_FILE}" if folder.is_dir() else "there is no such folder"
            raise UserError(
                f"model.name={config.name}: {problem}; give a folder in timm's format, with {CONFIG_FILE} and {HUB_FILE}"
            )
        return folder
    folder = Path() if weights_dir is None else weights_dir / reference.file_name
    if weights_dir is not None and (folder / CONFIG_FILE).is_file():
        return folder
    cached = _cached(reference.name, CONFIG_FILE, reference.version)
    if cached is not None:
        return cached.parent
    raise UserError(
        f"model.name={config.name} is not on this machine (looked in {f'{folder} and ' if weights_dir else ''}the Hugging Face "
        f"cache). Run, on a machine with network and the same data root,\n  {fetch_command(config)}"
    )


def _cached(repo: str, file: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def _read_config(path: Path) -> dict[str, Any]:
    """Read timm's ``config.json`` as fields of a ``ModelRecord``.

    Raises:
        UserError: it is not in timm's format.
    """
    content = read_json(path)
    if isinstance(content, dict) and "architecture" in content and "pretrained_cfg" not in content:
        content = {"architecture": content.pop("architecture"), "pretrained_cfg": content}  # timm before 0.9
    fields = content if isinstance(content, dict) else {}
    pretrained_cfg, arguments = fields.get("pretrained_cfg"), fields.get("model_args", {})
    if not isinstance(pretrained_cfg, dict) or not isinstance(arguments, dict) or not isinstance(fields.get("architecture"), str):
        raise UserError(
            f"{path} is not in timm's format (architecture, pretrained_cfg): the model is of another library, "
            "such as transformers; write a function for it (model.name=package.module:function)"
        )
    if "num_classes" in fields:
        pretrained_cfg["num_classes"] = fields["num_classes"]
    arguments = {key: value for key, value in arguments.items() if key not in ("num_classes", "in_chans")}
    return {"architecture": fields["architecture"], "pretrained_cfg": pretrained_cfg, "arguments": arguments}


def _read_source(config: ModelConfig, weights_dir: Path | None, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return source and licence of the weights that a run starts from."""
    if not config.pretrained:
        return {}
    path = find_weights(config, weights_dir)
    if path.parent == SHIPPED_DIR:
        return {"source": f"galaxydist/models/shipped/{path.name}", "licence": SHIPPED_LICENCE}
    beside = path.with_name(SOURCE_FILE) if path.name in (HUB_FILE, PICKLED_FILE) else path.with_suffix(".json")
    stored = read_json(beside) if beside.is_file() else {}
    licence = stored.get("licence") or found.get("pretrained_cfg", {}).get("license")
    name = timm_name(config)
    if licence is None and name is not None:
        from galaxydist.models.timm_models import pretrained_config

        licence = pretrained_config(*name.split(".", 1)).get("license")
    return {"source": stored.get("source", config.name if name is None else f"timm/{name}"), "licence": licence}


def fetch_weights(config: ModelConfig, weights_dir: Path, *, timeout: float = 10.0, endpoint: str | None = None) -> Path:
    """Download the published weights of ``config``'s model into ``weights_dir``, unless they exist.

    Call it in one process of a machine. ``config.pretrained`` need not be set. A repository that has a pickled file only is
    accepted if the pickle holds nothing but tensors, and stored as safetensors.

    Args:
        timeout: seconds to wait for the hub's answer; the download itself may take longer.
        endpoint: the hub's address; default: the public hub.

    Returns:
        The file, which gets its name only when it is complete and has the SHA-256 that the hub states.

    Raises:
        UserError: there are no published weights, the hub does not answer or asks for a licence to be accepted first, or a file
            is damaged or not in timm's format.
    """
    known = ARCHITECTURES.get(config.name)
    reference = parse_model_name(config.name)
    if (known is not None and known.is_shipped) or reference.kind == "local-dir":
        return find_weights(config, weights_dir)
    if reference.kind == "function":
        raise UserError(f"model.name={config.name} is a function of your own: there are no weights to download")
    path = weights_file(config, weights_dir)
    if path.is_file():
        return path
    reference = _published_reference(config)
    if reference.kind == "timm":
        from galaxydist.models.timm_models import check_timm_name

        check_timm_name(reference.name, reference.version)
    repo = reference.name if reference.kind == "hf-hub" else f"timm/{reference.file_name}"
    weights_dir.mkdir(parents=True, exist_ok=True)
    remove_stale(weights_dir, ".fetch-*")
    with _explain_download(config, repo, path, endpoint):
        from huggingface_hub import HfApi

        # One request with a short timeout first: without a network, the download would retry for minutes.
        info = HfApi(endpoint=endpoint).model_info(
            repo, revision=reference.version if reference.kind == "hf-hub" else None, timeout=timeout, files_metadata=True
        )
        with tempfile.TemporaryDirectory(dir=weights_dir, prefix=".fetch-") as name:
            download = Download(repo, info, Path(name), endpoint)
            weights = download.weights()
            if reference.kind == "hf-hub":
                _read_config(download.file(CONFIG_FILE))
                _publish_folder(download, path.parent)
            else:
                write_json(path.with_suffix(".json"), download.source())
                weights.replace(path)
    return path


class Download:
    """Files of a repository at one revision, downloaded into a temporary folder.

    Args:
        repo: ``OWNER/NAME``.
        info: the hub's answer about it, with the SHA-256 of large files.
        folder: the temporary folder.
        endpoint: the hub's address.
    """

    def __init__(self, repo: str, info: Any, folder: Path, endpoint: str | None) -> None:
        self.repo, self.folder = repo, folder
        self._info, self._endpoint = info, endpoint
        self._files = {file.rfilename: file for file in info.siblings or ()}

    def file(self, name: str) -> Path:
        """Download one file and check its SHA-256, if the hub states one."""
        from huggingface_hub import hf_hub_download

        if name not in self._files:
            raise UserError(f"{self.repo} has no {name}: it is not in timm's format. It has {name_some(sorted(self._files))}")
        path = Path(hf_hub_download(self.repo, name, local_dir=self.folder, revision=self._info.sha, endpoint=self._endpoint))
        lfs: Any = self._files[name].lfs
        if lfs is not None and (found := file_sha256(path)) != lfs.sha256:
            raise UserError(
                f"weights {self.repo}: {name} was damaged on the way (SHA-256 {found}, the hub states {lfs.sha256}); try again"
            )
        return path

    def weights(self) -> Path:
        """Download the weights as a whole safetensors file."""
        if HUB_FILE in self._files or PICKLED_FILE not in self._files:
            path = self.file(HUB_FILE)
            read_weights(path)
            return path
        pickled = self.file(PICKLED_FILE)
        write_weights(self.folder / HUB_FILE, read_pickled_weights(pickled))
        pickled.unlink()
        return self.folder / HUB_FILE

    def source(self) -> dict[str, Any]:
        """Return the repository with its revision, and the licence in its model card."""
        card = self._info.card_data
        licence, name, link = (getattr(card, key, None) for key in ("license", "license_name", "license_link"))
        if licence == "other" and name:
            licence = f"{name} ({link})" if link else name
        return {"source": f"{self.repo}@{self._info.sha}", "licence": licence}


def _publish_folder(download: Download, target: Path) -> None:
    """Put config, weights and source into the folder of weights, the weights last."""
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / SOURCE_FILE, download.source())
    for name in (CONFIG_FILE, HUB_FILE):
        (download.folder / name).replace(target / name)


@contextmanager
def _explain_download(config: ModelConfig, repo: str, path: Path, endpoint: str | None) -> Iterator[None]:
    """Turn errors of the hub into a ``UserError``; the exceptions of huggingface_hub differ between its major versions."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        if isinstance(error, ConnectionError | TimeoutError) or hasattr(error, "response"):
            raise _download_error(config, repo, path, error, endpoint) from error
        raise disk_error(path, error) from error
    except Exception as error:
        raise _download_error(config, repo, path, error, endpoint) from error


def _download_error(config: ModelConfig, repo: str, path: Path, error: Exception, endpoint: str | None) -> UserError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    page = f"{endpoint or 'https://huggingface.co'}/{repo}"
    if type(error).__name__ == "GatedRepoError" or status == 403:
        return UserError(
            f"weights {repo}: their licence has to be accepted first. Read and accept it at {page}, then run `hf auth login` on "
            f"this machine and `{fetch_command(config)}` again"
        )
    if type(error).__name__ == "RevisionNotFoundError":
        return UserError(f"weights {repo}: the repository has no such revision as in {config.name}; its revisions are at {page}")
    if status in (401, 404):
        return UserError(
            f"weights {repo}: there is no such repository at {page}, or it is private: check the name, or run `hf auth login`"
        )
    return UserError(
        f"weights {repo}: could not be downloaded from {endpoint or 'the Hugging Face hub'} to {path} "
        f"({type(error).__name__}: {first_line(error)}). Run `{fetch_command(config)}` on a machine with network and copy "
        "that file here, or train with model.pretrained=false"
    )
