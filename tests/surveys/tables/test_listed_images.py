"""Images that a table lists: paths as people write them, and URLs."""

import gzip
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from astropy.table import Table

from galaxydist.bench.flaky_server import Behaviour, FileServer
from galaxydist.errors import DamagedImageError, UserError
from galaxydist.galaxy import EncodedImage
from galaxydist.surveys.survey_sources import SourceOptions, open_survey
from galaxydist.surveys.tables.listed_images import fetch_images, find_files, split_url
from tests.helpers.servers import s3_server
from tests.helpers.survey_files import write_image
from tests.helpers.table_sources import write_csv


def test_files_are_found_by_relative_absolute_and_windows_paths_and_without_extension(tmp_path: Path) -> None:
    for file in ("a/130549.jpg", "a/J1.5+2.png", "a/twice.jpg", "a/twice.png", "b c/x.webp", "a/notes.txt"):
        write_image(tmp_path / file) if not file.endswith("txt") else (tmp_path / file).touch()
    found = {
        "a/130549.jpg": "a/130549.jpg",
        "./a/130549.jpg": "a/130549.jpg",
        "a\\130549.jpg": "a/130549.jpg",
        ".\\b c\\x": "b c/x.webp",
        "a/130549": "a/130549.jpg",
        "a/J1.5+2": "a/J1.5+2.png",
        str(tmp_path / "a" / "130549"): str(tmp_path / "a" / "130549.jpg"),
        "a/twice": "",
        "a/notes": "",
        "a/130549.png": "",
        "nowhere/1.jpg": "",
        "a": "",
    }
    assert dict(zip(found, find_files([*found], tmp_path), strict=True)) == found


def test_images_at_urls_are_fetched_once_with_retries_and_missing_ones_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "server"
    rows = [{"url": f"sky/{n} é.png", "label": "ab"[n % 2], "split": "train"} for n in range(30)]
    for number, row in enumerate(rows):
        write_image(folder / str(row["url"]), number)
    (folder / "sky" / "3 é.png").unlink()
    (folder / "sky" / "4 é.png").write_text("<html>no such galaxy</html>")
    first = Behaviour(trouble=lambda path, number: 503 if number == 1 and path.endswith("5 é.png") else None)
    with FileServer(folder, first) as server:
        table = write_csv(tmp_path / "galaxies.csv", rows)
        source = SourceOptions(images=f"{server.address}?token=secret", cache_dir=tmp_path / "cache")
        survey = open_survey(table, source=source)
        assert server.gets["sky/5 é.png"] == 2 and sum(server.gets.values()) == 30 + 3
        assert "token=secret" in server.asked["sky/5 é.png"][0]
        leftover = next((tmp_path / "cache").iterdir()) / "killed.part"
        leftover.touch()
        os.utime(leftover, (0, 0))
        again = open_survey(table, source=source)
        assert sum(server.gets.values()) == 33 + 2, "what is not there is asked for again"
    rows[0]["url"] = f"file://{folder}/sky/5 é.png"
    local = open_survey(write_csv(tmp_path / "galaxies.csv", rows[:1] + rows[5:9]), source=SourceOptions(images=str(folder)))
    assert not local.left_out and next(local.read(0, 1)).image.data == next(local.read(1, 2)).image.data
    assert [row.row for row in survey.left_out] == [3, 4] and again.source_hash == survey.source_hash
    assert "2 of 30 images cannot be had" in caplog.text and "secret" not in caplog.text
    galaxy = next(pickle.loads(pickle.dumps(survey)).read(7, 8))
    assert isinstance(galaxy.image, EncodedImage) and galaxy.image.data == (folder / "sky" / "7 é.png").read_bytes()
    assert galaxy.extras["file"] == "sky/7 é.png" and galaxy.id == "7"
    with pytest.raises(DamagedImageError, match=r"row 4 of .*galaxies\.csv has no image"):
        next(survey.read(3, 4))
    assert not [*(tmp_path / "cache").rglob("*.part")]


