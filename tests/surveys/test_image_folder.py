"""Any folder of images as a survey."""

import io
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image

from galaxydist.errors import UserError
from galaxydist.galaxy import GALAXY10_CLASSES, EncodedImage
from galaxydist.paths import is_dataset_name
from galaxydist.surveys import folder_scan
from galaxydist.surveys.folder_scan import mirrored_classes, natural_key, safe_name, unique_ids
from galaxydist.surveys.image_files import decode_file, encode_png, parse_image, plain_jpeg_shape
from galaxydist.surveys.image_folder import FolderSurvey
from galaxydist.surveys.survey_sources import open_survey
from tests.helpers.golden_sources import FOLDERS, METADATA, exported_folder, plain_folder, survey_file_hash
from tests.helpers.survey_files import write_image

# Made before a galaxy carried its `source_id`, and before links, tables and endings were read as they are now.
GOLDEN = {
    "plain": "af1ce71c391ba714064bb021397cb777bd1ce77295b118a7cb0cc7eca8f980b0",
    "splits": "ef4b5feaaa62e4746f0257b33bb706ffb8509183272244ef09c1a84eb48c55d7",
    "exported": "20ff3ade83f89594dbee72951658f97883d85f5335813daea53a80a93089c666",
}


def class_folders(root: Path, names: tuple[str, ...] = ("class2", "class10"), count: int = 10, suffix: str = ".jpg") -> Path:
    for name in names:
        for number in range(count):
            write_image(root / name / f"{name}_{number}{suffix}", number)
    return root


def test_class_folders_without_splits_are_split_80_10_10_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
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
    assert galaxies[3].extras == {"file": "class2/class2_3.jpg", "source_id": "class2_3"} and galaxies[3].ra is None


