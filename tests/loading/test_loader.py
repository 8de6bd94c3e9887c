"""Reading: the right images at the right positions, whatever the number of processes; errors that name their galaxy."""

import errno
import os
import re
import shutil
import threading
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch

from galaxydist.cpus import available_cores
from galaxydist.errors import UserError
from galaxydist.galaxy import EncodedImage, Galaxy
from galaxydist.loading.decode import ImageDecoder, ImageError, reduction
from galaxydist.loading.loader import Batch, Chunks, DecodeOptions, EvalLoader, RankInfo, TrainLoader
from galaxydist.shards.manifest import Manifest, read_manifest
from galaxydist.shards.order import EpochOrder
from galaxydist.shards.writer.writer import write_shards
from tests.helpers.damage import break_image, keys, truncate
from tests.helpers.shard_surveys import MemorySurvey, as_jpeg, draw_galaxies

SURVEY = MemorySurvey(tuple(as_jpeg(galaxy) for galaxy in draw_galaxies(120)))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(SURVEY, tmp_path_factory.mktemp("written") / "shards", shard_size=8).dir


@pytest.fixture(scope="module")
def manifest(written: Path) -> Manifest:
    return read_manifest(written)


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Manifest:
    return read_manifest(shutil.copytree(written, tmp_path / "shards"))


def read(manifest: Manifest, steps: int, **settings: object) -> list[Batch]:
    with TrainLoader(manifest, **{"seed": 7, "batch_size": 16, "num_streams": 6, **settings}) as reader:  # type: ignore[arg-type]
        return list(islice(reader, steps))


def decode_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("galaxydist-decode")]


