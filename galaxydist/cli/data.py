"""``galaxydist data``: fetch, simulate, export, shard, check and explore data sets."""

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from galaxydist.cli.options import (
    DATASETS,
    Commands,
    add_command,
    add_data_dir,
    add_dataset,
    add_group,
    add_survey,
    add_unlabelled,
    add_workers,
    chosen_root,
    class_options,
    find_manifests,
    local_path,
    non_negative_int,
    positive_int,
    survey_source,
    table_source,
    whole_number,
)
from galaxydist.cli.shard import add_shard
from galaxydist.errors import UserError, name_some
from galaxydist.galaxy import VARIANTS
from galaxydist.paths import cache_dir, find_shards, folder_name, hdf5_path, images_dir
from galaxydist.version import __version__

if TYPE_CHECKING:
    from galaxydist.explore.analysis import Findings


def add_parser(commands: Commands) -> None:
    """Add all data commands."""
    inner = add_group(commands, "data", "survey files, exported folders and shards in the data root")
    for add in (_add_fetch, _add_simulate, _add_export, add_shard, _add_check, _add_explore):
        add(inner)


def _add_fetch(commands: Commands) -> None:
    parser = add_command(
        commands,
        "fetch",
        run_fetch,
        "download the real Galaxy10 DECaLS (2.5 GB)",
        description="Download the official file and verify its SHA-256. An interrupted download is resumed.",
    )
    parser.add_argument(
        "--from", dest="source", type=local_path, metavar="FILE", help="copy of the file on this machine, instead of a download"
    )
    parser.add_argument("--via", choices=("astronn",), help="download through astroNN (needs galaxydist[astronn])")
    add_data_dir(parser)


def _add_export(commands: Commands) -> None:
    parser = add_command(
        commands,
        "export",
        run_export,
        "write a survey as ImageFolder trees",
        description="Write NAME/{train,val,test}/CLASS and NAME_balanced/{train,test}/CLASS as PNG; the real Galaxy10 has its "
        "published names, Galaxy10_DECaLS and Galaxy10_DECaLS_Balanced.",
    )
    add_dataset(parser)
    add_survey(parser)
    parser.add_argument(
        "--out", type=local_path, metavar="DIR", help="folder for both trees (default: images/NAME in the data root)"
    )
    add_workers(parser)
    add_data_dir(parser)


def run_fetch(arguments: argparse.Namespace) -> None:
    """Download the official file, unless it exists."""
    from galaxydist.surveys.download import fetch_galaxy10

    target = hdf5_path(chosen_root(arguments), "galaxy10_decals")
    print(f"Galaxy10 DECaLS: {fetch_galaxy10(target, source=arguments.source, via_astronn=arguments.via == 'astronn')}")


def run_export(arguments: argparse.Namespace) -> None:
    """Write the trees, unless they exist."""
    from galaxydist.surveys.export import export_image_folders
    from galaxydist.surveys.survey_sources import survey_name

    root = chosen_root(arguments)
    source = survey_source(arguments, root)
    classes, options = class_options(arguments.classes)[0], table_source(arguments)
    out_dir = arguments.out or images_dir(root, survey_name(source, classes=classes, source=options))
    for tree in export_image_folders(source, out_dir, workers=arguments.workers, classes=classes, options=options):
        counts = ", ".join(f"{split} {number}" for split, number in tree.num_galaxies.items())
        print(f"{tree.variant} ({counts}): {tree.path}{' (there already)' if tree.existed else ''}")


def _add_simulate(commands: Commands) -> None:
    parser = add_command(
        commands,
        "simulate",
        run_simulate,
        "make a simulated survey",
        description="Draw a simulated survey in Galaxy10's schema. The same number and seed give the same bytes.",
    )
    parser.add_argument(
        "--num-galaxies",
        type=partial(whole_number, least=1, most=100_000_000),
        default=3000,
        metavar="N",
        help="number of galaxies (default: %(default)s)",
    )
    parser.add_argument("--seed", type=non_negative_int, default=0, metavar="S", help="random seed (default: %(default)s)")
    parser.add_argument("--balanced", action="store_true", help="equal numbers of each class (default: as in Galaxy10)")
    parser.add_argument(
        "--out", type=local_path, metavar="FILE", help="HDF5 file to write (default: hdf5/simulated.h5 in the data root)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file with another survey")
    add_workers(parser)
    add_data_dir(parser)


