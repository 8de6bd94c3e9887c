"""Opening of any survey: an image folder, a table of images, or data that hold their images (HDF5, Parquet, tars)."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from galaxydist.errors import UserError
from galaxydist.galaxy import VARIANTS
from galaxydist.object_store import Store, download, is_url
from galaxydist.surveys.file_kinds import CSV, FITS, HDF5, JSON_LINES, PARQUET, file_kind, folder_kind, names_table, refuse_kind
from galaxydist.surveys.folder_scan import check_name, safe_name
from galaxydist.surveys.galaxy10 import open_galaxy10
from galaxydist.surveys.image_arrays import ArrayOptions
from galaxydist.surveys.image_folder import open_image_folder
from galaxydist.surveys.image_table import TableOptions, TableSurvey, open_table, read_columns
from galaxydist.surveys.table_columns import ColumnNames, find_columns, text_values
from galaxydist.surveys.tables.file_tree import open_tree
from galaxydist.surveys.tables.hdf5_images import has_galaxy10_schema
from galaxydist.surveys.tables.image_data import ImageData, read_hdf5_data, read_parquet_data, tree_origin
from galaxydist.surveys.tables.listed_images import open_listed_images, split_url
from galaxydist.surveys.tables.parquet_folders import read_card
from galaxydist.surveys.tables.table_files import read_table, split_hdu
from galaxydist.surveys.tables.tar_images import read_tar_table
from galaxydist.surveys.tables.tar_scan import ScanOptions, TarPatterns, find_tars, names_tars, scan_tars, tars_name

_CONFLICTING = ("keep", "drop")
# Names of tables that say nothing about the data set.
_PLAIN_NAMES = {"catalog", "catalogue", "data", "galaxies", "images", "index", "labels", "metadata", "table", "train"}
_HDF5_SUFFIXES = (".h5", ".hdf5", ".hdf", ".he5")


@dataclass(frozen=True)
class SourceOptions:
    """Options for sources other than image folders and Galaxy10's schema.

    Args:
        images: folder or URL that the file names of a table start from; None: the table's own folder.
        columns: columns of a table.
        is_labelled: False for galaxies without labels, all in the split ``test``.
        cache_dir: folder for images that a table lists by URL.
        arrays: choices for data that hold their images.
        class_names: names of the classes 0, 1, ...; None: those of the data.
    """

    images: str | None = None
    columns: ColumnNames = field(default_factory=ColumnNames)
    is_labelled: bool = True
    cache_dir: Path | None = None
    arrays: ArrayOptions = field(default_factory=ArrayOptions)
    class_names: tuple[str, ...] | None = None


def open_survey(
    path: str | Path | TarPatterns,
    variant: str = "original",
    *,
    conflicting: str = "keep",
    name: str | None = None,
    fold: tuple[int, int] | None = None,
    classes: str | None = None,
    has_val: bool = True,
    source: SourceOptions | None = None,
) -> TableSurvey:
    """Open an image folder, a table of images (CSV, Parquet, FITS), or Parquet files, HDF5 files or tars that hold their images.

    Files are known by their content, not by their suffix alone; docs/other_formats.md lists the formats.

    Args:
        path: file, folder, URL or pattern of tars, or a pattern of tars for each split; ``TABLE.fits[2]`` chooses an extension.
        variant: ``original`` or ``balanced``.
        conflicting: ``keep`` or ``drop`` galaxies that the source lists with two labels (all of them are in train).
        name: the data set's name; None to take it from the source.
        fold: ``(k, n)``: instead of the split, fold k (0 ... n-1) of an n-fold cross-validation: train, test, and an empty val.
        classes: ``galaxy10``: the folders or labels, 0 to 9 or by class, are Galaxy10's classes. A survey file's always are.
        has_val: False for no validation split; not for a survey file.
        source: options for other sources than image folders and survey files.

    Raises:
        UserError: the source is missing or unusable, or the options contradict each other.
    """
    given = source or SourceOptions()
    options = table_options(given, variant, conflicting=conflicting, name=name, fold=fold, classes=classes, has_val=has_val)
    if isinstance(path, Mapping) or names_tars(path):
        return _open_tars(path if isinstance(path, Mapping) else {None: str(path)}, given, options)
    data = _read_data(path, given)
    if data is not None:
        return _open_data(data, given, replace(options, name=name or data.name))
    path = Path(path)
    if path.is_dir():
        _refuse_table_options(path, "a folder of images", source)
        return open_image_folder(path, variant, conflicting=conflicting, name=name, fold=fold, classes=classes, has_val=has_val)
    _refuse_table_options(path, "a survey file", source)
    if not has_val:
        raise UserError(
            f"{path} is a survey file, whose split with its validation part is fixed; --val 0 is for image folders and tables"
        )
    return open_galaxy10(path, variant, conflicting=conflicting, name=name, fold=fold)


def survey_name(path: str | Path | TarPatterns, *, classes: str | None = None, source: SourceOptions | None = None) -> str:
    """Return the name that a source's data set has if the user gives none; no image is read, and no split made for a table."""
    if isinstance(path, Mapping) or names_tars(path):
        return tars_name(find_tars(path if isinstance(path, Mapping) else {None: str(path)}))
    data = _read_data(path, source or SourceOptions())
    return open_survey(path, classes=classes).name if data is None else data.name


