"""Parquet files with images: the Hub's data sets, HATS catalogues, what is read how often, and what is refused."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from galaxydist.cli.main import main
from galaxydist.errors import DamagedImageError, UserError
from galaxydist.galaxy import EncodedImage
from galaxydist.shards.writer.writer import write_shards
from galaxydist.surveys.image_arrays import ArrayOptions, PixelScaling
from galaxydist.surveys.image_folder import FolderSurvey
from galaxydist.surveys.image_table import TableSurvey
from galaxydist.surveys.survey_sources import SourceOptions, open_survey
from galaxydist.surveys.table_columns import ColumnNames
from galaxydist.surveys.tables.parquet_images import ParquetImages
from tests.helpers.hub_server import COMMIT, HubServer
from tests.helpers.image_data import write_hats
from tests.helpers.servers import s3_server
from tests.helpers.survey_files import write_image

PIXELS = np.random.default_rng(0).integers(0, 256, (60, 12, 12, 3), dtype=np.uint8)
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def images_of(rows: range) -> pa.Array:
    return pa.array([{"bytes": png(PIXELS[row]), "path": None} for row in rows], STRUCT)


def features(**found: Any) -> dict[bytes, bytes]:
    """The schema's metadata as `datasets` writes it."""
    return {b"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}, **found}}}).encode()}


def write(path: Path, rows: range = range(60), row_group_size: int = 7, **columns: Any) -> Path:
    """A file of the Hub with these rows, whose ``label`` is a ClassLabel."""
    path.parent.mkdir(parents=True, exist_ok=True)
    named = {"image": images_of(rows), "label": [row % 3 for row in rows], **columns}
    table = pa.table(named).replace_schema_metadata(features(label={"_type": "ClassLabel", "names": ["spiral", "bar", "ring"]}))
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def opened(path: str | Path, **source: Any) -> TableSurvey:
    survey = open_survey(path, source=SourceOptions(**source))
    assert isinstance(survey, TableSurvey)
    return survey


def pixels_of(survey: TableSurvey, start: int, stop: int) -> np.ndarray:
    found = [galaxy.image for galaxy in survey.read(start, stop)]
    return np.stack([np.asarray(Image.open(io.BytesIO(i.data))) if isinstance(i, EncodedImage) else i for i in found])


def test_classes_keep_the_order_of_their_numbers_and_minus_one_is_unlabelled(tmp_path: Path) -> None:
    labels = [row % 3 if row != 7 else -1 for row in range(60)]
    survey = opened(write(tmp_path / "zoo.parquet", label=labels))
    assert survey.name == "zoo" and survey.class_names == ("spiral", "bar", "ring")
    assert survey.labels.tolist() == labels and [row.row for row in survey.left_out] == [7]
    assert survey.ids[3] == "zoo-0000003"
    with pytest.raises(UserError, match=r"column 'label': 3 is not a class number from 0 to 2"):
        opened(write(tmp_path / "zoo.parquet", label=[3, *labels[1:]]))
    named = opened(tmp_path / "zoo.parquet", class_names=("a", "b", "c", "d"))
    assert named.class_names == ("a", "b", "c", "d")


def test_each_row_group_is_read_once_however_the_rows_are_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, rows in enumerate((range(23), range(23, 30), range(30, 60))):
        write(tmp_path / "zoo" / f"part-{number}.parquet", rows)
    survey = opened(tmp_path / "zoo")
    assert isinstance(survey.images, ParquetImages) and survey.slab_length == 35
    read: list[tuple[str, int]] = []
    iter_batches = pq.ParquetFile.iter_batches

    def counted(self: pq.ParquetFile, size: int, groups: list[int], *args: Any, **named: Any) -> Any:
        read.extend((self.metadata.row_group(0).num_rows, group) for group in groups)
        return iter_batches(self, size, groups, *args, **named)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    np.testing.assert_array_equal(pixels_of(survey, 0, 60), PIXELS)
    assert len(read) == len(survey.images.group_file) == 10
    for start, stop in ((0, 1), (20, 31), (29, 30), (59, 60)):
        np.testing.assert_array_equal(pixels_of(survey, start, stop), PIXELS[start:stop])


def test_file_names_give_the_split_unless_all_are_of_train(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "zoo"
    write(folder / "data" / "train-00000-of-00002.parquet", range(30))
    write(folder / "data" / "train-00001-of-00002.parquet", range(30, 40))
    assert {len(rows) for rows in opened(folder).splits.values()} != {40, 0}
    write(folder / "data" / "validation-00000-of-00001.parquet", range(40, 46))
    write(folder / "data" / "test-00000-of-00001.parquet", range(46, 54))
    write(folder / "data" / "extra-00000-of-00001.parquet", range(54, 60))
    survey = opened(folder)
    assert [len(survey.splits[split]) for split in ("train", "val", "test")] == [40, 6, 8]
    assert "left out, of a split other than train, val and test: data/extra-00000-of-00001.parquet" in caplog.text
    assert len(survey.left_out) == 6
    rows = survey.splits["test"]
    np.testing.assert_array_equal(pixels_of(survey, int(rows[0]), int(rows[-1]) + 1), PIXELS[46:54])


def test_the_card_chooses_files_and_states_the_licence(tmp_path: Path) -> None:
    folder = tmp_path / "zoo"
    for name, rows in (("full/one", range(40)), ("full/two", range(40, 60)), ("tiny/one", range(6))):
        write(folder / f"{name}.parquet", rows)
    with pytest.raises(UserError, match=r"has 2 configurations, full, tiny: give the folder or file of one"):
        opened(folder)
    files = "[{split: train, path: full/one*}, {split: test, path: full/two*}]"
    (folder / "README.md").write_text(
        f"---\nlicense: cc-by-nc-sa-4.0\nconfigs:\n- {{config_name: default, data_files: {files}}}\n"
        "- {config_name: tiny, data_files: tiny/*}\n---\n# Galaxies\n"
    )
    survey = opened(folder)
    assert survey.origin is not None and survey.origin.licence == "CC-BY-NC-SA-4.0"
    assert len(survey.splits["test"]) == 20 and len(survey.labels) == 60
    assert len(opened(folder / "tiny").labels) == 6
    (folder / "README.md").write_text("---\nlicense: [unclosed\n---\n")
    with pytest.raises(UserError, match="2 configurations"):
        opened(folder)


def test_images_without_bytes_come_from_their_path_or_are_left_out(tmp_path: Path) -> None:
    Image.fromarray(PIXELS[5]).save(tmp_path / "five.png")
    images = images_of(range(60)).to_pylist()
    images[5] = {"bytes": None, "path": "five.png"}
    images[6] = None
    images[7] = {"bytes": None, "path": None}
    images[8] = {"bytes": b"no image", "path": "eight.png"}
    images[9] = {"bytes": None, "path": "gone.png"}
    survey = opened(write(tmp_path / "zoo.parquet", image=pa.array(images, STRUCT)))
    assert [row.row for row in survey.left_out] == [6, 7] and survey.ids[5] == "five"
    np.testing.assert_array_equal(pixels_of(survey, 0, 6), PIXELS[:6])
    for row, reason in ((8, "zoo.parquet, eight.png"), (9, r"names the image 'gone.png', which cannot be read")):
        with pytest.raises(DamagedImageError, match=reason):
            list(survey.read(row, row + 1))
    manifest = write_shards(survey, tmp_path / "shards", max_errors=5, workers=1)
    assert sum(split.num_samples for split in manifest.splits.values()) == 56


@pytest.mark.parametrize("kind", ["struct of bands", "arrays"])
def test_arrays_become_colours_by_bands_and_scale(tmp_path: Path, kind: str) -> None:
    cubes = np.moveaxis(PIXELS, -1, 1)[:, [2, 1, 0, 0]].astype(np.float32) / 10
    bands = [["des-g", "des-r", "des-i", "des-z"]] * 60
    image: Any = [{"band": names, "flux": cube.tolist()} for names, cube in zip(bands, cubes, strict=True)]
    wanted = ArrayOptions(bands=("i", "r", "g"), scaling=PixelScaling(0, 25.5))
    if kind == "arrays":
        image, wanted = [(pixels / 10).tolist() for pixels in PIXELS], ArrayOptions(scaling=PixelScaling(0, 25.5))
    path = tmp_path / "zoo.parquet"
    pq.write_table(pa.table({"image": image, "label": [row % 3 for row in range(60)]}), path, row_group_size=20)
    with pytest.raises(UserError, match="has the bands des-g.*--bands" if kind != "arrays" else "--scale LOW HIGH"):
        opened(path)
    np.testing.assert_array_equal(pixels_of(opened(path, arrays=wanted), 15, 45), PIXELS[15:45])


def test_few_images_beside_parquet_files_are_no_image_folder_and_a_table_beside_many_is_no_data(tmp_path: Path) -> None:
    write(tmp_path / "zoo" / "data" / "all.parquet")
    write_image(tmp_path / "zoo" / "assets" / "figure.png")
    assert len(opened(tmp_path / "zoo").labels) == 60
    for n in range(24):
        write_image(tmp_path / "images" / "ab"[n % 2] / f"{n}.png", n)
    write(tmp_path / "images" / "metadata.parquet")
    assert isinstance(open_survey(tmp_path / "images"), FolderSurvey)


def test_command_refuses_unfit_data_in_one_message_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = write(tmp_path / "cut.parquet")
    damage(cut)
    mixed = write(tmp_path / "mixed.parquet", image=[{"bytes": png(PIXELS[n][n % 2 :]), "path": None} for n in range(60)])
    text = write(tmp_path / "text.parquet", image=["none.jpg"] * 60)
    with HubServer(tmp_path, (403, "GatedRepo")) as hub:
        use(monkeypatch, hub)
        for source, message in (
            (cut, "is truncated or damaged"),
            (mixed, "give an image size (--image-size 12)"),
            (text, "none of the 60 images exists"),
            ("hf://datasets/zoo/galaxies", "is gated: accept its terms at"),
            (tmp_path / "gone.parquet", "there is no such file or folder"),
        ):
            words = ["--from", str(source), "--out", str(tmp_path / "shards" / "new"), "--data-dir", str(tmp_path / "root")]
            assert main(["data", "shard", *words]) == 2
            captured = capsys.readouterr()
            assert message in captured.err and captured.err.count("galaxydist: error:") == 1 and not captured.out
            assert not (tmp_path / "root").exists() and not list(tmp_path.glob("shards/*"))


@pytest.mark.parametrize("form", ["Parquet", "HDF5"])
def test_equal_images_stay_in_one_split_when_it_is_cut(tmp_path: Path, form: str) -> None:
    pixels = np.concatenate([PIXELS[:30], PIXELS[29::-1]])
    pixels[12] = pixels[13] = 7  # of one colour: they show nothing
    if form == "Parquet":
        images = [{"bytes": png(image), "path": None} for image in pixels]
        images[3] = {"bytes": b"damaged", "path": None}
        path = write(tmp_path / "zoo.parquet", image=pa.array(images, STRUCT), label=[min(n, 59 - n) % 3 for n in range(60)])
    else:
        path = tmp_path / "zoo.h5"
        with h5py.File(path, "w") as h5:
            h5["images"], h5["label"] = pixels, [min(n, 59 - n) % 3 for n in range(60)]
    survey = opened(path)
    split = {row: name for name, rows in survey.splits.items() for row in rows.tolist()}
    assert all(split[row] == split[59 - row] for row in range(30) if row not in (3, 12, 13)) and len(set(split.values())) == 3


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def rename(path: Path, name: str, values: Any) -> None:
    table = pq.read_table(path)
    pq.write_table(table.set_column(0, name, pa.array(values)).replace_schema_metadata(None), path)


@pytest.mark.parametrize(
    ("change", "source", "message"),
    [
        (damage, {}, "is truncated or damaged \\("),
        (lambda path: path.write_text("PAR1 and nothing"), {}, "is truncated or damaged \\("),
        (lambda path: rename(path, "image", ["x.png"] * 60), {}, "none of the 60 images exists; the first, 'x.png' in column"),
        (
            lambda path: rename(path, "thumb", [f"{row}.png" for row in range(60)]),
            {"arrays": ArrayOptions("thumb")},
            r"'thumb' holds string, not images; .*give --file thumb instead of --image-column",
        ),
        (lambda _: None, {"arrays": ArrayOptions("picture")}, r"no column 'picture' \(--image-column\); its columns are image"),
        (lambda _: None, {"arrays": ArrayOptions(scaling=PixelScaling(0, 1))}, "image files of 8 bits"),
        (lambda _: None, {"images": "elsewhere"}, "holds its images itself; leave out --images"),
        (lambda _: None, {"columns": ColumnNames(label="lable")}, r"has no column 'lable' \(--label\); did you mean label"),
    ],
)
def test_unfit_files_are_refused(tmp_path: Path, change: Callable[[Path], Any], source: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "zoo" / "a.parquet")
    change(path)
    with pytest.raises(UserError, match=message):
        opened(path, **source)


def test_files_of_different_columns_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "zoo" / "a.parquet")
    rename(write(tmp_path / "zoo" / "b.parquet"), "picture", images_of(range(60)))
    with pytest.raises(UserError, match=r"b\.parquet has no column 'image', which the first file has"):
        opened(tmp_path / "zoo")
    write(tmp_path / "zoo" / "b.parquet", label=["spiral"] * 60)
    with pytest.raises(UserError, match="its files have different columns"):
        opened(tmp_path / "zoo")


def test_two_columns_of_images_and_arrow_files_of_save_to_disk_are_refused_with_the_way_out(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    path = write(tmp_path / "zoo.parquet", other=images_of(range(60)), thumbnail=images_of(range(60)))
    assert opened(path).slab_length == 35  # the one that is named image
    rename(path, "cutout", images_of(range(60)))
    table = pq.read_table(path).append_column("img", images_of(range(60)))
    pq.write_table(table, path)
    with pytest.raises(
        UserError, match=r"several columns may hold images, cutout, other, thumbnail, img: choose one with --image"
    ):
        opened(path)
    assert opened(path, arrays=ArrayOptions("img")).images.column.name == "img"  # type: ignore[attr-defined]
    data = Dataset.from_dict({"label": [0, 1]})
    data.save_to_disk(tmp_path / "one")
    DatasetDict({"train": data}).save_to_disk(tmp_path / "several")
    for name, advice in (
        ("one", r"to_parquet\('FILE.parquet'\)"),
        ("several", r"items\(\): part.to_parquet\(f'FOLDER/\{split\}.parquet'\)"),
    ):
        with pytest.raises(UserError, match=rf"save_to_disk.*datasets.load_from_disk.*{advice}"):
            opened(tmp_path / name)


def test_hats_catalogue_that_lacks_a_partition_or_is_a_margin_is_refused(tmp_path: Path) -> None:
    folder = write_hats(tmp_path / "hats", galaxies_with_positions(tmp_path), tmp_path)
    survey = opened(folder)
    assert survey.ids[0] == "10" and "_healpix_29" not in survey.extras.column_names, "the index is the id of last resort"
    np.testing.assert_array_equal(survey.ra, np.arange(60) * 6.0)
    np.testing.assert_array_equal(pixels_of(survey, 15, 40), PIXELS[15:40])
    with pytest.raises(UserError, match="is the margin part of a HATS catalogue"):
        opened(folder / "galaxies_margin")
    shutil.rmtree(folder / "galaxies" / "dataset" / "Norder=2")
    with pytest.raises(UserError, match="state 60 rows, its partitions have 30: some are missing or old"):
        opened(folder)
    shutil.rmtree(folder / "galaxies" / "dataset")
    with pytest.raises(UserError, match="a HATS catalogue without partitions"):
        opened(folder)


def galaxies_with_positions(folder: Path) -> list[dict[str, Any]]:
    """Rows of sixty galaxies, whose image files are written."""
    for n, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(folder / f"{n}.png")
    return [{"file": f"{n}.png", "label": n % 3, "ra": n * 6.0, "dec": n % 40 - 20.0, "size": n} for n in range(60)]


def assert_same(one: TableSurvey, other: TableSurvey) -> None:
    assert one.ids == other.ids and [*map(list, one.splits.values())] == [*map(list, other.splits.values())]
    np.testing.assert_array_equal(pixels_of(one, 0, 60), pixels_of(other, 0, 60))


def test_hats_catalogue_on_a_web_server_equals_the_local_one(tmp_path: Path) -> None:
    folder = write_hats(tmp_path / "hats", galaxies_with_positions(tmp_path), tmp_path)
    (folder / "galaxies" / "partition_info.csv").write_text("Norder,Npix,num_rows\n2,5,30\n1,9,20\n1,40,10\n")
    with HubServer(folder) as server:
        url = f"{server.address}/datasets/zoo/galaxies/resolve/main"
        assert_same(opened(url), opened(folder))
        assert len(opened(f"{url}/galaxies/dataset/Norder=1/Dir=0/Npix=9.parquet?token=secret").labels) == 20
        for name, message in (
            ("nothing", "a web server's files cannot be listed"),
            ("nothing.parquet?token=secret", f"{url}/nothing.parquet does not exist$"),
            ("zoo.h5", "zoo.h5 is an HDF5 file, by its content, not a Parquet file"),
        ):
            (folder / "zoo.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
            with pytest.raises(UserError, match=message):
                opened(f"{url}/{name}")


@pytest.mark.slow
def test_parquet_in_an_object_store_equals_the_local_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "store"
    write_hats(folder / "hats", galaxies_with_positions(tmp_path), tmp_path)
    write(folder / "zoo" / "data" / "train-0.parquet", range(40))
    write(folder / "zoo" / "data" / "test-0.parquet", range(40, 60))
    for name, value in (("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "test"), ("AWS_EC2_METADATA_DISABLED", "true")):
        monkeypatch.setenv(name, value)
    with s3_server(folder, tmp_path / "log") as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        assert_same(opened("s3://galaxies/shards/hats"), opened(folder / "hats"))
        assert_same(opened("s3://galaxies/shards/zoo"), opened(folder / "zoo"))
        for url, message in (("s3://galaxies/shards/gone", "there is nothing at"), ("s3://gone/a.parquet", "does not exist")):
            with pytest.raises(UserError, match=message):
                opened(url)


@pytest.fixture
def no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))


def use(monkeypatch: pytest.MonkeyPatch, hub: HubServer) -> None:
    """Let huggingface_hub find the Hub on loopback; HF_ENDPOINT is only read when it is imported."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    )


def test_data_set_on_the_hub_equals_the_local_one_and_is_pinned_to_a_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "galaxies"
    write(folder / "data" / "train-00000-of-00001.parquet", range(40))
    write(folder / "data" / "test-00000-of-00001.parquet", range(40, 60))
    (folder / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    local = opened(folder)
    with HubServer(folder) as hub:
        use(monkeypatch, hub)
        remote = opened("hf://datasets/zoo/galaxies@v1")
        assert remote.location == f"hf://datasets/zoo/galaxies@{COMMIT}" and remote.name == "galaxies"
        assert remote.origin is not None and remote.origin.to_dict() == {
            "licence": "CC-BY-4.0",
            "revision": COMMIT,
            "url": "https://huggingface.co/datasets/zoo/galaxies",
        }
        hub.failing = 1
        found, expected = (
            {path.name: path.read_bytes() for path in write_shards(survey, tmp_path / name, workers=1).dir.glob("*.tar")}
            for name, survey in (("remote", remote), ("local", local))
        )
        assert found == expected and len(found) == 3
        part = opened("hf://datasets/zoo/galaxies/data/test-00000-of-00001.parquet")
        assert len(part.labels) == 20
        hub.commit = "f" * 40
        assert opened("hf://datasets/zoo/galaxies").source_hash == remote.source_hash, "the same files in a later commit"
        hub.commit = "e" * 40
        write(folder / "data" / "test-00000-of-00001.parquet", range(39, 59))
        assert opened("hf://datasets/zoo/galaxies").source_hash != remote.source_hash
        (folder / "notes").mkdir()
        (folder / "notes" / "metadata.csv").write_text("file_name,label")
        with pytest.raises(UserError, match=rf"no Parquet files; .* table of images like .*@{hub.commit}/notes/metadata.csv"):
            opened("hf://datasets/zoo/galaxies/notes")
        with pytest.raises(UserError, match="has no revision 'v2'"):
            opened("hf://datasets/zoo/galaxies@v2")
        with pytest.raises(UserError, match=r"there is no data set zoo/stars, or it is private: .*hf auth login.*HF_TOKEN"):
            opened("hf://datasets/zoo/stars")


@pytest.mark.usefixtures("no_token")
@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "GatedRepo", r"is gated: accept its terms at .*/datasets/zoo/galaxies, then log in with `hf auth login`"),
        (
            401,
            "RepoNotFound",
            "there is no data set zoo/galaxies, or it is private: log in with `hf auth login`, or set HF_TOKEN",
        ),
        (403, "", r"access to hf://datasets/zoo/galaxies is denied \(403\): log in with `hf auth login`"),
        (400, "", "cannot be read.*see that http://127.* can be reached"),
    ],
)
def test_data_set_without_access_is_refused_with_the_way_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, code: str, message: str
) -> None:
    write(tmp_path / "galaxies" / "a.parquet")
    with HubServer(tmp_path / "galaxies", (status, code)) as hub:
        use(monkeypatch, hub)
        with pytest.raises(UserError, match=message):
            opened("hf://datasets/zoo/galaxies")
        monkeypatch.setenv("HF_TOKEN", hub.token)
        assert len(opened("hf://datasets/zoo/galaxies").labels) == 60
