"""The gallery of a real run: what is chosen is what is shown, from local shards and from a server; wrong inputs."""

import base64
import io
import json
import re
import shlex
import shutil
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from galaxydist.bench.flaky_server import FileServer
from galaxydist.cli.main import main
from galaxydist.evaluation.predictions import read_predictions
from galaxydist.gallery.choose import choose_mistakes
from galaxydist.gallery.gallery import _SHEET_BYTES, gallery_sections
from galaxydist.loading.decode import ImageDecoder, read_samples
from galaxydist.pages.contact_sheet import COLOUR_MAP, OPACITY, SheetCell, SheetRow, compose_sheet, overlay
from galaxydist.shards.manifest import read_manifest
from galaxydist.shards.writer.writer import write_shards
from tests.helpers.blobs import CLASS_NAMES, BlobSurvey
from tests.helpers.browser import Browser
from tests.helpers.runs import quick_settings, run_here


@pytest.fixture(scope="module")
def trained(blobs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned little, so that there are mistakes. Not to be changed."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    assert run_here(quick_settings(blobs, run_dir, train__epochs=1, data__crop=0.75, optim__lr=1e-4)) == 0
    return run_dir


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def images_of(page: str) -> list[Image.Image]:
    return [
        Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"data:image/jpeg;base64,([A-Za-z0-9+/=]+)", page)
    ]


def test_gallery_page_shows_the_chosen_galaxies_and_is_reproducible(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gallery", str(run_dir), "--per-class", "3"]) == 0
    evaluation_dir = run_dir / "evaluation"
    selection = choose_mistakes(read_predictions(evaluation_dir / "test-predictions.parquet"), 3)
    assert sum(selection.num_mistakes) > 0
    shown = [galaxy for of_class in (*selection.confident, *selection.uncertain) for galaxy in of_class]
    text = capsys.readouterr().out
    assert f"of {sum(selection.num_mistakes)} mistakes" in text and str(evaluation_dir / "test-gallery.html") in text

    page = (evaluation_dir / "test-gallery.html").read_text()
    words = unescape(re.sub(r"<[^>]+>", " ", page))
    for galaxy in shown:
        assert f"{galaxy.id}: true {CLASS_NAMES[galaxy.label]}, predicted {CLASS_NAMES[galaxy.predicted]} (" in unescape(page)
        assert galaxy.id in words
    assert len(images_of(page)) == 2 * len(shown)
    assert re.search(r"https?://", re.sub(r'data:[^"]+', "", page)) is None and "<script" not in page

    content = json.loads((evaluation_dir / "test-gallery.json").read_text())
    assert [[galaxy["sample"] for galaxy in of_class] for of_class in content["mistakes"]["chosen"]] == [
        [galaxy.sample for galaxy in of_class] for of_class in selection.confident
    ]
    assert content["saliency"] == "Grad-CAM" and content["checkpoint"]

    sections = gallery_sections(evaluation_dir / "test-predictions.parquet")
    assert [title for title, _, _ in sections] == ["Most confident mistakes", "Least certain galaxies"]
    for (_, uri, caption), kind in zip(sections, ("mistakes", "uncertain"), strict=True):
        data = (evaluation_dir / f"test-gallery-{kind}.jpg").read_bytes()
        assert base64.b64decode(uri.removeprefix("data:image/jpeg;base64,")) == data and len(data) <= _SHEET_BYTES
        assert "Grad-CAM" in caption and "probability" in caption
    # The same again gives the same files.
    before = {path.name: path.read_bytes() for path in evaluation_dir.glob("test-gallery*")}
    assert len(before) == 4
    assert main(["gallery", str(run_dir), "--per-class", "3"]) == 0
    assert before == {path.name: path.read_bytes() for path in evaluation_dir.glob("test-gallery*")}


def test_gallery_from_http_shards_equals_the_local_one(
    run_dir: Path, blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["gallery", str(run_dir)]) == 0
    local = (run_dir / "evaluation" / "test-gallery-mistakes.jpg").read_bytes()
    monkeypatch.setenv("GALAXYDIST_DATA", str(tmp_path / "data"))
    with FileServer(blobs.parent) as server:
        assert main(["gallery", str(run_dir), f"data.manifest={server.url}", "-o", str(tmp_path / "pages" / "there.html")]) == 0
    assert (run_dir / "evaluation" / "test-gallery-mistakes.jpg").read_bytes() == local
    assert "blob-" in (tmp_path / "pages" / "there.html").read_text()


def test_images_read_for_the_gallery_are_those_of_the_split(blobs: Path) -> None:
    manifest = read_manifest(blobs)
    reader, samples = ImageDecoder(manifest, "test"), np.array([0, 5, 6, 23])
    found = dict(read_samples(manifest, "test", samples))
    assert list(found) == samples.tolist()
    expected = np.empty((4, 32, 32, 3), np.uint8)
    assert reader.read(samples, expected) == {}
    assert all((found[sample][0] == pixels).all() for sample, pixels in zip(samples.tolist(), expected, strict=True))
    reader.close()
    assert list(read_samples(manifest, "test", np.empty(0, np.int64))) == []


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["gallery", *arguments]) == 2
    return capsys.readouterr().err


