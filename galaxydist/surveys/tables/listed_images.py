"""Images that a table lists by file name, or by URL: these are fetched once into a folder on this machine."""

import hashlib
import logging
import os
import secrets
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import numpy as np
from numpy.typing import NDArray

from galaxydist.atomic_files import disk_error, remove_stale
from galaxydist.cpus import bounded_map
from galaxydist.errors import DamagedImageError, UserError, name_some
from galaxydist.galaxy import EncodedImage
from galaxydist.object_store import PROTOCOLS, Store, download, is_url
from galaxydist.store_errors import MissingError
from galaxydist.surveys.image_files import EXTENSIONS, group_equal_images, hash_files, parse_image, read_image

if TYPE_CHECKING:
    import pyarrow as pa

_SLAB = 256


@dataclass(frozen=True)
class ListedImages:
    """Image files on this machine, one for each row of a table; an :class:`galaxydist.surveys.image_table.ImageSource`.

    Attributes:
        name: the table, for progress bars.
        root: the folder that relative files start from.
        files: N files, relative to the root or absolute; empty for a row without an image.
        first_row: number of the first row that is held, 0 but for a ``part``.
    """

    name: str
    root: Path
    files: Sequence[str] = field(repr=False)
    slab_length: int = _SLAB
    first_row: int = 0

    def read(self, start: int, stop: int) -> Iterator[NDArray[np.uint8] | EncodedImage]:
        """Yield the images of rows ``start`` ... ``stop - 1``; raises DamagedImageError at one that cannot be read."""
        for row in range(start, stop):
            file = self.files[row - self.first_row]
            if not file:
                raise DamagedImageError(f"row {row + 1} of {self.name} has no image")
            yield read_image(self.root / file)

    def part(self, start: int, stop: int) -> "ListedImages":
        """Return the images of rows ``start`` ... ``stop - 1``, under the same numbers."""
        files = self.files[start - self.first_row : stop - self.first_row]
        return ListedImages(self.name, self.root, files, self.slab_length, start)

    def digest(self) -> str:
        """Return a SHA-256 (hex) of the bytes of all files."""
        return hashlib.sha256("\n".join(self.digests).encode()).hexdigest()

    def group_equal(self, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return (N,) group numbers, equal for files of equal bytes; -1 for a file without a copy."""
        rows = np.array([row for row, file in enumerate(self.files) if file], np.int64)
        groups = np.full(len(self.files), -1, np.int64)
        files, digests = ([values[row] for row in rows.tolist()] for values in (self.files, self.digests))
        groups[rows] = group_equal_images(self.root, files, digests, labels[rows], lambda row: read_image(self.root / files[row]))
        return groups

    def __getstate__(self) -> dict[str, object]:
        """Leave the hashes out of a pickle: workers do not need them."""
        return {key: value for key, value in vars(self).items() if key != "digests"}

    @cached_property
    def digests(self) -> list[str]:
        """SHA-256 (hex) of each file as ``hash_files`` returns it; empty for a row without an image."""
        found = iter(hash_files(self.root, [file for file in self.files if file], self.name))
        return [next(found) if file else "" for file in self.files]


def open_listed_images(
    texts: "pa.Array", root: str, location: str, column: str, cache_dir: Path | None
) -> tuple[ListedImages, NDArray[np.bool_]]:
    """Return the images that the cells of a file column name, and (N,) True for rows whose image exists.

    Args:
        texts: N paths, absolute or relative to the root, or URLs; null or empty without an image.
        root: folder or URL that relative ones start from.
        location, column: the table and its file column, for messages.
        cache_dir: folder for the images of URLs.

    Raises:
        UserError: no image exists, URLs without a folder for their images, or as ``fetch_images``.
    """
    cells = [text.strip().removeprefix("file://") if text else "" for text in texts.to_pylist()]
    if not any(cells):
        raise UserError(f"{location}, column {column!r} is empty, so that no row has an image; name another one with --file")
    urls = [_url(text, root) for text in cells]
    folder = Path() if is_url(root) else Path(root)
    files = find_files(["" if url else text for text, url in zip(cells, urls, strict=True)], folder)
    if any(urls):
        if cache_dir is None:
            raise UserError(
                f"{location}, column {column!r} has URLs, and there is no folder for their images: give a cache folder"
            )
        files = [file or fetched for file, fetched in zip(files, fetch_images(urls, cache_dir, location), strict=True)]
    if not any(files):
        first = next(text for text in cells if text)
        place = next((url.partition("?")[0] for url in urls if url), folder / first)  # a query may hold a secret
        raise UserError(
            f"{location}: none of the {sum(map(bool, cells))} images exists; the first, {first!r} in column {column!r}, would be "
            f"{place}. Give the folder that these names start from with --images, or another column with --file"
        )
    return ListedImages(location, folder, files), np.array([bool(file) for file in files])


def _url(text: str, root: str) -> str:
    """Return the URL that a cell means, or an empty text for a path on this machine."""
    if is_url(text) or not text:
        return text
    if not is_url(root):
        return ""
    folder, question_mark, query = root.partition("?")
    return f"{folder.rstrip('/')}/{text.replace(chr(92), '/').removeprefix('./').lstrip('/')}{question_mark}{query}"


def find_files(texts: Sequence[str], root: Path) -> list[str]:
    """Return the file that each text means, relative to a folder or absolute; empty where there is none.

    A text may have backslashes, and may lack the extension if exactly one image has that name.
    """
    listings = _Listings(root)
    return [listings.find(text) if text else "" for text in texts]


class _Listings:
    """Contents of the folders that files are looked for in; each folder is listed once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folders: dict[str, dict[str, list[str]]] = {}  # folder -> name, with and without extension -> names

    def find(self, text: str) -> str:
        """Return the file that a text means, or an empty text."""
        for path in dict.fromkeys((text.removeprefix("./"), text.replace("\\", "/").removeprefix("./"))):
            folder, slash, name = path.rpartition("/")
            found = self._names(folder + slash).get(name, ())
            if name in found:
                return path
            if len(found) == 1:
                return f"{folder}{slash}{found[0]}"
        return ""

    def _names(self, folder: str) -> dict[str, list[str]]:
        if folder not in self._folders:
            names: dict[str, list[str]] = {}
            try:
                with os.scandir(self._root / folder) as entries:
                    listed = [entry.name for entry in entries if not entry.is_dir()]
            except OSError:
                listed = []
            for name in listed:
                path = PurePosixPath(name)
                names.setdefault(name, []).append(name)
                if path.suffix.lower() in EXTENSIONS:
                    names.setdefault(path.stem, []).append(name)
            self._folders[folder] = names
        return self._folders[folder]


logger = logging.getLogger(__name__)

# Downloads at a time: a cutout takes a fraction of a second, most of it the server's.
THREADS = 16


def fetch_images(urls: Sequence[str], folder: Path, name: str) -> list[str]:
    """Fetch the images of some URLs with 16 threads, and return their files; those in the folder already are not fetched again.

    A failed request is repeated with growing pauses. After Ctrl-C or an error, the next call continues. Processes with one folder
    share the work.

    Args:
        urls: N URLs (``https://``, ``s3://``, ``gs://``, ``hf://``); empty for a row without an image.
        folder: is created; holds an image under the SHA-256 of its URL.
        name: the table, for the progress bar.

    Returns:
        N absolute paths, empty for an image that its server does not have, or that is no image.

    Raises:
        UserError: an unknown protocol, no access, a server that cannot be reached, or a full disk.
    """
    from tqdm import tqdm

    wanted = [url for url in dict.fromkeys(urls) if url]
    paths = {url: folder / _file_name(url) for url in wanted}
    missing = [url for url in wanted if not paths[url].is_file()]
    secrets.SystemRandom().shuffle(missing)  # each process begins with others
    remove_stale(folder, "*/*.part")
    stop, stores = threading.Event(), {place: Store(place) for place in dict.fromkeys(split_url(url)[0] for url in missing)}
    reasons: dict[str, str] = {}

    def fetch(url: str) -> tuple[str, str]:
        place, file = split_url(url)
        return url, "" if paths[url].is_file() else _fetch(stores[place], file, paths[url], stop)

    with (
        ThreadPoolExecutor(THREADS) as pool,
        tqdm(total=len(missing), desc=f"fetch images of {name}", unit="image", disable=None) as bar,
    ):
        try:
            for url, reason in bounded_map(pool, fetch, ((url,) for url in missing), 4 * THREADS):
                bar.update(1)
                if reason:
                    reasons[url] = reason
        except OSError as error:
            raise disk_error(folder, error) from error
        finally:
            stop.set()
    if reasons:
        logger.warning(
            "%s: %d of %d images cannot be had: %s", name, len(reasons), len(wanted), name_some(sorted(reasons.values()), 3)
        )
    return [str(paths[url]) if url and url not in reasons else "" for url in urls]


def _fetch(store: Store, name: str, path: Path, stop: threading.Event) -> str:
    """Fetch one image, and return the reason if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")  # ranks in two containers may share a process id
    try:
        download(store, name, temporary, stop=stop)
        parse_image(temporary.read_bytes(), store.url(name))
        temporary.replace(path)
    except MissingError as error:
        return str(error)
    except DamagedImageError as error:
        return error.reason
    finally:
        temporary.unlink(missing_ok=True)
    return ""


def split_url(url: str) -> tuple[str, str]:
    """Return the URL of a store (a server, a bucket, a repository) and the file's name in it."""
    protocol = url.partition("://")[0].lower()
    if protocol not in PROTOCOLS:
        raise UserError(
            f"{url}: images cannot be read through {protocol}://; use {', '.join(f'{name}://' for name in PROTOCOLS)}"
        )
    if PROTOCOLS[protocol][0] == "http" and protocol != "hf":
        parts = urlsplit(url)
        query = f"?{parts.query}" if parts.query else ""
        return f"{protocol}://{parts.netloc}{query}", unquote(parts.path).lstrip("/")
    parts_of_path = url.partition("://")[2].split("/")
    depth = 1
    if protocol == "hf":
        depth = 3 if parts_of_path[0] in ("datasets", "spaces", "buckets", "models") else 2
    return f"{protocol}://{'/'.join(parts_of_path[:depth])}", "/".join(parts_of_path[depth:])


def _file_name(url: str) -> str:
    digest = hashlib.sha256(url.encode()).hexdigest()
    ending = PurePosixPath(urlsplit(url).path).suffix.lower()
    return f"{digest[:2]}/{digest}{ending if ending in EXTENSIONS else '.image'}"
