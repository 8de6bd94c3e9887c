"""wandb's offline files: read, and repaired so that ``wandb sync`` takes them all."""

import glob
import os
import shutil
import struct
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Format of wandb's offline files, ``wandb/offline-run-TIME-ID/run-ID.wandb``: a header of seven bytes, then LevelDB's log format,
# that is blocks of 32 KiB with fragments, each with a checksum, a length and a kind. A record is a protobuf message in one or
# more fragments. wandb writes through a buffer of 32 KiB, so that a killed run leaves a file without its newest rows, often one
# of seven bytes, or one that ends within a record. At such a file ``wandb sync`` gives up the whole run; so it is repaired.
BLOCK_SIZE = 32_768
HEADER_SIZE = 7  # of the file, and of each fragment
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4
TORN_DIR = "wandb-torn"


def read_records(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the complete records of an offline file, each with its end position, up to the first damaged or incomplete one."""
    from wandb.proto import wandb_internal_pb2

    for end, message in _read_messages(path.read_bytes()):
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        record.ParseFromString(message)
        yield end, record


def _read_messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    message, is_open, position = b"", False, HEADER_SIZE
    while position + HEADER_SIZE <= len(data):
        left = BLOCK_SIZE - position % BLOCK_SIZE
        if left < HEADER_SIZE:  # too small for a fragment: filled with zeros
            position += left
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, position)
        content = data[position + HEADER_SIZE : position + HEADER_SIZE + length]
        is_sound = len(content) == length and zlib.crc32(content, zlib.crc32(bytes([kind]))) == checksum
        if not is_sound or is_open != (kind in (MIDDLE, LAST)):
            return
        position += HEADER_SIZE + length
        message += content
        is_open = kind in (FIRST, MIDDLE)  # a first fragment at the end of a block may be empty
        if not is_open:
            yield position, message
            message = b""


def has_ended(path: Path) -> bool:
    """Return True if a file holds the record that wandb writes last."""
    return any(record.WhichOneof("record_type") == "exit" for _, record in read_records(path))


def read_history(path: Path) -> Counter[int]:
    """Return the number of rows of each step in a file."""
    return Counter(record.history.step.num for _, record in read_records(path) if record.WhichOneof("record_type") == "history")


def offline_files(folder: Path, run_id: str) -> list[Path]:
    """Return the offline files of one run in a run folder, oldest first."""
    return sorted((folder / "wandb").glob(f"offline-run-*/run-{glob.escape(run_id)}.wandb"))


def mend_files(folder: Path, run_id: str) -> list[str]:
    """Repair the offline files of a run, so that ``wandb sync`` takes them all; no process may be writing them.

    A file without the record of its run is moved to ``wandb-torn``, with its folder. Other files are truncated after their last
    complete record.

    Returns:
        A sentence for each file that was changed.
    """
    changes: list[str] = []
    for path in offline_files(folder, run_id):
        end, has_run = 0, False
        for position, record in read_records(path):
            end, has_run = position, has_run or record.WhichOneof("record_type") == "run"
        if not has_run:
            aside = folder / TORN_DIR / path.parent.name
            aside.parent.mkdir(exist_ok=True)
            shutil.move(path.parent, aside)
            changes.append(f"wandb had written next to nothing of the last start to {path.name}: moved to {aside}")
        elif cut := path.stat().st_size - end:
            os.truncate(path, end)
            changes.append(f"{path} ended within a record: its last {cut} bytes, which no program can read, were cut off")
    return changes


def wait_for_new_name(folder: Path, run_id: str) -> None:
    """Wait until wandb will give its next folder a new name: it names them by the second, and would write over an earlier one."""
    while any(folder.glob(f"wandb*/*-{time.strftime('%Y%m%d_%H%M%S')}-{run_id}")):
        time.sleep(0.05)


def stored_step(folder: Path, run_id: str) -> int:
    """Return the highest step in the offline files; 0 if there is none."""
    return max((step for path in offline_files(folder, run_id) for step in read_history(path)), default=0)


def read_project(path: Path) -> str | None:
    """Return the project of the run in a file; None if the file lacks it."""
    for _, record in read_records(path):
        if record.WhichOneof("record_type") == "run":
            return str(record.run.project)
    return None
