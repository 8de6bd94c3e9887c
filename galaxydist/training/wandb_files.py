"""wandb's offline files, read back: the steps that they really hold after a run was killed.

wandb writes what it is given to ``wandb/offline-run-TIME-ID/run-ID.wandb`` through a buffer of 32 KiB. A run that is killed
leaves a file without its newest rows, often one of seven bytes, or one that ends within a record. At such a file ``wandb sync``
gives up the whole run, so it is mended before the run goes on.

A file is a header of seven bytes, then LevelDB's log format: blocks of 32 KiB; in them fragments with a checksum, a length and
a kind. A record, whole or in fragments, is a protobuf message.
"""

import glob
import os
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
