"""Kinds of files by their content, so that a file is opened and named as what it is, whatever its suffix."""

import os
import zlib
from pathlib import Path

from galaxydist.errors import UserError
from galaxydist.surveys.folder_scan import natural_key
from galaxydist.surveys.image_files import EXTENSIONS

CSV, PARQUET, FITS, HDF5, TAR, JSON_LINES = "CSV", "Parquet", "FITS", "HDF5", "tar", "JSON lines"
TAR_GZ = "gzip-compressed tar"

_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
# First bytes -> kind. Tars, HDF5 with a user block, zips and text need a closer look.
_SIGNATURES = (
    (b"PAR1", PARQUET),
    (b"SIMPLE  =", FITS),
    (_HDF5_SIGNATURE, HDF5),
    (b"PK\x03\x04", "zip archive"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "Excel workbook"),
    (b"ARROW1", "Arrow (Feather) file"),
    (b"\x93NUMPY", "NumPy array"),
    (b"SQLite format 3\0", "SQLite database"),
    (b"\x89PNG", "PNG image"),
    (b"\xff\xd8\xff", "JPEG image"),
    (b"BZh", "bzip2 file"),
    (b"\xfd7zXZ\0", "xz file"),
    (b"\x28\xb5\x2f\xfd", "zstd file"),
    (b"Rar!", "RAR archive"),
    (b"7z\xbc\xaf\x27\x1c", "7-Zip archive"),
    (b"%PDF", "PDF document"),
    (b"\x80\x04", "Python pickle"),
    (b"\x80\x05", "Python pickle"),
    (b"\xff\xfe", "UTF-16 text file"),
    (b"\xfe\xff", "UTF-16 text file"),
)
# What to do with files of other kinds.
_ADVICE = {
    "zip archive": "unpack it first",
    "RAR archive": "unpack it first",
    "7-Zip archive": "unpack it first",
    TAR_GZ: "unpack it first: `gunzip FILE`",
    "bzip2 file": "unpack it first",
    "xz file": "unpack it first",
    "zstd file": "unpack it first",
    "Excel workbook": 'save it as "CSV UTF-8"',
    "UTF-16 text file": 'save it as "CSV UTF-8"',
    "JPEG image": "give the folder of the images",
    "PNG image": "give the folder of the images",
    "Arrow (Feather) file": "convert it to Parquet",
    "FITS image": "give a FITS table",
}
_TABLE_ENDINGS = (".csv", ".tsv", ".txt", ".fits", ".fit", ".fts", ".jsonl", ".ndjson")
# Files that only a HATS catalogue, and a folder of `datasets.save_to_disk`, have.
_DATA_MARKS = {"hats.properties", "collection.properties", "dataset_dict.json", "dataset_info.json"}
# Folders of a folder that are looked into to know its kind, and images that may lie beside data.
_NUM_LOOKED_INTO, _FEW_IMAGES = 50, 20
# Bytes at the start of a file that its kind is known by.
HEAD_BYTES = 4096


def file_kind(path: Path) -> str:
    """Return the kind of a file by its content: ``CSV`` for any text, ``FITS``, ``Parquet``, ``HDF5``, ``tar``, or another name.

    Raises:
        UserError: the file cannot be read or is empty.
    """
    try:
        with path.open("rb") as stream:
            return kind_of(stream.read(HEAD_BYTES), path)
    except OSError as error:
        raise UserError(f"cannot open {path}: {error.strerror}; make it readable for this account") from error


def kind_of(head: bytes, path: object) -> str:
    """Return the kind of a file by its first ``HEAD_BYTES``, for gzip that of the contents if it is read as well; see above."""
    if not head:
        raise UserError(f"{path} is empty (0 bytes); copy or write it again")
    if head.startswith(b"\x1f\x8b"):
        try:
            kind = _kind(zlib.decompressobj(31).decompress(head, HEAD_BYTES))
        except zlib.error as error:
            raise UserError(f"{path} is a damaged gzip file ({error}); copy it again") from error
        return {TAR: TAR_GZ, PARQUET: "gzip-compressed Parquet file"}.get(kind, kind)
    return _kind(head)


def _kind(head: bytes) -> str:
    known = next((kind for signature, kind in _SIGNATURES if head.startswith(signature)), None)
    if known == "zip archive":  # the names of its first files stand in the head
        return "Excel workbook" if b"xl/" in head else "NumPy archive" if b".npy" in head[30:286] else known
    if known is not None:
        return known
    if head[257:262] == b"ustar":
        return TAR
    if _HDF5_SIGNATURE in (head[512:520], head[1024:1032], head[2048:2056]):
        return HDF5
    return "binary file of an unknown kind" if b"\0" in head else _kind_of_text(head)


def _kind_of_text(head: bytes) -> str:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    starts = {
        "VOTable": (b"<votable",),
        "XML file": (b"<?xml",),
        "Git LFS pointer": (b"version https://git-lfs",),
        "web page": (b"<!doctype html", b"<html"),
        "JSON file": (b"{", b"["),
    }
    kind = next((kind for kind, texts in starts.items() if start.startswith(texts)), CSV)
    first, newline, _ = start.partition(b"\n")
    if first.startswith(b"{") and (first.rstrip().endswith(b"}") or not newline):
        return JSON_LINES
    return "VOTable" if kind == "XML file" and b"<votable" in start else kind


def names_table(name: str) -> bool:
    """Return True if a path or URL ends as those of CSV and FITS tables and of JSON lines do."""
    return name.partition("?")[0].lower().removesuffix(".gz").endswith(_TABLE_ENDINGS)


def folder_kind(folder: Path) -> str | None:
    """Return ``Parquet``, ``HDF5`` or ``tar`` for a folder of such data, None for one of images; a few folders are looked into.

    Some images beside Parquet files do not make it a folder of images, and a table beside many images does not make it data. Tars
    have no images beside them.
    """
    found: set[str] = set()
    num_images = 0
    for number, (_, folders, files) in enumerate(os.walk(folder)):
        folders.sort(key=natural_key)
        if {*files} & _DATA_MARKS:
            return PARQUET
        if any(name.startswith("healpix=") for name in folders):
            return HDF5
        endings = [name.removesuffix(".gz").rpartition(".")[2].lower() for name in files]
        found |= {*endings} & {"parquet", "tar"}
        num_images += sum(f".{ending}" in EXTENSIONS for ending in endings)
        if num_images > _FEW_IMAGES or number == _NUM_LOOKED_INTO:
            break
    if "tar" in found and not num_images:
        return TAR
    return PARQUET if "parquet" in found and num_images <= _FEW_IMAGES else None


def refuse_kind(path: object, kind: str, expected: str) -> UserError:
    """Return the error for a file of a kind that cannot be read here."""
    article = "an" if kind[0] in "AEIOaeio" or kind.startswith(("HDF", "XML")) else "a"
    named = f"{kind} file" if kind in (CSV, PARQUET, FITS, HDF5, TAR, JSON_LINES) else kind
    advice = _ADVICE.get(kind, "convert it, or give another file")
    return UserError(f"{path} is {article} {named}, by its content, not {expected}: {advice}")
