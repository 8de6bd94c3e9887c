"""Shards read from stores: real servers on loopback, plain GETs of known names.

Every failure is either tried again or given to the user to mend.
"""

import asyncio
import os
import sys
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import fsspec
import pytest
import torch

from galaxydist import object_store as stores
from galaxydist import object_store as transfers
from galaxydist.bench.flaky_server import TROUBLES, Behaviour, FileServer, every
from galaxydist.errors import UserError
from galaxydist.loading.loader import Batch, EvalLoader, TrainLoader
from galaxydist.object_store import StoppedError, Store, download
from galaxydist.shards.manifest import Manifest, read_manifest
from galaxydist.shards.remote.cache import CacheConfig
from galaxydist.shards.remote.open import open_shards
from galaxydist.shards.tar_index import IndexOptions, index_tars
from galaxydist.shards.writer.writer import write_shards
from galaxydist.surveys.image_table import TableOptions
from galaxydist.surveys.table_columns import ColumnNames
from galaxydist.surveys.tables.tar_scan import find_tars
from tests.helpers.servers import s3_server
from tests.helpers.shard_surveys import MemorySurvey, as_jpeg, draw_galaxies

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    survey = MemorySurvey(tuple(as_jpeg(galaxy) for galaxy in draw_galaxies(160)))
    return write_shards(survey, tmp_path_factory.mktemp("store") / "shards", shard_size=8, workers=1).dir


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "FIRST_PAUSE_S", 0.001)


@pytest.fixture
def no_aws(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)