@pytest.mark.parametrize("form", ["table.csv", "table.csv.gz", "table.fits", "table.jsonl"])
def test_table_at_a_url_gives_the_same_as_the_local_one(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "server" / "zoo"
    rows = [{"file": f"sky/{n}.png", "label": "ab"[n % 2], "ra": n * 1.5, "dec": -n} for n in range(12)]
    for number, row in enumerate(rows):
        write_image(folder / str(row["file"]), number)
    if form == "table.fits":
        Table(rows).write(folder / form)
    elif form == "table.jsonl":
        (folder / form).write_text("\n".join(map(json.dumps, rows)))
    else:
        write_csv(folder / "table.csv", rows)
        (folder / "table.csv.gz").write_bytes(gzip.compress((folder / "table.csv").read_bytes()))
    (folder / "web.csv").write_text("<!DOCTYPE html>")
    local = open_survey(folder / form)
    with FileServer(folder.parent) as server:
        source = SourceOptions(cache_dir=tmp_path / "cache")
        remote = open_survey(f"{server.address}/zoo/{form}?token=secret", source=source)
        assert "token=secret" in server.asked["zoo/sky/3.png"][0] and remote.location == f"{server.address}/zoo/{form}"
        with pytest.raises(UserError, match=r"/zoo/web.csv is a web page, by its content, not a table"):
            open_survey(f"{server.address}/zoo/web.csv", source=source)
        with pytest.raises(UserError, match=r"/zoo/gone.csv does not exist"):
            open_survey(f"{server.address}/zoo/gone.csv", source=source)
    assert (remote.name, remote.ids, remote.extras) == (local.name, local.ids, local.extras) and local.name == "zoo"
    assert [*map(list, remote.splits.values())] == [*map(list, local.splits.values())]
    assert [galaxy.image.data for galaxy in remote.read(0, 12)] == [galaxy.image.data for galaxy in local.read(0, 12)]


def test_server_that_denies_access_is_an_error_and_the_next_call_continues(tmp_path: Path) -> None:
    for number in range(40):
        write_image(tmp_path / "server" / f"{number}.png", number)
    denied: list[Any] = [403]
    behaviour = Behaviour(trouble=lambda path, _: denied[0] if path == "20.png" else None)
    with FileServer(tmp_path / "server", behaviour) as server:
        urls = [f"{server.address}/{number}.png" for number in range(40)]
        with pytest.raises(UserError, match=r"access to http://.*/20\.png is denied"):
            fetch_images(urls, tmp_path / "cache", "t.csv")
        denied[0] = None
        before, kept = server.gets.total(), len([*(tmp_path / "cache").rglob("*.png")])
        files = fetch_images(urls, tmp_path / "cache", "t.csv")
        assert server.gets.total() - before == 40 - kept, "what is there is not asked for again"
    assert [Path(file).read_bytes() for file in files] == [(tmp_path / "server" / f"{n}.png").read_bytes() for n in range(40)]
    with pytest.raises(UserError, match=r"ftp://x/1\.png: images cannot be read through ftp://; use s3://"):
        fetch_images(["ftp://x/1.png"], tmp_path / "cache", "t.csv")


@pytest.mark.parametrize(
    ("url", "place", "name"),
    [
        ("https://host:80/a%20b/c+d.jpg?ra=1&dec=2", "https://host:80?ra=1&dec=2", "a b/c+d.jpg"),
        ("s3://bucket/sky/a.png", "s3://bucket", "sky/a.png"),
        ("hf://datasets/me/cutouts@v1/sky/a.png", "hf://datasets/me/cutouts@v1", "sky/a.png"),
        ("hf://me/model/a.png", "hf://me/model", "a.png"),
    ],
)
def test_url_is_split_into_its_store_and_name(url: str, place: str, name: str) -> None:
    assert split_url(url) == (place, name)


@pytest.mark.slow
def test_images_in_a_bucket_and_on_the_hub_are_those_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [f"sky/{number}.png" for number in range(3)]
    for number, file in enumerate(files):
        write_image(tmp_path / "images" / file, number)
    expected = [(tmp_path / "images" / file).read_bytes() for file in files]
    for name, value in (("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "test"), ("AWS_EC2_METADATA_DISABLED", "true")):
        monkeypatch.setenv(name, value)
    with s3_server(tmp_path / "images", tmp_path / "log") as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        found = fetch_images([f"s3://galaxies/shards/{file}" for file in [*files, "gone.png"]], tmp_path / "cache", "t.csv")
    assert found[3] == "" and [Path(file).read_bytes() for file in found[:3]] == expected
    with FileServer(tmp_path / "images", prefix="/datasets/me/cutouts/resolve/v1/") as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
        found = fetch_images([f"hf://datasets/me/cutouts@v1/{file}" for file in files], tmp_path / "cache", "t.csv")
    assert [Path(file).read_bytes() for file in found] == expected
