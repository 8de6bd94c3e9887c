"""State of a node during a run, measured on this machine."""

import os
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from galaxydist.runs.metrics_file import MetricsFile
from galaxydist.training.system_metrics import NodeSampler, NvidiaGPUs, SystemMetrics
from tests.helpers.lively_runs import wait_until

NAME = "galaxydist-system-metrics"
NAMES = {"cpu_percent", "memory_percent", "memory_gb", "process_memory_gb", "process_threads"}


def count_lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def work_until(path: Path, num_lines: int) -> None:
    """Keep a processor busy until so many samples were taken."""

    def has_lines() -> bool:
        return sum(range(300_000)) > 0 and count_lines(path) >= num_lines

    wait_until(has_lines)


def test_samples_are_appended_at_each_start_and_the_thread_ends(tmp_path: Path) -> None:
    path = tmp_path / "system" / "here.jsonl"
    started = time.time()
    for step in (7, 3):  # the second start continues from an earlier checkpoint
        known = count_lines(path)
        sampler = NodeSampler("here", [os.getpid(), os.getppid(), 2**22])  # the last is no process
        with SystemMetrics(path, sampler, lambda step=step: step, interval_s=0.1):  # type: ignore[misc]
            work_until(path, known + 3)
        assert NAME not in [thread.name for thread in threading.enumerate()]
        with path.open("a") as file:
            file.write('{"step": 9, "ti')  # killed within a line
    lines = MetricsFile(path).read()
    steps, times = [line["step"] for line in lines], [line["time"] for line in lines]
    assert sorted(steps, reverse=True) == steps and set(steps) == {7, 3}
    assert sorted(times) == times and started - 1 <= times[0] <= times[-1] <= time.time() + 1
    assert {f"system/here/{name}" for name in NAMES} <= lines[-1].keys()
    assert all(0 < line["system/here/cpu_percent"] <= 100 for line in lines)
    assert lines[-1]["system/here/process_memory_gb"] >= 0.5 * psutil.Process().memory_info().rss / 1e9
    assert max(len(line) for line in path.read_text().splitlines()) < 600


def test_failure_to_write_is_told_once_and_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "system").write_text("not a folder")
    with SystemMetrics(tmp_path / "system" / "here.jsonl", NodeSampler("here", []), lambda: 1, interval_s=0.01):
        wait_until(lambda: NAME not in [thread.name for thread in threading.enumerate()])
    assert caplog.text.count("is no longer written") == 1


def test_machine_without_nvidias_library_has_no_values_of_gpus() -> None:
    assert NvidiaGPUs(["0" * 8], library="libno-such-library.so.1").sample() == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_has_a_load_a_memory_a_power_and_a_temperature() -> None:
    held = torch.zeros(1 << 28, device="cuda")
    found = NvidiaGPUs([str(torch.cuda.get_device_properties(held.device).uuid)]).sample()
    assert found.keys() == {"gpu0_percent", "gpu0_memory_gb", "gpu0_power_w", "gpu0_temperature_c"}
    assert 0 <= found["gpu0_percent"] <= 100 and found["gpu0_memory_gb"] >= 1.07
    assert 1 < found["gpu0_power_w"] < 2000 and 10 < found["gpu0_temperature_c"] < 120
