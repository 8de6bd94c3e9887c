"""Training and evaluation on damaged shards: what is skipped is counted, everything else stops all processes with one message."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from torch import nn

from galaxydist.checkpoints import store
from galaxydist.cli.main import main as galaxydist
from galaxydist.distributed import World
from galaxydist.errors import UserError
from galaxydist.loading.loader import BufferPool
from galaxydist.mixed_precision import MixedPrecision
from galaxydist.runs.folder import RunFolder
from galaxydist.shards.manifest import Manifest, read_manifest
from galaxydist.shards.order import EpochOrder
from galaxydist.shards.verify import check_columns
from galaxydist.training.health.anomalies import LossSpikes, NonFiniteSteps, UnreadableImages
from galaxydist.training.resume import EarlyStopping
from galaxydist.training.state import TrainState
from tests.helpers.damage import break_image, shard_of, truncate
from tests.helpers.forked_runs import run_forked, train
from tests.helpers.runs import count_errors, quick_settings, read_evaluation, read_losses, read_metrics, run_here

ROOT = Path(__file__).parents[2]
# Neither batch statistics nor dropout, so that any number of processes computes the same sums.
NOTHING_SHARED = {"model__norm": "group", "model__drop_rate": 0.0, "train__log_every": 1}


@pytest.fixture
def copy(blobs: Path, tmp_path: Path) -> Manifest:
    return read_manifest(shutil.copytree(blobs.parent, tmp_path / "shards"))


def skipped(run_dir: Path) -> dict[int, float]:
    return {line["step"]: line["train/skipped"] for line in read_metrics(run_dir) if "train/skipped" in line}


def one_error(text: str) -> str:
    """The one message of a refused command."""
    assert count_errors(text) == 1, text
    return text[text.index("galaxydist: error: ") :].split("\n", maxsplit=1)[0]


def test_skipped_galaxies_are_counted_once_over_epochs_and_restarts(
    copy: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = [break_image(copy, "train", sample) for sample in (3, 30, 50)]
    run_dir = tmp_path / "run"
    settings = {"train__epochs": 2, "data__on_error": "skip", "data__max_errors": 3, "train__log_every": 1}
    assert run_here(quick_settings(copy.path, run_dir, **settings)) == 0
    told = capsys.readouterr().err
    for shard, key in damaged:
        assert told.count(f"warning: skipped: shard {shard}, galaxy {key}: its image does not decode") == 1
    assert skipped(run_dir)[6] == 3 and sorted(skipped(run_dir).values()) == [*skipped(run_dir).values()]
    assert json.loads((run_dir / "result.json").read_text())["train/skipped"] == 3
    assert read_evaluation(run_dir)["count"] == 24

    (run_dir / "result.json").unlink()
    settings |= {"train__epochs": 4, "resume__force": "[train.epochs]"}
    assert run_here(quick_settings(copy.path, run_dir, **settings)) == 0
    assert "warning:" not in capsys.readouterr().err
    assert skipped(run_dir)[7] == skipped(run_dir)[12] == 3


def test_more_damaged_images_than_max_errors_stop_the_run_and_keep_its_checkpoint(
    copy: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    settings = {"train__epochs": 3, "data__max_errors": 2}
    assert run_here(quick_settings(copy.path, run_dir, **settings | {"train__epochs": 1})) == 0
    (run_dir / "result.json").unlink()
    settings |= {"resume__force": "[train.epochs]"}
    damaged = [break_image(copy, "train", sample) for sample in (3, 30, 50)]
    capsys.readouterr()

    def refused(**changes: object) -> str:
        assert run_here(quick_settings(copy.path, run_dir, **settings | changes)) == 2
        newest = store.load(run_dir / "checkpoints")
        assert newest is not None and newest.step == 3
        return one_error(capsys.readouterr().err)

    error = refused()
    assert any(f"shard {shard}, galaxy {key}: its image does not decode" in error for shard, key in damaged)
    assert "data.on_error=skip" in error
    error = refused(data__on_error="skip")
    assert "3 galaxies could not be read, more than data.max_errors=2; the last: shard" in error
    assert error == refused(data__on_error="skip"), "the same again"
    # Neither key is part of the run's identity: it goes on.
    assert run_here(quick_settings(copy.path, run_dir, **settings | {"data__on_error": "skip", "data__max_errors": 3})) == 0
    assert skipped(run_dir)[9] == 3


@pytest.mark.multiprocess
@pytest.mark.slow
def test_two_processes_skip_the_same_damaged_images_as_one(copy: Manifest, tmp_path: Path) -> None:
    for sample in (3, 30, 50):
        break_image(copy, "train", sample)
    settings = {**NOTHING_SHARED, "train__epochs": 2, "train__batch_size": 36, "data__on_error": "skip"}
    assert run_here(quick_settings(copy.path, tmp_path / "one", **settings)) == 0
    done = run_forked(train, quick_settings(copy.path, tmp_path / "two", **settings), size=2)
    assert done.returncode == 0, done.stderr
    assert "2 processes," in done.stderr and done.stderr.count("warning: skipped: shard") == 3
    assert skipped(tmp_path / "two") == skipped(tmp_path / "one")
    assert [*read_losses(tmp_path / "two").values()] == pytest.approx([*read_losses(tmp_path / "one").values()], rel=1e-4)


@pytest.mark.multiprocess
@pytest.mark.slow
def test_two_processes_stop_for_damaged_images_with_the_same_message_as_one(
    copy: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for sample in (3, 30, 50):
        break_image(copy, "train", sample)
    settings = {**NOTHING_SHARED, "train__epochs": 2, "train__batch_size": 25, "data__on_error": "skip", "data__max_errors": 1}
    capsys.readouterr()
    assert run_here(quick_settings(copy.path, tmp_path / "one-stopped", **settings)) == 2
    done = run_forked(train, quick_settings(copy.path, tmp_path / "two-stopped", **settings), size=2)
    assert done.returncode == 2
    assert one_error(done.stderr) == one_error(capsys.readouterr().err)
    assert skipped(tmp_path / "two-stopped") == skipped(tmp_path / "one-stopped")


@pytest.mark.multiprocess
def test_damaged_validation_image_on_one_rank_stops_all_ranks_with_one_message(copy: Manifest, tmp_path: Path) -> None:
    shard, key = break_image(copy, "val", 11)  # batch 1, and so the second rank's
    settings = {**NOTHING_SHARED, "train__epochs": 1, "data__on_error": "skip"}
    done = run_forked(train, quick_settings(copy.path, tmp_path / "run", **settings), size=2)
    assert done.returncode == 2
    assert f"shard {shard}, galaxy {key}: its image does not decode" in one_error(done.stderr)


@pytest.mark.multiprocess
def test_missing_shard_stops_all_ranks_even_with_on_error_skip(copy: Manifest, tmp_path: Path) -> None:
    missing = shard_of(copy, "train", 20)
    missing.unlink()
    settings = {**NOTHING_SHARED, "train__epochs": 1, "data__on_error": "skip"}
    done = run_forked(train, quick_settings(copy.path, tmp_path / "run", **settings), size=2)
    assert done.returncode == 2
    assert f"shard {missing} is missing; make the shards anew" in one_error(done.stderr)


def test_step_with_only_damaged_images_has_no_loss_and_keeps_weights_finite(copy: Manifest, tmp_path: Path) -> None:
    order = EpochOrder(copy.shards("train")["samples"], seed=0, epoch=0, num_streams=8)
    for sample in order.samples(np.arange(4, 8)).tolist():
        break_image(copy, "train", sample)
    settings = {"train__epochs": 1, "train__batch_size": 4, "train__log_every": 1, "data__on_error": "skip"}
    assert run_here(quick_settings(copy.path, tmp_path / "run", **settings)) == 0
    losses = read_losses(tmp_path / "run")
    assert losses.pop(2) is None and all(np.isfinite([*losses.values()]))
    assert skipped(tmp_path / "run")[18] == 4
    newest = store.load(tmp_path / "run" / "checkpoints")
    assert newest is not None and all(tensor.isfinite().all() for tensor in newest.tensors.values() if tensor.is_floating_point())


def test_checkpoint_without_skipped_images_still_loads(tmp_path: Path) -> None:
    def build() -> TrainState:
        model = nn.Linear(2, 2)
        parts = (
            EarlyStopping("loss", 0),
            UnreadableImages("skip", 9),
            NonFiniteSteps("stop", 0, RunFolder(tmp_path), str),
            LossSpikes(8),
        )
        return TrainState(model, torch.optim.SGD(model.parameters()), None, None, *parts)

    world = World(
        MixedPrecision("no", torch.device("cpu"), {}), 0, 1, ranks_on_node=1, cores=1, threads=1, job_id=None, restart_count=0
    )
    old = build()
    old.skipped.load_state_dict({"samples": [4, 7]})
    tensors, state = old.to_checkpoint(world)
    again = build()
    again.from_checkpoint(world, tensors, state)
    assert len(again.skipped) == 2
    del state["progress"]["skipped"]
    again = build()
    again.from_checkpoint(world, tensors, state)
    assert len(again.skipped) == 0 and torch.equal(again.model.weight, old.model.weight)


def swap_labels(manifest: Manifest) -> str:
    columns = manifest.dir / "columns"
    (columns / "val.labels.npy").rename(columns / "kept.npy")
    (columns / "test.labels.npy").rename(columns / "val.labels.npy")
    (columns / "kept.npy").rename(columns / "test.labels.npy")
    return "labels.npy: its checksum is not the manifest's"


def point_elsewhere(manifest: Manifest) -> str:
    path = manifest.dir / "columns" / "test.offsets.npy"
    offsets = np.load(path)
    np.save(path, offsets[::-1])
    return "test.offsets.npy: its checksum is not the manifest's"


def lose_a_shard(manifest: Manifest) -> str:
    manifest.shard_path("test", 1).unlink()
    return "test-000001.tar"


def cut_a_shard(manifest: Manifest) -> str:
    return f"{truncate(manifest, 'test', 20)}, galaxy blob-"


def cut_an_image(manifest: Manifest) -> str:
    return f"{truncate(manifest, 'test', 20, 40)}, galaxy blob-"


def break_one(manifest: Manifest) -> str:
    return "{}, galaxy {}: ".format(*break_image(manifest, "test", 5))


def newer_format(manifest: Manifest) -> str:
    manifest.path.write_text(manifest.path.read_text().replace('"format_version": 1', '"format_version": 2'))
    return "format version 2"


def no_json(manifest: Manifest) -> str:
    manifest.path.write_text("<html>")
    return "is not a manifest of shards"


def lose_a_column(manifest: Manifest) -> str:
    (manifest.dir / "columns" / "test.lengths.npy").unlink()
    return "test.lengths.npy is missing"


DAMAGES: list[Callable[[Manifest], str]] = [
    swap_labels,
    point_elsewhere,
    lose_a_shard,
    cut_a_shard,
    cut_an_image,
    break_one,
    newer_format,
    no_json,
    lose_a_column,
]


@pytest.fixture(scope="module")
def trained(blobs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that would skip, with its result removed."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    assert run_here(quick_settings(blobs, run_dir, train__epochs=1, data__on_error="skip")) == 0
    shutil.rmtree(run_dir / "evaluation")
    return run_dir


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_test_split_is_refused_by_evaluate_and_found_by_data_check(
    damage: Callable[[Manifest], str], trained: Path, copy: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    where = damage(copy)
    capsys.readouterr()
    assert galaxydist(["evaluate", str(trained), "--manifest", str(copy.path)]) == 2
    error = capsys.readouterr().err
    assert where in error and "Traceback" not in error
    assert [path for path in (trained / "evaluation").rglob("*") if path.is_file()] == []
    assert galaxydist(["data", "check", str(copy.path)]) == 2
    error = capsys.readouterr().err
    assert where.partition(", galaxy")[0] in error and "Traceback" not in error


def test_swapped_image_that_still_decodes_is_found_by_data_check(copy: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    """Local shards are not hashed whenever they are read: an image that was exchanged for another is found here."""
    offsets, lengths = copy.offsets("train"), copy.lengths("train")
    shard = shard_of(copy, "train", 0)
    content = bytearray(shard.read_bytes())
    # The shorter of two neighbours, filled up, in the longer one's place: a PNG may be followed by anything.
    short, long = sorted((0, 1), key=lambda sample: int(lengths[sample]))
    image = bytes(content[offsets[short] : offsets[short] + lengths[short]]).ljust(int(lengths[long]), b"\0")
    content[offsets[long] : offsets[long] + lengths[long]] = image
    shard.write_bytes(content)
    assert galaxydist(["data", "check", str(copy.path)]) == 2
    assert f"shard {shard}: its checksum is not the manifest's" in capsys.readouterr().err


READ_FOREVER = """
import sys
from pathlib import Path
from galaxydist.shards.manifest import read_manifest
from galaxydist.loading.loader import DecodeOptions, TrainLoader

