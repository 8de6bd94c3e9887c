"""The schema as a flat list of dotted keys: types, defaults, kinds, and one value's check."""

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from galaxydist.recipe.scalars import describe_type
from galaxydist.recipe.schema import Recipe, Section


@dataclass(frozen=True)
class RecipeField:
    """One key of the recipe.

    Attributes:
        key: dotted.
        kind: ``result`` (it changes the numbers of a run) or ``run``.
    """

    key: str
    info: FieldInfo

    @property
    def annotation(self) -> Any:
        return self.info.annotation

    @property
    def required(self) -> bool:
        return self.info.is_required()

    @property
    def default(self) -> Any:
        return self.info.default

    @property
    def description(self) -> str:
        return self.info.description or ""

    @property
    def kind(self) -> Literal["result", "run"]:
        extra = self.info.json_schema_extra
        return "run" if isinstance(extra, dict) and extra.get("kind") == "run" else "result"

    def check(self, value: Any) -> Any:
        """The value as the schema keeps it (1 for a number with decimals becomes 1.0).

        Raises:
            ValueError: a wrong type or out of range; says what it has to be.
        """
        try:
            return _adapter(self.key).validate_python(value)
        except ValidationError as error:
            raise ValueError(_in_words(error, self.annotation)) from None


@cache
def recipe_fields() -> dict[str, RecipeField]:
    """Every field of the recipe by its dotted key, in the schema's order."""
    return dict(_walk(Recipe, ""))


@cache
def section_keys() -> dict[str, tuple[str, ...]]:
    """Dotted name of every section -> the dotted keys of its fields and subsections."""
    sections: dict[str, tuple[str, ...]] = {}

    def visit(section: type[Section], prefix: str) -> None:
        for name, info in section.model_fields.items():
            if _is_section(info.annotation):
                inner: type[Section] = info.annotation  # type: ignore[assignment]
                sections[prefix + name] = tuple(f"{prefix}{name}.{key}" for key in inner.model_fields)
                visit(inner, f"{prefix}{name}.")

    visit(Recipe, "")
    return sections


def suggest(key: str) -> str:
    """``; did you mean ...?`` for a key that is none, or nothing where no key is like it."""
    keys = [known for known in recipe_fields() if known != "name"]  # which nobody sets
    last = key.rsplit(".", 1)[-1]
    same_name = [candidate for candidate in keys if candidate.rsplit(".", 1)[-1] == last]
    close = get_close_matches(key, keys, n=1, cutoff=0.75)
    if not close and not same_name:
        by_name = {candidate.rsplit(".", 1)[-1]: candidate for candidate in keys}
        close = [by_name[name] for name in get_close_matches(last, list(by_name), n=1, cutoff=0.75)]
    found = same_name or close
    return f"; did you mean {' or '.join(found)}?" if found else ""


def _walk(section: type[Section], prefix: str) -> Iterator[tuple[str, RecipeField]]:
    for name, info in section.model_fields.items():
        if _is_section(info.annotation):
            yield from _walk(info.annotation, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            yield prefix + name, RecipeField(prefix + name, info)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


@cache
def _adapter(key: str) -> TypeAdapter[Any]:
    info = recipe_fields()[key].info
    annotation: Any = Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation
    return TypeAdapter(annotation, config=ConfigDict(strict=True, allow_inf_nan=False))


def _in_words(error: ValidationError, annotation: Any) -> str:
    """Pydantic's first complaint in our words."""
    (problem, *_) = error.errors(include_url=False)
    context = problem.get("ctx", {})
    words = {
        "greater_than_equal": "must be at least {ge:g}",
        "greater_than": "must be more than {gt:g}",
        "less_than_equal": "must be at most {le:g}",
        "less_than": "must be less than {lt:g}",
        "finite_number": "must be finite",
        "string_too_short": "must not be empty",
    }
    template = words.get(problem["type"])
    return template.format(**context) if template else f"must be {describe_type(annotation)}"
