"""``galaxydist recipes`` and ``galaxydist weights``; tables of named YAML files and of resolved configurations."""

import argparse
import os
import re
import shutil
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from galaxydist.cli.options import (
    Commands,
    add_command,
    add_data_dir,
    add_group,
    add_overrides,
    local_path,
)
from galaxydist.errors import UserError
from galaxydist.paths import data_root, weights_dir

MAX_WIDTH = 100  # columns, also on a wider terminal
MAX_VALUE_WIDTH = 20  # columns of a value before the description moves


FETCH_EPILOG = """examples:
  galaxydist weights fetch recipe=vit
  galaxydist weights fetch timm/convnext_nano.in12k_ft_in1k
  galaxydist weights fetch hf-hub:mwalmsley/zoobot-encoder-convnext_nano
"""


def add_weights(commands: Commands) -> None:
    """Add ``weights fetch`` and ``weights save``."""
    inner = add_group(commands, "weights", "published weights, and the weights of a run")
    fetch = add_command(
        inner,
        "fetch",
        run_fetch,
        "download published weights",
        description="Download the published weights of a recipe or a model into the data root, for machines without a network, "
        "and show their licence.",
        epilog=FETCH_EPILOG,
    )
    fetch.add_argument(
        "recipe", nargs="+", metavar="recipe=NAME [key=value] | MODEL", help="recipe, or timm/NAME.TAG or hf-hub:OWNER/NAME"
    )
    add_data_dir(fetch)
    save = add_command(
        inner,
        "save",
        run_save,
        "write the weights of a run to one file",
        description="Write the weights that a run is evaluated with to a safetensors file, for model.weights=FILE of other runs.",
    )
    save.add_argument("run_dir", type=local_path, metavar="RUN", help="run folder")
    save.add_argument("target", type=local_path, metavar="FILE", help=".safetensors file to write")


def run_fetch(arguments: argparse.Namespace) -> None:
    """Download the weights, unless they exist, and print their licence."""
    from galaxydist.recipe.model_names import parse_model_name
    from galaxydist.recipe.resolve import load_recipe
    from galaxydist.recipe.schema import ModelConfig

    first, *others = arguments.recipe
    data_dir = arguments.data_dir
    if first.startswith(("timm/", "hf-hub:", "local-dir:")):
        try:
            parse_model_name(first)
        except ValueError as error:
            raise UserError(f"{first}: {error}") from None
        if others:
            raise UserError(f"{first} is a model: leave {' '.join(others)} out, or give a recipe with model.name={first}")
        config = ModelConfig(name=first)
    else:
        recipe = load_recipe(arguments.recipe).recipe
        config, data_dir = recipe.model, data_dir or recipe.data.dir

    from galaxydist.models.hub_weights import fetch_weights, read_record

    folder = weights_dir(data_root(data_dir, os.environ))
    path = fetch_weights(config, folder)
    record = read_record(config.model_copy(update={"pretrained": True, "weights": None}), folder)
    print(f"weights of {config.name}: {path}")
    print(f"source: {record.source}; licence: {record.licence or 'not stated'}")


def run_save(arguments: argparse.Namespace) -> None:
    """Write the weights of the run."""
    from galaxydist.evaluation.run_model import save_weights

    target: Path = arguments.target
    if target.suffix != ".safetensors":
        raise UserError(f"{target}: weights are a safetensors file; name it like {target.with_suffix('.safetensors')}")
    step = save_weights(arguments.run_dir, target)
    print(f"weights of {arguments.run_dir} at step {step}: {target}")


def print_files(files: Mapping[str, Path]) -> None:
    """Print each name with the first sentence of the comment at the top of its file."""
    from galaxydist.recipe.reference_page import first_sentence

    width = max((len(name) for name in files), default=0)
    for name, path in files.items():
        _print_wrapped(f"{name:{width}}  ", first_sentence(path))


def print_resolved(values: Mapping[str, Any], origins: Mapping[str, str], notes: Mapping[str, str]) -> None:
    """Print all keys with value and description; a star and the origin mark values that differ from the schema's default.

    Args:
        values: plain values by dotted key.
        origins: origin of each value, by dotted key.
        notes: description by dotted key.
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
    """Print ``head`` and the wrapped text, whose lines are all indented like the first."""
    width = min(shutil.get_terminal_size((MAX_WIDTH, 24)).columns, MAX_WIDTH)
    hanging = re.sub(r"[^#\s]", " ", head) if head.endswith("# ") else " " * len(head)
    wrapper = textwrap.TextWrapper(
        max(width, len(head) + 24),
        initial_indent=head,
        subsequent_indent=hanging,
        break_on_hyphens=False,
        break_long_words=False,
    )
    print(wrapper.fill(text) or head.rstrip())


def add_recipes(commands: Commands) -> None:
    """Add the command."""
    description = "List the recipes, or show all values of one with their origins."
    parser = add_command(commands, "recipes", run_recipes, "list the recipes, or show one", description=description)
    parser.add_argument("name", nargs="?", metavar="NAME", help="name or file of a recipe (default: list all recipes)")
    add_overrides(parser)
    parser.add_argument("--markdown", action="store_true", help="print a reference page of all keys and shipped recipes")


def run_recipes(arguments: argparse.Namespace) -> None:
    """List the recipes, show one, or print the reference page."""
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
    if resolved.profiles:
        print(f"# profiles: {', '.join(resolved.profiles)}; choose one with profile=NAME")
    print("# *: not the default. [run]: does not change the numbers, may be changed when the run is continued.")
    notes = {key: f"{'[run] ' if field.kind == 'run' else ''}{field.description}" for key, field in RECIPE.fields.items()}
    print_resolved(flatten(resolved.recipe), resolved.origins, notes)
