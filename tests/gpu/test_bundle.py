"""The folder of ``make gpu-bundle``: it has what is missing elsewhere, nothing else, and runs where nothing is installed."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.gpu.bundle import MAX_BYTES, MISSING, PROVIDED, build_bundle

pytestmark = pytest.mark.nightly


def is_online() -> bool:
    """True if pip reaches the package index that it is configured for."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--retries", "0", "index", "versions", "tenacity"]
    return subprocess.run(command, capture_output=True, timeout=100, check=False).returncode == 0


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


def test_only_wheels_of_missing_libraries_are_named(tmp_path: Path) -> None:
    for name in ("packaging-99.0-py3-none-any.whl", "no_such_library-1.0-py3-none-any.whl"):
        (tmp_path / name).touch()
    done = subprocess.run([sys.executable, "-c", MISSING, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(tmp_path / "no_such_library-1.0-py3-none-any.whl")]
