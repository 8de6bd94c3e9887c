"""Opening of any survey: an HDF5 file in Galaxy10's schema, an image folder or a table of images."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from galaxydist.errors import UserError
from galaxydist.surveys.file_kinds import CSV, FITS, HDF5, PARQUET, file_kind, refuse_kind
from galaxydist.surveys.folder_scan import check_name, safe_name
from galaxydist.surveys.galaxy10 import Galaxy10Survey, open_galaxy10
from galaxydist.surveys.image_folder import TREES, FolderSurvey, open_image_folder
from galaxydist.surveys.image_table import TableOptions, TableSurvey, open_table
from galaxydist.surveys.table_columns import ColumnNames, find_columns, text_values
from galaxydist.surveys.tables.listed_images import open_listed_images
from galaxydist.surveys.tables.table_files import read_table, split_hdu

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
    """

    images: str | None = None
    columns: ColumnNames = field(default_factory=ColumnNames)
    is_labelled: bool = True
    cache_dir: Path | None = None


def open_survey(
    path: Path,
    variant: str = "original",
    *,
    conflicting: str = "keep",
    name: str | None = None,
    fold: tuple[int, int] | None = None,
    classes: str | None = None,
    has_val: bool = True,
    source: SourceOptions | None = None,
) -> FolderSurvey | Galaxy10Survey | TableSurvey:
    """Open an HDF5 file in Galaxy10's schema, an image folder, or a table of images (CSV, Parquet, FITS).

    Files are known by their content, not by their suffix alone.

    Args:
        path: the file or folder; ``TABLE.fits[2]`` chooses an extension.
        variant: ``original`` or ``balanced``.
        conflicting: ``keep`` or ``drop`` galaxies that the source lists with two labels (all of them are in train).
        name: the data set's name; None to take it from the source.
        fold: ``(k, n)``: instead of the split, fold k (0 ... n-1) of an n-fold cross-validation: train, test, and an empty val.
        classes: ``galaxy10``: the folders or labels, 0 to 9 or by class, are Galaxy10's classes. A survey file's always are.
        has_val: False for no validation split; image folders and tables only.
        source: options for tables.

    Raises:
        UserError: the source is missing or unusable, or the options contradict each other.
    """
    path = Path(path)
    _check_options(variant, conflicting, name, fold)
    if path.is_dir():
        _refuse_table_options(path, "a folder of images", source)
        return open_image_folder(path, variant, conflicting=conflicting, name=name, fold=fold, classes=classes, has_val=has_val)
    file, hdu = split_hdu(path)
    kind = file_kind(file) if file.is_file() else HDF5
    if kind == HDF5 or path.suffix.lower() in _HDF5_SUFFIXES:
        _refuse_table_options(path, "a survey file", source)
        if not has_val:
            raise UserError(
                f"{path} is a survey file, whose split with its validation part is fixed; --val 0 is for a folder of images or "
                "a table"
            )
        return open_galaxy10(path, variant, conflicting=conflicting, name=name, fold=fold)
    if kind not in (CSV, PARQUET, FITS):
        raise refuse_kind(path, kind, "a table of images (CSV, Parquet, FITS) or a survey file (HDF5)")
    given = source or SourceOptions()
    options = TableOptions(
        name=name or _table_name(file),
        columns=given.columns,
        classes=classes,
        variant=variant,
        conflicting=conflicting,
        fold=fold,
        has_val=has_val,
        is_labelled=given.is_labelled,
    )
    return _open_table_file(file, hdu, given, options)


def _check_options(variant: str, conflicting: str, name: str | None, fold: tuple[int, int] | None) -> None:
    if variant not in TREES:
        raise UserError(f"no variant {variant!r}; choose from {', '.join(TREES)}")
    if conflicting not in _CONFLICTING:
        raise UserError(f"conflicting={conflicting!r}; choose from {', '.join(_CONFLICTING)}")
    if fold is not None and variant != "original":
        raise UserError("a cross-validation uses the original variant; remove variant or fold")
    if name is not None:
        check_name(name)


def _refuse_table_options(path: Path, kind: str, source: SourceOptions | None) -> None:
    if source is not None and replace(source, cache_dir=None) != SourceOptions():
        raise UserError(
            f"{path} is {kind}; --images, --unlabelled and names of columns are for tables (CSV, Parquet, FITS): remove them"
        )


def _table_name(file: Path) -> str:
    """Return the name of a data set: the table's, or its folder's if the table is named like any other."""
    stem = file.name.removesuffix(".gz").rpartition(".")[0] or file.name
    return safe_name(file.resolve().parent.name if stem.lower() in _PLAIN_NAMES else stem)


def _open_table_file(path: Path, hdu: str | None, source: SourceOptions, options: TableOptions) -> TableSurvey:
    table = read_table(path, hdu)
    location = str(path) if hdu is None else f"{path}[{hdu}]"
    columns = find_columns(table.column_names, options.columns, location, is_labelled=options.is_labelled)
    if columns.file is None:
        raise UserError(
            f"{location} has no column with the names of image files; name it with --file. Its columns are "
            f"{', '.join(table.column_names)}"
        )
    root = source.images or str(path.parent)
    texts = text_values(table.column(columns.file))
    images, has_image = open_listed_images(texts, root, location, columns.file, source.cache_dir)
    return open_table(table, images, location, options, has_image)
