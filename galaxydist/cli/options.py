"""Command parser, and options and argument types that several commands share."""

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from functools import partial
from glob import has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Any

from galaxydist.errors import UserError
from galaxydist.galaxy import SPLITS, check_not_margin
from galaxydist.paths import cache_dir, data_root, find_shards, hdf5_path
from galaxydist.recipe.model_names import TRUST_VARIABLE

if TYPE_CHECKING:
    from galaxydist.surveys.image_arrays import ArrayOptions
    from galaxydist.surveys.survey_sources import SourceOptions

# ``add_subparsers`` returns a private type of argparse.
Commands = Any

DATASETS = {
    "galaxy10_decals": "galaxydist data fetch",
    "simulated": "galaxydist data simulate",
}


# Columns of a table of images that an option may name.
COLUMN_KINDS = {
    "file": "image files: paths or URLs",
    "label": "classes: names or numbers",
    "id": "ids",
    "split": "splits: train, val, test",
    "ra": "right ascensions in degrees",
    "dec": "declinations in degrees",
}


class CommandParser(argparse.ArgumentParser):
    """Parser that accepts options between positional arguments and suggests the nearest name for an unknown one."""

    _is_intermixed = False

    def add_subparsers(self, **options: Any) -> Any:
        """Add subcommands; the command alone prints its help."""
        self.set_defaults(run=lambda _: self.print_help())
        return super().add_subparsers(**options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse; a command without subcommands accepts options anywhere and refuses unknown arguments."""
        if self._subparsers is not None or self._is_intermixed:
            return super().parse_known_args(args, namespace)
        if "" in (args or ()):
            self.error("an argument is empty: is a variable of the shell not set?")
        self._is_intermixed = True  # argparse's implementation calls this method for each of its two passes
        try:
            namespace, unknown = self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_intermixed = False
        if unknown:
            wrong = [text for text in unknown if text.startswith("-")] or unknown
            options = [text for action in self._actions for text in action.option_strings]
            names = [text.partition("=")[0] for text in wrong]
            self.error(f"unrecognized arguments: {' '.join(wrong)}{_suggestion(names, options)}")
        return namespace, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            choices = [str(choice) for choice in action.choices or ()]
            error.message += _suggestion([str(value)], [*choices, *_subcommands(action)])
            raise


class HelpFormatter(argparse.HelpFormatter):
    """Formatter that wraps a description, but leaves text of several lines (examples) as it is."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    help: str,
    *,
    description: str | None = None,
    epilog: str | None = None,
) -> argparse.ArgumentParser:
    """Add a command and return its parser.

    Args:
        commands: the result of ``add_subparsers``.
        name: the word on the command line.
        run: is called with the parsed arguments; may return an exit code.
        help: a fragment for the list of commands.
        description: sentences above the options (default: ``help`` as a sentence).
        epilog: examples below the options.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=description or f"{help[0].upper()}{help[1:]}.",
        epilog=epilog,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser


def add_group(commands: Commands, name: str, help: str) -> Commands:
    """Add a command that consists of subcommands, and return these."""
    return add_command(commands, name, lambda _: None, help).add_subparsers(metavar="COMMAND")


def _suggestion(names: Sequence[str], known: Sequence[str]) -> str:
    """Return ``; did you mean ...?`` with the nearest known names, or an empty text.

    The last word of a known name counts too, and a name that begins with the text is nearer than any other.
    """
    by_word = {word: text for text in known for word in (text.split()[-1], text)}
    found = {name: [word for word in by_word if len(name) > 3 and word.startswith(name)] for name in names}
    close = [by_word[word] for name in names for word in (found[name] or get_close_matches(name, list(by_word), n=1))[:1]]
    return f"; did you mean {' or '.join(dict.fromkeys(close))}?" if close else ""


def _subcommands(action: argparse.Action) -> list[str]:
    """Return names such as ``data shard``, if the choices of an argument are commands."""
    if not isinstance(action.choices, dict):
        return []
    return [
        f"{name} {inner}"
        for name, parser in action.choices.items()
        for nested in getattr(parser, "_actions", ())
        if isinstance(nested.choices, dict)
        for inner in nested.choices
    ]


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add ``recipe=NAME [key=value]``."""
    parser.add_argument("recipe", nargs="+", metavar="recipe=NAME [key=value]", help="recipe, and values that override it")


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add ``[key=value]``."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that override the recipe")


def add_data_dir(parser: argparse.ArgumentParser) -> None:
    """Add ``--data-dir``, the root of HDF5 files, shards, weights and caches."""
    parser.add_argument(
        "--data-dir", type=local_path, metavar="DIR", help="data root (default: $GALAXYDIST_DATA, then the user's cache folder)"
    )


