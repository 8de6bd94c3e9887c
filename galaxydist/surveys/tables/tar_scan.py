"""Scan of WebDataset tars that other programs wrote: their samples, and the position of each image.

Samples are grouped as webdataset groups them: neighbouring files of one key, which is a file's name up to its first dot, with its
folders. Names may begin with ``./``; headers may be USTAR, GNU or pax. Nothing is unpacked: headers and small texts are read, and
the images too if they are to be hashed.
"""

import glob
import hashlib
import io
import os
import posixpath
import re
import tarfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
from tqdm import tqdm

from galaxydist.cpus import available_cores, bounded_map
from galaxydist.errors import UserError, name_some
from galaxydist.object_store import RemoteFile, Store, is_url, list_files
from galaxydist.store_errors import WHAT_TO_SET
from galaxydist.surveys.file_kinds import TAR, TAR_GZ, file_kind, folder_kind, kind_of, refuse_kind
from galaxydist.surveys.folder_scan import known_split, natural_key, safe_name
from galaxydist.surveys.image_files import EXTENSIONS

# Last parts of the extensions of texts, by webdataset's own list of decoders.
JSON_ENDINGS = ("json", "jsn")
CLASS_ENDINGS = ("cls", "cls2", "class", "label")
TEXT_ENDINGS = frozenset((*JSON_ENDINGS, *CLASS_ENDINGS, "txt", "text", "transcript", "count", "index", "inx", "id"))
# Columns of ``ScannedTar.samples`` before those with the texts, which are named by their extensions.
KEY, FILE, OFFSET, LENGTH, FACTS = OWN = ("__key", "__file", "__offset", "__length", "__facts")

# Bytes of an image that ``ScanOptions.inspect`` gets if the tar is not hashed: enough for most headers.
HEAD_BYTES = 1 << 16
_LONGEST_TEXT = 1 << 20
# Bytes of a remote tar that are read at a time: small images are streamed, larger ones skipped.
_REQUEST_BYTES = 4 << 20
_REMOTE_THREADS = 8
# Names of folders that say nothing about the data set in them.
_PLAIN_NAMES = {"data", "images", "shards", "tars", "wds", "webdataset"}
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")
_HIDDEN = re.compile(r"__[^/]*__($|[./])")

