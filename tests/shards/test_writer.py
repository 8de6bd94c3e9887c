"""Writing shards: what goes in comes out, whatever happens on the way."""

import errno
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import simplejpeg
from PIL import Image

from galaxydist.cluster.submit import submission_lock
from galaxydist.errors import UserError
from galaxydist.galaxy import EncodedImage
from galaxydist.runs.lock import guarded
from galaxydist.shards.manifest import Manifest, read_manifest
from galaxydist.shards.tar import parse_index
from galaxydist.shards.verify import check_shards
from galaxydist.shards.writer import writer
from galaxydist.shards.writer.encode import hash_pixels
from galaxydist.shards.writer.writer import write_shards, writer_lock
from tests.helpers.blobs import BlobSurvey
from tests.helpers.shard_surveys import MemorySurvey, as_jpeg, draw_galaxies

ROOT = Path(__file__).parents[2]


def stored(manifest: Manifest) -> dict[str, tuple[str, dict[str, bytes]]]:
    """Key -> split and files, read with tarfile alone."""
    galaxies: dict[str, tuple[str, dict[str, bytes]]] = {}
    for split in manifest.splits:
        for path in sorted(manifest.dir.glob(f"{split}-*.tar")):
            with tarfile.open(path) as tar:
                for member in tar:
                    key, _, extension = member.name.partition(".")
                    file = tar.extractfile(member)
                    assert file is not None
                    galaxies.setdefault(key, (split, {}))[1][extension] = file.read()
    return galaxies


def tree_digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("encoding", ["jpeg", "png", "raw"])
def test_every_galaxy_is_stored_with_image_label_and_metadata(tmp_path: Path, encoding: str) -> None:
    survey = MemorySurvey(draw_galaxies(70, redshift=float("nan")))
    manifest = write_shards(survey, tmp_path / "shards", encoding=encoding, shard_size=8)
    galaxies = stored(manifest)
    rows = {row: split for split, rows in survey.splits.items() for row in rows.tolist()}
    assert {key: split for key, (split, _) in galaxies.items()} == {survey.galaxies[row].id: s for row, s in rows.items()}
    for row in rows:
        galaxy = survey.galaxies[row]
        files = galaxies[galaxy.id][1]
        assert files["cls"] == str(galaxy.label).encode()
        record = {"id": galaxy.id, "ra": galaxy.ra, "dec": galaxy.dec, "row": row, "redshift": None}
        assert json.loads(files["json"]) == {**record, "pixel_hash": hash_pixels(galaxy.image)}
        if encoding == "jpeg":
            difference = simplejpeg.decode_jpeg(files["jpg"]).astype(int) - galaxy.image
            assert np.abs(difference).mean() < 2.5
            assert simplejpeg.decode_jpeg_header(files["jpg"])[3] == "444"
        elif encoding == "png":
            (tmp_path / "one.png").write_bytes(files["png"])
            assert np.array_equal(np.asarray(Image.open(tmp_path / "one.png")), galaxy.image)
        else:
            (tmp_path / "one.npy").write_bytes(files["npy"])
            assert np.array_equal(np.load(tmp_path / "one.npy"), galaxy.image)
    assert sum(split.num_samples for split in check_shards(manifest.path).splits.values()) == len(rows)


def test_manifest_has_statistics_counts_and_even_shard_sizes(tmp_path: Path) -> None:
    survey = MemorySurvey(draw_galaxies(70))
    manifest = write_shards(survey, tmp_path / "shards", encoding="png", shard_size=8)
    assert read_manifest(tmp_path / "shards").hash == hashlib.sha256(manifest.path.read_bytes()).hexdigest()
    train = np.stack([survey.galaxies[row].image for row in survey.splits["train"]]) / 255
    assert np.allclose(manifest.channel_mean, train.mean((0, 1, 2)), atol=1e-6)
    assert np.allclose(manifest.channel_std, train.std((0, 1, 2)), atol=1e-6)
    for split, rows in survey.splits.items():
        assert manifest.splits[split].num_samples == rows.size
        assert manifest.splits[split].class_counts == tuple(np.bincount(survey.labels[rows], minlength=3).tolist())
        sizes = manifest.shards(split)["samples"]
        assert sizes.max() <= 8
        assert sizes.max() - sizes.min() <= 1
        assert manifest.labels(split).tolist() != survey.labels[rows].tolist(), "stored in the source's order"
    assert not isinstance(manifest.labels("train"), np.memmap)
    assert isinstance(manifest.labels("train").base, np.memmap)


