"""``galaxydist data shard``: surveys, image folders and tables of images to shards."""

import argparse
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from galaxydist.cli.options import (
    Commands,
    add_command,
    add_data_dir,
    add_dataset,
    add_survey,
    add_unlabelled,
    add_workers,
    chosen_root,
    class_options,
    fold,
    local_path,
    non_negative_int,
    positive_int,
    survey_source,
    table_source,
    whole_number,
)
from galaxydist.errors import UserError
from galaxydist.galaxy import MARGIN, VARIANTS
from galaxydist.paths import shards_dir

if TYPE_CHECKING:
    from galaxydist.galaxy import Survey
    from galaxydist.shards.manifest import Manifest
    from galaxydist.surveys.data_origin import DataOrigin
    from galaxydist.surveys.tables.tar_scan import TarPatterns

# File names of images that are compressed without loss.
LOSSLESS = {".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"}

# Value of --val for no validation split, and the default of --quality.
NO_VAL, QUALITY = "0", 95

quality = partial(whole_number, least=1, most=100)
image_side = partial(whole_number, least=1, most=4096)


def add_shard(commands: Commands) -> None:
    parser = add_command(
        commands,
        "shard",
        run_shard,
        "write a survey as shards",
        description="Write a survey as shards (plain WebDataset tars) with a manifest, ready for training.",
    )
    add_dataset(parser)
    add_survey(parser)
    add_unlabelled(parser, "for `galaxydist predict`, not for training")
    parser.add_argument("--name", help="name of the data set, for data.dataset=NAME (default: the survey's own)")
    parser.add_argument(
        "--variant", choices=(*VARIANTS, "both"), default="original", help="variant of the survey (default: %(default)s)"
    )
    parser.add_argument(
        "--conflicting",
        choices=("keep", "drop"),
        default="keep",
        help="galaxies that the survey lists twice with different labels (default: %(default)s)",
    )
    parser.add_argument(
        "--fold", type=fold, metavar="K/N", help="fold K of an N-fold cross-validation: train and test split, no validation split"
    )
    parser.add_argument(
        "--val", metavar="0|PATTERN", help="0: no validation split, its galaxies stay in the training split; or tars (see below)"
    )
    _add_storage(parser)
    _add_tars(parser)
    _add_origin(parser)
    add_workers(parser)
    add_data_dir(parser)