# Facts about an image; those that are not known are null. ``digest``: of its bytes; ``format``: ``jpg`` or ``png`` if
# ``parse_image`` returns the bytes, else empty; ``sums``: of its pixels; ``problem``: the reason why it does not decode.
FACT_TYPE = pa.struct(
    [
        ("digest", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("format", pa.string()),
        ("pixel_hash", pa.int64()),
        ("sums", pa.list_(pa.int64())),
        ("problem", pa.string()),
    ]
)
# Bytes and name of an image -> facts about it.
Inspect = Callable[[bytes, str], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class TarLocation:
    """Path or URL of a tar, and the split that its pattern or its name gives it; None: none."""

    path: str
    split: str | None = None


@dataclass(frozen=True)
class ScanOptions:
    """Options of a scan.

    Args:
        image: extension of the image, for samples with several (``image.jpg``); None: the only one.
        is_hashed: read everything, and hash each tar and each image.
        inspect: is called with each image, or its first ``HEAD_BYTES`` if not ``is_hashed``; its facts are kept.
    """

    image: str | None = None
    is_hashed: bool = True
    inspect: Inspect | None = field(default=None, compare=False)


@dataclass(frozen=True)
class ScannedTar:
    """Contents of a tar.

    Attributes:
        path: its path or URL.
        num_bytes, version: its size, and its time of change or ETag (empty if there is none).
        sha256: SHA-256 (hex); empty if the tar was not read completely.
        samples: a row per sample: ``__key``, ``__file`` (the image's name), ``__offset`` and ``__length`` of the image in bytes
            (-1: no image), ``__facts`` (``FACT_TYPE``; null without an image), and a column of bytes for each extension of texts.
    """

    path: str
    num_bytes: int
    version: str
    sha256: str
    samples: pa.Table = field(repr=False)


# Split, or None for all -> a tar, a folder of tars or a pattern.
TarPatterns = Mapping[str | None, str]


def names_tars(source: str | Path) -> bool:
    """Return True if a path, a URL or a pattern means tars: by its name, and a file or folder by its contents."""
    text = str(source)
    if is_url(text):
        return ".tar" in text.rpartition("/")[2]
    path = Path(text)
    if path.is_dir():
        return folder_kind(path) == TAR
    if path.is_file():
        return ".tar" in path.name or file_kind(path) in (TAR, TAR_GZ)
    return ".tar" in path.name and (glob.has_magic(text) or "{" in text)


def tars_name(locations: Sequence[TarLocation]) -> str:
    """Return the name of the data set of some tars: that of their folder, or of one above it if it says nothing about them."""
    folder = common_folder([location.path for location in locations])
    parts = [part for part in folder.split("/") if part and part.lower() not in _PLAIN_NAMES and known_split(part) is None]
    return safe_name(parts[-1].partition("@")[0]) if parts else "tars"


def find_tars(patterns: TarPatterns) -> list[TarLocation]:
    """Return the tars that patterns match, in natural order (braces: in theirs).

    Args:
        patterns: split, or None -> a tar, a folder of tars, or a pattern with braces (``{000..009}``) or ``*``, ``?``, ``[...]``;
            a path or a URL.

    Raises:
        UserError: nothing matches, a tar is in two splits, or tars are both on this machine and remote.
    """
    found: dict[str, TarLocation] = {}
    for split, pattern in patterns.items():
        paths = _expand(pattern)
        if not paths:
            raise UserError(
                f"no tar matches {pattern}: give a folder, or a pattern like 'folder/train-{{000..009}}.tar' or 'a/*.tar'"
            )
        for path in paths:
            if found.setdefault(path, TarLocation(path, split)).split != split:
                raise UserError(f"{path} is in two splits, {found[path].split} and {split}: each tar belongs to one pattern")
    if len({is_url(path) for path in found}) > 1:
        raise UserError(f"some tars are on this machine and some are remote ({name_some([*found], 2)}): index them one by one")
    return [*found.values()]


def _expand(pattern: str) -> list[str]:
    from braceexpand import braceexpand

    if is_url(pattern) and pattern.startswith("file://"):
        pattern = pattern.removeprefix("file://")
    if pattern.startswith(("http://", "https://")) and "?" in pattern:
        raise UserError(f"a URL of tars has no query (?...): {WHAT_TO_SET['http']}")
    try:
        plain = list(braceexpand(pattern))
    except ValueError:
        raise UserError(f"{pattern}: its braces do not match; a range is written like {{000..009}}") from None
    paths: list[str] = []
    for text in plain:
        if glob.has_magic(text):
            paths += sorted(list_files(text) if is_url(text) else glob.glob(text, recursive=True), key=natural_key)  # noqa: PTH207
        elif is_url(text):
            paths.append(text)
        else:
            paths += _local_tars(Path(text))
    return [*dict.fromkeys(paths)]


def _local_tars(path: Path) -> list[str]:
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"there is no tar {path}")
        return [str(path)]
    names = sorted((str(file) for file in path.rglob("*.tar") if not file.name.startswith(".")), key=natural_key)
    if not names and (packed := sorted(path.rglob("*.tar.*"))):
        raise refuse_kind(packed[0], file_kind(packed[0]), "a tar of images")
    return names


def describe_tars(locations: Sequence[TarLocation]) -> str:
    """Return a text for messages that names tars: one tar, or their number and folder."""
    if len(locations) == 1:
        return locations[0].path
    return f"{len(locations)} tars in {common_folder([location.path for location in locations])}"


def common_folder(paths: Sequence[str]) -> str:
    """Return the folder that all paths or URLs are in.

    Raises:
        UserError: URLs of several servers.
    """
    if not is_url(paths[0]):
        return os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])  # noqa: PTH100, PTH120
    heads = {"://".join((protocol, rest.partition("/")[0])) for protocol, _, rest in (path.partition("://") for path in paths)}
    if len(heads) > 1:
        raise UserError(f"tars of one data set must be on one server, and these are on {name_some(sorted(heads))}")
    (head,) = heads
    inner = [posixpath.dirname(path.removeprefix(f"{head}/")) for path in paths]
    return f"{head}/{posixpath.commonpath(inner)}".rstrip("/")


