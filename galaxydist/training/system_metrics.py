"""State of every node during a run: processors, memory, disks, network and GPUs, in ``system/NODE.jsonl`` of the run folder.

On each node the first rank samples in a thread of its own. Lines are appended, also by later starts of the run, so that their
steps may go back; their times do not. A failure to sample or to write is logged once, and never stops the training.
"""

import ctypes
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from galaxydist.distributed import World
from galaxydist.errors import first_line
from galaxydist.runs.folder import RunFolder
from galaxydist.runs.metrics_file import MetricsFile

logger = logging.getLogger(__name__)

# Seconds between two samples. A line takes about a millisecond and 500 bytes, and 150 bytes more for each GPU: some 20 MB a week.
INTERVAL_S = 15.0
# Shortest time over which rates are meaningful.
SHORTEST_S = 1.0
# Longest wait for a sample in progress at the end, such as one that a network file system holds up.
CLOSE_S = 5.0
GB, MB = 1e9, 1e6
NVML_LIBRARY = "libnvidia-ml.so.1"


def open_system_metrics(world: World, folder: RunFolder, step: Callable[[], int]) -> AbstractContextManager[object]:
    """Return a context in which this node's state is sampled, on one rank of each node. All ranks take part.

    Args:
        world: the processes.
        folder: the run folder, on a disk that all nodes share.
        step: returns the optimizer steps done.
    """
    host = socket.gethostname()
    gpu = str(torch.cuda.get_device_properties(world.device).uuid) if world.device.type == "cuda" else None
    ranks = [found[1:] for found in world.all_gather((host, world.rank, os.getpid(), gpu)) if found[0] == host]
    if world.rank != ranks[0][0]:
        return nullcontext()
    node = re.sub(r"[^\w.-]", "-", host)
    gpus = [gpu for _, _, gpu in ranks if gpu is not None]
    sampler = NodeSampler(node, [pid for _, pid, _ in ranks], NvidiaGPUs(gpus) if gpus else None)
    return SystemMetrics(folder.system_dir / f"{node}.jsonl", sampler, step)


class SystemMetrics:
    """Appends samples of a node to a file, every 15 seconds and at the end. Use as a context manager.

    Args:
        path: the file; its folder is created in an existing run folder.
        sampler: of the node.
        step: returns the optimizer steps done.
        interval_s: seconds between two samples.
    """

    def __init__(self, path: Path, sampler: "NodeSampler", step: Callable[[], int], *, interval_s: float = INTERVAL_S) -> None:
        self._file, self._sampler, self._step, self._interval_s = MetricsFile(path), sampler, step, interval_s
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="galaxydist-system-metrics", daemon=True)

    def __enter__(self) -> "SystemMetrics":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        try:
            self._file.path.parent.mkdir(exist_ok=True)
            self._sampler.start()
            while not self._is_over.wait(self._interval_s):
                self._write()
            if self._sampler.age_s >= SHORTEST_S:
                self._write()
        except Exception as error:  # no error of a measurement stops the run
            logger.warning("the state of this node is no longer written to %s: %s", self._file.path, first_line(error))

    def _write(self) -> None:
        self._file.append(self._step(), {"time": round(time.time(), 1), **self._sampler.sample()})


