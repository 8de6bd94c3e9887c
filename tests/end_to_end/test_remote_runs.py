"""Runs, evaluations and checks of shards that lie on a server."""

import json
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest

from galaxydist.bench.flaky_server import Behaviour, FileServer, Trouble, every
from galaxydist.checkpoints import store
from galaxydist.cli.main import main
from tests.helpers.forked_runs import forked, run_forked, train
from tests.helpers.runs import quick_settings, read_evaluation, read_losses, run_here, without_figures


def settings(manifest: Path | str, run_dir: Path, cache: Path, **changes: object) -> list[str]:
    return quick_settings(manifest, run_dir, **{"train__epochs": 1, "data__cache_dir": cache, **changes})


def result(run_dir: Path) -> tuple[dict[int, float], dict[str, object], dict[str, bytes]]:
    """Losses, evaluation and the last checkpoint's tensors of a run."""
    evaluation = read_evaluation(run_dir)
    newest = store.load(run_dir / "checkpoints")
    assert newest is not None
    return read_losses(run_dir), evaluation, {name: tensor.numpy().tobytes() for name, tensor in newest.tensors.items()}


def test_run_from_http_shards_is_bit_equal_to_local_and_reads_each_shard_once(blobs: Path, tmp_path: Path) -> None:
    assert run_here(settings(blobs, tmp_path / "here", tmp_path / "cache")) == 0
    assert not (tmp_path / "cache").exists()
    with FileServer(blobs.parent, Behaviour(0.01, every(10))) as server:
        assert run_here(settings(server.url, tmp_path / "there", tmp_path / "cache")) == 0
        here, there = result(tmp_path / "here"), result(tmp_path / "there")
        assert here == there
        assert {path: count - server.failures[path] for path, count in server.gets.items()} == dict.fromkeys(server.gets, 1)
        # The same command again, and an evaluation, read the manifest alone.
        before = server.gets.total()
        assert run_here(settings(server.url, tmp_path / "there", tmp_path / "cache")) == 0
        assert server.gets.total() - before <= 2
        arguments = ["evaluate", str(tmp_path / "there"), "--split", "val", "--manifest", server.url]
        with without_figures():
            assert main(arguments) == 0
    evaluation = json.loads((tmp_path / "there" / "evaluation" / "val.json").read_text())
    assert evaluation["count"] == 24


@pytest.mark.slow
@pytest.mark.multiprocess
def test_signal_ends_an_evaluation_of_a_finished_run(blobs: Path, tmp_path: Path) -> None:
    asked = threading.Event()

    def never(path: str, _number: int) -> Trouble:
        if not path.startswith("test"):
            return None
        asked.set()
        return 503

    with FileServer(blobs.parent) as server:
        assert run_here(settings(server.url, tmp_path / "run", tmp_path / "cache")) == 0
        shutil.rmtree(tmp_path / "run" / "evaluation")
        server.behaviour.trouble = never
        again = settings(server.url, tmp_path / "run", tmp_path / "other_cache")
        with forked(train, again, folder=tmp_path / "log") as run:
            assert asked.wait(200)
            os.kill(run.pids[0], signal.SIGTERM)
            assert run.wait() == [-signal.SIGTERM], run.text("err")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_ranks_on_one_node_download_each_http_shard_once(blobs: Path, tmp_path: Path) -> None:
    with FileServer(blobs.parent, Behaviour(trouble=every(10))) as server:
        done = run_forked(train, settings(server.url, tmp_path / "there", tmp_path / "cache"), size=2)
        assert done.returncode == 0, done.stderr
    assert read_evaluation(tmp_path / "there")["count"] == 24
    asked = {path: count - server.failures[path] for path, count in server.gets.items()}
    assert asked.pop("manifest.json") == 2
    assert asked == dict.fromkeys(asked, 1) and {path.name for path in blobs.parent.glob("*.tar")} <= asked.keys()


def test_run_with_unusable_http_shards_or_cache_is_refused_with_one_message(
    blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(url: str, **changes: object) -> str:
        capsys.readouterr()
        assert run_here(settings(url, tmp_path / "run", tmp_path / "cache", **changes)) == 2
        error = capsys.readouterr().err
        assert error.count("galaxydist: error: ") == 1 and "Traceback" not in error
        return error

    served = shutil.copytree(blobs.parent, tmp_path / "served")
    with FileServer(served) as server:
        assert "no shards: " in refused(f"{server.address}/elsewhere/manifest.json")
        assert "set data.cache_size=" in refused(server.url, data__cache_size=1e-6)
        (served / "train-000001.tar").unlink()
        assert f"shard {server.address}/train-000001.tar is missing" in refused(server.url)
        server.behaviour = Behaviour(trouble=lambda path, _number: 403 if path.endswith(".tar") else None)
        assert "is denied" in refused(server.url, data__cache_dir=tmp_path / "other")
    assert "ftp://" in refused("ftp://somewhere/manifest.json")
    assert not (tmp_path / "run" / "result.json").exists()


def test_data_check_of_http_shards_finds_damage_without_storing_them(
    blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    served = shutil.copytree(blobs.parent, tmp_path / "served")
    first = "train-000000.tar"
    trouble = lambda path, number: 503 if number == 1 and path.endswith(first) else None  # noqa: E731
    with FileServer(served, Behaviour(trouble=trouble)) as server:
        command = ["data", "check", server.url, "--data-dir", str(tmp_path / "data")]
        assert main(command) == 0
        server.behaviour = Behaviour(trouble=lambda path, number: "corrupt" if number == 3 and path.endswith(first) else None)
        assert main(command) == 0  # a byte that the network changed is no problem of the shards
        assert f"120 galaxies in 9 shards ({server.url})" in capsys.readouterr().out
        assert not list((tmp_path / "data").rglob("*.tar"))
        with (served / "train-000001.tar").open("r+b") as file:
            file.seek(600)
            file.write(b"\1" * 20)
        (served / "val-000000.tar").unlink()
        assert main(command) == 2
    error = capsys.readouterr().err
    assert f"{server.address}/train-000001.tar" in error and f"{server.address}/val-000000.tar does not exist" in error
