"""A recipe as plain JSON, and the run name from the hash of its result fields."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from galaxydist.recipe.fields import RECIPE
from galaxydist.recipe.resolve import RECIPES, ConfigBuilder
from galaxydist.recipe.schema import Recipe


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as nested plain JSON values; ``from_dict`` is the inverse."""
    plain: dict[str, Any] = recipe.model_dump(mode="json")
    return plain


def from_dict(plain: Mapping[str, Any], *, source: str = "stored recipe") -> Recipe:
    """Build a recipe from the plain values of ``to_dict``, with all checks.

    Args:
        source: origin of the values, for error messages.

    Raises:
        RecipeError: the values are invalid; the text lists all problems.
    """
    builder = ConfigBuilder(RECIPES)
    for key, value in RECIPE.flat(plain):
        builder.set(key, value, source)
    return builder.build()


def flatten(recipe: Recipe) -> dict[str, Any]:
    """Return dotted key -> plain JSON value of all fields, in the schema's order."""
    return RECIPE.flatten(recipe)


def result_fields(recipe: Recipe) -> dict[str, Any]:
    """Return dotted key -> plain JSON value of the fields that change a run's numbers."""
    return {key: value for key, value in flatten(recipe).items() if RECIPE.fields[key].kind == "result"}


def later_defaults() -> dict[str, Any]:
    """Return dotted key -> default of the result fields that recipes of older run folders may lack."""
    return {key: field.default for key, field in RECIPE.fields.items() if field.is_later}


def result_hash(recipe: Recipe) -> str:
    """Return the first 8 hex digits of the SHA-256 of the result fields as canonical JSON.

    Fields that were added later are included only if they differ from their default.
    """
    later = later_defaults()
    fields = {key: value for key, value in result_fields(recipe).items() if key not in later or value != later[key]}
    canonical = json.dumps(_canonical(fields), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]


def run_name(recipe: Recipe) -> str:
    """Return the name of a run's folder: ``<recipe>-<8 hex of the result fields>``."""
    return f"{recipe.name}-{result_hash(recipe)}"


def run_path(recipe: Recipe) -> Path:
    """Return a run's folder: ``run.dir`` if set, else ``run_name`` in ``run.root``."""
    return recipe.run.dir or recipe.run.root / run_name(recipe)


def _canonical(value: Any) -> Any:
    """Replace -0.0 by 0.0; the schema already distinguishes ints from floats."""
    if isinstance(value, dict):
        return {key: _canonical(member) for key, member in value.items()}
    if isinstance(value, list):
        return [_canonical(member) for member in value]
    return value + 0.0 if isinstance(value, float) else value
