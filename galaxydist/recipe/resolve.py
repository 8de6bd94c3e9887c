"""Loading of configurations: named files, command-line overrides, and the origin of each value.

All problems of a configuration are reported in one error.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Generic

from galaxydist.errors import EveryRankError
from galaxydist.paths import shipped_dir
from galaxydist.recipe.fields import RECIPE, CrossFieldRule, S, Schema
from galaxydist.recipe.rules import CHECKS
from galaxydist.recipe.scalars import from_plain, parse_text
from galaxydist.recipe.schema import Recipe
from galaxydist.recipe.yaml12 import read_document

SCHEMA_DEFAULT = "schema default"
COMMAND_LINE = "command line"
FILE_NAME = "file name"


class ConfigError(EveryRankError):
    """Error of a recipe or another configuration; the text lists all problems with their origins.

    Attributes:
        problems: (origin, text) of each problem.
    """

    noun = "settings"

    def __init__(self, problems: Sequence[tuple[str, str]]) -> None:
        self.problems = tuple(problems)
        count = f"{len(problems)} problems" if len(problems) > 1 else "a problem"
        super().__init__("\n".join([f"{count} in the {self.noun}:", *(f"  {origin}: {text}" for origin, text in problems)]))


@dataclass(frozen=True)
class ConfigSpec(Generic[S]):
    """A kind of configuration, such as recipes or cluster profiles.

    Attributes:
        schema: its keys.
        checks: the rules between the keys.
        error: its error class; ``noun`` is the name of the kind in messages.
        argument: command-line argument that names the file, ``recipe`` for ``recipe=vit``.
        prefix: prefix of the keys on the command line, but not in the file (``cluster.``, or empty).
        examples: a name, a line of a file and a ``key=value``, for messages.
    """

    schema: Schema[S]
    checks: tuple[CrossFieldRule, ...]
    error: type[ConfigError]
    argument: str
    examples: tuple[str, str, str]
    prefix: str = ""

    @property
    def noun(self) -> str:
        return self.error.noun

    def spelt(self, key: str, origin: str) -> str:
        """Return the key as it is written at the origin of its value."""
        return self.prefix + key if origin == COMMAND_LINE else key


@dataclass(frozen=True)
class ResolvedConfig(Generic[S]):
    """A configuration with the origin of each value.

    Attributes:
        config: the values.
        origins: dotted key -> ``schema default``, ``recipes/vit.yaml:7``, ``command line`` or ``file name``.
        path: its file.
    """

    config: S
    origins: Mapping[str, str]
    path: Path


@dataclass
class ConfigBuilder(Generic[S]):
    """Collects valid values, their origins and all problems, and builds the configuration."""

    kind: ConfigSpec[S]
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    invalid: set[str] = field(default_factory=set)
    problems: list[tuple[str, str]] = field(default_factory=list)

    def put(self, key: str, value: Any, origin: str, *, is_text: bool = False) -> None:
        """Set one key, or record its problem; with ``is_text`` the value is parsed by the field's type."""
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
            if value is not None:  # "optim:" with only comments under it is an empty section
                keys = ", ".join(self.kind.spelt(name, origin) for name in schema.sections[key])
                self.problems.append((origin, f"{written} is a section; set its keys: {keys}"))
        else:
            self.problems.append((origin, f"{written}: no such key{schema.suggest(key, prefix=self.kind.spelt('', origin))}"))

    def finish(self) -> S:
        """Run the checks between fields and return the configuration, or raise the kind's error with all problems."""
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
    """Convert values by dotted key to nested sections."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return nested


def shown(value: Any) -> str:
    """Format a value as on the command line, shortened to 60 characters."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(shown(member) for member in value)}]"
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass(frozen=True)
class Override:
    """A plain value with its origin, such as a value of a sweep's file.

    Attributes:
        value: text, number, bool, None or a list of those.
        origin: file and line, such as ``slurm/sweeps/galaxy10.yaml:7``, or ``command line``.
    """

    value: Any
    origin: str


