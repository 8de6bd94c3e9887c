"""From ``recipe=vit optim.lr=1e-4`` to one checked recipe that knows where each of its values came from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from galaxydist.paths import shipped_dir
from galaxydist.recipe.draft import ConfigError, ConfigKind
from galaxydist.recipe.fields import RECIPE
from galaxydist.recipe.named import Setting, list_files, load_config
from galaxydist.recipe.rules import CHECKS
from galaxydist.recipe.schema import Recipe

__all__ = ["RECIPES", "RecipeError", "ResolvedRecipe", "Setting", "list_recipes", "load_recipe"]


class RecipeError(ConfigError):
    """A recipe that cannot be used."""

    noun = "recipe"


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


RECIPES = ConfigKind(
    schema=RECIPE,
    checks=CHECKS,
    error=RecipeError,
    argument="recipe",
    examples=("vit", "model: {name: vit}", "optim.lr=1e-4"),
)


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
    resolved = load_config(RECIPES, arguments, _folders() if folders is None else folders, settings=settings)
    return ResolvedRecipe(resolved.config, resolved.origins, resolved.path)


def list_recipes(folders: Sequence[Path] | None = None) -> dict[str, Path]:
    """Recipe name -> file, of every recipe that ``recipe=NAME`` would find."""
    return list_files(_folders() if folders is None else folders)


def _folders() -> tuple[Path, Path]:
    return Path("recipes"), shipped_dir("recipes")
