"""Survey files in Galaxy10's schema: what they offer, which file is the official one, what is wrong with bad ones."""

import pickle
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from galaxydist.errors import UserError
from galaxydist.galaxy import GALAXY10_CLASSES
from galaxydist.surveys.galaxy10 import open_galaxy10
from galaxydist.surveys.official_split import read_official_split
from galaxydist.surveys.split import TEST
from galaxydist.surveys.survey_sources import open_survey
from tests.helpers.survey_files import write_survey


@pytest.fixture(scope="module")
def survey_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("survey") / "simulated.h5"
    write_survey(path)
    return path


@pytest.fixture
def own_copy(survey_file: Path, tmp_path: Path) -> Path:
    path = tmp_path / "own.h5"
    path.write_bytes(survey_file.read_bytes())
    return path


def official_file(path: Path, positions_csv: Path, chunks: tuple[int, ...] = (1109, 16, 16, 1)) -> None:
    """A file with the official labels and positions and 17,736 black images that take no room."""
    table = np.genfromtxt(positions_csv, delimiter=",", names=True)
    num = len(table)
    with h5py.File(path, "w") as h5:
        h5.create_dataset("images", (num, 256, 256, 3), np.uint8, chunks=chunks, compression="gzip")
        h5["ans"] = table["label"].astype(np.uint8)
        h5["ra"], h5["dec"] = table["ra"], table["dec"]
        h5["redshift"], h5["pxscale"] = np.full(num, np.nan), np.full(num, 0.262)


def test_survey_file_gives_labels_splits_images_and_extras(survey_file: Path) -> None:
    survey = open_survey(survey_file)
    assert (survey.name, survey.variant, survey.class_names) == ("simulated", "original", GALAXY10_CLASSES)
    assert np.array_equal(survey.labels, np.repeat(np.arange(10), 12)) and survey.labels.dtype == np.int64
    rows = np.concatenate(list(survey.splits.values()))
    assert list(survey.splits) == ["train", "val", "test"] and np.array_equal(np.sort(rows), np.arange(120))
    galaxies = list(survey.read(0, 120))
    assert [galaxy.id for galaxy in galaxies] == [f"sim-{row:05d}" for row in range(120)]
    with h5py.File(survey_file) as h5:
        assert all(np.array_equal(galaxy.image, h5["images"][row]) for row, galaxy in enumerate(galaxies))
        assert [galaxy.ra for galaxy in galaxies] == h5["ra"][:].tolist()
    first = galaxies[0]
    assert first.extras == {"row": 0, "redshift": None, "pxscale": 0.262, "conflicting": True, "original_split": "train"}
    assert galaxies[119].extras["conflicting"] and not galaxies[1].extras["conflicting"]


def test_survey_file_can_be_pickled(survey_file: Path) -> None:
    survey = pickle.loads(pickle.dumps(open_survey(survey_file)))
    assert next(survey.read(7, 8)).id == "sim-00007"


def test_survey_variants_and_conflicting_drop_have_their_splits_and_hashes(survey_file: Path) -> None:
    original, dropped = open_survey(survey_file), open_survey(survey_file, conflicting="drop")
    balanced = open_survey(survey_file, "balanced")
    assert set(original.splits["train"]) - set(dropped.splits["train"]) == {0, 119}
    assert len(balanced.splits["test"]) == 20 and len(balanced.splits["val"]) == 10
    hashes = {survey.source_hash for survey in (original, dropped, balanced, open_survey(survey_file, name="other"))}
    assert len(hashes) == 4
    assert original.source_hash == open_survey(survey_file).source_hash


def test_survey_folds_test_each_galaxy_once_without_validation(survey_file: Path) -> None:
    tests = [open_survey(survey_file, fold=(k, 3)).splits["test"] for k in range(3)]
    assert np.array_equal(np.sort(np.concatenate(tests)), np.arange(120))
    assert len(open_survey(survey_file, fold=(0, 3)).splits["val"]) == 0


@pytest.mark.parametrize("chunks", [(50, 32, 32, 1), (7, 256, 256, 3), (120, 64, 64, 3)])
def test_survey_files_with_any_hdf5_chunks_give_the_same_images(
    survey_file: Path, tmp_path: Path, chunks: tuple[int, ...]
) -> None:
    path = tmp_path / "wide.h5"
    with h5py.File(survey_file) as source, h5py.File(path, "w") as copy:
        for name in source:
            options = {"chunks": chunks, "compression": "gzip", "compression_opts": 1} if name == "images" else {}
            copy.create_dataset(name, data=source[name][:], **options)
    one, other = open_survey(survey_file), open_survey(path)
    assert other.slab_length % chunks[0] == 0 and other.name == "wide"
    for start, stop in ((0, 120), (45, 101)):
        pairs = zip(one.read(start, stop), other.read(start, stop), strict=True)
        assert all(np.array_equal(a.image, b.image) for a, b in pairs)
    assert {name: rows.tolist() for name, rows in one.splits.items()} == {n: r.tolist() for n, r in other.splits.items()}