def test_small_splits_still_have_several_shards(tmp_path: Path) -> None:
    manifest = write_shards(MemorySurvey(draw_galaxies(300, 16)), tmp_path / "shards", encoding="raw")
    assert manifest.splits["train"].num_shards == 3


def test_a_jpeg_of_the_right_size_is_copied_byte_for_byte(tmp_path: Path) -> None:
    survey = MemorySurvey(tuple(as_jpeg(galaxy) for galaxy in draw_galaxies(20)))
    for key, (_, files) in stored(write_shards(survey, tmp_path / "same")).items():
        image = next(galaxy.image for galaxy in survey.galaxies if galaxy.id == key)
        assert isinstance(image, EncodedImage)
        assert files["jpg"] == image.data
    smaller = write_shards(survey, tmp_path / "smaller", image_size=20)
    assert smaller.image_size == 20
    assert all(simplejpeg.decode_jpeg(files["jpg"]).shape == (20, 20, 3) for _, files in stored(smaller).values())


def test_shards_are_byte_equal_for_any_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    survey = MemorySurvey(draw_galaxies(60))
    write_shards(survey, tmp_path / "one", workers=1, shard_size=8)
    write_shards(survey, tmp_path / "three", workers=3, shard_size=8)
    monkeypatch.setattr(writer, "FEW_GALAXIES", 0)
    write_shards(survey, tmp_path / "processes", workers=2, shard_size=8)
    assert tree_digest(tmp_path / "one") == tree_digest(tmp_path / "three") == tree_digest(tmp_path / "processes")
    write_shards(survey, tmp_path / "seed", workers=1, shard_size=8, seed=1)
    assert tree_digest(tmp_path / "seed") != tree_digest(tmp_path / "one")


def test_tar_is_byte_equal_to_webdataset_and_the_index_matches_the_tar(tmp_path: Path) -> None:
    """The tar is byte-equal to webdataset's writer's, and the index to what a walk through the tar finds."""
    webdataset = pytest.importorskip("webdataset")
    manifest = write_shards(MemorySurvey(draw_galaxies(30)), tmp_path / "shards", encoding="png", shard_size=8)
    path = manifest.shard_path("train", 0)
    lines = []
    with webdataset.TarWriter(str(tmp_path / "theirs.tar"), encoder=False, mtime=0) as writer, tarfile.open(path) as tar:
        samples: dict[str, list[str]] = {}
        contents: dict[str, dict[str, bytes]] = {}
        for member in tar:
            key, _, extension = member.name.partition(".")
            samples.setdefault(key, []).append(f"{extension} {member.offset_data} {member.size} {member.name}")
            file = tar.extractfile(member)
            assert file is not None
            contents.setdefault(key, {})[extension] = file.read()
        for key, files in contents.items():
            writer.write({"__key__": key, **files})
        lines = [f"v1.2 {len(samples)}", *(" ".join(sample) for sample in samples.values())]
    assert (tmp_path / "theirs.tar").read_bytes() == path.read_bytes()
    assert path.with_suffix(".idx").read_text() == "\n".join(lines) + "\n"
    assert len(parse_index(path.with_suffix(".idx").read_text())) == manifest.shards("train")["samples"][0]


def test_writing_the_same_shards_again_changes_no_file(tmp_path: Path) -> None:
    survey = MemorySurvey(draw_galaxies(30))
    manifest = write_shards(survey, tmp_path / "shards")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").rglob("*")}
    assert write_shards(survey, tmp_path / "shards").hash == manifest.hash
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").rglob("*")}


def test_existing_shards_of_other_settings_or_source_need_overwrite(tmp_path: Path) -> None:
    survey = MemorySurvey(draw_galaxies(30))
    write_shards(survey, tmp_path / "shards")
    with pytest.raises(UserError, match=r"quality=95 \(now 90\).*--overwrite"):
        write_shards(survey, tmp_path / "shards", quality=90)
    changed = replace(survey, source_hash="2" * 64)
    with pytest.raises(UserError, match=r"another source \(memory, 1111.*--overwrite"):
        write_shards(changed, tmp_path / "shards")
    assert write_shards(changed, tmp_path / "shards", overwrite=True).source_hash == "2" * 64
    next((tmp_path / "shards").glob("val-*.tar")).unlink()
    with pytest.raises(UserError, match="missing or truncated"):
        write_shards(changed, tmp_path / "shards")
    check_shards(write_shards(changed, tmp_path / "shards", overwrite=True).path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards"]


def test_folder_without_shards_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="holds no shards"):
        write_shards(MemorySurvey(draw_galaxies(30)), tmp_path / "shards", overwrite=True)
    assert (tmp_path / "shards" / "thesis.tex").exists()


