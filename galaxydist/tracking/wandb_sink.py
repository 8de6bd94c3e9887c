"""Weights & Biases, online or offline: the only module that talks to wandb's program."""

import contextlib
import json
import logging
import netrc
import shlex
import socket
import time
from collections.abc import Iterator, Mapping, MutableMapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import SplitResult, urlsplit

from galaxydist.errors import UserError, first_line
from galaxydist.rank_store import run_within
from galaxydist.runs.code_version import DIFF_FILE
from galaxydist.runs.events import ALERTS, Event
from galaxydist.runs.folder import RunFolder
from galaxydist.tracking.run_info import FACTS_KEY
from galaxydist.tracking.sink import Row, RunEnd, RunInfo, TrackedGalaxy, Validation, alert_level, validation_of
from galaxydist.tracking.wandb_files import has_ended, mend_files, offline_files, read_project, stored_step, wait_for_new_name

WandbMode = Literal["online", "offline"]

LOG = logging.getLogger(__name__)

# wandb may take this time to write the rest of a run that has ended; it usually takes some milliseconds.
WRITING_S = 60.0
# Seconds until a server that does not answer counts as dead.
INIT_S = 60
# Seconds in which wandb may notice that its process is gone.
TEARDOWN_S = 5.0
# Images of galaxies in one table, in bytes.
TABLE_BYTES = 500_000
# Largest gallery page that is sent, in bytes.
PAGE_BYTES = 20_000_000
GALAXIES = "val/galaxies"
DATA_DIR = "WANDB_DATA_DIR"


