"""A folder with all that the GPU checks need on a machine without a network: ``python -m tests.gpu.bundle FOLDER``.

The machine must have Python and the libraries of ``PROVIDED``; the wheels of all others are in the folder, and only those that
are missing there, or too old, are used (``missing.py``).
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.gpu.missing import LEFT_OUT, requirements_of

ROOT = Path(__file__).parents[2]
# Largest size of the folder in bytes.
MAX_BYTES = 64 << 20
# Libraries that a machine with torch for CUDA is expected to have; what they need is there too.
PROVIDED = (
    *("accelerate", "h5py", "huggingface-hub", "jinja2", "matplotlib", "numpy", "opencv-python-headless", "packaging", "pillow"),
    *("psutil", "pyarrow", "pyyaml", "rich", "safetensors", "scipy", "timm", "torch", "torchvision"),
    *("tqdm", "typing-extensions"),
)
# What the tests need beside the package.
TEST_LIBRARIES = ("hypothesis", "pytest", "pytest-timeout")
# pip matches the platform exactly, so older ones are named too.
PLATFORMS = ("2_28", "2_27", "2_24", "2_17", "2014", "2010", "1")
COPIED = ("launch.py", "pyproject.toml", "tests")
RUN = """#!/bin/sh
# Runs the GPU checks: ./run [--device cpu] [--only CHECK ...] [--out FOLDER]. Another interpreter: PYTHON=/path/to/python3 ./run
set -eu
cd "$(dirname "$0")"
python=${PYTHON:-python3}
if ! [ -d site ]; then
    wheels=$("$python" tests/gpu/missing.py wheels)
    rm -rf site.part
    mkdir site.part
    # shellcheck disable=SC2086
    [ -z "$wheels" ] || "$python" -m pip install --quiet --no-index --no-deps --no-compile --target site.part $wheels
    mv site.part site
fi
export PYTHONPATH="$PWD/site:$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m tests.gpu.check --data-dir "$PWD/data" "$@"
"""


def build_bundle(folder: Path, python: str, num_galaxies: int) -> None:
    """Write the folder, anew.

    Args:
        folder: to write.
        python: version of the interpreter there, such as ``3.12``.
        num_galaxies: simulated galaxies to bring along.

    Raises:
        SystemExit: the folder is larger than ``MAX_BYTES``.
    """
    shutil.rmtree(folder, ignore_errors=True)
    wheels = folder / "wheels"
    wheels.mkdir(parents=True)
    pip("wheel", "--no-deps", "--wheel-dir", str(wheels), str(ROOT))
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = [Requirement(text) for text in (*pyproject["project"]["dependencies"], *TEST_LIBRARIES)]
    download(wanted, wheels, python)
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    write_data(folder / "data", num_galaxies)
    (folder / "run").write_text(RUN)
    (folder / "run").chmod(0o755)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB, {len(list(wheels.iterdir()))} wheels for Python {python}; start it with {folder}/run")
    if size > MAX_BYTES:
        sys.exit(f"{folder} has {size / 1e6:.0f} MB, more than {MAX_BYTES / 1e6:.0f}: it does not fit where it is to go")


def download(wanted: Sequence[Requirement], folder: Path, python: str) -> None:
    """Download the wheels of some libraries and of all that these need, but for those that are provided or left out."""
    seen = {canonicalize_name(name) for name in (*PROVIDED, *LEFT_OUT)}
    environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    environment |= {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}
    environment |= {"implementation_name": "cpython", "platform_python_implementation": "CPython"}
    exact = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    versions = {
        canonicalize_name(one.name): one.specifier for one in exact if one.marker is None or one.marker.evaluate(environment)
    }
    platforms = [part for number in PLATFORMS for part in ("--platform", f"manylinux{'_' * ('_' in number)}{number}_x86_64")]
    options = ["--no-deps", "--only-binary=:all:", "--python-version", python, "--implementation", "cp", *platforms]
    level = list(wanted)
    while level:
        needed = {}
        for requirement in level:
            name = canonicalize_name(requirement.name)
            if name not in seen and (requirement.marker is None or requirement.marker.evaluate(environment)):
                seen.add(name)
                needed[name] = f"{name}{versions[name]}" if name in versions else str(requirement)
        before = set(folder.iterdir())
        if needed:
            pip("download", *options, "--dest", str(folder), *needed.values())
        level = [requirement for wheel in set(folder.iterdir()) - before for requirement in requirements_of(wheel)]


def write_data(folder: Path, num_galaxies: int) -> None:
    """Simulate galaxies, and write their shards where the checks look for them."""
    from galaxydist.bench.loader_speed import simulated_shards

    with tempfile.TemporaryDirectory() as scratch:
        shards = simulated_shards(Path(scratch), num_galaxies).path.parent
        shutil.copytree(shards, folder / shards.name)


def pip(*arguments: str) -> None:
    """Run pip.

    Raises:
        CalledProcessError: it failed, and has printed why.
    """
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments], check=True)


def main(arguments: Sequence[str]) -> None:
    from tests.gpu.rig import NUM_SIMULATED

    parser = argparse.ArgumentParser(prog="python -m tests.gpu.bundle", description=__doc__.partition(":")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", metavar="VERSION", help="of the interpreter there (default: %(default)s)")
    count = NUM_SIMULATED["cuda"]
    parser.add_argument("--galaxies", type=int, default=count, metavar="N", help="to simulate (default: %(default)s)")
    options = parser.parse_args(arguments)
    build_bundle(options.folder, options.python, options.galaxies)


if __name__ == "__main__":
    main(sys.argv[1:])
