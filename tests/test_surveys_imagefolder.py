"""Any folder of pictures as a survey."""

import logging
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from galaxydist.errors import UserError
from galaxydist.galaxy import GALAXY10_CLASSES, EncodedImage
from galaxydist.surveys.names import natural_key, safe_name, unique_ids
from galaxydist.surveys.open import open_survey
from galaxydist.surveys.pictures import decode_picture, encode_png
from tests.survey_files import write_picture


def class_folders(root: Path, names: tuple[str, ...] = ("class2", "class10"), count: int = 10, suffix: str = ".jpg") -> Path:
    for name in names:
        for number in range(count):
            write_picture(root / name / f"{name}_{number}{suffix}", number)
    return root


def test_class_folders_alone_are_split_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        survey = open_survey(class_folders(tmp_path / "my galaxies"))
    assert "80/10/10" in caplog.text
    assert survey.name == "my_galaxies" and survey.class_names == ("class2", "class10")  # natural order
    assert {name: len(rows) for name, rows in survey.splits.items()} == {"train": 16, "val": 2, "test": 2}
    galaxies = list(survey.read(0, 20))
    assert [galaxy.id for galaxy in galaxies[:11]] == [*(f"class2_{n}" for n in range(10)), "class10_0"]
    assert [galaxy.label for galaxy in galaxies] == [0] * 10 + [1] * 10
    assert isinstance(galaxies[3].image, EncodedImage) and galaxies[3].image.format == "jpg"
    assert galaxies[3].image.data == (tmp_path / "my galaxies" / "class2" / "class2_3.jpg").read_bytes()
    assert galaxies[3].extras == {"file": "class2/class2_3.jpg"} and galaxies[3].ra is None


@pytest.mark.parametrize(
    ("present", "sizes"), [(("train",), (16, 2, 2)), (("train", "test"), (18, 2, 20)), (("train", "valid"), (18, 20, 2))]
)
def test_missing_splits_are_cut_from_train_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, present: tuple[str, ...], sizes: tuple[int, ...]
) -> None:
    for folder in present:
        class_folders(tmp_path / folder)
    survey = open_survey(tmp_path)
    assert tuple(len(survey.splits[name]) for name in ("train", "val", "test")) == sizes
    for folder, name in (("val", "val"), ("valid", "val"), ("test", "test")):
        if folder in present:
            galaxies = list(survey.read(0, len(survey.labels)))
            assert {galaxies[row].extras["file"].split("/")[0] for row in survey.splits[name]} == {folder}
    assert caplog.text.count("a tenth of train") == 3 - len(present)


def test_adding_a_picture_moves_few_others(tmp_path: Path) -> None:
    def test_files() -> set[str]:
        survey = open_survey(tmp_path)
        galaxies = list(survey.read(0, len(survey.labels)))
        return {galaxies[row].id for row in survey.splits["test"]}

    class_folders(tmp_path, count=40)
    before = test_files()
    write_picture(tmp_path / "class2" / "a_new_one.jpg")
    assert len(before - test_files()) <= 1


def test_galaxy10_names_and_numbers_get_the_official_labels(tmp_path: Path) -> None:
    numbers = class_folders(tmp_path / "numbers", tuple(str(label) for label in range(10)), 3, ".png")
    names = class_folders(tmp_path / "names", GALAXY10_CLASSES, 3, ".png")
    for survey in (open_survey(numbers), open_survey(names)):
        assert survey.class_names == GALAXY10_CLASSES
    galaxy = next(open_survey(names).read(0, 1))
    assert galaxy.extras["file"].startswith("disturbed/") and galaxy.label == 0
    with_eleven = class_folders(tmp_path / "eleven", (*GALAXY10_CLASSES, "stars"), 3, ".png")
    assert open_survey(with_eleven).class_names[0] == "barred_spiral"


def test_real_sample_folds(real_sample: Path) -> None:
    survey = open_survey(real_sample, fold=(0, 3))
    assert survey.name == "galaxy10_decals_sample" and survey.class_names == GALAXY10_CLASSES
    assert len(survey.splits["test"]) == 333 and len(survey.splits["train"]) == 666 and len(survey.splits["val"]) == 0
    galaxy = next(survey.read(998, 999))
    assert galaxy.label == 9 and re.fullmatch(r"\d{5}", galaxy.id)
    assert decode_picture(galaxy.image.data, galaxy.id).shape == (256, 256, 3)


def test_names_that_collide_get_longer(tmp_path: Path) -> None:
    for file in ("train/a/1.png", "train/b/1.png", "val/a/1.png", "train/a/J22.5-00.4.png", "train/b/sub dir/x.y.png"):
        write_picture(tmp_path / file)
    for file in (
        "train/a/2.png",
        "train/b/2.png",
        "test/a/3.png",
        "train/a/._hidden.png",
        "train/a/notes.txt",
        "__MACOSX/a/1.png",
    ):
        write_picture(tmp_path / file) if file.endswith("png") else (tmp_path / file).write_text("")
    survey = open_survey(tmp_path)
    ids = [galaxy.id for galaxy in survey.read(0, len(survey.labels))]
    assert len(ids) == len(set(ids)) == 8
    assert "train-a-J22_5-00_4" in ids and "train-b-sub_dir-x_y" in ids and not any("hidden" in name for name in ids)


