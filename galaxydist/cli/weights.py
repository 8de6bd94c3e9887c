"""``galaxydist weights``: published weights into the cache, for machines without a network; a run's own weights into a file."""

import argparse

from galaxydist.cli.options import Commands, add_data_dir, chosen_root, local_path


def add_parser(commands: Commands) -> None:
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
