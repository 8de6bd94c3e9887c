"""One file from a store to the disk, for certain: attempts with growing pauses until it is what the manifest says."""

import hashlib
import logging
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from galaxydist.errors import UserError
from galaxydist.shards.failures import TransientError
from galaxydist.shards.store import StoppedError, Store

if TYPE_CHECKING:
    from tenacity import RetryCallState

_log = logging.getLogger(__name__)

# The pause before attempt n + 1 is drawn from 0 to FIRST_PAUSE_S x 2^n, so that a thousand readers do not come back at once.
ATTEMPTS = 10
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 30.0
# Whole files that are not what the manifest says, until that is believed.
WRONG_CONTENTS = 4
QUIET_ATTEMPTS = 3


class WrongContentError(TransientError):
    """A file came, but not the one that the manifest names."""


def transfer(
    store: Store,
    name: str,
    path: Path,
    *,
    stop: threading.Event,
    num_bytes: int | None = None,
    sha256: bytes | None = None,
    attempts: int = ATTEMPTS,
) -> None:
    """Copy a file of a store to ``path`` and see that it is the right one. The number of requests is 1 plus the failures.

    Args:
        store, name: which file.
        path: is written over; after an error it may hold a part, or be gone.
        stop: when it is set, attempts and pauses end.
        num_bytes, sha256: what the file must be, where that is known.
        attempts: until a network that fails is given up.

    Raises:
        StoppedError: ``stop`` was set.
        MissingError: the store has no such file.
        UserError: it cannot be had, or stays another file than the manifest says.
        OSError: the local disk.
    """
    from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential
    from tenacity.nap import sleep_using_event

    wrong = 0

    def attempt() -> None:
        nonlocal wrong
        if stop.is_set():
            raise StoppedError
        store.get(name, path, stop)
        try:
            _verify(path, num_bytes, sha256)
        except WrongContentError as error:
            wrong += 1
            if wrong < WRONG_CONTENTS:
                raise
            raise UserError(
                f"{store.url(name)} is not what its manifest says: {error} (fetched {wrong} times). "
                "Copy the whole folder of shards there again, manifest.json last."
            ) from None

    retrying = Retrying(
        retry=retry_if_exception_type(TransientError),
        wait=wait_random_exponential(multiplier=FIRST_PAUSE_S, max=LONGEST_PAUSE_S),
        stop=stop_after_attempt(attempts),
        sleep=sleep_using_event(stop),
        before_sleep=lambda state: _tell(store.url(name), state),
        reraise=True,
    )
    try:
        retrying(attempt)
    except TransientError as error:
        raise UserError(
            f"{store.url(name)} could not be read in {attempts} attempts; the last one: {error}. See that the server can be "
            "reached from this machine and give the command again: what was fetched stays in the cache."
        ) from error


def _verify(path: Path, num_bytes: int | None, sha256: bytes | None) -> None:
    found = path.stat().st_size
    if num_bytes is not None and found != num_bytes:
        raise WrongContentError(f"{found} bytes where {num_bytes} belong")
    if sha256 is not None:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
        if digest != sha256:
            raise WrongContentError(f"its SHA-256 is {digest.hex()[:16]}..., not {sha256.hex()[:16]}...")


def _tell(url: str, state: "RetryCallState") -> None:
    level = logging.INFO if state.attempt_number <= QUIET_ATTEMPTS else logging.WARNING
    error = state.outcome.exception() if state.outcome is not None else None
    _log.log(level, "%s: attempt %d failed (%s); it is tried again", url, state.attempt_number, error)
