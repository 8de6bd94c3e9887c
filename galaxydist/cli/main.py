"""The ``galaxydist`` command: its subcommands, error messages and exit codes.

Exit codes: 0 finished, 2 bad input (one message, no traceback), 130 interrupted with Ctrl-C, 141 standard output was closed,
those of a training run for ``train`` (see ``train.py``), 1 anything else. Command modules import heavy libraries only when their
command runs, so that ``--help`` answers at once. Shell completion uses argcomplete: the shell calls galaxydist with
``_ARGCOMPLETE`` set, and the parser answers with the possible words.
"""

import argparse
import errno
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from galaxydist.atomic_files import NO_SPACE
from galaxydist.cli import bench, cluster, data, encoders, evaluate, jobs, predict, recipes, share, track, train
from galaxydist.cli.options import CommandParser, Commands, HelpFormatter, add_command
from galaxydist.cpus import set_up_process
from galaxydist.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, UserError
from galaxydist.log import set_up_logging
from galaxydist.recipe.model_names import NAMED_MODELS, TRUST_VARIABLE
from galaxydist.version import __version__

EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE, as a shell reports it
# A file in place of a folder, or a folder in place of a file.
IN_THE_WAY = {errno.ENOTDIR, errno.EEXIST, errno.EISDIR}
# A name that is too long, or links that lead in a circle.
NO_PATH = {errno.ENAMETOOLONG, errno.ELOOP}

