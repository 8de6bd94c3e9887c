"""Foreign tars indexed in place: read as shards of our own, wherever they lie, and refused once they have changed."""

import contextlib
import csv
import io
import os
import re
import shutil
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from galaxydist import object_store as transfers
from galaxydist.bench.flaky_server import Behaviour, FileServer
from galaxydist.errors import UserError
from galaxydist.galaxy import Galaxy
from galaxydist.loading.decode import read_samples
from galaxydist.loading.loader import Batch, DecodeOptions, EvalLoader, RankInfo, TrainLoader
from galaxydist.shards import tar_index
from galaxydist.shards.catalogue import read_catalogue
from galaxydist.shards.manifest import Manifest, read_manifest
from galaxydist.shards.remote.cache import CacheConfig
from galaxydist.shards.remote.open import open_shards
from galaxydist.shards.tar_index import IndexOptions, index_tars
from galaxydist.shards.verify import check_shards, describe_equal_images
from galaxydist.shards.writer.encode import decode_any_file, resize_square, to_pixels
from galaxydist.shards.writer.writer import write_shards
from galaxydist.surveys.image_files import parse_image
from galaxydist.surveys.image_table import TableOptions
from galaxydist.surveys.table_columns import ColumnNames
from galaxydist.surveys.tables.tar_images import read_tar_table
from galaxydist.surveys.tables.tar_scan import ScanOptions, find_tars, scan_tars
from tests.helpers.foreign_tars import drawn_image, drawn_tars, evo_tars, write_tar

EVO = ColumnNames(label="gz10_class", split="split")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "FIRST_PAUSE_S", 0.001)


def index(pattern: object, out_dir: Path, columns: ColumnNames | None = None, **options: Any) -> Manifest:
    table = TableOptions("mine", columns or ColumnNames())
    return index_tars(find_tars({None: str(pattern)}), out_dir, table, IndexOptions(**options))


def epoch(manifest: Manifest, **given: Any) -> list[Batch]:
    with TrainLoader(manifest, seed=3, batch_size=8, num_streams=3, **given) as reader:
        batches = list(islice(reader, reader.steps_per_epoch))
    with EvalLoader(manifest, "test", batch_size=8) as evaluation:
        return batches + list(evaluation)


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    assert len(found) == len(expected)
    for there, here in zip(found, expected, strict=True):
        assert there.samples_B.tolist() == here.samples_B.tolist() and there.labels_B.tolist() == here.labels_B.tolist()
        assert torch.equal(there.images_BHWC, here.images_BHWC)


def test_mixed_tars_give_the_pixels_properties_and_statistics_of_shards_written_anew(real_sample: Path, tmp_path: Path) -> None:
    rows = evo_tars(real_sample, tmp_path / "evo")
    in_place = index(tmp_path / "evo", tmp_path / "index", EVO, image_size=96)
    locations = find_tars({None: str(tmp_path / "evo")})
    survey = read_tar_table(scan_tars(locations, ScanOptions()), locations, EVO).survey(TableOptions("mine", EVO))
    anew = write_shards(survey, tmp_path / "anew", encoding="raw", image_size=96, workers=1)
    assert (in_place.encoding, in_place.source_sides) == ("file", anew.source_sides) and anew.source_sides == (120, 150)
    assert in_place.channel_mean == anew.channel_mean and in_place.channel_std == anew.channel_std
    assert contents(in_place) == dict(sorted(contents(anew).items()))
    assert {key: (split, label) for key, (split, label, *_) in contents(in_place).items()} == {
        row["id"]: (row["split"], row["label"]) for row in rows
    }
    assert check_shards(in_place.path) == in_place and describe_equal_images(in_place) == []
    order = [row["id"] for row in rows if row["split"] == "train"]
    assert read_catalogue(in_place, "train")["id"].to_pylist() == order  # as they lie in the tars


def contents(manifest: Manifest) -> dict[str, tuple[Any, ...]]:
    """Split, label, properties and pixels of each galaxy by its id."""
    found = {}
    for split in manifest.splits:
        rows = read_catalogue(manifest, split).to_pylist()
        images = [pixels.tobytes() for _, (pixels,) in read_samples(manifest, split, np.arange(len(rows)))]
        for row, label, image in zip(rows, manifest.labels(split).tolist(), images, strict=True):
            found[row["id"]] = (split, label, row, image)
    return found


