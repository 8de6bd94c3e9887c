"""``galaxydist app``: the page in a real browser, its answers, its refusals, and its end."""

import base64
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from PIL import Image

import galaxydist
from galaxydist.errors import EXIT_INTERRUPTED
from galaxydist.prediction.published_folder import is_published
from galaxydist.serving.app.published_model import PUBLISHED
from galaxydist.serving.run_app import find_publication, publish_runs
from tests.helpers.app_page import AppPage, RunningApp, running_app
from tests.helpers.blobs import CLASS_NAMES, BlobSurvey
from tests.helpers.published import PublishedRun, train_blobs

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

FILE = {"_type": "gradio.FileData"}


@dataclass(frozen=True)
class Served:
    """The page of a run, which the app has published, and of a published folder.

    Attributes:
        pictures: of the test split, by class; the run's network knows them.
    """

    app: RunningApp
    log: Path
    folder: Path
    pictures: Mapping[str, Path]

    def request(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.app.port, timeout=60)
        try:
            connection.request(method, path, body, {"content-type": "application/json", **(headers or {})})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


@pytest.fixture(scope="module")
def known_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose network knows the blobs."""
    return train_blobs(tmp_path_factory.mktemp("known"), train__epochs=20)[0]


@pytest.fixture(scope="module")
def served(known_run: Path, published_run: PublishedRun, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The command in a process of its own; Ctrl-C at the end leaves no traceback and no file but the publication."""
    folder = tmp_path_factory.mktemp("app")
    second = folder / "second"
    shutil.copytree(published_run.folder, second)
    config = json.loads((second / "config.json").read_text())
    config["app"] |= {"title": "Second <model>", "temperature": None, "is_non_commercial": True}
    (second / "config.json").write_text(json.dumps(config))
    survey = BlobSurvey()
    pictures = {}
    for row in survey.splits["test"][:3]:
        (galaxy,) = survey.read(int(row), int(row) + 1)
        pictures[CLASS_NAMES[galaxy.label]] = path = folder / f"{CLASS_NAMES[galaxy.label]}.png"
        Image.fromarray(np.asarray(galaxy.image)).save(path)

    words = [str(known_run), str(second), "--max-upload", "1"]
    with running_app(words, folder / "log", folder / "temporary", {"GRADIO_ALLOWED_PATHS": "/etc"}) as app:
        yield Served(app, folder / "log", folder, pictures)
    assert find_publication(known_run, folder).is_current and is_published(known_run / PUBLISHED)


@pytest.mark.browser
def test_two_users_get_the_answers_about_their_own_pictures(served: Served, known_run: Path) -> None:
    predictor = galaxydist.load_predictor(known_run, device="cpu")
    with AppPage(served.app) as first, AppPage(served.app, width=390, dark=True) as second:
        users = {"round": first, "pair": second}
        for name, page in users.items():
            page.give("#gd-drop", served.pictures[name])
        for name, page in users.items():
            text = page.answer_about(f"{name}.png")
            assert page.evaluate("document.querySelector('#gd-answer h2').innerText") == name
            expected = predictor(str(served.pictures[name]))
            assert expected.predicted[0] == name
            shown = float(re.search(r"([\d.]+)\s%, calibrated", text)[1]) / 100  # type: ignore[index]
            assert shown == pytest.approx(float(expected.probabilities.max()), abs=1.1e-3)
            assert re.search(r"[1-8] of 8 views agree", text)
            test = json.loads((known_run / PUBLISHED / "results.json").read_text())["test"]
            label = CLASS_NAMES.index(name)
            precision, called = test["per_class"]["precision"][label], test["per_class"]["predicted"][label]
            assert f"Measured: right for {100 * test['accuracy']:.1f}\xa0% (95\xa0% interval " in text
            assert f" of its {test['count']} test galaxies, and for {100 * precision:.1f}\xa0% (95\xa0% interval " in text
            assert f" of the {called} that it called {name} (a share" in text
            assert page.fits_window()
            assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth)")
        # Another model answers about the same picture.
        first.evaluate("document.querySelector('#gd-model input').focus()")
        for key in ("ArrowDown", "Enter"):
            first.press(key)
        first.wait_for("document.querySelector('#gd-answer').innerText.includes('not calibrated')")
        assert "non-commercial" in first.evaluate("document.querySelector('#gd-notice').innerText")
        assert "Second <model>" in first.evaluate("document.querySelector('#gd-notice').innerText")
        first.check_quiet()
        second.check_quiet()