def _read_data(path: str | Path, source: SourceOptions) -> ImageData | None:
    """Return the table of a source, None for an image folder and for a survey file."""
    file, hdu = split_hdu(str(path))
    if is_url(path):
        if hdu is not None or names_table(file):
            return _read_remote_table(file, hdu, source)
        return read_parquet_data(str(path), source.arrays)
    local = Path(file)
    kind: str | None
    if local.is_dir():
        kind = folder_kind(local)
    else:
        kind = file_kind(local) if local.is_file() else HDF5
        kind = HDF5 if local.suffix.lower() in _HDF5_SUFFIXES else kind
    if kind == PARQUET:
        data = read_parquet_data(local, source.arrays)
        return data if local.is_dir() else replace(data, name=_table_name(local))
    if kind == HDF5:
        is_survey_file = not local.exists() or (local.is_file() and _is_plain(source) and has_galaxy10_schema(local))
        return None if is_survey_file else read_hdf5_data(local, source.arrays, source.columns.label)
    if kind is None:
        return None
    if kind not in (CSV, FITS, JSON_LINES):
        raise refuse_kind(path, kind, "a table of images (CSV, Parquet, FITS, JSON lines) or a survey file (HDF5)")
    return _read_table(local, str(path), hdu, source, str(local.parent))


def _read_table(file: Path, location: str, hdu: str | None, source: SourceOptions, root: str) -> ImageData:
    """Read a file as a table, whose relative file names start from ``root``."""

    def texts(names: list[str]) -> set[str]:  # ids and file names keep leading zeros and all digits
        columns = find_columns(names, source.columns, location, is_labelled=source.is_labelled)
        return {name for name in (columns.id, columns.file) if name is not None}

    return ImageData(location, _table_name(file), read_table(file, hdu, texts, location), None, root)


def _read_remote_table(url: str, hdu: str | None, source: SourceOptions) -> ImageData:
    """Read a table at a URL from a copy of it, which is removed again; one on the Hub at the commit of its revision now."""
    tree = open_tree(url)
    address = tree.location if tree.protocol == "hf" else url
    place, name = split_url(address)
    plain, question_mark, query = address.partition("?")
    root = plain.rpartition("/")[0]
    with TemporaryDirectory(prefix="galaxydist-") as folder:
        copy = Path(
            folder, safe_name(root.rpartition("/")[2]), PurePosixPath(name).name
        )  # a data set may be named after its folder
        copy.parent.mkdir()
        download(Store(place), name, copy, stop=threading.Event())
        data = _read_table(copy, tree.location, hdu, source, f"{root}{question_mark}{query}")
    return replace(data, origin=tree_origin(tree, read_card(tree)))