def add_trust_code(parser: argparse.ArgumentParser) -> None:
    """Add ``--trust-code``, for runs whose model is a function of a module."""
    parser.add_argument(
        "--trust-code",
        action="store_true",
        help="import the module that a run's model.name names (package.module:function) and run its code "
        f"(also {TRUST_VARIABLE}=1)",
    )


def add_dataset(parser: argparse.ArgumentParser) -> None:
    """Add ``--dataset``, a survey in the data root."""
    parser.add_argument(
        "--dataset", choices=tuple(DATASETS), default="galaxy10_decals", help="survey in the data root (default: %(default)s)"
    )


def add_survey(parser: argparse.ArgumentParser) -> None:
    """Add ``--from`` and ``--classes``, a survey outside the data root, and the options of all its formats."""
    parser.add_argument(
        "--from",
        dest="source",
        type=path_or_url,
        metavar="PATH|URL",
        help="other survey: a folder of images, a table of images (CSV, Parquet, FITS), Parquet or HDF5 files with images "
        "(also hf://datasets/OWNER/NAME@REVISION), or WebDataset tars ('a/train-{000..009}.tar')",
    )
    parser.add_argument(
        "--classes",
        metavar="galaxy10|NAME,NAME,...|FILE",
        help="names of the classes 0, 1, ...: those of Galaxy10, a list, or a file of lines (default: the source's)",
    )
    add_table(parser)
    add_arrays(parser)


def add_unlabelled(parser: argparse.ArgumentParser, use: str) -> None:
    """Add ``--unlabelled``; ``use`` is the sense of galaxies without labels for the command."""
    parser.add_argument("--unlabelled", action="store_true", help=f"a table of galaxies without labels: {use}")


def add_table(parser: argparse.ArgumentParser, kinds: Iterable[str] = COLUMN_KINDS) -> None:
    """Add ``--images`` and the columns of a table of images, of these kinds."""
    group = parser.add_argument_group("tables", "columns are found by their usual names; `none` stands for no column")
    group.add_argument(
        "--images", metavar="ROOT", help="folder or URL that the table's file names start from (default: the table's folder)"
    )
    for kind in kinds:
        group.add_argument(f"--{kind}", dest=f"{kind}_column", metavar="COLUMN", help=f"column of {COLUMN_KINDS[kind]}")


def add_arrays(parser: argparse.ArgumentParser) -> None:
    """Add ``--image-column``, ``--bands``, ``--scale`` and ``--stretch`` of data that hold their images."""
    group = parser.add_argument_group("Parquet and HDF5 files with images, tars")
    group.add_argument(
        "--image-column",
        metavar="COLUMN",
        help="column or data set of the images (default: by its usual names); for tars their extension, like image.jpg",
    )
    group.add_argument("--bands", metavar="R,G,B", help="bands, by name or number from 0, for red, green and blue: --bands z,r,g")
    group.add_argument(
        "--scale",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="pixel values that become black (0) and white (255), for images of other than 8 bits",
    )
    group.add_argument(
        "--stretch", choices=("linear", "asinh"), help="between them: linear, or asinh (Lupton et al. 2004; default: linear)"
    )


def _array_options(arguments: argparse.Namespace) -> "ArrayOptions":
    """Return the choices for data that hold their images."""
    from galaxydist.surveys.image_arrays import ArrayOptions, PixelScaling

    if arguments.stretch is not None and arguments.scale is None:
        raise UserError(f"--stretch {arguments.stretch} needs the range of pixel values: give --scale LOW HIGH too")
    scaling = None
    if arguments.scale is not None:
        low, high = arguments.scale
        scaling = PixelScaling(low, high, arguments.stretch or "linear")
    bands = tuple(band.strip() for band in (arguments.bands or "").split(",") if band.strip())
    return ArrayOptions(arguments.image_column, bands, scaling)


def class_options(text: str | None) -> tuple[str | None, tuple[str, ...] | None]:
    """Return ``--classes`` as ``galaxy10`` or None, and as the names of a list or file or None.

    Raises:
        UserError: a single name that is no file, an empty file, or a name that occurs twice.
    """
    if text is None or text == "galaxy10":
        return text, None
    path = Path(text)
    if path.is_file():
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--classes {text}: the file cannot be read as text ({error})") from error
        names = [line.strip() for line in lines if line.strip()]
    else:
        names = [name.strip() for name in text.split(",")]
    if len(names) < 2 or not all(names) or len(set(names)) < len(names):
        raise UserError(
            f"--classes {text}: give galaxy10, two or more different names with commas between them, or a file with a name in "
            "each line"
        )
    return None, tuple(names)