def test_the_official_file_gets_the_shipped_split(real_data: Path, tmp_path: Path) -> None:
    official_file(tmp_path / "any name.h5", real_data / "galaxy10_decals_positions.csv")
    survey, shipped = open_survey(tmp_path / "any name.h5"), read_official_split()
    assert survey.name == "galaxy10_decals" and survey.slab_length == 1109
    assert np.array_equal(survey.splits["test"], np.flatnonzero(shipped.original == TEST))
    balanced = open_survey(tmp_path / "any name.h5", "balanced")
    assert np.array_equal(balanced.splits["test"], np.flatnonzero(shipped.balanced == TEST))
    galaxy = next(survey.read(17735, 17736))
    assert galaxy.id == "g10-17735" and galaxy.label == 9 and not np.any(galaxy.image)


def test_official_labels_with_other_positions_are_refused(real_data: Path, tmp_path: Path) -> None:
    official_file(tmp_path / "g.h5", real_data / "galaxy10_decals_positions.csv")
    with h5py.File(tmp_path / "g.h5", "r+") as h5:
        h5["ra"][...] = h5["ra"][:][::-1]
    with pytest.raises(UserError, match=r"not its positions.*fetch it again"):
        open_survey(tmp_path / "g.h5")


def test_unofficial_file_named_like_galaxy10_gets_another_name(tmp_path: Path) -> None:
    write_survey(tmp_path / "Galaxy10_DECals.h5", simulated=False)
    assert open_survey(tmp_path / "Galaxy10_DECals.h5").name == "Galaxy10_DECals_unofficial"


def remove(name: str) -> Callable[[h5py.File], None]:
    return lambda h5: h5.__delitem__(name)


def replace(name: str, values: object) -> Callable[[h5py.File], None]:
    def change(h5: h5py.File) -> None:
        del h5[name]
        h5[name] = values

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("redshift"), r"no data set 'redshift' \(it has ans, dec, images, pxscale, ra\)"),
        (replace("images", np.zeros((120, 69, 69, 3), np.uint8)), r"'images' is uint8 of shape \(120, 69, 69, 3\); expected"),
        (replace("images", np.zeros((120, 256), np.float32)), "'images' is float32"),
        (replace("ra", np.zeros(5)), r"'ra' has shape \(5,\)"),
        (replace("ans", np.zeros(120)), "'ans' is float64; expected integers"),
        (replace("dec", np.array([b"x"] * 120)), "'dec' is .*expected numbers"),
        (
            replace("ans", np.array([0] * 118 + [10, 11], np.uint8)),
            r"2 of 120 labels are outside 0-9, the first in row 118 \(10\)",
        ),
        (replace("ans", np.array([0] * 119 + [-1], np.int16)), r"1 of 120 labels are outside"),
        (lambda h5: (h5.__delitem__("ans"), h5.create_group("ans")), "'ans' is a group; expected a data set"),
        (lambda h5: (h5.__delitem__("images"), h5.create_group("images")), "'images' is a group; expected a data set"),
        (replace("ra", h5py.ExternalLink("gone.h5", "ra")), r"'ra' is a broken link to gone\.h5; restore that file"),
        (replace("dec", h5py.Empty("f8")), "'dec' is a data set without values"),
        (
            replace("dec", np.r_[np.zeros(118), 123, -91]),
            r"row 118: ra=[\d.]+, dec=123 is not a sky position \(2 of 120 are",
        ),
        (replace("ans", np.repeat(np.arange(8), 15)), "an empty class: 'edge_on_without_bulge' has 0"),
    ],
)
def test_invalid_survey_file_is_refused_with_its_problem(
    own_copy: Path, change: Callable[[h5py.File], None], message: str
) -> None:
    with h5py.File(own_copy, "r+") as h5:
        change(h5)
    with pytest.raises(UserError, match=message):
        open_galaxy10(own_copy)


def test_missing_and_non_hdf5_survey_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"galaxydist data fetch.*galaxydist data simulate"):
        open_survey(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("not HDF5")
    with pytest.raises(UserError, match="not an HDF5 file"):
        open_survey(tmp_path / "text.h5")


def test_truncated_survey_file_is_refused(own_copy: Path) -> None:
    own_copy.write_bytes(own_copy.read_bytes()[: own_copy.stat().st_size // 2])
    with pytest.raises(UserError, match=r"own\.h5 is truncated.*fetch or make the file again"):
        open_survey(own_copy)


def test_damaged_hdf5_chunk_is_reported_with_its_rows(survey_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged.h5"
    with h5py.File(survey_file) as source, h5py.File(path, "w") as copy:
        for name in source:
            options = {"chunks": (40, 256, 256, 3), "compression": "gzip"} if name == "images" else {}
            copy.create_dataset(name, data=source[name][:], **options)
        where = copy["images"].id.get_chunk_info(1)
    survey = open_galaxy10(path)
    with path.open("rb+") as stream:
        stream.seek(where.byte_offset + 100)
        stream.write(bytes(1000))
    assert len(list(survey.read(0, 40))) == 40
    with pytest.raises(UserError, match=r"cannot read images of rows 40 \.\.\. 79"):
        list(survey.read(0, 120))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "other"}, "no variant 'other'; choose from original, balanced"),
        ({"conflicting": "maybe"}, "conflicting='maybe'; choose from keep, drop"),
        ({"variant": "balanced", "fold": (0, 3)}, "a cross-validation uses the original variant"),
        ({"fold": (3, 3)}, "fold 3 of 3: folds are numbered 0 to n - 1"),
    ],
)
def test_open_survey_refuses_invalid_variants_conflicting_and_folds(
    survey_file: Path, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        open_survey(survey_file, **arguments)  # type: ignore[arg-type]
