"""How named YAML files, and one of them resolved, are listed on a terminal."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

MAX_WIDTH = 32  # of a value, before the columns after it move


def print_files(files: Mapping[str, Path]) -> None:
    """One name a line, with the comment that its file begins with."""
    width = max((len(name) for name in files), default=0)
    for name, path in files.items():
        print(f"{name:{width}}  {_first_comment(path.read_text(encoding='utf-8', errors='replace'))}".rstrip())


def print_resolved(values: Mapping[str, Any], origins: Mapping[str, str], notes: Mapping[str, str]) -> None:
    """Every key with its value, where it came from, and what it is for; a star where that is not the schema's default.

    Args:
        values: plain values by dotted key.
        origins: dotted key -> where the value came from.
        notes: dotted key -> what to say after the origin.
    """
    from galaxydist.recipe.draft import SCHEMA_DEFAULT
    from galaxydist.recipe.scalars import to_text

    texts = {key: to_text(value) for key, value in values.items()}
    key_width = max(map(len, texts))
    value_width = min(max(map(len, texts.values())), MAX_WIDTH)
    for key, text in texts.items():
        mark = " " if origins[key] == SCHEMA_DEFAULT else "*"
        print(f"{mark} {key:{key_width}} = {text:{value_width}}  # {origins[key]}{notes[key]}")


def _first_comment(text: str) -> str:
    first = text.splitlines()[0] if text else ""
    return first.lstrip("# ").strip() if first.startswith("#") else ""