def table_source(arguments: argparse.Namespace) -> "SourceOptions":
    """Return the options that ``add_survey``, or ``add_table`` and ``add_arrays``, added."""
    from galaxydist.surveys.survey_sources import SourceOptions
    from galaxydist.surveys.table_columns import ColumnNames

    return SourceOptions(
        arguments.images,
        ColumnNames(**{kind: getattr(arguments, f"{kind}_column", None) for kind in COLUMN_KINDS}),
        is_labelled=not getattr(arguments, "unlabelled", False),
        cache_dir=cache_dir(chosen_root(arguments)) / "images",
        arrays=_array_options(arguments),
        class_names=class_options(getattr(arguments, "classes", None))[1],
    )


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add ``--workers``, the number of processes."""
    parser.add_argument("--workers", type=positive_int, metavar="N", help="number of processes (default: one per core)")


def path_or_url(text: str) -> str | Path:
    """Parse a path on this machine, or keep a URL as it is."""
    return text if "://" in text else Path(text)


def local_path(text: str) -> Path:
    """Parse a path on this machine; a URL is refused, because as a path it would lose a slash."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is a URL, and this takes a path on this machine: copy the data here first")
    return Path(text)


def whole_number(text: str, *, least: int, most: float = math.inf) -> int:
    """Parse a whole number in a range."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if not least <= number <= most:
        limit = f"less than {least}" if number < least else f"more than {most}"
        raise argparse.ArgumentTypeError(f"{number} is {limit}")
    return number


positive_int = partial(whole_number, least=1)
non_negative_int = partial(whole_number, least=0)
port_number = partial(whole_number, least=1, most=65_535)


def positive_number(text: str) -> float:
    """Parse a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def evaluated_split(text: str) -> str:
    """Parse a split that a model may be evaluated on."""
    try:
        check_not_margin(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if text not in SPLITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no split; choose from {', '.join(SPLITS)}")
    return text


def fold(text: str) -> tuple[int, int]:
    """Parse ``K/N`` with K from 1 to N, as (K - 1, N)."""
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 2 <= int(count) <= 100 and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not K/N with N from 2 to 100 and K from 1 to N, like 1/3")
    return int(number) - 1, int(count)


def chosen_root(arguments: argparse.Namespace) -> Path:
    """Return the data root that the arguments and the environment name."""
    return data_root(arguments.data_dir, os.environ)


def find_manifests(text: str, root: Path, variant: str | None = None) -> list[str | Path]:
    """Return the manifests that the user names: a path or URL as it is, or those of a data set in the data root.

    Args:
        text: path, URL or name.
        root: the data root.
        variant: only this variant of a data set.

    Raises:
        UserError: there is neither such a path nor such a data set.
    """
    if "://" in text or Path(text).exists():
        return [text]
    known = find_shards(root)
    found = [path for path in known.get(text, []) if variant in (None, path.parent.name)]
    if not found:
        named = ", ".join(f"{name} ({', '.join(path.parent.name for path in paths)})" for name, paths in known.items()) or "none"
        raise UserError(
            f"{text}{f' ({variant})' if variant else ''}: there is no such path, and no shards of that name in {root / 'shards'} "
            f"(data sets there: {named}). Make them with `galaxydist data shard`, or give the path of a manifest"
        )
    return [*found]


def survey_source(arguments: argparse.Namespace, root: Path) -> str | Path:
    """Return the survey file or folder that the arguments name: ``--from``, else the survey in the data root.

    Raises:
        UserError: it does not exist; the text has the command that makes it.
    """
    if arguments.source is not None:
        source: str | Path = arguments.source
        is_there = (
            not isinstance(source, Path) or source.exists() or Path(str(source).partition("[")[0]).exists()
        )  # TABLE.fits[2]
        if not is_there and not ("{" in str(source) or has_magic(str(source))):  # a pattern of tars
            raise UserError(f"--from {source}: there is no such file or folder")
        return source
    path = hdf5_path(root, arguments.dataset)
    if not path.is_file():
        others = " (or use `--dataset simulated`, or `--from` for a file or folder of your own)"
        raise UserError(
            f"{arguments.dataset} is not in the data root: there is no {path}. Make it with `{DATASETS[arguments.dataset]}`"
            + (others if arguments.dataset != "simulated" else "")
        )
    return path


def known_model(name: str) -> str:
    """Return a model's name after a check of its form.

    Raises:
        UserError: there is no such model.
    """
    from galaxydist.recipe.model_names import parse_model_name

    try:
        parse_model_name(name)
    except ValueError as error:
        raise UserError(f"--model {name}: {error}") from None
    return name


def confirm(question: str, refusal: str) -> bool:
    """Ask a question on the terminal and return True for yes.

    Raises:
        UserError: standard input is not a terminal; the text is ``refusal``.
    """
    if not sys.stdin.isatty():
        raise UserError(refusal)
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
