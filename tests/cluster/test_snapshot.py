"""The code that a job runs is the code that was submitted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from galaxydist.cluster import snapshot
from galaxydist.cluster.snapshot import take_snapshot
from galaxydist.paths import PACKAGE_DIR
from galaxydist.runs.code_version import CodeVersion


def test_snapshot_runs_with_its_own_code_and_recipes(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("model: {name: custom_cnn}\n")
    code = take_snapshot(tmp_path / "code", {"mine": mine})
    assert code.is_absolute() and not list(code.rglob("__pycache__"))
    mine.write_text("model: {name: vit}\n")
    # From a folder with another galaxydist in it, as a checkout has: -P keeps it away.
    (tmp_path / "galaxydist").mkdir()
    (tmp_path / "galaxydist" / "__init__.py").write_text("raise RuntimeError('the wrong one')")
    script = (
        "import galaxydist, sys; from galaxydist.cli.main import main; print(galaxydist.__file__); sys.exit(main(sys.argv[1:]))"
    )
    answer = subprocess.run(
        [sys.executable, "-P", "-c", script, "recipes", "mine"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(code)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith(str(code)) and "custom_cnn" in answer.stdout
    assert (code / "recipes" / "vit.yaml").is_file()


def test_snapshot_of_unchanged_code_is_reused_and_changed_code_gets_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = take_snapshot(tmp_path / "code", {})
    stamp = first.stat().st_mtime_ns
    assert take_snapshot(tmp_path / "code", {}) == first and first.stat().st_mtime_ns == stamp
    package = tmp_path / "changed" / "galaxydist"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("x = 1\n")
    monkeypatch.setattr(snapshot, "PACKAGE_DIR", package)
    second = take_snapshot(tmp_path / "code", {})
    assert second != first and (second / "galaxydist" / "__init__.py").read_text() == "x = 1\n"
    assert sorted(path.name for path in (tmp_path / "code").iterdir()) == sorted([first.name, second.name])


def test_snapshot_contains_every_module_of_the_package(tmp_path: Path) -> None:
    code = take_snapshot(tmp_path / "code", {})
    sources = {path.relative_to(PACKAGE_DIR) for path in PACKAGE_DIR.rglob("*.py")}
    assert {path.relative_to(code / "galaxydist") for path in (code / "galaxydist").rglob("*.py")} == sources


def test_snapshot_copies_the_users_modules_beside_the_package(tmp_path: Path) -> None:
    source = tmp_path / "own_nets.py"
    source.write_text("x = 1\n")
    first = take_snapshot(tmp_path / "code", {}, {"own_nets.py": source})
    source.write_text("x = 2\n")
    second = take_snapshot(tmp_path / "code", {}, {"own_nets.py": source})
    texts = [(code / "own_nets.py").read_text() for code in (first, second)]
    assert first != second and texts == ["x = 1\n", "x = 2\n"]


def test_snapshot_keeps_the_commit_and_the_uncommitted_changes_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "clone" / "galaxydist"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("x = 1\n")
    (package.parent / "recipes").mkdir()
    (package.parent / "recipes" / "mine.yaml").write_text("{}\n")
    git = ("git", "-C", str(package.parent), "-c", "user.name=A", "-c", "user.email=a@example.org")
    for command in (("init", "-q"), ("add", "."), ("commit", "-qm", "first")):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(snapshot, "PACKAGE_DIR", package)
    (package.parent / "recipes" / "mine.yaml").write_text("tracker: {webhook: https://secret}\n")
    clean = CodeVersion.of(take_snapshot(tmp_path / "code", {}) / "galaxydist")
    assert clean is not None and len(clean.commit) == 40 and clean.facts()["uncommitted_changes"] is False

    (package / "__init__.py").write_text("x = 2\n")
    changed = CodeVersion.of(take_snapshot(tmp_path / "code", {}) / "galaxydist")
    assert changed == CodeVersion.of(package) and changed is not None and changed.commit == clean.commit
    assert changed.has_changes and b"-x = 1\n+x = 2\n" in changed.diff and b"secret" not in changed.diff
    (package / "__init__.py").write_text("x = 1\n")
    (package / "new.py").write_text("y = 1\n")  # git does not know it
    added = CodeVersion.of(package)
    assert added is not None and added.has_changes and added.diff == b""
    (package / "__init__.py").write_text("x = 1\n" * 200_000)
    assert CodeVersion.of(package) == added, "a very large difference is left out"