def _add_storage(parser: argparse.ArgumentParser) -> None:
    """Add the options for the files to write."""
    parser.add_argument(
        "--encoding", choices=("jpeg", "png", "raw"), default="jpeg", help="encoding of images (default: %(default)s)"
    )
    parser.add_argument(
        "--quality",
        type=quality,
        default=QUALITY,
        metavar="Q",
        help="JPEG quality, 1 to 100 (default: %(default)s)",
    )
    parser.add_argument("--image-size", type=image_side, metavar="PIXELS", help="stored width and height (default: the survey's)")
    parser.add_argument(
        "--shard-size", type=positive_int, metavar="N", help="galaxies per shard (default: from the size of the split)"
    )
    parser.add_argument(
        "--seed", type=non_negative_int, default=0, metavar="S", help="seed of the storage order (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=local_path, metavar="DIR", help="folder to write (default: shards/NAME/VARIANT in the data root)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace shards of another survey or with other settings")
    parser.add_argument(
        "--on-error",
        choices=("raise", "skip"),
        default="raise",
        help="damaged images: raise stops, skip leaves them out and lists them (default: %(default)s)",
    )
    parser.add_argument(
        "--max-errors",
        type=non_negative_int,
        metavar="N",
        help="with --on-error skip: largest number to leave out (default: 100)",
    )


def _add_origin(parser: argparse.ArgumentParser) -> None:
    """Add the options for licence and source of the data, kept in the manifest and shown by runs and reports."""
    group = parser.add_argument_group("origin", "of data that do not state it themselves and are not known by name")
    group.add_argument("--licence", "--license", metavar="TEXT", help="licence of the data, like CC-BY-4.0")
    group.add_argument("--citation", metavar="TEXT", help="works to cite, as text or BibTeX")
    group.add_argument("--revision", metavar="TEXT", help="version of the source: a data release, a commit")


def _add_tars(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tars", "WebDataset tars that others wrote: a folder, or a pattern with braces or *")
    for split in ("train", "test"):
        group.add_argument(f"--{split}", metavar="PATTERN", help=f"tars of the {split} split, instead of --from (--val likewise)")
    group.add_argument(
        "--in-place", action="store_true", help="leave the tars where they are, and write an index of them (--out DIR)"
    )
    group.add_argument(
        "--sha256",
        action="store_true",
        help="with --in-place: read all of remote tars, too, for checksums and image hashes",
    )


def run_shard(arguments: argparse.Namespace) -> None:
    """Write the shards, unless they exist."""
    variants = VARIANTS if arguments.variant == "both" else (arguments.variant,)
    if arguments.out is not None and len(variants) > 1:
        raise UserError("--out names one folder, --variant=both writes two: omit --out, or write one variant at a time")

    if arguments.max_errors is not None and arguments.on_error != "skip":
        raise UserError("--max-errors is the number of images to leave out: add --on-error skip")
    if arguments.unlabelled and arguments.classes is not None:
        raise UserError(f"--unlabelled and --classes {arguments.classes}: galaxies without labels have no classes; leave one out")

    from galaxydist.shards.writer.writer import write_shards
    from galaxydist.surveys.data_origin import state_origin
    from galaxydist.surveys.survey_sources import open_survey

    origin = state_origin(arguments.licence, arguments.citation, arguments.revision)
    root = chosen_root(arguments)
    source = _tar_patterns(arguments) or survey_source(arguments, root)
    if arguments.in_place:
        for variant in variants:
            _index_tars(arguments, root, source, variant, origin)
        return
    if arguments.sha256:
        raise UserError("--sha256 is for tars that are indexed: add --in-place, or leave it out")
    for variant in variants:
        survey = open_survey(
            source,
            variant,
            conflicting=arguments.conflicting,
            name=_name(arguments, source),
            fold=arguments.fold,
            classes=class_options(arguments.classes)[0],
            has_val=arguments.val != NO_VAL,
            source=table_source(arguments),
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
            max_errors=_max_errors(arguments),
            origin=origin,
        )
        _print_result("shards", manifest, written_before)
        if arguments.encoding == "jpeg":
            _print_lossy(survey, arguments.quality)
        _print_notes(manifest)


def _tar_patterns(arguments: argparse.Namespace) -> "TarPatterns | None":
    """Return the patterns of ``--train``, ``--val`` and ``--test``; None without any."""
    val = None if arguments.val == NO_VAL else arguments.val
    patterns = {"train": arguments.train, "val": val, "test": arguments.test}
    given: dict[str | None, str] = {split: text for split, text in patterns.items() if text is not None}
    if not given:
        return None
    if "train" not in given:
        named = " and ".join(f"--{split}" for split in given)
        raise UserError(f"{named} without --train: give the tars of each split, or --val 0 for no validation split")
    if arguments.source is not None:
        raise UserError(f"--from {arguments.source} and --train {arguments.train}: give one of them")
    return given


def _index_tars(
    arguments: argparse.Namespace, root: Path, source: "str | Path | TarPatterns", variant: str, origin: "DataOrigin | None"
) -> None:
    """Index tars in place, unless the index exists."""
    from galaxydist.shards.tar_index import IndexOptions, index_tars
    from galaxydist.surveys.survey_sources import check_tar_options, table_options
    from galaxydist.surveys.tables.tar_scan import find_tars, names_tars, tars_name

    given = table_source(arguments)
    if isinstance(source, str | Path) and not names_tars(source):
        raise UserError(f"--in-place is for tars, and {source} is something else: leave it out, so that shards are written")
    if arguments.encoding != "jpeg" or arguments.quality != QUALITY or arguments.shard_size is not None:
        raise UserError("--encoding, --quality and --shard-size are for shards that are written: leave them out with --in-place")
    check_tar_options(given)
    locations = find_tars({None: str(source)} if isinstance(source, str | Path) else source)
    table = table_options(
        given,
        variant,
        conflicting=arguments.conflicting,
        name=_name(arguments, source) or tars_name(locations),
        fold=arguments.fold,
        classes=class_options(arguments.classes)[0],
        has_val=arguments.val != NO_VAL,
    )
    out_dir = arguments.out or shards_dir(root, table.name, variant, conflicting=arguments.conflicting)
    written_before = _written_at(out_dir)
    options = IndexOptions(
        given.arrays.column, arguments.image_size, arguments.sha256, _max_errors(arguments), arguments.overwrite
    )
    manifest = index_tars(locations, out_dir, table, options, origin)
    _print_result("index of tars", manifest, written_before)
    _print_notes(manifest)


def _max_errors(arguments: argparse.Namespace) -> int | None:
    most: int = 100 if arguments.max_errors is None else arguments.max_errors
    return most if arguments.on_error == "skip" else None


def _print_result(what: str, manifest: "Manifest", written_before: int | None) -> None:
    counts = ", ".join(f"{name} {split.num_samples}" for name, split in manifest.splits.items())
    note = " (there already)" if written_before == _written_at(manifest.dir) else ""
    print(f"{what} of {manifest.dataset}, {manifest.variant} ({counts}): {manifest.path}{note}")


def _print_notes(manifest: "Manifest") -> None:
    """Print facts about the images and classes that matter for training."""
    from galaxydist.shards.verify import describe_equal_images
    from galaxydist.shards.writer.damaged import LEFT_OUT_NAME, count_left_out
    from galaxydist.surveys.folder_scan import mirrored_classes

    if left_out := count_left_out(manifest.dir):
        print(f"left out: {left_out}, listed in {manifest.dir / LEFT_OUT_NAME}")
    if MARGIN in manifest.splits:
        number = manifest.splits[MARGIN].num_samples
        print(f"margin: {number} galaxies beside another split's part of the sky; no model is trained or evaluated on them")
    if manifest.origin is not None and manifest.origin.licence is not None:
        print(f"licence: {manifest.origin.describe()['licence']}")
    for line in describe_equal_images(manifest):
        print(line)
    if mirrored := mirrored_classes(manifest.class_names):
        print(
            f"the classes {', '.join(mirrored)} are mirror images of one another: train with data.augment.flip=false, without "
            "d4_cnn and without eval.tta=d4, which cannot tell them apart"
        )


def _print_lossy(survey: "Survey", quality: int) -> None:
    """Print the number of lossless images that are stored as JPEG."""
    files = getattr(getattr(survey, "images", None), "files", ())
    endings = Counter(Path(file).suffix.lower() for file in files)
    lossless = {ending: count for ending, count in sorted(endings.items()) if ending in LOSSLESS}
    if lossless:
        numbers = ", ".join(f"{count} {ending}" for ending, count in lossless.items())
        print(f"{numbers} are stored as JPEG of quality {quality}; --encoding png keeps every pixel")


def _written_at(folder: Path) -> int | None:
    from galaxydist.shards.manifest import MANIFEST_NAME

    path = folder / MANIFEST_NAME
    return path.stat().st_mtime_ns if path.is_file() else None


def _name(arguments: argparse.Namespace, source: "str | Path | TarPatterns") -> str | None:
    """Return the name of the data set, which includes the fold: a fold is another data set than the whole."""
    name: str | None = arguments.name
    if arguments.fold is None:
        return name
    from galaxydist.surveys.folder_scan import fold_name
    from galaxydist.surveys.survey_sources import survey_name

    classes = class_options(arguments.classes)[0]
    return fold_name(name or survey_name(source, classes=classes, source=table_source(arguments)), *arguments.fold)
