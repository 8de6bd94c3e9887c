"""trackio: the rows of runs in a folder on this machine, which trackio's page shows without an account.

trackio's logging calls (``trackio.init`` and ``log``) are not used: they follow one run at a time, stamp each row with the time
at which it is sent, print an error instead of raising it, keep a repeated step twice, and ask a server for the user's name. Its
storage, which they and its importers call too, takes rows of several runs, with their times. Each row has an id there, made of
run and step, and a row whose id is known is left out: whatever was stored before, sending all rows stores each step once.
"""

import json
import shlex
import sqlite3
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from galaxydist.atomic_files import replace_bytes
from galaxydist.errors import UserError
from galaxydist.runs.events import ALERTS, Event
from galaxydist.runs.folder import RunFolder
from galaxydist.runs.listing import is_run
from galaxydist.tracking.run_reader import GrowingFile
from galaxydist.tracking.sink import Row, RunEnd, RunInfo, TrackedGalaxy, Validation, alert_level

# Name of trackio's folder in a folder of runs.
FOLDER_NAME = "trackio"
FOLDER_VARIABLE = "TRACKIO_DIR"
# Variables with which trackio would use a server on the internet.
REMOTE_VARIABLES = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_BUCKET_ID", "TRACKIO_DATASET_ID")
# Order of the sections of trackio's page, and of the first plots in each; it sorts them by name otherwise.
PLOT_ORDER = "val/accuracy,val/loss,train/loss,train/accuracy,test/accuracy,time/img_s,memory/rss_gb,epoch"
# Rows that are stored in one transaction.
MOST_ROWS = 500
# trackio may hold its file locked for this time, in seconds.
LOCKED_S = 30.0


def trackio_folder(runs: Path) -> Path:
    """Return trackio's folder for the runs in a folder, or for a run and its neighbours."""
    return (runs.absolute().parent if is_run(runs) else runs) / FOLDER_NAME


def load_trackio(folder: Path, environ: MutableMapping[str, str]) -> Any:
    """Import trackio such that it keeps its files in a folder and uses no server, and return the module.

    Args:
        folder: is created with the first row; trackio reads it once, so that a process has only one.
        environ: the environment of this process.

    Raises:
        UserError: trackio is not installed.
    """
    environ[FOLDER_VARIABLE] = str(folder.absolute())
    environ.setdefault("TRACKIO_PLOT_ORDER", PLOT_ORDER)
    for name in REMOTE_VARIABLES:
        environ.pop(name, None)
    try:
        import trackio
        from trackio.utils import TRACKIO_DIR, is_network_filesystem
    except ImportError as error:
        raise UserError(f"trackio is not installed ({error}): pip install 'galaxydist[track]'") from error
    if folder.absolute() != TRACKIO_DIR:
        raise UserError(f"trackio uses {TRACKIO_DIR} in this process already, and not {folder}: one process has one folder")
    if is_network_filesystem(folder):  # where SQLite's write-ahead log does not work
        environ.setdefault("TRACKIO_SQLITE_JOURNAL_MODE", "delete")
    return trackio


