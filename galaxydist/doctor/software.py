"""Checks of Python, libraries, torch and GPUs of this process."""

import importlib.metadata
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
import torch.distributed as dist
from packaging.requirements import Requirement

from galaxydist.doctor.check import Check, failure, ok, warning
from galaxydist.errors import first_line

PACKAGE = "galaxydist"
SMI_S = 20.0


@dataclass(frozen=True)
class GpuFacts:
    """GPUs as reported by torch and the driver.

    Args:
        built_for: CUDA version of torch's build; None for a build without CUDA.
        names: names of the GPUs that torch sees.
        problem: torch's error message if it was built for CUDA and cannot use it.
        driver: GPU names from nvidia-smi; None if there is no nvidia-smi.
        driver_problem: error message of nvidia-smi if it failed.
    """

    built_for: str | None
    names: tuple[str, ...]
    problem: str | None
    driver: tuple[str, ...] | None
    driver_problem: str | None


def check_python(version: Sequence[int], needed: str) -> Check:
    """Check the interpreter against the package's ``requires-python``.

    Args:
        version: major, minor, micro.
        needed: version specifier, such as ">=3.11".
    """
    here = ".".join(str(number) for number in version[:3])
    if Requirement(f"python{needed}").specifier.contains(here):
        return ok("Python", here)
    return failure("Python", f"{here}, but galaxydist needs {needed}", "make an environment with a newer Python (make install)")


def installed_versions(requirements: Iterable[str]) -> dict[str, str | None]:
    """Return the installed version of each required package; None: not installed.

    Args:
        requirements: as in pyproject.toml; requirements of extras are left out.
    """
    found: dict[str, str | None] = {}
    for requirement in _needed(requirements):
        try:
            found[requirement.name] = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            found[requirement.name] = None
    return found


def check_versions(requirements: Iterable[str], installed: Mapping[str, str | None]) -> Check:
    """Check the libraries against the version bounds of pyproject.toml.

    Args:
        requirements: as in pyproject.toml.
        installed: result of ``installed_versions``.
    """
    needed = _needed(requirements)
    wrong = [
        f"{requirement.name} is missing (needs {requirement.specifier})"
        if installed.get(requirement.name) is None
        else f"{requirement.name} {installed[requirement.name]} is not {requirement.specifier}"
        for requirement in needed
        if installed.get(requirement.name) is None
        or not requirement.specifier.contains(installed[requirement.name] or "", prereleases=True)
    ]
    if wrong:
        return failure(
            "libraries", "; ".join(wrong), "install them again: pip install -U galaxydist, or make install in a checkout"
        )
    return ok("libraries", f"{len(needed)} libraries, each at least the version that galaxydist needs")


def check_installation() -> list[Check]:
    """Check Python and the libraries of this process."""
    try:
        metadata = importlib.metadata.metadata(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return [
            warning(
                "libraries",
                "galaxydist is imported but not installed here, so the versions that it needs are unknown",
                "install it in this environment: pip install -e . (make install)",
            )
        ]
    requirements = importlib.metadata.requires(PACKAGE) or []
    return [
        check_python(sys.version_info[:3], metadata["Requires-Python"]),
        check_versions(requirements, installed_versions(requirements)),
    ]


def find_gpus(smi: str = "nvidia-smi") -> GpuFacts:
    """Query torch and the driver for GPUs.

    Args:
        smi: the driver's program.
    """
    problem = None
    if torch.version.cuda is not None and not torch.cuda.is_available():
        try:
            torch.zeros(1, device="cuda")
        except (RuntimeError, AssertionError) as error:
            problem = first_line(error)
    names = tuple(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())) if problem is None else ()
    driver, driver_problem = _query_driver(smi)
    return GpuFacts(torch.version.cuda, names, problem, driver, driver_problem)


def check_gpus(facts: GpuFacts, wanted: int) -> Check:
    """Check that torch can use the GPUs of this machine.

    Args:
        facts: result of ``find_gpus``.
        wanted: number of GPUs that torch must see (0: none needed, as on a login node).
    """
    build = "built without CUDA" if facts.built_for is None else f"built for CUDA {facts.built_for}"
    if facts.driver_problem is not None:
        return failure(
            "GPUs",
            f"nvidia-smi: {facts.driver_problem}",
            "the driver of this machine is broken: restart it or inform its administrator",
        )
    if facts.names and len(facts.names) >= wanted:
        return ok("GPUs", f"{len(facts.names)} visible: {_counted(facts.names)} (torch {build})")
    if facts.driver and facts.built_for is None:
        text = f"the machine has {_counted(facts.driver)}, but torch is {build}"
        return failure(
            "GPUs", text, "install torch's build for CUDA: pip install --force-reinstall torch torchvision (see pytorch.org)"
        )
    if facts.driver and facts.problem is not None:
        text = f"the machine has {_counted(facts.driver)}, but torch ({build}) cannot use it: {facts.problem}"
        return failure(
            "GPUs", text, "update the driver, or install torch built for an older CUDA; check CUDA_VISIBLE_DEVICES too"
        )
    if wanted:
        text = f"{len(facts.names)} visible, {wanted} needed (torch {build}{f'; {facts.problem}' if facts.problem else ''})"
        return failure(
            "GPUs", text, "request them (cluster.gpus_per_node, cluster.gpu_request, cluster.gpu_type), and check nvidia-smi"
        )
    return ok("GPUs", f"none on this machine (torch {build})")


def library_versions() -> dict[str, str]:
    """Return the versions that must be equal on all ranks: interpreter, libraries, CUDA, NCCL."""
    from galaxydist.version import __version__

    requirements: list[str] = []
    with suppress(importlib.metadata.PackageNotFoundError):
        requirements = importlib.metadata.requires(PACKAGE) or []
    found = {"Python": platform.python_version(), PACKAGE: __version__}
    found |= {name: version or "missing" for name, version in installed_versions(requirements).items()}
    found["torch"] = str(torch.__version__)
    found["CUDA"] = torch.version.cuda or "none"
    if torch.version.cuda is not None and dist.is_nccl_available():
        nccl: tuple[int, ...] = torch.cuda.nccl.version()
        found["NCCL"] = ".".join(map(str, nccl))
    return found


def _needed(requirements: Iterable[str]) -> list[Requirement]:
    parsed = (Requirement(text) for text in requirements)
    return [requirement for requirement in parsed if requirement.marker is None or requirement.marker.evaluate({"extra": ""})]


def _query_driver(smi: str) -> tuple[tuple[str, ...] | None, str | None]:
    """Return the GPU names from nvidia-smi, and its error message if it fails."""
    if shutil.which(smi) is None:
        return None, None
    command = [smi, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=SMI_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, str(error)
    lines = (answer.stdout.strip() or answer.stderr.strip()).splitlines()
    if answer.returncode == 0:
        return tuple(name for name, *_ in (line.split(", ") for line in lines)), None
    # A login node may have the program but no GPU.
    absent = any("No devices were found" in line or "couldn't communicate" in line for line in lines)
    return ((), None) if absent else (None, lines[0] if lines else f"exit code {answer.returncode}")


def _counted(names: Sequence[str]) -> str:
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