EPILOG = """examples:
  galaxydist data simulate                   make a simulated survey in Galaxy10's schema
  galaxydist data fetch                      download the real Galaxy10 DECaLS (2.5 GB)
  galaxydist data shard                      write the real survey as shards, ready for training
  accelerate launch launch.py recipe=vit     train (key=value changes a recipe key, see `galaxydist recipes vit`)
  galaxydist evaluate runs/vit-0123abcd      evaluate a run on the test split
  galaxydist report runs                     compare many runs: the results matrix as a page and as tables

Data is stored in --data-dir, else $GALAXYDIST_DATA, else the user's cache folder.
"""
COMPLETION_EPILOG = """to turn it on in this shell, and in all shells:
  eval "$(galaxydist completion bash)"
  echo 'eval "$(galaxydist completion bash)"' >> ~/.bashrc
  galaxydist completion fish > ~/.config/fish/completions/galaxydist.fish
"""


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands; each sets ``run``, a function of the parsed arguments that may return an exit code."""
    parser = CommandParser(
        "galaxydist",
        description="Distributed training for galaxy morphology: data, training, evaluation.",
        epilog=EPILOG,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"galaxydist {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND")
    for add_parser in (
        data.add_parser,
        recipes.add_weights,
        recipes.add_recipes,
        train.add_parser,
        evaluate.add_evaluate,
        predict.add_predict,
        share.add_publish,
        share.add_app,
        evaluate.add_gallery,
        evaluate.add_report,
        encoders.add_probe,
        cluster.add_plan,
        jobs.add_submit,
        jobs.add_sweep,
        jobs.add_status,
        jobs.add_cost,
        track.add_parser,
        track.add_dashboard,
        cluster.add_cluster,
        cluster.add_doctor,
        bench.add_parser,
        add_completion,
    ):
        add_parser(commands)
    return parser


def add_completion(commands: Commands) -> None:
    """Add the command."""
    description = "Print the shell code that completes commands, options, recipes, clusters, keys and run folders."
    parser = add_command(
        commands, "completion", print_completion, "shell completion", description=description, epilog=COMPLETION_EPILOG
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), metavar="bash|zsh|fish", help="name of the shell")


def print_completion(arguments: argparse.Namespace) -> None:
    """Print the shell code."""
    from argcomplete.shell_integration import shellcode

    print(shellcode(["galaxydist"], shell=arguments.shell))


def complete(parser: argparse.ArgumentParser) -> None:
    """Print the completions that the shell asks for, and end the process."""
    import argcomplete

    completer: Any = _complete_word
    argcomplete.autocomplete(parser, always_complete_options="long", default_completer=completer, append_space=False)


def _complete_word(prefix: str, action: argparse.Action, **_: Any) -> list[str]:
    """Return the completions of one word: ``key=value`` for commands that take such arguments, else files."""
    from argcomplete.completers import FilesCompleter

    metavar = str(action.metavar or "")
    if "=" not in metavar:
        files: list[str] = FilesCompleter()(prefix)
        return files
    return [word for word in _settings(prefix, with_cluster="cluster" in metavar) if word.startswith(prefix)]


def _settings(prefix: str, *, with_cluster: bool) -> Iterator[str]:
    """Yield ``key=`` for the beginning of a key, and ``key=value`` for a complete key."""
    from galaxydist.recipe.fields import RECIPE
    from galaxydist.recipe.resolve import list_recipes

    key, equals, _ = prefix.partition("=")
    if not equals:
        yield from ("recipe=", "profile=", *(["cluster="] if with_cluster else []))
        yield from (f"{name}=" for name in RECIPE.fields if name != "name")
    elif key == "recipe":
        yield from (f"recipe={name}" for name in list_recipes())
    elif key == "cluster" and with_cluster:
        from galaxydist.cluster.profile import list_clusters

        yield from (f"cluster={name}" for name in list_clusters())
    elif (field := RECIPE.fields.get(key)) is not None:
        choices: tuple[str, ...] = ("true", "false") if field.annotation is bool else ()
        if get_origin(field.annotation) is Literal:
            choices = tuple(map(str, get_args(field.annotation)))
        if key == "model.name":
            choices = NAMED_MODELS
        yield from (f"{key}={choice}" for choice in choices)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    set_up_logging()
    try:
        set_up_process(os.environ)
        parser = build_parser()
        if "_ARGCOMPLETE" in os.environ:  # a shell requests completions
            complete(parser)
        words = sys.argv[1:] if arguments is None else arguments
        parsed = parser.parse_args(words)
        parsed.command = shlex.join(["galaxydist", *words])  # for the provenance of pages
        with _trust(getattr(parsed, "trust_code", False)):
            code: int | None = parsed.run(parsed)
        sys.stdout.flush()
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        if arguments is None:  # a second Ctrl-C would break Python's own end, which would wait for worker processes forever
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("galaxydist: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _discard_unwritable_output()
        return EXIT_BROKEN_PIPE
    except OSError as error:
        _discard_unwritable_output()
        if (text := _explain(error)) is None:
            raise
        return _fail(text)
    return code or 0


@contextmanager
def _trust(is_given: bool) -> Iterator[None]:
    """Trust the code of models inside, if ``--trust-code`` is given: also in processes that the command starts."""
    if not is_given:
        yield
        return
    before = os.environ.get(TRUST_VARIABLE)
    os.environ[TRUST_VARIABLE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[TRUST_VARIABLE]
        else:
            os.environ[TRUST_VARIABLE] = before


def _explain(error: OSError) -> str | None:
    """Return the message for an error of the system that a user can mend, else None."""
    if error.errno in NO_SPACE:
        return f"no space left: {error.strerror} ({error.filename or 'while writing'}); free some and try again"
    if error.errno in IN_THE_WAY:
        return f"{error.filename2 or error.filename} is in the way ({error.strerror}): move it, or choose another name"
    if error.errno in NO_PATH:
        return f"{error.filename2 or error.filename}: {error.strerror}; give another name"
    if isinstance(error, PermissionError) or error.errno == errno.EROFS or _is_closed(error):
        return f"not allowed: {error.strerror} ({error.filename}); choose another folder, for example with --data-dir"
    return None


def _is_closed(error: OSError) -> bool:
    """Return True if a file is missing in a folder that exists and in which nothing can be created, such as /proc."""
    if not isinstance(error, FileNotFoundError) or not error.filename or not (folder := Path(error.filename).parent).is_dir():
        return False
    try:
        with tempfile.TemporaryFile(dir=folder):
            return False
    except OSError:
        return True


def _discard_unwritable_output() -> None:
    """Send stdout to the null device if it cannot be written: Python flushes it once more at exit, which must not fail."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(text: str) -> int:
    print(f"galaxydist: error: {text}", file=sys.stderr, flush=True)
    return EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
