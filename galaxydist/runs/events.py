"""Events of a run, events.jsonl: starts, stops, restarts and what went wrong, with the time of each.

Any process of a run, and the batch script that restarts it, may append events. They are never cut back: a run that continues
from a checkpoint keeps what happened after it.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from galaxydist.errors import UserError, first_line
from galaxydist.runs.metrics_file import read_tail_records
from galaxydist.runs.record_file import append_record, from_plain, read_records

logger = logging.getLogger(__name__)

EventKind = Literal["start", "stop", "finish", "failure", "nonfinite", "loss_spike", "hang", "data_wait", "requeue", "pruned"]
# Events of which a person is told at once.
ALERTS: frozenset[EventKind] = frozenset({"finish", "failure", "nonfinite", "loss_spike", "hang", "data_wait", "requeue"})
# Events with which a process of the run ends.
ENDS: frozenset[EventKind] = frozenset({"stop", "finish", "failure", "hang", "pruned"})


@dataclass(frozen=True)
class Event:
    """One event.

    A ``failure`` is the error that ended a start, also a loss that is not finite; ``nonfinite`` is a step that was left out. The
    batch script writes ``requeue`` if the run starts again, with ``details["decision"]``, and ``failure`` if an error keeps it
    from that.

    Args:
        time: seconds since 1970.
        kind: of the event.
        text: one line for a person.
        step: optimizer steps done; None if it is unknown.
        start: job and restart in which it happened (``job_environment.start_of``); None outside of a job.
        details: further values of this kind, such as the world size of a start. All events of the ranks of one start have the
            same ``began``: the time at which its rank 0 began, in seconds since 1970.
    """

    time: float
    kind: EventKind
    text: str
    step: int | None = None
    start: str | None = None
    details: dict[str, Any] = field(default_factory=dict)


def append_event(path: Path, event: Event) -> None:
    """Append an event to a run's file.

    Raises:
        UserError: the disk is full.
    """
    append_record(path, event)


def read_events(path: Path) -> list[Event]:
    """Return all events of a file, oldest first; empty if there is none.

    Raises:
        UserError: a line is damaged.
    """
    return list(read_records(path, Event))


def read_last_event(path: Path) -> Event | None:
    """Return the newest event of a file, of which only the end is read; None if there is none."""
    for line in reversed(read_tail_records(path)):
        with contextlib.suppress(ValueError):  # of a later version
            return from_plain(Event, line)
    return None


@dataclass(eq=False)
class EventLog:
    """Writes the events of one start of a run. A failed write is logged once, and never stops the run.

    Args:
        path: the run's file.
        start: of each event.
        details: of each event.
        tell: called with each event of ``ALERTS``; it must return at once and raise nothing.
    """

    path: Path
    start: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    tell: Callable[[Event], None] = lambda _: None

    def __post_init__(self) -> None:
        self._has_failed = False

    def write(self, kind: EventKind, text: str, step: int | None = None, **details: Any) -> None:
        """Tell a person of an alert, and append an event of this moment; ``text`` is cut after its first line."""
        line = (text.strip().splitlines() or [kind])[0]
        event = Event(time.time(), kind, line, step, self.start, {**self.details, **details})
        if kind in ALERTS:
            self.tell(event)  # first, since a file system that hangs holds up the write
        try:
            append_event(self.path, event)
        except (OSError, UserError) as error:
            if not self._has_failed:
                logger.warning("an event could not be written to %s (%s)", self.path, first_line(error))
            self._has_failed = True
