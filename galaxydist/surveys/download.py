"""Download of the official Galaxy10 DECaLS file, or a copy from a local file or astroNN's cache."""

import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from galaxydist.atomic_files import disk_error, remove_stale
from galaxydist.errors import UserError, first_line

logger = logging.getLogger(__name__)

FILE_NAME = "Galaxy10_DECals.h5"
SHA256 = "19aefc477c41bb7f77ff07599a6b82a038dc042f889a111b0d4d98bb755c1571"
URLS = (
    "https://zenodo.org/records/10845026/files/Galaxy10_DECals.h5",  # also astroNN's address since March 2024
    "https://www.astro.utoronto.ca/~hleung/shared/Galaxy10/Galaxy10_DECals.h5",  # astroNN's earlier address
)
ASTRONN_DIR = Path("~/.astroNN/datasets")

_BLOCK = 1 << 20
_NETWORK_BLOCK = 1 << 16  # bytes lost at most when a connection is cut
_ATTEMPTS = 3  # connections in a row without any data before the next address is tried
_TIMEOUT = 30.0  # seconds without a byte


def fetch_galaxy10(
    target: Path,
    *,
    source: Path | None = None,
    via_astronn: bool = False,
    urls: Sequence[str] = URLS,
    sha256: str = SHA256,
    astronn_dir: Path = ASTRONN_DIR,
    retry_seconds: float = 3.0,
) -> Path:
    """Fetch the official file to ``target`` and verify it; a file already there is only verified.

    Args:
        target: path of the file, ``<data root>/hdf5/Galaxy10_DECals.h5``.
        source: a local copy of the file to use instead of the network.
        via_astronn: let astroNN download the file into its own cache first (needs the extra ``galaxydist[astronn]``).
        urls: addresses, tried in order.
        sha256: expected SHA-256 of the whole file.
        astronn_dir: astroNN's data set cache, searched before the network.
        retry_seconds: pause before a cut connection is resumed.

    Raises:
        UserError: all downloads failed, a file has another SHA-256, astroNN is missing, or the disk is full.
    """
    in_cache = astronn_dir.expanduser() / FILE_NAME
    if target.is_file():
        _verify(target, sha256, "remove it and fetch again")
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(target.parent, f".{target.name}.*.partial")
    if source is not None:
        return _copy(source, target, sha256)
    if via_astronn:
        _download_through_astronn(in_cache)
        return _copy(in_cache, target, sha256)
    if in_cache.is_file() and file_sha256(in_cache) == sha256:
        logger.info("found astroNN's download %s", in_cache)
        return _copy(in_cache, target, sha256)
    return _download(target, urls, sha256, retry_seconds)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 (hex) of a file, with a progress bar."""
    from tqdm import tqdm

    digest = hashlib.sha256()
    with (
        path.open("rb") as stream,
        tqdm(total=path.stat().st_size, desc=f"verify {path.name}", unit="B", unit_scale=True, disable=None) as bar,
    ):
        while block := stream.read(_BLOCK):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def _verify(path: Path, sha256: str, what_to_do: str) -> None:
    found = file_sha256(path)
    if found != sha256:
        raise UserError(
            f"{path} ({path.stat().st_size} bytes) is not the official Galaxy10 file: its SHA-256 is {found}, expected {sha256}; "
            f"{what_to_do}"
        )


def _copy(source: Path, target: Path, sha256: str) -> Path:
    """Verify ``source`` and place it at ``target``, as a hard link if the file system allows it, else as a copy."""
    if not source.is_file():
        raise UserError(f"no file at {source}; give the path of a downloaded {FILE_NAME}")
    _verify(source, sha256, "download it again")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        try:
            os.link(source.resolve(), temporary)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, temporary)
        temporary.replace(target)
    except OSError as error:
        raise disk_error(target, error) from error
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _download(target: Path, urls: Sequence[str], sha256: str, retry_seconds: float) -> Path:
    """Try each address in turn; partial downloads of different addresses are never mixed."""
    import requests

    failures = []
    for url in urls:
        try:
            _retrieve(url, target, sha256, retry_seconds)
            return target
        except (requests.RequestException, ValueError) as error:  # pooch raises ValueError for a wrong hash
            is_wrong = isinstance(error, ValueError) and "hash" in first_line(error).lower()
            reason = "its SHA-256 is not the official file's" if is_wrong else first_line(error)
            failures.append(f"  {url}: {reason}")
            logger.warning("could not fetch %s", failures[-1].strip())
        except OSError as error:
            raise disk_error(target, error) from error
    raise UserError(
        "\n".join([f"{target.name} could not be downloaded from any address:", *failures])
        + "\ntry again later, or download it on a machine with network and run `galaxydist data fetch --from FILE`"
    )


def _retrieve(url: str, target: Path, sha256: str, retry_seconds: float) -> None:
    """Download from one address with pooch; if a resumed file has the wrong hash, download once more from the start."""
    import pooch

    downloader = _ResumingDownloader(target.with_name(f".{target.name}.download"), retry_seconds)
    for last in (False, True):
        try:
            pooch.retrieve(url, f"sha256:{sha256}", fname=target.name, path=target.parent, downloader=downloader)
            return
        except ValueError:
            if last or not downloader.has_resumed:
                raise
            logger.warning("the resumed download of %s is not the official file; it starts again", url)


class _ResumingDownloader:
    """A pooch downloader that resumes downloads cut in this process or an earlier one."""

    def __init__(self, partial: Path, retry_seconds: float) -> None:
        self._partial = partial
        self._retry_seconds = retry_seconds
        self.has_resumed = False

    def __call__(self, url: str, output_file: str, _pooch: object) -> None:
        import requests

        note = self._partial.with_name(self._partial.name + ".url")
        if not note.is_file() or note.read_text(encoding="utf-8") != url:
            self._partial.unlink(missing_ok=True)
        note.write_text(url, encoding="utf-8")
        attempts = 0
        while attempts < _ATTEMPTS:
            before = self._num_bytes()
            try:
                self._resume(url)
                break
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
                attempts = 0 if self._num_bytes() > before else attempts + 1
                if attempts == _ATTEMPTS:
                    raise
                logger.warning("the connection to %s was cut (%s); the download continues", url, error)
                time.sleep(self._retry_seconds)
        self._partial.replace(output_file)
        note.unlink(missing_ok=True)

    def _num_bytes(self) -> int:
        return self._partial.stat().st_size if self._partial.exists() else 0

    def _resume(self, url: str) -> None:
        """Fetch the missing bytes, or the whole file if the server does not support range requests."""
        import requests
        from tqdm import tqdm

        have = self._num_bytes()
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
        with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
            if have and response.status_code == requests.codes.requested_range_not_satisfiable:
                return  # the file is complete or wrong; the hash check decides
            response.raise_for_status()
            resumed = have > 0 and response.status_code == requests.codes.partial_content
            have = have if resumed else 0
            self.has_resumed |= resumed
            total = have + int(response.headers.get("content-length", 0))
            with (
                self._partial.open("ab" if resumed else "wb") as stream,
                tqdm(total=total or None, initial=have, desc=FILE_NAME, unit="B", unit_scale=True, disable=None) as bar,
            ):
                for block in response.iter_content(_NETWORK_BLOCK):
                    stream.write(block)
                    bar.update(len(block))


def _download_through_astronn(in_cache: Path) -> None:
    """Run astroNN's download in a separate process, because its loader then reads all images into memory."""
    if importlib.util.find_spec("astroNN") is None:
        raise UserError(
            "--via astronn needs astroNN, which is not installed (it brings TensorFlow): pip install 'galaxydist[astronn]', "
            "or remove --via"
        )
    code = "from astroNN.datasets.galaxy10 import load_data; load_data()"
    result = subprocess.run([sys.executable, "-c", code], check=False)
    if not in_cache.is_file():
        raise UserError(f"astroNN left no {in_cache} (its process ended with {result.returncode}); remove --via astronn")
