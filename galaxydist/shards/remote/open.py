"""Opening of local and remote shards.

A local folder is read in place. For a folder at a URL, the manifest and the columns are fetched into the node's cache, and later
the shards too.
"""

import re
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from galaxydist.errors import UserError
from galaxydist.object_store import ATTEMPTS, Store, download, is_url
from galaxydist.shards.manifest import (
    COLUMNS,
    HASH_LENGTH,
    MANIFEST_NAME,
    TARS,
    Manifest,
    Remote,
    column_name,
    parse_manifest,
    read_manifest,
)
from galaxydist.shards.remote.cache import Cache, CacheConfig, CacheEntry, RemoteFolder
from galaxydist.store_errors import MissingError

# Attempts at the manifest: fewer than at other files, since the user is waiting for the first line of output.
FIRST_ATTEMPTS = 5

# A file's name, and its SHA-256 if known -> its contents.
FileReader = Callable[[str, bytes | None], bytes]


def open_shards(location: str | Path, cache: CacheConfig) -> Manifest:
    """Open a folder of shards.

    Args:
        location: manifest.json or its folder; a path or a URL.
        cache: cache for the files of a URL.

    Raises:
        UserError: nothing there, no access, not a manifest, another format version, or columns that do not match it.
    """
    if not is_url(location):
        return replace(read_manifest(Path(location)), cache=cache)
    url = _folder_url(str(location))
    store, files, stop = Store(url), Cache(cache.folder, cache.max_bytes), threading.Event()
    text = _fetch_manifest(store, stop)
    manifest = parse_manifest(text, cache.folder, store.url(MANIFEST_NAME))
    if invalid := [name for name in manifest.splits if not re.fullmatch(r"\w+", name)]:
        raise UserError(f"{store.url(MANIFEST_NAME)} has a split {invalid[0]!r}, which cannot be the name of a file")
    remote = Remote(url, store.url(MANIFEST_NAME), cache)
    manifest = replace(manifest, dir=cache.folder / manifest.hash[:HASH_LENGTH], remote=remote)
    folder = RemoteFolder(store, files, manifest.dir.name, stop)
    _fetch_columns(manifest, folder)
    try:
        manifest.check_lengths()
    except UserError:  # damaged in the cache: fetch them again
        for name in _columns(manifest):
            (manifest.dir / name).unlink(missing_ok=True)
        _fetch_columns(manifest, folder)
        manifest.check_lengths()
    own = CacheEntry(f"{manifest.dir.name}/{MANIFEST_NAME}", len(text))
    files.get_or_fetch(own, lambda path: path.write_bytes(text), stop=stop, allow_over_limit=True)
    return manifest


def file_reader(manifest: Manifest) -> FileReader:
    """Return a function that reads a whole file of the shards' folder by its name, bypassing the cache.

    The function raises OSError or UserError if the file cannot be read. A remote file is compared with its checksum and fetched
    again if the network damaged it.
    """
    if not manifest.has_remote_shards:
        return lambda name, _: (Path(manifest.shard_folder) / name).read_bytes()
    store = Store(manifest.shard_folder)
    return lambda name, sha256: _read(store, name, threading.Event(), sha256=sha256)


def _fetch_manifest(store: Store, stop: threading.Event) -> bytes:
    try:
        return _read(store, MANIFEST_NAME, stop, attempts=FIRST_ATTEMPTS)
    except MissingError as error:
        raise UserError(
            f"no shards: {error}. Make them with `galaxydist data shard`, copy the folder there, and give the URL of its "
            f"{MANIFEST_NAME}"
        ) from None


def _read(store: Store, name: str, stop: threading.Event, *, sha256: bytes | None = None, attempts: int = ATTEMPTS) -> bytes:
    with tempfile.TemporaryDirectory(prefix="galaxydist-") as folder:
        path = Path(folder) / "file"
        download(store, name, path, stop=stop, sha256=sha256, attempts=attempts)
        return path.read_bytes()


def _fetch_columns(manifest: Manifest, folder: RemoteFolder) -> None:
    names = _columns(manifest)
    try:
        sums = {name: bytes.fromhex(manifest.columns[name]) for name in names}
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{manifest.location} is damaged: it has no checksum of a column ({error}). Copy it again, or make the shards anew "
            "with: galaxydist data shard"
        ) from None
    with ThreadPoolExecutor(manifest.remote.cache.threads if manifest.remote else 1) as executor:
        try:
            list(executor.map(lambda name: folder.get(name, sha256=sums[name]), names))
        except BaseException:
            folder.stop.set()
            raise


def _columns(manifest: Manifest) -> list[str]:
    own = ("shards", *COLUMNS) if manifest.tars is None else ("shards", TARS, *COLUMNS)
    return [column_name(split, column) for split in manifest.splits for column in own]


def _folder_url(url: str) -> str:
    """Return the folder of a manifest's URL, with the query (``?...``) kept."""
    path, question_mark, query = url.partition("?")
    if path.endswith(f"/{MANIFEST_NAME}"):
        path = path.removesuffix(MANIFEST_NAME)
    return path.rstrip("/") + question_mark + query
