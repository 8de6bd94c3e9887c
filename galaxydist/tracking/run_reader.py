"""Reads the files of a run folder as rows of steps, and later what was added to them.

Nothing is kept of what has been read but a position in each file, so that a run of days can be followed. The files are written in
the order of their steps; a run that continues from a checkpoint cuts them back first, and writes the same steps again.
"""

import json
import math
import os
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from galaxydist.errors import UserError
from galaxydist.runs.events import ENDS, Event
from galaxydist.runs.folder import RunFolder
from galaxydist.runs.metrics_file import TIME_KEY, read_tail
from galaxydist.runs.record_file import from_plain
from galaxydist.tracking.run_info import without_secrets
from galaxydist.tracking.sink import Row, validation_of

# Bytes read at a time, and bytes at the end of metrics.jsonl that hold its last line.
CHUNK_BYTES = 1 << 20
LAST_LINE_BYTES = 16_384


class GrowingFile:
    """Lines of JSON of a file that other processes append to; the file is read again from its start after it was cut back.

    Args:
        path: the file; it need not exist.
        is_strict: refuse a damaged line instead of skipping it.
    """

    def __init__(self, path: Path, *, is_strict: bool) -> None:
        self.path = path
        self._is_strict = is_strict
        self._inode = 0
        self._offset = 0
        self._lines: deque[dict[str, Any]] = deque()

    def refresh(self) -> bool:
        """Return True if the file was cut back or replaced since the last call: its lines then begin anew."""
        try:
            with self.path.open("rb") as file:  # on NFS an opened file is up to date, and the answer of stat may be old
                found = os.fstat(file.fileno())
        except FileNotFoundError:
            return False
        was_cut = self._inode != 0 and self._is_other(found)
        self._inode = found.st_ino
        if was_cut:
            self._offset = 0
            self._lines.clear()
        return was_cut

    def peek(self) -> dict[str, Any] | None:
        """Return the next line without taking it; None if there is no further complete line."""
        while not self._lines and self._read_chunk():
            pass
        return self._lines[0] if self._lines else None

    def take(self) -> dict[str, Any]:
        """Take the line that ``peek`` returned."""
        return self._lines.popleft()

    def _is_other(self, found: os.stat_result) -> bool:
        return found.st_ino != self._inode or found.st_size < self._offset

    def _read_chunk(self) -> bool:
        """Read further complete lines; return False if there are none."""
        try:
            with self.path.open("rb") as file:
                if self._offset and self._is_other(os.fstat(file.fileno())):
                    return False  # cut back since ``refresh``, which is called before the next look
                file.seek(self._offset)
                data = file.read(CHUNK_BYTES)
                while (end := data.rfind(b"\n") + 1) == 0 and (more := file.read(CHUNK_BYTES)):
                    data += more
        except FileNotFoundError:
            return False
        self._offset += end
        self._lines += (line for text in data[:end].splitlines() if (line := self._parse(text)) is not None)
        return end > 0

    def _parse(self, text: bytes) -> dict[str, Any] | None:
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and (not self._is_strict or isinstance(line.get("step"), int)):
            return line
        if self._is_strict:
            raise UserError(f"{self.path} has a damaged line: {text[:80]!r}. Remove that line and give the same command again.")
        return None


