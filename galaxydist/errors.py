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
    """Return the first line of an error's text, with the next one if it ends with a colon; its class name if it has no text."""
    first, *others = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {others[0].strip()}" if first.endswith(":") and others else first


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
    """``UserError`` that all ranks of a run raise at the same point; rank 0 logs it, and each rank exits."""


class RunFailedError(RuntimeError):
    """Error that ends a run and that no earlier check could detect.

    All ranks raise it at the same step, but for its subclasses; rank 0 logs it, and each rank exits.
    """


class OneRankFailedError(RunFailedError):
    """``RunFailedError`` of a single rank, which logs it, tells the others and exits; these raise ``PeerFailedError``."""


class PeerFailedError(RunFailedError):
    """Another rank has failed alone, and this one cannot continue without it; rank 0 logs it, and each such rank exits.

    Args:
        text: names the rank and the first line of its error.
        code: exit code of that rank, which this one leaves with too.
    """

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


class NonfiniteError(RunFailedError):
    """Error of a loss or gradient that is not finite: a restart would fail in the same way."""


def mark_as_known(error: BaseException) -> None:
    """Record that the other ranks know of an error that this rank alone raises."""
    error.is_known_to_all = True  # type: ignore[attr-defined]


def is_known_to_all(error: BaseException) -> bool:
    """Return True for an error that every rank raises, or learns of, at the same point of the run."""
    if isinstance(error, EveryRankError) or (isinstance(error, RunFailedError) and not isinstance(error, OneRankFailedError)):
        return True
    return any(getattr(found, "is_known_to_all", False) for found in (error, error.__cause__))


def exit_code_of(error: BaseException) -> int:
    """Return the exit code of a process that an error ends."""
    if isinstance(error, PeerFailedError):
        return error.code
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    return EXIT_BAD_INPUT if isinstance(error, UserError) else EXIT_FAILED


def name_some(names: Sequence[str], most: int = 5) -> str:
    """Return the first names for a message, and the number of the others: ``a, b and 3 more``."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