def test_gallery_refuses_wrong_inputs_and_writes_no_files(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "there is no such folder" in fails([str(tmp_path / "none")], capsys)
    assert "is not a run folder" in fails([str(tmp_path)], capsys)
    text = fails([str(run_dir), "--split", "train"], capsys)
    assert (
        "no predictions of the train split" in text and f"`galaxydist evaluate {shlex.quote(str(run_dir))} --split train`" in text
    )
    assert "no shards at" in fails([str(run_dir), "--manifest", str(tmp_path / "nowhere" / "manifest.json")], capsys)
    assert "at most 50 galaxies of each class" in fails([str(run_dir), "--per-class", "51"], capsys)
    assert "is a folder" in fails([str(run_dir), "-o", str(tmp_path)], capsys)
    assert "keep one" in fails([str(run_dir), "data.variant=balanced", "--manifest", "x"], capsys)
    assert "optim.lr cannot be changed" in fails([str(run_dir), "optim.lr=1"], capsys)
    assert "there are original and balanced" in fails([str(run_dir), "data.variant=small"], capsys)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "named").symlink_to(run_dir)
    monkeypatch.chdir(tmp_path)
    assert "no predictions of the train split" in fails(["named", "--split", "train"], capsys)
    assert not list((run_dir / "evaluation").glob("*gallery*"))


def test_gallery_refuses_predictions_of_other_shards_or_missing_checkpoints(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_shards(BlobSurvey(90), tmp_path / "other", encoding="png", shard_size=16, workers=1).path
    folder = run_dir / "evaluation" / "blobs-original"
    folder.mkdir()
    shutil.copy(run_dir / "evaluation" / "test-predictions.parquet", folder)
    text = fails([str(run_dir), "--manifest", str(other)], capsys)
    assert "of other shards than" in text and "galaxydist evaluate" in text

    for path in sorted((run_dir / "checkpoints").iterdir()):
        if path.is_dir():
            path.rename(path.with_name("step-00000099-0099"))
    (run_dir / "checkpoints" / "best").unlink(missing_ok=True)
    text = fails([str(run_dir)], capsys)
    assert "no longer in" in text and "galaxydist evaluate" in text


def test_gallery_sections_of_a_missing_or_outdated_gallery_are_empty(run_dir: Path) -> None:
    evaluation_dir = run_dir / "evaluation"
    assert gallery_sections(evaluation_dir / "test-predictions.parquet") == []
    assert main(["gallery", str(run_dir), "--per-class", "1"]) == 0
    assert len(gallery_sections(evaluation_dir / "test-predictions.parquet")) == 2
    content: dict[str, Any] = json.loads((evaluation_dir / "test-gallery.json").read_text())
    (evaluation_dir / "test-gallery.json").write_text(json.dumps(content | {"step": 7}))
    assert gallery_sections(evaluation_dir / "test-predictions.parquet") == []
    (evaluation_dir / "test-gallery.json").write_text("{")
    assert gallery_sections(evaluation_dir / "test-predictions.parquet") == []


def test_saliency_overlay_changes_only_pixels_with_a_map() -> None:
    from matplotlib import colormaps

    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert (overlay(image, np.zeros((16, 16), np.float32)) == image).all()
    covered = overlay(image, np.ones((16, 16), np.float32), crop=0.5)
    inside = np.zeros((64, 64), bool)
    inside[16:48, 16:48] = True
    assert (covered[~inside] == image[~inside]).all()
    top = 255 * np.array(colormaps[COLOUR_MAP](1.0)[:3])
    assert np.abs(covered[inside] - ((1 - OPACITY) * image[inside] + OPACITY * top)).max() <= 0.5 + 1e-9


def test_compose_sheet_accepts_empty_rows_and_long_texts() -> None:
    cell = SheetCell(np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8), ("an id " * 20, "predicted x", "50 %"))
    sheet = compose_sheet([SheetRow("a", "2 of 2", [cell, cell]), SheetRow("b", "none", [])], "title " * 50, 40)
    assert sheet.width >= 2 * 82 and sheet.height > 2 * 14 + 40
    assert compose_sheet([], "", 40).height > 0


@pytest.mark.browser
def test_gallery_page_in_a_browser_fits_a_phone_and_loads_only_itself(run_dir: Path) -> None:
    assert main(["gallery", str(run_dir)]) == 0
    page = run_dir / "evaluation" / "test-gallery.html"
    with Browser() as browser:
        for width, dark in ((390, False), (1280, True)):
            browser.open(page, width=width, dark=dark)
            assert browser.fits_window(), f"scrolls sideways at {width}"
            broken = "[...document.images].filter(i => !(i.complete && i.naturalWidth)).length"
            assert browser.evaluate(broken) == 0 and browser.evaluate("document.images.length") > 10
        assert browser.console == [] and set(browser.requests) == {page.resolve().as_uri()}