@pytest.mark.parametrize(
    ("present", "sizes"), [(("train",), (16, 2, 2)), (("train", "test"), (18, 2, 20)), (("train", "valid"), (18, 20, 2))]
)
def test_missing_val_and_test_folders_are_cut_from_train_with_a_warning(
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
    assert caplog.text.count("a tenth of each class of train") == 3 - len(present)


def test_adding_an_image_moves_at_most_one_other_out_of_the_test_split(tmp_path: Path) -> None:
    def test_files() -> set[str]:
        survey = open_survey(tmp_path)
        galaxies = list(survey.read(0, len(survey.labels)))
        return {galaxies[row].id for row in survey.splits["test"]}

    class_folders(tmp_path, count=40)
    before = test_files()
    write_image(tmp_path / "class2" / "a_new_one.jpg", 99)
    assert len(before - test_files()) <= 1


def test_numbered_folders_have_galaxy10_names_only_with_classes_galaxy10(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    numbers = class_folders(tmp_path / "numbers", tuple(str(label) for label in range(10)), 3, ".png")
    names = class_folders(tmp_path / "names", GALAXY10_CLASSES, 3, ".png")
    assert open_survey(numbers).class_names == tuple("0123456789")
    assert "if they are Galaxy10's labels, give --classes galaxy10" in caplog.text
    for survey in (open_survey(numbers, classes="galaxy10"), open_survey(names), open_survey(names, classes="galaxy10")):
        assert survey.class_names == GALAXY10_CLASSES
    galaxy = next(open_survey(names).read(0, 1))
    assert galaxy.extras["file"].startswith("disturbed/") and galaxy.label == 0
    with_eleven = class_folders(tmp_path / "eleven", (*GALAXY10_CLASSES, "stars"), 3, ".png")
    assert open_survey(with_eleven).class_names[0] == "barred_spiral"
    with pytest.raises(UserError, match=r"does not have Galaxy10's classes but 'barred_spiral'.* and 6 more"):
        open_survey(with_eleven, classes="galaxy10")
    described = '{"name": "simulated", "variant": "original", "source_hash": "", "num_galaxies": 30}'
    (numbers / "dataset.json").write_text(described)
    assert open_survey(numbers).class_names == GALAXY10_CLASSES
    (numbers / "dataset.json").write_text(described.replace("simulated", "../../x"))
    with pytest.raises(UserError, match=r"dataset\.json: the name '\.\./\.\./x' cannot be a data set's"):
        open_survey(numbers)


def test_real_galaxy_folder_is_split_into_stratified_folds(real_sample: Path) -> None:
    survey = open_survey(real_sample, fold=(0, 3), classes="galaxy10")
    assert survey.name == "galaxy10_decals_sample" and survey.class_names == GALAXY10_CLASSES
    assert len(survey.splits["test"]) == 333 and len(survey.splits["train"]) == 666 and len(survey.splits["val"]) == 0
    galaxy = next(survey.read(998, 999))
    assert galaxy.label == 9 and re.fullmatch(r"\d{5}", galaxy.id)
    assert decode_file(galaxy.image.data, galaxy.id).shape == (256, 256, 3)


def test_colliding_file_names_get_longer_unique_ids(tmp_path: Path) -> None:
    for file in ("train/a/1.png", "train/b/1.png", "val/a/1.png", "train/a/J22.5-00.4.png", "train/b/sub dir/x.y.png"):
        write_image(tmp_path / file)
    for file in (
        "train/a/2.png",
        "train/b/2.png",
        "test/a/3.png",
        "train/a/._hidden.png",
        "train/a/notes.txt",
        "__MACOSX/a/1.png",
    ):
        write_image(tmp_path / file) if file.endswith("png") else (tmp_path / file).write_text("")
    survey = open_survey(tmp_path)
    ids = [galaxy.id for galaxy in survey.read(0, len(survey.labels))]
    assert len(ids) == len(set(ids)) == 8
    assert "train-a-J22_5-00_4" in ids and "train-b-sub_dir-x_y" in ids and not any("hidden" in name for name in ids)


@given(st.lists(st.text(max_size=8), min_size=1, max_size=30))
def test_image_ids_are_always_safe_and_unique(names: list[str]) -> None:
    ids = unique_ids([(name, f"x-{name}") for name in names])
    assert len({name.lower() for name in ids}) == len(ids) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_+-]+", name) for name in ids)
    assert all(is_dataset_name(safe_name(name)) for name in names), "a folder's name that no recipe could name"
    assert len({natural_key(name) for name in names}) == len({*names}), "two names with one key: their order would be chance"


def test_images_of_other_formats_and_modes_are_read_as_rgb_pixels(tmp_path: Path) -> None:
    class_folders(tmp_path, count=5)
    pixels = np.asarray(Image.open(write_image(tmp_path / "class2" / "a.bmp", 7)))
    for name, mode in (("grey.png", "L"), ("alpha.png", "RGBA"), ("cmyk.jpg", "CMYK"), ("palette.png", "P")):
        write_image(tmp_path / "class2" / name, 7, mode=mode)
    survey = open_survey(tmp_path)
    galaxies = {galaxy.id: galaxy for galaxy in survey.read(0, len(survey.labels))}
    assert np.array_equal(galaxies["a"].image, pixels) and np.array_equal(galaxies["alpha"].image, pixels)
    for name in ("grey", "alpha", "cmyk", "palette"):
        image = galaxies[name].image
        assert isinstance(image, np.ndarray) and image.shape == (20, 24, 3) and image.dtype == np.uint8


def test_source_hash_changes_with_images_and_folds(tmp_path: Path) -> None:
    class_folders(tmp_path)
    hashes = {open_survey(tmp_path).source_hash, open_survey(tmp_path, fold=(0, 2)).source_hash}
    data = bytearray((tmp_path / "class2" / "class2_0.jpg").read_bytes())
    data[-5] ^= 1
    (tmp_path / "class2" / "class2_0.jpg").write_bytes(data)
    hashes.add(open_survey(tmp_path).source_hash)
    write_image(tmp_path / "class2" / "another.jpg")
    hashes.add(open_survey(tmp_path).source_hash)
    assert len(hashes) == 4 and open_survey(tmp_path).source_hash in hashes


def test_source_hashes_equal_those_of_earlier_versions(tmp_path: Path) -> None:
    assert {name: open_survey(make(tmp_path / name)).source_hash for name, make in FOLDERS.items()} == GOLDEN
    plain = tmp_path / "plain"
    assert open_survey(plain, "balanced").source_hash == "651a2535257345831d5bfee4f3fa5083786f7b489fc8f917c1c84e69a4deaacf"
    folded = open_survey(plain, fold=(0, 2), name="x")
    assert folded.source_hash == "674fbf0fc3567a126032b9b61f31bcb9d66c81338a68249b0bca4f45db496340"
    assert survey_file_hash(tmp_path) == "4c549a2d7acdcc0c90717b90c7f93a9d9720b2372c00cd48a643dafbf26d4baa"


def test_image_folder_galaxies_keep_their_source_ids_and_files(tmp_path: Path) -> None:
    galaxies = list(open_survey(plain_folder(tmp_path / "plain")).read(0, 16))
    assert (galaxies[9].id, galaxies[9].extras["source_id"]) == ("J22_1-00_4", "J22.1-00.4")
    assert galaxies[9].extras["file"] == "class10/part 1/J22.1-00.4.PPM"
    exported = list(open_survey(exported_folder(tmp_path / "exported")).read(0, 8))
    assert [galaxy.extras.get("file") for galaxy in exported] == [None] * 7 + ["train/a/later.ppm"]
    image = tmp_path / "plain" / "class2" / "3.ppm"
    image.rename(image.with_name(os.fsdecode(b"3\xe9.ppm")))
    odd = next(open_survey(tmp_path / "plain").read(3, 4))
    assert (odd.id, odd.extras["source_id"], odd.extras["file"]) == ("3", "3\\xe9", "class2/3\\xe9.ppm")


def test_image_folder_order_does_not_depend_on_directory_listing_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for label, name in enumerate(("010", "10", "z")):
        for number, file in enumerate(("1.png", "01.png", "2.png", "002.png")):
            write_image(tmp_path / name / file, 4 * label + number)
    listed = folder_scan._entries
    found = []
    for reverse in (False, True):
        monkeypatch.setattr(
            folder_scan, "_entries", lambda path, way=reverse: sorted(listed(path), key=lambda entry: entry.name, reverse=way)
        )
        survey = open_survey(tmp_path)
        found.append((survey.class_names, survey.images.files, survey.source_hash))
    assert found[0] == found[1]
    assert found[0][0] == ("010", "10", "z") and found[0][1][:4] == ("010/01.png", "010/1.png", "010/002.png", "010/2.png")


def test_image_reached_twice_through_links_is_read_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = class_folders(tmp_path / "mine", ("a", "b"), 6)
    pool = class_folders(tmp_path / "pool", ("p",), 3)
    for name in ("a", "b"):
        (root / name / "self").symlink_to(".")
        (root / name / "up").symlink_to("../..")
    (root / "a" / "other").symlink_to(root / "b")  # what lies in b itself stays in b
    (root / "a" / "again.jpg").symlink_to(root / "b" / "b_1.jpg")
    (root / "b" / "pool").symlink_to(pool)
    (root / "b" / "pool2").symlink_to(pool / "p")
    (root / "b" / "one.jpg").symlink_to(pool / "p" / "p_0.jpg")
    (root / "b" / "new.jpg").symlink_to(write_image(tmp_path / "elsewhere.jpg"))
    survey = open_survey(root)
    assert survey.images.files == (
        *(f"a/a_{number}.jpg" for number in range(6)),
        *(f"b/b_{number}.jpg" for number in range(6)),
        *("b/new.jpg", "b/one.jpg", "b/pool/p/p_1.jpg", "b/pool/p/p_2.jpg"),
    )
    assert (
        "each folder and image is read once, though several links lead to some: 'a/again.jpg', 'a/other', 'a/self'" in caplog.text
    )
    (root / "c").symlink_to("a")
    with pytest.raises(UserError, match=r"an empty class: .*c has no images .*its links lead to images that are elsewhere"):
        open_survey(root)


@pytest.mark.parametrize("kind", ["mark", "crlf", "semicolon"])
def test_metadata_csv_saved_by_a_spreadsheet_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    expected = open_survey(exported_folder(tmp_path / "before")).rows
    lines = METADATA.replace("false", "FALSE").replace("true", "TRUE").splitlines()
    text = "\n".join(lines)
    if kind == "semicolon":
        cells = [line.replace('"[1, 2]"', "[1: 2]").split(",") for line in lines]
        decimal = [[cell.replace(".", ",") if re.fullmatch(r"-?\d+\.\d+", cell) else cell for cell in line] for line in cells]
        text = "\n".join(";".join(line) for line in decimal).replace("[1: 2]", "[1, 2]")
    folder = exported_folder(tmp_path / "after")
    data = text.encode("utf-8-sig" if kind == "mark" else "utf-8")
    (folder / "metadata.csv").write_bytes(data.replace(b"\n", b"\r\n") if kind == "crlf" else data)
    assert open_survey(folder).rows == expected
    assert open_survey(folder).source_hash == GOLDEN["exported"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (METADATA.replace("10.5,", "10:30:00,").encode(), r"metadata\.csv, line 2: ra='10:30:00' is not a number; give decimal"),
        (
            METADATA.replace(",80,", ",123,").encode(),
            r"metadata\.csv, val/a/v\.ppm: ra=12\.5, dec=123 is not a sky position \(4 of 8 are",
        ),
        (METADATA.replace("false", "falsch").encode(), r"line 2: conflicting='falsch' is neither true nor false"),
        (METADATA.replace("two words", "zwei W\xf6rter").encode("cp1252"), r"is not UTF-8 text .*save it as"),
        ((METADATA + METADATA.splitlines()[3]).encode(), r"line 9: val/a/v\.ppm is listed twice"),
        (METADATA.replace("two words", "two,words").encode(), r"line 2: 11 cells under 10 columns"),
        (METADATA.encode() + b"x" * 200_000, r"is not a CSV table \(field larger than"),
    ],
)
def test_unusable_metadata_csv_is_refused_with_its_problem(tmp_path: Path, changed: bytes, message: str) -> None:
    folder = exported_folder(tmp_path)
    (folder / "metadata.csv").write_bytes(changed)
    with pytest.raises(UserError, match=message):
        open_survey(folder)


