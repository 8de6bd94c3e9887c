"""A Space that runs as on the Hub, in a Python environment of its own."""

import os
import re
import signal
import subprocess
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement


@contextmanager
def running_space(python: Path, space: Path, temporary: Path) -> Iterator[str]:
    """Run a Space as the Hub does, but on loopback; yields its address. At the end it gets SIGTERM, and must end well."""
    hub = {"SPACE_ID": "me/galaxies", "SYSTEM": "spaces", "GRADIO_SERVER_NAME": "127.0.0.1"}
    command, environ = [str(python), "app.py"], plain_environment(temporary) | hub
    process = subprocess.Popen(command, cwd=space, env=environ, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.match(r"the page is on (\S+)$", line):
                yield found[1]
                break
        else:
            raise AssertionError("".join(lines))
    finally:
        process.send_signal(signal.SIGTERM)
        _, text = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in text, text


def plain_environment(temporary: Path) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "HOME": str(temporary), "TMPDIR": str(temporary), "PYTHONDONTWRITEBYTECODE": "1"}


def linked_environment(folder: Path) -> Path:
    """Python of a new environment with gradio, the Space's requirements and what these need, linked from this environment."""
    venv.create(folder, with_pip=False)
    (site,) = (folder / "lib").glob("python*/site-packages")
    waiting, linked = ["gradio", "numpy", "onnxruntime", "pillow"], set[str]()
    while waiting:
        name = waiting.pop()
        if name in linked:
            continue
        linked.add(name)
        found = distribution(name)
        for top in {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(found.locate_file(top))
        for requirement in map(Requirement, found.requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return folder / "bin" / "python"