def test_a_truncated_image_names_its_galaxy(tmp_path: Path) -> None:
    galaxies = [as_jpeg(galaxy) for galaxy in draw_galaxies(30)]
    image = galaxies[7].image
    assert isinstance(image, EncodedImage)
    galaxies[7] = replace(galaxies[7], image=EncodedImage(image.data[: len(image.data) // 2], "jpg"))
    with pytest.raises(UserError, match=r"1 of the 28 images cannot be read:\n  galaxy g-0007\+x: its image does not decode"):
        write_shards(MemorySurvey(tuple(galaxies)), tmp_path / "new" / "name" / "shards")
    assert list(tmp_path.iterdir()) == []


def with_damage(rows: Sequence[int], count: int = 200) -> MemorySurvey:
    """A survey in which the images of some rows are cut short, as files that have names."""
    galaxies = list(draw_galaxies(count, 16))
    for row in rows:
        image = as_jpeg(galaxies[row]).image
        assert isinstance(image, EncodedImage)
        galaxies[row] = replace(galaxies[row], image=EncodedImage(image.data[:200], "jpg", f"/data/{row}.jpg"))
    return MemorySurvey(tuple(galaxies), class_names=("a", "b", "c"))


def test_damaged_images_are_listed_by_file_up_to_100(tmp_path: Path) -> None:
    rows = [0, 3, 77]
    with pytest.raises(UserError) as error:
        write_shards(with_damage(rows), tmp_path / "shards", workers=2)
    first, *lines, last = str(error.value).splitlines()
    assert first == "3 of the 182 images cannot be read:" and "--on-error skip" in last
    assert [line.partition(": its image does not decode")[0] for line in lines] == [f"  /data/{row}.jpg" for row in rows]
    with pytest.raises(UserError) as error:
        write_shards(with_damage(range(1, 180)), tmp_path / "shards", workers=1)
    assert str(error.value).startswith("more than 100 images cannot be read:\n  /data/1.jpg: ")
    assert str(error.value).count("/data/") == 100
    assert list(tmp_path.iterdir()) == []


def test_damaged_images_are_left_out_and_listed_with_max_errors(tmp_path: Path) -> None:
    rows = [0, 3, 76, 77]  # 76 is in no split
    survey = with_damage(rows)
    whole = stored(write_shards(with_damage([]), tmp_path / "whole", encoding="png", shard_size=8))
    manifest = write_shards(survey, tmp_path / "some", encoding="png", shard_size=8, max_errors=3)
    found = stored(manifest)
    gone = {survey.galaxies[row].id for row in rows}
    assert found == {key: value for key, value in whole.items() if key not in gone}
    order = [key for key in whole if key not in gone]
    assert [*found] == order, "the others keep their order"
    assert sum(split.num_samples for split in check_shards(manifest.path).splits.values()) == len(found)
    header, *lines = (tmp_path / "some" / "left_out.csv").read_text().splitlines()
    assert header == "split,class,reason"
    assert [line.partition(": its")[0] for line in lines] == ["train,a,/data/0.jpg", "test,a,/data/3.jpg", "train,c,/data/77.jpg"]
    again = write_shards(survey, tmp_path / "some", encoding="png", shard_size=8)
    assert again.hash == manifest.hash, "shards that are there stay"
    with pytest.raises(UserError, match="more than the 2 images that --max-errors allows cannot be read"):
        write_shards(survey, tmp_path / "few", max_errors=2)
    with pytest.raises(UserError, match="all training images of the class 'a' are damaged"):
        write_shards(with_damage(range(0, 200, 3)), tmp_path / "few", max_errors=100)
    with pytest.raises(UserError, match=r"none of the 30 images can be read; the first: /data/0\.jpg: its image"):
        write_shards(with_damage(range(30), 30), tmp_path / "few", max_errors=100)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["some", "whole"]


def test_images_of_different_sizes_need_image_size_and_are_cropped_centrally(tmp_path: Path) -> None:
    galaxies = list(draw_galaxies(20, 32))
    wide = np.zeros((40, 60, 3), np.uint8)
    wide[:, 10:50] = 200
    galaxies[3] = replace(galaxies[3], image=wide)
    survey = MemorySurvey(tuple(galaxies))
    with pytest.raises(UserError, match=r"galaxy g-0003\+x is 60 x 40 pixels, the first galaxy 32 x 32.*--image-size 32"):
        write_shards(survey, tmp_path / "shards")
    files = stored(write_shards(survey, tmp_path / "shards", image_size=32, encoding="png"))["g-0003+x"][1]
    (tmp_path / "one.png").write_bytes(files["png"])
    assert (np.asarray(Image.open(tmp_path / "one.png")) == 200).all(), "not the central square"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "J2232.27-0054"}, "cannot name a file"),
        ({"id": "g-0001+x"}, r"two galaxies have the id g-0001\+x"),
        ({"label": 3}, "label 3 is outside 0 ... 2"),
        ({"image": np.zeros((32, 32), np.uint8)}, "not H x W x 3 uint8"),
        ({"extras": {"x": {1, 2}}}, "not plain JSON"),
    ],
)
def test_invalid_galaxies_are_refused_naming_the_problem(tmp_path: Path, change: dict[str, object], message: str) -> None:
    galaxies = list(draw_galaxies(20))
    galaxies[12] = replace(galaxies[12], **change)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        write_shards(MemorySurvey(tuple(galaxies)), tmp_path / "shards")
    assert list(tmp_path.iterdir()) == []