def test_metadata_csv_of_the_user_gives_ids_positions_and_splits_or_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class_folders(tmp_path)
    numbers = range(10)
    splits = ["Test", "Test", "Valid", *["train"] * 7]
    lines = [f"class2_{n}.jpg,objid {n},{splits[n]},0{n},+.5,7,-.25,9" for n in numbers]
    lines += [f"./class10\\class10_{n}.jpg,SDSS {n},{'test' if n < 1 else 'train'},nan,,8,+1.,9" for n in numbers]
    (tmp_path / "metadata.csv").write_text("\n".join(["File_Name,ID,split,RA,dec,label,z,source_id", *lines]))
    survey = open_survey(tmp_path)
    first = next(survey.read(0, 1))
    assert (first.id, first.ra, first.dec, first.label) == ("objid_0", 0.0, 0.5, 0)
    assert first.extras == {"source_id": "objid 0", "file": "class2/class2_0.jpg", "label": 7, "z": -0.25, "source_id_": 9}
    assert (survey.ra[9], survey.extras["z"][10].as_py()) == (9, 1) and np.isnan(survey.ra[10:]).all()
    assert {name: rows.tolist() for name, rows in survey.splits.items() if name != "train"} == {"val": [2], "test": [0, 1, 10]}
    assert "80/10/10" not in caplog.text
    (tmp_path / "metadata.csv").write_text((tmp_path / "metadata.csv").read_text().replace("Valid", "maybe"))
    with pytest.raises(UserError, match="the split of objid_2 is 'maybe', not train, val or test"):
        open_survey(tmp_path)
    (tmp_path / "metadata.csv").write_text("galaxy,ra,dec\nclass2_0,1,2\n")
    assert next(open_survey(tmp_path).read(0, 1)).ra is None
    assert "metadata.csv is ignored: none of its columns (galaxy, ra, dec) is named file or file_name" in caplog.text


