"""The errors that a user can mend. The command line prints their text alone and leaves with exit code 2."""

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped by a signal with everything saved; the same command continues
EXIT_INTERRUPTED = 130
EXIT_HUNG = 70  # EX_SOFTWARE: no process went on any more, see training/watchdog.py


class UserError(ValueError):
    """Something the user gave cannot be used: the text says what is wrong, what was given and what to do."""


class DamagedPictureError(UserError):
    """A picture cannot be read or decoded, while others beside it can: ``reason`` names it and says why."""

    @property
    def reason(self) -> str:
        return str(self.args[0])

    def __str__(self) -> str:
        return f"{self.reason}; replace or remove the file"


class EveryRankError(UserError):
    """A ``UserError`` that every process of a run raises alike: one of them prints it."""


class RunFailedError(RuntimeError):
    """A run that cannot go on, which no check before it could have seen. Every process raises it at the same step."""


class OneRankFailedError(RunFailedError):
    """A ``RunFailedError`` that one process alone has met: it is the one that prints it."""


class NonfiniteError(RunFailedError):
    """The loss or a gradient is not a number: starting again would end the same way."""