class WandbSink:
    """One run of wandb.

    Args:
        info: of the run.
        mode: ``online`` or ``offline``.
        environ: the process's environment; unless the user has set a folder for wandb's copies of artifacts, it is set there, in
            the run folder.

    Raises:
        UserError: wandb's offline files of this run belong to another project, or its server refuses the key.
    """

    def __init__(self, info: RunInfo, mode: WandbMode, environ: MutableMapping[str, str]) -> None:
        self.info, self.mode = info, mode
        self._environ = environ
        self._data_dir = info.folder / "wandb" / "data"
        self._is_own_data_dir = environ.get(DATA_DIR, "").endswith("/wandb/data") or DATA_DIR not in environ
        self._settle()
        info.folder.mkdir(parents=True, exist_ok=True)
        for sentence in mend_files(info.folder, info.run_id):
            LOG.warning("%s", sentence)
        if mode == "offline":
            self._check_project()
        known = RunFolder(info.folder).read_tracker()
        known_step = known.get("stored_step", 0) if known.get("run_id") == info.run_id else 0
        self.stored_step = max(known_step, stored_step(info.folder, info.run_id))
        logging.getLogger("asyncio").addFilter(_is_no_lost_connection)
        self._run = self._init()
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if (info.folder / DIFF_FILE).exists():
            self._run.save(str(info.folder / DIFF_FILE), base_path=str(info.folder), policy="now")
        if mode == "online":
            self.stored_step = self._run.starting_step - 1  # the server gives its next step

    def _init(self) -> Any:
        """Start wandb's process and open the run."""
        import wandb

        info = self.info
        with explained_refusal():
            wait_for_new_name(info.folder, info.run_id)
            wandb.setup(wandb.Settings(silent=True))  # of the messages that wandb.init prints before it reads its own settings
            return wandb.init(
                project=info.project,
                entity=info.entity,
                tags=list(info.tags) or None,
                group=info.group,
                job_type=info.job_type or None,
                mode=self.mode,
                dir=str(info.folder),
                id=info.run_id,
                name=info.name,
                resume="allow",
                reinit="create_new",
                config=dict(info.config),
                settings=wandb.Settings(
                    silent=True,
                    init_timeout=INIT_S,
                    console="off",
                    symlink=False,  # the folder of an offline run holds its files
                    disable_git=True,  # of the current folder, which need not be the code's
                    x_disable_meta=True,  # the command line may hold secrets
                    x_disable_machine_info=True,
                    x_disable_stats=True,  # they see this node only; system/NODE/... has all
                    x_save_requirements=False,
                ),
            )

    def send(self, row: Row) -> None:
        """Send one complete row, at the time at which it was logged."""
        self._settle()
        values: dict[str, Any] = {**row.values, "step": row.step}
        if row.time is not None:
            values["_timestamp"] = row.time
        if row.validation is not None:
            values |= draw_validation(row.validation)
            if has_galaxies(row):
                values[GALAXIES] = draw_galaxies(row.validation)
        self._run.log(values, step=row.step, commit=True)

    def flush(self) -> None:
        """Do nothing: wandb's process sends or stores the rows by itself."""

    def alert(self, event: Event) -> None:
        """Send an alert, which wandb passes on by mail or Slack."""
        assert event.kind in ALERTS
        title = f"{self.info.name}: {event.kind.replace('_', ' ')}"
        self._run.alert(title[:63], event.text, level=alert_level(event.kind).upper())

    def close(self, end: RunEnd) -> str:
        """Store everything; offline, wandb's process may still be writing when its ``finish`` returns."""
        self._settle()
        values = dict(self.info.config)
        values[FACTS_KEY] = {**values.get(FACTS_KEY, {}), **end.facts}
        self._run.config.update(values, allow_val_change=True)
        self._run.summary.update(dict(end.summary))
        self._send_events(end.events)
        if end.exit_code == 0:
            self._send_results(end)
            self._send_dataset()
            if end.model is not None:
                self._send_model(end)
        self._run.finish(exit_code=end.exit_code)
        if self.mode == "online":
            return f"wandb: {self._run.url}"
        file, deadline = Path(self._run.settings.sync_file), time.monotonic() + WRITING_S
        while not has_ended(file):
            if time.monotonic() > deadline:
                raise TimeoutError(f"after {WRITING_S:g} s wandb had not written the end of {file}")
            time.sleep(0.02)
        folder = self.info.folder
        several = offline_files(folder, self.info.run_id)
        pattern = f"{shlex.quote(str(folder / 'wandb'))}/offline-run-*-{self.info.run_id}*"
        command = shlex.quote(str(several[0].parent)) if len(several) == 1 else pattern
        return f"wandb: offline, in {folder / 'wandb'}; to send it: wandb sync {command}"

    def abandon(self) -> None:
        """Close the run; if wandb's process is gone, end what is left of it, since wandb would print that at exit."""
        import wandb

        try:
            self._run.finish(exit_code=1)
        except Exception:  # wandb may raise anything; else the process is left alone, because it may serve other runs
            with contextlib.suppress(Exception):
                wandb.teardown(exit_code=1)

    def _settle(self) -> None:
        """Let wandb keep its copies of artifacts in the run folder; the default is a folder in the user's home."""
        if self._is_own_data_dir:
            self._environ[DATA_DIR] = str(self._data_dir.absolute())

    def _check_project(self) -> None:
        for path in offline_files(self.info.folder, self.info.run_id):
            if (project := read_project(path)) not in (None, self.info.project):
                sync = shlex.join(["wandb", "sync", "--project", self.info.project, str(path.parent)])
                raise UserError(
                    f"{path} is of wandb's project {project}, and project {self.info.project} was asked for. Give --project "
                    f"{project}, send it with `{sync}`, or remove it first."
                )

    def _send_events(self, events: Any) -> None:
        import wandb

        if events:
            rows = [[event.time, event.step, event.kind, event.start, event.text] for event in events]
            self._run.summary["events"] = wandb.Table(columns=["time", "step", "kind", "start", "text"], data=rows)

    def _send_results(self, end: RunEnd) -> None:
        import wandb

        media: dict[str, Any] = {name: wandb.Image(str(path)) for name, path in end.figures.items()}
        media |= {
            name: wandb.Html(str(path), inject=False) for name, path in end.pages.items() if path.stat().st_size < PAGE_BYTES
        }
        if validations := RunFolder(self.info.folder).validations.read():
            media[GALAXIES] = draw_galaxies(validation_of(validations[-1], RunFolder(self.info.folder)))
        self._run.summary.update(media)

    def _send_dataset(self) -> None:
        """Name the data set as an input: its hash, sizes and licence, and no image."""
        import wandb

        data = self.info.dataset
        if not data.get("manifest_hash"):
            return
        artifact = wandb.Artifact(_artifact_name(f"{data.get('name')}-{data.get('variant')}"), "dataset", metadata=dict(data))
        with artifact.new_file("dataset.json") as file:
            file.write(json.dumps(data, indent=2, sort_keys=True) + "\n")
        if self.mode == "online":
            self._run.use_artifact(artifact)
        else:  # ``use_artifact`` asks the server; the record of a used artifact can be written without it
            self._run._log_artifact(artifact, is_user_created=True, use_after_commit=True)

    def _send_model(self, end: RunEnd) -> None:
        import wandb

        from galaxydist.evaluation.run_model import save_weights

        folder = self._data_dir.parent / "model"
        weights, card = folder / "model.safetensors", folder / "README.md"
        step = save_weights(self.info.folder, weights)
        card.write_text(end.model_card)
        artifact = wandb.Artifact(
            _artifact_name(f"model-{self.info.run_id}"),
            "model",
            description=end.model_card,
            metadata={"step": step, **end.summary},
        )
        for path in (weights, card):
            artifact.add_file(str(path), skip_cache=True, policy="immutable")  # not copied
        self._run.log_artifact(artifact, aliases=["best"])


