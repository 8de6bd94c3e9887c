"""Origin of data: known by name, stated by the source or the user, and kept in the manifest."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from galaxydist.cli.main import main
from galaxydist.errors import UserError
from galaxydist.shards.manifest import read_manifest
from galaxydist.shards.writer.writer import write_shards
from galaxydist.surveys.data_origin import DataOrigin, known_origin, origin_of, state_origin
from tests.helpers.blobs import BlobSurvey
from tests.helpers.report_runs import write_sweep
from tests.helpers.runs import quick_settings, run_here
from tests.helpers.shard_surveys import MemorySurvey, draw_galaxies

APACHE = DataOrigin("Apache-2.0", revision="5b2f0c")


@dataclass(frozen=True)
class StatedSurvey(MemorySurvey):
    """A survey whose source states its licence."""

    origin: DataOrigin = APACHE


def test_known_data_sets_have_a_licence_and_works_to_cite() -> None:
    desi, decals = known_origin("GZ-DESI"), known_origin("galaxy10_decals-fold2of3")
    assert desi is not None
    assert (desi.licence, desi.is_non_commercial) == ("CC-BY-NC-SA-4.0", True)
    assert desi.describe()["licence"] == "CC-BY-NC-SA-4.0 (non-commercial use only)"
    assert decals == known_origin("galaxy10_decals")
    assert "10.5281/zenodo.10845026" in str(decals)
    assert [known_origin(name) for name in ("mine", "gz2_votes_sample", "galaxy10_sdss", "fold1of3")] == [None] * 4
    for name in ("galaxy10_decals", "simulated", "gz2", "gz_decals", "gz_evo", "multimodal_universe-gz10"):
        origin = known_origin(name)
        assert origin is not None and origin.licence and origin.citation


def test_the_users_statement_comes_before_the_sources_and_both_before_the_name() -> None:
    survey = StatedSurvey(draw_galaxies(3), name="gz_decals")
    known = known_origin("gz_decals")
    assert known is not None
    origin = origin_of(survey, state_origin(None, " Me 2026 ", None))
    assert origin == DataOrigin("Apache-2.0", "Me 2026", "5b2f0c", known.url)
    assert origin_of(MemorySurvey(draw_galaxies(3))) is None


def test_statements_that_say_nothing_are_refused() -> None:
    assert state_origin(None, None, None) is None
    for licence in ("", "  ", "x" * 20_001, "\udcff"):
        with pytest.raises(UserError, match="--licence"):
            state_origin(licence, None, None)


def test_the_manifest_holds_the_origin_only_where_it_is_known(tmp_path: Path) -> None:
    galaxies = draw_galaxies(40)
    plain = write_shards(MemorySurvey(galaxies), tmp_path / "plain", workers=1)
    assert (plain.origin, "origin" in json.loads(plain.path.read_text())) == (None, False)
    stated = write_shards(StatedSurvey(galaxies), tmp_path / "stated", workers=1, origin=DataOrigin(citation="Me 2026"))
    assert stated.origin == DataOrigin("Apache-2.0", "Me 2026", "5b2f0c")
    assert json.loads(stated.path.read_text())["origin"] == {
        "licence": "Apache-2.0",
        "citation": "Me 2026",
        "revision": "5b2f0c",
    }


def test_shards_of_earlier_versions_have_the_origin_of_their_name_and_keep_their_hash(tmp_path: Path) -> None:
    manifest = write_shards(MemorySurvey(draw_galaxies(40), name="gz2"), tmp_path / "shards", workers=1)
    content = json.loads(manifest.path.read_text())
    assert DataOrigin.from_dict(content.pop("origin")) == known_origin("gz2")
    text = json.dumps(content, indent=1) + "\n"
    manifest.path.write_text(text)
    assert (read_manifest(manifest.path).origin, read_manifest(manifest.path).hash) == (
        known_origin("gz2"),
        hashlib.sha256(text.encode()).hexdigest(),
    )
    manifest.path.write_text(json.dumps({**content, "origin": {"licence": 3}}))
    with pytest.raises(UserError, match="damaged"):
        read_manifest(manifest.path)


def test_another_origin_of_existing_shards_needs_overwrite_and_changes_the_manifest_alone(tmp_path: Path) -> None:
    survey = MemorySurvey(draw_galaxies(40))
    first = write_shards(survey, tmp_path / "shards", workers=1)
    tars = {path: path.stat().st_mtime_ns for path in first.dir.glob("*.tar")}
    stated = DataOrigin("CC-BY-NC-4.0")
    with pytest.raises(UserError, match=r"CC-BY-NC-4.0 \(non-commercial use only\) \(in the manifest: None\).*--overwrite"):
        write_shards(survey, first.dir, workers=1, origin=stated)
    changed = write_shards(survey, first.dir, workers=1, origin=stated, overwrite=True)
    assert changed.origin == stated
    assert changed.hash != first.hash
    assert write_shards(survey, first.dir, workers=1).hash == changed.hash, "without a statement the shards are kept as they are"
    assert {path: path.stat().st_mtime_ns for path in first.dir.glob("*.tar")} == tars


def test_check_training_and_result_show_the_licence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stated = DataOrigin("CC-BY-NC-4.0", "Me\n2026")
    shards = write_shards(BlobSurvey(), tmp_path / "shards", encoding="png", shard_size=16, workers=1, origin=stated)
    assert main(["data", "check", str(shards.path)]) == 0
    assert capsys.readouterr().out.splitlines()[1:3] == [
        "  licence: CC-BY-NC-4.0 (non-commercial use only)",
        "  citation: Me 2026",
    ]
    assert run_here(quick_settings(shards.path, tmp_path / "run", train__epochs=1)) == 0
    assert "24 test; licence CC-BY-NC-4.0 (non-commercial use only)" in capsys.readouterr().err
    assert json.loads((tmp_path / "run/result.json").read_text())["data_origin"] == stated.to_dict()


def test_the_report_gives_licence_and_citation_of_each_data_set(tmp_path: Path) -> None:
    runs = write_sweep(tmp_path / "runs", models=("vit",), seeds=(0,), dataset="mine")
    assert main(["report", str(tmp_path / "runs"), "-o", str(tmp_path / "unknown.html")]) == 0
    assert "licence:" not in (tmp_path / "unknown.html").read_text()
    result = runs[0].read_result()
    runs[0].write_result({**(result or {}), "data_origin": {"licence": "CC-BY-NC-4.0", "citation": "Me & You_2026"}})
    runs[1].write_result({**(result or {}), "data_origin": [1]})
    assert main(["report", str(tmp_path / "runs"), "-o", str(tmp_path / "report.html")]) == 0
    page, markdown, tex = ((tmp_path / f"report{suffix}").read_text() for suffix in (".html", ".md", ".tex"))
    assert "licence: CC-BY-NC-4.0 (non-commercial use only)</small>" in page
    assert "citation Me &amp; You_2026" in page
    assert "data_origin is not an origin of data" in page
    assert "- licence: CC-BY-NC-4.0 (non-commercial use only)" in markdown
    assert "% mine, citation: Me & You_2026" in tex


def test_data_shard_states_an_origin_and_refuses_one_that_says_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dice = np.random.default_rng(0)
    for number in range(30):
        folder = tmp_path / "mine" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(dice.integers(0, 255, (16, 16, 3), np.uint8)).save(folder / f"{number}.png")
    command = ["data", "shard", "--from", str(tmp_path / "mine"), "--data-dir", str(tmp_path / "root"), "--workers", "1"]
    assert main([*command, "--licence", " "]) == 2
    assert "--licence has 0 characters: give 1 to 20,000" in capsys.readouterr().err
    assert not (tmp_path / "root").exists()
    assert main([*command, "--license", "cc by 4.0", "--citation", "Me 2026", "--revision", "DR1"]) == 0
    assert "licence: CC-BY-4.0\n" in capsys.readouterr().out
    manifest = read_manifest(tmp_path / "root/shards/mine/original")
    assert manifest.origin == DataOrigin("CC-BY-4.0", "Me 2026", "DR1")
