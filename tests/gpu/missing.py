"""Prints the wheels of a folder that this interpreter needs: ``python missing.py FOLDER``, with the library ``packaging``.

A wheel is needed if its library is not installed, or in a version that galaxydist or another needed wheel does not take. Such a
library without a wheel is named in a warning: it may be there under another name, as OpenCV is.
"""

import re
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from email.parser import HeaderParser
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = "galaxydist"
# Not needed with tracker.name=none.
LEFT_OUT = ("wandb",)


def requirements_of(wheel: Path) -> Iterator[Requirement]:
    """Yield what a wheel needs."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        headers = HeaderParser().parsestr(archive.read(name).decode())
    yield from (Requirement(text) for text in headers.get_all("Requires-Dist", []))


def installed(name: str) -> str | None:
    """Return the installed version of a library; None: there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def find_needed(wheels: Mapping[str, Path]) -> tuple[list[Path], list[str]]:
    """Return the needed wheels, and a text for each library that is missing or unsuitable and has no wheel.

    Args:
        wheels: by the name of the library.
    """
    needed = {name for name in wheels if name == PROJECT or installed(name) is None}
    checked: set[str] = set()
    problems: dict[str, str] = {}
    while todo := needed - checked:
        checked |= todo
        for user, requirement in [(name, found) for name in sorted(todo) for found in requirements_of(wheels[name])]:
            name = canonicalize_name(requirement.name)
            if name in LEFT_OUT or (requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})):
                continue
            there = installed(name)
            if there is not None and requirement.specifier.contains(there, prereleases=True):
                continue
            if name in wheels:
                needed.add(name)
            else:
                problems[name] = f"{name} {there or 'is missing'}, {user} needs {requirement.specifier or 'any version'}"
    return [wheels[name] for name in sorted(needed)], sorted(problems.values())


def main(arguments: Sequence[str]) -> None:
    (folder,) = arguments
    wheels = {canonicalize_name(path.name.split("-")[0]): path for path in Path(folder).glob("*.whl")}
    needed, problems = find_needed(wheels)
    for path in needed:
        print(path)
    for text in problems:
        print(f"warning: {text}; the folder does not have it", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
