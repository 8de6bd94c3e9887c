"""Kills a writer of shards at every change that it makes to the disk, one after the other, and has the next call finish.

Run as a program: ``python killed_writer.py FOLDER overwrite|new EVERY``; of the changes before the manifest only each EVERY-th is
taken. Each writer is a fork of this process, which has no threads but those of pyarrow, which minds forks.
It prints one line a point: the change, and whether the second call's result is byte-equal to an undisturbed one's.
"""

import hashlib
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet

from galaxydist.shards.writer.writer import write_shards
from tests.helpers.shard_surveys import MemorySurvey, draw_galaxies

SURVEY = MemorySurvey(draw_galaxies(14, 16), slab_length=8)
OLD = MemorySurvey(draw_galaxies(10, 16), source_hash="2" * 64)
# From the manifest on, and some before.
LAST_CHANGES = 25
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")


def change(event: str, arguments: tuple[Any, ...]) -> str:
    """What an audit event changes in the folder; empty for anything else."""
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        return f"open {arguments[0]}"
    return f"{event} {arguments[0]}" if event in CHANGES else ""


def write(out_dir: Path, *, kill_at: int | None = None, overwrite: bool = False) -> tuple[int, int]:
    """Write in a fork; the signal that ended it, and the changes that it made."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        seen = 0

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if what := change(event, arguments):
                if seen == kill_at:
                    os.write(writer, what.replace(str(out_dir.parent), "").encode())
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1

        status = 1
        try:
            sys.addaudithook(watch)
            write_shards(SURVEY, out_dir, shard_size=8, workers=1, overwrite=overwrite)
            os.write(writer, str(seen).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        said = file.read().decode()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        print(f"{said}: ", end="", flush=True)
        return os.WTERMSIG(status), 0
    return 0, int(said or 0)


def digest(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main(base: Path, overwrite: bool, every: int) -> None:
    os.environ["TQDM_DISABLE"] = "1"
    pyarrow.scalar(0)  # imports pandas, where that is installed: once, not in each fork
    sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
    out_dir = base / "shards"
    _, num_changes = write(base / "undisturbed")
    expected = digest(base / "undisturbed")
    shutil.rmtree(base / "undisturbed")
    if overwrite:
        write_shards(OLD, base / "old", workers=1)

    # What differs when shards are overwritten comes after the manifest.
    first = num_changes - LAST_CHANGES
    for number in [*range(0, first, every)] * (not overwrite) + [*range(first, num_changes + 100)]:
        if overwrite:
            shutil.copytree(base / "old", out_dir)
        killed, _ = write(out_dir, kill_at=number, overwrite=overwrite)
        if not killed:
            break
        looked_whole = (out_dir / "manifest.json").exists()
        whole = not looked_whole or digest(out_dir) in (expected, digest(base / "old"))
        write(out_dir, overwrite=overwrite)
        left = sorted(path.name for path in base.iterdir() if path.name not in ("old", "shards"))
        print("equal" if whole and digest(out_dir) == expected and not left else f"DIFFERS {left}", flush=True)
        shutil.rmtree(out_dir, ignore_errors=True)
        for path in left:
            shutil.rmtree(base / path) if (base / path).is_dir() else (base / path).unlink()
    print(f"{number} changes", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "overwrite", int(sys.argv[3]))
