"""Resolution of a command line into a checked configuration with the origin of each value: recipes and cluster profiles."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Generic

from galaxydist.errors import EveryRankError
from galaxydist.paths import shipped_dir
from galaxydist.recipe.fields import RECIPE, CrossFieldRule, S, Schema
from galaxydist.recipe.rules import RULES
from galaxydist.recipe.scalars import from_plain, parse_text, to_text
from galaxydist.recipe.schema import Recipe
from galaxydist.recipe.yaml12 import Document, read_document

SCHEMA_DEFAULT = "schema default"
COMMAND_LINE = "command line"
FILE_NAME = "file name"
PROFILES = "profiles"  # section of a file with named groups of values, of which the command line chooses one


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
        rules: the rules between the keys.
        error: its error class; ``noun`` is the name of the kind in messages.
        argument: command-line argument that names the file, ``recipe`` for ``recipe=vit``.
        prefix: prefix of the keys on the command line, but not in the file (``cluster.``, or empty).
        profile: command-line argument that chooses one of the file's ``profiles``; empty if such files have none.
        examples: a name, a line of a file and a ``key=value``, for messages.
    """

    schema: Schema[S]
    rules: tuple[CrossFieldRule, ...]
    error: type[ConfigError]
    argument: str
    examples: tuple[str, str, str]
    prefix: str = ""
    profile: str = ""

    @property
    def noun(self) -> str:
        return self.error.noun

    def spell(self, key: str, origin: str) -> str:
        """Return the key as it is written at the origin of its value."""
        return self.prefix + key if origin == COMMAND_LINE else key

    def show(self, key: str, value: Any) -> str:
        """Return a value as messages show it: shortened, and nothing of a secret."""
        known = self.schema.fields.get(key)
        return "(hidden)" if known is not None and known.is_secret else shorten(value)


@dataclass(frozen=True)
class ResolvedConfig(Generic[S]):
    """A configuration with the origin of each value.

    Attributes:
        config: the values.
        origins: dotted key -> ``schema default``, ``recipes/vit.yaml:7``, ``command line`` or ``file name``.
        path: its file.
        profiles: names of the file's profiles.
    """

    config: S
    origins: Mapping[str, str]
    path: Path
    profiles: tuple[str, ...] = ()


@dataclass(frozen=True)
class Override:
    """A plain value with its origin, such as a value of a sweep's file.

    Attributes:
        value: text, number, bool, None or a list of those.
        origin: file and line, such as ``slurm/sweeps/galaxy10.yaml:7``, or ``command line``.
    """

    value: Any
    origin: str


@dataclass
class ConfigBuilder(Generic[S]):
    """Collects valid values, their origins and all problems, and builds the configuration."""

    spec: ConfigSpec[S]
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    invalid: set[str] = field(default_factory=set)
    problems: list[tuple[str, str]] = field(default_factory=list)

    def refuse(self, origin: str, text: str) -> None:
        """Record a problem."""
        self.problems.append((origin, text))

    def set(self, key: str, value: Any, origin: str, *, is_text: bool = False) -> None:
        """Set one key, or record its problem; with ``is_text`` the value is parsed by the field's type."""
        known = self.spec.schema.fields.get(key)
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
            self.refuse(origin, f"{self.spec.spell(key, origin)}={self.spec.show(key, value)}: {error}")

    def _refuse_key(self, key: str, value: Any, origin: str) -> None:
        schema = self.spec.schema
        written = self.spec.spell(key, origin)
        if key in schema.sections:
            if value is not None:  # "optim:" with only comments under it is an empty section
                keys = ", ".join(self.spec.spell(name, origin) for name in schema.sections[key])
                self.refuse(origin, f"{written} is a section; set its keys: {keys}")
        else:
            self.refuse(origin, f"{written}: no such key{schema.suggest(key, prefix=self.spec.spell('', origin))}")

    def build(self) -> S:
        """Apply the defaults and the rules between keys and return the configuration, or raise an error with all problems."""
        for key, known in self.spec.schema.fields.items():
            if key in self.origins:
                continue
            if known.info.is_required():
                self.invalid.add(key)
                self.refuse(self.spec.noun, f"{key} is missing: {known.description}")
            else:
                self.values[key] = known.default
                self.origins[key] = SCHEMA_DEFAULT
        for rule in self.spec.rules:
            if self.invalid.isdisjoint(rule.keys):
                self._apply(rule)
        if self.problems:
            raise self.spec.error(self.problems)
        return self.spec.schema.root.model_validate(nest(self.values))

    def _apply(self, rule: CrossFieldRule) -> None:
        problem = rule.problem(*(self.values[key] for key in rule.keys))
        if problem is None:
            return
        given = [key for key in rule.keys if self.origins[key] != SCHEMA_DEFAULT] or rule.keys
        origins = dict.fromkeys(self.origins[key] for key in given)
        values = ", ".join(f"{self.spec.spell(key, self.origins[key])}={shorten(self.values[key])}" for key in given)
        self.refuse(" and ".join(origins), f"{values}: {problem}")


def nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by dotted key as nested sections."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        section = nested
        for section_name in sections:
            section = section.setdefault(section_name, {})
        section[name] = value
    return nested


def shorten(value: Any) -> str:
    """Format a value as on the command line, shortened to 60 characters."""
    text = to_text(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def load_config(
    spec: ConfigSpec[S],
    arguments: Sequence[str],
    folders: Sequence[Path],
    *,
    settings: Mapping[str, Override] | None = None,
) -> ResolvedConfig[S]:
    """Load the configuration of a command line.

    Args:
        spec: the kind of configuration.
        arguments: ``recipe=NAME`` or ``recipe=FILE.yaml`` (or ``NAME`` alone), ``profile=NAME`` for one of the file's profiles,
            which overrides the rest of the file, and ``key=value`` for any key of the schema, in any order.
        folders: folders of named files, in order of priority.
        settings: values by dotted key that override the file and are overridden by the command line; may include ``recipe`` and
            ``profile``.

    Raises:
        ConfigError: the configuration is invalid; the text lists all problems with their origins.
    """
    builder = ConfigBuilder(spec)
    overrides, file_overrides = _read_overrides(arguments, builder), dict(settings or {})
    named = file_overrides.pop(spec.argument, Override(None, COMMAND_LINE))
    if spec.argument in overrides:
        named = Override(overrides.pop(spec.argument), COMMAND_LINE)
    chosen = file_overrides.pop(spec.profile, None)
    if spec.profile and spec.profile in overrides:
        chosen = Override(overrides.pop(spec.profile), COMMAND_LINE)
    path = _find(named, folders, builder)
    profiles: tuple[str, ...] = ()
    if path is not None:
        profiles = _read_file(path, builder, chosen)
    else:
        for key in (key for key, known in spec.schema.fields.items() if known.info.is_required()):
            builder.invalid.add(key)
            builder.origins[key] = spec.noun
    for key, setting in file_overrides.items():
        if key not in overrides:
            _override(key, setting, builder, is_text=False)
    for key, text in overrides.items():
        _override(key, Override(text, COMMAND_LINE), builder, is_text=True)
    builder.values["name"] = _name_of(path, folders) if path is not None else ""
    builder.origins["name"] = FILE_NAME
    config = builder.build()
    assert path is not None, "a missing file is a problem, and problems raise"
    return ResolvedConfig(config, builder.origins, path, profiles)


def list_files(folders: Sequence[Path]) -> dict[str, Path]:
    """Return name -> file of all YAML files that can be given by name: ``vit``, or ``reference/vit`` in a subfolder."""
    found: dict[str, Path] = {}
    for folder in folders:
        for path in sorted([*folder.glob("*.yaml"), *folder.glob("[!.]*/*.yaml")]):
            found.setdefault(path.relative_to(folder).with_suffix("").as_posix(), path)
    return dict(sorted(found.items()))


def _name_of(path: Path, folders: Sequence[Path]) -> str:
    """Return the name of a file's configuration without slashes: ``reference-vit`` for ``reference/vit``.

    It is the same if the file was given by its path.
    """
    inside = path.parent.resolve()
    for folder in folders:
        if inside.is_relative_to(folder.resolve()):
            return "-".join([*inside.relative_to(folder.resolve()).parts, path.stem])
    return path.stem


def _override(written: str, setting: Override, builder: ConfigBuilder[S], *, is_text: bool) -> None:
    spec, origin = builder.spec, setting.origin
    key = written.removeprefix(spec.prefix)
    if key == written and spec.prefix:
        builder.refuse(origin, f"{written}: no such key{spec.schema.suggest(key, prefix=spec.prefix)}")
    elif key == "name":
        builder.refuse(origin, f"{written}: a {spec.noun} is named by its file; copy the file under another name")
    else:
        builder.set(key, setting.value, origin, is_text=is_text)


def _read_overrides(arguments: Sequence[str], builder: ConfigBuilder[S]) -> dict[str, str]:
    """Return key -> text of the arguments; a bare ``vit`` is short for ``recipe=vit``, unless it is a key without its value."""
    spec = builder.spec
    overrides: dict[str, str] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        is_word = bool(key) and not key.startswith("-")
        if is_word and not equals and key not in (*spec.schema.fields, spec.profile) and spec.argument not in overrides:
            overrides[spec.argument] = argument
        elif not equals or not is_word:
            name, _, override = spec.examples
            builder.refuse(COMMAND_LINE, f"{argument!r} is not key=value (like {spec.argument}={name} or {override})")
        elif key in overrides:
            both = f"{spec.show(key, overrides[key])} and {spec.show(key, text)}"
            builder.refuse(COMMAND_LINE, f"{key} is given twice, {both}; keep one")
        else:
            overrides[key] = text
    return overrides


def _find(named: Override, folders: Sequence[Path], builder: ConfigBuilder[S]) -> Path | None:
    """Return the file, or record a problem and return None."""
    argument, noun = builder.spec.argument, builder.spec.noun
    name, origin = named.value, named.origin
    known = list_files(folders)
    listed = f"{noun}s: {', '.join(known) or 'none found'}; or {argument}=FILE.yaml"
    if name is None:
        builder.refuse(origin, f"{argument}=NAME is missing; {listed}")
        return None
    if not isinstance(name, str):
        builder.refuse(origin, f"{argument}={shorten(name)}: must be a {noun}'s name or file; {listed}")
        return None
    if name in known:
        return known[name]
    is_path = name.endswith((".yaml", ".yml")) or "/" in name
    if is_path and (path := Path(name).expanduser()).is_file():
        return path
    close = get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    problem = f"there is no such file{hint}; {listed}" if is_path else f"no such {noun}{hint} ({listed})"
    builder.refuse(origin, f"{argument}={name}: {problem}")
    return None


def _read_file(path: Path, builder: ConfigBuilder[S], chosen: Override | None) -> tuple[str, ...]:
    """Set the values of a file, then those of the chosen profile; return the names of all its profiles."""
    spec = builder.spec
    try:
        document = read_document(path, noun=spec.noun, example=spec.examples[1])
    except OSError as error:
        raise spec.error([(str(path), f"cannot be read: {error.strerror}")]) from error
    for line, text in document.problems:
        builder.refuse(f"{path}:{line}" if line else str(path), text)
    profiles = _find_profiles(document, path, builder) if spec.profile else {}
    for key, value in document.values.items():
        if not (spec.profile and key.partition(".")[0] == PROFILES):
            _set_from_file(path, key, value, f"{path}:{document.lines[key]}", builder)
    if chosen is not None and chosen.value not in profiles:
        _refuse_profile(chosen, profiles, builder)
    for name, keys in profiles.items():
        is_chosen = chosen is not None and name == chosen.value
        target = builder if is_chosen else ConfigBuilder(spec)  # the others are checked too
        for key, written in keys.items():
            origin = f"{path}:{document.lines[written]}, profile {name}"
            _set_from_file(path, key, document.values[written], origin, target)
        if not is_chosen:
            builder.problems += target.problems
    return tuple(profiles)


def _find_profiles(document: Document, path: Path, builder: ConfigBuilder[S]) -> dict[str, dict[str, str]]:
    """Return profile -> key -> the key as the document has it."""
    profiles: dict[str, dict[str, str]] = {}
    for written, line in document.lines.items():
        section, _, rest = written.partition(".")
        name, _, key = rest.partition(".")
        if section != PROFILES:
            continue
        if name:
            profiles.setdefault(name, {})
        if key and written in document.values:
            profiles[name][key] = written
        elif document.values.get(written) is not None:
            example = "profiles: {8gpu: {train: {batch_size: 960}}}"
            builder.refuse(f"{path}:{line}", f"{written}: must be a mapping, like '{example}'")
    return profiles


def _set_from_file(path: Path, key: str, value: Any, origin: str, builder: ConfigBuilder[S]) -> None:
    if key == "name":
        builder.refuse(origin, f"name: a {builder.spec.noun} is named by its file ({path.stem}); take the line out")
    else:
        builder.set(key, value, origin)


def _refuse_profile(chosen: Override, profiles: Mapping[str, Any], builder: ConfigBuilder[S]) -> None:
    spec = builder.spec
    close = get_close_matches(str(chosen.value), profiles, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    listed = f"profiles: {', '.join(profiles)}" if profiles else "it has no profiles"
    builder.refuse(chosen.origin, f"{spec.profile}={shorten(chosen.value)}: the {spec.noun} has no such profile{hint} ({listed})")


class RecipeError(ConfigError):
    """Error of an invalid recipe."""

    noun = "recipe"


@dataclass(frozen=True)
class ResolvedRecipe(ResolvedConfig[Recipe]):
    """A recipe with the origin of each value."""

    @property
    def recipe(self) -> Recipe:
        return self.config


RECIPES = ConfigSpec(
    schema=RECIPE,
    rules=RULES,
    error=RecipeError,
    argument="recipe",
    examples=("vit", "model: {name: vit}", "optim.lr=1e-4"),
    profile="profile",
)


def load_recipe(
    arguments: Sequence[str], *, folders: Sequence[Path] | None = None, settings: Mapping[str, Override] | None = None
) -> ResolvedRecipe:
    """Load the recipe of a command line, with the arguments of ``load_config``; by default from ``recipe_folders()``.

    Raises:
        RecipeError: the recipe is invalid; the text lists all problems with their origins.
    """
    resolved = load_config(RECIPES, arguments, recipe_folders() if folders is None else folders, settings=settings)
    return ResolvedRecipe(resolved.config, resolved.origins, resolved.path, resolved.profiles)


def list_recipes(folders: Sequence[Path] | None = None) -> dict[str, Path]:
    """Return recipe name -> file of all recipes that can be given as ``recipe=NAME``."""
    return list_files(recipe_folders() if folders is None else folders)


def recipe_folders() -> tuple[Path, Path]:
    """Return the folders of recipes: ``./recipes``, then that of the shipped recipes."""
    return Path("recipes"), shipped_dir("recipes")
