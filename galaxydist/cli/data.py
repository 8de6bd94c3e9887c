"""``galaxydist data``: fetch and export; the other data commands have modules of their own."""

import argparse
import shlex
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from galaxydist.cli.options import (
    DATASETS,
    Commands,
    add_data_dir,
    add_dataset,
    add_survey,
    add_workers,
    chosen_root,
    find_manifests,
    fold,
    local_path,
    non_negative_int,
    positive_int,
    survey_source,
)
from galaxydist.errors import UserError
from galaxydist.galaxy import VARIANTS
from galaxydist.paths import find_shards

if TYPE_CHECKING:
    from galaxydist.explore.analysis import Findings
    from galaxydist.galaxy import Survey
    from galaxydist.shards.manifest import Manifest
    from galaxydist.surveys.image_folder import FolderSurvey


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
    add_simulate(inner)
    _add_export(inner)
    add_shard(inner)
    add_check(inner)
    add_explore(inner)


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
        print(f"{tree.variant} ({counts}): {tree.path}{' (there already)' if tree.existed else ''}")


# ``galaxydist data shard``: shards from a survey file or a folder of images.

# Endings of images without loss.
LOSSLESS = {".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"}


def add_shard(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "shard",
        help="survey file or folder of images to shards",
        description="Write a survey as shards (plain WebDataset tars), an index and a manifest: what a recipe trains on.",
        allow_abbrev=False,
    )
    add_dataset(parser)
    add_survey(parser)
    parser.add_argument("--name", help="data set name, for data.dataset=NAME (default: the source's own)")
    parser.add_argument("--variant", choices=(*VARIANTS, "both"), default="original", help="default: %(default)s")
    parser.add_argument(
        "--conflicting", choices=("keep", "drop"), default="keep", help="galaxies that the source has with two labels"
    )
    parser.add_argument("--fold", type=fold, metavar="K/N", help="fold K of an N-fold cross-validation: train and test, no val")
    parser.add_argument(
        "--val", choices=("0",), metavar="0", help="0: no validation split; what would be taken for it stays in train"
    )
    parser.add_argument("--encoding", choices=("jpeg", "png", "raw"), default="jpeg", help="default: %(default)s")
    parser.add_argument("--quality", type=quality, default=95, metavar="Q", help="of JPEG, 1 to 100 (default: %(default)s)")
    parser.add_argument(
        "--image-size", type=positive_int, metavar="PIXELS", help="stored width and height (default: the source's)"
    )
    parser.add_argument(
        "--shard-size", type=positive_int, metavar="N", help="galaxies in a shard (default: by the size of the split)"
    )
    parser.add_argument(
        "--seed", type=non_negative_int, default=0, metavar="S", help="of the storage order (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=local_path, metavar="DIR", help="folder to write (default: shards/NAME/VARIANT in the data root)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace shards of another source or with other settings")
    parser.add_argument(
        "--on-error", choices=("raise", "skip"), default="raise", help="damaged images: skip leaves them out and lists them"
    )
    parser.add_argument(
        "--max-errors", type=non_negative_int, metavar="N", help="with --on-error skip: leave out so many at most (default: 100)"
    )
    add_workers(parser)
    add_data_dir(parser)
    parser.set_defaults(run=run_shard)


def quality(text: str) -> int:
    """An argparse type: a JPEG quality."""
    number = positive_int(text)
    if number > 100:
        raise argparse.ArgumentTypeError(f"{number} is more than 100")
    return number


def run_shard(arguments: argparse.Namespace) -> None:
    """Write the shards, unless they are there."""
    variants = VARIANTS if arguments.variant == "both" else (arguments.variant,)
    if arguments.out is not None and len(variants) > 1:
        raise UserError("--out names one folder, --variant=both writes two: leave --out away, or write one variant at a time")

    if arguments.max_errors is not None and arguments.on_error != "skip":
        raise UserError("--max-errors counts images that are left out: say --on-error skip as well")

    from galaxydist.paths import shards_dir
    from galaxydist.shards.writer.writer import write_shards
    from galaxydist.surveys.survey_sources import open_survey

    root = chosen_root(arguments)
    source = survey_source(arguments, root)
    for variant in variants:
        survey = open_survey(
            source,
            variant,
            conflicting=arguments.conflicting,
            name=_name(arguments, source),
            fold=arguments.fold,
            classes=arguments.classes,
            has_val=arguments.val is None,
        )
        out_dir = arguments.out or shards_dir(root, survey.name, variant, conflicting=arguments.conflicting)
        written_before = _written_at(out_dir)
        manifest = write_shards(
            survey,
            out_dir,
            encoding=arguments.encoding,
            quality=arguments.quality,
            image_size=arguments.image_size,
            shard_size=arguments.shard_size,
            seed=arguments.seed,
            workers=arguments.workers,
            overwrite=arguments.overwrite,
            max_errors=(100 if arguments.max_errors is None else arguments.max_errors) if arguments.on_error == "skip" else None,
        )
        counts = ", ".join(f"{name} {split.num_samples}" for name, split in manifest.splits.items())
        there = " (there already)" if written_before == _written_at(out_dir) else ""
        print(f"shards of {manifest.dataset}, {manifest.variant} ({counts}): {manifest.path}{there}")
        _say_more(survey, manifest, arguments)


def _say_more(survey: "Survey", manifest: "Manifest", arguments: argparse.Namespace) -> None:
    """Say what of the images and classes a user should know before training."""
    from galaxydist.shards.verify import describe_equal_images
    from galaxydist.shards.writer.damaged import LEFT_OUT_NAME, count_left_out
    from galaxydist.surveys.folder_scan import mirrored_classes
    from galaxydist.surveys.image_folder import FolderSurvey

    if left_out := count_left_out(manifest.dir):
        print(f"left out as damaged: {left_out}, listed in {manifest.dir / LEFT_OUT_NAME}")
    if isinstance(survey, FolderSurvey) and arguments.encoding == "jpeg":
        _say_lossy(survey, arguments.quality)
    for line in describe_equal_images(manifest):
        print(line)
    if mirrored := mirrored_classes(manifest.class_names):
        print(
            f"the classes {', '.join(mirrored)} are mirror images of one another: train with data.augment.flip=false, without "
            "d4_cnn and without eval.tta=d4, which take them for one"
        )


def _say_lossy(survey: "FolderSurvey", quality: int) -> None:
    """Say which images lose something as JPEG."""
    endings = Counter(Path(file).suffix.lower() for file in survey.files)
    lossless = {ending: count for ending, count in sorted(endings.items()) if ending in LOSSLESS}
    if lossless:
        numbers = ", ".join(f"{count} {ending}" for ending, count in lossless.items())
        print(f"{numbers} are stored as JPEG of quality {quality}; --encoding png keeps every pixel as it is")


def _written_at(folder: Path) -> int | None:
    from galaxydist.shards.manifest import MANIFEST_NAME

    path = folder / MANIFEST_NAME
    return path.stat().st_mtime_ns if path.is_file() else None


def _name(arguments: argparse.Namespace, source: Path) -> str | None:
    """The data set's name; a fold has the fold in its name, since it is another data set than the whole."""
    if arguments.fold is None:
        name: str | None = arguments.name
        return name
    from galaxydist.surveys.folder_scan import fold_name

    if arguments.name is not None:
        base = arguments.name
    else:
        from galaxydist.surveys.survey_sources import open_survey

        base = open_survey(source, classes=arguments.classes).name
    return fold_name(base, *arguments.fold)


# ``galaxydist data simulate``: a simulated survey in Galaxy10's schema.

DEFAULT_GALAXIES = 3000


def add_simulate(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "simulate",
        help="make a simulated survey",
        description="Draw a simulated survey in Galaxy10's schema. The same number and seed give the same bytes.",
        allow_abbrev=False,
    )
    parser.add_argument("--num-galaxies", type=positive_int, default=DEFAULT_GALAXIES, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=non_negative_int, default=0, metavar="S", help="default: %(default)s")
    parser.add_argument("--balanced", action="store_true", help="equally many of each class, not Galaxy10's proportions")
    parser.add_argument(
        "--out", type=local_path, metavar="FILE", help="HDF5 file to write (default: hdf5/simulated.h5 in the data root)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is another survey")
    add_workers(parser)
    add_data_dir(parser)
    parser.set_defaults(run=run_simulate)


def run_simulate(arguments: argparse.Namespace) -> None:
    """Draw the survey, unless it is there."""
    from galaxydist.paths import hdf5_path

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
    """How the file differs from the survey that is asked for; empty where it is that survey."""
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


# ``galaxydist data check``: whether shards are what their manifests say, byte by byte and image by image.


def add_check(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "check",
        help="verify shards",
        description="Verify counts, checksums and labels and decode every image; name the shard and galaxy that is wrong.",
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
    parser.set_defaults(run=run_check)


def run_check(arguments: argparse.Namespace) -> None:
    """Check every manifest; all problems come together."""
    from galaxydist.paths import cache_dir
    from galaxydist.shards.remote.cache import CacheConfig
    from galaxydist.shards.verify import check_shards, describe_equal_images

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
            for line in describe_equal_images(manifest):
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


# ``galaxydist data explore``: what a data set looks like, on one page.

SAMPLE = 3000


def add_explore(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "explore",
        help="what a data set looks like, as a page",
        description="Count galaxies, look at a sample of their images, and write one HTML page that needs no network: "
        "examples, mean images, pixels, sizes, sky, duplicates, damage, and a map of the images.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "place",
        nargs="?",
        metavar="SOURCE",
        help="a data set of the data root, a shards' manifest.json (or its folder or URL), an HDF5 file in Galaxy10's schema, "
        "or a folder of images (default: --dataset)",
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
        help="galaxies whose images are read, the same number of each class as far as it goes (default: %(default)s)",
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
    parser.set_defaults(run=run_explore)


def run_explore(arguments: argparse.Namespace) -> None:
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
    print(f"images: {read} of {len(findings.population)} looked at; {len(findings.duplicates)} pairs look the same")
    for kind, number in findings.oddities.items():
        print(f"  {kind}: {number} of {chosen}")
    for problem in [*findings.looked.problems.values()][:5]:
        print(f"    {problem}")
    if near is not None:
        print(
            f"sky: {len(near.pairs_P2)} overlapping pairs among {int(findings.positions.known.sum())} positions, "
            f"{int(near.across_P.sum())} across splits; {int(near.two_labels_P.sum())} places with two labels"
        )
