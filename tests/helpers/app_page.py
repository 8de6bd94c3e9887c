"""``galaxydist app`` in a process of its own, and its page in a browser."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.browser import Browser

# gradio's own script says this whenever a stream of events ends.
GRADIO_SAYS = "Method not implemented."


@dataclass(frozen=True)
class RunningApp:
    """The command, which serves a page."""

    port: int
    process: subprocess.Popen[str]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/"


@contextmanager
def running_app(words: list[str], log: Path, temporary: Path, environ: Mapping[str, str]) -> Iterator[RunningApp]:
    """Run ``galaxydist app``; Ctrl-C at the end leaves no traceback and no temporary file.

    Args:
        words: of the command line.
        log: takes what it logs.
        temporary: a new folder for its temporary files.
        environ: in addition to that of this process.
    """
    temporary.mkdir()
    # A proxy that does not know this machine, as on a cluster.
    proxy = {"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    known = {**os.environ, "TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1", **proxy, **environ}
    command = [sys.executable, "-m", "galaxydist", "app", *words]
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stream, text=True, env=known)
    try:
        assert process.stdout is not None
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line)
            if "Ctrl-C" in line:
                break
        found = re.fullmatch(r"the app: http://127\.0\.0\.1:(\d+)\n", lines[0] if lines else "")
        assert found, (lines, log.read_text())
        assert f"ssh -N -L {found[1]}:localhost:{found[1]} " in lines[1]
        yield RunningApp(int(found[1]), process)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert "Traceback" not in log.read_text()
        assert log.read_text().endswith("ended\n")
        assert list(temporary.iterdir()) == []
    finally:
        process.kill()
        process.wait()


class AppPage(Browser):
    """The page in a browser of its own."""

    def __init__(self, app: RunningApp, *, width: int = 1280, dark: bool = False) -> None:
        super().__init__()
        self._address = app.address
        self.visit(app.address, width=width, dark=dark)
        self.wait_for("document.querySelector('#gd-drop input[type=file]')")

    def give(self, drop: str, *files: Path) -> None:
        """Give files to a place where files are dropped."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=f"{drop} input[type=file]")["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def answer_about(self, name: str) -> str:
        """Wait for the answer about a picture, and return its text."""
        self.wait_for(f"document.querySelector('#gd-answer')?.innerText.includes({json.dumps(name)})")
        return str(self.evaluate("document.querySelector('#gd-answer').innerText"))

    def open_tab(self, name: str) -> None:
        tab = f"[...document.querySelectorAll('[role=tab]')].find(tab => tab.innerText == {json.dumps(name)})"
        self.wait_for(tab)  # a page that was narrow has it in a menu for a moment
        self.evaluate(f"{tab}.click()")

    def check_quiet(self) -> None:
        """No error on the console, and no request to another host."""
        assert [line for line in self.console if GRADIO_SAYS not in line] == []
        assert [address for address in self.requests if not address.startswith(self._address)] == []