def load_config(
    kind: ConfigSpec[S],
    arguments: Sequence[str],
    folders: Sequence[Path],
    *,
    settings: Mapping[str, Override] | None = None,
) -> ResolvedConfig[S]:
    """Load the configuration of a command line.

    Args:
        arguments: ``recipe=NAME`` or ``recipe=FILE.yaml`` (the kind's argument) and ``key=value`` for any key of the schema, in
            any order.
        folders: folders of named files, in order of priority.
        settings: values by dotted key that override the file and are overridden by the command line; may have the kind's
            argument.

    Raises:
        ConfigError: the configuration is invalid; the text lists all problems with their origins.
    """
    draft = ConfigBuilder(kind)
    overrides, between = _read_overrides(arguments, draft), dict(settings or {})
    named = between.pop(kind.argument, Override(None, COMMAND_LINE))
    if kind.argument in overrides:
        named = Override(overrides.pop(kind.argument), COMMAND_LINE)
    path = _find(named, folders, draft)
    if path is not None:
        _read_file(path, draft)
    else:
        for key in (key for key, known in kind.schema.fields.items() if known.required):
            draft.invalid.add(key)
            draft.origins[key] = kind.noun
    for key, setting in between.items():
        if key not in overrides:
            _override(key, setting, draft, is_text=False)
    for key, text in overrides.items():
        _override(key, Override(text, COMMAND_LINE), draft, is_text=True)
    draft.values["name"] = _name_of(path, folders) if path is not None else ""
    draft.origins["name"] = FILE_NAME
    config = draft.finish()
    assert path is not None, "a missing file is a problem, and problems raise"
    return ResolvedConfig(config, draft.origins, path)


def list_files(folders: Sequence[Path]) -> dict[str, Path]:
    """Return name -> file of all YAML files that can be given by name: ``vit``, or ``reference/vit`` in a subfolder."""
    found: dict[str, Path] = {}
    for folder in folders:
        for path in sorted([*folder.glob("*.yaml"), *folder.glob("[!.]*/*.yaml")]):
            found.setdefault(path.relative_to(folder).with_suffix("").as_posix(), path)
    return dict(sorted(found.items()))


def _name_of(path: Path, folders: Sequence[Path]) -> str:
    """Return the name of a file's configuration without slashes: ``reference-vit`` for ``reference/vit``.

    It does not depend on whether the file was given by its name or by its path.
    """
    inside = path.parent.resolve()
    for folder in folders:
        if inside.is_relative_to(folder.resolve()):
            return "-".join([*inside.relative_to(folder.resolve()).parts, path.stem])
    return path.stem


def _override(written: str, setting: Override, draft: ConfigBuilder[S], *, is_text: bool) -> None:
    kind, origin = draft.kind, setting.origin
    key = written.removeprefix(kind.prefix)
    if key == written and kind.prefix:
        draft.problems.append((origin, f"{written}: no such key{kind.schema.suggest(key, prefix=kind.prefix)}"))
    elif key == "name":
        draft.problems.append((origin, f"{written}: a {kind.noun} is named by its file; copy the file under another name"))
    else:
        draft.put(key, setting.value, origin, is_text=is_text)


def _read_overrides(arguments: Sequence[str], draft: ConfigBuilder[S]) -> dict[str, str]:
    kind = draft.kind
    overrides: dict[str, str] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if _is_bare_name(argument, kind) and kind.argument not in overrides:
            overrides[kind.argument] = argument
        elif not equals or not key or key.startswith("-"):
            name, _, override = kind.examples
            draft.problems.append((COMMAND_LINE, f"{argument!r} is not key=value (like {kind.argument}={name} or {override})"))
        elif key in overrides:
            draft.problems.append((COMMAND_LINE, f"{key} is given twice, {shown(overrides[key])} and {shown(text)}; keep one"))
        else:
            overrides[key] = text
    return overrides


