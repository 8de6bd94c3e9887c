"""A recipe as plain JSON, and the short name that its result fields give a run."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from galaxydist.recipe.fields import RECIPE, recipe_fields
from galaxydist.recipe.resolve import RECIPES, ConfigBuilder
from galaxydist.recipe.schema import Recipe


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as nested plain JSON values; ``from_dict`` reads it back."""
    plain: dict[str, Any] = recipe.model_dump(mode="json")
    return plain


def from_dict(plain: Mapping[str, Any], *, source: str = "stored recipe") -> Recipe:
    """A recipe from the plain values of ``to_dict``, checked like any other.

    Args:
        source: where the values were found; errors name it.

    Raises:
        RecipeError: with all problems at once.
    """
    draft = ConfigBuilder(RECIPES)
    for key, value in RECIPE.flat(plain):
        draft.put(key, value, source)
    return draft.finish()


def flatten(recipe: Recipe) -> dict[str, Any]:
    """Dotted key -> plain JSON value, of every field in the schema's order."""
    return RECIPE.flatten(recipe)


def result_fields(recipe: Recipe) -> dict[str, Any]:
    """Dotted key -> plain JSON value, of the fields that change a run's numbers."""
    return {key: value for key, value in flatten(recipe).items() if recipe_fields()[key].kind == "result"}


def later_defaults() -> dict[str, Any]:
    """Dotted key -> default, of the result fields that recipes of older run folders may lack."""
    return {key: field.default for key, field in recipe_fields().items() if field.is_later}


def result_hash(recipe: Recipe) -> str:
    """8 hex digits (SHA-256 of canonical JSON) that are equal exactly where all result fields are.

    Fields that were added later count only where they differ from their default.
    """
    later = later_defaults()
    fields = {key: value for key, value in result_fields(recipe).items() if key not in later or value != later[key]}
    canonical = json.dumps(_canonical(fields), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]


def run_name(recipe: Recipe) -> str:
    """The name of a run's folder: ``<recipe>-<8 hex of the result fields>``."""
    return f"{recipe.name}-{result_hash(recipe)}"


def run_path(recipe: Recipe) -> Path:
    """A run's folder: the one that the recipe names, or the one of ``run_name`` among the others."""
    return recipe.run.dir or recipe.run.root / run_name(recipe)


def _canonical(value: Any) -> Any:
    """-0.0 is 0.0; whole and decimal numbers are already told apart by the schema."""
    if isinstance(value, dict):
        return {key: _canonical(member) for key, member in value.items()}
    if isinstance(value, list):
        return [_canonical(member) for member in value]
    return value + 0.0 if isinstance(value, float) else value
