"""``galaxydist data explore``: what a data set looks like, on one page."""

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from galaxydist.cli.options import (
    DATASETS,
    Commands,
    add_data_dir,
    add_survey,
    chosen_root,
    find_manifests,
    local_path,
    non_negative_int,
    positive_int,
    survey_source,
)
from galaxydist.errors import UserError
from galaxydist.galaxy import VARIANTS

if TYPE_CHECKING:
    from galaxydist.explore.analysis import Findings

SAMPLE = 3000


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "explore",
        help="what a data set looks like, as a page",
        description="Count galaxies, look at a sample of their pictures, and write one HTML page that needs no network: "
        "examples, mean images, pixels, sizes, sky, duplicates, damage, and a map of the pictures.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "place",
        nargs="?",
        metavar="SOURCE",
        help="a data set of the data root, a shards' manifest.json (or its folder or URL), an HDF5 file in Galaxy10's schema, "
        "or a folder of pictures (default: --dataset)",
    )
    parser.add_argument(
        "--dataset",
        metavar="NAME",
        default="galaxy10_decals",
        help="a survey or shards of the data root (default: %(default)s)",
    )
    add_survey(parser)
    parser.add_argument("--variant", choices=VARIANTS, help="default: original, or what the shards hold")
    parser.add_argument(
        "--sample",
        type=positive_int,
        default=SAMPLE,
        metavar="N",
        help="galaxies whose pictures are read, the same number of each class as far as it goes (default: %(default)s)",
    )
    parser.add_argument(
        "--per-class", type=positive_int, default=8, metavar="N", help="galaxies of a class among the examples (default: 8)"
    )
    parser.add_argument("--seed", type=non_negative_int, default=0, metavar="S", help="of the choice of galaxies (default: 0)")
    parser.add_argument("-o", dest="page", type=local_path, metavar="FILE", help="the page alone, under this name")
    parser.add_argument(
        "--out",
        type=local_path,
        metavar="DIR",
        help="folder of the page, survey.json, gallery.jpg and counts.png "
        "(default, without -o: explore/NAME/VARIANT in the data root)",
    )
    add_data_dir(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Explore the data set, print its counts and say where the page is."""
    from galaxydist import __version__
    from galaxydist.explore.datasets import open_population
    from galaxydist.explore.page import PAGE, explore
    from galaxydist.paths import cache_dir, folder_name
    from galaxydist.shards.remote.cache import CacheConfig

    root = chosen_root(arguments)
    population = open_population(_location(arguments, root), arguments.variant, CacheConfig(cache_dir(root)), arguments.classes)
    out_dir: Path | None = arguments.out
    if out_dir is None and arguments.page is None:
        out_dir = root / "explore" / folder_name(population.dataset) / folder_name(population.variant)
    page: Path = arguments.page or (out_dir or Path()) / PAGE
    if page.is_dir():
        raise UserError(f"-o {page} is a folder; give the name of a file, like {page / PAGE}, or --out {page}")
    findings = explore(
        population,
        page=page,
        out_dir=out_dir,
        provenance={"command": _command(arguments), "version": __version__},
        sample=arguments.sample,
        per_class=arguments.per_class,
        seed=arguments.seed,
    )
    _print_counts(findings)
    _print_findings(findings)
    print(f"page: {page}" + ("" if out_dir is None else f"; gallery, counts and numbers beside it: {out_dir}"))


def _location(arguments: argparse.Namespace, root: Path) -> str:
    """The place to look at: the SOURCE, else ``--from``, else the data set of the data root: its survey file, or its shards."""
    if arguments.place is not None and arguments.source is not None:
        raise UserError(f"two sources: {arguments.place} and --from {arguments.source}; leave one out")
    if arguments.place is None and arguments.source is not None:
        return str(survey_source(arguments, root))

    from galaxydist.paths import find_shards, hdf5_path

    given = arguments.place or arguments.dataset
    if arguments.place is not None and ("://" in given or Path(given).exists()):
        return str(given)
    if (file := hdf5_path(root, given)).is_file():
        return str(file)
    if given in DATASETS and given not in find_shards(root):
        return str(survey_source(argparse.Namespace(source=None, dataset=given), root))
    if arguments.place is not None and given not in find_shards(root):
        return str(given)
    return str(find_manifests(given, root, arguments.variant)[-1])  # the original variant where there are both


def _command(arguments: argparse.Namespace) -> str:
    """The command that makes the page again."""
    words = ["galaxydist", "data", "explore"]
    if arguments.place is not None:
        words.append(arguments.place)
    elif arguments.source is not None:
        words += ["--from", str(arguments.source)]
    else:
        words += ["--dataset", arguments.dataset]
    words += ["--variant", arguments.variant] if arguments.variant else []
    words += ["--classes", arguments.classes] if arguments.classes else []
    words += ["--sample", str(arguments.sample), "--per-class", str(arguments.per_class), "--seed", str(arguments.seed)]
    for option, value in (("-o", arguments.page), ("--out", arguments.out), ("--data-dir", arguments.data_dir)):
        words += [option, str(value)] if value is not None else []
    return shlex.join(words)


def _print_counts(findings: "Findings") -> None:
    from galaxydist.explore.analysis import pixel_statistics

    population, looked = findings.population, findings.looked
    counts = population.counts()
    width = max(map(len, population.groups.values()))
    print(f"{population.dataset}, {population.variant}")
    print("  ".join([f"{'class':{width}}", *(f"{split:>6}" for split in counts), "mean R G B       "]))
    for place, (label, name) in enumerate(population.groups.items()):
        numbers = [f"{values[place]:6d}" for values in counts.values()]
        known = label in looked.histograms
        mean = " ".join(f"{value:.3f}" for value in pixel_statistics(looked, label)["mean"]) if known else "-"
        print("  ".join([f"{name:{width}}", *numbers, mean]))
    print("  ".join([f"{'all':{width}}", *(f"{sum(values):6d}" for values in counts.values())]))


def _print_findings(findings: "Findings") -> None:
    read, chosen, near = len(findings.looked), findings.sample_size, findings.neighbours
    print(f"pictures: {read} of {len(findings.population)} looked at; {len(findings.duplicates)} pairs look the same")
    for kind, number in findings.oddities.items():
        print(f"  {kind}: {number} of {chosen}")
    for problem in [*findings.looked.problems.values()][:5]:
        print(f"    {problem}")
    if near is not None:
        print(
            f"sky: {len(near.pairs_P2)} overlapping pairs among {int(findings.positions.known.sum())} positions, "
            f"{int(near.across_P.sum())} across splits; {int(near.two_labels_P.sum())} places with two labels"
        )