def test_unlabelled_galaxies_are_stored_without_a_cls_file(tmp_path: Path) -> None:
    galaxies = list(draw_galaxies(20))
    galaxies[0] = replace(galaxies[0], label=None)
    manifest = write_shards(MemorySurvey(tuple(galaxies)), tmp_path / "shards")
    assert set(stored(manifest)["g-0000+x"][1]) == {"jpg", "json"}
    assert sum(manifest.splits["train"].class_counts) == manifest.splits["train"].num_samples - 1
    check_shards(manifest.path)


def test_a_survey_without_training_galaxies_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no training galaxies"):
        write_shards(MemorySurvey(draw_galaxies(10), deal=("val",) * 5), tmp_path / "shards")


SLOW_WRITER = """
import sys, time
from pathlib import Path
from tests.helpers.shard_surveys import MemorySurvey, draw_galaxies
from galaxydist.shards.writer.writer import write_shards, writer_lock

class Slow(MemorySurvey):
    def read(self, start, stop):
        for galaxy in super().read(start, stop):
            time.sleep(float(sys.argv[2]))
            yield galaxy

write_shards(Slow(draw_galaxies(64)), Path(sys.argv[1]), shard_size=8, workers=1)
"""


def run_writer(out_dir: Path, delay: float, prefix: str = "") -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", prefix + SLOW_WRITER, str(out_dir), str(delay)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_killed_writer_leaves_no_manifest_and_is_continued_without_rereading(tmp_path: Path) -> None:
    process = run_writer(tmp_path / "shards", 0.05)
    deadline = time.monotonic() + 240
    while len(done := list((tmp_path / "shards.partial" / "parts").glob("*.json"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "shards").exists()
    with pytest.raises(UserError, match="no shards at"):
        read_manifest(tmp_path / "shards")
    kept = {path: path.stat().st_mtime_ns for path in done}

    reads = []

    class Counting(MemorySurvey):
        def read(self, start: int, stop: int):  # type: ignore[no-untyped-def]
            reads.append(start)
            return super().read(start, stop)

    survey = Counting(draw_galaxies(64))
    write_shards(survey, tmp_path / "shards", shard_size=8, workers=1)
    assert not {int(path.name.partition("-")[0]) for path in kept} & set(reads[1:]), "finished parts are read again"
    write_shards(survey, tmp_path / "undisturbed", shard_size=8, workers=1)
    assert tree_digest(tmp_path / "shards") == tree_digest(tmp_path / "undisturbed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards", "undisturbed"]


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("what", "every"),
    [
        pytest.param("new", 3, marks=pytest.mark.slow),
        pytest.param("overwrite", 1, marks=pytest.mark.slow),
        pytest.param("new", 1, marks=pytest.mark.nightly),
    ],
)
def test_writer_killed_at_any_disk_change_is_completed_by_the_next_call(tmp_path: Path, what: str, every: int) -> None:
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "scripts" / "killed_writer.py"), str(tmp_path), what, str(every)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    *points, count = done.stdout.splitlines()
    assert [point for point in points if not point.endswith(": equal")] == []
    killed_at = {point.rpartition(": ")[0] for point in points}
    assert {"os.remove /shards.partial/settings.json", "os.rename /shards.partial"} < killed_at
    if what == "new":
        assert len(points) >= int(count.split()[0]) / every
        assert "open /shards.partial/manifest.tmp" in killed_at
    else:
        assert "os.rename /shards" in killed_at


