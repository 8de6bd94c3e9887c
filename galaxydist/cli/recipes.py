"""``galaxydist recipes``: which recipes there are, and every value of one with where it came from."""

import argparse

from galaxydist.cli.options import Commands


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "recipes",
        help="list the recipes, or show one resolved",
        description="List the recipes, or show one resolved.",
        allow_abbrev=False,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="a recipe's name or file; without it, list them")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="shown as the run would see them")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """List the recipes, or show one."""
    if arguments.name is None:
        _list()
    else:
        _show(arguments.name.removeprefix("recipe="), arguments.overrides)


def _list() -> None:
    from galaxydist.recipe.load import list_recipes

    recipes = list_recipes()
    width = max((len(name) for name in recipes), default=0)
    for name, path in recipes.items():
        print(f"{name:{width}}  {_first_comment(path.read_text(encoding='utf-8', errors='replace'))}".rstrip())


def _first_comment(text: str) -> str:
    first = text.splitlines()[0] if text else ""
    return first.lstrip("# ").strip() if first.startswith("#") else ""


def _show(name: str, overrides: list[str]) -> None:
    from galaxydist.recipe.draft import SCHEMA_DEFAULT
    from galaxydist.recipe.fields import recipe_fields
    from galaxydist.recipe.identity import flatten, run_name
    from galaxydist.recipe.load import load_recipe
    from galaxydist.recipe.scalars import to_text

    resolved = load_recipe([f"recipe={name}", *overrides])
    values = {key: to_text(value) for key, value in flatten(resolved.recipe).items()}
    key_width = max(map(len, values))
    value_width = min(max(map(len, values.values())), 32)
    print(f"# {resolved.path}; run folder {run_name(resolved.recipe)}; [run]: may change between restarts without another folder")
    for key, text in values.items():
        field = recipe_fields()[key]
        origin = resolved.origins[key]
        mark = " " if origin == SCHEMA_DEFAULT else "*"
        kind = " [run]" if field.kind == "run" else ""
        about = f": {field.description}" if field.description else ""
        print(f"{mark} {key:{key_width}} = {text:{value_width}}  # {origin}{kind}{about}")
