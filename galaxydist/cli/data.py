"""``galaxydist data``: fetch and export; the other data commands have modules of their own."""

import argparse

from galaxydist.cli import check, explore, shard, simulate
from galaxydist.cli.options import (
    Commands,
    add_data_dir,
    add_dataset,
    add_survey,
    add_workers,
    chosen_root,
    local_path,
    survey_source,
)


def add_parser(commands: Commands) -> None:
    """Add all data commands."""
    parser = commands.add_parser(
        "data",
        help="survey files, exported folders, shards",
        description="Survey files, exported folders and shards, all under one data root.",
        allow_abbrev=False,
    )
    inner = parser.add_subparsers(metavar="COMMAND")
    _add_fetch(inner)
    simulate.add_parser(inner)
    _add_export(inner)
    shard.add_parser(inner)
    check.add_parser(inner)
    explore.add_parser(inner)


def _add_fetch(commands: Commands) -> None:
    parser = commands.add_parser(
        "fetch",
        help="the real Galaxy10 DECaLS (2.5 GB)",
        description="Get the official file, verified by its SHA-256. An interrupted download goes on where it stopped.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--from",
        dest="source",
        type=local_path,
        metavar="FILE",
        help="a copy of the file on this machine, instead of the network",
    )
    parser.add_argument("--via", choices=("astronn",), help="download through astroNN (needs galaxydist[astronn])")
    add_data_dir(parser)
    parser.set_defaults(run=run_fetch)


def _add_export(commands: Commands) -> None:
    parser = commands.add_parser(
        "export",
        help="survey file to ImageFolder trees",
        description="Write Galaxy10_DECaLS/{train,val,test}/CLASS and Galaxy10_DECaLS_Balanced/{train,test}/CLASS as PNG.",
        allow_abbrev=False,
    )
    add_dataset(parser)
    add_survey(parser)
    parser.add_argument(
        "--out", type=local_path, metavar="DIR", help="where to write both trees (default: images/NAME in the data root)"
    )
    add_workers(parser)
    add_data_dir(parser)
    parser.set_defaults(run=run_export)


def run_fetch(arguments: argparse.Namespace) -> None:
    """Get the official file, unless it is there."""
    from galaxydist.paths import hdf5_path
    from galaxydist.surveys.download import fetch_galaxy10

    target = hdf5_path(chosen_root(arguments), "galaxy10_decals")
    print(f"Galaxy10 DECaLS: {fetch_galaxy10(target, source=arguments.source, via_astronn=arguments.via == 'astronn')}")


def run_export(arguments: argparse.Namespace) -> None:
    """Write the trees, unless they are there."""
    from galaxydist.paths import images_dir
    from galaxydist.surveys.export import export_image_folders
    from galaxydist.surveys.survey_sources import open_survey

    root = chosen_root(arguments)
    source = survey_source(arguments, root)
    out_dir = arguments.out or images_dir(root, open_survey(source, classes=arguments.classes).name)
    for tree in export_image_folders(source, out_dir, workers=arguments.workers, classes=arguments.classes):
        counts = ", ".join(f"{split} {number}" for split, number in tree.num_galaxies.items())
        print(f"{tree.variant} ({counts}): {tree.path}{' (there already)' if tree.was_there else ''}")
