"""Logging: rank 0 logs to stderr and writes results to stdout, other ranks log errors, and a broken stream ends nothing."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from galaxydist.log import results, set_up_logging

logger = logging.getLogger("galaxydist.training.loop")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Leave the package's loggers as they were."""
    package = logging.getLogger("galaxydist")
    before = package.level, package.handlers, results.handlers, results.propagate
    yield
    package.level, package.handlers, results.handlers, results.propagate = before
    package.setLevel(before[0])


def test_rank_0_logs_diagnostics_to_stderr_and_results_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging()
    logger.info("epoch 1/2")
    logger.warning("a spike")
    logger.debug("a retry")
    results.info("accuracy 0.5")
    printed = capsys.readouterr()
    assert printed.out == "accuracy 0.5\n"
    assert printed.err == "epoch 1/2\ngalaxydist: warning: a spike\n"


def test_other_ranks_log_only_errors_and_name_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(rank=3)
    logger.warning("a spike")
    results.info("accuracy 0.5")
    logger.error("no memory left")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "galaxydist: error (rank 3): no memory left\n")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_logging_to_a_closed_pipe_does_not_end_the_process(stream: str) -> None:
    code = (
        "import logging; from galaxydist.log import results, set_up_logging; set_up_logging()\n"
        "for number in range(3): results.info('a result'); logging.getLogger('galaxydist').info('progress')"
    )
    reader, writer = os.pipe()
    os.close(reader)
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, stream: writer}
    assert subprocess.run([sys.executable, "-c", code], check=False, **streams).returncode == 0  # type: ignore[call-overload]
    os.close(writer)
