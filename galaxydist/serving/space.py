"""A Hugging Face Space with the app: published models, the app's own modules and the Space's header in one folder.

A Space is a repository whose README.md begins with its configuration
(https://huggingface.co/docs/hub/spaces-config-reference). The Hub installs gradio (``sdk_version``) and requirements.txt and runs
app.py. It needs neither torch nor the rest of this package, and writes nothing but temporary files.
"""

import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from galaxydist.atomic_files import write_bytes
from galaxydist.errors import UserError
from galaxydist.evaluation.text_table import escape_markdown
from galaxydist.prediction.published_folder import is_published
from galaxydist.runs.folder import RunFolder
from galaxydist.serving import app
from galaxydist.serving.app.published_model import (
    CARD,
    ONNX,
    PROGRAM,
    PUBLISHED,
    WEIGHTS,
    AppConfig,
    PublishedFolderError,
    read_config,
)
from galaxydist.serving.publish import PublishOptions, publish
from galaxydist.serving.whole_folder import check_target, whole_folder
from galaxydist.version import __version__

APP_FILE, REQUIREMENTS, ATTRIBUTES = "app.py", "requirements.txt", ".gitattributes"
# Folder of the app's modules, and of the models.
MODULES, MODELS = "galaxy_app", "models"
WRITTEN = (CARD, APP_FILE, REQUIREMENTS, ATTRIBUTES, MODULES, MODELS, ".cache")
# Packages that the app's modules import, beside gradio, which is the Space's SDK.
PACKAGES = ("numpy", "onnxruntime", "pillow")
LEFT_OUT = (WEIGHTS, PROGRAM, ATTRIBUTES, ".cache")
LARGE_FILES = ("*.onnx", "*.npz", "*.jpg", "*.jpeg", "*.png")
TAGS = ("astronomy", "galaxy-morphology", "image-classification", "galaxydist")
# The Hub's word for a licence that it does not list, and for several.
OTHER_LICENCE = "other"

APP_TEXT = f'''"""Label pictures of galaxies with the models in this folder. Written by galaxydist {__version__}."""

import os
import sys
from pathlib import Path

from {MODULES}.standalone import main

if __name__ == "__main__":
    sys.exit(main([str(Path(__file__).parent / "{MODELS}")], os.environ))
'''


@dataclass(frozen=True)
class SpaceReport:
    """Result of ``write_space``.

    Args:
        folder: the Space.
        models: titles of its models.
        num_bytes: of all files.
        gradio: version that the Space installs.
        notes: sentences for the user: what is missing and why.
    """

    folder: Path
    models: tuple[str, ...]
    num_bytes: int
    gradio: str
    notes: tuple[str, ...] = ()


def publish_space(sources: Sequence[Path], out: Path, environ: Mapping[str, str], options: PublishOptions) -> SpaceReport:
    """Publish runs, and write a Space with their models.

    Args:
        sources: run folders and published folders.
        out: the folder to write.
        environ: the process's environment.
        options: of each publication; the title is that of the Space, and of its model if there is one only.

    Raises:
        UserError: as in ``publish`` and ``write_space``.
    """
    check_target(out, overwrite=options.overwrite, is_ours=is_space, names=WRITTEN)
    for package in ("gradio", *PACKAGES):
        installed_version(package)
    each = replace(options, title=options.title if len(sources) == 1 else None, onnx=True, program=False, overwrite=False)
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="galaxydist-space-") as temporary:
        published = []
        for number, source in enumerate(sources):
            if is_published(source):
                published.append(source)
                continue
            folder = Path(temporary) / str(number) / source.resolve().name
            found = publish(source, folder, environ, each).notes
            notes += [note if str(source) in note else f"{source}: {note}" for note in found]
            published.append(folder)
        report = write_space(published, out, title=options.title, overwrite=options.overwrite)
    return replace(report, notes=tuple(notes))


def write_space(published: Sequence[Path], out: Path, *, title: str | None = None, overwrite: bool = False) -> SpaceReport:
    """Write a folder that runs as a Space as it is; it appears only when it is whole.

    Args:
        published: published folders with ONNX files; users choose among them by their titles.
        out: the folder to write.
        title: of the Space; None: that of the first model.
        overwrite: replace a Space that this function wrote.

    Raises:
        UserError: a folder is not published or has no ONNX file, ``out`` exists, gradio or onnxruntime is not installed, or the
            disk is full.
    """
    check_target(out, overwrite=overwrite, is_ours=is_space, names=WRITTEN)
    gradio, requirements = installed_version("gradio"), [f"{name}=={installed_version(name)}" for name in PACKAGES]
    sources = name_folders(published)
    configs = {name: read_with_onnx(source) for name, source in sources.items()}
    with whole_folder(out) as folder:
        for name, source in sources.items():
            shutil.copytree(source, folder / MODELS / name, ignore=shutil.ignore_patterns(*LEFT_OUT))
        copy_modules(folder / MODULES)
        licences = [licence_of(source) for source in sources.values()]
        header = build_header(title or next(iter(configs.values())).title, gradio, licences)
        files = {
            CARD: f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n\n" + describe_space(header, configs),
            APP_FILE: APP_TEXT,
            REQUIREMENTS: "".join(f"{line}\n" for line in requirements),
            ATTRIBUTES: "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LARGE_FILES),
        }
        for name, text in files.items():
            write_bytes(folder / name, text.encode())
    num_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return SpaceReport(out, tuple(config.title for config in configs.values()), num_bytes, gradio)


