"""Folders of Parquet files: data sets of the Hugging Face Hub, and HATS catalogues.

A data set of the Hub has one file or several for each split (``data/train-00000-of-00003.parquet``), in folders for each
configuration, and may say so in the header of its README.md. A HATS catalogue (https://www.ivoa.net/documents/Notes/HATS/) has a
file or a folder for each partition of the sky, ``dataset/Norder=*/Dir=*/Npix=*``.
"""

import csv
import fnmatch
import io
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from galaxydist.errors import UserError, name_some
from galaxydist.store_errors import MissingError
from galaxydist.surveys.folder_scan import known_split, natural_key
from galaxydist.surveys.tables.file_tree import FileTree

logger = logging.getLogger(__name__)

_PROPERTIES = ("hats.properties", "properties")
_COLLECTION = "collection.properties"
_PARTITION = re.compile(r"Norder=(\d+)/Dir=\d+/Npix=(\d+)(?:\.parquet|/[^/]+\.parquet)$")
# Columns of HATS and of its predecessor that only say where a galaxy lies in the catalogue.
_HATS_COLUMNS = ("_healpix_29", "_hipscat_index", "Norder", "Dir", "Npix")
# Folders that stand for no configuration of a data set.
_PLAIN_FOLDERS = {"data", "default", "parquet"}


@dataclass(frozen=True)
class ParquetFolder:
    """The Parquet files of a data set, in the order of their rows.

    Args:
        tree: where they are.
        files: the files.
        splits: split of each file: ``train``, ``val`` or ``test``; empty if the files say nothing about splits.
        left_out: columns that are no data.
        columns: columns of the position, ``ra`` and ``dec``, and of an ``id`` of last resort, where the catalogue names them.
        num_rows: number of rows that the catalogue states.
        card: header of README.md: licence and more; empty without.
    """

    tree: FileTree
    files: tuple[str, ...]
    splits: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    num_rows: int | None = None
    card: Mapping[str, Any] = field(default_factory=dict)


def find_parquet(tree: FileTree) -> ParquetFolder | None:
    """Return the Parquet files of a HATS catalogue, a data set of the Hub or any folder; None if there are none.

    Raises:
        UserError: a catalogue without its partitions, or several configurations to choose from.
    """
    hats = _find_hats(tree)
    if hats is not None:
        return hats
    if tree.protocol in ("http", "https") and not tree.inside:
        raise UserError(
            f"{tree.location}: a web server's files cannot be listed; give the address of a file or of a HATS catalogue"
        )
    if not tree.files:
        raise MissingError(f"there is nothing at {tree.location}")
    if tree.files == (tree.inside,):  # a single file, whatever its suffix
        return ParquetFolder(tree, tree.files, card=read_card(tree))
    files = [file for file in tree.files if file.endswith(".parquet") and not PurePosixPath(file).name.startswith("_")]
    if not files and any(file.endswith(".arrow") for file in tree.files):
        load = f"datasets.load_from_disk({tree.location!r})"
        raise UserError(
            f"{tree.location} was written by `save_to_disk` of the library datasets, in Arrow files of its own; convert it to "
            f"Parquet once in Python: {load}.to_parquet('FILE.parquet'), or if it has several splits: for split, part in "
            f"{load}.items(): part.to_parquet(f'FOLDER/{{split}}.parquet')"
        )
    if not files:
        return None
    card = read_card(tree)
    declared = _declared_files(tree, card, files)
    if declared is not None:
        files, splits = [*declared], [*declared.values()]
    else:
        files = _one_configuration(tree, files)
        splits = [_split_of(file.removeprefix(tree.inside)) for file in files]
    return ParquetFolder(tree, tuple(files), _complete_splits(tree, files, splits), card=card)


def read_properties(text: str) -> dict[str, str]:
    """Return the entries of a Java properties file, without its comments."""
    lines = (line.strip() for line in text.splitlines())
    pairs = (line.replace("\\:", ":").partition("=") for line in lines if line and line[0] not in "#!")
    return {key.strip(): value.strip() for key, equals, value in pairs if equals}


def _find_hats(tree: FileTree) -> ParquetFolder | None:
    """Return the partitions of a HATS catalogue, or of the main one of a collection; None for another folder."""
    folder = f"{tree.inside}/" if tree.inside and not PurePosixPath(tree.inside).suffix else ""
    if folder == "" and tree.inside:
        return None
    collection = tree.read_text(folder + _COLLECTION)
    if collection is not None:
        primary = read_properties(collection).get("hats_primary_table_url", "")
        if not primary or "://" in primary:
            raise UserError(f"{tree.location}: its {_COLLECTION} names no catalogue below it; give the catalogue itself")
        folder = f"{folder}{primary.strip('/')}/"
    text = next((text for name in _PROPERTIES if (text := tree.read_text(folder + name)) is not None), None)
    properties = read_properties(text or "")
    if "obs_collection" not in properties and not any(key.startswith("hats_") for key in properties):
        return None
    kind = properties.get("dataproduct_type", "object")
    if kind not in ("object", "source", "image", "nested"):
        raise UserError(
            f"{tree.location} is the {kind} part of a HATS catalogue, not the catalogue itself; give that, or its collection"
        )
    files = _partitions(tree, folder, properties)
    if not files:
        raise UserError(
            f"{tree.location} is a HATS catalogue without partitions (dataset/Norder=*/Dir=*/Npix=*.parquet); copy all of it"
        )
    healpix = properties.get("hats_col_healpix", _HATS_COLUMNS[0])
    columns = {"ra": properties.get("hats_col_ra", ""), "dec": properties.get("hats_col_dec", ""), "id": healpix}
    rows = properties.get("hats_nrows", "")
    return ParquetFolder(
        tree,
        files,
        left_out=tuple(name for name in _HATS_COLUMNS if name != healpix),
        columns={key: name for key, name in columns.items() if name},
        num_rows=int(rows) if rows.isdecimal() else None,
        card=read_card(tree),
    )


