"""The node's cache: its limit, its locks, what crashes leave, and several processes at once."""

import errno
import fcntl
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from galaxydist import object_store as transfers
from galaxydist.bench.flaky_server import Behaviour, FileServer, every
from galaxydist.errors import UserError
from galaxydist.loading.loader import Batch, Chunks, DecodeOptions, EvalLoader, RankInfo, TrainLoader
from galaxydist.shards.manifest import Manifest, read_manifest
from galaxydist.shards.order import EpochOrder
from galaxydist.shards.remote import prefetcher
from galaxydist.shards.remote.cache import Cache, CacheConfig, CacheEntry, SharedFile
from galaxydist.shards.remote.open import open_shards
from galaxydist.shards.shard_usage import INTERVAL, FetchQueue, usage_of_evaluation
from galaxydist.shards.writer.writer import write_shards
from tests.helpers.forked_runs import forked
from tests.helpers.scripts.cache_rank import read_as_rank
from tests.helpers.shard_surveys import MemorySurvey, as_jpeg, draw_galaxies

STOP = threading.Event()
FAR = 1 << 40
OWN = "0123456789abcdef"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    survey = MemorySurvey(tuple(as_jpeg(galaxy) for galaxy in draw_galaxies(480)))
    return write_shards(survey, tmp_path_factory.mktemp("cache") / "shards", shard_size=8, workers=1).dir


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "FIRST_PAUSE_S", 0.001)


def rank_arguments(url: str, folder: Path, cache: Path, rank: int = 0, **given: int) -> list[str]:
    numbers = given.get("max_bytes", FAR), rank, given.get("world_size", 1), given.get("steps", 20)
    return [url, *map(str, (folder, cache, *numbers))]


