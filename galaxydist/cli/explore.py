"""``galaxydist data explore``: galaxies by class and split, a gallery and pixel statistics."""

import argparse
from pathlib import Path

from galaxydist.cli.options import Commands, add_data_dir, add_dataset, chosen_root, non_negative_int, positive_int, survey_source


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "explore",
        help="pictures and figures of a data set",
        description="Count galaxies by class and split, measure a sample's pixels and draw a gallery of every class.",
        allow_abbrev=False,
    )
    add_dataset(parser)
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="PATH", help="an HDF5 file in Galaxy10's schema or a folder of pictures"
    )
    parser.add_argument("--variant", choices=("original", "balanced"), default="original", help="default: %(default)s")
    parser.add_argument(
        "--per-class", type=positive_int, default=8, metavar="N", help="galaxies of a class in the gallery (default: 8)"
    )
    parser.add_argument("--seed", type=non_negative_int, default=0, metavar="S", help="of the choice of galaxies (default: 0)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: explore/NAME/VARIANT in the data root)")
    add_data_dir(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Explore the survey, print its counts and say where the pictures are."""
    from galaxydist.evaluation.explore import explore_survey
    from galaxydist.surveys.open import open_survey

    root = chosen_root(arguments)
    survey = open_survey(survey_source(arguments, root), arguments.variant)
    out_dir = arguments.out or root / "explore" / survey.name / survey.variant
    found = explore_survey(survey, out_dir, per_class=arguments.per_class, seed=arguments.seed)
    width = max(map(len, found.class_names))
    print(f"{found.dataset}, {found.variant}")
    print("  ".join([f"{'class':{width}}", *(f"{split:>6}" for split in found.counts), "mean R G B       "]))
    for label, name in enumerate(found.class_names):
        numbers = [f"{counts[label]:6d}" for counts in found.counts.values()]
        mean = " ".join(f"{value:.3f}" for value in found.pixels[name]["mean"]) if name in found.pixels else "-"
        print("  ".join([f"{name:{width}}", *numbers, mean]))
    print("  ".join([f"{'all':{width}}", *(f"{sum(counts):6d}" for counts in found.counts.values())]))
    print(f"gallery, counts and pixel statistics: {out_dir}")