def run_simulate(arguments: argparse.Namespace) -> None:
    """Draw the survey, unless it exists."""
    path = arguments.out or hdf5_path(chosen_root(arguments), "simulated")
    difference = _difference(path, arguments) if path.exists() else ""
    if path.exists() and not difference:
        print(f"simulated survey: {path} (there already)")
        return
    if difference and not arguments.overwrite:
        raise UserError(f"{path} {difference}. Give --overwrite to replace it, or --out FILE to write another")

    from galaxydist.surveys.simulate.survey import simulate_survey

    simulate_survey(path, arguments.num_galaxies, arguments.seed, arguments.workers, arguments.balanced)
    print(f"simulated survey: {path} ({arguments.num_galaxies} galaxies, {path.stat().st_size / 1e6:.0f} MB)")


def _difference(path: Path, arguments: argparse.Namespace) -> str:
    """Describe how the file differs from the requested survey; empty if it is that survey."""
    from galaxydist.surveys.galaxy10 import read_survey_file
    from galaxydist.surveys.simulate.survey import SIMULATOR_VERSION

    wanted = {
        "simulator_version": SIMULATOR_VERSION,
        "seed": arguments.seed,
        "num_galaxies": arguments.num_galaxies,
        "balanced": int(arguments.balanced),
    }
    try:
        attributes = read_survey_file(path).attributes
    except UserError as error:
        return f"is in the way ({error})"
    different = [f"{key} is {attributes.get(key)}, not {value}" for key, value in wanted.items() if attributes.get(key) != value]
    return f"holds another survey ({'; '.join(different)})" if different else ""


def _add_check(commands: Commands) -> None:
    parser = add_command(
        commands,
        "check",
        run_check,
        "verify shards",
        description="Verify counts, checksums and labels, and decode all images. Errors name the shard and the galaxy.",
    )
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="NAME|PATH",
        help="data sets in the data root, or paths or URLs of manifests or their folders (default: all in the data root)",
    )
    parser.add_argument("--dataset", metavar="NAME", help="the same as NAME")
    add_data_dir(parser)


def run_check(arguments: argparse.Namespace) -> None:
    """Check all manifests, then report all problems together."""
    from galaxydist.shards.remote.cache import CacheConfig
    from galaxydist.shards.verify import check_shards, describe_equal_images

    problems = []
    root = chosen_root(arguments)
    for path in _locations(arguments.paths, root, arguments.dataset):
        try:
            manifest = check_shards(path, CacheConfig(cache_dir(root)))
        except UserError as error:
            problems.append(str(error))
        else:
            splits = manifest.splits.values()
            print(
                f"in order: {manifest.dataset}, {manifest.variant}: {sum(split.num_samples for split in splits)} galaxies "
                f"in {sum(split.num_shards for split in splits)} shards ({manifest.location})"
            )
            for name, text in manifest.origin.describe().items() if manifest.origin is not None else ():
                print(f"  {name}: {text}")
            for line in describe_equal_images(manifest):
                print(f"  {line}")
    if problems:
        raise UserError("\n".join(problems))


def _locations(given: list[str], root: Path, dataset: str | None) -> list[str | Path]:
    """Return the manifests that the user names, or else all in the data root."""
    names = [*given, *([dataset] if dataset is not None else [])]
    if names:
        return [manifest for text in names for manifest in find_manifests(text, root)]
    found = [path for paths in find_shards(root).values() for path in paths]
    if not found:
        raise UserError(
            f"there are no shards in {root / 'shards'}. Make them with `galaxydist data shard`, or give the path of a manifest"
        )
    return [*found]


def _add_explore(commands: Commands) -> None:
    parser = add_command(
        commands,
        "explore",
        run_explore,
        "write a page about a data set",
        description="Count galaxies, examine a sample of their images, and write one HTML page that works without a network: "
        "examples, mean images, pixel values, sizes, sky positions, duplicates, damage, and a map of the images.",
    )
    parser.add_argument(
        "location",
        nargs="?",
        metavar="SOURCE",
        help="data set in the data root, manifest.json (or its folder or URL), or what --from takes (default: --dataset)",
    )
    parser.add_argument(
        "--dataset",
        metavar="NAME",
        default="galaxy10_decals",
        help="survey or shards in the data root (default: %(default)s)",
    )
    add_survey(parser)
    add_unlabelled(parser, "explored without classes")
    parser.add_argument("--variant", choices=VARIANTS, help="variant of the survey (default: original, or that of the shards)")
    parser.add_argument(
        "--sample",
        type=positive_int,
        default=3000,
        metavar="N",
        help="galaxies whose images are read, equally many of each class if possible (default: %(default)s)",
    )
    parser.add_argument(
        "--per-class", type=positive_int, default=8, metavar="N", help="example galaxies of each class (default: %(default)s)"
    )
    parser.add_argument("--seed", type=non_negative_int, default=0, metavar="S", help="seed of the sample (default: %(default)s)")
    parser.add_argument(
        "--features",
        type=local_path,
        metavar="FILE",
        help="features of these shards, written by `galaxydist probe`, for the map (default: principal components of the images)",
    )
    parser.add_argument("-o", dest="page", type=local_path, metavar="FILE", help="write the page only, to this file")
    parser.add_argument(
        "--out",
        type=local_path,
        metavar="DIR",
        help="folder of the page, survey.json, gallery.jpg and counts.png (default, without -o: explore/NAME/VARIANT in the "
        "data root)",
    )
    add_data_dir(parser)