@pytest.mark.parametrize("form", ["jpg", "png"])
def test_images_of_one_size_and_format_are_read_as_those_of_own_shards(tmp_path: Path, form: str) -> None:
    files = [(f"{n}.{form}", drawn_image(n, 64, {"jpg": "jpeg"}.get(form, form))) for n in range(30)]
    write_tar(tmp_path / "a.tar", [one for n, file in enumerate(files) for one in (file, (f"{n}.cls", b"%d" % (n % 2)))])
    manifest = index(tmp_path / "a.tar", tmp_path / "index")
    assert (manifest.encoding, manifest.image_size, manifest.source_sides) == ({"jpg": "jpeg"}.get(form, form), 64, None)
    with TrainLoader(manifest, seed=1, batch_size=4, decode=DecodeOptions(image_size=16)) as loader:
        assert next(loader).images_BHWC.shape == (4, 32, 32, 3) if form == "jpg" else (4, 64, 64, 3)


def test_order_over_parts_of_tars_is_the_same_on_any_number_of_processes(tmp_path: Path) -> None:
    drawn_tars(tmp_path / "tars", 150, 25)
    manifest = index(tmp_path / "tars", tmp_path / "index")
    assert [manifest.split(name).num_shards for name in ("train", "test")] == [6, 5]  # most tars are shards of both
    whole = steps(manifest, 0, 12)
    for size in (2, 3):
        parts = [steps(manifest, 5, 7, ranks=RankInfo(rank, size)) for rank in range(size)]
        for step, expected in enumerate(whole[5:]):
            for rank, batches in enumerate(parts):
                assert batches[step].samples_B.tolist() == expected.samples_B[rank::size].tolist()
                assert torch.equal(batches[step].images_BHWC, expected.images_BHWC[rank::size])


def steps(manifest: Manifest, start: int, count: int, **given: Any) -> list[Batch]:
    with TrainLoader(manifest, seed=3, batch_size=16, num_streams=6, start_step=start, **given) as loader:
        return list(islice(loader, count))


def test_tars_and_index_may_be_moved_together_but_not_changed(tmp_path: Path) -> None:
    drawn_tars(tmp_path / "a" / "tars")
    manifest = index(tmp_path / "a" / "tars", tmp_path / "a" / "index")
    expected = epoch(manifest)
    (tmp_path / "a").rename(tmp_path / "b")
    moved = read_manifest(tmp_path / "b" / "index")
    assert_same(epoch(moved), expected)
    tar = moved.shard_path("train", 1)
    assert tar == tmp_path / "b" / "tars" / "part-001.tar" and moved.tars == "../tars"
    os.utime(tar)  # a copy of the same bytes
    assert_same(epoch(read_manifest(tmp_path / "b" / "index")), expected)
    data = tar.read_bytes()
    tar.write_bytes(data.replace(b"0025.png", b"0025.pnk"))
    os.utime(tar, ns=(0, tar.stat().st_mtime_ns + 10**9))  # file systems count time in steps of some milliseconds
    message = rf"{tar} was replaced or truncated after it was indexed in .*manifest.json: index the tars again"
    for use in (epoch, lambda manifest: check_shards(manifest.path)):
        with pytest.raises(UserError, match=message):
            use(read_manifest(tmp_path / "b" / "index"))
    tar.write_bytes(data[:-1024])
    with pytest.raises(UserError, match=message):
        epoch(moved)
    tar.unlink()
    with pytest.raises(UserError, match=rf"shard {tar} is missing; put it back, or index the tars again"):
        epoch(moved)


def test_an_index_far_from_its_tars_names_them_absolutely(tmp_path: Path) -> None:
    drawn_tars(tmp_path / "a" / "tars")
    manifest = index(tmp_path / "a" / "tars", tmp_path / "b" / "c" / "index")
    assert manifest.tars == str(tmp_path / "a" / "tars")
    (tmp_path / "b").rename(tmp_path / "d")
    assert len(epoch(read_manifest(tmp_path / "d" / "c" / "index"))) > 3


def test_the_same_command_finds_the_index_and_another_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = drawn_tars(tmp_path / "tars")
    manifest = index(tmp_path / "tars", tmp_path / "index")
    monkeypatch.chdir(tmp_path)
    before = manifest.path.stat()
    assert index("tars", Path("index")).hash == manifest.hash and manifest.path.stat() == before
    with pytest.raises(UserError, match=r"index was indexed with image_size=None \(now 12\). Choose another folder, or give"):
        index("tars", Path("index"), image_size=12)
    shutil.copy(paths[0], paths[1])
    with pytest.raises(UserError, match="index was indexed with other tars, or tars that have changed"):
        index("tars", Path("index"))
    assert index("tars", Path("index"), overwrite=True).hash != manifest.hash
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "tars"]


