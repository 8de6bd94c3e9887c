"""``galaxydist gallery``: a run's most confident mistakes and least certain galaxies, and where its model looks."""

import argparse
import os

from galaxydist.cli import run_target
from galaxydist.cli.options import Commands, add_data_dir, local_path, positive_int
from galaxydist.errors import UserError

EPILOG = """examples:
  galaxydist evaluate runs/vit-0123abcd                             first: its predictions
  galaxydist gallery runs/vit-0123abcd                              then: evaluation/test-gallery.html in the run folder
  galaxydist gallery recipe=vit seed=1                              a run by its recipe
  galaxydist gallery runs/vit-0123abcd data.variant=balanced        of the evaluation on another data set
"""
# Of each class and kind: more make a page that nobody reads to its end.
MOST = 50


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "gallery",
        help="a run's mistakes and uncertain galaxies, with what its model looked at",
        description="Show of each class the most confident mistakes and the least certain galaxies of an evaluation, with "
        "saliency over them: Grad-CAM of convolutional networks, attention rollout of vision transformers. Writes one page, two "
        "sheets and a JSON file beside the predictions.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("target", nargs="+", metavar="RUN", help=run_target.HELP)
    parser.add_argument("--split", choices=("train", "val", "test"), default="test", help="default: %(default)s")
    parser.add_argument("--tta", choices=("none", "d4"), help="which evaluation (default: the recipe's)")
    parser.add_argument(
        "--per-class", type=positive_int, default=4, metavar="N", help=f"galaxies of a class and kind, up to {MOST} (default: 4)"
    )
    parser.add_argument("--manifest", metavar="FILE", help="path or URL of the manifest that it was evaluated on")
    parser.add_argument("-o", "--out", type=local_path, metavar="FILE", help="the page (default: beside the predictions)")
    add_data_dir(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Write the gallery and say where it is."""
    if arguments.per_class > MOST:
        raise UserError(f"--per-class {arguments.per_class}: a gallery has {MOST} galaxies of a class at most")
    if arguments.out is not None and arguments.out.is_dir():
        raise UserError(f"--out {arguments.out} is a folder: give the page a name, like {arguments.out / 'gallery.html'}")
    target = run_target.read_target(arguments.target, arguments.manifest)

    from galaxydist.cpus import available_cores
    from galaxydist.gallery.gallery import make_gallery

    page, picks = make_gallery(
        target.run_dir,
        arguments.split,
        os.environ,
        per_class=arguments.per_class,
        page=arguments.out,
        manifest_path=target.manifest,
        variant=target.variant,
        data_dir=arguments.data_dir,
        tta=arguments.tta,
        threads=available_cores(),
    )
    shown = sum(map(len, picks.confident)), sum(map(len, picks.uncertain))
    print(
        f"{shown[0]} of {sum(picks.num_mistakes):,} mistakes and the {shown[1]} least certain of {sum(picks.num_galaxies):,} "
        f"galaxies: {page}"
    )
    if picks.num_undefined:
        print(f"left out: {picks.num_undefined:,} galaxies without finite probabilities")