@pytest.fixture(scope="module")
def s3(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    log = tmp_path_factory.mktemp("s3") / "log"
    with s3_server(folder, log) as address:
        yield address, log


def opened(url: str, tmp_path: Path) -> Manifest:
    return open_shards(url, CacheConfig(tmp_path / "cache"))


def epoch(manifest: Manifest) -> list[Batch]:
    with TrainLoader(manifest, seed=3, batch_size=8, num_streams=3) as reader:
        batches = list(islice(reader, reader.steps_per_epoch))
    for split in ("val", "test"):
        with EvalLoader(manifest, split, batch_size=8) as evaluation:
            batches += evaluation
    return batches


def assert_same(remote: Manifest, folder: Path) -> None:
    here, there = epoch(read_manifest(folder)), epoch(remote)
    assert len(here) == len(there)
    for expected, found in zip(here, there, strict=True):
        assert expected.samples_B.tolist() == found.samples_B.tolist()
        assert expected.labels_B.tolist() == found.labels_B.tolist()
        assert torch.equal(expected.images_BHWC, found.images_BHWC)
    shards = [path.name for path in folder.glob("*.tar")]
    assert all((remote.dir / name).read_bytes() == (folder / name).read_bytes() for name in shards)
    assert not list(remote.dir.rglob(".*"))


@pytest.mark.usefixtures("no_aws")
def test_epoch_from_s3_equals_the_local_one_with_one_get_per_file(
    s3: tuple[str, Path], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, log = s3
    before = len(log.read_text().splitlines())
    for name, value in (*KEYS.items(), ("AWS_ENDPOINT_URL", address)):
        monkeypatch.setenv(name, value)
    remote = opened("s3://galaxies/shards/manifest.json", tmp_path)
    assert remote.location == "s3://galaxies/shards/manifest.json"
    assert_same(remote, folder)
    asked = [line.split('"')[1].split(" ")[:2] for line in log.read_text().splitlines()[before:] if '"' in line]
    names = [path.removeprefix("/galaxies/shards/") for _, path in asked]
    assert {method for method, _ in asked} == {"GET"}
    assert sorted(names) == sorted(
        [*read_manifest(folder).columns, "manifest.json", *(path.name for path in folder.glob("*.tar"))]
    )


@pytest.mark.usefixtures("no_aws")
@pytest.mark.parametrize(
    ("url", "environment", "message"),
    [
        ("s3://galaxies/shards", {}, r"no credentials for s3://galaxies/shards/manifest.json .*set AWS_PROFILE.*FSSPEC_S3_ANON"),
        ("s3://galaxies/shards", {"AWS_PROFILE": "nobody"}, "no credentials for .*nobody.*set AWS_PROFILE"),
        (
            "s3://galaxies/elsewhere",
            KEYS,
            "no shards: s3://galaxies/elsewhere/manifest.json does not exist.*galaxydist data shard",
        ),
        ("s3://nothing/shards/manifest.json", KEYS, "no shards: s3://nothing/shards/manifest.json does not exist"),
    ],
)
def test_s3_errors_are_explained_after_at_most_one_request(  # noqa: PLR0917
    s3: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, environment: dict[str, str], message: str
) -> None:
    address, log = s3
    before = len(log.read_text().splitlines())
    for name, value in (*environment.items(), ("AWS_ENDPOINT_URL", address)):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        opened(url, tmp_path)
    assert len(log.read_text().splitlines()) - before <= 1


@pytest.mark.usefixtures("no_aws")
def test_foreign_tars_in_s3_are_listed_indexed_and_read(
    s3: tuple[str, Path], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pattern = "s3://galaxies/shards/*-00000[0-2].tar"
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3[0])
    with pytest.raises(UserError, match=r"no credentials for s3://galaxies/shards .*set AWS_PROFILE"):
        find_tars({None: pattern})
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    local, remote = ({None: f"{folder}/*-00000[0-2].tar"}, {None: pattern})
    options = TableOptions("mine", ColumnNames(id="id"))
    expected = index_tars(find_tars(local), tmp_path / "local", options, IndexOptions())
    index_tars(find_tars(remote), tmp_path / "remote", options, IndexOptions(is_hashed=True))
    found = opened(str(tmp_path / "remote"), tmp_path)
    assert (
        found.tars == "s3://galaxies/shards"
        and found.columns["columns/train.shards.npy"] == expected.columns["columns/train.shards.npy"]
    )
    for here, there in zip(epoch(expected), epoch(found), strict=True):
        assert torch.equal(here.images_BHWC, there.images_BHWC)


def test_epoch_from_google_storage_equals_the_local_one_with_one_get_per_attempt(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FileServer(folder, Behaviour(trouble=every(9)), prefix="/download/storage/v1/b/galaxies/o/shards/") as server:
        monkeypatch.setitem(fsspec.config.conf, "gs", {"endpoint_url": server.address, "token": "anon"})
        assert_same(opened("gs://galaxies/shards/manifest.json", tmp_path), folder)
    assert server.failures.total() > 2
    assert {path: count - server.failures[path] for path, count in server.gets.items()} == dict.fromkeys(server.gets, 1)
    assert server.others == []


def test_epoch_from_the_hugging_face_hub_equals_the_local_one_with_one_get_per_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with FileServer(folder, prefix="/datasets/zoo/galaxies/resolve/v1/256/") as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
        remote = opened("hf://datasets/zoo/galaxies@v1/256/manifest.json", tmp_path)
        assert_same(remote, folder)
    assert remote.location == "hf://datasets/zoo/galaxies@v1/256/manifest.json"
    assert set(server.gets.values()) == {1} and server.others == []
    assert all(headers["Authorization"] == "Bearer hf_secret" for _, headers in server.asked.values())


def test_a_file_url_goes_through_the_cache(folder: Path, tmp_path: Path) -> None:
    remote = opened(f"file://{folder}", tmp_path)
    assert remote.dir.is_relative_to(tmp_path / "cache")
    assert_same(remote, folder)
    with pytest.raises(UserError, match=r"no shards: file:///nowhere/manifest.json does not exist"):
        opened("file:///nowhere", tmp_path)


def test_query_and_credentials_of_a_url_are_sent_but_not_shown(folder: Path, tmp_path: Path) -> None:
    with FileServer(folder) as server:
        url = server.url.replace("http://", "http://user:secret@") + "?signature=hush"
        remote = opened(url, tmp_path)
        with EvalLoader(remote, "val", batch_size=8) as reader:
            list(reader)
        (folder_of_none := tmp_path / "none").mkdir()
        server.folder = folder_of_none
        with pytest.raises(UserError) as error, EvalLoader(remote, "test", batch_size=8) as reader:
            list(reader)
    assert f"shard {server.address}/test-000000.tar is missing: copy the whole folder" in str(error.value)
    assert remote.location == server.url
    assert {address.partition("?")[2] for address, _ in server.asked.values()} == {"signature=hush"}
    assert all(headers["Authorization"].startswith("Basic ") for _, headers in server.asked.values())


def test_unsupported_protocols_and_missing_packages_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"cannot be read through gopher://; use s3://.* https://.* hf://.* file://"):
        opened("gopher://somewhere/shards", tmp_path)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=r"s3:// needs s3fs, which is not installed: pip install 'galaxydist\[remote\]'"):
        opened("s3://galaxies/shards", tmp_path)
    with pytest.raises(UserError, match="names no repository: give hf://datasets/"):
        opened("hf://datasets/zoo", tmp_path)


@pytest.mark.parametrize(
    ("status", "gets", "message"),
    [
        (401, 1, "access to .*train-000000.tar is denied .*FSSPEC_HTTPS"),
        (403, 1, "access to .*train-000000.tar is denied"),
        (404, 1, "train-000000.tar does not exist"),
        (410, 1, "train-000000.tar does not exist"),
        (400, 1, "train-000000.tar cannot be read .*400"),
        (429, 4, "could not be read in 4 attempts; the last one: .*429"),
        (500, 4, "could not be read in 4 attempts; the last one: .*500"),
        ("reset", 4, "could not be read in 4 attempts; the last one: "),
        ("cut", 4, "could not be read in 4 attempts; the last one: ClientPayloadError"),
        ("corrupt", transfers.WRONG_CONTENTS, "train-000000.tar differs from its manifest: its SHA-256 is .*fetched 4 times"),
    ],
)
def test_temporary_download_errors_are_retried_and_permanent_ones_are_not(
    folder: Path, tmp_path: Path, status: int | str, gets: int, message: str
) -> None:
    sha256 = read_manifest(folder).shards("train")["sha256"][0].tobytes()
    with FileServer(folder, Behaviour(trouble=lambda _path, _number: status)) as server, pytest.raises(UserError, match=message):
        download(Store(server.address), "train-000000.tar", tmp_path / "x", stop=threading.Event(), sha256=sha256, attempts=4)
    # On a connection that was used before, aiohttp asks once more by itself: that failure counts, too.
    assert gets <= server.gets["train-000000.tar"] <= (gets if status != "reset" else 2 * gets)


@pytest.mark.parametrize("trouble", TROUBLES)
def test_each_download_error_that_occurs_once_is_recovered(folder: Path, tmp_path: Path, trouble: int | str) -> None:
    def first(path: str, number: int) -> int | str | None:
        return trouble if number == 1 and path != "manifest.json" else None

    with FileServer(folder, Behaviour(trouble=first)) as server:
        assert_same(opened(server.url, tmp_path), folder)
    assert server.gets.pop("manifest.json") == 1
    assert set(server.gets.values()) == {2} and set(server.failures.values()) == {1}


def test_unreachable_server_is_refused_after_5_attempts(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"http://127.0.0.1:9/manifest.json could not be read in 5 attempts.*server can be reached"
    ):
        opened("http://127.0.0.1:9/manifest.json", tmp_path)


def test_silent_server_is_asked_again_after_a_timeout(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "SILENCE_S", 0.5)

    def silence(_path: str, number: int) -> None:
        server.behaviour.delay_s = 1.5 if number == 1 else 0.0

    with FileServer(folder, Behaviour(trouble=silence)) as server:
        download(Store(server.address), "val-000000.tar", tmp_path / "x", stop=threading.Event())
    assert server.gets["val-000000.tar"] >= 2
    assert (tmp_path / "x").read_bytes() == (folder / "val-000000.tar").read_bytes()


def test_download_stops_when_its_stop_event_is_set(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(10_000_000))
    stop = threading.Event()

    def stop_once_begun() -> None:
        while not (tmp_path / "part").exists():
            time.sleep(0.005)
        stop.set()

    with FileServer(tmp_path, Behaviour(block_delay_s=0.05)) as server:
        stopper = threading.Thread(target=stop_once_begun)
        stopper.start()
        with pytest.raises(StoppedError):
            download(Store(server.address), "large", tmp_path / "part", stop=stop)
        stopper.join()
    assert (tmp_path / "part").stat().st_size < 10_000_000
    with pytest.raises(StoppedError):
        download(Store(server.address), "large", tmp_path / "part", stop=stop)
    assert server.gets["large"] == 1


def test_a_stopped_download_has_ended_when_the_error_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it could open its file again after the caller has removed it."""
    store, begun, has_ended, stop = Store("http://127.0.0.1:9/shards"), threading.Event(), False, threading.Event()

    async def slow_to_end(*_: object) -> None:
        nonlocal has_ended
        begun.set()
        try:
            await asyncio.sleep(600)
        finally:
            await asyncio.sleep(0.2)
            has_ended = True

    monkeypatch.setattr(store, "_get", slow_to_end)
    stopper = threading.Thread(target=lambda: begun.wait() and stop.set())
    stopper.start()
    with pytest.raises(StoppedError):
        store.get("a.tar", tmp_path / "part", stop)
    assert has_ended
    stopper.join()


def test_manifest_with_paths_outside_its_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    text = (folder / "manifest.json").read_text().replace('"train"', '"../../train"')
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="cannot be the name of a file"):
        opened(f"file://{tmp_path}/evil/manifest.json", tmp_path)
