"""The data commands from end to end on a small simulated survey, in this process."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from galaxydist.cli.main import main
from galaxydist.cli.options import fold
from galaxydist.shards.manifest import read_manifest
from galaxydist.surveys.survey_sources import open_survey
from tests.helpers.foreign_tars import drawn_tars

GALAXIES = 150


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with a simulated survey in it."""
    folder = tmp_path_factory.mktemp("data")
    assert main(["data", "simulate", "--num-galaxies", str(GALAXIES), "--data-dir", str(folder)]) == 0
    return folder


def command(root: Path, *arguments: str) -> int:
    return main([*arguments, "--data-dir", str(root)])


def image_folder(folder: Path, per_class: int = 12) -> Path:
    """A folder of two classes of coloured squares."""
    dice = np.random.default_rng(0)
    for name, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            pixels = np.clip(np.array(colour) + dice.integers(-20, 20, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def test_data_simulate_reuses_the_same_survey_and_refuses_to_replace_another(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = root / "hdf5" / "simulated.h5"
    before = path.stat().st_mtime_ns
    assert command(root, "data", "simulate", "--num-galaxies", str(GALAXIES)) == 0
    assert "there already" in capsys.readouterr().out
    assert command(root, "data", "simulate", "--num-galaxies", "20", "--seed", "5") == 2
    assert "holds another survey (seed is 0, not 5; num_galaxies is 150, not 20). Give --overwrite" in capsys.readouterr().err
    assert path.stat().st_mtime_ns == before
    copy = tmp_path / "copy.h5"
    shutil.copy(path, copy)
    assert main(["data", "simulate", "--num-galaxies", "30", "--seed", "5", "--out", str(copy), "--overwrite"]) == 0
    assert len(open_survey(copy).labels) == 30 and len(open_survey(path).labels) == GALAXIES


def test_data_simulate_replaces_a_foreign_file_only_with_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "notes.h5"
    path.write_text("not a survey")
    assert main(["data", "simulate", "--num-galaxies", "20", "--out", str(path)]) == 2
    assert "is in the way" in capsys.readouterr().err and path.read_text() == "not a survey"
    assert main(["data", "simulate", "--num-galaxies", "20", "--out", str(path), "--overwrite"]) == 0


def test_data_export_and_shard_reuse_existing_output(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for expected in (0, 1):
        assert command(root, "data", "export", "--dataset", "simulated") == 0
        assert command(root, "data", "shard", "--dataset", "simulated", "--variant", "both", "--image-size", "64") == 0
        assert capsys.readouterr().out.count("there already") == 4 * expected
    assert (root / "images" / "simulated" / "simulated" / "train" / "merging").is_dir()
    original = read_manifest(root / "shards" / "simulated" / "original")
    assert sum(split.num_samples for split in original.splits.values()) == GALAXIES
    assert original.image_size == 64
    assert read_manifest(root / "shards" / "simulated" / "balanced").variant == "balanced"
    assert command(root, "data", "shard", "--dataset", "simulated", "--variant", "both", "--out", str(root / "x")) == 2
    assert "--out names one folder" in capsys.readouterr().err


def test_data_commands_without_a_survey_name_the_command_that_creates_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, makes in (("galaxy10_decals", "data fetch"), ("simulated", "data simulate")):
        for what in ("shard", "export", "explore"):
            assert command(tmp_path, "data", what, "--dataset", name) == 2
            assert f"`galaxydist {makes}`" in capsys.readouterr().err
    assert command(tmp_path, "data", "shard", "--from", str(tmp_path / "nowhere")) == 2
    assert "there is no such file or folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_data_check_names_the_damaged_shard_and_galaxy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(tmp_path, "data", "check") == 2
    assert "Make them with `galaxydist data shard`" in capsys.readouterr().err
    for name in ("first", "second"):
        images = image_folder(tmp_path / name)
        assert command(tmp_path, "data", "shard", "--from", str(images), "--encoding", "png") == 0
    assert command(tmp_path, "data", "check") == 0
    assert capsys.readouterr().out.count("in order: ") == 2
    shard = sorted((tmp_path / "shards" / "second" / "original").rglob("*.tar"))[0]
    data = bytearray(shard.read_bytes())
    at = data.index(b"IDAT") + 8
    data[at : at + 16] = bytes(16)
    shard.write_bytes(data)
    assert command(tmp_path, "data", "check") == 2
    captured = capsys.readouterr()
    assert "in order: first" in captured.out
    assert shard.name in captured.err and "galaxy " in captured.err
    assert command(tmp_path, "data", "check", "--dataset", "first") == 0
    assert command(tmp_path, "data", "check", "--dataset", "third") == 2
    assert "data sets there: first (original), second (original)" in capsys.readouterr().err
    assert command(tmp_path, "data", "check", "first") == 0
    assert capsys.readouterr().out.count("in order: first") == 1
    assert command(tmp_path, "data", "explore", "--dataset", "first", "--sample", "8") == 0
    assert (tmp_path / "explore" / "first" / "original" / "index.html").is_file() or "page: " in capsys.readouterr().out


def test_data_shard_of_an_image_folder_writes_3_folds_whose_test_splits_add_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = image_folder(tmp_path / "squares")
    assert command(tmp_path, "data", "shard", "--from", str(images), "--encoding", "png") == 0
    assert "shards of squares, original" in capsys.readouterr().out
    assert read_manifest(tmp_path / "shards" / "squares" / "original").class_names == ("blue", "red")
    held_out = 0
    for number in (1, 2, 3):
        assert command(tmp_path, "data", "shard", "--from", str(images), "--name", "sq", "--fold", f"{number}/3") == 0
        manifest = read_manifest(tmp_path / "shards" / f"sq-fold{number}of3" / "original")
        assert manifest.dataset == f"sq-fold{number}of3"
        held_out += manifest.splits["test"].num_samples
    assert held_out == 24


def test_data_shard_reports_unreadable_images_and_png_stored_as_jpeg(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = image_folder(tmp_path / "squares")
    (images / "red" / "broken link.png").symlink_to("/nowhere.png")
    shard = ("data", "shard", "--from", str(images))
    assert command(tmp_path, *shard) == 2
    assert (
        "red/broken link.png cannot be read: No such file or directory, a broken link to /nowhere.png" in capsys.readouterr().err
    )
    assert command(tmp_path, *shard, "--max-errors", "5") == 2
    assert "add --on-error skip" in capsys.readouterr().err
    assert command(tmp_path, *shard, "--on-error", "skip") == 0
    out = capsys.readouterr().out
    folder = tmp_path / "shards" / "squares" / "original"
    assert f"left out: 1, listed in {folder / 'left_out.csv'}" in out
    assert "25 .png are stored as JPEG of quality 95; --encoding png keeps every pixel" in out
    assert sum(split.num_samples for split in read_manifest(folder).splits.values()) == 24


def test_data_commands_refuse_invalid_names_paths_below_a_file_and_urls(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = image_folder(tmp_path / "squares")
    for name in ("../../x", "my galaxies", ".hidden", "a/b"):
        assert command(tmp_path / "root", "data", "shard", "--from", str(images), "--name", name) == 2
        assert f"the name {name!r} is not valid for a data set" in capsys.readouterr().err
    assert not (tmp_path / "root").exists()
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        for arguments in (
            ("data", "shard", "--from", str(images)),
            ("data", "check"),
            ("data", "simulate", "--num-galaxies", "20"),
        ):
            assert command(root, *arguments) == 2
            assert f"the data root {root} cannot be a folder: {tmp_path / 'file'} is a file" in capsys.readouterr().err
    assert main(["data", "export", "--from", str(images), "--out", str(tmp_path / "file" / "below")]) == 2
    assert f"{tmp_path / 'file'}" in (text := capsys.readouterr().err) and "is in the way (Not a directory)" in text
    assert main(["data", "shard", "--from", str(images), "--out", "/proc/shards"]) == 2
    assert "not allowed: No such file or directory (/proc/shards.partial.lock)" in capsys.readouterr().err
    for option in ("--out", "--data-dir"):
        with pytest.raises(SystemExit, match="2"):
            main(["data", "shard", option, "hf://datasets/me/galaxies"])
        assert f"{option}: hf://datasets/me/galaxies is a URL" in capsys.readouterr().err
    assert main(["plan", "recipe=demo", "data.dir=s3://bucket/data"]) == 2
    assert "data.dir=s3://bucket/data: must be a path on this machine, and is a URL" in capsys.readouterr().err


def test_data_commands_on_a_read_only_file_system_print_one_error_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path, **_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    images = image_folder(tmp_path / "squares")
    monkeypatch.setattr(Path, "mkdir", refuse)
    for what in (("shard", "--from", str(images)), ("export", "--from", str(images)), ("simulate", "--num-galaxies", "20")):
        assert command(tmp_path / "root", "data", *what) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert "Read-only file system" in line


def test_fold_counts_from_one() -> None:
    assert (fold("1/3"), fold("3/3")) == ((0, 3), (2, 3))


def test_data_explore_writes_counts_pixel_statistics_and_a_gallery_image(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(root, "data", "explore", "--dataset", "simulated", "--per-class", "2", "--out", str(tmp_path)) == 0
    found = json.loads((tmp_path / "survey.json").read_text())
    assert (found["dataset"], found["variant"]) == ("simulated", "original")
    assert sum(map(sum, found["counts"].values())) == GALAXIES
    assert 0 < found["pixels"]["merging"]["mean"][0] < 1
    with Image.open(tmp_path / "gallery.jpg") as gallery:
        assert gallery.width > 200
    assert "merging" in capsys.readouterr().out


def test_data_fetch_refuses_a_file_that_is_not_galaxy10(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = tmp_path / "Galaxy10.h5"
    wrong.write_bytes(b"something else")
    assert command(tmp_path / "root", "data", "fetch", "--from", str(wrong)) == 2
    assert "not the official Galaxy10 file" in capsys.readouterr().err
    assert not (tmp_path / "root" / "hdf5" / "Galaxy10_DECals.h5").exists()


def test_data_shard_indexes_tars_in_place_or_writes_them_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, tars = tmp_path / "root", tmp_path / "galaxies"
    drawn_tars(tars, 60, 20)
    pattern = f"{tars}/part-{{000..002}}.tar"
    for note in ("", " (there already)"):
        assert command(root, "data", "shard", "--from", pattern, "--in-place") == 0
        path = root / "shards" / "galaxies" / "original" / "manifest.json"
        assert f"index of tars of galaxies, original (train 43, val 10, test 7): {path}{note}\n" in capsys.readouterr().out
    index = read_manifest(path)
    assert command(root, "data", "shard", "--from", str(tars), "--name", "anew", "--encoding", "png") == 0
    anew = read_manifest(root / "shards" / "anew" / "original")
    assert index.splits["train"].class_counts == anew.splits["train"].class_counts and index.tars == str(tars)
    splits = [f"--{split}={tars}/part-00{number}.tar" for number, split in enumerate(("train", "val", "test"))]
    assert command(root, "data", "shard", *splits, "--in-place", "--fold", "1/2") == 2
    assert "has a split of its own" in capsys.readouterr().err
    assert command(root, "data", "shard", *splits, "--in-place", "--out", str(tmp_path / "index")) == 0
    assert "(train 20, val 20, test 20)" in capsys.readouterr().out
    assert command(root, "data", "check", str(tmp_path / "index"), "galaxies") == 0
    assert capsys.readouterr().out.count("in order: galaxies") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--from", "{tars}", "--in-place", "--encoding", "png"], "--encoding, --quality and --shard-size are for shards that"),
        (["--from", "{tars}", "--sha256"], "--sha256 is for tars that are indexed: add --in-place"),
        (["--from", "{tars}", "--images", "x"], "--images, --file, --bands, --scale and --stretch are not for tars"),
        (["--from", "{images}", "--in-place"], "--in-place is for tars, and .* is something else"),
        (["--val", "{tars}"], "--val without --train: give the tars of each split"),
        (["--from", "{tars}", "--train", "{tars}"], "--from .* and --train .*: give one of them"),
        (["--from", "{tars}/part-{{7..9}}.tar"], "there is no tar .*part-7.tar"),
        (["--from", "{tars}", "--in-place", "--label", "clas"], r"part-000.tar has no column 'clas' \(--label\)"),
    ],
)
def test_data_shard_refuses_options_that_do_not_fit_tars(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    drawn_tars(tmp_path / "tars", 6, 6)
    image_folder(tmp_path / "images", 3)
    given = [option.format(tars=tmp_path / "tars", images=tmp_path / "images") for option in options]
    assert main(["data", "shard", *given, "--out", str(tmp_path / "out"), "--data-dir", str(tmp_path / "root")]) == 2
    errors = capsys.readouterr().err
    assert re.search(message, errors) and errors.count("error:") == 1
    assert not [path.name for path in tmp_path.iterdir() if path.name not in ("tars", "images", "root")]
