"""Trackers: where metrics go beside the run folder. Rank 0 holds a real one, every other rank the null one.

metrics.jsonl is exact; every tracker is derived from it. What a tracker's program has *stored* decides what it is sent: at a
start the rows that it lacks, later each new row once it is whole.
"""

import contextlib
import glob
import heapq
import logging
import math
import netrc
import os
import shlex
import shutil
import socket
import struct
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from galaxydist.distributed import World
from galaxydist.errors import first_line
from galaxydist.recipe.identity import to_dict
from galaxydist.recipe.schema import Recipe, TrackerConfig
from galaxydist.runs.folder import RunFolder
from galaxydist.shards.manifest import Manifest

# wandb's offline files, read back: the steps that they really hold after a run was killed.
#
# wandb writes what it is given to ``wandb/offline-run-TIME-ID/run-ID.wandb`` through a buffer of 32 KiB. A run that is
# killed
# leaves a file without its newest rows, often one of seven bytes, or one that ends within a record. At such a file ``wandb
# sync``
# gives up the whole run, so it is mended before the run goes on.
#
# A file is a header of seven bytes, then LevelDB's log format: blocks of 32 KiB; in them fragments with a checksum, a
# length and
# a kind. A record, whole or in fragments, is a protobuf message.

BLOCK_SIZE = 32_768
HEADER_SIZE = 7  # of the file, and of each fragment
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4
TORN_DIR = "wandb-torn"


def read_records(path: Path, block: int = 0) -> Iterator[tuple[int, Any]]:
    """The whole records of a file, each with the place in the file where it ends; up to the first that is damaged or cut off.

    Args:
        path: of the file.
        block: number of the block where the first one may begin.
    """
    from wandb.proto import wandb_internal_pb2

    with path.open("rb") as file:
        file.seek(block * BLOCK_SIZE)
        data = file.read()
    for end, message in _read_messages(data, HEADER_SIZE if block == 0 else 0):
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        record.ParseFromString(message)
        yield block * BLOCK_SIZE + end, record


def _read_messages(data: bytes, place: int) -> Iterator[tuple[int, bytes]]:
    """The whole messages from a place on, each with the place where it ends. The end of one that began before is passed over."""
    message, is_open, is_first = b"", False, True
    while place + HEADER_SIZE <= len(data):
        left = BLOCK_SIZE - place % BLOCK_SIZE
        if left < HEADER_SIZE:  # too small for a fragment: filled with zeros
            place += left
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, place)
        content = data[place + HEADER_SIZE : place + HEADER_SIZE + length]
        is_sound = len(content) == length and zlib.crc32(content, zlib.crc32(bytes([kind]))) == checksum
        if not is_sound or kind not in (WHOLE, FIRST, MIDDLE, LAST):
            return
        place += HEADER_SIZE + length
        if is_first and kind in (MIDDLE, LAST):
            continue
        is_first = False
        if is_open != (kind in (MIDDLE, LAST)):
            return
        message += content
        is_open = kind in (FIRST, MIDDLE)
        if not is_open:
            yield place, message
            message = b""


def has_ended(path: Path) -> bool:
    """Whether a file holds the record that wandb writes last: it stands in the last block or begins in the one before."""
    last_block = max(0, path.stat().st_size - 1) // BLOCK_SIZE
    records = read_records(path, max(0, last_block - 1))
    return any(record.WhichOneof("record_type") == "exit" for _, record in records)


def read_history(path: Path) -> dict[int, int]:
    """Return the number of rows that a file holds of each step."""
    steps: dict[int, int] = {}
    for _, record in read_records(path):
        if record.WhichOneof("record_type") == "history":
            steps[record.history.step.num] = steps.get(record.history.step.num, 0) + 1
    return steps


def offline_files(folder: Path, run_id: str) -> list[Path]:
    """The offline files of one run below a run folder, oldest first."""
    return sorted((folder / "wandb").glob(f"offline-run-*/run-{glob.escape(run_id)}.wandb"))


def mend_files(folder: Path, run_id: str) -> list[str]:
    """Make the offline files of a run such that ``wandb sync`` takes them all; nobody may be writing them.

    A file that does not even say to which run it belongs is moved to ``wandb-torn``, with its folder. What follows the last whole
    record of another is cut off.

    Returns:
        A sentence for each file that was changed.
    """
    said: list[str] = []
    for path in offline_files(folder, run_id):
        end, has_run = 0, False
        for place, record in read_records(path):
            end, has_run = place, has_run or record.WhichOneof("record_type") == "run"
        if not has_run:
            aside = folder / TORN_DIR / path.parent.name
            aside.parent.mkdir(exist_ok=True)
            shutil.move(path.parent, aside)
            said.append(f"wandb had written next to nothing of the last start to {path.name}: moved to {aside}")
        elif cut := path.stat().st_size - end:
            os.truncate(path, end)
            said.append(f"{path} ended within a record: its last {cut} bytes, which nothing can read, were cut off")
    return said