@pytest.mark.browser
def test_bad_uploads_get_a_sentence_and_many_pictures_a_table(served: Served, tmp_path: Path) -> None:
    bad = {"galaxy.fits": b"SIMPLE  =                    T", "empty.jpg": b"", "text.jpg": b"<script>alert(1)</script>"}
    with AppPage(served.app) as page:
        for name, content in bad.items():
            (tmp_path / name).write_bytes(content)
            page.give("#gd-drop", tmp_path / name)
            assert name in page.answer_about(name)
            assert page.evaluate("document.querySelector('#gd-answer [role=alert]').innerText.length") > 20
        (tmp_path / "large.png").write_bytes(bytes(1_200_000))
        page.give("#gd-drop", tmp_path / "large.png")
        page.wait_for("document.body.innerText.includes('maximum allowed size')")

        with zipfile.ZipFile(tmp_path / "some.zip", "w") as archive:
            archive.write(served.pictures["flat"], "=flat.png")
            archive.write(tmp_path / "text.jpg", "text.jpg")
        page.open_tab("Many pictures")
        page.wait_for("document.querySelector('#gd-drop-many input[type=file]')")
        page.give("#gd-drop-many", tmp_path / "some.zip", served.pictures["pair"])
        page.wait_for("document.querySelector('#gd-table tbody')")
        rows = page.evaluate(
            "[...document.querySelectorAll('#gd-table tbody tr')].map(row => [...row.cells].map(c => c.innerText))"
        )
        assert [row[:2] for row in rows] == [["=flat.png", "flat"], ["text.jpg", ""], ["pair.png", "pair"]]
        assert "not a picture" in rows[1][-1]
        link = page.evaluate("document.querySelector('#gd-table a[download]').href")
        table = base64.b64decode(link.partition("base64,")[2]).decode().splitlines()
        assert table[0].startswith("name,predicted,confidence,p_round,p_flat,p_pair,") and table[1].startswith("'=flat.png,flat,")
        for tab in ("Many pictures", "About the model"):
            page.resize(1280)
            page.open_tab(tab)
            page.resize(390)
            page.wait_for("document.documentElement.scrollWidth <= 390")  # the row of tabs needs a moment
        page.check_quiet()


def test_no_path_and_no_url_of_a_request_is_opened(served: Served) -> None:
    config = json.loads(served.request("GET", "/config")[1])
    number = {event["api_name"]: event["id"] for event in config["dependencies"]}["predict"]
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(0.2)
        url = f"http://127.0.0.1:{other.getsockname()[1]}/galaxy.jpg"

        def join(*data: Any, **more: Any) -> int:
            content = {"data": data, "fn_index": number, "session_hash": "abc", **more}
            return served.request("POST", "/gradio_api/queue/join", json.dumps(content))[0]

        paths = (url, "http://example.com/galaxy.jpg", "/etc/passwd", f"{served.folder}/log", "../../etc/passwd", "", None, "/\0")
        for path in paths:
            assert join({"path": path, "url": url, "meta": FILE}, None) == 403, path
            assert join({"path": path, "url": url}, None) == 403, path
        assert join({"path": None, "url": "data:image/png;base64,AAAA", "meta": FILE}, None) == 403
        assert join("/etc/passwd", None) == 403
        for data in ([], [None], [None, {"path": "/etc/passwd", "meta": FILE}], [None, ["x"]], [None, "x" * 2000]):
            assert join(*data) == 400, data
        assert join(None, None, fn_index=99) == join(None, None, fn_index="0") == join(None, None, session_hash=None) == 400
        refused = {
            "GET": ("/gradio_api/file=/etc/passwd", f"/gradio_api/file={url}", f"/gradio_api/proxy={url}", "/docs", "/monitoring",
                    "/gradio_api/openapi.json", "/gradio_api/queue/data?session_hash=nobody"),
            "POST": ("/gradio_api/run/predict", "/gradio_api/call/predict", "/gradio_api/component_server", "/login",
                     "/gradio_api/vibe-edit", "/gradio_api/process_recording"),
            "PUT": ("/config",),
        }  # fmt: skip
        body = json.dumps({"data": [{"path": url, "meta": FILE}, None]})
        for method, addresses in refused.items():
            for address in addresses:
                assert served.request(method, address, None if method == "GET" else body)[0] in (403, 404), address
        for wrong in (b"{", b"[1]", b"[" * 100_000, b"\xff"):
            assert served.request("POST", "/gradio_api/queue/join", wrong)[0] == 400
        form = {"content-type": "multipart/form-data; boundary=x"}
        text = b'--x\r\nContent-Disposition: form-data; name="files"\r\n\r\nabc\r\n--x--\r\n'
        assert served.request("POST", "/gradio_api/upload", text, form)[0] == 400
        assert served.request("POST", "/gradio_api/upload", bytes(1_100_000), form)[0] == 413
        assert served.request("POST", "/gradio_api/upload", iter([b"--x"]), form)[0] == 411  # of unknown length
        with socket.create_connection(("127.0.0.1", served.app.port)) as broken:
            broken.sendall(b"POST /gradio_api/upload HTTP/1.1\r\nhost: x\r\ncontent-length: 900\r\n")
            broken.sendall(b"content-type: multipart/form-data; boundary=x\r\n\r\n--x\r\n")
        with pytest.raises(TimeoutError):
            other.accept()
        browsers_own = [event["id"] for event in config["dependencies"] if event["js"] and not event["backend_fn"]]
        assert browsers_own and all(join(fn_index=number) == 400 for number in browsers_own)
    assert served.request("GET", "/")[0] == 200


