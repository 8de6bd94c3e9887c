"""``galaxydist predict``: label images, tables, surveys and shards with the model of a run."""

import argparse
import os
from collections.abc import MutableMapping
from pathlib import Path

from galaxydist.cli.jobs import find_folder
from galaxydist.cli.options import (
    Commands,
    add_arrays,
    add_command,
    add_data_dir,
    add_table,
    add_trust_code,
    chosen_root,
    find_manifests,
    local_path,
    positive_int,
    table_source,
)
from galaxydist.errors import UserError
from galaxydist.paths import cache_dir, find_shards
from galaxydist.rank_store import Leave
from galaxydist.training.launch import launch

EPILOG = """examples:
  galaxydist predict runs/vit-0123abcd new_images/ -o new.csv
  galaxydist predict runs/vit-0123abcd a.jpg b.png -o two.csv --top 3
  galaxydist predict runs/vit-0123abcd survey.csv --images cutouts/ -o survey.parquet
  galaxydist predict runs/vit-0123abcd shards/manifest.json --split test -o test.parquet --logits
  galaxydist predict runs/vit-0123abcd s3://bucket/shards/manifest.json -o all.parquet --processes 4
  torchrun --nproc-per-node 8 -m galaxydist predict runs/vit-0123abcd shards/ -o all.parquet

The output has the user's own ids and columns, then predicted, confidence and p_CLASS for each class. Finished parts are kept in
OUT.partial: the same command continues after an interruption, also on another number of processes.
"""


def add_predict(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "predict",
        run_predict,
        "label new images with the model of a run",
        description="Label galaxies with the model of a run: calibrated probabilities of the classes, in a CSV or Parquet file.",
        epilog=EPILOG,
    )
    parser.add_argument("run_folder", metavar="RUN", help="run folder, or its name in ./runs, or a published folder")
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="folder of images (with subfolders), image files, a table (CSV, Parquet, FITS), Parquet or HDF5 files with images "
        "(also hf://datasets/OWNER/NAME@REVISION), or shards: manifest.json or its folder, path or URL, or a data set in the "
        "data root",
    )
    parser.add_argument("-o", "--out", type=local_path, required=True, metavar="FILE", help="file to write: .csv or .parquet")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing FILE, and start anew")
    parser.add_argument(
        "--processes", type=positive_int, default=1, metavar="N", help="number of processes, one per GPU (default: %(default)s)"
    )
    model = parser.add_argument_group("model")
    model.add_argument("--checkpoint", choices=("best", "last"), help="checkpoint (default: the recipe's)")
    model.add_argument(
        "--tta",
        choices=("none", "d4"),
        help="test-time augmentation; d4: mean probability over the eight flips and quarter turns (default: the recipe's)",
    )
    model.add_argument(
        "--trained-on",
        metavar="FILE",
        help="manifest of the training data, for a run of an earlier version whose shards have moved",
    )
    images = parser.add_argument_group("images")
    images.add_argument("--split", metavar="NAME", help="split of shards (default: all)")
    images.add_argument(
        "--resize", action="store_true", help="take images of any size and pixel scale: the central square is resampled"
    )
    images.add_argument(
        "--rescale",
        action="store_true",
        help="cut and resample images to the pixel scale of the training (needs a column pxscale, arcsec/pixel)",
    )
    columns = parser.add_argument_group("columns of the output")
    columns.add_argument("--logits", action="store_true", help="add the logits")
    columns.add_argument("--top", type=positive_int, default=0, metavar="K", help="add the K most probable classes, in order")
    add_table(parser, ("file", "id", "ra", "dec"))
    add_arrays(parser)
    add_trust_code(parser)
    add_data_dir(parser)


def run_predict(arguments: argparse.Namespace) -> int:
    """Label the source, on this process or on several, and return the exit code."""
    if arguments.resize and arguments.rescale:
        raise UserError("--resize takes images of any scale, and --rescale brings them to one: give one of them")
    out: Path = arguments.out
    arguments.run_folder = find_folder(arguments.run_folder)
    arguments.sources = _locations(arguments)
    if same := [source for source in arguments.sources if Path(source).exists() and Path(source).absolute() == out.absolute()]:
        raise UserError(f"-o {out} is a source, which would be lost: {same[0]}. Give another -o")
    if arguments.processes == 1:
        return launch(arguments, os.environ, work=predict_rank)

    from galaxydist.prediction.label_source import check_output
    from galaxydist.training.local_launcher import run_processes

    check_output(out, overwrite=arguments.overwrite)  # a mistake is reported once, before processes are started
    return run_processes(arguments, arguments.processes, os.environ, work=predict_rank)


def _locations(arguments: argparse.Namespace) -> list[str]:
    """Return the sources, with the manifest of a data set in the data root instead of its name."""
    sources: list[str] = arguments.sources
    root = chosen_root(arguments)
    if len(sources) == 1 and not Path(sources[0]).exists() and sources[0] in find_shards(root):
        return [str(find_manifests(sources[0], root)[-1])]  # the original variant, if there are both
    return sources


def predict_rank(arguments: argparse.Namespace, environ: MutableMapping[str, str], _leave: Leave) -> int:
    """Label this process's share of the source; rank 0 prints the result."""
    from galaxydist.prediction.label_source import LabelOptions, label_source
    from galaxydist.prediction.open_source import SourceChoice, open_source
    from galaxydist.prediction.trained_model import ModelChoice
    from galaxydist.shards.remote.cache import CacheConfig

    choice = SourceChoice(
        tuple(arguments.sources),
        arguments.split,
        CacheConfig(cache_dir(chosen_root(arguments))),
        table_source(arguments),
    )
    options = LabelOptions(
        ModelChoice(arguments.checkpoint, arguments.tta, arguments.trained_on),
        resize=arguments.resize,
        rescale=arguments.rescale,
        logits=arguments.logits,
        top=arguments.top,
        overwrite=arguments.overwrite,
    )
    found = label_source(arguments.run_folder, lambda: open_source(choice), arguments.out, environ, options)
    if found.is_main:
        print(found.summary(arguments.out))
    return 0
