"""Fetching the data set: the real code path against a server on this machine."""

import hashlib
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from galaxydist.errors import UserError
from galaxydist.surveys.download import FILE_NAME, SHA256, URLS, fetch_galaxy10
from galaxydist.surveys.survey_sources import open_survey
from tests.helpers.survey_files import run_with_file_limit, write_survey

BLOCK = 1 << 16


class Server(ThreadingHTTPServer):
    """Serves one file; notes the requests; can cut connections, lie or refuse."""

    def __init__(self, data: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.data = data
        self.requests: list[tuple[str, str | None]] = []
        self.cut_after: list[int] = []  # bytes after which the next connections are cut
        self.knows_ranges = True
        self.wrong_for_ranges = False

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.requests.append((self.path, wanted))
        if "missing" in self.path:
            self.send_error(404)
            return
        data = self.server.data if "wrong" not in self.path else b"x" * 1000
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.server.knows_ranges else 0
        body = data[start:] if not (start and self.server.wrong_for_ranges) else b"y" * (len(data) - start)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.server.cut_after:
            body = body[: self.server.cut_after.pop(0)]
            self.close_connection = True
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("source") / "s.h5"
    write_survey(path, (5,) * 10)
    return path.read_bytes()


@pytest.fixture
def server(data: bytes) -> Iterator[Server]:
    with Server(data) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "root" / "hdf5" / FILE_NAME


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def fetch(server: Server, target: Path, *paths: str, **arguments: object) -> Path:
    arguments = {"astronn_dir": target.parent.parent / "no_astronn", "retry_seconds": 0.0, **arguments}
    urls = [server.url(path) for path in paths]
    return fetch_galaxy10(target, urls=urls, sha256=hashlib.sha256(server.data).hexdigest(), **arguments)  # type: ignore[arg-type]


def test_galaxy10_download_defaults_are_the_official_urls_and_sha256() -> None:
    assert URLS[0] == "https://zenodo.org/records/10845026/files/Galaxy10_DECals.h5" and URLS[1].endswith("Galaxy10_DECals.h5")
    assert SHA256 == "19aefc477c41bb7f77ff07599a6b82a038dc042f889a111b0d4d98bb755c1571"


def test_fetch_galaxy10_downloads_the_file_once(server: Server, target: Path) -> None:
    assert fetch(server, target, "a") == target
    assert target.read_bytes() == server.data and open_survey(target).name == "simulated"
    assert fetch(server, target, "a") == target
    assert len(server.requests) == 1 and names(target.parent) == [FILE_NAME]


def test_fetch_galaxy10_resumes_after_cut_connections(server: Server, target: Path) -> None:
    server.cut_after = [3 * BLOCK, BLOCK + 5]
    fetch(server, target, "a")
    assert target.read_bytes() == server.data
    assert [wanted for _, wanted in server.requests] == [None, f"bytes={3 * BLOCK}-", f"bytes={4 * BLOCK}-"]


def test_fetch_galaxy10_resumes_the_download_of_an_earlier_call(server: Server, target: Path) -> None:
    server.cut_after = [2 * BLOCK, 0, 0, 0]
    with pytest.raises(UserError, match=r"could not be downloaded(.|\n)*--from FILE"):
        fetch(server, target, "a")
    assert not target.exists()
    fetch(server, target, "a")
    assert target.read_bytes() == server.data and server.requests[-1][1] == f"bytes={2 * BLOCK}-"
    assert names(target.parent) == [FILE_NAME]


def test_fetch_galaxy10_restarts_if_the_server_ignores_ranges(server: Server, target: Path) -> None:
    server.knows_ranges, server.cut_after = False, [3 * BLOCK]
    fetch(server, target, "a")
    assert target.read_bytes() == server.data


def test_fetch_galaxy10_restarts_if_the_resumed_file_has_a_wrong_hash(server: Server, target: Path) -> None:
    server.wrong_for_ranges, server.cut_after = True, [3 * BLOCK]
    fetch(server, target, "a")
    assert target.read_bytes() == server.data and [wanted for _, wanted in server.requests] == [None, f"bytes={3 * BLOCK}-", None]


def test_fetch_galaxy10_tries_the_next_url_after_a_404_or_a_wrong_hash(
    server: Server, target: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fetch(server, target, "missing", "wrong", "a")
    assert target.read_bytes() == server.data
    assert "404" in caplog.text and "its SHA-256 is not the official file's" in caplog.text


def test_fetch_galaxy10_does_not_mix_bytes_of_two_urls(server: Server, target: Path) -> None:
    server.cut_after = [2 * BLOCK, 0, 0, 0]
    fetch(server, target, "a", "b")
    assert target.read_bytes() == server.data and server.requests[-1] == ("/b", None)


def test_fetch_galaxy10_lists_the_reason_of_every_failed_url(server: Server, target: Path) -> None:
    with pytest.raises(UserError) as caught:
        fetch(server, target, "missing", "wrong")
    text = str(caught.value)
    assert "missing: 404" in text and "wrong: its SHA-256" in text and "--from FILE" in text
    assert names(target.parent) == []


def test_fetch_galaxy10_without_a_reachable_server_is_refused(target: Path) -> None:
    with pytest.raises(UserError, match="could not be downloaded"):
        fetch_galaxy10(target, urls=["http://127.0.0.1:9/none"], astronn_dir=target.parent, retry_seconds=0.0)


def test_fetch_galaxy10_copies_an_official_file_and_refuses_others(server: Server, target: Path, tmp_path: Path) -> None:
    (tmp_path / "copy.h5").write_bytes(server.data)
    fetch(server, target, source=tmp_path / "copy.h5")
    assert target.read_bytes() == server.data and not server.requests
    target.unlink()
    (tmp_path / "copy.h5").write_bytes(server.data[:-1])
    for source, message in ((tmp_path / "copy.h5", "not the official Galaxy10 file"), (tmp_path / "none.h5", "no file at")):
        with pytest.raises(UserError, match=message):
            fetch(server, target, source=source)
    assert names(target.parent) == []


def test_fetch_galaxy10_refuses_an_existing_file_with_a_wrong_hash(server: Server, target: Path) -> None:
    target.parent.mkdir(parents=True)
    target.write_bytes(server.data[:-1])
    with pytest.raises(UserError, match="remove it and fetch again"):
        fetch(server, target, "a")


def test_fetch_galaxy10_uses_a_complete_astronn_download(
    server: Server, target: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / ".astroNN" / "datasets"
    cache.mkdir(parents=True)
    (cache / FILE_NAME).write_bytes(server.data[:-7])  # a download of astroNN's that was cut
    fetch(server, target, "a", astronn_dir=cache)
    assert len(server.requests) == 1
    target.unlink()
    (cache / FILE_NAME).write_bytes(server.data)
    with caplog.at_level(logging.INFO):
        fetch(server, target, "a", astronn_dir=cache)
    assert len(server.requests) == 1 and "found astroNN's download" in caplog.text
    assert target.read_bytes() == server.data


def test_fetch_galaxy10_via_missing_astronn_names_the_extra_to_install(server: Server, target: Path) -> None:
    try:
        import astroNN  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=r"pip install 'galaxydist\[astronn\]'"):
            fetch(server, target, via_astronn=True)
    else:
        pytest.skip("astroNN is installed here")


def test_via_astronn_calls_its_loader(server: Server, target: Path, tmp_path: Path) -> None:
    """With a package of astroNN's name and interface, since the real one brings TensorFlow."""
    package = tmp_path / "path" / "astroNN" / "datasets"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("")
    (package / "__init__.py").write_text("")
    (package / "galaxy10.py").write_text(
        "import os, pathlib, urllib.request\n"
        "def load_data():\n"
        "    place = pathlib.Path('~/.astroNN/datasets').expanduser(); place.mkdir(parents=True)\n"
        f"    urllib.request.urlretrieve({server.url('a')!r}, place / 'Galaxy10_DECals.h5')\n"
        "    os._exit(9)  # too little memory to read all images\n"
    )
    code = (
        "from pathlib import Path; from galaxydist.surveys.download import fetch_galaxy10; "
        f"fetch_galaxy10(Path({str(target)!r}), via_astronn=True, sha256={hashlib.sha256(server.data).hexdigest()!r})"
    )
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(tmp_path / "path")}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert target.read_bytes() == server.data


def test_fetch_galaxy10_on_a_full_disk_stops_without_trying_the_next_url(server: Server, target: Path) -> None:
    code = f"""
from pathlib import Path
from galaxydist.errors import UserError
from galaxydist.surveys.download import fetch_galaxy10
try:
    urls = [{server.url("a")!r}, {server.url("b")!r}]
    fetch_galaxy10(Path({str(target)!r}), urls=urls, astronn_dir=Path({str(target.parent)!r}))
except UserError as error:
    print(error)
"""
    result = run_with_file_limit(code, 5_000_000)
    assert "no room left" in result.stdout and result.returncode == 0, result
    assert not target.exists() and len(server.requests) == 1
