"""Run folders for tests of what a user sees of runs."""

import dataclasses
import json
import shutil
import time
from pathlib import Path

from galaxydist.cluster.records import JobFiles, JobRecord

JOB = JobRecord(
    job_id="123456789",
    scheduler="slurm",
    cluster="test",
    time=1_700_000_000.0,
    nodes=1,
    tasks=1,
    time_limit_min=60,
    code=Path("/code"),
    folder=Path("/slurm"),
)


def copy_run(source: Path, target: Path, *, is_finished: bool = False, **job: object) -> JobFiles:
    """A copy of a finished run's folder, as if it were not (unless asked for), submitted as a job where ``job`` says which."""
    shutil.copytree(source, target)
    if not is_finished:
        (target / "result.json").unlink()
    files = JobFiles(target)
    if job:
        add_job(files, **job)
    return files


def add_job(files: JobFiles, **changes: object) -> JobRecord:
    record = dataclasses.replace(JOB, **{"time": time.time() - 1000, "folder": files.slurm_dir, **changes})  # type: ignore[arg-type]
    files.append_job(record)
    return record


def add_validations(run: Path, values: dict[int, float], metric: str = "accuracy") -> None:
    with (run / "metrics.jsonl").open("a") as file:
        for step, value in values.items():
            file.write(json.dumps({"step": step, "epoch": step / 3, f"val/{metric}": value}) + "\n")


FULL_RECORD = JobRecord(
    job_id="12_3",
    scheduler="slurm",
    cluster="a100",
    time=1_700_000_000.5,
    nodes=2,
    tasks=8,
    time_limit_min=60,
    code=Path("/shared/code/0123"),
    folder=Path("/shared/runs/vit/logs/slurm"),
    arguments=("recipe=vit", 'run.dir=/shared/a "b"\nc'),
    cluster_arguments=("cluster=a100",),
)