def test_uploads_that_arrive_slowly_take_room_on_the_disk_until_they_end(served: Served) -> None:
    head = b"POST /gradio_api/upload HTTP/1.1\r\nhost: x\r\ncontent-type: multipart/form-data; boundary=x\r\n"
    form = {"content-type": "multipart/form-data; boundary=x"}

    def wait_for(*statuses: int) -> None:
        deadline = time.monotonic() + 60
        while served.request("POST", "/gradio_api/upload", bytes(1 << 20), form)[0] not in statuses:
            assert time.monotonic() < deadline
            time.sleep(0.1)

    with ExitStack() as stack:
        for _ in range(20):
            slow = stack.enter_context(socket.create_connection(("127.0.0.1", served.app.port)))
            slow.sendall(head + b"content-length: 1048576\r\n\r\n--x\r\n")
        wait_for(503)
    wait_for(200, 400)
    # The page asks how far an upload is that has not begun.
    assert served.request("GET", "/gradio_api/upload_progress?upload_id=late") == (200, b'data: {"msg": "done"}\n\n')


def test_a_model_is_asked_with_gradios_protocol(served: Served) -> None:
    form = {"content-type": "multipart/form-data; boundary=x"}
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    status, answer = served.request(
        "POST", "/gradio_api/upload", head + served.pictures["flat"].read_bytes() + b"\r\n--x--\r\n", form
    )
    assert status == 200
    (path,) = json.loads(answer)
    config = json.loads(served.request("GET", "/config")[1])
    event = next(event for event in config["dependencies"] if event["api_name"] == "predict")
    content = {"data": [{"path": path, "meta": FILE}, None], "fn_index": event["id"], "session_hash": "here"}
    assert served.request("POST", "/gradio_api/queue/join", json.dumps(content))[0] == 200
    _, lines = served.request("GET", "/gradio_api/queue/data?session_hash=here")
    messages = [json.loads(line.removeprefix("data: ")) for line in lines.decode().splitlines() if line.startswith("data: ")]
    done = next(message for message in messages if message["msg"] == "process_completed")
    values = done["output"]["data"][2]
    assert values["class"] == "flat" and sum(values["probabilities"].values()) == pytest.approx(1, abs=1e-4)


def test_errors_of_the_command_are_one_message(served: Served, tmp_path: Path) -> None:
    def run(*arguments: object) -> str:
        command = [sys.executable, "-m", "galaxydist", "app", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        return done.stderr

    assert f"--port {served.app.port} of 127.0.0.1 is in use" in run(served.folder / "second", "--port", served.app.port)
    assert "neither a run nor a published folder" in run(tmp_path)
    damaged = Path(shutil.copytree(served.folder / "second", tmp_path / "damaged"))
    (damaged / "reference.npz").write_bytes(b"PK")
    assert "reference.npz is damaged" in run(damaged)
    assert "not an address of this machine" in run(served.folder / "second", "--host", "192.0.2.1")


def test_ctrl_c_while_a_run_is_published_leaves_nothing_half_written(published_run: PublishedRun, tmp_path: Path) -> None:
    out = tmp_path / "published"

    def end_when_it_writes() -> None:
        deadline = time.monotonic() + 120
        while not (written := any(tmp_path.iterdir())) and time.monotonic() < deadline:
            time.sleep(0.01)
        if written:
            os.kill(os.getpid(), signal.SIGTERM)  # as the app ends the process that publishes

    Thread(target=end_when_it_writes).start()
    asked = json.dumps({"runs": [[str(published_run.run_dir), str(out), ""]], "trust_code": False})
    assert publish_runs(asked, os.environ) == EXIT_INTERRUPTED
    assert list(tmp_path.iterdir()) == []