def stored_step(folder: Path, run_id: str) -> int:
    """The highest step whose row the offline files hold; 0 where there is none."""
    return max((step for path in offline_files(folder, run_id) for step in read_history(path)), default=0)


LOG = logging.getLogger(__name__)

WRITING_S = 60.0  # how long wandb may take to write what it holds of a run that has ended; it takes some milliseconds


class Tracker(Protocol):
    """What the trainer asks of a tracker."""

    @property
    def run_id(self) -> str | None: ...

    def log(self, metrics: Mapping[str, Any], step: int) -> None: ...

    def finish(self, summary: Mapping[str, float], exit_code: int) -> str | None: ...


class Sink(Protocol):
    """A tracker's program, to which whole rows are sent in the order of their steps. It may raise anything at any time.

    Attributes:
        stored_step: the highest step whose row it had stored when it was opened; 0 where there was none.
    """

    stored_step: int

    def send(self, row: Mapping[str, Any], step: int) -> None: ...

    def close(self, summary: Mapping[str, float], exit_code: int) -> str:
        """Write out everything; a line that says where it is."""
        ...

    def abandon(self) -> None:
        """Let go of a program that has failed, silently."""
        ...


class NullTracker:
    """Tracks nothing."""

    run_id: str | None = None

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Nothing."""

    def finish(self, summary: Mapping[str, float], exit_code: int) -> str | None:
        """Nothing."""


class RunTracker:
    """Sends the rows of a run to a sink, each step once. A failure is said once and never stops the training.

    A row is whole when a higher step begins, or the run has ended well: a validation belongs to the row of its step.

    Args:
        sink: takes the rows. What it lacks of those in the run folder is sent to it at once.
        folder: of the run, cut back to the step where it goes on.
        run_id: the tracker's name for the run.
    """

    def __init__(self, sink: Sink, folder: RunFolder, run_id: str) -> None:
        self.run_id: str | None = run_id
        self._sink = sink
        self._folder = folder
        self._sent_step = sink.stored_step
        self._row: dict[str, Any] = {}
        self._row_step = 0
        self._failed = False
        folder.write_tracker(run_id=run_id, stored_step=sink.stored_step, is_complete=False)
        for step, row in read_rows(folder):
            self.log(row, step)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Add metrics to the row of a step; what is stored already is left out, and so is what is not finite."""
        if self._failed or step <= self._sent_step:
            return
        if step != self._row_step:
            self._send()
        self._row_step = step
        self._row |= {name: value for name, value in metrics.items() if _is_known(value)}

    def finish(self, summary: Mapping[str, float], exit_code: int) -> str | None:
        """Close the sink. A row that may lack its validation is sent only at a good end: else the run goes on with it.

        Returns:
            At a good end, a line that says where the sink keeps the run.
        """
        if exit_code == 0:
            self._send()
        if self._failed:
            return None
        try:
            place = self._sink.close(summary, exit_code)
        except Exception as error:  # whatever a tracker does, the run goes on
            self._fail(error)
            return None
        self._folder.write_tracker(run_id=self.run_id, stored_step=self._sent_step, is_complete=exit_code == 0)
        return place if exit_code == 0 else None

    def _send(self) -> None:
        if self._failed or not self._row:
            return
        try:
            self._sink.send(self._row, self._row_step)
        except Exception as error:  # as above
            self._fail(error)
        self._sent_step, self._row = self._row_step, {}

    def _fail(self, error: Exception) -> None:
        self._failed = True
        LOG.warning(
            "the tracker failed (%s). metrics.jsonl has every number; what the tracker lacks is sent to it when the same command "
            "is given again",
            first_line(error),
        )
        self._sink.abandon()


def read_rows(folder: RunFolder) -> Iterator[tuple[int, dict[str, Any]]]:
    """The lines of metrics.jsonl and timing.jsonl in the order of their steps; a step may have several."""
    for line in heapq.merge(folder.metrics.read(), folder.timing.read(), key=lambda line: int(line["step"])):
        yield line.pop("step"), line