def scan_tars(locations: Sequence[TarLocation], options: ScanOptions) -> Iterator[ScannedTar]:
    """Yield the contents of tars in their order, read by several threads, with a progress bar.

    Raises:
        UserError: as :func:`scan_tar`.
    """
    stop = threading.Event()
    threads = min(len(locations), _REMOTE_THREADS if is_url(locations[0].path) else available_cores())
    with (
        ThreadPoolExecutor(threads, thread_name_prefix="galaxydist-scan") as executor,
        tqdm(total=len(locations), desc="scanning tars", unit="tar", disable=None) as bar,
    ):
        try:
            tasks = ((location.path, options, stop) for location in locations)
            for scanned in bounded_map(executor, scan_tar, tasks, 2 * threads):
                bar.update()
                yield scanned
        finally:
            stop.set()


def scan_tar(path: str, options: ScanOptions, stop: threading.Event) -> ScannedTar:
    """Return the contents of a tar.

    Args:
        path: path or URL.
        options: of the scan.
        stop: ends it when it is set.

    Raises:
        UserError: not a tar, compressed, truncated or damaged, no images, a key that occurs twice, or several images in a sample.
    """
    with open_tar(path, stop) as raw:
        num_bytes, version = _identity(path, raw)
        stream = _Stream(raw, is_hashed=options.is_hashed)
        samples = _Samples(path, options)
        for info in _members(stream, path):
            if stop.is_set():
                raise UserError(f"the scan of {path} was stopped")
            samples.add(info, stream)
        table = samples.table()
    return ScannedTar(path, num_bytes, version, stream.digest.hexdigest() if options.is_hashed else "", table)


def open_tar(path: str, stop: threading.Event) -> IO[bytes]:
    """Open a tar at a path or URL for reading; a remote one is read by ranges.

    Raises:
        UserError: it does not exist or cannot be read.
    """
    if is_url(path):
        folder, _, name = path.rpartition("/")
        return cast("IO[bytes]", io.BufferedReader(RemoteFile(Store(folder), name, stop), _REQUEST_BYTES))
    try:
        return Path(path).open("rb", buffering=1 << 18)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def tar_identity(path: str) -> tuple[int, str]:
    """Return the size and the version of a tar without reading it.

    Raises:
        UserError: it does not exist or cannot be read.
    """
    with open_tar(path, threading.Event()) as raw:
        return _identity(path, raw)


def _identity(path: str, raw: IO[bytes]) -> tuple[int, str]:
    if isinstance(raw, io.BufferedReader) and isinstance(raw.raw, RemoteFile):
        return raw.raw.num_bytes, raw.raw.version
    status = Path(path).stat()
    return status.st_size, str(status.st_mtime_ns)


class _Stream:
    """File of a tar for ``tarfile``, which only moves forward; what is passed over is hashed, too."""

    def __init__(self, raw: IO[bytes], *, is_hashed: bool) -> None:
        self._raw, self._is_hashed = raw, is_hashed
        self._position = 0
        self.digest = hashlib.sha256()
        self.first = self.last = b""

    def tell(self) -> int:
        return self._position

    def read(self, size: int) -> bytes:
        self.last = data = self._raw.read(size)
        self.first = self.first or data
        self._position += len(data)
        if self._is_hashed:
            self.digest.update(data)
        return data

    def seek(self, position: int) -> int:
        assert position >= self._position
        if not self._is_hashed:
            self._position = self._raw.seek(position)
        while self._position < position and self.read(min(position - self._position, 1 << 20)):
            pass
        return self._position


def _members(stream: _Stream, path: str) -> Iterator[tarfile.TarInfo]:
    """Yield the files of a tar, and check that it is complete."""
    try:
        # Only ``read``, ``seek`` and ``tell`` are used.
        tar = tarfile.open(fileobj=cast(Any, stream), mode="r:")  # noqa: SIM115
        while (info := tar.next()) is not None:
            cast(Any, tar).members.clear()  # else it would remember all of them
            if info.isreg() and not info.issparse():
                yield info
    except tarfile.TarError:
        if stream.tell() <= tarfile.BLOCKSIZE and (kind := kind_of(stream.first, path)) != TAR:
            raise refuse_kind(path, kind, "a tar of images") from None
        raise UserError(_truncated(path, stream.tell())) from None
    # tarfile takes a damaged header or the end of the file for the end of the tar.
    if len(stream.last) < tarfile.BLOCKSIZE or any(stream.last):
        raise UserError(_truncated(path, tar.offset))
    while rest := stream.read(1 << 20):
        if any(rest):
            raise UserError(
                f"{path} goes on after the end of the tar, at byte {tar.offset} (several tars in one file?): pack its files anew"
            )


