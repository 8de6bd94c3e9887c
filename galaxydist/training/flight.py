"""torch's flight recorder: the last collectives of each rank, written when a run hangs.

``torchfrtrace -p flight_rank_ FOLDER`` says which rank did not take part in which.
"""

from collections.abc import Callable, MutableMapping
from pathlib import Path

import torch
import torch.distributed as dist

PREFIX = "flight_rank_"
# Collectives kept: torch 2.14's own default.
BUFFER_SIZE = 2000
# As torch 2.11 and later read them: the new name, and the older ones that also count. Whichever of them is set decides.
BUFFER_NAMES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
FILE_NAMES = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
DUMP_NAMES = ("TORCH_NCCL_DUMP_ON_TIMEOUT",)


def flight_recorder_variables(folder: Path | None = None) -> dict[tuple[str, ...], str]:
    """What torch is to be told, by all the names that a variable goes under.

    Args:
        folder: where torch's own watchdog writes when a collective times out (``flight_rank_3``); None: torch's own place.
    """
    wanted = {BUFFER_NAMES: str(BUFFER_SIZE), DUMP_NAMES: "1"}
    return wanted if folder is None else {**wanted, FILE_NAMES: str(folder.absolute() / PREFIX)}


def set_flight_recorder(environ: MutableMapping[str, str], folder: Path | None = None) -> None:
    """Set the variables that the user has not set, under any of their names.

    Called before the process group is made. It may be called again with a folder once the run folder is known: torch reads the
    file's name when it writes the first.
    """
    for names, value in flight_recorder_variables(folder).items():
        if not any(name in environ for name in names):
            environ[names[0]] = value


def write_flight_record(folder: Path, rank: int) -> Path | None:
    """Write the collectives of this process where torch's own watchdog would.

    Returns:
        The file, or None where nothing was recorded.
    """
    if not dist.is_initialized():
        return None
    name = "_dump_nccl_trace" if "nccl" in dist.get_backend() else "_dump_fr_trace"
    dump: Callable[..., bytes] | None = getattr(torch._C._distributed_c10d, name, None)
    if dump is None:
        return None
    path = folder / f"{PREFIX}{rank}"
    path.write_bytes(dump(includeCollectives=True, includeStackTraces=True, onlyActive=False))
    return path