def _partitions(tree: FileTree, folder: str, properties: Mapping[str, str]) -> tuple[str, ...]:
    """Return the files of all partitions, by order and pixel; a web server's come from ``partition_info.csv``."""
    if tree.protocol not in ("http", "https"):
        start = f"{folder}dataset/"
        found = [(file, match) for file in tree.files if file.startswith(start) and (match := _PARTITION.search(file))]
        return tuple(file for file, match in sorted(found, key=lambda one: (int(one[1][1]), int(one[1][2]), natural_key(one[0]))))
    text = tree.read_text(f"{folder}partition_info.csv")
    suffix = properties.get("hats_npix_suffix", ".parquet")
    if text is None or suffix.endswith("/"):
        raise UserError(f"{tree.location}: its partitions cannot be listed on a web server; copy the catalogue to this machine")
    rows = [{key.strip(): value for key, value in row.items()} for row in csv.DictReader(io.StringIO(text))]
    cells = sorted((int(row["Norder"]), int(row["Npix"])) for row in rows)
    return tuple(f"{folder}dataset/Norder={order}/Dir={cell // 10000 * 10000}/Npix={cell}{suffix}" for order, cell in cells)


def read_card(tree: FileTree) -> Mapping[str, Any]:
    """Return the header of README.md; empty without one."""
    from huggingface_hub import RepoCard

    text = tree.read_text("README.md") if tree.protocol not in ("http", "https") else None
    if not text or not text.startswith("---"):
        return {}
    try:
        card: Any = RepoCard(text, ignore_metadata_errors=True)
        return dict(card.data.to_dict())
    except Exception as error:  # any YAML and any type of values: the files are readable without it
        logger.warning("%s: the header of its README.md is not readable (%s) and is ignored", tree.location, error)
        return {}


def _declared_files(tree: FileTree, card: Mapping[str, Any], files: Sequence[str]) -> dict[str, str] | None:
    """Return file -> split as the card lists them for the wanted configuration; None if it lists none of the files."""
    configurations: dict[str, dict[str, str]] = {}
    default = "default"
    for one in card.get("configs") or ():
        if not isinstance(one, Mapping) or not (listed := one.get("data_files")):
            continue
        name = str(one.get("config_name", "default"))
        default = name if one.get("default") is True else default
        found: dict[str, str] = {}
        for entry in listed if isinstance(listed, list) else [listed]:
            patterns = entry.get("path", []) if isinstance(entry, Mapping) else entry
            split = str(entry.get("split", "")) if isinstance(entry, Mapping) else ""
            for pattern in patterns if isinstance(patterns, list) else [patterns]:
                found |= {file: split for file in files if fnmatch.fnmatch(file, str(pattern).removeprefix("./"))}
        if found:
            configurations[name] = found
    if len(configurations) > 1 and default in configurations and not tree.inside:
        logger.warning("%s: the configuration %s of %s is read", tree.location, default, ", ".join(configurations))
        return configurations[default]
    if len(configurations) > 1:
        raise _several(tree, {name: [*found] for name, found in configurations.items()})
    return next(iter(configurations.values()), None)


def _one_configuration(tree: FileTree, files: list[str]) -> list[str]:
    """Return the files, which must be of one configuration: a folder with a name that is not a split's."""
    by_name: dict[str, list[str]] = {}
    for file in files:
        folders = PurePosixPath(file.removeprefix(tree.inside).lstrip("/")).parts[:-1]
        names = [name for name in folders if name not in _PLAIN_FOLDERS and "=" not in name and not _split_of(name)]
        by_name.setdefault("/".join(names), []).append(file)
    if len(by_name) > 1:
        raise _several(tree, by_name)
    return files


def _several(tree: FileTree, configurations: Mapping[str, Sequence[str]]) -> UserError:
    folder = [tree.path(str(PurePosixPath(files[0]).parent)) for files in configurations.values()][-1]
    names = name_some([name or "(top)" for name in configurations])
    return UserError(
        f"{tree.location} has {len(configurations)} configurations, {names}: give the folder or file of one, for example {folder}"
    )


def _split_of(file: str) -> str:
    """Return the split that a file's name, or else one of its folders, names; empty for none."""
    for part in reversed(PurePosixPath(file).parts):
        found = {known for word in re.split(r"[^a-z]+", part.lower()) if word and (known := known_split(word))}
        if len(found) == 1:
            return found.pop()
    return ""


def _complete_splits(tree: FileTree, files: Sequence[str], splits: Sequence[str]) -> tuple[str, ...]:
    """Return the split of each file; empty if the files give no usable one: a lone ``train`` stands for "everything"."""
    known = [known_split(split) or "" for split in splits]
    if len({*known} - {""}) < 2:
        return ()
    if others := [file for file, split in zip(files, known, strict=True) if not split]:
        logger.warning("%s: left out, of a split other than train, val and test: %s", tree.location, name_some(others))
    return tuple(known)
