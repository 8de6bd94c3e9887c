"""``galaxydist bench app``: start of the app, its first answer and later ones, over HTTP as a browser asks."""

import http.client
import json
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from galaxydist.bench.common import Lap, show, show_json, spread
from galaxydist.bench.loader_speed import simulated_shards
from galaxydist.bench.startup import LAUNCH, LAUNCH_CODE
from galaxydist.cpus import available_cores
from galaxydist.errors import UserError
from galaxydist.runs.folder import RunFolder
from galaxydist.shards.manifest import Manifest

# Recipes whose models are trained for one short epoch where no run is given: how well they know galaxies changes no time.
RECIPES = ("demo", "resnet18")
NUM_GALAXIES = 300
# Folder that `galaxydist app` publishes a run into.
PUBLISHED = "published"
PATIENCE_S = 600.0
_BOUNDARY = "galaxydist-bench"


@dataclass(frozen=True)
class AppConditions:
    """Conditions of the measurement.

    Args:
        runs: run folders; none: runs of ``RECIPES`` on simulated galaxies, made once.
        picture: file that is asked about; None: a simulated galaxy.
        rounds: starts of each kind.
        answers: answers after the first one of each start.
    """

    runs: Sequence[Path] = ()
    picture: Path | None = None
    rounds: int = 3
    answers: int = 10


@dataclass(frozen=True)
class _Times:
    """Seconds of one start: until the page is there (also of processor time), until the first answer, and of each later one."""

    start: Lap
    first: float
    later: list[float]


def measure_app(root: Path, environ: Mapping[str, str], conditions: AppConditions) -> list[dict[str, Any]]:
    """Start the app of each run in turn, unpublished and published, and ask it; print a line for each and a line of JSON.

    Args:
        root: folder of the benchmark's files; runs that are made are kept for the next time.
        environ: environment variables of the processes.
        conditions: of the measurement.

    Returns:
        The content of the lines of JSON.

    Raises:
        UserError: a process failed; the error names its log.
    """
    root.mkdir(parents=True, exist_ok=True)
    manifest = simulated_shards(root, NUM_GALAXIES)
    runs = conditions.runs or [_make_run(root, environ, manifest, recipe) for recipe in RECIPES]
    picture = conditions.picture.read_bytes() if conditions.picture is not None else _read_galaxy(manifest)
    found: dict[Path, dict[str, list[_Times]]] = {run: {"new": [], "published": []} for run in runs}
    for _ in range(conditions.rounds):
        for run in runs:
            shutil.rmtree(run / PUBLISHED, ignore_errors=True)
            for kind in ("new", "published"):
                with _started(run, environ, root / "app.log") as (port, start):
                    first, *later = [_ask(port, picture) for _ in range(1 + conditions.answers)]
                found[run][kind].append(_Times(start, first, later))
    results = [_result(run, kinds, conditions) for run, kinds in found.items()]
    show_json(*results)
    return results


def _result(run: Path, kinds: Mapping[str, Sequence[_Times]], conditions: AppConditions) -> dict[str, Any]:
    both = [times for found in kinds.values() for times in found]
    later = [seconds for times in both for seconds in times.later]
    recipe = RunFolder(run).read_recipe().recipe
    result = {
        "task": "app",
        "model": recipe["model.name"],
        "image_size": recipe["data.image_size"],
        "start_new_s": median(times.start.wall_s for times in kinds["new"]),
        "start_new_cpu_s": median(times.start.cpu_s for times in kinds["new"]),
        "start_s": median(times.start.wall_s for times in kinds["published"]),
        "start_cpu_s": median(times.start.cpu_s for times in kinds["published"]),
        "first_answer_s": median(times.first for times in both),
        "answer_s": median(later),
        "rounds": conditions.rounds,
        "answers": conditions.answers,
        "cores": available_cores(),
    }
    starts, new = ([times.start.wall_s for times in kinds[kind]] for kind in ("published", "new"))
    show(
        f"{result['model']}, {result['image_size']} px: start {spread(starts, 1)} s "
        f"({result['start_cpu_s']:.1f} of a processor), with publishing "
        f"{spread(new, 1)} s ({result['start_new_cpu_s']:.1f}); first answer "
        f"{spread([times.first for times in both], 2)} s, later ones {spread(later, 3)} s"
    )
    return result


