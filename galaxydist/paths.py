"""Where things lie: the data root with what is in it, and the recipes that ship with the package."""

import re
from collections.abc import Mapping
from pathlib import Path

from galaxydist.errors import UserError

DATA_VARIABLE = "GALAXYDIST_DATA"
PACKAGE_DIR = Path(__file__).parent


_DATASET_NAME = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9_.+-]*")


def is_dataset_name(name: str) -> bool:
    """Return True if a data set may have this name. It names a folder of the data root and stands in commands and recipes."""
    return _DATASET_NAME.fullmatch(name) is not None


def folder_name(name: str) -> str:
    """A data set's name, which shards from anywhere may give themselves, as the name of one folder."""
    return "_" if name in ("", ".", "..") else name.replace("/", "_")


def data_root(explicit: Path | None, environ: Mapping[str, str]) -> Path:
    """The folder of HDF5 files, shards, weights and caches: ``explicit``, else GALAXYDIST_DATA, else a user cache folder.

    Raises:
        UserError: it is a URL, or a file stands in its place.
    """
    if explicit is None and not environ.get(DATA_VARIABLE):
        from platformdirs import user_cache_path

        return user_cache_path("galaxydist")
    given = str(explicit or environ[DATA_VARIABLE])
    if "://" in given:
        raise UserError(
            f"the data root {given} is a URL; give a folder on this machine (--data-dir, data.dir or {DATA_VARIABLE})"
        )
    root = Path(given).expanduser()
    for place in (root, *root.parents):
        if place.exists() and not place.is_dir():
            raise UserError(
                f"the data root {root} cannot be a folder: {place} is a file; give another place (--data-dir, data.dir or "
                f"{DATA_VARIABLE})"
            )
    return root


def hdf5_path(root: Path, dataset: str) -> Path:
    """The HDF5 file of a survey: ``<root>/hdf5/Galaxy10_DECals.h5`` (its official name) or ``<root>/hdf5/<dataset>.h5``."""
    return root / "hdf5" / ("Galaxy10_DECals.h5" if dataset == "galaxy10_decals" else f"{dataset}.h5")


def shards_dir(root: Path, dataset: str, variant: str, *, conflicting: str = "keep") -> Path:
    """The folder of a data set's shards: ``<root>/shards/<dataset>/<variant>[-no_conflicting]``."""
    return root / "shards" / dataset / (variant if conflicting == "keep" else f"{variant}-no_conflicting")


def manifest_path(root: Path, dataset: str, variant: str, *, conflicting: str = "keep") -> Path:
    """The manifest of a data set's shards."""
    return shards_dir(root, dataset, variant, conflicting=conflicting) / "manifest.json"


def find_shards(root: Path) -> dict[str, list[Path]]:
    """The manifests of the shards under a data root, by data set."""
    found: dict[str, list[Path]] = {}
    for path in sorted((root / "shards").glob("*/*/manifest.json")):
        found.setdefault(path.parents[1].name, []).append(path)
    return found


def images_dir(root: Path, dataset: str) -> Path:
    """Where ``galaxydist data export`` puts a data set's ImageFolder trees."""
    return root / "images" / dataset


def weights_dir(root: Path) -> Path:
    """Where ``galaxydist weights fetch`` puts pretrained weights."""
    return root / "weights"


def cache_dir(root: Path) -> Path:
    """Where files of stores are kept, unless data.cache_dir says otherwise."""
    return root / "cache"


def shipped_dir(name: str) -> Path:
    """A folder that ships with the package (``recipes``): inside an installed wheel, or beside the package in a checkout."""
    installed = PACKAGE_DIR / name
    return installed if installed.is_dir() else PACKAGE_DIR.parent / name
