"""From ``recipe=vit optim.lr=1e-4`` to one checked recipe that knows where each of its values came from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from galaxydist.errors import EveryRankError
from galaxydist.recipe.checks import CHECKS
from galaxydist.recipe.document import read_document
from galaxydist.recipe.fields import recipe_fields, section_keys, suggest
from galaxydist.recipe.paths import shipped_dir
from galaxydist.recipe.scalars import from_plain, parse_text
from galaxydist.recipe.schema import Recipe

SCHEMA_DEFAULT = "schema default"
COMMAND_LINE = "command line"
FILE_NAME = "file name"


class RecipeError(EveryRankError):
    """A recipe that cannot be used; the text has all problems and where each came from.

    Attributes:
        problems: (origin, text) of each.
    """

    def __init__(self, problems: Sequence[tuple[str, str]]) -> None:
        self.problems = tuple(problems)
        count = f"{len(problems)} problems" if len(problems) > 1 else "a problem"
        super().__init__("\n".join([f"{count} in the recipe:", *(f"  {origin}: {text}" for origin, text in problems)]))


@dataclass(frozen=True)
class Setting:
    """A plain value that neither the recipe's file nor the command line gives.

    Attributes:
        value: text, number, bool, None or a list of those.
        origin: where it stands, such as ``slurm/sweeps/galaxy10.yaml:7``.
    """

    value: Any
    origin: str


@dataclass(frozen=True)
class ResolvedRecipe:
    """A recipe and where it came from.

    Attributes:
        recipe: the values.
        origins: dotted key -> ``schema default``, ``recipes/vit.yaml:7``, ``command line`` or ``file name``.
        path: the recipe's file.
    """

    recipe: Recipe
    origins: Mapping[str, str]
    path: Path


@dataclass
class Draft:
    """A recipe that is being put together: values that passed, where they came from, and all that is wrong."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    invalid: set[str] = field(default_factory=set)
    problems: list[tuple[str, str]] = field(default_factory=list)

    def put(self, key: str, value: Any, origin: str, *, is_text: bool = False) -> None:
        """Sets one key, or notes what is wrong. ``is_text``: the value is text, to be read by the field's type."""
        known = recipe_fields().get(key)
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
            self.problems.append((origin, f"{key}={_shown(value)}: {error}"))

    def _refuse_key(self, key: str, value: Any, origin: str) -> None:
        if key in section_keys():
            if value is not None:  # "optim:" with nothing but comments under it is a section without differences
                self.problems.append((origin, f"{key} is a section; set its keys: {', '.join(section_keys()[key])}"))
        else:
            self.problems.append((origin, f"{key}: no such key{suggest(key)}"))

    def finish(self) -> Recipe:
        """The recipe, after the checks between fields. Raises RecipeError with everything that is wrong."""
        for key, known in recipe_fields().items():
            if key in self.origins:
                continue
            if known.required:
                self.invalid.add(key)
                self.problems.append(("recipe", f"{key} is missing: {known.description}"))
            else:
                self.values[key] = known.default
                self.origins[key] = SCHEMA_DEFAULT
        for check in CHECKS:
            if self.invalid.isdisjoint(check.keys):
                self._run_check(check.keys, check.problem(*(self.values[key] for key in check.keys)))
        if self.problems:
            raise RecipeError(self.problems)
        return build(self.values)

    def _run_check(self, keys: Sequence[str], problem: str | None) -> None:
        if problem is None:
            return
        given = [key for key in keys if self.origins[key] != SCHEMA_DEFAULT] or list(keys)
        origins = dict.fromkeys(self.origins[key] for key in given)
        self.problems.append(
            (" and ".join(origins), f"{', '.join(f'{key}={_shown(self.values[key])}' for key in given)}: {problem}")
        )