def test_other_image_suffixes_are_read_and_unreadable_ones_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class_folders(tmp_path, count=4)
    for ending in ("jfif", "JPE", "jp2", "avif"):
        image = write_image(tmp_path / "new" / f"{ending}.{'jpg' if ending[0] == 'J' or ending == 'jfif' else ending}")
        image.rename(image.with_suffix(f".{ending}"))
    thumbnails = tmp_path / "class10" / "@eaDir" / "class10_1.jpg"
    thumbnails.mkdir(parents=True)
    write_image(thumbnails / "THUMB.jpg")
    for file in ("a.fits", "b.FITS", "c.txt", "noend"):
        (tmp_path / "class2" / file).touch()
    os.mkfifo(tmp_path / "class2" / "pipe.jpg")
    write_image(tmp_path / "loose.png")
    (tmp_path / "@eaDir").mkdir()
    survey = open_survey(tmp_path)
    assert survey.class_names == ("class2", "class10", "new") and len(survey.images.files) == 12
    assert {galaxy.image.format if isinstance(galaxy.image, EncodedImage) else "pixels" for galaxy in survey.read(8, 12)} == {
        "jpg",
        "pixels",
    }
    assert (
        "left out: 2 .fits, 1 .png beside the class folders, 1 .txt, 1 in @eaDir, 1 pipe, socket or device, 1 without an ending "
        "(FITS is not read" in caplog.text
    )
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "1.fits").touch()
    with pytest.raises(UserError, match=r"an empty class: .*only has no images \(.*\): it has 1 \.fits \(FITS is not read"):
        open_survey(tmp_path)


