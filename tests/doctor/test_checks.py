"""The doctor's single checks, passed and failed, on real ports and programs where possible."""

import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from galaxydist.cli.main import main
from galaxydist.doctor.check import failure, has_failed, ok, render, warning
from galaxydist.doctor.machine import check_cores, check_wandb, interface_address, is_loopback, own_address
from galaxydist.doctor.software import (
    GpuFacts,
    check_gpus,
    check_installation,
    check_python,
    check_versions,
    find_gpus,
    installed_versions,
)
from tests.helpers.scripts.doctor_places import levels, linux, program

INFINITY = math.inf


def test_doctor_report_shows_every_check_with_level_text_and_remedy() -> None:
    text = render(
        {"here": [ok("cores", "4"), warning("memory", "1 GB\nof 2", "buy more")], "there": [failure("disk", "full", "rm")]}
    )
    assert text.splitlines() == [
        "here:",
        "  ok       cores   4",
        "  warning  memory  1 GB",
        "                   of 2",
        "                   -> buy more",
        "there:",
        "  failure  disk    full",
        "                   -> rm",
        "1 ok, 1 warning, 1 failure",
    ]
    assert has_failed([ok("a", ""), failure("b", "", "")]) and not has_failed([ok("a", ""), warning("b", "", "")])


def test_python_and_library_versions_are_checked_against_lower_bounds() -> None:
    assert check_python((3, 12, 1), ">=3.11").level == "ok"
    assert check_python((3, 10, 9), ">=3.11").level == "failure"
    needed = ["numpy>=2.0", "pytest", "s3fs>=1; extra == 'remote'", "pywin32; sys_platform == 'win32'"]
    installed = installed_versions(needed)
    assert set(installed) == {"numpy", "pytest"}
    assert check_versions(needed, installed).level == "ok"
    old = check_versions(["numpy>=999", "no-such-library>=1"], installed_versions(["numpy>=999", "no-such-library>=1"]))
    assert old.level == "failure" and "no-such-library is missing" in old.text and "numpy 2" in old.text and "pip" in old.remedy
    assert levels(check_installation()) == {"Python": "ok", "libraries": "ok"}


def test_check_gpus_fails_for_missing_gpus_cpu_builds_and_driver_problems() -> None:
    nothing = GpuFacts("13.0", (), None, None, None)
    assert check_gpus(nothing, 0).level == "ok"
    assert check_gpus(nothing, 1).level == "failure"
    two = GpuFacts("13.0", ("H100", "H100"), None, ("NVIDIA H100", "NVIDIA H100"), None)
    assert check_gpus(two, 2) == ok("GPUs", "2 visible: 2 x H100 (torch built for CUDA 13.0)")
    assert check_gpus(two, 4).level == "failure"
    cpu_build = check_gpus(GpuFacts(None, (), None, ("NVIDIA H100",), None), 0)
    assert cpu_build.level == "failure" and "built without CUDA" in cpu_build.text and "pytorch.org" in cpu_build.remedy
    old = check_gpus(GpuFacts("13.0", (), "The NVIDIA driver on your system is too old", ("NVIDIA H100",), None), 0)
    assert old.level == "failure" and "too old" in old.text and "driver" in old.remedy
    assert check_gpus(GpuFacts("13.0", (), None, None, "Driver/library version mismatch"), 0).level == "failure"


def test_find_gpus_reads_devices_and_problems_from_nvidia_smi(tmp_path: Path) -> None:
    good = program(tmp_path, "smi-good", "echo 'NVIDIA H100, 570.10'; echo 'NVIDIA H100, 570.10'")
    assert find_gpus(good).driver == ("NVIDIA H100", "NVIDIA H100")
    broken = program(tmp_path, "smi-broken", "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    assert find_gpus(broken).driver_problem == "Failed to initialize NVML: Driver/library version mismatch"
    empty = find_gpus(program(tmp_path, "smi-empty", "echo 'No devices were found'; exit 6"))
    assert (empty.driver, empty.driver_problem) == ((), None)
    absent = find_gpus(str(tmp_path / "none"))
    assert (absent.driver, absent.driver_problem) == (None, None)


@pytest.mark.parametrize(
    ("bound", "quota", "level"), [(8, INFINITY, "ok"), (8, 8.0, "ok"), (8, 2.0, "warning"), (1, INFINITY, "warning")]
)
def test_check_cores_warns_of_few_bound_cores_or_a_small_cpu_quota(bound: int, quota: float, level: str) -> None:
    check = check_cores(bound, quota, 64)
    assert check.level == level and f"{bound} of the machine's 64" in check.text and bool(check.remedy) == (level != "ok")


def test_check_wandb_warns_without_key_or_network_and_never_prints_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = {"WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}"}
        keyed = check_wandb({**here, "WANDB_API_KEY": "a-very-secret-key"})
        assert keyed.level == "ok" and "secret" not in keyed.text + keyed.remedy
        keyless = check_wandb(here)
        assert keyless.level == "warning" and "no key" in keyless.text and "wandb login" in keyless.remedy
    closed = check_wandb({**here, "WANDB_API_KEY": "a-very-secret-key"})
    assert closed.level == "warning" and "offline" in closed.text and "secret" not in closed.text + closed.remedy
    assert check_wandb({"WANDB_MODE": "offline"}).level == "ok"


@linux
def test_host_names_and_interfaces_resolve_to_addresses_or_none() -> None:
    assert own_address("localhost") is not None and own_address("no-such-host.invalid") is None
    assert interface_address("lo") == "127.0.0.1" and interface_address("nosuch0") is None
    assert is_loopback("127.0.1.1") and is_loopback("::1") and not is_loopback("192.0.2.7") and not is_loopback("fe80::1%eth0")


def test_doctor_refuses_recipe_arguments_and_unknown_clusters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "recipe=vit"]) == 2
    assert main(["doctor", "cluster=no-such-cluster"]) == 2
    assert "no-such-cluster" in capsys.readouterr().err


@pytest.mark.slow
def test_doctor_exits_with_0_on_this_machine_and_1_for_an_unusable_data_root(tmp_path: Path) -> None:
    environ = {**os.environ, "WANDB_MODE": "offline", "TMPDIR": str(tmp_path)}
    environ.pop("SLURM_CONF", None)

    def doctor(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "galaxydist.cli.main", "doctor", "--run-root", str(tmp_path / "runs"), *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environ)

    good = doctor("--data-dir", str(tmp_path / "data"), "--json")
    assert good.returncode == 0, good.stdout + good.stderr
    assert good.stdout.startswith('{\n  "ok": true')
    bad = doctor("--data-dir", "/proc/data")
    assert bad.returncode == 1 and "failure  data root" in bad.stdout and bad.stdout.rstrip().endswith("1 failure")