def _make_run(root: Path, environ: Mapping[str, str], manifest: Manifest, recipe: str) -> Path:
    """Return a run of one epoch, which is made unless it is there."""
    run = root / "runs" / recipe
    if RunFolder(run).is_finished:
        return run
    shutil.rmtree(run, ignore_errors=True)
    arguments = [f"recipe={recipe}", f"data.manifest={manifest.path}", f"run.dir={run}", "train.epochs=1", "eval.figures=false"]
    settings = [*arguments, "tracker.name=none", "model.pretrained=false", "data.image_size=64"]
    launcher = [str(LAUNCH)] if LAUNCH.is_file() else ["-c", LAUNCH_CODE]
    log = root / f"{recipe}.log"
    with log.open("wb") as stream:
        command = [sys.executable, *launcher, *settings]
        done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=dict(environ), check=False)
    if done.returncode:
        raise UserError(f"the training run of {recipe} failed: see {log}")
    return run


def _read_galaxy(manifest: Manifest) -> bytes:
    with tarfile.open(manifest.shard_path("train", 0)) as tar:
        for member in tar:
            if member.name.endswith(f".{manifest.extension}"):
                data = tar.extractfile(member)
                assert data is not None
                return data.read()
    raise AssertionError("a shard holds images")


@contextmanager
def _started(run: Path, environ: Mapping[str, str], log: Path) -> Iterator[tuple[int, Lap]]:
    """Run the app inside; yields its port, and the time until its page was there."""
    command = [sys.executable, "-m", "galaxydist", "app", str(run)]
    with log.open("w") as stream:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stream, text=True, env=dict(environ))
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        found = re.fullmatch(r"the app: http://127\.0\.0\.1:(\d+)\n", line)
        if found is None:
            raise UserError(f"the app of {run} did not start: see {log}")
        port = int(found[1])
        _request(port, "GET", "/")
        took_s = time.perf_counter() - began
        used = psutil.Process(process.pid).cpu_times()
        # Those of the process that published, which has ended, too.
        yield port, Lap(took_s, used.user + used.system + used.children_user + used.children_system)
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE_S)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _ask(port: int, picture: bytes) -> float:
    """Upload a picture, and return the seconds until its answer."""
    number = json.loads(_request(port, "GET", "/config"))["dependencies"]
    event = next(one["id"] for one in number if one["api_name"] == "predict")
    began = time.perf_counter()
    head = f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="files"; filename="galaxy.jpg"\r\n\r\n'
    form = head.encode() + picture + f"\r\n--{_BOUNDARY}--\r\n".encode()
    (path,) = json.loads(_request(port, "POST", "/gradio_api/upload", form, f"multipart/form-data; boundary={_BOUNDARY}"))
    session = f"bench{time.time_ns()}"
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    content = {"data": [file, None], "fn_index": event, "session_hash": session}
    _request(port, "POST", "/gradio_api/queue/join", json.dumps(content).encode())
    stream = _request(port, "GET", f"/gradio_api/queue/data?session_hash={session}").decode()
    took = time.perf_counter() - began
    messages = [json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if line.startswith("data: ")]
    if not any(message["msg"] == "process_completed" and message["success"] for message in messages):
        raise UserError("the app gave no answer: see its log")
    return took


def _request(port: int, method: str, path: str, body: bytes | None = None, kind: str = "application/json") -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    try:
        connection.request(method, path, body, {"content-type": kind})
        answer = connection.getresponse()
        content = answer.read()
    finally:
        connection.close()
    if answer.status != 200:
        raise UserError(f"the app refused {method} {path.partition('?')[0]} (HTTP {answer.status})")
    return content