def _open_tars(patterns: TarPatterns, source: SourceOptions, options: TableOptions) -> TableSurvey:
    """Open tars; local ones are read completely, for the hashes of their images."""
    check_tar_options(source)
    locations = find_tars(patterns)
    scanned = scan_tars(locations, ScanOptions(source.arrays.column, is_hashed=not is_url(locations[0].path)))
    samples = read_tar_table(scanned, locations, options.columns, is_labelled=options.is_labelled)
    return samples.survey(replace(options, name=options.name or tars_name(locations)))


def check_tar_options(source: SourceOptions) -> None:
    """Raise a UserError for options that tars do not have."""
    if source.images is not None or source.columns.file is not None or replace(source.arrays, column=None) != ArrayOptions():
        raise UserError(
            "--images, --file, --bands, --scale and --stretch are not for tars, which hold their image files: remove them"
        )


def _is_plain(source: SourceOptions) -> bool:
    """Return True if no option asks for another reading of a survey file than that of Galaxy10's schema."""
    return replace(source, images=None, cache_dir=None) == SourceOptions()


def table_options(
    source: SourceOptions,
    variant: str,
    *,
    conflicting: str,
    name: str | None,
    fold: tuple[int, int] | None,
    classes: str | None,
    has_val: bool,
) -> TableOptions:
    """Return the options of ``open_survey`` for a table.

    Raises:
        UserError: values that no survey has, or options that contradict each other.
    """
    if variant not in VARIANTS:
        raise UserError(f"no variant {variant!r}; choose from {', '.join(VARIANTS)}")
    if conflicting not in _CONFLICTING:
        raise UserError(f"conflicting={conflicting!r}; choose from {', '.join(_CONFLICTING)}")
    if fold is not None and variant != "original":
        raise UserError("a cross-validation uses the original variant; remove variant or fold")
    if classes not in (None, "galaxy10"):
        raise UserError(f"classes={classes!r}: give galaxy10, or the names of the classes as a list")
    if name is not None:
        check_name(name)
    return TableOptions(
        name=name or "",
        columns=source.columns,
        classes=classes,
        class_names=source.class_names,
        is_labelled=source.is_labelled,
        variant=variant,
        conflicting=conflicting,
        fold=fold,
        has_val=has_val,
    )


def _refuse_table_options(path: Path, kind: str, source: SourceOptions | None) -> None:
    if source is not None and replace(source, cache_dir=None) != SourceOptions():
        raise UserError(
            f"{path} is {kind}; --images, --unlabelled, --image-column, --bands, --scale, names of columns and classes are "
            "for tables (CSV, Parquet, FITS) and for Parquet and HDF5 files with images: remove them"
        )


def _table_name(file: Path) -> str:
    """Return the name of a data set: the table's, or its folder's if the table is named like any other."""
    stem = file.name.removesuffix(".gz").rpartition(".")[0] or file.name
    return safe_name(file.resolve().parent.name if stem.lower() in _PLAIN_NAMES else stem)


def _open_data(data: ImageData, given: SourceOptions, options: TableOptions) -> TableSurvey:
    """Open a table with the images that it holds, or with those that it names."""
    table, options = data.prepared(options)
    columns = read_columns(table, options.columns, data.location, is_labelled=options.is_labelled)
    if data.images is not None:
        if given.images is not None:
            raise UserError(f"{data.location} holds its images itself; leave out --images")
        survey = open_table(table, data.images, data.location, options, data.has_image)
    else:
        if given.arrays != ArrayOptions():
            raise UserError(
                f"{data.location} is a table without images; --image-column, --bands and --scale are for Parquet and HDF5 files "
                "with images: remove them"
            )
        if columns.file is None:
            raise UserError(
                f"{data.location} has no column with the names of image files; name it with --file. Its columns are "
                f"{', '.join(table.column_names)}"
            )
        files = text_values(table.column(columns.file))
        images, has_image = open_listed_images(files, given.images or data.root, data.location, columns.file, given.cache_dir)
        survey = open_table(table, images, data.location, options, has_image)
    return replace(survey, origin=data.origin)
