"""Surveys in Galaxy10's HDF5 schema: the official file, a simulated one or the user's own."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from galaxydist.errors import UserError
from galaxydist.galaxy import GALAXY10_CLASSES, GALAXY10_COUNTS, SPLITS
from galaxydist.surveys import official_split
from galaxydist.surveys.folder_scan import safe_name
from galaxydist.surveys.hdf5_schema import (
    COLUMNS,
    IMAGE_SHAPE,
    IMAGES,
    LABELS,
    NUM_CLASSES,
    SIMULATED,
    SURVEY_ATTRIBUTE,
    check_hdf5,
    describe_damage,
    open_hdf5,
)
from galaxydist.surveys.image_arrays import ArrayLayout
from galaxydist.surveys.image_table import TableSurvey
from galaxydist.surveys.split import (
    NONE,
    Codes,
    Sky,
    SplitCandidates,
    build_candidates,
    check_positions,
    read_sky,
    rows_by_split,
    split_balanced,
    split_fold,
    split_original,
)
from galaxydist.surveys.tables.file_tree import sample_bytes
from galaxydist.surveys.tables.hdf5_images import Hdf5Images

if TYPE_CHECKING:
    import pyarrow as pa

# Limits of rows per slab: about 6 MB if a chunk is one image, and never more than 400 MB, however long the chunks are.
_MIN_SLAB, _MAX_SLAB = 32, 2048


@dataclass(frozen=True)
class SurveyFile:
    """A survey file without its images: columns by name (N values each), root attributes and rows per slab."""

    path: Path
    columns: Mapping[str, NDArray[Any]]
    attributes: Mapping[str, Any]
    slab_length: int

    @property
    def labels(self) -> NDArray[np.int64]:
        return self.columns[LABELS].astype(np.int64)


def open_galaxy10(
    path: Path,
    variant: str = "original",
    *,
    conflicting: str = "keep",
    name: str | None = None,
    fold: tuple[int, int] | None = None,
) -> TableSurvey:
    """Open a survey file, and load or compute its split.

    Args:
        path: an HDF5 file in Galaxy10's schema.
        variant: ``original`` or ``balanced``.
        conflicting: ``keep`` or ``drop`` the galaxies that the file lists with two labels.
        name: the data set's name; None to take it from the file.
        fold: ``(k, n)``: instead of the split, fold k of an n-fold cross-validation.

    Raises:
        UserError: no such file, another schema, labels outside 0-9, an empty class, a truncated file.
    """
    file = read_survey_file(path)
    found_name = _name(file)
    galaxies, original = _split(file, is_official=found_name == official_split.NAME)
    if fold is not None:
        codes = split_fold(galaxies, *fold)
    elif variant == "original":
        codes = original
    elif found_name == official_split.NAME:
        codes = official_split.read_official_split().balanced
    else:
        codes = split_balanced(galaxies, original)
    if conflicting == "drop":
        codes = np.where(galaxies.sky.conflicting, NONE, codes).astype(np.int8)
    known = [np.asarray(file.columns[column], np.float64) for column in ("ra", "dec")]
    prefix = {official_split.NAME: "g10", SIMULATED: "sim"}.get(found_name, found_name)
    survey = TableSurvey(
        location=str(path),
        name=name or found_name,
        variant=variant,
        class_names=GALAXY10_CLASSES,
        labels=file.labels,
        splits=rows_by_split(codes),
        ids=[f"{prefix}-{row:05d}" for row in range(len(codes))],
        ra=known[0],
        dec=known[1],
        extras=_extras(file, galaxies.sky.conflicting, original),
        images=Hdf5Images((path,), (0, len(codes)), IMAGES, ArrayLayout(IMAGES, -1, (0, 1, 2), None), file.slab_length),
    )
    vars(survey)["source_hash"] = _source_hash(file, survey.name, codes)  # that of the official file does not read all of it
    return survey


def _extras(file: SurveyFile, conflicting: NDArray[np.bool_], original: Codes) -> "pa.Table":
    import pyarrow as pa

    numbers = {
        name: pa.array(values, mask=~np.isfinite(values)) for name in ("redshift", "pxscale") for values in (file.columns[name],)
    }
    splits = pa.array([None if code == NONE else SPLITS[code] for code in original.tolist()], pa.string())
    return pa.table({"row": np.arange(len(original)), **numbers, "conflicting": conflicting, "original_split": splits})


def read_survey_file(path: Path) -> SurveyFile:
    """Read the columns of a survey file and check them against the schema; raises as :func:`open_galaxy10` does."""
    if not path.is_file():
        raise UserError(
            f"no survey file at {path}; make it with `galaxydist data fetch` (the real Galaxy10) or `galaxydist data simulate`"
        )
    check_hdf5(path)
    try:
        with open_hdf5(path) as h5:
            images = _check_schema(path, h5)
            columns = {column: h5[column][:] for column in COLUMNS}
            chunk_rows = images.chunks[0] if images.chunks else 1
            attributes = {key: _plain(value) for key, value in h5.attrs.items()}
    except OSError as error:
        raise UserError(f"{describe_damage(path, error, 'the file')}; fetch or make the file again") from error
    _check_labels(path, columns[LABELS])
    ra, dec = (columns[name].astype(np.float64) for name in ("ra", "dec"))
    check_positions(ra, dec, name=lambda row: f"{path}, row {row}")
    # A slab is a multiple of the chunk length (up to _MAX_SLAB), so that each chunk is decoded once.
    slab_length = min(chunk_rows * -(-_MIN_SLAB // chunk_rows), _MAX_SLAB)
    return SurveyFile(path, columns, attributes, slab_length)


def _check_schema(path: Path, h5: Any) -> Any:
    """Check the data sets, shapes and dtypes against the schema, and return the image data set."""
    wanted = (IMAGES, *COLUMNS)
    missing = [name for name in wanted if name not in h5]
    if missing:
        raise UserError(
            f"{path} has no data set {', '.join(map(repr, missing))} (it has {', '.join(sorted(h5)) or 'none'}); "
            f"Galaxy10's schema is {', '.join(wanted)}"
        )
    images, *_ = [_data_set(path, h5, name) for name in wanted]
    if images.shape[1:] != IMAGE_SHAPE or images.dtype != np.uint8:
        raise UserError(f"{path}: {IMAGES!r} is {images.dtype} of shape {images.shape}; expected uint8 of shape (N, 256, 256, 3)")
    for name, dtype in COLUMNS.items():
        column = h5[name]
        if column.shape != images.shape[:1]:
            raise UserError(f"{path}: {name!r} has shape {column.shape}; {len(images)} images need ({len(images)},)")
        kinds = "iu" if dtype.kind == "u" else "fiu"
        if column.dtype.kind not in kinds:
            raise UserError(f"{path}: {name!r} is {column.dtype}; expected {'integers' if kinds == 'iu' else 'numbers'}")
    return images


def _data_set(path: Path, h5: Any, name: str) -> Any:
    """Return a data set of a file; raise UserError if the name belongs to something else."""
    import h5py

    try:
        found = h5[name]
    except (KeyError, OSError) as error:
        link = h5.get(name, getlink=True)
        target = f" to {link.filename}" if isinstance(link, h5py.ExternalLink) else ""
        raise UserError(f"{path}: {name!r} is a broken link{target}; restore that file, or make this one anew") from error
    if not isinstance(found, h5py.Dataset) or found.shape is None:
        kind = "a data set without values" if isinstance(found, h5py.Dataset) else f"a {type(found).__name__.lower()}"
        raise UserError(
            f"{path}: {name!r} is {kind}; expected a data set, as in Galaxy10's schema: {IMAGES}, {', '.join(COLUMNS)}"
        )
    return found


def _check_labels(path: Path, labels: NDArray[np.integer]) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= NUM_CLASSES))
    if len(wrong):
        raise UserError(
            f"{path}: {len(wrong)} of {len(labels)} labels are outside 0-9, the first in row {wrong[0]} ({labels[wrong[0]]}); "
            "'ans' must hold Galaxy10's class numbers"
        )


def _name(file: SurveyFile) -> str:
    if file.attributes.get(SURVEY_ATTRIBUTE) == SIMULATED:
        return SIMULATED
    counts = np.bincount(file.labels, minlength=NUM_CLASSES).tolist()
    if counts == list(GALAXY10_COUNTS) and np.array_equal(file.labels, official_split.read_official_split().labels):
        return official_split.NAME
    stem = safe_name(file.path.stem)
    return f"{stem}_unofficial" if stem.lower().startswith("galaxy10") else stem


def _split(file: SurveyFile, *, is_official: bool) -> tuple[SplitCandidates, Codes]:
    """Return the galaxies and their original split: the shipped one for the official file, else one computed in the same way."""
    ra, dec = (file.columns[name].astype(np.float64) for name in ("ra", "dec"))
    if not is_official:
        galaxies = build_candidates(file.labels, ra, dec, class_names=GALAXY10_CLASSES, seed=official_split.SPLIT_SEED)
        return galaxies, split_original(galaxies)
    shipped = official_split.read_official_split()
    _check_official_sky(file.path, read_sky(file.labels, ra, dec), shipped.sky)
    keys = np.arange(len(file.labels), dtype=np.uint64)
    return SplitCandidates(file.labels, GALAXY10_CLASSES, shipped.sky, keys, official_split.SPLIT_SEED), shipped.original


def _check_official_sky(path: Path, found: Sky, shipped: Sky) -> None:
    """Raise UserError if the file's positions give other neighbours than those that the frozen split is based on."""
    if np.array_equal(found.groups, shipped.groups) and np.array_equal(found.conflicting, shipped.conflicting):
        return
    row = np.flatnonzero((found.groups != shipped.groups) | (found.conflicting != shipped.conflicting))[0]
    raise UserError(
        f"{path} has the labels of the official Galaxy10 but not its positions: row {row} has other neighbours "
        "on the sky than the official file's; the file is damaged or changed, fetch it again with `galaxydist data fetch`"
    )


def _source_hash(file: SurveyFile, name: str, codes: Codes) -> str:
    """Return the SHA-256 of name, columns, splits, attributes, the file's size and evenly spread samples of its bytes.

    Reading all 2.5 GB at each opening would take longer than the rest of the work; `data fetch` verifies them.
    """
    size = file.path.stat().st_size
    digest = hashlib.sha256(f"{name} {size} {sorted(file.attributes.items())}".encode())
    for column in COLUMNS:
        digest.update(file.columns[column].tobytes())
    digest.update(codes.tobytes())
    sample_bytes(file.path, digest)
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """Convert a numpy scalar to a JSON value; nan becomes None."""
    plain = value.item() if isinstance(value, np.generic) else value
    plain = plain.decode(errors="replace") if isinstance(plain, bytes) else plain
    return None if isinstance(plain, float) and not np.isfinite(plain) else plain
