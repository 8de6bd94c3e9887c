"""Reference page of the recipes in Markdown: every key with its type, range, default and description, and the shipped recipes."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from galaxydist.paths import shipped_dir
from galaxydist.recipe.fields import RECIPE, SchemaField
from galaxydist.recipe.resolve import list_recipes, load_recipe
from galaxydist.recipe.scalars import describe_type, to_text
from galaxydist.recipe.schema import Recipe

HEAD = """# Recipe keys

A recipe is a small YAML file with the keys that differ from their defaults. Any key can be changed on the command line:

    galaxydist train recipe=vit optim.lr=1e-4 train.epochs=50

`galaxydist recipes` lists the recipes, `galaxydist recipes vit` shows all values of one and where each comes from.

The `profiles` of a recipe are named groups of such keys, for one or eight GPUs, of which none or one is chosen:

    galaxydist train recipe=vit profile=8gpu

Defaults give way to the recipe, the recipe to its profile, and that to the command line.

**result** keys change the numbers of a run: another value gives another run folder. **run** keys change only the execution
(threads, tracker, cache); they may be changed when a run is continued.

This page is written by `galaxydist recipes --markdown`.
"""
_LIMITS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


def render_reference() -> str:
    """Return the page."""
    sections = {"": tuple(key for key in RECIPE.fields if "." not in key), **RECIPE.sections}
    parts = [HEAD]
    for name, keys in sections.items():
        rows = [_key_row(RECIPE.fields[key]) for key in keys if key in RECIPE.fields]
        title = f"`{name}`" if name else "General"
        table = _table(("key", "type and range", "default", "kind", "description"), rows)
        parts.append(f"## {title}\n\n{_section_summary(name)}{table}")
    columns = ("recipe", "model", "data set", "pixels", "epochs", "batch size", "description")
    parts.append(f"## Shipped recipes\n\n{_table(columns, _recipe_rows())}")
    return "\n".join(parts)


def _section_summary(name: str) -> str:
    section: Any = Recipe
    for part in name.split(".") if name else ():
        section = section.model_fields[part].annotation
    return f"{(section.__doc__ or '').splitlines()[0]}\n\n" if name else ""


def _key_row(field: SchemaField) -> tuple[str, ...]:
    default = "required" if field.info.is_required() else f"`{to_text(field.default)}`"
    ranges = ", ".join(_ranges([*field.info.metadata, *_nested_constraints(field.annotation)]))
    described = describe_type(field.annotation)
    return f"`{field.key}`", f"{described}, {ranges}" if ranges else described, default, field.kind, field.description


def _nested_constraints(annotation: Any) -> Iterator[Any]:
    """Yield the constraints of the members of a union."""
    for member in get_args(annotation):
        if get_origin(member) is Annotated:
            for constraint in member.__metadata__:
                yield from getattr(constraint, "metadata", (constraint,))


def _ranges(constraints: Iterable[Any]) -> Iterator[str]:
    for constraint in constraints:
        for name, words in _LIMITS.items():
            if hasattr(constraint, name):
                limit = getattr(constraint, name)
                yield f"{words} {limit:,g}" if limit < 2**32 else f"{words} 2^{limit.bit_length() - 1}"


def _recipe_rows() -> Iterator[tuple[str, ...]]:
    folders = (shipped_dir("recipes"),)
    for name, path in list_recipes(folders).items():
        recipe = load_recipe([f"recipe={name}"], folders=folders).recipe
        numbers = (recipe.data.image_size, recipe.train.epochs, recipe.train.batch_size)
        yield f"`{name}`", recipe.model.name, recipe.data.dataset, *map(str, numbers), first_sentence(path)


def _table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def first_sentence(path: Path) -> str:
    """Return the first sentence of the comment at the top of a YAML file, or an empty text."""
    text = path.read_text(encoding="utf-8", errors="replace")
    comment = re.match(r"(?:[ \t]*#[^\n]*(?:\n|$))*", text)
    words = re.sub(r"\s+", " ", re.sub(r"(?m)^[ \t]*#", "", comment.group() if comment else "")).strip()
    return re.split(r"(?<=\.) (?=[^a-z0-9])", words, maxsplit=1)[0]