def draw_validation(validation: Validation) -> dict[str, Any]:
    """Return wandb's own plots of a validation: confusion matrix, recall of each class and calibration."""
    import wandb

    names = list(validation.class_names)
    counts = [
        [names[true], names[predicted], count]
        for true, row in enumerate(validation.confusion_KK)
        for predicted, count in enumerate(row)
    ]
    columns: list[int | str] = ["Actual", "Predicted", "nPredictions"]
    recalls = [[name, recall] for name, recall in zip(names, validation.recall_K, strict=True) if recall is not None]
    bins = [[found["confidence"], found["accuracy"]] for found in validation.calibration if found["count"]]
    drawn: dict[str, Any] = {
        "val/confusion": wandb.plot_table(
            "wandb/confusion_matrix/v1",
            wandb.Table(columns=columns, data=counts),
            {str(name): str(name) for name in columns},
            {"title": "Confusion matrix (validation)"},
        ),
        "val/recall_by_class": wandb.plot.bar(
            wandb.Table(columns=["class", "recall"], data=recalls), "class", "recall", title="Recall (validation)"
        ),
    }
    if bins:
        drawn["val/calibration"] = wandb.plot.line(
            wandb.Table(columns=["confidence", "accuracy"], data=bins), "confidence", "accuracy", title="Calibration (validation)"
        )
    return drawn


def has_galaxies(row: Row) -> bool:
    """Return True for the epochs 1, 4, 16, ..., whose validations show galaxies: each picture is a file of its own in wandb."""
    epoch = round(row.values.get("epoch", 0))
    return bool(epoch) and 4 ** (epoch.bit_length() // 2) == epoch


def draw_galaxies(validation: Validation) -> Any:
    """Return wandb's table of a validation's galaxies: picture, label, prediction and probability, limited in bytes."""
    import wandb

    names = list(validation.class_names)
    table, left = wandb.Table(columns=["galaxy", "image", "label", "predicted", "probability"]), TABLE_BYTES
    for galaxy in validation.galaxies:
        image, left = _image_of(galaxy, left)
        table.add_data(galaxy.galaxy_id, image, names[galaxy.label], names[galaxy.predicted], galaxy.probability)
    return table


def _image_of(galaxy: TrackedGalaxy, left: int) -> tuple[Any, int]:
    """Return a galaxy's image if it fits into the bytes that are left, and the bytes left then."""
    import wandb

    size = galaxy.image.stat().st_size if galaxy.image.exists() else left + 1
    return (wandb.Image(str(galaxy.image)), left - size) if size <= left else (None, left)


def _artifact_name(text: str) -> str:
    return "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-_.") else "-" for letter in text)[:128]


def _is_no_lost_connection(record: logging.LogRecord) -> bool:
    return "socket.send() raised" not in record.getMessage()  # printed with each line once wandb's process is gone


@contextlib.contextmanager
def explained_refusal() -> Iterator[None]:
    """Explain an error of wandb's packages, which have no common base class, if it means that the key is not valid.

    Raises:
        UserError: says how to set another key.
    """
    try:
        yield
    except Exception as error:
        text = first_line(error)
        if isinstance(error, UserError | OSError) or not ("401" in text or "403" in text or "api_key" in text.lower()):
            raise
        raise UserError(f"wandb's server refuses the key ({text}); set WANDB_API_KEY, or run `wandb login --relogin`") from None


def end_service() -> None:
    """Kill wandb's process, if this one started it: at exit, wandb would wait for it without a limit."""
    import psutil
    import wandb

    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if "wandb-core" in child.name():
                child.kill()
    run_within(TEARDOWN_S, partial(wandb.teardown, exit_code=1))  # else wandb tries it at exit, and prints a traceback


def choose_wandb_mode(environ: Mapping[str, str]) -> WandbMode:
    """Return ``online`` if there is a key and wandb's server answers within two seconds, else ``offline``."""
    if (mode := environ.get("WANDB_MODE")) in ("online", "offline"):
        return cast(WandbMode, mode)
    host, port = wandb_address(environ)
    return "online" if has_wandb_key(environ) and is_reachable(host, port) else "offline"


def wandb_address(environ: Mapping[str, str]) -> tuple[str, int]:
    """Return the host and port of wandb's server."""
    url = _wandb_url(environ)
    try:
        return url.hostname or "", url.port or (80 if url.scheme == "http" else 443)
    except ValueError as error:
        raise UserError(f"WANDB_BASE_URL is not the address of a server ({error})") from None


def _wandb_url(environ: Mapping[str, str]) -> SplitResult:
    return urlsplit(environ.get("WANDB_BASE_URL") or "https://api.wandb.ai")


def has_wandb_key(environ: Mapping[str, str]) -> bool:
    """Return True if there is a key for wandb's server: in the environment, or in the file that ``wandb login`` writes."""
    if environ.get("WANDB_API_KEY"):
        return True
    try:
        file = Path(environ.get("NETRC") or "~/.netrc").expanduser()  # given a path, Python takes a file that others may read
        return netrc.netrc(file).authenticators(_wandb_url(environ).netloc) is not None
    except (OSError, RuntimeError, netrc.NetrcParseError):  # RuntimeError: there is no home
        return False


def is_reachable(host: str, port: int) -> bool:
    """Return True if a server accepts a connection within two seconds."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=2):
        return True
    return False
