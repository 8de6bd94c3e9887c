"""``galaxydist recipes``: which recipes there are, and every value of one with where it came from."""

import argparse

from galaxydist.cli.listing import print_files, print_resolved
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
    from galaxydist.recipe.resolve import list_recipes

    print_files(list_recipes())


def _show(name: str, overrides: list[str]) -> None:
    from galaxydist.recipe.fields import recipe_fields
    from galaxydist.recipe.identity import flatten, run_name
    from galaxydist.recipe.resolve import load_recipe
    from galaxydist.recipe.yaml12 import describe_type

    resolved = load_recipe([f"recipe={name}", *overrides])
    print(f"# {resolved.path}; run folder {run_name(resolved.recipe)}")
    print("# *: not the default. [run]: does not change the numbers, and may change when the run is continued.")
    notes = {
        key: f"{'[run] ' if field.kind == 'run' else ''}{field.description or describe_type(field.annotation)}"
        for key, field in recipe_fields().items()
    }
    print_resolved(flatten(resolved.recipe), resolved.origins, notes)
