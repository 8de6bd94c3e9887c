"""Parsing of scalars: YAML 1.2's core schema, and command-line text by a field's type."""

import re
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NewType, Union, get_args, get_origin
from urllib.parse import urlsplit

# A path or a URL; a Path would change the URL's double slash.
Location = NewType("Location", str)

# YAML 1.2.2, section 10.3.2 (core schema, tag resolution).
NULL = re.compile(r"(?:null|Null|NULL|~)")
BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)")
INT = re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)")
FLOAT = re.compile(r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?(?:\.inf|\.Inf|\.INF)|\.nan|\.NaN|\.NAN)")

MAX_DIGITS = 400  # of an integer; Python itself refuses integers of more than a few thousand digits


def read_int(text: str) -> int:
    """Parse an integer of the core schema (``012`` is 12, ``0o14`` is 12, ``0xC`` is 12)."""
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits is too long")
    if text.startswith("0o"):
        return int(text[2:], 8)
    if text.startswith("0x"):
        return int(text[2:], 16)
    return int(text)


def read_float(text: str) -> float:
    """Parse a float of the core schema; it may be inf or nan, which the schema refuses later."""
    lowered = text.lower()
    if lowered.endswith((".inf", ".nan")):
        return float(lowered.replace(".", ""))
    return float(text)


def read_path(text: str) -> Path:
    """Parse a path on this machine.

    Raises:
        ValueError: the text is a URL.
    """
    if "://" in text:
        raise ValueError("must be a path on this machine, and is a URL")
    return Path(text).expanduser()


def read_location(text: str) -> Location:
    """Parse a path or a URL; a path is normalised, a URL stays unchanged."""
    return Location(text if "://" in text else str(Path(text).expanduser()))


def check_address(text: str) -> str:
    """Return an address that begins with ``http://`` or ``https://`` and a host.

    Raises:
        ValueError: it is none; the message does not contain it, since it may be a secret.
    """
    try:
        parts = urlsplit(text)
        is_sound = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        is_sound = False
    if not is_sound or not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError("must be an address like https://hooks.example.org/...")
    return text


_READERS: dict[Any, tuple[re.Pattern[str], Callable[[str], Any]]] = {
    bool: (BOOL, lambda text: text.lower() == "true"),
    int: (INT, read_int),
    float: (FLOAT, read_float),
    str: (re.compile(r".*", re.DOTALL), str),
    Path: (re.compile(r".+", re.DOTALL), read_path),
    Location: (re.compile(r".+", re.DOTALL), read_location),
}


def describe_type(annotation: Any) -> str:
    """Describe the type of a field in words, for errors and listings."""
    members = _union_members(annotation)
    if len(members) > 1:
        return " or ".join("null" if member is NoneType else describe_type(member) for member in members)
    origin = get_origin(annotation)
    if origin is Literal:
        choices = [str(choice) for choice in get_args(annotation)]
        return choices[0] if len(choices) == 1 else "one of " + ", ".join(choices)
    if origin is tuple:
        (member, *_) = get_args(annotation)
        return f"a list of {', '.join(map(str, get_args(member)))}" if get_origin(member) is Literal else "a list like a,b"
    names: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    names |= {Path: "a path", Location: "a path or a URL"}
    return names.get(annotation, str(annotation))


def parse_text(text: str, annotation: Any) -> Any:
    """Parse command-line text as a value of type ``annotation``.

    Raises:
        ValueError: the text is not a value of that type; the message names the type.
    """
    members = _union_members(annotation)
    if NoneType in members and NULL.fullmatch(text):
        return None
    values = (_parse_plain(text, member) for member in members if member is not NoneType)
    value = next((value for value in values if value is not None), None)
    if value is None:
        raise ValueError(f"must be {describe_type(annotation)}")
    return value


def to_text(value: Any) -> str:
    """Format a plain value for ``key=``; ``parse_text`` reads it back, except for lists of texts with commas."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(map(to_text, value))}]"
    return str(value)


def from_plain(value: Any, annotation: Any) -> Any:
    """Convert a value from YAML or JSON to the schema's type: text to a path, a list to a tuple; other values stay."""
    (plain, *_) = [member for member in _union_members(annotation) if member is not NoneType]
    if plain is Path and isinstance(value, str) and value:
        return read_path(value)
    if plain is Location and isinstance(value, str) and value:
        return read_location(value)
    if get_origin(plain) is tuple and isinstance(value, list):
        return tuple(value)
    return value


def _union_members(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) in (Union, UnionType):
        return tuple(_bare(member) for member in get_args(annotation))
    return (annotation,)


def _bare(annotation: Any) -> Any:
    """Return the type without its ``Annotated`` constraints, which the schema checks."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _parse_plain(text: str, annotation: Any) -> Any:
    """Parse text as one type; return None if it is not a value of that type."""
    origin = get_origin(annotation)
    if origin is Literal:
        return {str(choice): choice for choice in get_args(annotation)}.get(text)
    if origin is tuple:
        return _parse_list(text, _bare(get_args(annotation)[0]))
    pattern, read = _READERS[annotation]
    return read(text) if pattern.fullmatch(text) else None


def _parse_list(text: str, member: Any) -> tuple[Any, ...] | None:
    """Parse a list: ``[a,b]``, ``a,b`` or ``a``; return None if only one bracket is present."""
    if text.startswith("[") != text.endswith("]"):
        return None
    inside = (text[1:-1] if text.startswith("[") else text).strip()
    if not inside:
        return ()
    return tuple(parse_text(part.strip().strip("\"'"), member) for part in inside.split(","))