class NodeSampler:
    """Measures this node and the run's processes on it; rates are means since the sample before.

    Args:
        node: the node's name in the names of the values.
        pids: of the run's processes on the node.
        gpus: their GPUs, or None.
    """

    def __init__(self, node: str, pids: Sequence[int], gpus: "NvidiaGPUs | None" = None) -> None:
        self._prefix, self._gpus = f"system/{node}/", gpus
        self._processes: list[psutil.Process] = []
        for pid in pids:
            with suppress(psutil.Error):  # in a container of its own
                self._processes.append(psutil.Process(pid))
        self._totals: dict[str, int] = {}
        self._since = time.monotonic()

    def start(self) -> None:
        """Begin the time of the first sample; to be called in the thread that takes the samples."""
        psutil.cpu_percent()  # measures from the last call of the same thread on
        self._totals, self._since = _read_totals(), time.monotonic()

    @property
    def age_s(self) -> float:
        """Seconds since the last sample."""
        return time.monotonic() - self._since

    def sample(self) -> dict[str, float]:
        """Return values named ``system/NODE/...``.

        ``cpu_percent`` and ``memory_percent`` (of the node), ``memory_gb`` (in use on the node), ``disk_read_mb_s``,
        ``disk_write_mb_s``, ``network_in_mb_s`` and ``network_out_mb_s`` (of the node), ``process_memory_gb`` (resident) and
        ``process_threads`` (of the run), and for each GPU those of ``NvidiaGPUs.sample``. What cannot be measured is left out.
        """
        memory, totals, age_s = psutil.virtual_memory(), _read_totals(), max(self.age_s, 1e-3)
        values = {"cpu_percent": psutil.cpu_percent(), "memory_percent": memory.percent, "memory_gb": memory.used / GB}
        values |= {
            f"{name}_mb_s": max(0, total - self._totals[name]) / MB / age_s
            for name, total in totals.items()
            if name in self._totals
        }
        self._totals, self._since = totals, time.monotonic()
        resident, threads = 0, 0
        for process in self._processes:
            with suppress(psutil.Error):  # it has ended
                resident += process.memory_info().rss
                threads += process.num_threads()
        values |= {"process_memory_gb": resident / GB, "process_threads": threads}
        if self._gpus is not None:
            values |= self._gpus.sample()
        return {f"{self._prefix}{name}": round(value, 3) for name, value in values.items()}


def _read_totals() -> dict[str, int]:
    """Return the bytes that went over the node's disks and networks since it was started; without those that are unknown."""
    totals: dict[str, int] = {}
    with suppress(OSError, RuntimeError, psutil.Error):
        if (disks := psutil.disk_io_counters()) is not None:
            totals |= {"disk_read": disks.read_bytes, "disk_write": disks.write_bytes}
    with suppress(OSError, RuntimeError, psutil.Error):
        networks = [counters for name, counters in psutil.net_io_counters(pernic=True).items() if name != "lo"]
        totals["network_in"] = sum(counters.bytes_recv for counters in networks)
        totals["network_out"] = sum(counters.bytes_sent for counters in networks)
    return totals


class NvidiaGPUs:
    """Reads the state of GPUs from NVIDIA's management library (NVML), which comes with the driver; no work waits for it.

    Args:
        uuids: torch's ids of the GPUs. One that NVML does not know, such as a slice (MIG), has no values.
        library: file name of NVML.
    """

    def __init__(self, uuids: Sequence[str], library: str = NVML_LIBRARY) -> None:
        self._handles: dict[int, ctypes.c_void_p] = {}
        try:
            self._nvml = ctypes.CDLL(library)
        except OSError:
            return
        if self._nvml.nvmlInit_v2() != 0:
            return
        for number, uuid in enumerate(uuids):
            handle = ctypes.c_void_p()
            if self._nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode(), ctypes.byref(handle)) == 0:
                self._handles[number] = handle

    def sample(self) -> dict[str, float]:
        """Return ``gpuN_percent`` (of the time a kernel ran), ``gpuN_memory_gb``, ``gpuN_power_w`` and ``gpuN_temperature_c``."""
        return {f"gpu{number}_{name}": value for number, handle in self._handles.items() for name, value in self._read(handle)}

    def _read(self, handle: ctypes.c_void_p) -> Iterator[tuple[str, float]]:
        """Yield the values of a GPU that it has; the layouts are those of nvml.h."""
        rates, memory = (ctypes.c_uint * 2)(), (ctypes.c_ulonglong * 3)()  # GPU and memory; total, free and used
        power, celsius = ctypes.c_uint(), ctypes.c_uint()
        if self._call("nvmlDeviceGetUtilizationRates", handle, ctypes.byref(rates)):
            yield "percent", rates[0]
        if self._call("nvmlDeviceGetMemoryInfo", handle, ctypes.byref(memory)):
            yield "memory_gb", memory[2] / GB
        if self._call("nvmlDeviceGetPowerUsage", handle, ctypes.byref(power)):
            yield "power_w", power.value / 1000
        if self._call("nvmlDeviceGetTemperature", handle, ctypes.c_int(0), ctypes.byref(celsius)):
            yield "temperature_c", celsius.value

    def _call(self, name: str, *arguments: Any) -> bool:
        return int(getattr(self._nvml, name)(*arguments)) == 0
