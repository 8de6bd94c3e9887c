"""Code snapshots: a job runs a copy of the package and its recipes.

Later edits do not change a submitted job, not even after a requeue.
"""

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from galaxydist.atomic_files import explain_full_disk, fsync_file, rename
from galaxydist.paths import PACKAGE_DIR, shipped_dir
from galaxydist.recipe.resolve import list_files
from galaxydist.runs.code_version import CodeVersion


def take_snapshot(folder: Path, recipe_paths: Mapping[str, Path], sources: Mapping[str, Path] | None = None) -> Path:
    """Copy the imported package, and the recipes that jobs will read, into a folder named by their hash.

    Args:
        folder: the folder of all snapshots; the same code is copied once.
        recipe_paths: recipe name -> file, added to the recipes shipped with the package, or replacing them. The recipe found as
            ``reference/vit`` has the name ``reference-vit`` and is then stored under both names.
        sources: name beside the package -> file, the user's modules that the models of the jobs are in.

    Returns:
        The snapshot's absolute path, to be first on PYTHONPATH; ``recipes/`` lies beside the package, and its ``CodeVersion``.

    Raises:
        UserError: the disk is full.
    """
    # Each file is read once, so that hash and contents agree even if it is edited meanwhile.
    files = {name: source.read_bytes() for name, source in (*_files(recipe_paths), *(sources or {}).items())}
    if (version := CodeVersion.of(PACKAGE_DIR)) is not None:
        files |= version.files()
    target = (folder / _digest(files)).absolute()
    if target.is_dir():
        return target
    with explain_full_disk(target, "Nothing was submitted."):
        _write(files, folder, target)
    return target


def _write(files: Mapping[str, bytes], folder: Path, target: Path) -> None:
    """Write the snapshot atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".code-", dir=folder, ignore_cleanup_errors=True) as temporary_name:
        temporary = Path(temporary_name)
        for name, content in files.items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        fsync_file(temporary)
        temporary.chmod(0o755)
        try:
            rename(temporary, target)
        except OSError:
            if not target.is_dir():  # else another submission made it meanwhile
                raise


def _files(recipe_paths: Mapping[str, Path]) -> Iterator[tuple[str, Path]]:
    """Yield name in the snapshot and source of every file, in a fixed order."""
    for path in sorted(PACKAGE_DIR.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            yield str(Path("galaxydist") / path.relative_to(PACKAGE_DIR)), path
    shipped = list_files([shipped_dir("recipes")])
    for name, path in sorted({**shipped, **recipe_paths}.items()):
        yield f"recipes/{name}.yaml", path


def _digest(files: Mapping[str, bytes]) -> str:
    """Return 12 hex digits of names and contents."""
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:12]
