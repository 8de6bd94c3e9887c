"""``galaxydist data check``: whether shards are what their manifests say, byte by byte and picture by picture."""

import argparse
from pathlib import Path

from galaxydist.cli.options import Commands, add_data_dir, chosen_root, find_manifests
from galaxydist.errors import UserError
from galaxydist.paths import find_shards


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "check",
        help="verify shards",
        description="Verify counts, checksums and labels and decode every picture; name the shard and galaxy that is wrong.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="NAME|PATH",
        help="data sets of the data root, or manifests or their folders, paths or URLs (default: all of the data root)",
    )
    parser.add_argument("--dataset", metavar="NAME", help="only this data set of the data root, as NAME alone")
    add_data_dir(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Check every manifest; all problems come together."""
    from galaxydist.paths import cache_dir
    from galaxydist.shards.remote.cache import CacheConfig
    from galaxydist.shards.verify import check_shards, describe_equal_pictures

    problems = []
    root = chosen_root(arguments)
    for path in _locations(arguments.paths, root, arguments.dataset):
        try:
            checked = check_shards(path, CacheConfig(cache_dir(root)))
        except UserError as error:
            problems.append(str(error))
        else:
            manifest = checked.manifest
            print(
                f"in order: {manifest.dataset}, {manifest.variant}: "
                f"{checked.num_galaxies} galaxies in {checked.num_shards} shards ({manifest.location})"
            )
            for line in describe_equal_pictures(manifest):
                print(f"  {line}")
    if problems:
        raise UserError("\n".join(problems))


def _locations(given: list[str], root: Path, dataset: str | None) -> list[str | Path]:
    """The manifests that are meant; all of the data root, or of one data set, where no place is given."""
    names = [dataset] if dataset is not None else []
    if given:
        return [place for text in (*given, *names) for place in find_manifests(text, root)]
    if dataset is not None:
        return [*find_manifests(dataset, root)]
    there = [path for paths in find_shards(root).values() for path in paths]
    if not there:
        raise UserError(
            f"there are no shards in {root / 'shards'}. Make them with `galaxydist data shard`, or give the path of a manifest"
        )
    return [*there]
