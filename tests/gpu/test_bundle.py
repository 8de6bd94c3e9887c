"""The folder of ``make gpu-bundle``: it has what is missing elsewhere, nothing else, and runs where nothing is installed."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.gpu import missing
from tests.gpu.bundle import MAX_BYTES, PROVIDED, build_bundle


def is_online() -> bool:
    """True if pip reaches the package index that it is configured for."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--retries", "0", "index", "versions", "tenacity"]
    return subprocess.run(command, capture_output=True, timeout=100, check=False).returncode == 0


@pytest.mark.nightly
def test_bundle_runs_in_an_environment_that_has_only_the_provided_libraries(tmp_path: Path) -> None:
    """The environment sees the libraries of this one one by one, as a machine has them that knows nothing of galaxydist."""
    if not is_online():
        pytest.skip("the package index cannot be reached")
    bundle, version = tmp_path / "bundle", f"{sys.version_info.major}.{sys.version_info.minor}"
    build_bundle(bundle, version, num_galaxies=40)
    assert sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file()) < MAX_BYTES
    names = {path.name.split("-")[0].lower() for path in (bundle / "wheels").iterdir()}
    assert {"galaxydist", "pydantic", "simplejpeg", "astropy", "cdshealpix"} <= names
    assert not names & {"wandb", "nvidia", "triton", *(name.replace("-", "_") for name in PROVIDED)}
    environ = {**os.environ, "PYTHON": str(bare_environment(tmp_path, names)), "PYTHONPATH": ""}
    command = [str(bundle / "run"), "--device", "cpu", "--out", str(tmp_path / "out"), "--only", "sync", "memory"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all checks passed" in done.stdout and (bundle / "site" / "galaxydist").is_dir()


def bare_environment(folder: Path, hidden: set[str]) -> Path:
    """Make an environment with links to all packages of this one but those that the bundle has; return its Python."""
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True, timeout=300)
    python = folder / "venv" / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        name = path.name.split("-")[0].split(".")[0].lower().removeprefix("__editable___")
        if name.removeprefix("_") not in {*hidden, "galaxydist"} and not (site / path.name).exists() and path.suffix != ".pth":
            (site / path.name).symlink_to(path)
    return python


def write_wheel(folder: Path, name: str, *needs: str) -> Path:
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0", *(f"Requires-Dist: {text}" for text in needs)]
        archive.writestr(f"{name}-1.0.dist-info/METADATA", "\n".join(lines) + "\n")
    return path


def needed_wheels(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, missing.__file__, str(folder)], capture_output=True, text=True, check=False)


def test_wheels_of_missing_and_of_unsuitable_libraries_are_needed(tmp_path: Path) -> None:
    """Filelock is too old for the project, psutil for a wheel that is needed; pluggy would be for one that is not."""
    needs = ("filelock>=999", "numpy>=2", "wandb>=999", "no_such_library", 'pluggy>9; extra=="x"')
    needed = [write_wheel(tmp_path, name) for name in ("filelock", "psutil")]
    needed += [write_wheel(tmp_path, "galaxydist", *needs), write_wheel(tmp_path, "no_such_library", "psutil==0.1")]
    write_wheel(tmp_path, "pluggy")
    write_wheel(tmp_path, "iniconfig", "pluggy>=999")
    done = needed_wheels(tmp_path)
    assert done.stdout.splitlines() == sorted(map(str, needed)), done.stderr


def test_libraries_without_a_wheel_that_are_too_old_are_named(tmp_path: Path) -> None:
    own = write_wheel(tmp_path, "galaxydist", "torch>=999", "no_such_library>=2", "numpy")
    done = needed_wheels(tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{own}\n")
    assert done.stderr.splitlines() == [
        "warning: no-such-library is missing, galaxydist needs >=2; the folder does not have it",
        f"warning: torch {version('torch')}, galaxydist needs >=999; the folder does not have it",
    ]