def _is_known(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


class WandbSink:
    """Weights & Biases, online or offline.

    Args:
        config: project, entity, tags.
        mode: ``online`` or ``offline``.
        folder: the run folder; wandb keeps its files below it.
        run_id: of the run to continue, or a new one.
        name: shown on the dashboard.
        recipe: the resolved recipe, stored as the run's config.
        known_step: the highest step that was known to be stored at an earlier time: files may have been removed since.
    """

    def __init__(
        self,
        config: TrackerConfig,
        *,
        mode: str,
        folder: Path,
        run_id: str,
        name: str,
        recipe: Mapping[str, Any],
        known_step: int,
    ) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        for sentence in mend_files(folder, run_id):
            LOG.warning("%s", sentence)
        self.stored_step = max(known_step, stored_step(folder, run_id))
        self._folder = folder
        self._id = run_id
        self._is_online = mode == "online"
        logging.getLogger("asyncio").addFilter(_is_no_lost_connection)
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            tags=list(config.tags) or None,
            mode="online" if self._is_online else "offline",
            dir=str(folder),
            id=run_id,
            name=name,
            resume="allow",
            config=dict(recipe),
            settings=wandb.Settings(silent=True, init_timeout=60),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if self._is_online:
            self.stored_step = self._run.starting_step - 1  # the server says its next step

    def send(self, row: Mapping[str, Any], step: int) -> None:
        """Send one whole row."""
        self._run.log({**row, "step": step}, step=step, commit=True)

    def close(self, summary: Mapping[str, float], exit_code: int) -> str:
        """Wait until all is stored. Offline, wandb's process may still be writing when ``finish`` returns."""
        self._run.summary.update(dict(summary))
        self._run.finish(exit_code=exit_code)
        if self._is_online:
            return f"wandb: {self._run.url}"
        file, deadline = Path(self._run.settings.sync_file), time.monotonic() + WRITING_S
        while not has_ended(file):
            if time.monotonic() > deadline:
                raise TimeoutError(f"after {WRITING_S:g} s wandb had not written the end of {file}")
            time.sleep(0.005)
        several = offline_files(self._folder, self._id)
        pattern = f"{shlex.quote(str(self._folder / 'wandb'))}/offline-run-*-{self._id}*"
        command = shlex.quote(str(several[0].parent)) if len(several) == 1 else pattern
        return f"wandb: offline, in {self._folder / 'wandb'}; to send it: wandb sync {command}"

    def abandon(self) -> None:
        """Let go of wandb's process. Where it is gone, each of these raises, and wandb would print that at the exit."""
        import wandb

        with contextlib.suppress(Exception):
            self._run.finish(exit_code=1)
        with contextlib.suppress(Exception):
            wandb.teardown(exit_code=1)


def _is_no_lost_connection(record: logging.LogRecord) -> bool:
    return "socket.send() raised" not in record.getMessage()  # for each line that is printed once wandb's process is gone


def start_tracker(
    world: World, recipe: Recipe, folder: RunFolder, manifest: Manifest, *, run_id: str | None, environ: Mapping[str, str]
) -> Tracker:
    """The tracker of a run: on rank 0 the recipe's, elsewhere none. It goes on with the curve ``run_id``, or the run folder's.

    Where it cannot be started there is none either: a tracker that fails never stops a training run.
    """
    if not world.is_main or recipe.tracker.name == "none":
        return NullTracker()
    told = to_dict(recipe)
    if manifest.remote is not None:
        told["data"]["manifest"] = manifest.location  # without what may be secret in a URL
    try:
        return open_tracker(recipe.tracker, folder, told, run_id=run_id, environ=environ)
    except Exception as error:  # as above
        LOG.warning("wandb could not start (%s); metrics.jsonl has every number", error)
        return NullTracker()


def open_tracker(
    config: TrackerConfig, folder: RunFolder, recipe: Mapping[str, Any], *, run_id: str | None, environ: Mapping[str, str]
) -> RunTracker:
    """The tracker of a run folder, sent what it lacks.

    Args:
        config: of the tracker.
        folder: of the run.
        recipe: the resolved recipe, for the tracker to show.
        run_id: of the curve to continue; None: the run folder's, or a new one.
        environ: says whether there is a key.
    """
    stored = folder.read_tracker()
    run_id = run_id or stored.get("run_id") or uuid.uuid4().hex[:8]
    mode = config.mode if config.mode != "auto" else choose_wandb_mode(environ)
    sink = WandbSink(
        config,
        mode=mode,
        folder=folder.path,
        run_id=run_id,
        name=folder.path.name,
        recipe=recipe,
        known_step=stored.get("stored_step", 0) if run_id == stored.get("run_id") else 0,
    )
    return RunTracker(sink, folder, run_id)


def complete_tracker(
    world: World, recipe: Recipe, folder: RunFolder, manifest: Manifest, *, environ: Mapping[str, str]
) -> str | None:
    """Send the tracker of a finished run what it lacks, since the run was killed after its result was written."""
    result = folder.read_result() or {}
    if not world.is_main or folder.read_tracker().get("is_complete", True):
        return None
    summary = {name: value for name, value in result.items() if name != "step"}
    return start_tracker(world, recipe, folder, manifest, run_id=None, environ=environ).finish(summary, 0)


def choose_wandb_mode(environ: Mapping[str, str]) -> str:
    """``online`` where there is a key and wandb's server answers within two seconds, else ``offline``."""
    if environ.get("WANDB_MODE") in ("online", "offline"):
        return environ["WANDB_MODE"]
    host, port = wandb_address(environ)
    return "online" if has_wandb_key(environ, host) and is_reachable(host, port) else "offline"


def wandb_address(environ: Mapping[str, str]) -> tuple[str, int]:
    """Host and port of wandb's server."""
    host = environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0]
    name, _, port = host.partition(":")
    return name, int(port or 443)


def has_wandb_key(environ: Mapping[str, str], host: str) -> bool:
    """Whether there is a key for a server: in the environment, or where ``wandb login`` puts it."""
    if environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def is_reachable(host: str, port: int) -> bool:
    """Whether a server takes connections within two seconds."""
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        return False
    return True
