"""``galaxydist data check``: whether shards are what their manifests say, byte by byte and picture by picture."""

import argparse
from pathlib import Path

from galaxydist.cli.options import Commands, add_data_dir, chosen_root
from galaxydist.errors import UserError


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "check",
        help="verify shards",
        description="Verify counts, checksums and labels and decode every picture; name the shard and galaxy that is wrong.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "paths", nargs="*", metavar="PATH", help="manifests or their folders, paths or URLs (default: all of the data root)"
    )
    parser.add_argument("--dataset", metavar="NAME", help="only this data set of the data root")
    add_data_dir(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Check every manifest; all problems come together."""
    from galaxydist.recipe.paths import cache_dir
    from galaxydist.shards.cache import CacheConfig
    from galaxydist.shards.check import check_shards

    problems = []
    root = chosen_root(arguments)
    for path in arguments.paths or _manifests(root, arguments.dataset):
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
    if problems:
        raise UserError("\n".join(problems))


def _manifests(root: Path, dataset: str | None) -> list[Path]:
    from galaxydist.shards.manifest import MANIFEST_NAME

    folder = root / "shards"
    found = sorted(folder.glob(f"*/*/{MANIFEST_NAME}"))
    wanted = [path for path in found if dataset in (None, path.parents[1].name)]
    if not wanted:
        names = ", ".join(sorted({path.parents[1].name for path in found})) or "none"
        raise UserError(
            f"no shards{f' of {dataset}' if dataset else ''} in {folder} (data sets there: {names}). "
            "Make them with `galaxydist data shard`, or give the path of a manifest"
        )
    return wanted