def run_explore(arguments: argparse.Namespace) -> None:
    """Explore the data set, and print its counts and the path of the page."""
    from galaxydist.explore.datasets import add_features, open_population
    from galaxydist.explore.page import PAGE, explore
    from galaxydist.shards.remote.cache import CacheConfig

    root = chosen_root(arguments)
    population = open_population(
        _location(arguments, root),
        arguments.variant,
        CacheConfig(cache_dir(root)),
        class_options(arguments.classes)[0],
        table_source(arguments),
    )
    if arguments.features is not None:
        population = add_features(population, arguments.features)
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
        provenance={"command": arguments.command, "version": __version__},
        sample=arguments.sample,
        per_class=arguments.per_class,
        seed=arguments.seed,
    )
    _print_counts(findings)
    _print_findings(findings)
    print(f"page: {page}" + ("" if out_dir is None else f"; gallery, counts and numbers beside it: {out_dir}"))


def _location(arguments: argparse.Namespace, root: Path) -> str:
    """Return the data to explore: SOURCE, else ``--from``, else the survey file or the shards of ``--dataset``."""
    location, source = arguments.location, arguments.source
    if location is not None and source is not None:
        raise UserError(f"two sources: {location} and --from {source}; leave one out")
    if source is not None:
        return str(survey_source(arguments, root))
    given = location or arguments.dataset
    is_sharded = given in find_shards(root)
    if location is not None and ("://" in given or Path(given).exists()):
        return str(given)
    if (file := hdf5_path(root, given)).is_file():
        return str(file)
    if given in DATASETS and not is_sharded:
        return str(survey_source(argparse.Namespace(source=None, dataset=given), root))
    if location is not None and not is_sharded:
        return str(given)
    return str(find_manifests(given, root, arguments.variant)[-1])  # the original variant, if there are both


def _print_counts(findings: "Findings") -> None:
    from galaxydist.explore.analysis import pixel_statistics

    population, scan = findings.population, findings.scan
    counts = population.counts()
    width = max(map(len, population.groups.values()))
    print(f"{population.dataset}, {population.variant}")
    print("  ".join([f"{'class':{width}}", *(f"{split:>6}" for split in counts), "mean R G B       "]))
    for index, (label, name) in enumerate(population.groups.items()):
        numbers = [f"{values[index]:6d}" for values in counts.values()]
        known = label in scan.histograms
        mean = " ".join(f"{value:.3f}" for value in pixel_statistics(scan, label)["mean"]) if known else "-"
        print("  ".join([f"{name:{width}}", *numbers, mean]))
    print("  ".join([f"{'all':{width}}", *(f"{sum(values):6d}" for values in counts.values())]))


def _print_findings(findings: "Findings") -> None:
    read, chosen, near = len(findings.scan), findings.sample_size, findings.neighbours
    print(f"images: {read} of {len(findings.population)} looked at; {len(findings.duplicates)} pairs look the same")
    for kind, number in findings.odd_images.items():
        print(f"  {kind}: {number} of {chosen}")
    for problem in [*findings.scan.problems.values()][:5]:
        print(f"    {problem}")
    if near is not None:
        print(
            f"sky: {len(near.pairs_P2)} overlapping pairs among {int(findings.positions.known.sum())} positions, "
            f"{int(near.across_P.sum())} across splits; {int(near.two_labels_P.sum())} positions with two labels"
        )
    if findings.map is not None and findings.map.by_chance < 1:
        share = f"{100 * findings.map.agreement:.0f} %"
        print(f"map: {share} have the class of most of their ten nearest neighbours in {findings.map.features}")
        if ids := [findings.scan.ids[one.index] for one in findings.map.doubtful]:
            print(f"  {len(ids)} doubtful labels, which none of the neighbours has: {name_some(ids)}")