def build(values: Mapping[str, Any]) -> Recipe:
    """The recipe of checked values by dotted key."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return Recipe.model_validate(nested)


def load_recipe(
    arguments: Sequence[str], *, folders: Sequence[Path] | None = None, settings: Mapping[str, Setting] | None = None
) -> ResolvedRecipe:
    """The recipe of a command line.

    Args:
        arguments: ``recipe=NAME`` or ``recipe=FILE.yaml``, then ``key=value`` for any key of the schema, in any order.
        settings: values by dotted key that stand between the recipe's file and the command line; ``recipe`` may be one.
        folders: where names are looked up, first one first; default ``./recipes``, then the recipes that ship with the package.

    Raises:
        RecipeError: with all problems at once, and where each came from.
    """
    folders = (Path("recipes"), shipped_dir("recipes")) if folders is None else folders
    draft = Draft()
    overrides, settings = _read_overrides(arguments, draft), dict(settings or {})
    named = settings.pop("recipe", Setting(None, COMMAND_LINE))
    if "recipe" in overrides:
        named = Setting(overrides.pop("recipe"), COMMAND_LINE)
    path = _find(named, folders, draft)
    if path is not None:
        _read_file(path, draft)
    else:
        draft.invalid.add("model.name")
        draft.origins["model.name"] = "recipe"
    given = {key: setting for key, setting in settings.items() if key not in overrides}
    given |= {key: Setting(text, COMMAND_LINE) for key, text in overrides.items()}
    for key, setting in given.items():
        if key == "name":
            draft.problems.append((setting.origin, "name: a recipe is named by its file; copy the file under another name"))
        else:
            draft.put(key, setting.value, setting.origin, is_text=key in overrides)
    draft.values["name"] = path.stem if path is not None else ""
    draft.origins["name"] = FILE_NAME
    recipe = draft.finish()
    assert path is not None, "a missing recipe is a problem, and problems raise"
    return ResolvedRecipe(recipe, draft.origins, path)


def list_recipes(folders: Sequence[Path] | None = None) -> dict[str, Path]:
    """Recipe name -> file, of every recipe that ``recipe=NAME`` would find."""
    folders = (Path("recipes"), shipped_dir("recipes")) if folders is None else folders
    found: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.glob("*.yaml")):
            found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def _read_overrides(arguments: Sequence[str], draft: Draft) -> dict[str, str]:
    overrides: dict[str, str] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or not key or key.startswith("-"):
            draft.problems.append((COMMAND_LINE, f"{argument!r} is not key=value (like recipe=vit or optim.lr=1e-4)"))
        elif key in overrides:
            draft.problems.append((COMMAND_LINE, f"{key} is given twice, {_shown(overrides[key])} and {_shown(text)}; keep one"))
        else:
            overrides[key] = text
    return overrides


def _find(named: Setting, folders: Sequence[Path], draft: Draft) -> Path | None:
    """The recipe's file, or None with a problem noted."""
    known, name, origin = list_recipes(folders), named.value, named.origin
    listed = f"recipes: {', '.join(known) or 'none found'}; or recipe=FILE.yaml"
    if name is None:
        draft.problems.append((origin, f"recipe=NAME is missing; {listed}"))
        return None
    if not isinstance(name, str):
        draft.problems.append((origin, f"recipe={_shown(name)}: must be a recipe's name or file; {listed}"))
        return None
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = Path(name).expanduser()
        if path.is_file():
            return path
        draft.problems.append((origin, f"recipe={name}: there is no such file; {listed}"))
        return None
    if name not in known:
        close = get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        draft.problems.append((origin, f"recipe={name}: no such recipe{hint} ({listed})"))
        return None
    return known[name]


def _read_file(path: Path, draft: Draft) -> None:
    try:
        document = read_document(path)
    except OSError as error:
        raise RecipeError([(str(path), f"cannot be read: {error.strerror}")]) from error
    for line, text in document.problems:
        draft.problems.append((f"{path}:{line}" if line else str(path), text))
    for key, value in document.values.items():
        origin = f"{path}:{document.lines[key]}"
        if key == "name":
            draft.problems.append((origin, f"name: a recipe is named by its file ({path.stem}); take the line out"))
        else:
            draft.put(key, value, origin)


def _shown(value: Any) -> str:
    """A value as one would type it, shortened."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(_shown(member) for member in value)}]"
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
