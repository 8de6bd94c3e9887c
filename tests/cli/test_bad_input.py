"""What goes wrong at the start of a run, or in the middle, has a message that says what to do, and loses nothing."""

import re
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from galaxydist.checkpoints import store
from galaxydist.cli.main import main as galaxydist
from galaxydist.shards.manifest import read_manifest
from galaxydist.shards.writer.writer import write_shards
from tests.helpers.blobs import BlobSurvey
from tests.helpers.forked_runs import run_forked, train
from tests.helpers.runs import TORCHRUN_2, count_errors, launch, quick_settings, read_metrics, run_here

HOLD_LOCK = """
import os, sys, time
from pathlib import Path
from galaxydist.runs.lock import RunLock
folder = Path(sys.argv[1])
folder.mkdir()
with RunLock(folder / "lock.json", host=os.uname().nodename, pid=os.getpid(), clock=time.time):
    print("held", flush=True)
    sys.stdin.read()
"""


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run; it is refused as bad input, with one message."""
    capsys.readouterr()
    assert run_here(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("galaxydist: error: ") == 1
    assert "Traceback" not in error
    return error


def test_missing_data_names_the_commands_that_make_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    error = refused(["recipe=resnet18", f"data.dir={tmp_path / 'data'}", f"run.dir={run_dir}"], capsys)
    assert "galaxydist data fetch" in error
    assert "galaxydist data shard --dataset galaxy10_decals --variant original" in error
    error = refused(["recipe=demo", f"data.dir={tmp_path / 'data'}", "data.conflicting=drop", f"run.dir={run_dir}"], capsys)
    assert "galaxydist data simulate" in error and "--conflicting drop" in error
    assert not run_dir.exists()


def test_command_suggested_for_an_unknown_data_set_creates_that_data_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, run_dir = tmp_path / "data", tmp_path / "run"
    for variant in ("balanced", "original"):
        write_shards(BlobSurvey(30), root / "shards" / "mine" / variant, encoding="png", workers=1)
    wanted = ["recipe=custom_cnn", f"data.dir={root}", f"run.dir={run_dir}"]
    assert "did you mean data.dataset=mine?" in refused([*wanted, "data.dataset=mien"], capsys)
    error = refused([*wanted, "data.dataset=nope"], capsys)
    assert "the data root has shards of mine (balanced, original)." in error and not run_dir.exists()

    for number in range(40):
        path = tmp_path / "images" / ("ab"[number % 2]) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(next(BlobSurvey().read(number, number + 1)).image).save(path)
    (command,) = re.findall(r"(?m)^  galaxydist (data shard .*)", error)
    words = shlex.split(command.replace("FOLDER_OR_FILE", shlex.quote(str(tmp_path / "images"))))
    assert galaxydist([*words, "--data-dir", str(root), "--workers", "1"]) == 0
    (place,) = re.findall(r"There are no shards of nope \(original\) at (.*?);", error)
    assert read_manifest(Path(place)).class_names == ("a", "b")


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"train__micro_batch": 1}, "Use train.micro_batch=2 or more."),
        ({"train__micro_batch": 2, "train__batch_size": 3}, "Use train.micro_batch=3 or more."),
        ({"train__batch_size": 1}, "Use train.batch_size=2 or more."),
    ],
    ids=["micro-batch", "remainder", "share"],
)
def test_micro_batch_of_one_image_is_refused_where_batch_norm_cannot_normalise(
    changes: Mapping[str, object], remedy: str, blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"recipe": "resnet18", "model__width": None, **changes}
    error = refused(quick_settings(blobs, tmp_path / "run", **settings), capsys)
    assert "resnet18 at data.image_size=32" in error and remedy in error
    assert not (tmp_path / "run").exists()


def test_batch_size_above_the_number_of_training_galaxies_is_refused(
    blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(quick_settings(blobs, tmp_path / "run", train__batch_size=73), capsys)
    assert "train.batch_size=73" in error and "72 training galaxies" in error
    assert not (tmp_path / "run").exists()


@dataclass(frozen=True)
class WithoutPairs(BlobSurvey):
    """No pair is in the training split."""

    @property
    def splits(self) -> Mapping[str, NDArray[np.int64]]:
        return {**super().splits, "train": super().splits["train"][self.labels[super().splits["train"]] != 2]}


def test_a_class_without_training_galaxies_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = write_shards(WithoutPairs(), tmp_path / "shards", encoding="png", workers=1)
    error = refused(quick_settings(manifest.path, tmp_path / "run"), capsys)
    assert "no training galaxies of pair" in error
    assert not (tmp_path / "run").exists()


def test_an_unknown_optimizer_is_refused_with_the_list(blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(quick_settings(blobs, tmp_path / "run", optim__name="adopt"), capsys)
    assert "optim.name=adopt: there is no such optimizer. There are adamw, sgd, lamb, lion, muon, adan." in error
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_fp16_without_a_gpu_is_refused(blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(quick_settings(blobs, tmp_path / "run", train__precision="fp16"), capsys)
    assert "needs a GPU" in error and "train.precision=auto" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.multiprocess
def test_more_processes_than_images_in_the_global_batch_are_refused(blobs: Path, tmp_path: Path) -> None:
    done = run_forked(train, quick_settings(blobs, tmp_path / "run", train__batch_size=1), size=2)
    assert done.returncode == 2
    assert count_errors(done.stderr) == 1
    assert "2 processes are more than the global batch holds" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_torchrun_output_ends_with_one_message_about_a_wrong_key(blobs: Path, tmp_path: Path) -> None:
    done = launch(TORCHRUN_2, [*quick_settings(blobs, tmp_path / "run"), "optim.lrr=1"])
    assert done.returncode != 0
    assert count_errors(done.stderr) == 1
    last = "".join(done.stderr.rstrip().splitlines()[-3:])
    assert "galaxydist: error" in last and "did you mean optim.lr?" in last
    assert not (tmp_path / "run").exists()


def test_run_folder_locked_by_a_live_process_is_refused_and_unchanged(
    blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    command, pipe = [sys.executable, "-c", HOLD_LOCK, str(run_dir)], subprocess.PIPE
    holder = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        before = sorted(run_dir.iterdir())
        error = refused(quick_settings(blobs, run_dir), capsys)
        assert f"process {holder.pid}" in error and "run.dir=" in error
        assert sorted(run_dir.iterdir()) == before
    finally:
        holder.kill()
        holder.communicate()
    # Its holder is dead now: the folder is free at once.
    assert run_here(quick_settings(blobs, run_dir, train__epochs=1)) == 0


def test_continuing_a_run_with_another_recipe_or_other_shards_is_refused(
    blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert run_here(quick_settings(blobs, run_dir, train__epochs=1)) == 0
    (run_dir / "result.json").unlink()
    error = refused(quick_settings(blobs, run_dir, train__epochs=2), capsys)
    assert "train.epochs: 1 in the run folder, 2 now" in error and "resume.force=[train.epochs]" in error
    other = write_shards(BlobSurvey(num_galaxies=90, source_hash="1" * 64), tmp_path / "other", encoding="png", workers=1)
    error = refused(quick_settings(other.path, run_dir, train__epochs=1, resume__force="[data.manifest]"), capsys)
    assert "other shards" in error
    # What changes no number may change freely, and a forced key is taken.
    assert run_here(quick_settings(blobs, run_dir, train__epochs=2, resume__force="[train.epochs]", data__threads=1)) == 0
    newest = store.load(run_dir / "checkpoints")
    assert newest is not None and newest.step == 6


def test_truncated_shard_stops_the_run_with_a_message_naming_shard_and_galaxy(
    blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(blobs.parent, shards)
    manifest = read_manifest(shards)
    shard = manifest.shard_path("train", 1)
    shard.write_bytes(shard.read_bytes()[:5000])
    error = refused(quick_settings(manifest.path, tmp_path / "run"), capsys)
    assert shard.name in error and "blob-" in error
    assert not (tmp_path / "run" / "result.json").exists()


def test_nonfinite_loss_exits_with_1_and_writes_no_checkpoint_or_result(
    blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    options = {"train__clip_norm": 0, "optim__name": "sgd", "optim__warmup": 0.0}
    assert run_here(quick_settings(blobs, run_dir, train__epochs=1, **options)) == 0
    (run_dir / "result.json").unlink()
    kept = store.list_checkpoints(run_dir / "checkpoints")
    forced = {"optim__lr": 1e35, "train__epochs": 2, "resume__force": "[optim.lr, train.epochs]"}
    assert run_here(quick_settings(blobs, run_dir, **options, **forced)) == 1
    assert "is not a number" in capsys.readouterr().err
    assert store.list_checkpoints(run_dir / "checkpoints") == kept != []
    newest = store.load(run_dir / "checkpoints")
    assert newest is not None and newest.step == 3
    assert all(torch.isfinite(tensor).all() for tensor in newest.tensors.values() if tensor.is_floating_point())
    assert not (run_dir / "result.json").exists()


@pytest.mark.multiprocess
@pytest.mark.slow
def test_checkpoint_over_the_file_size_limit_stops_2_processes_with_one_message(blobs: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    settings = quick_settings(blobs, run_dir, train__epochs=400, train__save_steps=5)
    done = run_forked(train_with_small_files, settings, size=2)
    assert done.returncode == 2
    assert count_errors(done.stderr) == 1 and "the file size limit is reached" in done.stderr
    assert not list((run_dir / "checkpoints").glob("*"))
    assert read_metrics(run_dir)[-1]["step"] < 40  # it did not go on without


def train_with_small_files(settings: list[str]) -> int:
    """The largest file of a checkpoint does not fit; everything else does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    return train(settings)