class TrackioSink:
    """One run in trackio's storage.

    Args:
        info: of the run.
        folder: trackio's folder.
        environ: the environment of this process (see ``load_trackio``).

    Raises:
        UserError: trackio is not installed, or refuses the project's name.
    """

    def __init__(self, info: RunInfo, folder: Path, environ: MutableMapping[str, str]) -> None:
        load_trackio(folder, environ)
        from trackio.sqlite_storage import SQLiteStorage
        from trackio.utils import MEDIA_DIR, project_media_dir

        try:
            SQLiteStorage.validate_project_name(info.project)
        except ValueError as error:
            raise UserError(f"tracker.project={info.project}: {error}") from error
        self._info = info
        self._storage: Any = SQLiteStorage
        self._media_root: Path = MEDIA_DIR
        self._media_dir: Path = project_media_dir(info.project) / info.run_id
        known = {record["id"]: record["name"] for record in SQLiteStorage.get_run_records(info.project)}
        self._name: str = known.get(info.run_id) or info.name  # a person may have renamed it on the page
        self._config: dict[str, Any] | None = _read_config(info)
        self._rows: list[Row] = []
        self.stored_step = self._last_step = self._read_stored_step()

    def _read_stored_step(self) -> int:
        """Return the highest stored step, or 0 if a row before it is missing, so that all rows are sent."""
        path = self._storage.get_project_db_path(self._info.project)
        if not path.exists():
            return 0
        with closing(sqlite3.connect(path, timeout=LOCKED_S)) as connection:
            stored = {step for (step,) in connection.execute("SELECT step FROM metrics WHERE run_id = ?", (self._info.run_id,))}
        highest = max(stored, default=0)
        file, logged = GrowingFile(RunFolder(self._info.folder).metrics_path, is_strict=True), set[int]()
        while (line := file.peek()) is not None and line["step"] <= highest:
            logged.add(file.take()["step"])
        return highest if stored == logged else 0

    def send(self, row: Row) -> None:
        """Take one row, which is stored with the next ``flush``."""
        self._rows.append(row)
        if len(self._rows) >= MOST_ROWS:
            self.flush()

    def flush(self) -> None:
        """Store the rows in one transaction.

        Raises:
            OSError, sqlite3.Error: the folder cannot be written; the rows are kept for the next call.
        """
        if not self._rows:
            return
        events = [event for row in self._rows for event in row.events]
        self._store([(row.step, row.time, self._values(row)) for row in self._rows])
        self._last_step, self._rows = self._rows[-1].step, []
        self._store_events(events)

    def _store(self, rows: list[tuple[int, float | None, Mapping[str, Any]]]) -> None:
        now = datetime.now(UTC).timestamp()
        self._storage.bulk_log(
            project=self._info.project,
            run=self._name,
            run_id=self._info.run_id,
            metrics_list=[values for _, _, values in rows],
            steps=[step for step, _, _ in rows],
            timestamps=[_iso(now if time is None else time) for _, time, _ in rows],
            log_ids=[self._row_id(step) for step, _, _ in rows],
            config=self._config,
        )
        self._config = None

    def _row_id(self, step: int) -> str:
        return f"{self._info.run_id}-{step}"

    def _values(self, row: Row) -> dict[str, Any]:
        values = dict(row.values)
        if row.validation is not None:
            values |= self._validation_values(row.validation)
        return values

    def _validation_values(self, validation: Validation) -> dict[str, Any]:
        names = validation.class_names
        counts = [
            {"true class": name, **dict(zip(names, row, strict=True))}
            for name, row in zip(names, validation.confusion_KK, strict=True)
        ]
        values = {"val/confusion": _table(counts)}
        if validation.calibration:
            values["val/calibration"] = _table([dict(line) for line in validation.calibration])
        if validation.galaxies:
            values["val/galaxies"] = _table([self._galaxy_line(galaxy, names) for galaxy in validation.galaxies])
        return values

    def _galaxy_line(self, galaxy: TrackedGalaxy, names: Sequence[str]) -> dict[str, Any]:
        name = galaxy.galaxy_id
        return {
            **({"galaxy": self._image(galaxy.image, f"galaxies/{galaxy.image.name}", name)} if galaxy.image.exists() else {}),
            "id": name,
            "true class": names[galaxy.label],
            "predicted": names[galaxy.predicted],
            "probability": round(galaxy.probability, 4),
        }

    def alert(self, event: Event) -> None:
        """Store an event, once, for trackio's list of alerts."""
        self._store_events([event])

    def _store_events(self, all_events: Sequence[Event]) -> None:
        events = [event for event in all_events if event.kind in ALERTS]
        self._storage.bulk_alert(
            project=self._info.project,
            run=self._name,
            run_id=self._info.run_id,
            titles=[event.kind for event in events],
            texts=[event.text for event in events],
            levels=[alert_level(event.kind) for event in events],
            steps=[event.step for event in events],
            timestamps=[_iso(event.time) for event in events],
            alert_ids=[f"{self._info.run_id}-{event.kind}-{event.time}" for event in events],
        )

    def close(self, end: RunEnd) -> str:
        """Store the last rows; results, figures and pages join the row of the last step."""
        self.flush()
        self._store_events(end.events)
        values: dict[str, Any] = dict(end.summary)
        for name, path in end.figures.items():
            values[name] = self._image(path, f"{name}.png", name)
        for name, path in end.pages.items():
            values[name] = {"_type": "trackio.html", "file_path": self._copy(path, f"{name}.html"), "caption": name}
        if self._last_step and values:
            self._add_to_row(self._last_step, values)
        if self._last_step and end.summary:
            self._config = {**_read_config(self._info), **{f"result/{name}": value for name, value in end.summary.items()}}
            self._store([(self._last_step, None, {})])  # the row is known, so that only the configuration is replaced
        runs, folder = self._info.folder.absolute().parent, self._media_root.parent
        command = ["galaxydist", "dashboard", "local", str(runs)]
        if folder != trackio_folder(runs):
            command += ["--dir", str(folder)]
        return f"trackio: {folder}; to look at it: {shlex.join(command)}"

    def _add_to_row(self, step: int, values: Mapping[str, Any]) -> None:
        path = self._storage.get_project_db_path(self._info.project)
        with closing(sqlite3.connect(path, timeout=LOCKED_S, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            select = "SELECT metrics FROM metrics WHERE log_id = ?"
            for (stored,) in connection.execute(select, (self._row_id(step),)).fetchall():
                merged = json.dumps({**json.loads(stored), **values}, allow_nan=False).encode()
                connection.execute("UPDATE metrics SET metrics = ? WHERE log_id = ?", (merged, self._row_id(step)))
            connection.execute("COMMIT")

    def abandon(self) -> None:
        """Do nothing: what is stored is whole."""

    def _image(self, path: Path, name: str, caption: str) -> dict[str, Any]:
        return {"_type": "trackio.image", "file_path": self._copy(path, name), "caption": caption}

    def _copy(self, path: Path, name: str) -> str:
        """Copy a file into the run's media, and return its path there as trackio stores it."""
        target = self._media_dir / name
        data = path.read_bytes()
        if not target.exists() or target.read_bytes() != data:
            target.parent.mkdir(parents=True, exist_ok=True)
            replace_bytes(target, data)
        return str(target.relative_to(self._media_root))


def _table(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"_type": "trackio.table", "_value": rows}


def _iso(time: float) -> str:
    return datetime.fromtimestamp(time, UTC).isoformat()


def _read_config(info: RunInfo) -> dict[str, Any]:
    """Return the configuration as trackio keeps it: values by dotted key, by each of which its page can group runs."""
    values = {**info.config, **({"dataset": info.dataset} if info.dataset else {})}
    flat = {key: value for key, value in _flatten(values, "") if not key.startswith("_")}
    return {**flat, "recipe": info.job_type, "tags": ", ".join(info.tags), "_Group": info.group}


def _flatten(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
