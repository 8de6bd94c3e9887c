"""A headless Chromium, spoken to through a pipe (Chrome DevTools protocol): what a page looks like, and what it asks for."""

import base64
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
from PIL import Image

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_TIMEOUT_S = 120.0
_KEYS = {"Enter": 13, "ArrowDown": 40}


def find_browser() -> str:
    """The browser's program; skips the test where there is none."""
    for name in _NAMES:
        if found := shutil.which(name):
            return found
    pytest.skip("no Chromium on this machine (Debian: apt install --no-install-recommends chromium)")


class Browser:
    """A browser with one page. Its messages and requests are collected.

    Attributes:
        console: errors, warnings and exceptions that the page caused.
        requests: addresses that were asked for, data URIs left out.
    """

    def __init__(self) -> None:
        program = find_browser()
        self._profile = tempfile.mkdtemp(prefix="galaxydist-browser-")
        commands_in, self._commands = os.pipe()
        self._answers, answers_out = os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]
        script = f'exec 3<&{commands_in} 4>&{answers_out}; exec "$0" "$@"'
        self._process = subprocess.Popen(
            ["bash", "-c", script, program, *options, "--remote-debugging-pipe", f"--user-data-dir={self._profile}"],
            pass_fds=(commands_in, answers_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(commands_in)
        os.close(answers_out)
        self._buffer, self._number, self._session = b"", 0, ""
        self._loaded, self._width = False, 0
        self.console: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._commands)
        os.close(self._answers)
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(timeout=30)
        shutil.rmtree(self._profile, ignore_errors=True)

    def check_page(self, page: Path, folder: Path, sections: Sequence[str], look: Callable[[], None] = lambda: None) -> None:
        """A page as a phone and, dark, a desktop show it and as it is printed: whole, within the window, quiet, and alone.

        Args:
            folder: takes ``390.png``, ``1280.png`` and ``page.pdf``.
            sections: their ids, in order.
            look: more to check at each width.
        """
        for width, dark in ((390, False), (1280, True)):
            self.open(page, width=width, dark=dark)
            assert self.fits_window(), f"scrolls sideways at {width}"
            found = self.evaluate("[...document.querySelectorAll('section')].filter(s => s.offsetHeight > 60).map(s => s.id)")
            assert found == list(sections)
            assert self.evaluate("[...document.images].filter(i => !(i.complete && i.naturalWidth)).length") == 0
            # Figures take the page's colour: their text is as bright as the page's.
            colours = self.evaluate(
                "[getComputedStyle(document.querySelector('figure svg text')).fill, getComputedStyle(document.body).color]"
            )
            assert colours[0] == colours[1]
            look()
            self.screenshot(folder / f"{width}.png")
        with Image.open(folder / "390.png") as phone, Image.open(folder / "1280.png") as desktop:
            assert phone.width == 780 and phone.height > 4000  # two dots a pixel
            assert phone.convert("L").getpixel((4, 4)) > 240 and desktop.convert("L").getpixel((4, 4)) < 40
        self.print_pdf(folder / "page.pdf")
        assert self.console == []
        assert set(self.requests) == {page.as_uri()}

    def open(self, path: Path, *, width: int, height: int = 900, dark: bool = False, media: str = "") -> None:
        """Show a file in a window of that width (CSS pixels), in light or dark, and wait until it is there."""
        self.visit(path.resolve().as_uri(), width=width, height=height, dark=dark, media=media)
        self.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(() => done(1), 100)))")

    def visit(self, address: str, *, width: int, height: int = 900, dark: bool = False, media: str = "") -> None:
        """Show the page of an address, and wait until it is loaded; what its scripts draw may come later."""
        self.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self._loaded = False
        self.call("Page.navigate", url=address)
        deadline = time.monotonic() + _TIMEOUT_S
        while not self._loaded:
            assert time.monotonic() < deadline, f"{address} did not load"
            self._next()

    def resize(self, width: int, height: int = 900) -> None:
        """Show the page in a window of another size (CSS pixels); a narrow one is a phone's."""
        phone = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2 if phone else 1, mobile=phone
        )
        self._width = width

    def fits_window(self) -> bool:
        """True if the page does not scroll sideways; ``innerWidth`` would not tell, since it grows with the page on a phone."""
        return bool(self.evaluate(f"document.documentElement.scrollWidth <= {self._width}"))

    def wait_for(self, expression: str) -> None:
        """Wait until a JavaScript expression on the page is true."""
        deadline = time.monotonic() + _TIMEOUT_S
        while not self.evaluate(f"Boolean({expression})"):
            assert time.monotonic() < deadline, f"never true on the page: {expression}"
            time.sleep(0.1)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression on the page; a promise is waited for."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def point_at(self, selector: str) -> None:
        """Move the mouse over the first element of a selector, which is scrolled into view."""
        x, y = self.evaluate(
            f"(e => {{ e.scrollIntoView({{block: 'center', behavior: 'instant'}}); const b = e.getBoundingClientRect();"
            f" return [b.x + b.width / 2, b.y + b.height / 2]; }})(document.querySelector({json.dumps(selector)}))"
        )
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press(self, key: str) -> None:
        """Press and release a key, such as ``Enter``, where the focus is."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=_KEYS[key])

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """The page as PNG, as far down as it goes, or what the window shows."""
        image = self.call(
            "Page.captureScreenshot", format="png", captureBeyondViewport=whole, **({"clip": self._all()} if whole else {})
        )
        path.write_bytes(base64.b64decode(image["data"]))

    def print_pdf(self, path: Path) -> None:
        """The page as it is printed."""
        path.write_bytes(base64.b64decode(self.call("Page.printToPDF", preferCSSPageSize=True)["data"]))

    def call(self, method: str, **parameters: Any) -> Any:
        """One command of the protocol, and its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + _TIMEOUT_S
        while time.monotonic() < deadline:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
        raise AssertionError(f"no answer to {method}")

    def _all(self) -> dict[str, float]:
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        return {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 16000), "scale": 1}

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._answers, 1 << 20)
            assert part, "the browser has ended"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, method: str, parameters: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Runtime.exceptionThrown":
            self.console.append(str(parameters["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.console.append(str(parameters["args"]))
        elif method == "Log.entryAdded":
            self.console.append(f"{parameters['entry']['level']}: {parameters['entry']['text']}")
        elif method == "Network.requestWillBeSent":
            address = parameters["request"]["url"]
            if not address.startswith("data:"):
                self.requests.append(address)
