"""Reader of YAML 1.2 configuration files: plain values, their line numbers, and problems of the file."""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from galaxydist.errors import first_line
from galaxydist.recipe.scalars import BOOL, FLOAT, INT, NULL, read_float, read_int

_TAG = "tag:yaml.org,2002:"


@dataclass
class Document:
    """A YAML mapping of mappings, flattened.

    Attributes:
        values: dotted key -> plain value (text, number, bool, None or a list of those), without sections.
        lines: dotted key -> line number in the file (from 1), of values and sections.
        entries: dotted key -> the members of its list of mappings, each flattened; they share the document's problems.
        problems: (line, text); line 0 if unknown.
    """

    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    entries: dict[str, list["Document"]] = field(default_factory=dict)
    problems: list[tuple[int, str]] = field(default_factory=list)


class _Loader(yaml.BaseLoader):
    """PyYAML's loader, used up to the node graph, with YAML 1.2's core schema instead of YAML 1.1's types.

    Two libraries were tried instead: ruamel.yaml reads ``1_000``, ``0b11`` and dates as YAML 1.1 does; yamlcore replaces only
    the four resolvers below, whose patterns are needed for ``key=value`` too.
    """

    noun: str

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # short files need no aliases, and an alias may contain itself
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, f"aliases (*name) are not used in {self.noun}s", mark)
        return super().compose_node(parent, index)


for _name, _pattern in (
    ("null", rf"(?:{NULL.pattern})?"),
    ("bool", BOOL.pattern),
    ("int", INT.pattern),
    ("float", FLOAT.pattern),
):
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), None)


@dataclass(frozen=True)
class _Syntax:
    """Kind of the file, and syntax that it allows in addition to nested mappings of plain values (see ``read_document``)."""

    noun: str
    is_dotted: bool = False
    lists: frozenset[str] = frozenset()


def read_document(
    path: Path,
    *,
    noun: str = "recipe",
    example: str = "model: {name: vit}",
    is_dotted: bool = False,
    lists: Collection[str] = (),
) -> Document:
    """Read a YAML file; errors in its contents become the document's problems.

    Args:
        path: the file.
        noun: kind of the file, for the problems' texts.
        example: a valid line of such a file, for the problems' texts.
        is_dotted: also allow ``optim.lr: 1`` for ``optim: {lr: 1}``.
        lists: dotted keys of lists of mappings.

    Raises:
        OSError: the file cannot be read.
    """
    document, syntax = Document(), _Syntax(noun, is_dotted, frozenset(lists))
    raw = path.read_bytes()
    try:
        loader = _Loader(raw.decode("utf-8"))
        loader.noun = noun
        root = loader.get_single_node()
    except UnicodeDecodeError as error:
        document.problems.append((raw.count(b"\n", 0, error.start) + 1, "is not UTF-8 text"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        document.problems.append((mark.line + 1 if mark else 0, f"cannot be read as YAML: {error.problem or error.context}"))
    except yaml.YAMLError as error:
        document.problems.append((0, f"cannot be read as YAML: {first_line(error)}"))
    except RecursionError:
        document.problems.append((0, "is nested too deeply"))
    else:
        if isinstance(root, yaml.MappingNode):
            _flatten(root, "", document, syntax)
        elif root is not None and root.tag != f"{_TAG}null":
            document.problems.append((root.start_mark.line + 1, f"must be a mapping of keys to values, like '{example}'"))
    return document


def _flatten(mapping: yaml.MappingNode, prefix: str, document: Document, syntax: _Syntax) -> None:
    for key_node, value_node in mapping.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != f"{_TAG}str":
            document.problems.append((line, f"the key {getattr(key_node, 'value', '')!r} must be text"))
            continue
        if "." in key_node.value and not syntax.is_dotted:
            document.problems.append((line, f"the key {key_node.value!r} has a dot: write sections as nested mappings"))
            continue
        key = prefix + key_node.value
        if key in document.lines:
            document.problems.append((line, f"{key} is set again here, first on line {document.lines[key]}: keep one"))
            continue
        document.lines[key] = line
        if isinstance(value_node, yaml.MappingNode):
            _flatten(value_node, f"{key}.", document, syntax)
            continue
        if key in syntax.lists and isinstance(value_node, yaml.SequenceNode):
            _read_entries(value_node, key, document, syntax)
            continue
        try:
            document.values[key] = _plain(value_node, syntax.noun)
        except ValueError as error:
            document.problems.append((value_node.start_mark.line + 1, f"{key}: {error}"))


def _read_entries(sequence: yaml.SequenceNode, key: str, document: Document, syntax: _Syntax) -> None:
    document.entries[key] = []
    for node in sequence.value:
        entry = Document(problems=document.problems)
        if isinstance(node, yaml.MappingNode):
            _flatten(node, "", entry, _Syntax(syntax.noun, syntax.is_dotted))
        else:
            text = f"{key}: each entry is a mapping of keys to values, like {{recipe: vit, seed: 1}}"
            document.problems.append((node.start_mark.line + 1, text))
        document.entries[key].append(entry)


def _plain(node: yaml.Node, noun: str) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_plain(member, noun) for member in node.value]
    if isinstance(node, yaml.MappingNode):
        raise ValueError("a list holds plain values only")
    readers: dict[str, Callable[[str], Any]] = {
        "null": lambda _: None,
        "bool": lambda text: text.lower() == "true",
        "int": read_int,
        "float": read_float,
        "str": str,
    }
    reader = readers.get(node.tag.removeprefix(_TAG))
    if reader is None:
        raise ValueError(f"the tag {node.tag} is not used in {noun}s")
    return reader(node.value)
