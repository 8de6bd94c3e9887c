"""Options and types that several commands share."""

import argparse
import os
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from galaxydist.errors import UserError

if TYPE_CHECKING:
    from galaxydist.recipe.schema import ModelName  # its library takes a third of a second to import

# ``add_subparsers`` returns a private type of argparse.
Commands = Any


class CommandParser(argparse.ArgumentParser):
    """A parser for commands: options may stand between the positional arguments, and a wrong name gets the nearest right one."""

    _is_intermixed = False

    def add_subparsers(self, **options: Any) -> Any:
        """Add subcommands; without one of them the command prints its help."""
        self.set_defaults(run=lambda _: self.print_help())
        return super().add_subparsers(**options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse; a command without subcommands takes its options anywhere and refuses arguments that it does not know."""
        if self._subparsers is not None or self._is_intermixed:
            return super().parse_known_args(args, namespace)
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


def _suggestion(names: Sequence[str], known: Sequence[str]) -> str:
    """``; did you mean ...?`` with what is nearest to any of the names, or nothing. The last word of a known name counts too."""
    by_word = {word: text for text in known for word in (text.split()[-1], text)}
    close = [by_word[word] for name in names for word in get_close_matches(name, list(by_word), n=1)]
    return f"; did you mean {' or '.join(dict.fromkeys(close))}?" if close else ""


def _subcommands(action: argparse.Action) -> list[str]:
    """``data shard`` and the like, where the choices of an argument are commands."""
    if not isinstance(action.choices, dict):
        return []
    return [
        f"{name} {inner}"
        for name, parser in action.choices.items()
        for nested in getattr(parser, "_actions", ())
        if isinstance(nested.choices, dict)
        for inner in nested.choices
    ]


DATASETS = {
    "galaxy10_decals": "galaxydist data fetch",
    "simulated": "galaxydist data simulate",
}


def local_path(text: str) -> Path:
    """An argparse type: a path on this machine. A URL is none: as a path it would lose a slash."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is a URL, and this takes a path on this machine: copy the data here first")
    return Path(text)


def add_data_dir(parser: argparse.ArgumentParser) -> None:
    """``--data-dir``: the root of HDF5 files, shards, weights and caches."""
    parser.add_argument(
        "--data-dir", type=local_path, metavar="DIR", help="data root (else $GALAXYDIST_DATA, else the user's cache folder)"
    )


def add_dataset(parser: argparse.ArgumentParser) -> None:
    """``--dataset``: one of the surveys that lie under the data root."""
    parser.add_argument(
        "--dataset",
        choices=tuple(DATASETS),
        default="galaxy10_decals",
        help="which survey of the data root (default: %(default)s)",
    )


def add_survey(parser: argparse.ArgumentParser) -> None:
    """``--from`` and ``--classes``: a survey that lies elsewhere than under the data root."""
    parser.add_argument(
        "--from", dest="source", type=local_path, metavar="PATH", help="an HDF5 file in Galaxy10's schema or a folder of images"
    )
    parser.add_argument(
        "--classes",
        choices=("galaxy10",),
        help="the folder's classes, named 0 to 9, are Galaxy10's labels (default: other classes)",
    )


def add_workers(parser: argparse.ArgumentParser) -> None:
    """``--workers``: processes."""
    parser.add_argument("--workers", type=positive_int, metavar="N", help="processes (default: one a core)")


def chosen_root(arguments: argparse.Namespace) -> Path:
    """The data root that the arguments and the environment name."""
    from galaxydist.paths import data_root

    return data_root(arguments.data_dir, os.environ)


def find_manifests(text: str, root: Path, variant: str | None = None) -> list[str | Path]:
    """The shards that a user means: a path or URL as it is, or those of a data set of that name under the data root.

    Args:
        text: the user's word.
        root: the data root.
        variant: of a data set only this variant.

    Raises:
        UserError: there is neither such a path nor such a data set.
    """
    from galaxydist.paths import find_shards

    if "://" in text or Path(text).exists():
        return [text]
    there = find_shards(root)
    found = [path for path in there.get(text, []) if variant in (None, path.parent.name)]
    if not found:
        named = ", ".join(f"{name} ({', '.join(path.parent.name for path in paths)})" for name, paths in there.items()) or "none"
        raise UserError(
            f"{text}{f' ({variant})' if variant else ''}: there is no such path, and no shards of that name in {root / 'shards'} "
            f"(data sets there: {named}). Make them with `galaxydist data shard`, or give the path of a manifest"
        )
    return [*found]


def positive_int(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    return _whole_number(text, 1)


def non_negative_int(text: str) -> int:
    """An argparse type: a whole number of at least 0."""
    return _whole_number(text, 0)


def fold(text: str) -> tuple[int, int]:
    """An argparse type: ``K/N`` with K from 1 to N, as (K - 1, N)."""
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 2 <= int(count) <= 100 and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not K/N with N from 2 to 100 and K from 1 to N, like 1/3")
    return int(number) - 1, int(count)


def _whole_number(text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if number < least:
        raise argparse.ArgumentTypeError(f"{number} is less than {least}")
    return number


def survey_source(arguments: argparse.Namespace, root: Path) -> Path:
    """The survey file or folder that the arguments name: ``--from``, else the chosen survey of the data root.

    Raises:
        UserError: it is not there; names the command that makes it.
    """
    from galaxydist.paths import hdf5_path

    if arguments.source is not None:
        source: Path = arguments.source
        if not source.exists():
            raise UserError(f"--from {source}: there is no such file or folder")
        return source
    path = hdf5_path(root, arguments.dataset)
    if not path.is_file():
        raise UserError(
            f"{arguments.dataset} is not under the data root: there is no {path}. Make it with `{DATASETS[arguments.dataset]}`"
            + (
                " (or use `--dataset simulated`, or `--from` for a file or folder of your own)"
                if arguments.dataset != "simulated"
                else ""
            )
        )
    return path


def known_model(name: str) -> "ModelName":
    """A model's name, checked.

    Raises:
        UserError: there is none of that name.
    """
    from typing import get_args

    from galaxydist.recipe.schema import ModelName

    if name not in get_args(ModelName):
        raise UserError(f"--model {name}: there is no such model; there are {', '.join(get_args(ModelName))}")
    return cast("ModelName", name)