with TrainLoader(read_manifest(Path(sys.argv[1])), seed=0, batch_size=8, decode=DecodeOptions(threads=3)) as reader:
    for batch in reader:
        print(batch.step, flush=True)
"""


@pytest.mark.multiprocess
def test_ctrl_c_during_iteration_ends_the_loader_with_keyboard_interrupt(blobs: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", READ_FOREVER, str(blobs)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
    )
    try:
        assert process.stdout is not None
        while int(process.stdout.readline()) < 20:
            pass
        assert psutil.Process(process.pid).children() == [], "reading needs no other process"
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=120)
        assert error.rstrip().endswith("KeyboardInterrupt")
        assert process.returncode == -signal.SIGINT
    finally:
        process.kill()
        process.wait()


def test_memory_of_a_batch_is_taken_back_without_python_code_that_a_ctrl_c_could_be_lost_in() -> None:
    pool, events = BufferPool(1), list[str]()
    array = pool.take((3, 5), np.uint8)
    address = array.ctypes.data
    sys.setprofile(lambda _frame, event, _argument: events.append(event))
    del array
    sys.setprofile(None)
    assert "call" not in events
    assert pool.take((5,), np.uint8).ctypes.data == address


def test_restart_with_on_error_raise_forgets_skipped_images_and_a_lower_cap_is_refused() -> None:
    """What was skipped before is read again by a run that is to be strict from now on; a lower cap counts at once."""
    state = {"samples": [3, 5, 8]}
    strict = UnreadableImages("raise", 100)
    strict.load_state_dict(state)
    assert len(strict) == 0
    lenient = UnreadableImages("skip", 3)
    lenient.load_state_dict(state)
    assert lenient.metrics() == {"train/skipped": 3.0}
    with pytest.raises(UserError, match=r"3 galaxies could not be read, more than data.max_errors=2 up to the checkpoint"):
        UnreadableImages("skip", 2).load_state_dict(state)


def test_empty_or_missing_column_file_is_refused(copy: Manifest) -> None:
    labels = copy.dir / "columns" / "train.labels.npy"
    content = labels.read_bytes()
    labels.write_bytes(b"")
    with pytest.raises(UserError, match=r"train.labels.npy is damaged"):
        read_manifest(copy.dir)
    labels.write_bytes(content)
    more = replace(copy, columns={**copy.columns, "columns/train.redshifts.npy": "0" * 64})
    with pytest.raises(UserError, match=r"train.redshifts.npy: missing, though the manifest names it"):
        check_columns(more)
