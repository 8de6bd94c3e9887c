"""Compared loaders, their processes, and the check that all give the same images."""

import contextlib
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
# Largest difference between two builds of libjpeg, in grey levels.
TOLERANCE = 2
# The same of nvJPEG, which computes in other precision: JPEG's standard allows an inverse transform 1 to 2 levels, the conversion
# of colours more. A wrong image differs by some hundred.
GPU_TOLERANCE = 24
OURS = "galaxydist"


@dataclass(frozen=True)
class Loader:
    """One loader.

    Args:
        name: in the lines of JSON.
        title: in tables.
        module: run by its process.
        environment: folder of its virtual environment, below the folder of environments.
        is_here: True if galaxydist's own environment has all its requirements and is used if that folder is missing.
        needs_gpu: True if it decodes on a GPU, where its batches are, too.
        takes_decoder: True if it can call our decoder.
        tolerance: largest difference from our pixels, in grey levels.
    """

    name: str
    title: str
    module: str
    environment: str = ""
    is_here: bool = True
    needs_gpu: bool = False
    takes_decoder: bool = True
    tolerance: int = TOLERANCE


DALI = "galaxydist.bench.peers.dali_pipeline"
GALAXYDIST = Loader(OURS, "galaxydist", "galaxydist.bench.peers.galaxydist_loader")
PEERS = (
    Loader("imagefolder", "ImageFolder + DataLoader", "galaxydist.bench.peers.imagefolder", ".venv-bench"),
    Loader("webdataset", "WebDataset", "galaxydist.bench.peers.webdataset", ".venv-bench"),
    Loader("litdata", "LitData", "galaxydist.bench.peers.litdata", ".venv-bench", is_here=False),
    Loader("spdl", "SPDL", "galaxydist.bench.peers.spdl_pipeline", ".venv-spdl", is_here=False),
    Loader("mosaic", "Mosaic Streaming", "galaxydist.bench.peers.mosaic", ".venv-mosaic", is_here=False),
    Loader("dali", "DALI on the CPU", DALI, ".venv-dali", is_here=False, takes_decoder=False),
    Loader(
        "dali-gpu",
        "DALI, mixed decoder",
        DALI,
        ".venv-dali",
        is_here=False,
        needs_gpu=True,
        takes_decoder=False,
        tolerance=GPU_TOLERANCE,
    ),
)


@dataclass(frozen=True)
class Processes:
    """Starts the loaders' processes.

    Args:
        environments: folder that holds the peers' virtual environments.
        environ: environment variables of the processes.
    """

    environments: Path
    environ: Mapping[str, str]

    def python(self, loader: Loader) -> Path | None:
        """Return the interpreter of a loader's environment; None if the loader is not installed."""
        home = self.environments / loader.environment
        if loader.environment and (home / "installed").exists():
            return home / "bin" / "python"
        return Path(sys.executable) if loader.is_here else None

    def run(self, loader: Loader, job: LoaderJob) -> dict[str, Any]:
        """Do a job in a new process, and return its answer.

        Raises:
            UserError: the process failed; the error has the last line of its output.
        """
        # -P: modules in the current folder are not imported.
        command = [str(self.python(loader)), "-P", "-m", loader.module, job.to_json()]
        # Some peers leave files in the folder for temporary files.
        with tempfile.TemporaryDirectory(prefix="galaxydist-bench-") as folder:
            environ = {**self.environ, "TMPDIR": folder}
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environ, start_new_session=True)
            try:
                output, errors = process.communicate(timeout=TIMEOUT_S)
            except subprocess.TimeoutExpired:
                raise UserError(f"{loader.title} did not {job.action} within {TIMEOUT_S} s") from None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # its workers too
                    process.wait()
        if process.returncode:
            last = (errors.strip() or output.strip() or "nothing").splitlines()[-1]
            raise UserError(f"{loader.title} failed to {job.action} ({job.task}); its last output: {last}")
        answer: dict[str, Any] = json.loads(output.splitlines()[-1])
        return answer


def prepare(processes: Processes, loader: Loader, job: LoaderJob, stamp: str) -> None:
    """Write the images in the loader's own form, unless that exists and was made from the same images.

    Args:
        processes: starts the loader's process.
        loader: the loader.
        job: its job, of any action.
        stamp: identifies the images and their form; written beside the form, last.
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
    """Check that one epoch of a loader has every image once, with our pixels.

    Returns:
        The greatest difference, in grey levels.

    Raises:
        UserError: the images or their pixels differ.
    """
    found = processes.run(loader, replace(job, action="check", task="decode"))
    title = f"{loader.title} (with our decoder)" if job.ours else loader.title
    remedy = f"remove {job.form.parent} and give the command again"
    if found["worst"] > loader.tolerance:
        raise UserError(
            f"{title} gives other images than galaxydist: galaxy {found['worst_key']} differs by {found['worst']} grey levels, "
            f"more than {loader.tolerance}; {remedy}"
        )
    if found["missing"] or found["repeated"] or found["num_images"] != num_images:
        raise UserError(
            f"{title} gives {found['num_images']} images in an epoch of {num_images}: {found['missing']} are missing, "
            f"{found['repeated']} come more than once; {remedy}"
        )
    return int(found["worst"])
