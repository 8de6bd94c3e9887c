"""``galaxydist probe``: linear and nearest-neighbour classification of an encoder's frozen features."""

import argparse
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from galaxydist.cli.options import (
    Commands,
    add_command,
    add_data_dir,
    add_trust_code,
    chosen_root,
    find_manifests,
    local_path,
    positive_number,
)
from galaxydist.errors import UserError
from galaxydist.galaxy import VARIANTS
from galaxydist.paths import cache_dir, folder_name, weights_dir

if TYPE_CHECKING:
    import torch

    from galaxydist.explore.encoder import Encoder
    from galaxydist.recipe.schema import Recipe
    from galaxydist.shards.manifest import Manifest

EPILOG = """examples:
  galaxydist probe vit galaxy10_decals                          published weights of a named model
  galaxydist probe recipe=d4_cnn galaxy10_decals model.weights=sim.safetensors
  galaxydist probe runs/vit-0123abcd galaxy10_decals            the best checkpoint of a run, without its head
  galaxydist probe vit galaxy10_decals --random                 random weights, for comparison
  galaxydist data explore galaxy10_decals --features FILE       the features as a map
"""
# The recipe that starts from weights that the package brings along: its image size and crop are theirs.
SHIPPED_RECIPE = "small"
_SETTING = re.compile(r"[a-z_]+(\.[a-z_0-9]+)*=")


def add_probe(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "probe",
        run_probe,
        "measure what an encoder knows before it is trained",
        description="Compute the features of all galaxies with a frozen encoder, and classify them by logistic regression and by "
        "nearest neighbours: balanced accuracy and accuracy on the test split with 95 % intervals, beside the largest class and "
        "the principal components of the pixels. Features are stored, and computed only once.",
        epilog=EPILOG,
    )
    parser.add_argument("model", metavar="MODEL", help="model name, recipe=NAME, run folder, or weights of `weights save`")
    parser.add_argument("data", metavar="DATA", help="data set in the data root, or path or URL of a manifest")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that override the recipe")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--pretrained", action="store_true", help="published weights (default for models that have some)")
    start.add_argument("--random", action="store_true", help="random weights")
    parser.add_argument("--variant", choices=VARIANTS, help="variant of the data set (default: original)")
    parser.add_argument(
        "--tta",
        choices=("none", "d4"),
        default="none",
        help="d4: mean features over the eight flips and quarter turns (default: %(default)s)",
    )
    parser.add_argument(
        "--fractions",
        type=fractions,
        default=(1.0,),
        metavar="F,F",
        help="fractions of the training galaxies of each class to fit, like 0.01,0.1,1, for a learning curve (default: 1)",
    )
    parser.add_argument(
        "--out",
        type=local_path,
        metavar="FILE",
        help="Parquet file of the features; the numbers are beside it as JSON (default: "
        "features/NAME/VARIANT/MODEL-HASH.parquet in the data root)",
    )
    parser.add_argument("--overwrite", action="store_true", help="compute the features again, also if --out has other ones")
    parser.add_argument(
        "--trained-on", metavar="FILE", help="path or URL of the manifest of a run's training data, if it has moved since"
    )
    add_trust_code(parser)
    add_data_dir(parser)


def fractions(text: str) -> tuple[float, ...]:
    """Parse fractions above 0 and up to 1, separated by commas."""
    found = tuple(positive_number(part) for part in text.split(","))
    if max(found) > 1:
        raise argparse.ArgumentTypeError(f"{max(found):g} is more than 1")
    return found


def run_probe(arguments: argparse.Namespace) -> None:
    """Probe the encoder, and print the numbers."""
    from galaxydist.distributed import open_world
    from galaxydist.explore.probe import ProbeOptions, check_labels, probe, render_result
    from galaxydist.shards.remote.cache import CacheConfig
    from galaxydist.shards.remote.open import open_shards

    model, data, settings = _split_words([arguments.model, arguments.data, *arguments.overrides])
    root = chosen_root(arguments)
    manifest = open_shards(find_manifests(data, root, arguments.variant)[-1], CacheConfig(cache_dir(root)))
    check_labels(manifest)
    folder = root / "features" / folder_name(manifest.dataset) / folder_name(manifest.variant)
    options = ProbeOptions(folder, arguments.out, arguments.overwrite, arguments.fractions)
    with open_world("no", os.environ) as world:
        if world.size > 1:
            raise UserError(f"a probe runs in one process, not in {world.size}: call it without a launcher")
        encoder = _open_encoder(model, settings, manifest, world.device, arguments)
        result, path = probe(manifest, encoder, world, options)
    print(render_result(result))
    print(f"features: {path}; numbers: {path.with_suffix('.json')}")


def _split_words(words: list[str]) -> tuple[str, str, list[str]]:
    """Return model, data and settings, in any order of the settings; ``recipe=NAME`` is a model.

    Raises:
        UserError: there is no model or no data, or there are more.
    """
    settings = [word for word in words if _SETTING.match(word) and not Path(word).exists()]
    named = [word for word in settings if word.startswith("recipe=")]
    settings = [word for word in settings if word not in named]
    others = [*named, *(word for word in words if word not in (*named, *settings))]
    if len(others) != 2:
        raise UserError(
            f"give a model and a data set, not {' '.join(others) or 'settings alone'}, as in "
            "`galaxydist probe vit galaxy10_decals`"
        )
    return others[0], others[1], settings


