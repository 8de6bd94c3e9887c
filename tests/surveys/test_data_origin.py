"""Origin of data: known by name, stated by the source or the user, and kept in the manifest."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from galaxydist.errors import UserError
from galaxydist.shards.manifest import read_manifest
from galaxydist.shards.writer.writer import write_shards
from galaxydist.surveys.data_origin import DataOrigin, known_origin, origin_of, spdx, state_origin
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


@pytest.mark.parametrize(
    ("licence", "is_non_commercial"),
    [("cc-by-nc-4.0", True), ("free for non-commercial use", True), ("Noncommercial", True), ("CC-BY-4.0", False), (None, False)],
)
def test_a_non_commercial_licence_is_recognised(licence: str | None, is_non_commercial: bool) -> None:
    assert DataOrigin(licence).is_non_commercial == is_non_commercial


def test_licences_are_written_as_spdx_writes_them() -> None:
    names = {"cc-by-4.0": "CC-BY-4.0", " CC BY-NC SA 4.0": "CC-BY-NC-SA-4.0", "cc0-1.0": "CC0-1.0", "mit": "MIT"}
    assert {name: spdx(name) for name in names} == names
    assert spdx("My own licence: ask me ") == "My own licence: ask me"


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
