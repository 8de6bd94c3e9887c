"""Many pictures at once: several files, or zip archives of them, to a table with a row for each, and that table as CSV.

An archive is read entry by entry in memory and never unpacked to a disk; names in it are shown and never used as paths. What is
left out has a row that says why.
"""

import csv
import io
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from .model import PICTURES_AT_ONCE, VIEWS, ServedModel
from .pictures import MAX_BYTES, Picture, PictureError, read_picture, safe_name
from .reference_set import Reference

# Column names of the table before and after those of the classes.
FIRST_COLUMNS, PROBABILITY, LAST_COLUMNS = ("name", "predicted", "confidence"), "p_", ("agreement", "unlike", "problem")
# Files that programs of a system put beside pictures; they are left out without a row.
_SYSTEM_FILES = re.compile(r"(^|/)(__MACOSX/|\._|\.DS_Store$|Thumbs\.db$|desktop\.ini$)")
_ARCHIVES = re.compile(r"\.(zip|tar|gz|tgz|bz2|xz|7z|rar)$", re.IGNORECASE)
# End of an archive's directory, and the record before it in archives of the 64-bit form.
_END, _LOCATOR64 = b"PK\x05\x06", b"PK\x06\x07"
_MAX_COMMENT = 1 << 16
# A file: its name, the bytes that it has after unpacking, and a function that reads these, or the reason why it is not read.
_Content = tuple[str, int, Callable[[], bytes] | PictureError]


@dataclass(frozen=True)
class BatchLimits:
    """Limits of a table.

    Args:
        pictures: that are labelled; further ones are counted in a note.
        entries: files and folders of an archive.
        total_bytes: of all pictures after unpacking.
        ratio: of an entry's unpacked to its packed bytes; pictures are packed already.
    """

    pictures: int = 1000
    entries: int = 5000
    total_bytes: int = 1 << 30
    ratio: int = 100


@dataclass(frozen=True)
class BatchRow:
    """A row of the table.

    Args:
        name: of the picture, as it can be shown.
        predicted, confidence: most probable class and its probability; empty and None without an answer.
        probabilities: K float32; None without an answer.
        agreement: number of the eight views that give this class.
        is_unlike: True if the picture is unlike the training galaxies; None: not known for this model.
        problem: why there is no answer; else empty.
    """

    name: str
    predicted: str = ""
    confidence: float | None = None
    probabilities: NDArray[np.float32] | None = None
    agreement: int | None = None
    is_unlike: bool | None = None
    problem: str = ""


@dataclass(frozen=True)
class BatchTable:
    """The answers about many pictures.

    Args:
        classes: names by label.
        rows: one for each picture, in their order.
        notes: sentences about what was left out without a row.
    """

    classes: tuple[str, ...]
    rows: list[BatchRow] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    @property
    def columns(self) -> list[str]:
        """Names of the columns of :meth:`cells` and of the CSV."""
        return [*FIRST_COLUMNS, *(f"{PROBABILITY}{name}" for name in self.classes), *LAST_COLUMNS]

    def cells(self) -> list[list[str]]:
        """Return the text of each cell, row by row."""
        return [self._cells(row) for row in self.rows]

    def to_csv(self) -> str:
        """Return the table as CSV. A text that a spreadsheet would take for a formula begins with an apostrophe."""
        stream = io.StringIO(newline="")
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([_no_formula(name) for name in self.columns])
        writer.writerows([_no_formula(cell) for cell in cells] for cells in self.cells())
        return stream.getvalue()

    def _cells(self, row: BatchRow) -> list[str]:
        probabilities = [""] * len(self.classes) if row.probabilities is None else [f"{one:.6f}" for one in row.probabilities]
        return [
            row.name,
            row.predicted,
            "" if row.confidence is None else f"{row.confidence:.6f}",
            *probabilities,
            "" if row.agreement is None else f"{row.agreement} of {VIEWS}",
            {True: "yes", False: "no", None: ""}[row.is_unlike],
            row.problem,
        ]


def label_many(
    model: ServedModel,
    uploads: Sequence[tuple[str, BinaryIO]],
    *,
    reference: Reference | None = None,
    limits: BatchLimits | None = None,
    progress: Callable[[int, int | None], None] = lambda _done, _total: None,
) -> BatchTable:
    """Label several pictures, or those in zip archives.

    Args:
        model: that answers.
        uploads: names and contents of files; names are only shown.
        reference: training galaxies of the model, for pictures that are unlike them; None: not known.
        limits: of the table; None: the default ones.
        progress: called after each batch with the numbers of rows so far and of all (None: unknown); may raise to stop.

    Raises:
        PictureError: there is no picture at all, or an archive is damaged or outside of the limits.
    """
    limits = limits or BatchLimits()
    archives = {number for number, (_, stream) in enumerate(uploads) if _is_archive(stream)}
    total = None if archives else len(uploads)
    rows: list[BatchRow] = []
    waiting: list[tuple[int, Picture]] = []
    num_pictures = num_bytes = num_left = 0
    for name, size, found in _contents(uploads, archives, limits):
        if num_pictures >= limits.pictures or num_bytes >= limits.total_bytes:
            num_left += 1
            continue
        rows.append(BatchRow(safe_name(name)))
        try:
            if isinstance(found, PictureError):
                raise found
            num_bytes += size
            data = found()
            num_pictures += 1
            waiting.append((len(rows) - 1, read_picture(data, name)))
        except PictureError as error:
            rows[-1] = BatchRow(safe_name(name), problem=str(error))
        if len(waiting) >= PICTURES_AT_ONCE:
            _answer(model, waiting, rows, reference)
            progress(len(rows), total)
    _answer(model, waiting, rows, reference)
    progress(len(rows), total)
    if not rows:
        raise PictureError("There is no picture in it: choose several pictures, or one zip archive of pictures.")
    taken = f"at most {limits.pictures} pictures and {limits.total_bytes >> 20} MB are taken"
    notes = (f"{num_left} further files were left out: {taken}.",) if num_left else ()
    return BatchTable(model.config.classes, rows, notes)