def _open_encoder(
    model: str, settings: list[str], manifest: "Manifest", device: "torch.device", arguments: argparse.Namespace
) -> "Encoder":
    from galaxydist.evaluation.leakage import open_training_shards
    from galaxydist.explore.encoder import open_model, open_run
    from galaxydist.loading.training_data import find_manifest
    from galaxydist.models.own_function import trusts_code
    from galaxydist.shards.remote.cache import CacheConfig

    root, run_dir = chosen_root(arguments), _find_run(model)
    if run_dir is None:
        return open_model(_read_recipe(model, settings, arguments, root), manifest, weights_dir(root), arguments.tta, device)
    if given := [*settings, *(f"--{name}" for name in ("random", "pretrained") if getattr(arguments, name))]:
        raise UserError(f"{model} is a run, which has its own settings and weights: leave {' '.join(given)} out")
    return open_run(
        run_dir,
        manifest,
        lambda recipe, trained_on: open_training_shards(
            trained_on, find_manifest(recipe.data, root), arguments.trained_on, CacheConfig(cache_dir(root))
        ),
        arguments.tta,
        device,
        trust_code=trusts_code(os.environ),
    )


def _find_run(model: str) -> Path | None:
    """Return the run folder of that path or of that name in ./runs; None if there is none."""
    return next((path for path in (Path(model), Path("runs") / model) if (path / "recipe.json").is_file()), None)


def _read_recipe(model: str, settings: list[str], arguments: argparse.Namespace, root: Path) -> "Recipe":
    """Return the recipe of a model, or the one that is named, with the starting weights that the options choose."""
    from galaxydist.recipe.resolve import COMMAND_LINE, Override, load_recipe

    keys = {word.partition("=")[0] for word in settings}
    options = [f"--{name}" for name in ("random", "pretrained") if getattr(arguments, name)]
    is_file = model.endswith(".safetensors")
    if options and (given := [*sorted(keys & {"model.weights", "model.pretrained"}), *([model] if is_file else [])]):
        raise UserError(f"{options[0]} and {' and '.join(given)} both choose the weights: leave one out")
    stored = _of_weights(Path(model), arguments.data) if is_file else {}
    named, values = model, stored
    if not model.startswith("recipe="):
        named, found = _defaults(stored.get("model.name", model), root)
        values = found | stored
    if options:
        values["model.pretrained"] = arguments.pretrained
    elif "model.weights" in {*keys, *values}:
        values["model.pretrained"] = False
    return load_recipe([named, *settings], settings={key: Override(value, COMMAND_LINE) for key, value in values.items()}).recipe


def _defaults(model: str, root: Path) -> tuple[str, dict[str, Any]]:
    """Return the recipe to start from for a model's name, and the values that replace its own.

    Networks whose weights ship with the package have the width of these, and the images of the recipe that starts from them.
    Models without a recipe of their own have that of fine-tuning a vision transformer, at the size of their published weights.

    Raises:
        UserError: there is no such model.
    """
    from galaxydist.models.hub_weights import read_record, shipped_path
    from galaxydist.models.registry import ARCHITECTURES, recipe_of
    from galaxydist.models.weights import read_settings
    from galaxydist.recipe.model_names import parse_model_name
    from galaxydist.recipe.resolve import list_recipes
    from galaxydist.recipe.schema import ModelConfig

    try:
        kind = parse_model_name(model).kind
    except ValueError as error:
        if model in list_recipes():
            return f"recipe={model}", {}
        raise UserError(f"{model}: {error}; or give recipe=NAME, or a run folder") from None
    if kind == "named":
        known = ARCHITECTURES[model]
        if known.is_shipped:
            return f"recipe={SHIPPED_RECIPE}", {**_settings(read_settings(shipped_path(model))), "model.pretrained": True}
        return f"recipe={recipe_of(model)}", {"model.pretrained": known.has_published_weights}
    values: dict[str, Any] = {"model.name": model, "model.drop_path_rate": 0.0, "model.pretrained": kind != "function"}
    size = read_record(ModelConfig(name=model), weights_dir(root)).pretrained_cfg.get("input_size")
    return "recipe=vit", values | ({"data.image_size": size[-1]} if size else {})


def _of_weights(path: Path, data: str) -> dict[str, Any]:
    """Return the settings of the model that a file of weights belongs to, and of its images.

    Raises:
        UserError: the file cannot be read or does not say.
    """
    from galaxydist.models.weights import read_settings

    stored = read_settings(path)
    if "name" not in stored:
        raise UserError(
            f"{path} does not say which model it belongs to: give the recipe that trained it, like `galaxydist probe "
            f"recipe=d4_cnn {data} model.weights={path}`"
        )
    return {**_settings(stored), "model.weights": str(path)}


def _settings(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a file of weights states as values of a recipe."""
    from galaxydist.models.weights import DATA_SETTINGS

    return {f"{'data' if key in DATA_SETTINGS else 'model'}.{key}": value for key, value in stored.items()}
