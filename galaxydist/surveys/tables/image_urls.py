"""Images that a table lists by URL: fetched once into a folder on this machine, from which shards are written."""

import hashlib
import logging
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from galaxydist.atomic_files import disk_error
from galaxydist.cpus import bounded_map
from galaxydist.errors import DamagedImageError, UserError, name_some
from galaxydist.object_store import PROTOCOLS, Store, download
from galaxydist.store_errors import MissingError
from galaxydist.surveys.image_files import EXTENSIONS, parse_image

logger = logging.getLogger(__name__)

# Downloads at a time: a cutout takes a fraction of a second, most of it the server's.
THREADS = 16


def fetch_images(urls: Sequence[str], folder: Path, name: str) -> list[str]:
    """Fetch the images of some URLs with 16 threads, and return their files; those in the folder already are not fetched again.

    A failed request is repeated with growing pauses. After Ctrl-C or an error, the next call continues.

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
    stop, stores = threading.Event(), {place: Store(place) for place in dict.fromkeys(split_url(url)[0] for url in missing)}
    reasons: dict[str, str] = {}

    def fetch(url: str) -> tuple[str, str]:
        place, file = split_url(url)
        return url, _fetch(stores[place], file, paths[url], stop)

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
            "%s: %d of %d images cannot be had: %s", name, len(reasons), len(wanted), name_some([*reasons.values()], 3)
        )
    return [str(paths[url]) if url and url not in reasons else "" for url in urls]


def _fetch(store: Store, name: str, path: Path, stop: threading.Event) -> str:
    """Fetch one image, and return the reason if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
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
