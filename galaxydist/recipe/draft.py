"""Putting one configuration together key by key: what passed, where it came from, and all that is wrong, in one message."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic

from galaxydist.errors import EveryRankError
from galaxydist.recipe.fields import S, Schema
from galaxydist.recipe.scalars import from_plain, parse_text

SCHEMA_DEFAULT = "schema default"
COMMAND_LINE = "command line"
FILE_NAME = "file name"


class ConfigError(EveryRankError):
    """A recipe, or another file of settings, that cannot be used; the text has all problems and where each came from.

    Attributes:
        problems: (origin, text) of each.
    """

    noun = "settings"

    def __init__(self, problems: Sequence[tuple[str, str]]) -> None:
        self.problems = tuple(problems)
        count = f"{len(problems)} problems" if len(problems) > 1 else "a problem"
        super().__init__("\n".join([f"{count} in the {self.noun}:", *(f"  {origin}: {text}" for origin, text in problems)]))


@dataclass(frozen=True)
class Check:
    """A rule between fields.

    Attributes:
        keys: the dotted keys that it looks at; an error names where each came from.
        problem: their values, in order -> what is wrong and what to do, or None.
    """

    keys: tuple[str, ...]
    problem: Callable[..., str | None]


@dataclass(frozen=True)
class ConfigKind(Generic[S]):
    """What kind of configuration is read: recipes, cluster profiles.

    Attributes:
        schema: its keys.
        checks: the rules between them.
        error: raised with all problems; its ``noun`` says what the thing is called.
        argument: what names the file on the command line, ``recipe`` for ``recipe=vit``.
        prefix: what stands before a key on the command line and not in the file (``cluster.``, or nothing).
        examples: a name, a line of a file and a ``key=value``, for messages.
    """

    schema: Schema[S]
    checks: tuple[Check, ...]
    error: type[ConfigError]
    argument: str
    examples: tuple[str, str, str]
    prefix: str = ""

    @property
    def noun(self) -> str:
        return self.error.noun

    def spelt(self, key: str, origin: str) -> str:
        """The key as it is written at the place where its value came from."""
        return self.prefix + key if origin == COMMAND_LINE else key


@dataclass(frozen=True)
class Resolved(Generic[S]):
    """A configuration and where it came from.

    Attributes:
        config: the values.
        origins: dotted key -> ``schema default``, ``recipes/vit.yaml:7``, ``command line`` or ``file name``.
        path: its file.
    """

    config: S
    origins: Mapping[str, str]
    path: Path


@dataclass
class Draft(Generic[S]):
    """A configuration that is being put together: values that passed, where they came from, and all that is wrong."""

    kind: ConfigKind[S]
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    invalid: set[str] = field(default_factory=set)
    problems: list[tuple[str, str]] = field(default_factory=list)

    def put(self, key: str, value: Any, origin: str, *, is_text: bool = False) -> None:
        """Sets one key, or notes what is wrong. ``is_text``: the value is text, to be read by the field's type."""
        known = self.kind.schema.fields.get(key)
        if known is None:
            self._refuse_key(key, value, origin)
            return
        self.invalid.discard(key)
        self.origins[key] = origin
        try:
            plain = parse_text(value, known.annotation) if is_text else from_plain(value, known.annotation)
            self.values[key] = known.check(plain)
        except ValueError as error:
            self.invalid.add(key)
            self.problems.append((origin, f"{self.kind.spelt(key, origin)}={shown(value)}: {error}"))

    def _refuse_key(self, key: str, value: Any, origin: str) -> None:
        schema = self.kind.schema
        written = self.kind.spelt(key, origin)
        if key in schema.sections:
            if value is not None:  # "optim:" with nothing but comments under it is a section without differences
                keys = ", ".join(self.kind.spelt(name, origin) for name in schema.sections[key])
                self.problems.append((origin, f"{written} is a section; set its keys: {keys}"))
        else:
            self.problems.append((origin, f"{written}: no such key{schema.suggest(key, prefix=self.kind.spelt('', origin))}"))

    def finish(self) -> S:
        """The configuration, after the checks between fields. Raises the kind's error with everything that is wrong."""
        for key, known in self.kind.schema.fields.items():
            if key in self.origins:
                continue
            if known.required:
                self.invalid.add(key)
                self.problems.append((self.kind.noun, f"{key} is missing: {known.description}"))
            else:
                self.values[key] = known.default
                self.origins[key] = SCHEMA_DEFAULT
        for check in self.kind.checks:
            if self.invalid.isdisjoint(check.keys):
                self._run_check(check.keys, check.problem(*(self.values[key] for key in check.keys)))
        if self.problems:
            raise self.kind.error(self.problems)
        return self.kind.schema.root.model_validate(_nested(self.values))

    def _run_check(self, keys: Sequence[str], problem: str | None) -> None:
        if problem is None:
            return
        given = [key for key in keys if self.origins[key] != SCHEMA_DEFAULT] or list(keys)
        origins = dict.fromkeys(self.origins[key] for key in given)
        values = ", ".join(f"{self.kind.spelt(key, self.origins[key])}={shown(self.values[key])}" for key in given)
        self.problems.append((" and ".join(origins), f"{values}: {problem}"))


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted key as sections in sections."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return nested


def shown(value: Any) -> str:
    """A value as one would type it, shortened."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(shown(member) for member in value)}]"
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
