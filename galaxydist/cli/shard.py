"""``galaxydist data shard``: shards from a survey file or a folder of pictures."""

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from galaxydist.cli.options import (
    Commands,
    add_data_dir,
    add_dataset,
    add_survey,
    add_workers,
    chosen_root,
    fold,
    local_path,
    non_negative_int,
    positive_int,
    survey_source,
)
from galaxydist.errors import UserError
from galaxydist.galaxy import VARIANTS

if TYPE_CHECKING:
    from galaxydist.galaxy import Survey
    from galaxydist.shards.manifest import Manifest
    from galaxydist.surveys.image_folder import FolderSurvey

# Endings of pictures without loss.
LOSSLESS = {".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"}


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "shard",
        help="survey file or folder of pictures to shards",
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
        "--on-error", choices=("raise", "skip"), default="raise", help="damaged pictures: skip leaves them out and lists them"
    )
    parser.add_argument(
        "--max-errors", type=non_negative_int, metavar="N", help="with --on-error skip: leave out so many at most (default: 100)"
    )
    add_workers(parser)
    add_data_dir(parser)
    parser.set_defaults(run=run)


def quality(text: str) -> int:
    """An argparse type: a JPEG quality."""
    number = positive_int(text)
    if number > 100:
        raise argparse.ArgumentTypeError(f"{number} is more than 100")
    return number


def run(arguments: argparse.Namespace) -> None:
    """Write the shards, unless they are there."""
    variants = VARIANTS if arguments.variant == "both" else (arguments.variant,)
    if arguments.out is not None and len(variants) > 1:
        raise UserError("--out names one folder, --variant=both writes two: leave --out away, or write one variant at a time")

    if arguments.max_errors is not None and arguments.on_error != "skip":
        raise UserError("--max-errors counts pictures that are left out: say --on-error skip as well")

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
    """Say what of the pictures and classes a user should know before training."""
    from galaxydist.shards.verify import describe_equal_pictures
    from galaxydist.shards.writer.damaged import LEFT_OUT_NAME, count_left_out
    from galaxydist.surveys.folder_scan import mirrored_classes
    from galaxydist.surveys.image_folder import FolderSurvey

    if left_out := count_left_out(manifest.dir):
        print(f"left out as damaged: {left_out}, listed in {manifest.dir / LEFT_OUT_NAME}")
    if isinstance(survey, FolderSurvey) and arguments.encoding == "jpeg":
        _say_lossy(survey, arguments.quality)
    for line in describe_equal_pictures(manifest):
        print(line)
    if mirrored := mirrored_classes(manifest.class_names):
        print(
            f"the classes {', '.join(mirrored)} are mirror images of one another: train with data.augment.flip=false, without "
            "d4_cnn and without eval.tta=d4, which take them for one"
        )


def _say_lossy(survey: "FolderSurvey", quality: int) -> None:
    """Say which pictures lose something as JPEG."""
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
