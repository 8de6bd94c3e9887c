"""Errors that a user can fix, errors that end a run, and exit codes.

The command line prints the text of a ``UserError`` without a traceback and exits with code 2.
"""

from collections.abc import Sequence

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped by a signal after saving; the same command continues the run
EXIT_INTERRUPTED = 130
EXIT_HUNG = 70  # EX_SOFTWARE: the run hung, see training/health/watchdog.py


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its class name if the text is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class UserError(ValueError):
    """Error in the user's input: the text states what is wrong, what was given and what to do."""


class DamagedImageError(UserError):
    """Error of a single image that cannot be read or decoded; ``reason`` names the image and the cause."""

    @property
    def reason(self) -> str:
        return str(self.args[0])

    def __str__(self) -> str:
        return f"{self.reason}; replace or remove the file"


class EveryRankError(UserError):
    """``UserError`` that all ranks of a run raise alike; one rank prints it."""


class RunFailedError(RuntimeError):
    """Error that ends a run and that no earlier check could detect; all ranks raise it at the same step."""


class OneRankFailedError(RunFailedError):
    """``RunFailedError`` of a single rank, which prints it itself."""


class NonfiniteError(RunFailedError):
    """Error of a loss or gradient that is not finite: a restart would fail in the same way."""


def name_some(names: Sequence[str], most: int = 5) -> str:
    """Return the first names for a message, and the number of the others: ``a, b and 3 more``."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