WRITER_OF_PROCESSES = """
import os, sys, time
from pathlib import Path
from galaxydist.log import set_up_logging
from galaxydist.shards.writer import writer
from tests.helpers.shard_surveys import MemorySurvey, draw_galaxies

class Meeting(MemorySurvey):
    # A part is read only when as many processes as there are cores are reading.
    def read(self, start, stop):
        seen = Path(sys.argv[1] + ".readers")
        (seen / str(os.getpid())).touch()
        while stop > 1 and len(list(seen.iterdir())) < int(sys.argv[2]):
            time.sleep(0.01)
        return super().read(start, stop)

if __name__ == "__main__":
    set_up_logging()
    writer.FEW_GALAXIES = 0
    Path(sys.argv[1] + ".readers").mkdir()
    writer.write_shards(Meeting(draw_galaxies(64)), Path(sys.argv[1]), shard_size=8)
"""


ON_ALL_CORES = "import os\nos.sched_setaffinity(0, range(os.cpu_count()))\n"


def all_cores() -> int:
    """The cores of this machine, not only that of this worker of the test run."""
    command = f"{ON_ALL_CORES}from galaxydist.cpus import available_cores\nprint(available_cores())"
    return int(subprocess.check_output([sys.executable, "-c", command], text=True, cwd=ROOT))


def run_processes(folder: Path, readers: int) -> "subprocess.Popen[str]":
    script = folder / "writer.py"
    script.write_text(ON_ALL_CORES + WRITER_OF_PROCESSES)
    return subprocess.Popen(
        [sys.executable, str(script), str(folder / "shards"), str(readers)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.multiprocess
def test_shards_are_written_on_all_cores_and_the_speed_is_logged(tmp_path: Path) -> None:
    cores = all_cores()
    if cores == 1:
        pytest.skip("this machine has one core")
    # The parent reads the first galaxy, for its size.
    _, told = run_processes(tmp_path, cores + 1).communicate(timeout=120)
    assert len(list((tmp_path / "shards.readers").iterdir())) == cores + 1
    assert re.search(r"\d+ galaxies to shards in [\d.]+ s \(\d+ img/s\)", told)
    write_shards(MemorySurvey(draw_galaxies(64)), tmp_path / "alone", shard_size=8, workers=1)
    assert tree_digest(tmp_path / "shards") == tree_digest(tmp_path / "alone")


@pytest.mark.multiprocess
def test_workers_of_a_killed_writer_end_with_the_writer(tmp_path: Path) -> None:
    if all_cores() == 1:
        pytest.skip("this machine has one core: no workers")
    process = run_processes(tmp_path, 99)  # they wait for one another for ever
    seen = tmp_path / "shards.readers"
    while not seen.exists() or len(list(seen.iterdir())) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert workers
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(workers, timeout=120)
    assert alive == []


def test_file_size_limit_while_writing_shards_leaves_no_file(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk's end: the same error, at the same place."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))\n"
    _, text = run_writer(tmp_path / "shards", 0, limit).communicate(timeout=240)
    assert "UserError: no space left while writing to" in text
    assert "give the same command again" in text
    assert list(tmp_path.iterdir()) == []


def test_locks_are_left_out_where_the_file_system_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")  # as Lustre does if it is mounted without flock

    monkeypatch.setattr("fcntl.flock", refuse)
    (tmp_path / ".file.guard").touch()  # an earlier process left it
    with writer_lock(tmp_path / "shards"), guarded(tmp_path / "file", wait_s=60), submission_lock(tmp_path, 5):
        assert (tmp_path / "shards.lock").exists()


def test_second_writer_of_the_same_folder_is_refused(tmp_path: Path) -> None:
    process = run_writer(tmp_path / "shards", 0.05)
    while not (tmp_path / "shards.partial" / "settings.json").exists():
        time.sleep(0.01)
    with pytest.raises(UserError, match="another process is writing"):
        write_shards(MemorySurvey(draw_galaxies(64)), tmp_path / "shards")
    process.kill()
    process.communicate()


def test_manifest_records_the_sizes_that_images_were_resampled_from(tmp_path: Path) -> None:
    resampled = write_shards(BlobSurvey(num_galaxies=30, size=48), tmp_path / "a", image_size=32, workers=1)
    assert resampled.source_sides == read_manifest(tmp_path / "a").source_sides == (48, 48)
    same = write_shards(BlobSurvey(num_galaxies=30), tmp_path / "b", image_size=32, workers=1)
    assert same.source_sides is None and "source_sides" not in same.path.read_text()
