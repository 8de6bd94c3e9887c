"""How named YAML files, and one of them resolved, are listed on a terminal."""

import re
import shutil
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MAX_WIDTH = 100  # columns, on a wider terminal too
MAX_VALUE_WIDTH = 20  # of a value, before the columns after it move


def print_files(files: Mapping[str, Path]) -> None:
    """Print each name with the first sentence of the comment that its file begins with."""
    width = max((len(name) for name in files), default=0)
    for name, path in files.items():
        _print_wrapped(f"{name:{width}}  ", _first_sentence(path.read_text(encoding="utf-8", errors="replace")))


def print_resolved(values: Mapping[str, Any], origins: Mapping[str, str], notes: Mapping[str, str]) -> None:
    """Print every key with its value, its origin where that is not the schema's default (marked by a star), and its description.

    Args:
        values: plain values by dotted key.
        origins: dotted key -> where the value came from.
        notes: dotted key -> the description.
    """
    from galaxydist.recipe.resolve import SCHEMA_DEFAULT
    from galaxydist.recipe.yaml12 import to_text

    texts = {key: to_text(value) for key, value in values.items()}
    key_width = max(map(len, texts))
    value_width = min(max(map(len, texts.values())), MAX_VALUE_WIDTH)
    for key, text in texts.items():
        is_default = origins[key] == SCHEMA_DEFAULT
        note = notes[key] if is_default else f"({origins[key]}) {notes[key]}"
        _print_wrapped(f"{' ' if is_default else '*'} {key:{key_width}} = {text:{value_width}}  # ", note)


def _print_wrapped(head: str, text: str) -> None:
    """Print the text after its head, on as many lines as it needs, all of them indented like the first."""
    width = min(shutil.get_terminal_size((MAX_WIDTH, 24)).columns, MAX_WIDTH)
    hanging = re.sub(r"[^#\s]", " ", head) if head.endswith("# ") else " " * len(head)
    room = max(width - len(head), 24)
    lines = textwrap.wrap(text, room, break_on_hyphens=False, break_long_words=False) or [""]
    print(f"{head}{lines[0]}".rstrip())
    for line in lines[1:]:
        print(f"{hanging}{line}")


def _first_sentence(text: str) -> str:
    """The first sentence of the comment at the top of a YAML file, or nothing."""
    comment = re.match(r"(?:[ \t]*#[^\n]*(?:\n|$))*", text)
    words = re.sub(r"\s+", " ", re.sub(r"(?m)^[ \t]*#", "", comment.group() if comment else "")).strip()
    return re.split(r"(?<=\.) (?=[^a-z0-9])", words, maxsplit=1)[0]
