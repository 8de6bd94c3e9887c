"""Which loaders are compared, the processes they run in, and whether what they give is what ours gives."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from galaxydist.bench.loader_worker import LoaderJob
from galaxydist.errors import UserError

TIMEOUT_S = 300
# Two builds of libjpeg may differ by this much, in grey levels.
TOLERANCE = 2
OURS = "galaxydist"


@dataclass(frozen=True)
class Loader:
    """One loader.

    Args:
        name: in the lines of JSON.
        title: in tables.
        module: that a process runs.
        environment: folder of its virtual environment, below the folder of environments.
        is_here: whether galaxydist's own environment has all that it needs, and serves where that folder is missing.
    """

    name: str
    title: str
    module: str
    environment: str = ""
    is_here: bool = True


GALAXYDIST = Loader(OURS, "galaxydist", "galaxydist.bench.peers.galaxydist_loader")
PEERS = (
    Loader("imagefolder", "ImageFolder + DataLoader", "galaxydist.bench.peers.imagefolder", ".venv-bench"),
    Loader("webdataset", "WebDataset", "galaxydist.bench.peers.webdataset", ".venv-bench"),
    Loader("litdata", "LitData", "galaxydist.bench.peers.litdata", ".venv-bench", is_here=False),
    Loader("mosaic", "Mosaic Streaming", "galaxydist.bench.peers.mosaic", ".venv-mosaic", is_here=False),
)


@dataclass(frozen=True)
class Processes:
    """Where loaders run.

    Args:
        environments: folder that holds the peers' virtual environments.
        environ: environment variables of the processes.
    """

    environments: Path
    environ: Mapping[str, str]

    def has(self, loader: Loader) -> bool:
        """Whether it can be measured here."""
        return loader.is_here or self._is_installed(loader)

    def run(self, loader: Loader, job: LoaderJob) -> dict[str, Any]:
        """Do a job in a process of its own, and give its answer.

        Raises:
            UserError: the process failed; with the last it said.
        """
        python = self._home(loader) / "bin" / "python" if self._is_installed(loader) else Path(sys.executable)
        # -P: the folder that the user stands in is nobody's library.
        command = [str(python), "-P", "-m", loader.module, job.to_json()]
        # Some peers leave files where temporary files go.
        with tempfile.TemporaryDirectory(prefix="galaxydist-bench-") as folder:
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**self.environ, "TMPDIR": folder},
                start_new_session=True,
            )
            try:
                output, errors = process.communicate(timeout=TIMEOUT_S)
            except subprocess.TimeoutExpired:
                raise UserError(f"{loader.title} did not {job.action} within {TIMEOUT_S} s") from None
            finally:
                _end(process)
        if process.returncode:
            said = (errors.strip() or output.strip() or "nothing").splitlines()[-1]
            raise UserError(f"{loader.title} failed to {job.action} ({job.task}); the last it said: {said}")
        answer: dict[str, Any] = json.loads(output.splitlines()[-1])
        return answer

    def _is_installed(self, loader: Loader) -> bool:
        return bool(loader.environment) and (self._home(loader) / "installed").exists()

    def _home(self, loader: Loader) -> Path:
        return self.environments / loader.environment


def _end(process: subprocess.Popen[str]) -> None:
    """Leave no worker behind: the process leads a group of its own."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def prepare(processes: Processes, loader: Loader, job: LoaderJob, stamp: str) -> None:
    """Write the loader's own form of the images, unless it is there and was made from the same.

    Args:
        stamp: names the images and how they are written; kept beside the form, last.
    """
    note = job.form.with_suffix(".json")
    if note.exists() and note.read_text() == stamp and job.form.is_dir():
        return
    note.unlink(missing_ok=True)
    shutil.rmtree(job.form, ignore_errors=True)
    job.form.mkdir(parents=True)
    processes.run(loader, replace(job, action="prepare"))
    note.write_text(stamp)


def check(processes: Processes, loader: Loader, job: LoaderJob, num_images: int) -> int:
    """See that one epoch of a loader has every image once, with our pixels.

    Returns:
        The greatest difference, in grey levels.

    Raises:
        UserError: it has not.
    """
    found = processes.run(loader, replace(job, action="check", task="decode"))
    told = f"{loader.title} (with our decoder)" if job.ours else loader.title
    again = f"remove {job.form.parent} and give the command again"
    if found["worst"] > TOLERANCE:
        raise UserError(
            f"{told} gives other images than galaxydist: galaxy {found['worst_key']} differs by {found['worst']} grey levels, "
            f"more than {TOLERANCE}; {again}"
        )
    if found["missing"] or found["repeated"] or found["num_images"] != num_images:
        raise UserError(
            f"{told} gives {found['num_images']} images in an epoch of {num_images}: {found['missing']} are missing, "
            f"{found['repeated']} come more than once; {again}"
        )
    return int(found["worst"])