def put(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


def hidden(cache: Path) -> list[Path]:
    """Locks and parts of fetches."""
    return sorted(path for path in cache.rglob(".*") if path != cache / ".lock")


def held_bytes(cache: Path) -> int:
    """Return the bytes on the disk of all files and parts of files at one instant.

    Nothing new is begun while the lock is held, and a file that gets its name meanwhile is counted once.
    """
    sizes = {}
    with (cache / ".lock").open("r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in cache.rglob("*"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            if stat.S_ISREG(status.st_mode):
                sizes[status.st_ino] = status.st_size
    return sum(sizes.values())


def read(manifest: Manifest, steps: int, **given: object) -> list[Batch]:
    with TrainLoader(manifest, **{"seed": 5, "batch_size": 12, "num_streams": 4, **given}) as reader:  # type: ignore[arg-type]
        return list(islice(reader, steps))


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    assert len(found) == len(expected)
    for there, here in zip(found, expected, strict=True):
        assert there.samples_B.tolist() == here.samples_B.tolist()
        assert torch.equal(there.images_BHWC, here.images_BHWC)


@given(
    limit=st.integers(10, 60),
    moves=st.lists(st.tuples(st.integers(0, 11), st.booleans(), st.booleans()), max_size=30),
)
def test_cache_stays_within_its_limit_and_keeps_files_in_use(
    tmp_path_factory: pytest.TempPathFactory, limit: int, moves: list[tuple[int, bool, bool]]
) -> None:
    """Files of 1 to 12 bytes are opened (or not to be had) and let go in any order."""
    cache = Cache(tmp_path_factory.mktemp("limit"), limit)
    in_use: dict[int, SharedFile] = {}
    for number, must, let_go in moves:
        before = {int(path.stem) for path in cache.folder.rglob("*.tar")}
        held = sum(other + 1 for other in in_use)
        content = bytes([number]) * (number + 1)
        file = cache.get_or_fetch(CacheEntry(f"{OWN}/{number}.tar", number + 1), put(content), stop=STOP, allow_over_limit=must)
        there = {int(path.stem) for path in cache.folder.rglob("*.tar")}
        total = sum(other + 1 for other in there)
        assert there >= in_use.keys() and there <= before | {number}
        assert (file is not None) == (must or number in before or held + number + 1 <= limit)
        assert total <= limit or (number in before and there == before) or there == in_use.keys() | {number} or file is None
        if file is not None:
            assert os.pread(file.descriptor, 100, 0) == content
            in_use[number] = file
            del file
        if let_go and in_use:
            del in_use[min(in_use)]
    assert hidden(cache.folder) == []


def test_cache_evicts_the_least_recently_used_file_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 30)
    for number in range(3):
        assert cache.get_or_fetch(
            CacheEntry(f"{number % 2:016x}/{number}.tar", 10), put(bytes(10)), stop=STOP, allow_over_limit=False
        )
        os.utime(tmp_path / f"{number % 2:016x}/{number}.tar", (number, number))
    assert cache.find(CacheEntry(f"{0:016x}/0.tar", 10))
    assert cache.get_or_fetch(CacheEntry(f"{1:016x}/3.tar", 10), put(bytes(10)), stop=STOP, allow_over_limit=False)
    assert sorted(path.stem for path in tmp_path.rglob("*.tar")) == ["0", "2", "3"]


def test_cache_over_its_limit_is_warned_about_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = Cache(tmp_path / "cache", 10)
    files = [
        cache.get_or_fetch(CacheEntry(f"{OWN}/{n}.tar", 6), put(b"123456"), stop=STOP, allow_over_limit=True) for n in range(4)
    ]
    assert all(files)
    assert caplog.text.count("exceeds its limit") == 1 and "data.cache_size" in caplog.text
    assert cache.get_or_fetch(CacheEntry(f"{OWN}/9.tar", 6), put(b"123456"), stop=STOP, allow_over_limit=False) is None
    files.clear()
    assert cache.get_or_fetch(CacheEntry(f"{OWN}/9.tar", 6), put(b"123456"), stop=STOP, allow_over_limit=False) is not None
    assert held_bytes(tmp_path / "cache") == 6


def test_cached_file_of_the_wrong_size_is_downloaded_again(folder: Path, tmp_path: Path) -> None:
    with FileServer(folder) as server:
        remote = open_shards(server.url, CacheConfig(tmp_path / "cache"))
        expected = read(read_manifest(folder), 12)
        assert_same(read(remote, 12), expected)
        shards = sorted(remote.dir.glob("train-*.tar"))
        with shards[3].open("r+b") as file:
            file.truncate(1000)
        column = remote.dir / "columns" / "train.offsets.npy"
        column.write_bytes(column.read_bytes()[:200])
        remote = open_shards(server.url, CacheConfig(tmp_path / "cache"))
        assert_same(read(remote, 12), expected)
    assert server.gets[shards[3].name] == 2 and server.gets[shards[2].name] == 1
    assert server.gets["columns/train.offsets.npy"] == 2


@pytest.mark.multiprocess
def test_partial_files_of_a_killed_download_are_removed_and_not_read(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with FileServer(folder, Behaviour(block_delay_s=0.2)) as server:
        with forked(read_as_rank, *rank_arguments(server.url, folder, cache), folder=tmp_path / "log") as rank:
            deadline = time.monotonic() + 300
            while not list(cache.rglob(".train*.partial")):
                assert time.monotonic() < deadline and rank.exit_codes == [None], rank.text("err")
                time.sleep(0.005)
        assert [path for path in hidden(cache) if path.suffix == ".partial"]
        server.behaviour = Behaviour()
        remote = open_shards(server.url, CacheConfig(cache))
        assert hidden(cache) == []
        assert_same(read(remote, 20), read(read_manifest(folder), 20))


@pytest.mark.multiprocess
@pytest.mark.parametrize("max_bytes", [FAR, 420_000])
def test_two_ranks_of_a_node_download_each_shard_once_within_the_cache_limit(
    folder: Path, tmp_path: Path, max_bytes: int
) -> None:
    """Two real processes and a server that fails often; also with a cache that holds only a part of the shards."""
    cache = tmp_path / "cache"
    total = sum(path.stat().st_size for path in folder.glob("train-*.tar"))
    most, watching = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not watching.wait(0.005):
            if (cache / ".lock").exists():
                most = max(most, held_bytes(cache))

    watcher = threading.Thread(target=watch)
    with FileServer(folder, Behaviour(0.005, every(9))) as server:
        watcher.start()
        try:
            with ExitStack() as started:
                ranks = []
                for number in range(2):
                    arguments = rank_arguments(server.url, folder, cache, number, max_bytes=max_bytes, world_size=2, steps=144)
                    ranks.append(started.enter_context(forked(read_as_rank, *arguments, folder=tmp_path / str(number))))
                assert [rank.wait() for rank in ranks] == [[0], [0]], ranks[0].text("err") + ranks[1].text("err")
        finally:
            watching.set()
            watcher.join()
    assert [rank.text().split() for rank in ranks] == [["open", *(str(step) for step in range(144))]] * 2
    shards = [path.name for path in folder.glob("train-*.tar")]
    assert sum(server.failures[name] for name in shards) >= 1
    if max_bytes == FAR:
        assert {name: server.gets[name] - server.failures[name] for name in shards} == dict.fromkeys(shards, 1)
        assert server.gets["manifest.json"] - server.failures["manifest.json"] == 2
    else:
        assert total > 1.5 * max_bytes and 0.5 * max_bytes < most <= max_bytes
    assert hidden(cache) == [] and server.others == []


def test_resampled_and_evaluation_batches_from_http_equal_the_local_ones(folder: Path, tmp_path: Path) -> None:
    with FileServer(folder, Behaviour(trouble=every(20))) as server:
        remote = open_shards(server.url, CacheConfig(tmp_path / "cache", 10_000_000, threads=2))
        local = read_manifest(folder)
        assert_same(read(remote, 14, balance="resample", start_step=5), read(local, 14, balance="resample", start_step=5))
        chunks = {"batch_size": 2, "chunks": Chunks(16, np.array([0, 2])), "decode": DecodeOptions(prefetch=1)}  # of four shards
        ranks = [{"batch_size": 7, "ranks": RankInfo(rank, 3, 3)} for rank in range(3)]
        for split, given in [("train", chunks), *(("test", rank) for rank in ranks)]:
            with EvalLoader(remote, split, **given) as found, EvalLoader(local, split, **given) as expected:  # type: ignore[arg-type]
                assert_same(list(found), list(expected))
    assert {path: count - server.failures[path] for path, count in server.gets.items()} == dict.fromkeys(server.gets, 1)


def test_cache_smaller_than_the_working_set_is_refused_before_any_download(folder: Path, tmp_path: Path) -> None:
    with FileServer(folder) as server:
        remote = open_shards(server.url, CacheConfig(tmp_path / "cache", 80_000))
        said = r"data.cache_size=8e-05 and the disk of .* leave .*e-05 GB for shards, but 0.00\d+ GB .*data.num_streams=4"
        with pytest.raises(UserError, match=said):
            read(remote, 1)
        with pytest.raises(UserError, match=r"data.balance=resample draws from all shards"):
            read(remote, 1, balance="resample")
    assert not [path for path in server.gets if path.endswith(".tar")]


def test_unwritable_cache_folder_is_refused_naming_data_cache_dir(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"the cache .*file/cache cannot be written .* choose another folder with data.cache_dir="
    ):
        open_shards(f"file://{folder}", CacheConfig(tmp_path / "file" / "cache"))
    if os.getuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(UserError, match="cannot be written"):
            open_shards(f"file://{folder}", CacheConfig(tmp_path / "locked" / "cache"))


# Opens every training shard in turn, as an evaluation would.
FILL = """
import sys
from contextlib import closing
from pathlib import Path
from galaxydist.errors import UserError
from galaxydist.shards.remote.cache import CacheConfig
from galaxydist.shards.remote.prefetcher import open_shard_source
from galaxydist.shards.remote.open import open_shards
from galaxydist.shards.shard_usage import usage_of_evaluation
url, cache, taken = sys.argv[1:]
try:
    remote = open_shards(url, CacheConfig(Path(cache), threads=1))
    if taken == "limit":
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    else:
        (Path(cache).parent / "other").write_bytes(bytes(int(taken)))
    uses = usage_of_evaluation(remote.shards("train")["samples"], 8)
    with closing(open_shard_source(remote, "train", iter([uses]), iter([uses]), steps_ahead=2, why="a test")) as source:
        for use in uses:
            assert source.open(int(use["shard"])).num_bytes == remote.shards("train")["bytes"][use["shard"]]
            source.advance(int(use["last_step"]) - 1)
except UserError as error:
    print(error)
print(sorted(path.name for path in Path(cache).rglob(".*")))
"""


def test_file_size_limit_in_the_cache_is_explained_and_leaves_no_part(folder: Path, tmp_path: Path) -> None:
    with FileServer(folder) as server:
        command = [sys.executable, "-c", FILL, server.url, str(tmp_path / "cache"), "limit"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert "cannot grow: the file size limit is reached. Free some space there" in done.stdout, done.stderr
    assert "data.cache_dir=FOLDER" in done.stdout and done.stdout.endswith("['.lock']\n")


@pytest.mark.parametrize(
    ("taken", "said"),
    [(500_000, ""), (700_000, "data.cache_size=100 and the disk of DISK/cache leave ")],
    ids=["smaller", "too small"],
)
def test_cache_on_a_nearly_full_disk_uses_only_the_free_space_or_is_refused(
    folder: Path, tmp_path: Path, taken: int, said: str
) -> None:
    """A real file system of 800 kB, which goes with the process: the cache keeps within what others leave free."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=800k tmpfs {disk} && "
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount + "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine gives no file system of one's own")
    with FileServer(folder) as server:
        script = mount + f'exec "$0" -c "$1" {server.url} {disk}/cache {taken}'
        command = ["unshare", "-rm", "sh", "-c", script, sys.executable, FILL]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    *lines, last = done.stdout.splitlines() or [""]
    assert last == "['.lock']" and "".join(lines).startswith(said.replace("DISK", str(disk))), done.stdout + done.stderr
    assert bool(lines) == bool(said)


def fetch_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("galaxydist-fetch", "galaxydist-decode"))]


def test_closing_the_loader_ends_download_threads_and_removes_parts(folder: Path, tmp_path: Path) -> None:
    with FileServer(folder) as server:
        remote = open_shards(server.url, CacheConfig(tmp_path / "cache"))
        server.behaviour = Behaviour(block_delay_s=5.0)
        reader = TrainLoader(remote, seed=5, batch_size=12, num_streams=4)
        failed: list[BaseException] = []

        def consume() -> None:
            try:
                next(reader)
            except BaseException as error:
                failed.append(error)

        consumer = threading.Thread(target=consume)
        consumer.start()
        while not hidden(tmp_path / "cache"):
            time.sleep(0.005)
        reader.close()
        reader.close()
        consumer.join(timeout=300)
        assert not consumer.is_alive()
        assert fetch_threads() == [] and hidden(tmp_path / "cache") == []
        assert failed and not isinstance(failed[0], UserError)


@pytest.mark.multiprocess
def test_ctrl_c_during_a_download_leaves_no_partial_file(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with FileServer(folder) as server:
        open_shards(server.url, CacheConfig(cache))
        server.behaviour = Behaviour(block_delay_s=30.0)
        command = [sys.executable, "-m", "tests.helpers.scripts.cache_rank", *rank_arguments(server.url, folder, cache)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert process.stdout is not None and process.stdout.readline() == "open\n"
        deadline = time.monotonic() + 300
        while not any(path.endswith(".tar") for path in server.gets):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=300)
    assert process.returncode == -signal.SIGINT
    assert hidden(cache) == []


def test_missing_or_changed_remote_shard_is_raised_or_reported_by_the_loader(folder: Path, tmp_path: Path) -> None:
    served = shutil.copytree(folder, tmp_path / "served")
    (served / "train-000002.tar").unlink()
    other = bytearray((served / "train-000004.tar").read_bytes())
    other[700] ^= 1
    (served / "train-000004.tar").write_bytes(other)
    with FileServer(served) as server:
        remote = open_shards(server.url, CacheConfig(tmp_path / "cache"))
        missing = rf"shard {server.address}/train-000002.tar is missing: copy the whole folder of shards again"
        changed = rf"{server.address}/train-000004.tar differs from its manifest: its SHA-256 is"
        with pytest.raises(UserError, match=f"{missing}|{changed}"):
            read(remote, 12)
        reported = {str(error) for batch in read(remote, 12, on_error="report") for error in batch.errors.values()}
    assert len(reported) == 2 and fetch_threads() == []
    assert not list(remote.dir.glob("train-00000[24]*")) and hidden(remote.dir) == []


def test_shard_that_cannot_be_fetched_at_once_ends_the_wait_for_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fetch may have failed before the thread that started it goes on; once, the wait then never ended."""

    class LateExecutor(ThreadPoolExecutor):
        def submit(self, *arguments: Any, **options: Any) -> Future[Any]:
            future = super().submit(*arguments, **options)
            wait([future], timeout=0.3)
            return future

    monkeypatch.setattr(prefetcher, "ThreadPoolExecutor", LateExecutor)
    with FileServer(folder, Behaviour(trouble=lambda path, _number: 403 if path.endswith(".tar") else None)) as server:
        remote = open_shards(server.url, CacheConfig(tmp_path / "cache"))
        uses = usage_of_evaluation(remote.shards("train")["samples"], 8)[:3]
        source = prefetcher.open_shard_source(remote, "train", iter([uses]), iter([uses]), steps_ahead=2, why="a test")
        with closing(source), pytest.raises(UserError, match="is denied"):
            source.open(0)


def test_fetch_queue_returns_shards_in_order_of_use_within_the_epoch() -> None:
    def rows(*uses: tuple[int, int, int]) -> np.ndarray:
        return np.array([*uses], INTERVAL)

    schedule = FetchQueue(iter([rows((4, 0, 2), (1, 0, 9), (4, 7, 9)), rows((1, 10, 12), (2, 10, 19)), rows((3, 20, 29))]))
    assert schedule.first(-1) == 4 and schedule.take(4, -1) == 2
    assert schedule.first(-1) == 1
    assert schedule.take(4, -1) == 9  # wanted before its turn
    assert schedule.take(1, -1) == 9 and schedule.first(-1) is None  # the next epoch is not looked at before this one begins
    assert schedule.first(0) == 1 and schedule.take(1, 0) == 12
    assert schedule.first(15) == 2 and schedule.take(2, 15) == 19
    assert schedule.first(15) == 3
    assert schedule.first(29) is None
    with pytest.raises(AssertionError):
        schedule.take(3, 29)


def test_foreign_files_in_the_cache_folder_are_neither_counted_nor_removed(tmp_path: Path) -> None:
    """A user may give a folder that holds more than the cache: it neither counts nor goes, however old it is."""
    others = [tmp_path / "thesis" / "images.tar", tmp_path / "images.tar", tmp_path / "thesis" / ".images.tar.lock"]
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"not a number")
        os.utime(path, (1, 1))
    cache = Cache(tmp_path, 10)
    for number in range(3):
        assert cache.get_or_fetch(CacheEntry(f"{OWN}/{number}.tar", 10), put(bytes(10)), stop=STOP, allow_over_limit=False)
    assert [path.read_bytes() for path in others] == [b"not a number"] * 3
    assert [path.name for path in (tmp_path / OWN).iterdir()] == ["2.tar"]


def test_full_disk_while_making_room_leaves_the_file_to_the_next_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else all processes of the node would wait for one that has given up."""
    cache = Cache(tmp_path, 100)

    def no_space(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", no_space)
        with pytest.raises(UserError, match="the disk is full") as raised:
            cache.get_or_fetch(CacheEntry(f"{OWN}/0.tar", 10), put(bytes(10)), stop=STOP, allow_over_limit=True)
    assert Cache(tmp_path, 100).get_or_fetch(CacheEntry(f"{OWN}/0.tar", 10), put(bytes(10)), stop=STOP, allow_over_limit=True)
    assert "pwrite" not in str(raised.value)  # the error is still held, and with it what its frames hold


def test_eval_loader_of_a_rank_without_batches_is_empty(folder: Path, tmp_path: Path) -> None:
    with FileServer(folder) as server:
        remote = open_shards(server.url, CacheConfig(tmp_path / "cache", 10_000_000, threads=1))
        with EvalLoader(remote, "test", batch_size=64, ranks=RankInfo(7, 8)) as reader:
            assert len(reader) == 0 and list(reader) == []


def test_fetch_queue_finds_a_shard_epochs_ahead_and_raises_for_an_unused_one() -> None:
    epochs = [np.array([(number % 9, number, number)], INTERVAL) for number in range(40)]
    schedule = FetchQueue(iter(epochs), 10)
    assert schedule.take(8, 0) == 8
    with pytest.raises(AssertionError, match="shard 30 is read"):
        schedule.take(30, 0)


# The readers of all shards at once, in a process that may have few files open.
FEW_FILES = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_NOFILE, (100, int(sys.argv[3])))
from galaxydist.errors import UserError
from galaxydist.shards.remote.cache import CacheConfig
from galaxydist.shards.remote.open import open_shards
from galaxydist.loading.loader import TrainLoader
remote = open_shards(sys.argv[1], CacheConfig(Path(sys.argv[2]), threads=2))
try:
    with TrainLoader(remote, seed=0, batch_size=4, balance="resample") as reader:
        next(reader)
except UserError as error:
    print(error)
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize("hard", [260, 1000])
def test_the_limit_on_open_files_is_raised_or_explained(folder: Path, tmp_path: Path, hard: int) -> None:
    with FileServer(folder) as server:
        command = [sys.executable, "-c", FEW_FILES, server.url, str(tmp_path / "cache"), str(hard)]
        told = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    number = len(list(folder.glob("train-*.tar")))
    assert told.endswith(f"{hard}\n")
    assert (f"{number} shards of {server.url}" in told and "ulimit -n" in told) == (number + 256 > hard)


@pytest.mark.parametrize("threads", [1, 2])
def test_loader_awaiting_more_shards_than_download_threads_gets_every_batch(tmp_path: Path, threads: int) -> None:
    """A reader that was served leaves no wish behind: a fetching thread would take it up when its shard is over, and die."""
    survey = MemorySurvey(tuple(as_jpeg(galaxy) for galaxy in draw_galaxies(200)))
    local = write_shards(survey, tmp_path / "shards", shard_size=1, workers=1)
    given = {"batch_size": 8, "decode": DecodeOptions(threads=8, prefetch=1)}
    with FileServer(local.dir, Behaviour(0.002)) as server:
        remote = open_shards(server.url, CacheConfig(tmp_path / "cache", FAR, threads=threads))
        with EvalLoader(remote, "test", **given) as found, EvalLoader(local, "test", **given) as expected:  # type: ignore[arg-type]
            assert_same(list(found), list(expected))


def test_shards_of_the_next_epoch_are_downloaded_during_the_current_one(folder: Path, tmp_path: Path) -> None:
    """Also where no shard of this epoch is over before its end, as in any split smaller than a window for each stream."""
    with FileServer(folder) as server:
        remote = open_shards(server.url, CacheConfig(tmp_path / "cache", 10_000_000, threads=2))
        given = {"seed": 5, "batch_size": 12, "num_streams": 12}
        names = [{f"train-{sample // 8:06d}.tar" for sample in epoch_samples(remote, epoch)} for epoch in (0, 1)]
        assert names[1] - names[0], "the next epoch reads other shards"

        def wait_for(shards: set[str]) -> bool:
            deadline = time.monotonic() + 300
            while not all((remote.dir / name).exists() for name in shards) and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(0.2)  # until the fetching threads rest
            return all((remote.dir / name).exists() for name in shards)

        ranks, decode = RankInfo(0, 12), DecodeOptions(prefetch=1)
        with TrainLoader(remote, **given, ranks=ranks, decode=decode) as reader:
            assert wait_for(names[0])
            assert len(list(islice(reader, 2))) == 2
            assert wait_for(names[1])


def epoch_samples(manifest: Manifest, epoch: int) -> list[int]:
    """The stored samples of rank 0 of 12 in an epoch."""
    order = EpochOrder(manifest.shards("train")["samples"], seed=5, epoch=epoch, num_streams=12)
    steps = manifest.split("train").num_samples // 12
    return [int(sample) for sample in order.samples(np.arange(steps) * 12)]
