"""A run folder with everything that a tracker is sent, and what trackio's own SQLite file holds of runs."""

import json
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from PIL import Image

from galaxydist.runs.events import Event, append_event
from galaxydist.runs.folder import RunFolder
from tests.helpers.trial_folders import write_trial

CLASSES = ("round", "spiral")


def write_long_run(folder: Path, num_rows: int, *, finished: bool = True) -> RunFolder:
    """A run that logged at each step, validated twice, and was restarted once."""
    run = write_trial(folder, ["recipe=custom_cnn"], num_galaxies=40, validation=None, finished=finished)
    metrics, timing = ([], [])  # type: tuple[list[str], list[str]]
    for step in range(1, num_rows + 1):
        metrics.append(json.dumps({"step": step, "epoch": step / 100, "train/loss": 1 / step}))
        timing.append(json.dumps({"step": step, "time/img_s": 100.0 + step, "time/unix": 1.7e9 + step}))
    run.metrics_path.write_text("\n".join(metrics) + "\n")
    run.timing.path.write_text("\n".join(timing) + "\n")
    for step in (num_rows // 2, num_rows):
        galaxies = [{"sample": n, "id": f"g{n}", "label": 0, "predicted": n, "probability": 0.75} for n in range(2)]
        run.validations.append(
            step,
            {  # type: ignore[arg-type]
                "classes": CLASSES,
                "confusion": [[3, 1], [0, 0]],
                "recall": [0.75, None],
                "galaxies": galaxies,
                "calibration": [],
            },
        )
    for sample in range(2):
        run.galaxy_image(sample).parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (100 * sample, 0, 50)).save(run.galaxy_image(sample))
    append_event(run.events_path, Event(1.7e9, "start", "first start", 0))
    append_event(run.events_path, Event(1.7e9 + 7, "requeue", "it goes on", 7))
    return run


def read_trackio(folder: Path, project: str = "galaxydist") -> dict[str, list[tuple[int, dict[str, Any]]]]:
    """The rows of each run in trackio's folder, in the order in which they were stored: step and values."""
    runs: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    with closing(sqlite3.connect(folder / f"{project}.db")) as connection:
        for name, step, values in connection.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id"):
            runs.setdefault(name, []).append((step, json.loads(values)))
    return runs


def read_table(folder: Path, table: str, project: str = "galaxydist") -> list[Mapping[str, Any]]:
    """All lines of one of trackio's tables."""
    with closing(sqlite3.connect(folder / f"{project}.db")) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute(f"SELECT * FROM {table} ORDER BY id")]