def test_train_loader_batches_follow_the_epoch_order(manifest: Manifest) -> None:
    galaxies = {galaxy.id: galaxy for galaxy in SURVEY.galaxies}
    stored = keys(manifest, "train")
    num_steps = manifest.splits["train"].num_samples // 16
    for step, batch in enumerate(read(manifest, 2 * num_steps)):
        assert (batch.epoch, batch.step) == (step // num_steps, step)
        order = EpochOrder(manifest.shards("train")["samples"], seed=7, epoch=batch.epoch, num_streams=6)
        positions = step % num_steps * 16 + np.arange(16)
        assert batch.positions_B.tolist() == positions.tolist()
        assert batch.samples_B.tolist() == order.samples(positions).tolist()
        assert batch.weights_B.tolist() == [1.0] * 16
        for row, sample in enumerate(batch.samples_B.tolist()):
            galaxy = galaxies[stored[sample]]
            assert batch.labels_B[row] == galaxy.label
            assert np.array_equal(batch.images_BHWC[row], simplejpeg.decode_jpeg(galaxy.image.data))
    assert batch.images_BHWC.dtype == torch.uint8
    assert batch.weights_B.dtype == torch.float32
    assert batch.labels_B.dtype == batch.positions_B.dtype == batch.samples_B.dtype == torch.int64


@pytest.mark.parametrize("encoding", ["png", "raw"])
def test_other_encodings_give_the_source_pixels(tmp_path: Path, encoding: str) -> None:
    survey = MemorySurvey(draw_galaxies(40))
    manifest = write_shards(survey, tmp_path / "shards", encoding=encoding, shard_size=8)
    pixels = {galaxy.id: galaxy.image for galaxy in survey.galaxies}
    stored = keys(manifest, "train")
    for batch in read(manifest, 1, batch_size=manifest.splits["train"].num_samples, decode=DecodeOptions(image_size=8)):
        for row, sample in enumerate(batch.samples_B.tolist()):
            assert np.array_equal(batch.images_BHWC[row], pixels[stored[sample]])


@pytest.mark.parametrize("world_size", [2, 3, 5, 16])
@pytest.mark.parametrize("balance", ["none", "resample"])
def test_ranks_of_the_train_loader_share_each_global_batch(manifest: Manifest, world_size: int, balance: str) -> None:
    alone = read(manifest, 6, balance=balance)
    ranks = [read(manifest, 6, balance=balance, ranks=RankInfo(rank, world_size)) for rank in range(world_size)]
    for step, whole in enumerate(alone):
        for rank in range(world_size):
            part = ranks[rank][step]
            mine = np.arange(rank, 16, world_size)
            assert part.samples_B.tolist() == whole.samples_B[mine].tolist()
            assert torch.equal(part.images_BHWC, whole.images_BHWC[mine])


def test_train_loader_started_at_a_step_reads_no_earlier_images(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read(manifest, 12)
    located: list[int] = []
    read_images = ImageDecoder.read

    def recorded(self: ImageDecoder, samples: np.ndarray, *arguments: Any) -> object:
        located.extend(samples.tolist())
        return read_images(self, samples, *arguments)

    monkeypatch.setattr(ImageDecoder, "read", recorded)
    late = read(manifest, 3, start_step=9, decode=DecodeOptions(prefetch=1))
    assert [batch.step for batch in late] == [9, 10, 11]
    for batch, expected in zip(late, whole[9:], strict=True):
        assert torch.equal(batch.images_BHWC, expected.images_BHWC)
        assert torch.equal(batch.positions_B, expected.positions_B)
    assert sorted(located[:16]) == sorted(whole[9].samples_B.tolist())


def test_closed_loader_leaves_no_decode_thread(manifest: Manifest) -> None:
    reader = TrainLoader(manifest, seed=0, batch_size=8, decode=DecodeOptions(threads=3))
    next(reader)
    assert decode_threads()
    reader.close()
    reader.close()
    assert decode_threads() == []
    with pytest.raises(StopIteration):
        next(reader)
    for _ in EvalLoader(manifest, "val", batch_size=4):
        pass
    assert decode_threads() == []


def test_train_loader_prefetches_across_the_end_of_an_epoch(manifest: Manifest) -> None:
    with TrainLoader(manifest, seed=0, batch_size=8, decode=DecodeOptions(prefetch=3)) as reader:
        for batch in reader:
            ahead = [(pending.plan.epoch, pending.plan.step) for pending in reader._pending]
            # Always as far ahead, at the epoch's end too: nothing is drained.
            assert ahead == [(step // reader.steps_per_epoch, step) for step in range(batch.step + 1, batch.step + 4)]
            if batch.step == 2 * reader.steps_per_epoch + 1:
                break


def test_train_loader_reuses_buffers_but_never_while_in_use(manifest: Manifest) -> None:
    reader = TrainLoader(manifest, seed=0, batch_size=8, decode=DecodeOptions(prefetch=2))
    kept = next(reader).images_BHWC[3]
    copied = kept.clone()
    places = set()
    for _ in range(60):
        places.add(next(reader).images_BHWC.data_ptr())
    reader.close()
    assert torch.equal(kept, copied)
    assert len(places) <= 6


def test_train_loader_counts_only_its_own_waiting_time(manifest: Manifest) -> None:
    with TrainLoader(manifest, seed=0, batch_size=8, decode=DecodeOptions(prefetch=2)) as reader:
        next(reader)
        waited, started = reader.wait_s, time.perf_counter()
        time.sleep(0.1)  # this process's own time, not that of waiting
        next(reader)
        assert 0 < reader.wait_s - waited <= time.perf_counter() - started - 0.1


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_counts_every_galaxy_once(manifest: Manifest, world_size: int) -> None:
    num_samples = manifest.splits["test"].num_samples
    seen: list[int] = []
    for rank in range(world_size):
        with EvalLoader(manifest, "test", batch_size=8, ranks=RankInfo(rank, world_size)) as reader:
            batches = list(reader)
            assert len(batches) == len(reader)
        for batch in batches:
            assert batch.step % world_size == rank
            assert batch.images_BHWC.shape == (8, 32, 32, 3)
            real = batch.weights_B > 0
            assert torch.equal(real, batch.samples_B >= 0)
            assert batch.images_BHWC[~real].sum() == 0
            assert batch.labels_B[real].tolist() == manifest.labels("test")[batch.samples_B[real].numpy()].tolist()
            seen += batch.samples_B[real].tolist()
    assert sorted(seen) == list(range(num_samples))


def test_damaged_image_raises_in_the_consumer_naming_shard_and_galaxy(copy: Manifest) -> None:
    shard, key = break_image(copy, "train", 20)
    with pytest.raises(UserError) as error:
        read(copy, 10)
    assert f"shard {shard}, galaxy {key}: its image does not decode" in str(error.value)
    assert "data.on_error=skip" in str(error.value)
    assert decode_threads() == []


def test_damaged_image_reported_by_the_loader_has_weight_0_at_its_position(copy: Manifest, manifest: Manifest) -> None:
    shard, key = break_image(copy, "train", 20)
    steps = copy.splits["train"].num_samples // 16
    whole, skipped = read(manifest, 2 * steps), read(copy, 2 * steps, on_error="report")
    hit = 0
    for expected, batch in zip(whole, skipped, strict=True):
        assert torch.equal(expected.samples_B, batch.samples_B)
        bad = batch.samples_B == 20
        hit += int(bad.sum())
        assert torch.equal(batch.weights_B, (~bad).float())
        assert batch.images_BHWC[bad].sum() == 0
        assert torch.equal(batch.images_BHWC[~bad], expected.images_BHWC[~bad])
        assert batch.errors.keys() == {*batch.samples_B[bad].tolist()}
        assert all(f"shard {shard}, galaxy {key}: " in str(error) for error in batch.errors.values())
    assert hit >= 1


def test_eval_loader_raises_for_a_damaged_image(copy: Manifest) -> None:
    _, key = break_image(copy, "test", 3)
    with pytest.raises(UserError, match=f"galaxy {key[:6]}.*does not decode"):
        list(EvalLoader(copy, "test", batch_size=8))
    assert decode_threads() == []


@pytest.mark.parametrize("num_bytes", [0, 5], ids=["between two images", "in an image"])
def test_truncated_shard_raises_naming_the_shard_and_a_lost_galaxy(copy: Manifest, num_bytes: int) -> None:
    shard = truncate(copy, "test", 3, num_bytes)
    with pytest.raises(UserError, match=rf"shard {shard}, galaxy g-.*where the manifest says \d+: it was truncated or replaced"):
        list(EvalLoader(copy, "test", batch_size=8))
    assert decode_threads() == []


def test_shard_truncated_while_being_read_raises_naming_the_galaxy(copy: Manifest) -> None:
    reader, pixels = ImageDecoder(copy, "test"), np.empty((4, 32, 32, 3), np.uint8)
    assert reader.read(np.arange(4), pixels) == {}
    whole = pixels.copy()
    truncate(copy, "test", 3, 5)
    for samples in ([0, 1, 2, 3], [2, 0, 3, 1]):  # read at once, and each alone
        (row,) = errors = reader.read(np.array(samples), pixels)
        assert samples[row] == 3 and isinstance(errors[row], ImageError) and not pixels[row].any()
        assert re.search(f"galaxy {keys(copy, 'test')[3][:6]}.*the shard is truncated", str(errors[row]))
        assert all(np.array_equal(pixels[at], whole[sample]) for at, sample in enumerate(samples) if sample != 3)
    reader.close()


def test_neighbours_in_a_shard_are_read_at_once_and_a_failed_read_is_repeated_for_each(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths, pread, fails = manifest.lengths("train").tolist(), os.pread, False
    calls: list[int] = []

    def counted(descriptor: int, length: int, offset: int) -> bytes:
        calls.append(length)
        if fails and length not in lengths:
            raise OSError(errno.EIO, "Input/output error")
        return pread(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", counted)
    reader, pixels = ImageDecoder(manifest, "train"), np.empty((2, 16, 32, 32, 3), np.uint8)
    samples = np.arange(16)
    num_shards = np.unique(np.searchsorted(np.cumsum(manifest.shards("train")["samples"]), samples, side="right")).size
    assert reader.read(samples, pixels[0]) == {} and len(calls) == num_shards < 16
    calls.clear()
    fails = True
    assert reader.read(samples, pixels[1]) == {} and np.array_equal(*pixels)
    assert sorted(length for length in calls if length in lengths) == sorted(lengths[:16])
    monkeypatch.setattr("galaxydist.loading.decode.MOST_BYTES", 1)
    calls.clear()
    assert reader.read(samples, pixels[1]) == {} and calls == lengths[:16]
    reader.close()


def test_shard_stays_open_while_a_thread_reads_it_though_others_take_its_place(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("galaxydist.shards.remote.prefetcher.MAX_OPEN", 1)
    read(manifest, 40, decode=DecodeOptions(threads=8))


def test_missing_shard_is_refused_or_reported_for_each_of_its_images(copy: Manifest) -> None:
    copy.shard_path("train", 2).unlink()
    with pytest.raises(UserError, match=r"shard .*train-000002.tar is missing; make the shards anew"):
        read(copy, 10)
    reported = [error for batch in read(copy, 4, on_error="report") for error in batch.errors.values()]
    assert len(reported) == copy.shards("train")["samples"][2] and not any(isinstance(error, ImageError) for error in reported)


def test_raw_shards_that_are_truncated_or_overwritten_are_refused(tmp_path: Path) -> None:
    manifest = write_shards(MemorySurvey(draw_galaxies(40)), tmp_path / "shards", encoding="raw", shard_size=8)
    with manifest.shard_path("val", 0).open("r+b") as file:
        file.seek(int(manifest.offsets("val")[1]))
        file.write(b"not numpy")
    with pytest.raises(UserError, match=r"not a \.npy file of 32 x 32 x 3 uint8"):
        list(EvalLoader(manifest, "val", batch_size=8))
    reader, pixels = ImageDecoder(manifest, "val"), np.empty((1, 32, 32, 3), np.uint8)
    assert reader.read(np.array([0]), pixels) == {}
    truncate(manifest, "val", 1, 1000)
    error = reader.read(np.array([1]), pixels)[0]
    assert isinstance(error, ImageError) and re.search(f"galaxy {keys(manifest, 'val')[1][:6]}.*truncated", str(error))
    reader.close()


def test_train_loader_refuses_batches_above_the_split_and_ranks_above_the_batch(manifest: Manifest) -> None:
    with pytest.raises(UserError, match="more than the 66 training galaxies"):
        TrainLoader(manifest, seed=0, batch_size=67)
    with pytest.raises(UserError, match="processes are more than the global batch holds"):
        TrainLoader(manifest, seed=0, batch_size=4, ranks=RankInfo(world_size=5))


@pytest.mark.parametrize(
    ("stored", "target", "crop", "zoom", "factor"),
    [
        (256, 256, 1.0, 1.0, 1),
        (256, 128, 1.0, 1.0, 1),
        (256, 85, 1.0, 1.0, 2),
        (256, 80, 1.0, 1.5, 2),
        (256, 80, 1.0, 1.7, 1),
        (256, 64, 0.6, 1.0, 1),
        (256, 32, 1.0, 1.0, 4),
        (256, 20, 1.0, 1.0, 8),
        (250, 20, 1.0, 1.0, 2),
    ],
)
def test_jpeg_reduction_keeps_the_resolution_the_model_needs(
    stored: int, target: int, crop: float, zoom: float, factor: int
) -> None:
    assert reduction(stored, target, crop, zoom) == factor


def test_reduced_jpeg_decoding_is_within_a_grey_level_of_averaged_pixels(real_sample: Path) -> None:
    """On real galaxies: decoding to a half is within a grey level of averaging 2 x 2 pixels."""
    for path in sorted(real_sample.glob("*/*.jpg"))[::111]:
        data = path.read_bytes()
        whole = simplejpeg.decode_jpeg(data).astype(np.float64)
        half = simplejpeg.decode_jpeg(data, min_factor=2, min_height=128, min_width=128)
        assert np.abs(whole.reshape(128, 2, 128, 2, 3).mean((1, 3)) - half).mean() < 1.0


def test_real_galaxies_are_decoded_at_half_size_for_small_models(real_sample: Path, tmp_path: Path) -> None:
    paths = sorted(real_sample.glob("*/*.jpg"))[::50]
    galaxies = [Galaxy(f"r{p.stem}", EncodedImage(p.read_bytes(), "jpg"), int(p.parent.name) % 3) for p in paths]
    manifest = write_shards(MemorySurvey(tuple(galaxies)), tmp_path / "shards")
    (batch,) = read(manifest, 1, batch_size=4, decode=DecodeOptions(image_size=64))
    assert batch.images_BHWC.shape == (4, 128, 128, 3)


def test_loader_threads_are_a_share_of_the_available_cores(manifest: Manifest) -> None:
    for threads, ranks_on_node, expected in [(0, 1, available_cores()), (0, 10**6, 1), (5, 2, 5)]:
        ranks, decode = RankInfo(ranks_on_node=ranks_on_node), DecodeOptions(threads=threads)
        with EvalLoader(manifest, "test", batch_size=16, ranks=ranks, decode=decode) as reader:
            assert reader._executor._max_workers == expected


def test_chosen_chunks_have_the_batches_of_the_whole_evaluation_and_report_damage(copy: Manifest) -> None:
    with EvalLoader(copy, "train", batch_size=8) as loader:
        whole = list(loader)
    with EvalLoader(copy, "train", batch_size=8, chunks=Chunks(2, np.array([0, 3]))) as loader:
        chosen = list(loader)
    assert [batch.step for batch in chosen] == [0, 0, 3, 3] and len(whole) > 8
    for batch, known in zip(chosen, [*whole[:2], *whole[6:8]], strict=True):
        assert torch.equal(batch.images_BHWC, known.images_BHWC) and torch.equal(batch.samples_B, known.samples_B)
    sample = 9
    break_image(copy, "train", sample)
    chunks = Chunks(2, np.array([0]))
    with EvalLoader(read_manifest(copy.dir), "train", batch_size=8, chunks=chunks, on_error="report") as loader:
        assert [[*batch.errors] for batch in loader] == [[], [sample]]
