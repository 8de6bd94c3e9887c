"""The ``galaxydist`` command: which commands there are, and how each way of ending becomes a message and an exit code.

Exit codes: 0 done, 2 bad input (one message, no traceback), 130 interrupted with Ctrl-C, 141 whoever read our output went away,
those of a training run for ``train`` (see ``train.py``), 1 anything else. No command module imports a heavy library before its
command runs, so that ``--help`` answers at once.
"""

import argparse
import errno
import os
import sys
from collections.abc import Sequence

from galaxydist import __version__
from galaxydist.cli import bench, cluster, completion, data, evaluate, jobs, recipes, train
from galaxydist.cli.options import CommandParser
from galaxydist.cpus import set_up_process
from galaxydist.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, UserError
from galaxydist.log import set_up_logging

EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE, as a shell counts it
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# A read-only file system; a file in the place of a folder, or the other way round.
NOT_WRITABLE = {errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR}

EPILOG = """examples:
  galaxydist data simulate                   a simulated survey in Galaxy10's schema
  galaxydist data fetch                      the real Galaxy10 DECaLS (2.5 GB)
  galaxydist data shard                      shards of the real one, ready to train on
  accelerate launch launch.py recipe=vit     train (key=value is a key of the recipe, see `galaxydist recipes vit`)
  galaxydist evaluate runs/vit-0123abcd      judge a run on the test split
  galaxydist report runs                     many runs: the results matrix as a page and as tables

Data lies under --data-dir, else $GALAXYDIST_DATA, else the user's cache folder.
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets ``run``, a function of the parsed arguments that may return an exit code."""
    parser = CommandParser(
        "galaxydist",
        description="Galaxy morphology at scale: data, training, evaluation.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
        evaluate.add_gallery,
        evaluate.add_report,
        cluster.add_plan,
        jobs.add_submit,
        jobs.add_sweep,
        jobs.add_status,
        cluster.add_cluster,
        cluster.add_doctor,
        bench.add_parser,
        completion.add_parser,
    ):
        add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    set_up_logging()
    try:
        set_up_process(os.environ)
        parser = build_parser()
        if "_ARGCOMPLETE" in os.environ:  # the shell asks what could come next
            from galaxydist.cli.completion import complete

            complete(parser)
        parsed = parser.parse_args(arguments)
        code: int | None = parsed.run(parsed)
        sys.stdout.flush()
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("galaxydist: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more on its way out; give it a place to flush to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except OSError as error:
        if error.errno in DISK_FULL:
            return _fail(
                f"no space left: {error.strerror} ({error.filename or 'while writing'}); free some and give the command again"
            )
        if isinstance(error, PermissionError) or error.errno in NOT_WRITABLE:
            return _fail(f"not allowed: {error.strerror} ({error.filename}); choose another place, for example with --data-dir")
        raise
    return code or 0


def _fail(text: str) -> int:
    print(f"galaxydist: error: {text}", file=sys.stderr, flush=True)
    return EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
