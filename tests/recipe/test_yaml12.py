"""YAML 1.2's core schema, where PyYAML's own reading differs."""

import math
from pathlib import Path

import pytest

from galaxydist.recipe.yaml12 import read_document


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("y", "y"),
        ("true", True),
        ("FALSE", False),
        ("tRue", "tRue"),
        ("null", None),
        ("~", None),
        ("", None),
        ("'null'", "null"),
        ("012", 12),
        ("0o14", 12),
        ("0x1F", 31),
        ("-7", -7),
        ("1_000", "1_000"),
        ("0b11", "0b11"),
        ("1e-3", 1e-3),
        ("1.", 1.0),
        (".5", 0.5),
        ("+1E3", 1000.0),
        ("-.inf", -math.inf),
        ("1:30", "1:30"),
        ("190:20:30", "190:20:30"),
        ("2001-12-14", "2001-12-14"),
        ("=", "="),
        ("'12'", "12"),
        ("!!str 12", "12"),
        ("[a, 1, 1e-3, [no]]", ["a", 1, 1e-3, ["no"]]),
    ],
)
def test_yaml_scalars_are_read_by_the_yaml_1_2_core_schema(tmp_path: Path, text: str, value: object) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"key: {text}\n")
    document = read_document(path)
    assert not document.problems
    assert document.values["key"] == value and type(document.values["key"]) is type(value)


def test_yaml_nan_is_read_as_a_float(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("key: .nan\n")
    assert math.isnan(read_document(path).values["key"])


def test_yaml_merge_keys_are_read_as_plain_keys(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("a:\n  <<: {b: 1}\n  c: 2\n")
    document = read_document(path)
    assert document.values == {"a.<<.b": 1, "a.c": 2}
    assert document.lines == {"a": 1, "a.<<": 2, "a.<<.b": 2, "a.c": 3}
