"""The loaders' benchmark: the command as users run it, in a small run; and that it would notice loaders that are not alike."""

import dataclasses
import json
import multiprocessing
import os
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from galaxydist.bench.loader_processes import GALAXYDIST, PEERS, Loader, Processes, check, prepare
from galaxydist.bench.loader_speed import RepeatedShards, lengthen, repeat_source
from galaxydist.bench.loader_worker import BATCH_SIZE, LoaderJob, stored_jpegs
from galaxydist.bench.peers.imagefolder import prepare as write_folder
from galaxydist.cli.main import main
from galaxydist.errors import EXIT_BAD_INPUT, UserError
from galaxydist.loading.decode import ImageDecoder
from galaxydist.shards.manifest import Manifest, read_manifest
from galaxydist.shards.writer.writer import write_shards
from tests.helpers.forked_runs import run_forked
from tests.helpers.shard_surveys import MemorySurvey, as_jpeg, draw_galaxies

ROOT = Path(__file__).parents[2]
IMAGEFOLDER = PEERS[0]
KEYS = {"task", "ours", "peers", "limit", "ratio_best_peer", "ratio_limit"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    survey = MemorySurvey(tuple(as_jpeg(galaxy) for galaxy in draw_galaxies(160)))
    return write_shards(survey, tmp_path_factory.mktemp("source") / "shards", shard_size=32, workers=1)


def repeated(source: Manifest, root: Path) -> Manifest:
    return repeat_source(source, root, num_images=256, least=1, shard_size=64, workers=1)


def job_on(manifest: Manifest, loader: Loader, **changes: Any) -> LoaderJob:
    job = LoaderJob(
        action="check",
        task="decode",
        shards_dir=str(manifest.dir),
        form_dir=str(manifest.dir.parent / loader.name),
        ours=False,
        cores=tuple(os.sched_getaffinity(0)),
        workers=1,
        warmup=1,
        batches=1,
        image_size=24,
        mean=manifest.channel_mean,
        std=manifest.channel_std,
        shard_size=64,
    )
    return dataclasses.replace(job, **changes)


def do_job(module: str, job: str) -> None:
    """What ``python -m MODULE JOB`` does, in a process that has torch loaded."""
    sys.argv = [module, job]
    multiprocessing.set_start_method("fork", force=True)  # as in a new interpreter
    runpy.run_module(module, run_name="__main__")


class Forked(Processes):
    """The same loaders in forked processes: a new interpreter takes seconds before it can read."""

    def run(self, loader: Loader, job: LoaderJob) -> dict[str, Any]:
        done = run_forked(do_job, loader.module, job.to_json())
        assert done.returncode == 0, done.stderr[-3000:]
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer


def run_quick(root: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """What the command prints, and its lines of JSON by task: the last lines."""
    assert main(["bench", "loader", "--quick", "--workers", "1", "--data-dir", str(root), *arguments]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("{"))
    results = [json.loads(line) for line in lines[first:]]
    assert all(result.keys() >= KEYS for result in results)
    return text, {result["task"]: result for result in results}


# Takes half a minute; that the loaders read alike is checked in CI.
@pytest.mark.nightly
@pytest.mark.multiprocess
def test_bench_loader_measures_all_tasks_against_imagefolder_and_webdataset(
    source: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peers = {"imagefolder", "webdataset"}
    named = (*sorted(peers), "litdata")
    arguments = ("--data", str(source.path), "--peers", *named, "--environments", str(tmp_path), "--in-place")
    text, results = run_quick(tmp_path, capsys, *arguments)
    assert f"not measured, since not installed in {tmp_path} (`make bench` does, `make dali` for DALI): LitData" in text
    assert "limit: the decoder over bytes in memory" in text
    assert [*results] == ["decode", "train", "resume", "memory"]
    for task in ("decode", "train"):
        speeds = results[task]
        assert speeds["peers"].keys() == peers and min(speeds["peers"].values()) > 0
        assert speeds["in_place"].keys() == {"tars in place, one size", "tars in place, any size"}
        assert speeds["ratio_best_peer"] == pytest.approx(speeds["ours"] / max(speeds["peers"].values()), rel=2e-3)
    decode = results["decode"]
    assert decode["ours"] > 0 and decode["ratio_limit"] == pytest.approx(decode["ours"] / decode["limit"], rel=2e-3)
    assert results["decode"]["peers_with_our_decoder"].keys() == peers
    assert results["resume"]["num_images"] >= 100_000
    assert len(results["memory"]["series_mb"]) == 10
    assert "every loader gives each galaxy once an epoch, equal to ours within" in text


@pytest.mark.nightly
@pytest.mark.multiprocess
def test_bench_loader_measures_every_installed_peer(source: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peers, processes = [peer for peer in PEERS if not peer.needs_gpu], Processes(ROOT, os.environ)
    if not all(processes.python(peer) for peer in peers):
        pytest.skip("the other loaders are not installed: make bench dali")
    arguments = ("--data", str(source.path), "--tasks", "train", "--environments", str(ROOT))
    _, results = run_quick(tmp_path, capsys, *arguments)
    assert results["train"]["peers"].keys() == {peer.name for peer in peers}


@pytest.mark.gpu
@pytest.mark.multiprocess
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_bench_loader_measures_dali_against_our_batches_on_the_gpu(
    source: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dali = next(peer for peer in PEERS if peer.needs_gpu)
    environments = ROOT if Processes(ROOT, os.environ).python(dali) else tmp_path
    arguments = ("--data", str(source.path), "--tasks", "decode", "train", "--environments", str(environments))
    text, results = run_quick(tmp_path, capsys, "--peers", "dali-gpu", *arguments)
    if environments == tmp_path:
        pytest.skip("DALI is not installed: make dali")
    assert "equal to ours within" in text and "galaxydist, batches on the GPU" in text
    assert all(results[task]["on_gpu"].keys() == {"galaxydist on the GPU", "dali-gpu"} for task in ("decode", "train"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bench_loader_refuses_dali_without_a_gpu_and_writes_no_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "loader", "--data-dir", str(tmp_path), "--peers", "dali-gpu"]) == EXIT_BAD_INPUT
    assert "DALI, mixed decoder needs a GPU, and torch finds none: name other loaders with --peers" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.multiprocess
def test_loader_check_refuses_peers_with_other_pixels_or_missing_images(source: Manifest, tmp_path: Path) -> None:
    """And what was made of other images is made anew."""
    manifest = repeated(source, tmp_path)
    num_images = manifest.split("train").num_samples
    job, processes = job_on(manifest, IMAGEFOLDER), Forked(tmp_path, os.environ)
    prepare(processes, IMAGEFOLDER, job, "older images")
    files = sorted(job.form.glob("*/*.jpg"))
    assert len(files) == num_images
    files[0].unlink()
    prepare(processes, IMAGEFOLDER, job, "these images")
    assert check(processes, IMAGEFOLDER, job, num_images) == 0
    assert check(processes, GALAXYDIST, job_on(manifest, GALAXYDIST), num_images) == 0
    first = files[0].read_bytes()
    files[0].write_bytes(next(data for data in map(Path.read_bytes, files) if data != first))
    prepare(processes, IMAGEFOLDER, job, "these images")
    with pytest.raises(UserError, match=re.escape(f"gives other images than galaxydist: galaxy {files[0].stem} differs by")):
        check(processes, IMAGEFOLDER, job, num_images)
    files[0].write_bytes(first)
    files[1].unlink()
    with pytest.raises(UserError, match=f"gives {num_images - 1} images in an epoch of {num_images}: 1 are missing"):
        check(processes, IMAGEFOLDER, job, num_images)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "loader", [GALAXYDIST, pytest.param(IMAGEFOLDER, marks=pytest.mark.nightly)], ids=lambda loader: loader.name
)
def test_every_loader_passes_the_check_in_its_own_process(loader: Loader, source: Manifest, tmp_path: Path) -> None:
    manifest = repeated(source, tmp_path)
    job, processes = job_on(manifest, loader), Processes(tmp_path, os.environ)
    if loader is IMAGEFOLDER:
        write_folder(job)
    assert check(processes, loader, job, manifest.split("train").num_samples) == 0


@pytest.mark.multiprocess
@pytest.mark.slow
def test_failing_loader_process_is_reported_with_its_last_output(tmp_path: Path, source: Manifest) -> None:
    job = job_on(source, GALAXYDIST, shards_dir=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"galaxydist failed to check \(decode\); its last output: .*nowhere"):
        Processes(tmp_path, os.environ).run(GALAXYDIST, job)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--data", "nowhere/manifest.json"], "no shards at nowhere/manifest.json"),
        (["--real", "nowhere"], "no folder at nowhere"),
        (["--workers", "100000"], "--workers 100000 is more than the"),
        (["--images", "64"], "--images 64 is too few to time"),
    ],
)
def test_bench_loader_refuses_unusable_arguments_and_writes_no_files(
    arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "loader", "--data-dir", str(tmp_path), *arguments]) == EXIT_BAD_INPUT
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_bench_loader_refuses_png_shards(blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "loader", "--data-dir", str(tmp_path), "--data", str(blobs)]) == EXIT_BAD_INPUT
    assert "holds png images, and loaders are compared on JPEG" in capsys.readouterr().err