def is_space(folder: Path) -> bool:
    """Return True for a folder that ``write_space`` wrote."""
    return (folder / APP_FILE).is_file() and (folder / MODULES / "standalone.py").is_file()


def installed_version(package: str) -> str:
    """Return the version of a package, which the Space installs too, without a local part such as ``+cpu``.

    Raises:
        UserError: it is not installed.
    """
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError as error:
        raise UserError(
            f"a Space installs the same version of {package} as this machine, and it is not installed here: "
            "pip install 'galaxydist[app]'"
        ) from error


def read_with_onnx(folder: Path) -> AppConfig:
    """Read a published folder's part ``app``.

    Raises:
        UserError: it is not published, or has no ONNX file.
    """
    try:
        config = read_config(folder)
    except PublishedFolderError as error:
        raise UserError(str(error)) from error
    if not (folder / ONNX).is_file():
        raise UserError(f"{folder} has no {ONNX}, which a Space runs: publish the run without --no-onnx")
    return config


def name_folders(published: Sequence[Path]) -> dict[str, Path]:
    """Return published folders by unique names of letters, digits, ``-``, ``_`` and ``.``.

    One that the app wrote into a run has the run's name.
    """
    found: dict[str, Path] = {}
    for folder in published:
        place = folder.resolve()
        if place.name == PUBLISHED and RunFolder(place.parent).is_started:
            place = place.parent
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", place.name).strip("-.") or "model"
        found[name if name not in found else f"{name}-{len(found) + 1}"] = folder
    return found


def copy_modules(out: Path) -> None:
    """Copy the modules of the app, with the files that they read."""
    shutil.copytree(Path(app.__file__).parent, out, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))


def licence_of(folder: Path) -> str:
    """Return the licence in the header of a published folder's model card, as the Hub calls it."""
    try:
        found = re.match(r"---\n(.*?)\n---\n", (folder / CARD).read_text(encoding="utf-8"), re.DOTALL)
        header = yaml.safe_load(found[1]) if found else None
    except (OSError, ValueError, yaml.YAMLError):
        return OTHER_LICENCE
    licence = header.get("license") if isinstance(header, dict) else None
    return licence if isinstance(licence, str) else OTHER_LICENCE


def build_header(title: str, gradio: str, licences: Iterable[str]) -> dict[str, Any]:
    """Return the configuration of the Space.

    Args:
        title: of the Space.
        gradio: its version.
        licences: of the models; the Space has their common one.
    """
    found = set(licences)
    return {
        "title": title,
        "colorFrom": "indigo",
        "colorTo": "gray",
        "sdk": "gradio",
        "sdk_version": gradio,
        "python_version": f"{sys.version_info.major}.{sys.version_info.minor}",
        "app_file": APP_FILE,
        "pinned": False,
        "license": found.pop() if len(found) == 1 else OTHER_LICENCE,
        "suggested_hardware": "cpu-basic",
        "tags": list(TAGS),
    }


def describe_space(header: Mapping[str, Any], configs: Mapping[str, AppConfig]) -> str:
    """Return the text of the Space's README.md below its configuration."""
    lines = [f"# {escape_markdown(header['title'])}", ""]
    lines += [
        "Give a picture of one galaxy in the middle; a network names its morphological class. It runs on ONNX, without torch.",
        "",
    ]
    if any(config.is_non_commercial for config in configs.values()):
        lines += [
            "**For non-commercial use only**, because of the licence of training data or of starting weights (see below).",
            "",
        ]
    for name, config in configs.items():
        lines += [f"## {escape_markdown(config.title)}", ""]
        facts = {
            "Classes": ", ".join(config.classes),
            "Training data": config.dataset,
            "Licence of the data": config.licence or "unknown",
            "Use": "non-commercial only" if config.is_non_commercial else "",
            "Citation": config.citation or "",
        }
        lines += [f"- {key}: {escape_markdown(value)}" for key, value in facts.items() if value]
        lines += [f"- [Model card]({MODELS}/{name}/{CARD})", ""]
    lines += [
        f"Written by galaxydist {__version__}. On your own machine, in this folder, with Python {header['python_version']}:",
        "",
        "```sh",
        f"pip install gradio=={header['sdk_version']} -r {REQUIREMENTS}",
        f"python {APP_FILE}",
        "```",
        "",
    ]
    return "\n".join(lines)