class RunReader:
    """Reads complete rows from a run folder, each step once, in the order of their steps.

    A row is complete when a higher step began, the run has ended, or a signal stopped it: a validation belongs to the row of its
    step, with the recall of each class as ``val/recall/CLASS``. Events, and what each node measured of itself, come with the
    first row that was logged later; ``events/KIND`` counts the events of a kind up to there.

    Args:
        folder: the run folder, which may be of an earlier version, or just being written.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._metrics, self._timing, self._validations = (
            GrowingFile(log.path, is_strict=True) for log in (folder.metrics, folder.timing, folder.validations)
        )
        self._events_file = GrowingFile(folder.events_path, is_strict=False)
        self._nodes: dict[Path, GrowingFile] = {}
        self._done_step = 0
        self._events: list[Event] = []
        self._num_sent = 0  # events that came with a row
        self._counts: Counter[str] = Counter()

    def read(self, *, has_ended: bool = False) -> Iterator[Row]:
        """Yield the rows that have become complete since the last call.

        Args:
            has_ended: nothing more will be written, so that the last row is complete too.

        Raises:
            UserError: a line of metrics.jsonl, timing.jsonl or validation.jsonl is damaged.
        """
        files = (self._metrics, self._timing, self._validations)
        for file in files:
            file.refresh()
        newest = self._newest_step()  # before the other files are read: their lines of earlier steps are there
        is_stopped = _is_stopped(self.read_events(), newest)
        self._find_nodes()
        while True:
            step = min((line["step"] for file in files if (line := file.peek()) is not None), default=None)
            if step is None or not (has_ended or step < newest or (is_stopped and step == newest)):
                return
            row = self._take_row(step)
            if step > self._done_step:  # else the file was cut back, and these steps are known
                self._done_step = step
                yield row

    def read_events(self) -> list[Event]:
        """Return all events of the run so far, oldest first."""
        if self._events_file.refresh():
            self._events, self._num_sent, self._counts = [], 0, Counter()
        while (line := self._events_file.peek()) is not None:
            self._events_file.take()
            try:
                event = from_plain(Event, line)
                self._events.append(replace(event, text=without_secrets(event.text)))  # an error may name a URL with its token
            except ValueError:
                continue  # an event of a later version
        return self._events

    def _newest_step(self) -> int:
        lines = read_tail(self.folder.metrics_path, LAST_LINE_BYTES)
        try:
            return int(json.loads(lines[-1])["step"]) if lines else 0
        except (ValueError, KeyError, TypeError):
            return 0

    def _take_row(self, step: int) -> Row:
        values: dict[str, Any] = {}
        for file in (self._metrics, self._timing):
            values |= {name: value for line in _lines_of(file, step) for name, value in line.items() if _is_known(value)}
        details = list(_lines_of(self._validations, step))
        values.pop("step", None)
        seconds = values.pop(TIME_KEY, None)
        values |= self._take_measured(step, seconds)
        # A row that is known already leaves its events to the next one.
        events = tuple(self._take_events(step, seconds)) if step > self._done_step else ()
        values |= {f"events/{event.kind}": self._counts[event.kind] for event in events}
        validation = validation_of(details[-1], self.folder) if details else None
        if validation is not None:
            recalls = zip(validation.class_names, validation.recall_K, strict=True)
            values |= {f"val/recall/{name}": recall for name, recall in recalls if recall is not None}
        return Row(step, values, seconds, validation, events)

    def _take_measured(self, step: int, seconds: float | None) -> dict[str, Any]:
        """Take each node's newest values of its own, up to a row."""
        values: dict[str, Any] = {}
        for file in self._nodes.values():
            while (line := file.peek()) is not None and _is_before(line.get("time"), line.get("step"), step, seconds):
                file.take()
                values |= {name: value for name, value in line.items() if name not in ("time", "step") and _is_known(value)}
        return values

    def _take_events(self, step: int, seconds: float | None) -> Iterator[Event]:
        for event in self._events[self._num_sent :]:
            if not _is_before(event.time, event.step, step, seconds):
                return
            self._num_sent += 1
            self._counts[event.kind] += 1
            yield event

    def _find_nodes(self) -> None:
        for path in sorted(self.folder.system_dir.glob("*.jsonl")):
            self._nodes.setdefault(path, GrowingFile(path, is_strict=False)).refresh()


def _is_stopped(events: Sequence[Event], newest: int) -> bool:
    """Return True if a signal has stopped the run after its newest row: what was due at that step was done, and is saved."""
    last = next((event for event in reversed(events) if event.kind == "start" or _is_end(event)), None)
    return last is not None and last.kind == "stop" and last.step is not None and last.step >= newest


def _is_end(event: Event) -> bool:
    return event.kind in ENDS and "decision" not in event.details  # else it is the batch script's word, which comes later


def _lines_of(file: GrowingFile, step: int) -> Iterator[Mapping[str, Any]]:
    while (line := file.peek()) is not None and line.get("step") == step:
        yield file.take()


def _is_before(time: float | None, at_step: int | None, step: int, seconds: float | None) -> bool:
    """Return True if something happened before a row was logged: by its time, else by its step."""
    if time is not None and seconds is not None:
        return time <= seconds
    return at_step is None or at_step <= step


def _is_known(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))
