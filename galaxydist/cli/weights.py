"""``galaxydist weights fetch``: published weights into the cache, for machines without a network."""

import argparse

from galaxydist.cli.options import Commands, add_data_dir, chosen_root


def add_parser(commands: Commands) -> None:
    """Add the commands."""
    parser = commands.add_parser("weights", help="published weights", description="Published weights.", allow_abbrev=False)
    inner = parser.add_subparsers(metavar="COMMAND", required=True)
    fetch = inner.add_parser(
        "fetch",
        help="download the published weights that a recipe starts from",
        description="Download the published weights that a recipe starts from into the data root.",
        allow_abbrev=False,
    )
    fetch.add_argument("recipe", nargs="+", metavar="recipe=NAME [key=value]", help="the recipe")
    add_data_dir(fetch)
    fetch.set_defaults(run=run_fetch)


def run_fetch(arguments: argparse.Namespace) -> None:
    """Download the weights, unless they are there."""
    from galaxydist.recipe.load import load_recipe

    recipe = load_recipe(arguments.recipe).recipe
    if arguments.data_dir is None:
        arguments.data_dir = recipe.data.dir

    from galaxydist.models.published import fetch_weights
    from galaxydist.recipe.paths import weights_dir

    print(f"weights of {recipe.model.name}: {fetch_weights(recipe.model, weights_dir(chosen_root(arguments)))}")
