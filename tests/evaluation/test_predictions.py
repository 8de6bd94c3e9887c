"""Files of predictions: what is written is read back, whole or not at all, in bounded memory."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from galaxydist.errors import UserError
from galaxydist.evaluation.predictions import (
    METADATA_KEY,
    ROW_GROUP,
    PredictionsInfo,
    predictions_path,
    read_predictions,
    softmax,
    write_predictions,
)
from tests.helpers.prediction_files import CONTEXT

INFO = PredictionsInfo(("a", "b", "c"), CONTEXT, {"size": "arcsec"}, 12.5, {"torch": "2"})


def galaxies(count: int, num_classes: int = 3, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    logits_NK = rng.normal(size=(count, num_classes)).astype(np.float32)
    return {
        "id": [f"galaxy-{number}" for number in range(count)],
        "sample": np.arange(count),
        "label": rng.integers(0, num_classes, count),
        "predicted": logits_NK.argmax(1) if count else np.empty(0, int),
        "logits": logits_NK,
        "redshift": np.where(np.arange(count) % 4 == 0, np.nan, np.arange(count) / 100),
    }


def blocks(columns: dict[str, Any], cuts: list[int]) -> Iterator[dict[str, Any]]:
    count = len(columns["sample"])
    edges = sorted({0, count, *(cut % (count + 1) for cut in cuts)})
    for start, stop in itertools.pairwise(edges):
        yield {name: values[start:stop] for name, values in columns.items()}


@given(st.integers(0, 60), st.lists(st.integers(0, 1000), max_size=5), st.integers(1, 5))
def test_predictions_are_read_back_as_written(
    tmp_path_factory: pytest.TempPathFactory, count: int, cuts: list[int], size: int
) -> None:
    path = tmp_path_factory.mktemp("written") / "test-predictions.parquet"
    columns = galaxies(count)
    write_predictions(path, INFO, blocks(columns, cuts))
    found = read_predictions(path)
    assert found.num_galaxies == count
    assert (found.info.class_names, found.info.context, found.info.units) == (INFO.class_names, CONTEXT, INFO.units)
    assert found.info.loss == 12.5 and found.info.versions["torch"] == "2"
    assert np.array_equal(found.column("logits"), columns["logits"])
    parts = list(found.batches(["id", "sample", "label", "predicted", "redshift", "dec"], size))
    assert all(len(part["id"]) == size for part in parts[:-1])
    if count:
        for name in ("id", "sample", "label", "predicted", "redshift"):
            values = np.concatenate([part[name] for part in parts])
            assert np.array_equal(values, np.asarray(columns[name]), equal_nan=name == "redshift"), name
        assert all(np.isnan(part["dec"]).all() for part in parts)
        assert np.allclose(found.column("probabilities"), softmax(columns["logits"]), rtol=1e-7)
        assert set(found.column("split")) == {"test"}


def test_predictions_of_earlier_versions_without_name_columns_are_read(tmp_path: Path) -> None:
    """As earlier versions wrote them."""
    path = tmp_path / "test-predictions.parquet"
    write_predictions(path, INFO, iter([galaxies(5)]))
    assert read_predictions(path).column("file").tolist() == [None] * 5
    parquet.write_table(parquet.read_table(path).drop_columns(["source_id", "file"]), path)
    assert read_predictions(path).column("id").tolist() == galaxies(5)["id"]


def test_predictions_file_is_byte_equal_for_any_blocks(tmp_path: Path) -> None:
    columns = galaxies(2 * ROW_GROUP + 1000)
    written = []
    for number, cuts in enumerate(([], [7, 100, 30_000], list(range(0, 33_000, 977)))):
        path = tmp_path / f"{number}.parquet"
        write_predictions(path, INFO, blocks(columns, cuts))
        written.append(path.read_bytes())
    assert written[0] == written[1] == written[2]
    groups = parquet.ParquetFile(path).metadata
    assert [groups.row_group(number).num_rows for number in range(groups.num_row_groups)] == [ROW_GROUP, ROW_GROUP, 1000]


def test_predictions_file_is_read_by_pandas(tmp_path: Path) -> None:
    path, columns = tmp_path / "a.parquet", galaxies(5)
    write_predictions(path, INFO, blocks(columns, []))
    frame = parquet.read_table(path).to_pandas()
    assert list(frame["id"]) == columns["id"]
    assert np.array_equal(np.stack(frame["logits"]), columns["logits"])
    assert frame["redshift"].isna().tolist() == [True, False, False, False, True]


def test_failed_write_of_predictions_keeps_the_old_file(tmp_path: Path) -> None:
    path = predictions_path(tmp_path, "test")

    def failing() -> Iterator[dict[str, Any]]:
        yield galaxies(10)
        raise RuntimeError("killed here")

    for before in (None, b"old"):
        if before is not None:
            path.write_bytes(before)
        with pytest.raises(RuntimeError, match="killed here"):
            write_predictions(path, INFO, failing())
        assert [file.name for file in tmp_path.iterdir()] == ([] if before is None else [path.name])
    assert path.read_bytes() == b"old"


def test_missing_damaged_and_foreign_predictions_have_different_messages(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    with pytest.raises(UserError, match=r"no predictions at .*galaxydist evaluate"):
        read_predictions(path)
    write_predictions(path, INFO, blocks(galaxies(3000), []))
    whole = path.read_bytes()
    for damaged in (b"", b"no parquet", whole[:-100]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged"):
            read_predictions(path)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF  # within a page: only its checksum tells
    for damaged in (whole[100:], bytes(flipped)):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged"):
            for name in ("id", "sample", "label", "predicted", "logits", "probabilities", "redshift"):
                read_predictions(path).column(name)
    table = pa.table({"id": ["a"]})
    for metadata, text in (
        (None, "not a file of predictions"),
        ({METADATA_KEY: b"[1]"}, "not a file of predictions"),
        ({METADATA_KEY: b'{"format": 1}'}, "not a file of predictions"),
        ({METADATA_KEY: b'{"format": 99}'}, "format version 99"),
    ):
        parquet.write_table(table.replace_schema_metadata(metadata), path)
        with pytest.raises(UserError, match=text):
            read_predictions(path)
    content = {
        "format": 1,
        "galaxydist": "0",
        "classes": ["a"],
        "units": {},
        "loss": None,
        "loss_without_validation": None,
        "versions": {},
        **CONTEXT,
    }
    parquet.write_table(table.replace_schema_metadata({METADATA_KEY: json.dumps(content)}), path)
    with pytest.raises(UserError, match="has no column sample, split"):
        read_predictions(path)


def test_softmax_neither_overflows_nor_hides_nonfinite_logits() -> None:
    found_NK = softmax(np.array([[1e5, 0, -1e5], [0, 0, 0], [np.nan, 0, 0], [np.inf, 0, 0]], np.float32))
    assert found_NK[0].tolist() == [1, 0, 0] and np.allclose(found_NK[1], 1 / 3) and np.isnan(found_NK[2:]).all()
    assert softmax(np.empty((0, 3))).shape == (0, 3)
