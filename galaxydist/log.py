"""Logging: diagnostics on stderr and results of commands on stdout, both from rank 0."""

import logging
import os
import sys
from pathlib import Path
from typing import Any, Literal

# A command's results: tables, and the paths of what was written. All other loggers of the package write diagnostics.
results = logging.getLogger("galaxydist.results")


class StreamHandler(logging.StreamHandler[Any]):
    """Writes records to the current ``sys.stdout`` or ``sys.stderr``; a closed pipe or a full disk does not end the process."""

    def __init__(self, name: Literal["stdout", "stderr"], rank: int) -> None:
        logging.Handler.__init__(self)
        self._name, self._rank = name, rank

    @property
    def stream(self) -> Any:
        return getattr(sys, self._name)

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno < logging.WARNING:
            return text
        rank = f" (rank {self._rank})" if self._rank else ""
        return f"galaxydist: {record.levelname.lower()}{rank}: {text}"

    def handleError(self, record: logging.LogRecord) -> None:
        if isinstance(sys.exception(), OSError):
            setattr(sys, self._name, Path(os.devnull).open("w"))  # noqa: SIM115 (stays open until the process ends)
        else:
            super().handleError(record)


def set_up_logging(rank: int = 0) -> None:
    """Send the package's log records to stderr, and those of ``results`` to stdout.

    Rank 0 logs everything from INFO on. Other ranks log errors only: what happens on all ranks is logged once.
    """
    package = logging.getLogger("galaxydist")
    package.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    package.handlers = [StreamHandler("stderr", rank)]
    results.handlers = [StreamHandler("stdout", rank)]
    results.propagate = False