@given(st.lists(st.text(max_size=8), min_size=1, max_size=30))
def test_ids_are_always_safe_and_unique(names: list[str]) -> None:
    ids = unique_ids([(name, f"x-{name}") for name in names])
    assert len({name.lower() for name in ids}) == len(ids) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_+-]+", name) for name in ids)
    assert all(safe_name(name) for name in names) and sorted(names, key=natural_key)


def test_other_formats_become_pixels(tmp_path: Path) -> None:
    class_folders(tmp_path, count=5)
    pixels = np.asarray(Image.open(write_picture(tmp_path / "class2" / "a.bmp", 7)))
    for name, mode in (("grey.png", "L"), ("alpha.png", "RGBA"), ("cmyk.jpg", "CMYK"), ("palette.png", "P")):
        write_picture(tmp_path / "class2" / name, 7, mode=mode)
    survey = open_survey(tmp_path)
    galaxies = {galaxy.id: galaxy for galaxy in survey.read(0, len(survey.labels))}
    assert np.array_equal(galaxies["a"].image, pixels) and np.array_equal(galaxies["alpha"].image, pixels)
    for name in ("grey", "alpha", "cmyk", "palette"):
        image = galaxies[name].image
        assert isinstance(image, np.ndarray) and image.shape == (20, 24, 3) and image.dtype == np.uint8


def test_the_source_hash_follows_pictures_and_splits(tmp_path: Path) -> None:
    class_folders(tmp_path)
    hashes = {open_survey(tmp_path).source_hash, open_survey(tmp_path, fold=(0, 2)).source_hash}
    data = bytearray((tmp_path / "class2" / "class2_0.jpg").read_bytes())
    data[-5] ^= 1
    (tmp_path / "class2" / "class2_0.jpg").write_bytes(data)
    hashes.add(open_survey(tmp_path).source_hash)
    write_picture(tmp_path / "class2" / "another.jpg")
    hashes.add(open_survey(tmp_path).source_hash)
    assert len(hashes) == 4 and open_survey(tmp_path).source_hash in hashes


def test_bad_folders_say_what_is_wrong(tmp_path: Path) -> None:
    for folder in ("nothing", "one/a", "splits/val/a", "empty/a", "empty/b", "twice/train/a"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("one/a/1.png", "splits/val/a/1.png", "empty/a/1.png", "few/a/1.png", "few/b/1.png", "few/b/2.png"):
        write_picture(tmp_path / file)
    for file in ("gone/train/a/1.png", "gone/train/a/2.png", "gone/train/a/3.png", "gone/test/a/1.png", "gone/test/b/1.png"):
        write_picture(tmp_path / file)
    for folder, message in (
        ("nothing", "has no class folder; expected one folder of pictures for each class"),
        ("one", "has the class 'a' alone"),
        ("splits", "has val but no train folder"),
        ("empty", "an empty class: .*empty/b has no pictures"),
        ("few", "'a' has 1, 'b' has 2"),
        ("gone", "class 'b' has no training pictures"),
    ):
        with pytest.raises(UserError, match=message):
            open_survey(tmp_path / folder)


def test_own_splits_and_folds_exclude_each_other(tmp_path: Path) -> None:
    class_folders(tmp_path / "train")
    with pytest.raises(UserError, match="split folders of its own"):
        open_survey(tmp_path, fold=(0, 3))


def test_truncated_and_foreign_pictures_are_named(tmp_path: Path) -> None:
    class_folders(tmp_path, count=5)
    whole = (tmp_path / "class2" / "class2_0.jpg").read_bytes()
    with pytest.raises(UserError, match=r"class2_0\.jpg \(\d+ bytes\) cannot be decoded: .*[tT]runcated"):
        decode_picture(whole[: len(whole) // 2], tmp_path / "class2" / "class2_0.jpg")
    for data in (b"", b"no picture", encode_png(np.zeros((4, 4, 3), np.uint8))[:20]):
        (tmp_path / "class10" / "class10_4.jpg").write_bytes(data)
        with pytest.raises(UserError, match=r"class10_4\.jpg .*cannot be decoded"):
            list(open_survey(tmp_path).read(0, 10))
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "class10" / "class10_4.png")
    (tmp_path / "class10" / "class10_4.jpg").unlink()
    with pytest.raises(UserError, match=r"class10_4\.png has pixels of kind 'I;16'"):
        list(open_survey(tmp_path).read(0, 10))
