"""The catalogue beside the shards: what is in it, that it is checked, and that shards without it give the same."""

import itertools
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from galaxydist import object_store as transfers
from galaxydist.bench.flaky_server import Behaviour, FileServer, every
from galaxydist.errors import UserError
from galaxydist.shards import catalogue as catalogues
from galaxydist.shards.catalogue import (
    conform,
    iterate_catalogue,
    number_column,
    open_catalogue,
    read_catalogue,
    table_of,
    unite,
    write_catalogue,
)
from galaxydist.shards.manifest import Manifest, catalogue_name, read_manifest
from galaxydist.shards.remote.cache import CacheConfig
from galaxydist.shards.remote.open import open_shards
from galaxydist.shards.verify import check_columns, check_shards
from galaxydist.shards.writer.encode import PIXEL_HASH
from galaxydist.shards.writer.writer import write_shards
from galaxydist.surveys.survey_sources import open_survey
from tests.helpers.damage import keys
from tests.helpers.shard_surveys import MemorySurvey, as_jpeg, draw_galaxies, make_old
from tests.helpers.survey_files import write_survey

NAME = catalogue_name("train")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEG shards of galaxies with extras of all sorts, some without a position."""
    galaxies = []
    for row, galaxy in enumerate(draw_galaxies(120)):
        extras: dict[str, Any] = {
            **galaxy.extras,
            "redshift": math.nan if row % 5 == 0 else row / 100,
            "name": f"J{row}.{row}",
            "late": None if row < 100 else "x",
            "flag": row % 2 == 0,
            "number": row if row % 3 else row + 0.5,
            "objid": 2**62 + row,
            "nothing": None,
            "mixed": row if row % 3 else "x",
            "many": [row],
        }
        if row % 7 == 0:
            extras["rare"] = 1
        position = {"ra": None, "dec": None} if row % 6 == 0 else {}
        galaxies.append(replace(as_jpeg(galaxy), extras=extras, **position))
    folder = tmp_path_factory.mktemp("catalogue") / "shards"
    return write_shards(MemorySurvey(tuple(galaxies)), folder, shard_size=8, workers=1).dir


@pytest.fixture
def manifest(written: Path, tmp_path: Path) -> Manifest:
    return read_manifest(shutil.copytree(written, tmp_path / "shards"))


def expected_rows(manifest: Manifest, split: str) -> list[dict[str, Any]]:
    galaxies = []
    for key in keys(manifest, split):
        row = int(key[2:6])
        galaxies.append(
            {
                "id": key,
                "ra": None if row % 6 == 0 else 10.0 + row,
                "dec": None if row % 6 == 0 else -5.0,
                "row": row,
                "redshift": None if row % 5 == 0 else row / 100,
                "name": f"J{row}.{row}",
                "late": None if row < 100 else "x",
                "flag": row % 2 == 0,
                "number": row if row % 3 else row + 0.5,
                "objid": 2**62 + row,
                "rare": 1 if row % 7 == 0 else None,
            }
        )
    return galaxies


TYPES = {
    "id": pa.string(),
    "ra": pa.float64(),
    "dec": pa.float64(),
    "row": pa.int64(),
    "redshift": pa.float64(),
    "name": pa.string(),
    "late": pa.string(),
    "flag": pa.bool_(),
    "number": pa.float64(),
    "objid": pa.int64(),
    "rare": pa.int64(),
    PIXEL_HASH: pa.int64(),
}


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_catalogue_has_one_row_per_sample_in_storage_order(manifest: Manifest, split: str) -> None:
    table = read_catalogue(manifest, split)
    assert {field.name: field.type for field in table.schema} == TYPES
    assert table.column_names[:3] == ["id", "ra", "dec"]
    assert table.drop_columns(PIXEL_HASH).to_pylist() == expected_rows(manifest, split)
    assert len(table) == manifest.splits[split].num_samples
    labels = manifest.labels(split)
    assert [row % 3 for row in table["row"].to_pylist()] == labels.tolist()


def test_read_catalogue_returns_existing_columns_in_the_requested_order(manifest: Manifest) -> None:
    whole = read_catalogue(manifest, "val")
    asked = ["redshift", "petrosian_radius", "id"]
    for prepare in (read_manifest, make_old):
        table = read_catalogue(prepare(manifest.dir), "val", asked)
        assert table.column_names == ["redshift", "id"]
        assert table.equals(whole.select(["redshift", "id"]))
    with pytest.raises(UserError, match="has no split 'dev'"):
        read_catalogue(manifest, "dev")


@pytest.mark.parametrize(("name", "known"), [("redshift", [-0.001, 0.0, 0.3]), ("pxscale", [0.3])])
def test_placeholders_of_unknown_numbers_are_not_numbers(name: str, known: list[float]) -> None:
    table = pa.table({name: pa.array([-99.0, -9999.0, -1.0, None, -0.001, 0.0, 0.3])})
    found = number_column(table, name)
    assert found[np.isfinite(found)].tolist() == known
    integers = number_column(pa.table({name: [-99, 3]}), name)
    assert np.isnan(integers[0]) and integers[1] == 3


def test_catalogue_of_older_shards_is_rebuilt_from_their_tars(manifest: Manifest) -> None:
    tables = {split: read_catalogue(manifest, split) for split in manifest.splits}
    old = make_old(manifest.dir)
    assert old.catalogues == {}
    for split, table in tables.items():
        found = read_catalogue(old, split)
        assert found.schema == table.schema and found.equals(table)
    assert {name: split.num_samples for name, split in check_shards(old.path).splits.items()} == {
        name: len(table) for name, table in tables.items()
    }


def test_catalogue_of_a_survey_file_has_its_extras_and_original_split(tmp_path: Path) -> None:
    write_survey(tmp_path / "survey.h5")
    manifest = write_shards(open_survey(tmp_path / "survey.h5"), tmp_path / "shards", image_size=32, workers=1)
    table = read_catalogue(manifest, "train")
    assert table.column_names == ["id", "ra", "dec", "row", "redshift", "pxscale", "conflicting", "original_split", PIXEL_HASH]
    assert table["conflicting"].to_pylist().count(True) == 2
    assert set(table["original_split"].to_pylist()) == {"train"}
    assert table["redshift"].null_count > 0


def test_manifest_with_catalogues_keeps_format_1_and_npy_only_columns(manifest: Manifest) -> None:
    """What stands under ``columns`` they want on the disk; other keys of manifest.json they do not look at."""
    content = json.loads(manifest.path.read_text())
    assert content["format_version"] == 1
    assert {*content["catalogues"]} == {catalogue_name(split) for split in manifest.splits}
    assert all(name.endswith(".npy") for name in content["columns"])


def test_a_split_without_galaxies_has_an_empty_catalogue(tmp_path: Path) -> None:
    survey = MemorySurvey(draw_galaxies(20), deal=("train", "train", "train", "test", "train"))
    manifest = write_shards(survey, tmp_path / "shards", workers=1)
    assert read_catalogue(manifest, "val").to_pylist() == []
    check_shards(manifest.path)
    assert read_catalogue(make_old(manifest.dir), "val").column_names == ["id", "ra", "dec"]


def test_catalogue_file_is_byte_equal_for_equal_rows_with_fixed_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogues, "ROW_GROUP", 10)
    tables = [
        table_of((f"g{n}", json.dumps({"ra": n, "dec": 0.0, "n": n}).encode()) for n in range(f, f + 7)) for f in range(0, 28, 7)
    ]
    schema = unite(table.schema for table in tables)
    sums = {write_catalogue(tmp_path / f"{number}.parquet", schema, iter(tables)) for number in range(2)}
    sums.add(write_catalogue(tmp_path / "one.parquet", schema, [pa.concat_tables(tables)]))
    assert len(sums) == 1
    with pq.ParquetFile(tmp_path / "one.parquet") as file:
        assert [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)] == [10, 10, 8]
        pieces = list(iterate_catalogue(file, [3, 0, 20, 5]))
    assert list(map(len, pieces)) == [3, 0, 20, 5]
    assert pa.concat_tables(pieces)["n"].to_pylist() == list(range(28))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.parquet", "1.parquet", "one.parquet"]


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.integers(-5, 5), st.floats(), st.text(max_size=3), st.just([1])
)


@given(
    values=st.lists(st.fixed_dictionaries({}, optional={"a": SCALARS, "b": st.floats() | st.integers(-9, 9)}), max_size=12),
    cuts=st.lists(st.integers(0, 12), max_size=4),
)
def test_catalogue_does_not_depend_on_the_distribution_to_shards(values: Sequence[dict[str, Any]], cuts: list[int]) -> None:
    metas = [(f"k{number}", json.dumps(value).encode()) for number, value in enumerate(values)]
    bounds = [0, *sorted(min(cut, len(metas)) for cut in cuts), len(metas)]
    tables = [table_of(metas[start:stop]) for start, stop in itertools.pairwise(bounds)]
    whole, schema = table_of(metas), unite(table.schema for table in tables)
    assert schema == unite([whole.schema])
    assert pa.concat_tables([conform(table, schema) for table in tables]).equals(conform(whole, schema))
    for field in schema.names[3:]:
        found = conform(whole, schema)[field].to_pylist()
        given_values = [value.get(field) for value in values]
        cleaned = [None if isinstance(value, float) and not math.isfinite(value) else value for value in given_values]
        assert found == cleaned and any(value is not None for value in cleaned)
        assert len({type(value) for value in found if value is not None}) == 1


def test_a_damaged_exchanged_or_missing_catalogue_is_refused(manifest: Manifest) -> None:
    path = manifest.dir / NAME
    whole = path.read_bytes()
    for content in (whole[:-9], whole[:40] + b"\0" + whole[41:], (manifest.dir / catalogue_name("val")).read_bytes(), b""):
        path.write_bytes(content)
        for look in (lambda: read_catalogue(manifest, "train"), lambda: check_shards(manifest.path)):
            with pytest.raises(UserError, match=r"train.catalogue.parquet: its checksum is not the manifest's"):
                look()
    path.unlink()
    with pytest.raises(
        UserError, match=r"train.catalogue.parquet is missing, though the manifest names it; make the shards anew"
    ):
        read_catalogue(manifest, "train")
    with pytest.raises(UserError, match=r"train.catalogue.parquet is missing"):
        check_shards(manifest.path)
    check_columns(manifest)  # what training reads is all there


def test_missing_catalogue_is_restored_by_writing_with_overwrite(tmp_path: Path) -> None:
    survey = MemorySurvey(draw_galaxies(30))
    manifest = write_shards(survey, tmp_path / "shards", workers=1)
    (manifest.dir / NAME).unlink()
    with pytest.raises(UserError, match="missing or truncated"):
        write_shards(survey, tmp_path / "shards", workers=1)
    assert write_shards(survey, tmp_path / "shards", workers=1, overwrite=True).hash == manifest.hash
    check_shards(manifest.path)


def rewrite(manifest: Manifest, table: pa.Table) -> Manifest:
    """Another catalogue of train, with its checksum in the manifest."""
    catalogue = write_catalogue(manifest.dir / NAME, table.schema, [table])
    content = json.loads(manifest.path.read_text())
    content["catalogues"][NAME] = catalogue
    manifest.path.write_text(json.dumps(content))
    return read_manifest(manifest.path)


def test_check_shards_finds_a_catalogue_that_disagrees_with_the_tars(manifest: Manifest) -> None:
    table = read_catalogue(manifest, "train")
    dec = table["dec"].to_pylist()
    dec[11] = 5.0
    changed = rewrite(manifest, table.set_column(2, "dec", pa.array(dec, pa.float64())))
    with pytest.raises(UserError) as error:
        check_shards(changed.path)
    key = keys(manifest, "train")[11]
    assert f"shard {manifest.shard_path('train', 1)}: the rows of {key} in {NAME} differ from their .json" in str(error.value)
    assert "1 problem(s)" in str(error.value)

    more = table.set_column(3, "row", pa.array([row + 1 for row in table["row"].to_pylist()]))
    with pytest.raises(UserError, match=r"the rows of .*, .*, .* and 5 more in columns/train.catalogue.parquet differ"):
        check_shards(rewrite(manifest, more).path)
    for other in (table.set_column(3, "row", pa.array(map(str, table["row"].to_pylist()))), table.drop_columns("late")):
        with pytest.raises(UserError, match=r"1 problem\(s\):\n.*: the columns of .*train.catalogue.parquet are not those"):
            check_shards(rewrite(manifest, other).path)
    with pytest.raises(UserError, match=r"a .json has values that columns/train.catalogue.parquet cannot hold"):
        check_shards(rewrite(manifest, table.set_column(5, "name", table["row"])).path)
    with pytest.raises(UserError, match=r"has \d+ rows, the manifest says"):
        read_catalogue(rewrite(manifest, table.slice(1)), "train")

    content = json.loads(changed.path.read_text())
    del content["catalogues"][NAME]
    changed.path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"no checksum of columns/train.catalogue.parquet"):
        check_shards(changed.path)


def test_catalogue_rebuilt_from_damaged_tars_names_the_shard(manifest: Manifest) -> None:
    old = make_old(manifest.dir)
    shard = old.shard_path("train", 2)
    data = shard.read_bytes()
    shard.write_bytes(data.replace(b'{"id": ', b'{"id"! '))
    with pytest.raises(UserError, match=r"shard .*train-000002.tar or its index is damaged .*galaxydist data check"):
        read_catalogue(old, "train")
    shard.with_suffix(".idx").write_text("v1.2 3\n")
    with pytest.raises(UserError, match=r"shard .*train-000002.tar or its index is damaged"):
        read_catalogue(old, "train")
    shard.unlink()
    with pytest.raises(UserError, match=r"train-000002"):
        read_catalogue(old, "train")


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "FIRST_PAUSE_S", 0.001)


@pytest.mark.usefixtures("short_pauses")
def test_remote_catalogue_is_downloaded_on_first_use_and_cached(written: Path, tmp_path: Path) -> None:
    local = read_manifest(written)
    with FileServer(written, Behaviour(trouble=every(3))) as server:
        remote = open_shards(server.url, CacheConfig(tmp_path / "cache"))
        check_columns(remote)
        assert not [name for name in server.gets if "catalogue" in name]
        for _ in range(2):
            assert read_catalogue(remote, "train").equals(read_catalogue(local, "train"))
        asked = server.gets[NAME] - server.failures[NAME]
        assert asked == 1 and server.gets[catalogue_name("val")] == 0
        (remote.dir / NAME).write_bytes(b"damaged")
        assert read_catalogue(remote, "train").equals(read_catalogue(local, "train"))
        assert server.gets[NAME] - server.failures[NAME] == 2
        assert not [name for name in server.gets if name.endswith((".tar", ".idx"))]
        server.behaviour = Behaviour()
        assert check_shards(server.url, CacheConfig(tmp_path / "cache")).split("train").num_shards > 0
    with open_catalogue(remote, "train") as file:
        assert file.metadata.num_rows == local.splits["train"].num_samples
    assert not list(remote.dir.rglob(".*"))


@pytest.mark.usefixtures("short_pauses")
def test_catalogue_of_older_remote_shards_is_rebuilt_through_the_cache(manifest: Manifest, tmp_path: Path) -> None:
    table = read_catalogue(manifest, "test")
    make_old(manifest.dir)
    with FileServer(manifest.dir, Behaviour(trouble=every(5))) as server:
        remote = open_shards(server.url, CacheConfig(tmp_path / "cache"))
        for _ in range(2):
            assert read_catalogue(remote, "test").equals(table)
        tars = [name for name in server.gets if name.endswith(".tar")]
        assert sorted(tars) == sorted(path.name for path in manifest.dir.glob("test-*.tar"))
        assert all(server.gets[name] - server.failures[name] == 1 for name in tars)


@pytest.mark.slow
def test_catalogue_of_a_million_rows_is_read_in_under_10_seconds_of_cpu(tmp_path: Path) -> None:
    """A million rows: the file, not the tars."""
    import time

    rng = np.random.default_rng(0)
    ra = rng.uniform(0, 360, 50_000)
    table = table_of(
        (f"g10-{n:07d}", json.dumps({"id": f"g10-{n:07d}", "ra": ra[n], "dec": 1.5, "redshift": 0.1}).encode())
        for n in range(50_000)
    )
    # The same rows twenty times: as many to read, made once.
    write_catalogue(tmp_path / "train.catalogue.parquet", unite([table.schema]), [table] * 20)
    started = time.process_time()
    with pq.ParquetFile(tmp_path / "train.catalogue.parquet") as file:
        assert len(file.read(["id", "ra", "dec"])) == 10**6
    assert time.process_time() - started < 10
