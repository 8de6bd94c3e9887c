"""The package as users get it: a built wheel in an empty folder, and its versions."""

import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "galaxydist"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built and unpacked into a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder / "dist"), str(ROOT)], check=True, timeout=240)
    (wheel,) = (folder / "dist").glob("galaxydist-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True, timeout=240)
    return folder / "site"


@pytest.mark.slow
def test_installed_wheel_contains_recipes_cluster_profiles_sweeps_split_and_weights(installed: Path, tmp_path: Path) -> None:
    code = f"""
import json, sys
sys.path.insert(0, {str(installed)!r})
import galaxydist
assert galaxydist.__file__.startswith({str(installed)!r}), galaxydist.__file__
from galaxydist.recipe.resolve import list_recipes, load_recipe
from galaxydist.cluster.profile import list_clusters, load_cluster
from galaxydist.paths import shipped_dir
from galaxydist.surveys.official_split import read_official_split
assert len(read_official_split().labels) == 17736
found = {{"recipes": {{name: str(load_recipe([f"recipe={{name}}"]).path) for name in list_recipes()}}}}
found["clusters"] = {{name: str(load_cluster([f"cluster={{name}}"]).path) for name in list_clusters()}}
found["sweeps"] = {{path.stem: str(path) for path in shipped_dir("slurm").glob("sweeps/*.yaml")}}
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for kind, folder in (("recipes", "recipes"), ("clusters", "slurm/clusters"), ("sweeps", "slurm/sweeps")):
        paths = [path.relative_to(ROOT / folder).with_suffix("").as_posix() for path in (ROOT / folder).rglob("*.yaml")]
        assert set(found[kind]) == set(paths), kind
        assert all(Path(path).is_relative_to(installed) for path in found[kind].values()), kind
    for path in (PACKAGE / "models" / "shipped").glob("*.*"):
        assert (installed / path.relative_to(ROOT)).read_bytes() == path.read_bytes(), "the weights and their card"
    assert (installed / "galaxydist" / "py.typed").is_file()
    assert not list(installed.glob("tests")) and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_installed_command_lists_recipes_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", str(installed / "bin" / "galaxydist"), "recipes"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {"demo", "vit", "reference/vit"} <= {line.split()[0] for line in done.stdout.splitlines()}


def test_a_run_records_its_versions_where_the_package_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code may lie in a folder of PYTHONPATH, without metadata."""
    from galaxydist.training import state
    from galaxydist.version import __version__

    def version(name: str) -> str:
        if name == "galaxydist":
            raise metadata.PackageNotFoundError(name)
        return metadata.version(name)

    monkeypatch.setattr(state, "version", version)
    found = state.library_versions()
    assert found["galaxydist"] == __version__ and found["torch"] == metadata.version("torch")


def constraints() -> dict[str, Version]:
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            (exact,) = requirement.specifier
            assert exact.operator == "==", f"constraints.txt: {line!r} is not name==version"
            if requirement.marker is None or requirement.marker.evaluate():
                pinned[canonicalize_name(requirement.name)] = Version(exact.version)
    return pinned


def test_exact_versions_meet_the_lower_bounds() -> None:
    pinned = constraints()
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    for text in [
        *project["dependencies"],
        *(text for name in ("export", "notebooks", "remote") for text in extras[name]),
        *(text for text in extras["dev"] if not text.startswith("galaxydist[")),
    ]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), text
    assert (str(pinned["torch"]), str(pinned["torchvision"])) == ("2.14.1", "0.29.1")
    assert "tensorflow" not in pinned and "astronn" not in pinned


def resolved(requirements: list[str], *options: str) -> subprocess.CompletedProcess[str]:
    """Run pip without installing anything; its report, as JSON, is the output."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--dry-run", "--report", "-"]
    return subprocess.run([*pip, *options, *requirements], cwd=ROOT, capture_output=True, text=True, timeout=840, check=False)


def versions(done: subprocess.CompletedProcess[str]) -> dict[str, Version]:
    assert done.returncode == 0, done.stderr
    found = [item["metadata"] for item in json.loads(done.stdout)["install"]]
    return {canonicalize_name(metadata["name"]): Version(metadata["version"]) for metadata in found}


@pytest.mark.nightly
@pytest.mark.parametrize("wanted", [*PYPROJECT["project"]["optional-dependencies"], "gradio trackio"])
def test_pinned_versions_let_pip_install_current_releases_of_the_extras(wanted: str) -> None:
    """An exact version that others exclude does not fail: pip goes back through the years to releases that do not."""
    texts = PYPROJECT["project"]["optional-dependencies"].get(wanted, wanted.split())
    requirements = [text for text in texts if not text.startswith("galaxydist[")]
    names = [canonicalize_name(Requirement(text).name) for text in requirements]
    alone = resolved(names, "--no-deps", "--ignore-installed")
    if alone.returncode:
        pytest.skip(f"no package index: {alone.stderr.strip().splitlines()[-1:]}")
    newest = versions(alone)
    chosen = constraints() | versions(resolved(requirements, "-c", "constraints.txt"))
    for name in names:
        # Of a version that is a date, the years.
        assert newest[name].major - chosen[name].major <= 1, f"{name} {chosen[name]}, though there is {newest[name]}"


def test_no_project_file_contains_paths_or_indexes_of_one_machine() -> None:
    places = re.compile(r"/(work|root)/|/home/[a-z]|pypi\.o.g|download\.pytorch|--index-url")
    files = [
        *sources(),
        *(path for path in ROOT.glob("*.*") if path.name != ".git"),  # a file in a worktree of git
        *(ROOT / "recipes").rglob("*"),
        *ROOT.glob("slurm/**/*.*"),
        *ROOT.glob("notebooks/*.ipynb"),
        ROOT / "Makefile",
        ROOT / ".ci" / "run",
    ]
    for path in files:
        if path.is_file():
            for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
                assert not places.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
