"""Paths under the data root, and of the recipes that ship with the package."""

import re
from collections.abc import Mapping
from pathlib import Path

from galaxydist.errors import UserError

DATA_VARIABLE = "GALAXYDIST_DATA"
PACKAGE_DIR = Path(__file__).parent


_DATASET_NAME = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9_.+-]*")


def is_dataset_name(name: str) -> bool:
    """Return True if a data set may have this name, which is used in folder names, commands and recipes."""
    return _DATASET_NAME.fullmatch(name) is not None


def folder_name(name: str) -> str:
    """Return a folder name for the data set's name in a manifest, which may be any text."""
    return "_" if name in ("", ".", "..") else name.replace("/", "_")


def data_root(explicit: Path | None, environ: Mapping[str, str]) -> Path:
    """Return the data root, which holds HDF5 files, shards, weights and caches.

    It is ``explicit``, else GALAXYDIST_DATA, else a user cache folder.

    Raises:
        UserError: the data root is a URL, it or one of its parents is a file, or there is no home folder for a cache folder.
    """
    if explicit is None and not environ.get(DATA_VARIABLE):
        from platformdirs import user_cache_path

        try:
            return user_cache_path("galaxydist")
        except RuntimeError as error:
            raise UserError(
                f"there is no home folder for the data root ({error}); give a folder (--data-dir, data.dir or {DATA_VARIABLE})"
            ) from error
    given = str(explicit or environ[DATA_VARIABLE])
    if "://" in given:
        raise UserError(
            f"the data root {given} is a URL; give a folder on this machine (--data-dir, data.dir or {DATA_VARIABLE})"
        )
    root = Path(given).expanduser()
    for folder in (root, *root.parents):
        if folder.exists() and not folder.is_dir():
            raise UserError(
                f"the data root {root} cannot be a folder: {folder} is a file; give another folder (--data-dir, data.dir or "
                f"{DATA_VARIABLE})"
            )
    return root


def hdf5_path(root: Path, dataset: str) -> Path:
    """Return the HDF5 file of a survey: ``<root>/hdf5/Galaxy10_DECals.h5`` (official name) or ``<root>/hdf5/<dataset>.h5``."""
    return root / "hdf5" / ("Galaxy10_DECals.h5" if dataset == "galaxy10_decals" else f"{dataset}.h5")


def shards_dir(root: Path, dataset: str, variant: str, *, conflicting: str = "keep") -> Path:
    """Return the folder of a data set's shards: ``<root>/shards/<dataset>/<variant>[-no_conflicting]``."""
    return root / "shards" / dataset / (variant if conflicting == "keep" else f"{variant}-no_conflicting")


def manifest_path(root: Path, dataset: str, variant: str, *, conflicting: str = "keep") -> Path:
    """Return the path of the manifest of a data set's shards."""
    return shards_dir(root, dataset, variant, conflicting=conflicting) / "manifest.json"


def find_shards(root: Path) -> dict[str, list[Path]]:
    """Return the manifests under a data root, by data set."""
    found: dict[str, list[Path]] = {}
    for path in sorted((root / "shards").glob("*/*/manifest.json")):
        found.setdefault(path.parents[1].name, []).append(path)
    return found


def images_dir(root: Path, dataset: str) -> Path:
    """Return the folder of a data set's ImageFolder trees, written by ``galaxydist data export``."""
    return root / "images" / dataset


def weights_dir(root: Path) -> Path:
    """Return the folder of pretrained weights, written by ``galaxydist weights fetch``."""
    return root / "weights"


def cache_dir(root: Path) -> Path:
    """Return the default cache folder of remote shards (see ``data.cache_dir``)."""
    return root / "cache"


def shipped_dir(name: str) -> Path:
    """Return a folder that ships with the package (``recipes``): in an installed wheel, or beside the package in a checkout."""
    installed = PACKAGE_DIR / name
    return installed if installed.is_dir() else PACKAGE_DIR.parent / name