def test_an_interrupted_index_continues_with_the_tars_that_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn_tars(tmp_path / "tars", 80, 20)
    expected = index(tmp_path / "tars", tmp_path / "whole")
    scanned: list[str] = []

    def inspect(data: bytes, name: str, **options: Any) -> dict[str, Any]:
        scanned.append(re.sub(r".*/(part-\d+).tar.*", r"\1", name))
        if len(scanned) == 65:
            raise KeyboardInterrupt
        return real(data, name, **options)

    real = tar_index._inspect
    monkeypatch.setattr(tar_index, "_inspect", inspect)
    monkeypatch.setattr("galaxydist.surveys.tables.tar_scan.available_cores", lambda: 1)
    with pytest.raises(KeyboardInterrupt):
        index(tmp_path / "tars", tmp_path / "index")
    assert not (tmp_path / "index").exists()
    scanned[:] = ["none"] * 100
    manifest = index(tmp_path / "tars", tmp_path / "index")
    assert {*scanned[100:]} < {"part-000", "part-001", "part-002", "part-003"} and "part-000" not in scanned[100:]
    assert (manifest.source_hash, dict(manifest.columns)) == (expected.source_hash, dict(expected.columns))


def test_damaged_images_are_refused_or_left_out_and_listed(tmp_path: Path) -> None:
    files = [(f"{n:02d}.png", drawn_image(n) if n % 20 else b"no image") for n in range(60)]
    path = write_tar(
        tmp_path / "a.tar", [one for n, file in enumerate(files) for one in (file, (f"{n:02d}.cls", b"%d" % (n % 2)))]
    )
    with pytest.raises(UserError, match=r"3 of the 60 images cannot be read:\n  .*a.tar, 00.png"):
        index(path, tmp_path / "index")
    assert [item.name for item in tmp_path.iterdir()] == ["a.tar"]
    manifest = index(path, tmp_path / "index", max_errors=5)
    assert sum(split.num_samples for split in manifest.splits.values()) == 57
    reasons = [line[2] for line in csv.reader((manifest.dir / "left_out.csv").open())][1:]
    assert sorted(re.findall(r"(\d\d).png", " ".join(reasons))) == ["00", "20", "40"]
    assert check_shards(manifest.path) == manifest


def test_check_finds_other_images_under_an_unchanged_time(tmp_path: Path) -> None:
    drawn_tars(tmp_path / "tars")
    manifest = index(tmp_path / "tars", tmp_path / "index")
    tar, offset = manifest.shard_path("train", 0), int(manifest.offsets("train")[0])
    changed = tar.stat().st_mtime_ns
    with tar.open("r+b") as file:
        file.seek(offset + 40)
        file.write(b"xx")
    os.utime(tar, ns=(changed, changed))
    with pytest.raises(UserError, match=r"tar .*part-000.tar: its checksum is not the manifest's"):
        check_shards(manifest.path)
    with pytest.raises(UserError, match=r"part-000.tar, galaxy \d{4}: its image does not decode"):
        epoch(manifest)


def test_mixed_sizes_and_other_images_need_a_size(tmp_path: Path) -> None:
    files = [(f"{n}.png", drawn_image(n, 20 + n % 2)) for n in range(6)]
    with pytest.raises(UserError, match=r"of several sizes: 20 x 20 \(3 images\), 21 x 21 \(3 images\)\. Give .*--image-size 20"):
        index(write_tar(tmp_path / "a.tar", files), tmp_path / "index")


@pytest.mark.parametrize("is_hashed", [True, False])
def test_remote_tars_are_indexed_by_ranges_and_read_as_local_ones(tmp_path: Path, is_hashed: bool) -> None:
    for split, count in (("train", 40), ("val", 20), ("test", 20)):
        for number, path in enumerate(drawn_tars(tmp_path / split, count, 10)):
            path.rename(tmp_path / f"{split}-{number}.tar")
    expected = epoch(index(f"{tmp_path}/*.tar", tmp_path / "local"))
    cache = CacheConfig(tmp_path / "cache")
    with FileServer(tmp_path, Behaviour(trouble=lambda _path, number: 503 if number == 1 else None)) as server:
        pattern = f"{server.address}/{{train-{{0..3}},val-0,val-1,test-0,test-1}}.tar"
        index(pattern, tmp_path / "remote", is_hashed=is_hashed)
        manifest = open_shards(tmp_path / "remote", cache)
        assert manifest.tars == server.address
        assert_same(epoch(manifest), expected)
        assert check_shards(tmp_path / "remote", cache) == manifest
        problem = "; ".join(describe_equal_images(manifest))
        assert ("are in more than one split" if is_hashed else "the tars were indexed without --sha256") in problem
        asked = server.gets["train-1.tar"]
        by_url = open_shards(f"{server.address}/remote/manifest.json", cache)  # the index lies beside the tars
        assert_same(epoch(by_url), expected)
        assert server.gets["train-1.tar"] == asked  # from the cache
        shutil.rmtree(cache.folder)
        tar = tmp_path / "train-1.tar"
        changed = tar.stat().st_mtime + 10  # HTTP counts time in seconds
        if is_hashed:
            os.utime(tar, (changed, changed))
            assert_same(epoch(open_shards(tmp_path / "remote", cache)), expected)
        else:
            server.behaviour.trouble = lambda path, _: os.utime(tar, (changed, changed)) if path == tar.name else None
            for _ in ("changes while it is fetched", "has changed before"):
                with pytest.raises(UserError, match=r"train-1.tar was replaced after it was indexed .*: index it again"):
                    epoch(open_shards(tmp_path / "remote", cache))
            assert not list(cache.folder.rglob("*train-1.tar*"))


