"""Version of the code that a run uses: the commit, and the uncommitted changes of the package.

In a clone git is asked. A job runs a snapshot of the code, which has the answer of its submission in two files.
"""

import json
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from galaxydist.atomic_files import replace_bytes

COMMIT_FILE, DIFF_FILE = "code-version.json", "code.diff"
# A larger difference is left out, in bytes.
DIFF_BYTES = 1_000_000


@dataclass(frozen=True)
class CodeVersion:
    """Commit of a clone, and how the package differs from it.

    Recipes are left out: ``recipe.json`` has the resolved one, without the secrets that a recipe may hold.

    Args:
        commit: 40 hexadecimal digits.
        has_changes: files of the package were changed or added since the commit.
        diff: of the files that git knows, as a patch; empty if there is none, or if it has more than ``DIFF_BYTES``.
    """

    commit: str
    has_changes: bool = False
    diff: bytes = b""

    @classmethod
    def of(cls, package_dir: Path) -> Self | None:
        """Return the version of a package in a clone or a snapshot; None for another one, such as an installed one.

        Args:
            package_dir: the package's folder, in the root of its clone or snapshot.
        """
        root = package_dir.parent
        return cls._of_clone(root, package_dir.name) if (root / ".git").exists() else cls._of_snapshot(root)

    @classmethod
    def _of_clone(cls, root: Path, package: str) -> Self | None:
        try:
            commit = _git(root, "rev-parse", "HEAD").decode().strip()
            has_changes = bool(_git(root, "status", "--porcelain", "--", package).strip())
            diff = (
                _git(root, "diff", "--no-ext-diff", "--no-textconv", "--no-color", "HEAD", "--", package) if has_changes else b""
            )
        except (OSError, ValueError, subprocess.SubprocessError):
            return None
        return cls(commit, has_changes, diff if len(diff) <= DIFF_BYTES else b"") if commit else None

    @classmethod
    def _of_snapshot(cls, root: Path) -> Self | None:
        try:
            stored = json.loads((root / COMMIT_FILE).read_bytes())
            diff = (root / DIFF_FILE).read_bytes() if (root / DIFF_FILE).exists() else b""
            return cls(str(stored["commit"]), bool(stored["has_changes"]), diff)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def files(self) -> dict[str, bytes]:
        """Return name -> content of the files that a snapshot holds of its version."""
        stored = {name: value for name, value in asdict(self).items() if name != "diff"}
        files = {COMMIT_FILE: json.dumps(stored, indent=2).encode() + b"\n"}
        return {**files, DIFF_FILE: self.diff} if self.diff else files

    def facts(self) -> dict[str, Any]:
        """Return what ``run.json`` holds of the version."""
        return {"commit": self.commit, "uncommitted_changes": self.has_changes}


def write_diff(version: CodeVersion | None, run_dir: Path) -> None:
    """Write ``code.diff`` of a run's newest start into its folder; without a difference there is no such file."""
    path = run_dir / DIFF_FILE
    if version is not None and version.diff:
        replace_bytes(path, version.diff)
    else:
        path.unlink(missing_ok=True)


def _git(root: Path, *arguments: str) -> bytes:
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, timeout=10, check=True).stdout
