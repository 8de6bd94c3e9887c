"""``galaxydist recipes``: which recipes there are, and every value of one with where it came from."""

import argparse
import re
import shutil
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from galaxydist.cli.options import Commands, add_data_dir, chosen_root, local_path
from galaxydist.errors import UserError

# ``galaxydist weights``: published weights into the cache, for machines without a network; a run's own weights into a file.


def add_weights(commands: Commands) -> None:
    """Add the commands."""
    parser = commands.add_parser(
        "weights", help="published weights, and a run's own", description="Weights in files.", allow_abbrev=False
    )
    inner = parser.add_subparsers(metavar="COMMAND")
    fetch = inner.add_parser(
        "fetch",
        help="download the published weights that a recipe starts from",
        description="Download the published weights that a recipe starts from into the data root.",
        allow_abbrev=False,
    )
    fetch.add_argument("recipe", nargs="+", metavar="recipe=NAME [key=value]", help="the recipe")
    add_data_dir(fetch)
    fetch.set_defaults(run=run_fetch)
    save = inner.add_parser(
        "save",
        help="a run's weights as one file",
        description="Write the weights that a run is judged by as a safetensors file, for model.weights=FILE of another run.",
        allow_abbrev=False,
    )
    save.add_argument("run_dir", type=local_path, metavar="RUN", help="a run folder")
    save.add_argument("target", type=local_path, metavar="FILE", help="the .safetensors file to write")
    save.set_defaults(run=run_save)


def run_fetch(arguments: argparse.Namespace) -> None:
    """Download the weights, unless they are there."""
    from galaxydist.recipe.resolve import load_recipe

    recipe = load_recipe(arguments.recipe).recipe
    if arguments.data_dir is None:
        arguments.data_dir = recipe.data.dir

    from galaxydist.models.weights import fetch_weights
    from galaxydist.paths import weights_dir

    print(f"weights of {recipe.model.name}: {fetch_weights(recipe.model, weights_dir(chosen_root(arguments)))}")


def run_save(arguments: argparse.Namespace) -> None:
    """Write the run's weights."""
    from galaxydist.evaluation.evaluator import save_weights

    step = save_weights(arguments.run_dir, arguments.target)
    print(f"weights of {arguments.run_dir} at step {step}: {arguments.target}")


# How named YAML files, and one of them resolved, are listed on a terminal.

MAX_WIDTH = 100  # columns, on a wider terminal too
MAX_VALUE_WIDTH = 20  # of a value, before the columns after it move


def print_files(files: Mapping[str, Path]) -> None:
    """Print each name with the first sentence of the comment that its file begins with."""
    from galaxydist.recipe.reference_page import first_sentence

    width = max((len(name) for name in files), default=0)
    for name, path in files.items():
        _print_wrapped(f"{name:{width}}  ", first_sentence(path))


def print_resolved(values: Mapping[str, Any], origins: Mapping[str, str], notes: Mapping[str, str]) -> None:
    """Print every key with its value, its origin where that is not the schema's default (marked by a star), and its description.

    Args:
        values: plain values by dotted key.
        origins: dotted key -> where the value came from.
        notes: dotted key -> the description.
    """
    from galaxydist.recipe.resolve import SCHEMA_DEFAULT
    from galaxydist.recipe.scalars import to_text

    texts = {key: to_text(value) for key, value in values.items()}
    key_width = max(map(len, texts))
    value_width = min(max(map(len, texts.values())), MAX_VALUE_WIDTH)
    for key, text in texts.items():
        is_default = origins[key] == SCHEMA_DEFAULT
        note = notes[key] if is_default else f"({origins[key]}) {notes[key]}"
        _print_wrapped(f"{' ' if is_default else '*'} {key:{key_width}} = {text:{value_width}}  # ", note)


def _print_wrapped(head: str, text: str) -> None:
    """Print the text after its head, on as many lines as it needs, all of them indented like the first."""
    width = min(shutil.get_terminal_size((MAX_WIDTH, 24)).columns, MAX_WIDTH)
    hanging = re.sub(r"[^#\s]", " ", head) if head.endswith("# ") else " " * len(head)
    room = max(width - len(head), 24)
    lines = textwrap.wrap(text, room, break_on_hyphens=False, break_long_words=False) or [""]
    print(f"{head}{lines[0]}".rstrip())
    for line in lines[1:]:
        print(f"{hanging}{line}")


def add_recipes(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "recipes",
        help="list the recipes, or show all values of one",
        description="List the recipes, or show all values of one with their origins.",
        allow_abbrev=False,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="name or file of a recipe (default: list all recipes)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that override the recipe")
    parser.add_argument("--markdown", action="store_true", help="print a reference page of all keys and shipped recipes")
    parser.set_defaults(run=run_recipes)


def run_recipes(arguments: argparse.Namespace) -> None:
    """List the recipes, or show one."""
    if arguments.markdown:
        from galaxydist.recipe.reference_page import render_reference

        if arguments.name is not None:
            raise UserError(f"--markdown describes all recipes; leave {arguments.name} out")
        print(render_reference(), end="")
    elif arguments.name is None:
        from galaxydist.recipe.resolve import list_recipes

        print_files(list_recipes())
    else:
        _show(arguments.name.removeprefix("recipe="), arguments.overrides)


def _show(name: str, overrides: list[str]) -> None:
    from galaxydist.recipe.fields import RECIPE
    from galaxydist.recipe.identity import flatten, run_name
    from galaxydist.recipe.resolve import load_recipe

    resolved = load_recipe([f"recipe={name}", *overrides])
    print(f"# {resolved.path}; run folder {run_name(resolved.recipe)}")
    print("# *: not the default. [run]: does not change the numbers, and may change when the run is continued.")
    notes = {key: f"{'[run] ' if field.kind == 'run' else ''}{field.description}" for key, field in RECIPE.fields.items()}
    print_resolved(flatten(resolved.recipe), resolved.origins, notes)