def test_remote_tars_that_are_none_or_not_to_be_had_are_explained(tmp_path: Path) -> None:
    drawn_tars(tmp_path, 20, 10)
    (tmp_path / "cut.tar").write_bytes((tmp_path / "part-000.tar").read_bytes()[:9000])
    with FileServer(tmp_path) as server:
        with pytest.raises(UserError, match=r"http://127.*/gone.tar does not exist"):
            index(f"{server.address}/gone.tar", tmp_path / "index")
        with pytest.raises(UserError, match=r"/cut.tar is truncated or damaged at byte"):
            index(f"{server.address}/{{part-000,cut}}.tar", tmp_path / "index")
    with (
        FileServer(tmp_path, Behaviour(trouble=lambda _path, _number: 401)) as server,
        pytest.raises(UserError, match=r"access to http://127.*/part-000.tar is denied .*FSSPEC_HTTPS"),
    ):
        index(f"{server.address}/part-000.tar", tmp_path / "index")
    assert not [path.name for path in tmp_path.iterdir() if path.suffix != ".tar"]


def test_names_that_a_cache_cannot_hold_and_ustar_tars_are_read(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        files = [(f"{folder}{n}.png", drawn_image(n + ord(folder))) for n in range(10)]
        pairs = [one for n, file in enumerate(files) for one in (file, (f"{folder}{n}.cls", b"%d" % (n % 2)))]
        write_tar(tmp_path / folder / "same name.tar", pairs, tarfile.USTAR_FORMAT)
    with FileServer(tmp_path) as server:
        index(f"{server.address}/{{a,b}}/same name.tar", tmp_path / "index")
        manifest = open_shards(tmp_path / "index", CacheConfig(tmp_path / "cache"))
        labels = {int(label) for batch in epoch(manifest) for label in batch.labels_B}
        assert labels == {0, 1} and manifest.shard_path("train", 0).name == "a%2Fsame%20name.tar"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_files_of_every_kind_are_decoded_as_the_writer_of_shards_does() -> None:
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), np.uint8)).resize((90, 120))
    turned = [Image.Exif() for _ in range(9)]
    for orientation, exif in enumerate(turned):
        exif[ExifTags.Base.Orientation] = orientation
    alpha = rgb.copy()
    alpha.putalpha(rgb.convert("L"))
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    files = [
        *(saved(rgb, "jpeg", exif=exif) for exif in turned),
        saved(rgb, "jpeg", progressive=True, icc_profile=b"\xff\xda" * 40),
        saved(rgb, "jpeg", xmp=xmp),
        saved(rgb, "jpeg", keep_rgb=True),
        saved(rgb, "mpo", save_all=True, append_images=[rgb.rotate(90)]),
        *(saved(rgb.convert(mode), "jpeg") for mode in ("L", "CMYK")),
        *(saved(image, "png") for image in (rgb, alpha, rgb.convert("P"), rgb.convert("L"))),
        *(saved(image, form) for image in (rgb, alpha) for form in ("webp", "gif", "tiff")),
    ]
    for number, data in enumerate(files):
        for size in (64, 90):
            expected = resize_square(to_pixels(Galaxy("g", parse_image(data, "f"), 0)), size)
            memory = np.empty((size, size, 3), np.uint8)
            assert np.array_equal(decode_any_file(data, size), expected), number
            assert decode_any_file(data, size, memory) is memory and np.array_equal(memory, expected), number
        for length in (*range(0, 40, 3), len(data) // 2):
            with contextlib.suppress(ValueError):  # and no other error
                decode_any_file(data[:length], 64)


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()