def test_headers_of_jpeg_files_are_read_as_pillow_reads_them() -> None:
    """Only plain files are kept as bytes; a header without Pillow decides as Pillow does."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6

    def saved(image: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
        image.save(stream := io.BytesIO(), form, **options)
        return stream.getvalue()

    rgb = Image.fromarray(pixels)
    plain = [
        saved(rgb, subsampling=0),
        saved(rgb, progressive=True),
        saved(rgb, icc_profile=bytes(3000)),
        saved(rgb, comment=b"a"),
    ]
    others = [saved(rgb, exif=turned), saved(rgb.convert("L")), saved(rgb.convert("CMYK")), saved(rgb, keep_rgb=True)]
    others.append(saved(rgb, "MPO", save_all=True, append_images=[rgb]))
    for data in plain:
        assert plain_jpeg_shape(data) == (24, 32) and parse_image(data, "a") == EncodedImage(data, "jpg", "a")
        assert plain_jpeg_shape(data[:20]) is None
    for data in others:
        assert plain_jpeg_shape(data) is None
        found = parse_image(data, "a")
        decoded = decode_file(data, "a")
        assert isinstance(found, EncodedImage) or np.array_equal(found, decoded)
    assert np.shape(decode_file(others[0], "a")) == (32, 24, 3)


def test_images_are_rotated_by_exif_and_transparent_pixels_are_black(tmp_path: Path) -> None:
    class_folders(tmp_path, count=5)
    upright = np.asarray(Image.open(tmp_path / "class2" / "class2_0.jpg"))
    mark = Image.Exif()
    for number, orientation in enumerate((1, 6)):
        mark[0x112] = orientation
        Image.fromarray(upright).save(tmp_path / "class2" / f"turned{number}.png", exif=mark)
    hidden = np.full((20, 24, 4), (255, 0, 255, 0), np.uint8)
    hidden[5:9] = (30, 220, 30, 255)
    hidden[9:12] = (100, 200, 50, 128)
    Image.fromarray(hidden).save(tmp_path / "class2" / "hidden.png")
    Image.fromarray(np.full((20, 24, 3), 7, np.uint8)).save(tmp_path / "class2" / "keyed.png", transparency=(7, 7, 7))
    galaxies = {galaxy.id: galaxy.image for galaxy in open_survey(tmp_path).read(0, 9)}
    assert isinstance(galaxies["turned0"], EncodedImage)
    assert np.array_equal(galaxies["turned1"], np.rot90(upright, -1))
    shown = galaxies["hidden"]
    assert isinstance(shown, np.ndarray) and not shown[:5].any() and not shown[12:].any()
    assert (shown[5:9] == (30, 220, 30)).all() and np.abs(shown[9:12].astype(int) - (50, 100, 25)).max() <= 1
    assert isinstance(galaxies["keyed"], np.ndarray) and not galaxies["keyed"].any()


def test_invalid_image_folder_is_refused_with_its_problem(tmp_path: Path) -> None:
    for folder in ("nothing", "one/a", "splits/val/a", "empty/a", "empty/b", "twice/train/a"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("one/a/1.png", "splits/val/a/1.png", "empty/a/1.png", "few/a/1.png", "few/b/1.png", "few/b/2.png"):
        write_image(tmp_path / file)
    write_image(tmp_path / "table" / "images" / "1.png")
    (tmp_path / "table" / "list.csv").touch()
    for file in ("gone/train/a/1.png", "gone/train/a/2.png", "gone/train/a/3.png", "gone/test/a/1.png", "gone/test/b/1.png"):
        write_image(tmp_path / file)
    for folder, message in (
        ("nothing", "has no class folder; expected one folder of images for each class"),
        ("one", "has only the class 'a'"),
        (
            "table",
            r"has only the class 'images'; .*If list\.csv lists the images with their classes, give --from .*table/list\.csv",
        ),
        ("splits", "has val but no train folder"),
        ("empty", "an empty class: .*empty/b has no images"),
        ("few", "'a' has 1, 'b' has 2"),
        ("gone", "class 'b' has no training images"),
    ):
        with pytest.raises(UserError, match=message):
            open_survey(tmp_path / folder)


def test_fold_of_a_folder_with_split_folders_is_refused(tmp_path: Path) -> None:
    class_folders(tmp_path / "train")
    with pytest.raises(UserError, match="a split of its own"):
        open_survey(tmp_path, fold=(0, 3))


def test_truncated_and_undecodable_images_are_named(tmp_path: Path) -> None:
    class_folders(tmp_path, count=5)
    whole = (tmp_path / "class2" / "class2_0.jpg").read_bytes()
    with pytest.raises(UserError, match=r"class2_0\.jpg \(\d+ bytes\) cannot be decoded: .*[tT]runcated"):
        decode_file(whole[: len(whole) // 2], tmp_path / "class2" / "class2_0.jpg")
    for data in (b"", b"no image", encode_png(np.zeros((4, 4, 3), np.uint8))[:20]):
        (tmp_path / "class10" / "class10_4.jpg").write_bytes(data)
        with pytest.raises(UserError, match=r"class10_4\.jpg .*cannot be decoded"):
            list(open_survey(tmp_path).read(0, 10))
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "class10" / "class10_4.png")
    (tmp_path / "class10" / "class10_4.jpg").unlink()
    with pytest.raises(UserError, match=r"class10_4\.png has pixels of kind 'I;16'"):
        list(open_survey(tmp_path).read(0, 10))


def test_byte_equal_images_are_in_the_same_split_and_conflicting_ones_train(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class_folders(tmp_path, count=30)
    copies = {f"class2/class2_{n}.jpg": f"class2/copy_{n}.jpg" for n in range(30)}  # all of a class twice
    copies["class10/class10_0.jpg"] = "class2/other.jpg"
    for file, copy in copies.items():
        shutil.copy(tmp_path / file, tmp_path / copy)
    for number in range(2):
        write_blank(tmp_path / "class10" / f"blank_{number}.png")
    survey = open_survey(tmp_path)
    assert isinstance(survey, FolderSurvey)
    split_of = {survey.images.files[row]: split for split, rows in survey.splits.items() for row in rows.tolist()}
    assert all(split_of[file] == split_of[copy] for file, copy in copies.items())
    assert all(len(rows) for rows in survey.splits.values())
    assert "31 images are copies of others, byte for byte" in caplog.text
    assert "1 images are in two classes, byte for byte: class2/other.jpg = class10/class10_0.jpg" in caplog.text
    assert split_of["class2/other.jpg"] == "train", "a galaxy with two labels judges nobody"
    dropped = open_survey(tmp_path, conflicting="drop")
    assert sum(map(len, dropped.splits.values())) == len(survey.images.files) - 2
    for k in range(3):
        test = {survey.images.files[row] for row in open_survey(tmp_path, fold=(k, 3)).splits["test"].tolist()}
        assert all((file in test) == (copy in test) for file, copy in copies.items())


def write_blank(path: Path) -> None:
    Image.new("RGB", (20, 24), (7, 7, 7)).save(path)


def test_split_folders_are_found_under_many_names_but_one_per_split(tmp_path: Path) -> None:
    for names in (("Training", "Dev", "Testing"), ("train", "eval", "test")):
        root = tmp_path / names[0]
        for number, name in enumerate(names):
            class_folders(root / name, names=("a", "b"), count=3 + number)
        assert [len(rows) for rows in open_survey(root).splits.values()] == [6, 8, 10]
    class_folders(root / "valid")
    with pytest.raises(UserError, match=r"the folders eval, valid all name the val split"):
        open_survey(root)


def test_image_folder_opened_with_has_val_false_has_no_validation_split(tmp_path: Path) -> None:
    for folder in ("given/train", "given/test", "new"):
        class_folders(tmp_path / folder)
    for folder, sizes in (("given", [20, 0, 20]), ("new", [18, 0, 2])):
        assert [len(rows) for rows in open_survey(tmp_path / folder, has_val=False).splits.values()] == sizes
    class_folders(tmp_path / "given" / "val")
    with pytest.raises(UserError, match="--val 0 is for a folder without one"):
        open_survey(tmp_path / "given", has_val=False)


def test_mirrored_classes_finds_class_names_that_are_mirror_images() -> None:
    assert mirrored_classes(["clockwise", "edge", "Counter-Clockwise"]) == ["clockwise", "Counter-Clockwise"]
    assert mirrored_classes(["S-spiral", "Z-spiral", "cw", "acw"]) == ["S-spiral", "Z-spiral", "cw", "acw"]
    assert mirrored_classes(["clockwise", "left", "S0", "spiral", "anticlockwise_barred"]) == []