def test_repeated_source_has_the_same_bytes_under_distinct_keys(source: Manifest, tmp_path: Path) -> None:
    originals = {image.key: image for image in stored_jpegs(source.dir)}
    manifest = repeated(source, tmp_path)
    copies = list(stored_jpegs(manifest.dir))
    assert len({image.key for image in copies}) == len(copies) == manifest.split("train").num_samples
    times = len(copies) // len(originals)
    assert times >= 2
    for image in copies:
        key, _, copy = image.key.rpartition("-")
        assert int(copy) < times
        assert (image.data, image.label) == (originals[key].data, originals[key].label)


def test_repeated_shards_are_cut_to_the_requested_count(source: Manifest) -> None:
    few = RepeatedShards(source.dir, "few", source.class_names, source.hash, count=10, times=1)
    whole = [image.key for image in stored_jpegs(source.dir)]
    assert [galaxy.id for galaxy in few.read(0, 10)] == [f"{key}-0" for key in whole[:10]]
    assert len(few.labels) == 10
    assert dataclasses.replace(few, times=2).source_hash != few.source_hash


def test_lengthened_manifest_repeats_images_without_copying_shards(source: Manifest, tmp_path: Path) -> None:
    long = lengthen(source, tmp_path / "long", 20_000)
    split = long.split("train")
    assert split.num_samples >= 20_000
    assert split.class_counts == tuple(np.bincount(long.labels("train"), minlength=long.num_classes))
    assert long.shard_path("train", 0).samefile(source.shard_path("train", 0))
    originals = {image.data for image in stored_jpegs(source.dir)}
    reader = ImageDecoder(long, "train")
    for shard, _, offset, length in reader.locate(np.linspace(0, split.num_samples - 1, 50).astype(np.int64)):
        assert long.shard_path("train", shard).read_bytes()[offset : offset + length] in originals
    reader.close()
    kept = long.path.stat().st_mtime_ns
    assert lengthen(source, tmp_path / "long", 20_000).path.stat().st_mtime_ns == kept
    assert lengthen(source, tmp_path / "long", 40_000).split("train").num_samples >= 40_000
    assert read_manifest(tmp_path / "long").split("train").num_samples >= 40_000


def test_loader_job_survives_json_serialisation(source: Manifest) -> None:
    job = job_on(source, IMAGEFOLDER, step=3)
    assert LoaderJob.from_json(job.to_json()) == job
    assert job.batch_size == BATCH_SIZE
