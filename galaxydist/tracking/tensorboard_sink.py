"""TensorBoard: the rows of a run as event files in its folder, for sites that have only that.

A row is one record of an event file, with the time of the row: a killed writer leaves whole rows, and the next one appends those
that are missing to a new file. Results are a file of their own, which is replaced as a whole.
"""

import contextlib
import io
import math
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from galaxydist.evaluation.metrics import metrics_from_counts
from galaxydist.runs.events import Event
from galaxydist.tracking.sink import Row, RunEnd, RunInfo, Validation

FOLDER_NAME = "tensorboard"
# TensorBoard reads files with "tfevents" in their name, in the order of their names.
RESULTS_FILE = "events.out.tfevents.results"
# Sections of the recipe that are shown as hyperparameters.
HYPERPARAMETERS = re.compile(r"seed|(data|model|optim|train)\..*")


def event_files(folder: Path) -> list[Path]:
    """Return the event files with the rows of a run, oldest first."""
    return sorted(path for path in folder.glob("events.out.tfevents.*") if path.name != RESULTS_FILE)


def read_rows(path: Path) -> Iterator[tuple[int, float, dict[str, Any]]]:
    """Yield the complete rows of an event file: step, seconds since 1970, and TensorBoard's ``Summary.Value`` by tag."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    for event in LegacyEventFileLoader(str(path)).Load():
        if event.HasField("summary"):
            yield event.step, event.wall_time, {value.tag: value for value in event.summary.value}


class TensorboardSink:
    """One run as event files in its folder.

    Args:
        info: of the run.
    """

    def __init__(self, info: RunInfo) -> None:
        import tensorboard  # noqa: F401  (if it is missing, that is told now)

        self._info = info
        self._folder = info.folder / FOLDER_NAME
        self.stored_step = max((step for path in event_files(self._folder) for step, _, _ in read_rows(path)), default=0)
        self._last_step = self.stored_step
        self._writer: Any = None  # opened with the first row: a push that has nothing to add leaves no empty file

    def send(self, row: Row) -> None:
        """Write one row as one record."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard.summary import scalar, text

        summary = Summary()
        for name, value in row.values.items():
            if isinstance(value, int | float):
                summary.MergeFrom(scalar(name, value))
        if row.validation is not None:
            summary.MergeFrom(_image("val/confusion", _draw_confusion(row.validation)))
        if row.events:
            summary.MergeFrom(text("events", "  \n".join(f"{event.kind}: {event.text}" for event in row.events)))
        if self._writer is None:
            self._writer = _open_writer(self._folder)
        self._writer.add_summary(summary, row.step, time.time() if row.time is None else row.time)
        self._last_step = row.step

    def flush(self) -> None:
        """Write all rows to their file."""
        if self._writer is not None:
            self._writer.flush()

    def alert(self, event: Event) -> None:
        """Do nothing: TensorBoard has no alerts."""

    def close(self, end: RunEnd) -> str:
        """Write the last rows, and the file of hyperparameters and results."""
        if self._writer is not None:
            self._writer.close()
        if self._last_step:
            self._write_results(end)
        return f"TensorBoard: {self._folder}; to look at it: tensorboard --logdir {self._info.folder.parent}"

    def _write_results(self, end: RunEnd) -> None:
        from torch.utils.tensorboard.summary import hparams, scalar, text

        results = {name: value for name, value in end.summary.items() if math.isfinite(value)}
        summaries = list(hparams(dict(_hyperparameters(self._info.config)), results))
        summaries += [scalar(name, value) for name, value in results.items()]
        summaries += [_image(name, path.read_bytes()) for name, path in end.figures.items()]
        if end.model_card:
            summaries.append(text("model_card", end.model_card))
        with tempfile.TemporaryDirectory(dir=self._info.folder, prefix=f".{FOLDER_NAME}-") as temporary:
            writer = _open_writer(Path(temporary))
            for summary in summaries:
                writer.add_summary(summary, self._last_step)
            writer.close()
            self._folder.mkdir(exist_ok=True)
            event_files(Path(temporary))[0].replace(self._folder / RESULTS_FILE)

    def abandon(self) -> None:
        """Close the file after an error."""
        if self._writer is not None:
            with contextlib.suppress(Exception):
                self._writer.close()


def _open_writer(folder: Path) -> Any:
    from torch.utils.tensorboard import FileWriter

    return FileWriter(str(folder))


def _draw_confusion(validation: Validation) -> bytes:
    from galaxydist.evaluation.plots import draw_confusion

    metrics = metrics_from_counts(validation.confusion_KK, 0.0, validation.class_names)
    buffer = io.BytesIO()
    draw_confusion(metrics, f"validation after step {validation.step}").savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _image(name: str, png: bytes) -> Any:
    """Return an image as it is, without decoding it."""
    from PIL import Image
    from tensorboard.compat.proto.summary_pb2 import Summary

    with Image.open(io.BytesIO(png)) as image:
        width, height, channels = *image.size, len(image.getbands())
    picture = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=png)
    return Summary(value=[Summary.Value(tag=name, image=picture)])


def _hyperparameters(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str | float]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _hyperparameters(value, f"{name}.")
        elif HYPERPARAMETERS.fullmatch(name) and value is not None:
            yield name, value if isinstance(value, bool | int | float | str) else str(value)