def _is_bare_name(argument: str, kind: ConfigSpec[S]) -> bool:
    """Return True for an argument like ``vit``, short for ``recipe=vit``; a key without a value is not a name."""
    return bool(argument) and "=" not in argument and not argument.startswith("-") and argument not in kind.schema.fields


def _find(named: Override, folders: Sequence[Path], draft: ConfigBuilder[S]) -> Path | None:
    """Return the file, or record a problem and return None."""
    argument, noun = draft.kind.argument, draft.kind.noun
    name, origin = named.value, named.origin
    known = list_files(folders)
    listed = f"{noun}s: {', '.join(known) or 'none found'}; or {argument}=FILE.yaml"
    if name is None:
        draft.problems.append((origin, f"{argument}=NAME is missing; {listed}"))
        return None
    if not isinstance(name, str):
        draft.problems.append((origin, f"{argument}={shown(name)}: must be a {noun}'s name or file; {listed}"))
        return None
    if name in known:
        return known[name]
    is_path = name.endswith((".yaml", ".yml")) or "/" in name
    if is_path and (path := Path(name).expanduser()).is_file():
        return path
    close = get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    what = f"there is no such file{hint}; {listed}" if is_path else f"no such {noun}{hint} ({listed})"
    draft.problems.append((origin, f"{argument}={name}: {what}"))
    return None


def _read_file(path: Path, draft: ConfigBuilder[S]) -> None:
    kind = draft.kind
    try:
        document = read_document(path, noun=kind.noun, example=kind.examples[1])
    except OSError as error:
        raise kind.error([(str(path), f"cannot be read: {error.strerror}")]) from error
    for line, text in document.problems:
        draft.problems.append((f"{path}:{line}" if line else str(path), text))
    for key, value in document.values.items():
        origin = f"{path}:{document.lines[key]}"
        if key == "name":
            draft.problems.append((origin, f"name: a {kind.noun} is named by its file ({path.stem}); take the line out"))
        else:
            draft.put(key, value, origin)


# Recipes.

__all__ = ["RECIPES", "Override", "RecipeError", "ResolvedRecipe", "list_recipes", "load_recipe"]


class RecipeError(ConfigError):
    """Error of an invalid recipe."""

    noun = "recipe"


@dataclass(frozen=True)
class ResolvedRecipe:
    """A recipe with the origin of each value.

    Attributes:
        recipe: the values.
        origins: dotted key -> ``schema default``, ``recipes/vit.yaml:7``, ``command line`` or ``file name``.
        path: the recipe's file.
    """

    recipe: Recipe
    origins: Mapping[str, str]
    path: Path


RECIPES = ConfigSpec(
    schema=RECIPE,
    checks=CHECKS,
    error=RecipeError,
    argument="recipe",
    examples=("vit", "model: {name: vit}", "optim.lr=1e-4"),
)


def load_recipe(
    arguments: Sequence[str], *, folders: Sequence[Path] | None = None, settings: Mapping[str, Override] | None = None
) -> ResolvedRecipe:
    """Load the recipe of a command line.

    Args:
        arguments: ``recipe=NAME`` or ``recipe=FILE.yaml`` and ``key=value`` for any key of the schema, in any order.
        settings: values by dotted key that override the recipe's file and are overridden by the command line; may contain
            ``recipe``.
        folders: folders of recipes, in order of priority; default ``./recipes``, then the shipped recipes.

    Raises:
        RecipeError: the recipe is invalid; the text lists all problems with their origins.
    """
    resolved = load_config(RECIPES, arguments, _folders() if folders is None else folders, settings=settings)
    return ResolvedRecipe(resolved.config, resolved.origins, resolved.path)


def list_recipes(folders: Sequence[Path] | None = None) -> dict[str, Path]:
    """Return recipe name -> file of all recipes that can be given as ``recipe=NAME``."""
    return list_files(_folders() if folders is None else folders)


def _folders() -> tuple[Path, Path]:
    return Path("recipes"), shipped_dir("recipes")
