"""trackio's page in a real browser: the curves of a sweep of four, without account or network, until Ctrl-C."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.helpers.browser import Browser
from tests.helpers.forked_runs import run_forked, train
from tests.helpers.runs import quick_settings, read_losses, run_here
from tests.helpers.trackio_files import read_trackio

RATES = (0.001, 0.003, 0.01, 0.03)
# Pixels of a drawn line of each of the page's first four colours.
LINE_PIXELS = """
(metric => {
    const plot = document.querySelector(`.plot-container[data-metric="${metric}"]`);
    const canvas = plot && plot.querySelector("canvas");
    if (!canvas) return [];
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    return ["#A8769B", "#E89957", "#3B82F6", "#10B981"].map(colour => {
        const wanted = [1, 3, 5].map(at => parseInt(colour.slice(at, at + 2), 16));
        let count = 0;
        for (let at = 0; at < data.length; at += 4)
            count += wanted.every((value, channel) => Math.abs(data[at + channel] - value) < 8);
        return count;
    });
})
"""


@pytest.fixture(scope="module")
def sweep(blobs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "learning rates"
    for rate in RATES:
        assert run_here(quick_settings(blobs, folder / f"lr-{rate}", optim__lr=rate, train__epochs=4)) == 0
    return folder


@contextmanager
def dashboard(sweep: Path, home: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """The command in a process of its own, once it has printed the address, and the lines until then."""
    words = [sys.executable, "-m", "galaxydist", "dashboard", "local", str(sweep), *arguments]
    environ = {**os.environ, "HOME": str(home), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ) as process:
        try:
            assert process.stdout is not None
            lines: list[str] = []
            for line in process.stdout:
                lines.append(line.rstrip())
                if "Ctrl-C" in line:
                    break
            yield process, lines
        finally:
            process.kill()


@pytest.mark.browser
@pytest.mark.multiprocess
@pytest.mark.slow
def test_dashboard_local_draws_the_curves_of_a_sweep_of_four(sweep: Path, blobs: Path, tmp_path: Path) -> None:
    names = [f"lr-{rate}" for rate in RATES]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    with dashboard(sweep, tmp_path, "--port", str(port)) as (process, lines):
        assert lines[:2] == [f"4 runs for trackio in {sweep}/trackio", f"trackio's page: http://127.0.0.1:{port}"]
        assert f"ssh -N -L {port}:localhost:{port} " in lines[2]
        with Browser() as browser:
            browser.visit(f"http://127.0.0.1:{port}", width=1280)
            for metric in ("val/accuracy", "train/loss"):
                plot = f"document.querySelector('.plot-container[data-metric=\"{metric}\"]')"
                browser.wait_for(plot)
                browser.evaluate(f"{plot}.scrollIntoView()")
                browser.wait_for(f"{LINE_PIXELS}('{metric}').filter(count => count > 50).length == 4")
                legend = browser.evaluate(f"{plot}.innerText")
                assert all(name in legend for name in names), legend
            browser.screenshot(tmp_path / "page.png", whole=False)
            assert {address.split("/")[2] for address in browser.requests} == {f"127.0.0.1:{port}"}
            assert browser.console == []

            # A run that begins later is followed, and appears on the page that is open.
            settings = quick_settings(blobs, sweep / "later", train__epochs=4)
            assert run_forked(train, settings).returncode == 0
            browser.wait_for(f"{plot}.innerText.includes('later')")
        listening = [c.laddr for c in psutil.Process(process.pid).net_connections() if c.status == psutil.CONN_LISTEN]
        assert [address.ip for address in listening] == ["127.0.0.1"]
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None and process.stdout.read() == "ended; the same command goes on\n"
        assert process.wait(60) == 0
    stored = read_trackio(sweep / "trackio")
    assert sorted(stored) == sorted([*names, "later"])
    for name in stored:
        assert {step: values["train/loss"] for step, values in stored[name] if "train/loss" in values} == read_losses(
            sweep / name
        )
        assert stored[name][-1][1].keys() >= {"val/accuracy", "test/accuracy"}
    assert not (tmp_path / ".cache" / "huggingface").exists()  # nothing at trackio's own place
