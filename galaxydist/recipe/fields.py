"""A schema as flat dotted keys: types, defaults, kinds, validation, and suggestions for wrong keys."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Annotated, Any, Generic, Literal, TypeGuard, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from galaxydist.recipe.scalars import describe_type
from galaxydist.recipe.schema import Recipe, Section

S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class SchemaField:
    """One key of a schema.

    Attributes:
        key: the dotted key.
        kind: ``result`` (the field changes the numbers of a run) or ``run``.
    """

    key: str
    info: FieldInfo

    @property
    def annotation(self) -> Any:
        return self.info.annotation

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

    @property
    def is_later(self) -> bool:
        """True for a field that is left out of a run's hash at its default (see ``later_field``)."""
        extra = self.info.json_schema_extra
        return isinstance(extra, dict) and extra.get("later") is True

    @property
    def is_secret(self) -> bool:
        """True for a field whose value no message shows."""
        extra = self.info.json_schema_extra
        return isinstance(extra, dict) and extra.get("secret") is True

    def check(self, value: Any) -> Any:
        """Validate a value and return it in the field's type (1 for a float field becomes 1.0).

        Raises:
            ValueError: a wrong type or out of range; the text states what is allowed.
        """
        try:
            return self._adapter.validate_python(value)
        except ValidationError as error:
            raise ValueError(_in_words(error, self.annotation)) from None

    @cached_property
    def _adapter(self) -> TypeAdapter[Any]:
        annotation: Any = Annotated[(self.annotation, *self.info.metadata)] if self.info.metadata else self.annotation
        return TypeAdapter(annotation, config=ConfigDict(strict=True, allow_inf_nan=False))


@dataclass(frozen=True)
class Schema(Generic[S]):
    """A section and all its fields, by dotted keys.

    Attributes:
        root: the outermost section. Its field ``name``, if any, is the file's name and cannot be set.
    """

    root: type[S]

    @cached_property
    def fields(self) -> dict[str, SchemaField]:
        """All fields by their dotted keys, in the schema's order."""
        return dict(_walk(self.root, ""))

    @cached_property
    def sections(self) -> dict[str, tuple[str, ...]]:
        """The dotted name of each section -> the dotted keys of its fields and subsections."""
        return dict(_walk_sections(self.root, ""))

    def suggest(self, key: str, *, prefix: str = "") -> str:
        """Return ``; did you mean ...?`` for an unknown key, or an empty text if no key is similar.

        Args:
            prefix: prefix of the suggested keys.
        """
        keys = [known for known in self.fields if known != "name"]  # cannot be set
        last = key.rsplit(".", 1)[-1]
        same_name = [candidate for candidate in keys if candidate.rsplit(".", 1)[-1] == last]
        close = get_close_matches(key, keys, n=1, cutoff=0.75)
        if not close and not same_name:
            by_name = {candidate.rsplit(".", 1)[-1]: candidate for candidate in keys}
            close = [by_name[name] for name in get_close_matches(last, list(by_name), n=1, cutoff=0.75)]
        found = same_name or close
        return f"; did you mean {' or '.join(prefix + name for name in found)}?" if found else ""

    def flatten(self, config: S) -> dict[str, Any]:
        """Return dotted key -> plain JSON value of all fields, in the schema's order."""
        values = dict(self.flat(config.model_dump(mode="json")))
        return {key: values[key] for key in self.fields}

    def flat(self, nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        """Yield dotted keys and values of nested plain values, which may have keys that are not in the schema."""
        for name, value in nested.items():
            key = f"{prefix}{name}"
            if isinstance(value, Mapping) and (key in self.sections or key not in self.fields):
                yield from self.flat(value, f"{key}.")
            else:
                yield key, value


RECIPE = Schema(Recipe)


def _walk(section: type[Section], prefix: str) -> Iterator[tuple[str, SchemaField]]:
    for name, info in section.model_fields.items():
        if _is_section(info.annotation):
            yield from _walk(info.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, SchemaField(prefix + name, info)


def _walk_sections(section: type[Section], prefix: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    for name, info in section.model_fields.items():
        if _is_section(info.annotation):
            yield prefix + name, tuple(f"{prefix}{name}.{key}" for key in info.annotation.model_fields)
            yield from _walk_sections(info.annotation, f"{prefix}{name}.")


def _is_section(annotation: Any) -> TypeGuard[type[Section]]:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _in_words(error: ValidationError, annotation: Any) -> str:
    """Return pydantic's first error as a plain phrase."""
    (problem, *_) = error.errors(include_url=False)
    context = problem.get("ctx", {})
    if problem["type"] == "value_error":  # raised by one of our validators
        return str(context["error"])
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


@dataclass(frozen=True)
class CrossFieldRule:
    """A rule between fields.

    Attributes:
        keys: the dotted keys of the fields; an error names the origin of each.
        problem: takes their values in this order and returns the problem with its remedy, or None.
    """

    keys: tuple[str, ...]
    problem: Callable[..., str | None]