def _answer(model: ServedModel, waiting: list[tuple[int, Picture]], rows: list[BatchRow], reference: Reference | None) -> None:
    """Fill the rows of the pictures that wait, which then wait no more."""
    answers = model.predict([picture for _, picture in waiting], saliency=False)
    for (number, picture), answer in zip(waiting, answers, strict=True):
        novelty = None if reference is None else reference.novelty(answer.seen)
        rows[number] = BatchRow(
            picture.name,
            answer.class_name,
            answer.confidence,
            answer.probabilities,
            answer.agreement,
            None if novelty is None else novelty.is_unlike,
        )
    waiting.clear()


def _contents(uploads: Sequence[tuple[str, BinaryIO]], archives: set[int], limits: BatchLimits) -> Iterator[_Content]:
    """Yield what is in the uploads and in their archives."""
    for number, (name, stream) in enumerate(uploads):
        if number in archives:
            yield from _entries(name, stream, limits)
        else:
            size = stream.seek(0, io.SEEK_END)
            stream.seek(0)
            yield name, min(size, MAX_BYTES), partial(stream.read, MAX_BYTES + 1)


def _is_archive(stream: BinaryIO) -> bool:
    head = stream.read(4)
    stream.seek(0)
    return head in (b"PK\x03\x04", _END)


def _entries(name: str, stream: BinaryIO, limits: BatchLimits) -> Iterator[_Content]:
    shown = safe_name(name)
    _check_directory(shown, stream, limits)
    try:
        archive = zipfile.ZipFile(stream)
    except Exception as error:  # zipfile raises errors of many kinds for damaged archives
        raise PictureError(f"{shown} is a damaged or incomplete zip archive: make it again.") from error
    if len(archive.infolist()) > limits.entries:
        raise PictureError(f"{shown} holds more than {limits.entries:,} files, of which no more are taken: split the archive.")
    for entry in archive.infolist():
        if entry.is_dir() or _SYSTEM_FILES.search(entry.filename):
            continue
        problem = _entry_problem(entry, limits)
        if problem:
            yield entry.filename, 0, PictureError(f"{safe_name(entry.filename)} {problem}.")
        else:
            yield entry.filename, entry.file_size, partial(_read_entry, archive, entry)


def _check_directory(shown: str, stream: BinaryIO, limits: BatchLimits) -> None:
    """Refuse an archive with a directory that is far too long, before it is read: it may hold millions of entries."""
    size = stream.seek(0, io.SEEK_END)
    stream.seek(max(0, size - _MAX_COMMENT - 22 - 20))
    tail = stream.read()
    stream.seek(0)
    place = tail.rfind(_END)
    if place < 0 or len(tail) < place + 22:
        raise PictureError(f"{shown} is a damaged or incomplete zip archive: make it again.")
    (directory_bytes,) = struct.unpack_from("<I", tail, place + 12)
    # A name has some ten to a hundred characters, beside 46 bytes of numbers and some of times and owners.
    if directory_bytes > limits.entries * 400 or tail[max(0, place - 20) : place].startswith(_LOCATOR64):
        raise PictureError(f"{shown} holds too many files: at most {limits.entries:,} are taken, so split the archive.")


def _entry_problem(entry: zipfile.ZipInfo, limits: BatchLimits) -> str:
    """Return why an entry is not read; an empty text if it is."""
    if entry.flag_bits & 1:
        return "is protected by a password: make the archive without one"
    if _ARCHIVES.search(entry.filename):
        return "is an archive inside of the archive: unpack it first"
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "is packed in an uncommon way: make the archive with the zip of your system"
    if entry.file_size > MAX_BYTES:
        return f"has {entry.file_size / 2**20:.0f} MB, and at most {MAX_BYTES >> 20} MB are taken"
    if entry.file_size > limits.ratio * max(entry.compress_size, 1) + 4096:
        return "unpacks to far more bytes than a picture does, and was not read"
    return ""


def _read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    try:
        with archive.open(entry) as stream:
            return stream.read(MAX_BYTES + 1)
    except Exception as error:  # zipfile and zlib raise errors of many kinds for damaged entries
        raise PictureError(f"{safe_name(entry.filename)} is damaged in its archive: make the archive again.") from error


def _no_formula(text: str) -> str:
    line = re.sub(r"[\x00-\x1f]+", " ", text)
    return f"'{line}" if line.lstrip().startswith(("=", "+", "-", "@")) else line