def _truncated(path: str, offset: int) -> str:
    return f"{path} is truncated or damaged at byte {offset}: copy it again; no other tar is used without it"


class _Samples:
    """Groups the files of a tar to samples."""

    def __init__(self, path: str, options: ScanOptions) -> None:
        self._path, self._options = path, options
        self._image = options.image.lower().lstrip(".") if options.image is not None else None
        self._rows: list[dict[str, Any]] = []
        self._keys: set[str] = set()
        self._found: dict[str, None] = {}  # extensions, in order of appearance
        self._own: set[str] = set()  # extensions of the current sample

    def add(self, info: tarfile.TarInfo, stream: _Stream) -> None:
        """Add a file, whose contents begin at the stream's position."""
        info.name = info.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")  # of another encoding
        name = info.name.removeprefix("./").lstrip("/")
        parts = _NAME.fullmatch(name)
        if parts is None or _HIDDEN.match(name):
            return
        key, extension = parts[1], parts[2].lower()
        if not self._rows or self._rows[-1][KEY] != key:
            if key in self._keys:
                raise UserError(f"{self._path}: the key {key} occurs twice, in two places; each sample needs a key of its own")
            self._keys.add(key)
            self._own = set()
            self._rows.append({KEY: key, FILE: "", OFFSET: -1, LENGTH: -1, FACTS: None})
        if extension in self._own:
            raise UserError(
                f"{self._path}: the key {key} occurs twice, with two files .{extension}; each sample needs its own key"
            )
        self._own.add(extension)
        self._found[extension] = None
        ending = extension.rpartition(".")[2]
        if ending in TEXT_ENDINGS:
            if info.size > _LONGEST_TEXT:
                raise UserError(f"{self._path}: {info.name} has {info.size} bytes, which is too long for a label or properties")
            self._rows[-1][extension] = stream.read(info.size)
        elif extension == self._image or (self._image is None and f".{ending}" in EXTENSIONS):
            self._set_image(info, stream)

    def _set_image(self, info: tarfile.TarInfo, stream: _Stream) -> None:
        row = self._rows[-1]
        if row[FILE]:
            images = [extension for extension in sorted(self._own) if f".{extension.rpartition('.')[2]}" in EXTENSIONS]
            raise UserError(
                f"{self._path}: the sample {row[KEY]} has {len(images)} images, {' and '.join(images)}: choose one with "
                f"--image-column {images[0]}"
            )
        facts: dict[str, Any] = {}
        options = self._options
        if options.is_hashed or options.inspect is not None:
            data = stream.read(info.size if options.is_hashed else min(info.size, HEAD_BYTES))
            if options.is_hashed:
                facts["digest"] = hashlib.blake2b(data, digest_size=8).hexdigest()
            if options.inspect is not None:
                facts |= options.inspect(data, f"{self._path}, {info.name}")
        row |= {FILE: info.name, OFFSET: info.offset_data, LENGTH: info.size, FACTS: facts}

    def table(self) -> pa.Table:
        """Return the samples; raise UserError if none has an image."""
        if not any(row[FILE] for row in self._rows):
            wanted = "no images" if self._image is None else f"no image .{self._image}"
            found = (
                f"its files end with {name_some([f'.{name}' for name in self._found], 20)}"
                if self._found
                else "it has no samples"
            )
            raise UserError(f"{self._path} has {wanted}: {found}" + ("; choose one with --image-column" if self._image else ""))
        texts = [extension for extension in self._found if extension.rpartition(".")[2] in TEXT_ENDINGS]
        types = {KEY: pa.string(), FILE: pa.string(), OFFSET: pa.int64(), LENGTH: pa.int64()}
        columns = {name: pa.array([row[name] for row in self._rows], kind) for name, kind in types.items()}
        columns[FACTS] = pa.array([row[FACTS] for row in self._rows], FACT_TYPE)
        for extension in texts:
            columns[extension] = pa.array([row.get(extension) for row in self._rows], pa.binary())
        return pa.table(columns)
