"""Cutouts of a sky position, from a viewer on loopback that answers as the real one does, or badly."""

import contextlib
import io
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from PIL import Image

from galaxydist.serving.app.cutout import CutoutError, CutoutForm, fetch_cutout, parse_position
from galaxydist.serving.app.published_model import AppConfig, PictureForm

FORM = CutoutForm("ls-dr8", 0.262, 64)


class Viewer(BaseHTTPRequestHandler):
    """Answers by declination: 0 well, other whole degrees badly."""

    asked: ClassVar[list[dict[str, list[str]]]] = []

    def do_GET(self) -> None:  # noqa: PLR0911, PLR0912
        asked = parse_qs(urlsplit(self.path).query)
        self.asked.append(asked)
        size = int(asked["size"][0])
        pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3)).astype(np.uint8)
        kind = round(float(asked["dec"][0]))
        host = f"http://127.0.0.1:{self.server.server_address[1]}"
        if kind == 1:
            pixels[:] = 30
        elif kind == 2:
            pixels[:, : size // 2] = 30
        elif kind == 3:
            pixels = pixels[:-8]
        elif kind == 4:
            return self.send(200, b"<html>down for maintenance</html>")
        elif kind == 5:
            return self.send(500, b"")
        elif kind == 6:
            return self.send(302, b"", Location=host.replace("127.0.0.1", "localhost") + "/x?size=64&dec=0")
        elif kind == 7:
            return self.send(302, b"", Location=f"{host}/elsewhere?size=64&dec=0")
        elif kind == 8:
            return self.send(302, b"", Location="file:///etc/hostname")
        elif kind == 9:
            return self.send(200, bytes(9 << 20))
        elif kind == 10:
            time.sleep(3)
        elif kind == 11:  # a byte now and then
            self.send_response(200)
            self.end_headers()
            with_end = time.monotonic() + 3
            while time.monotonic() < with_end:
                self.wfile.write(b"\xff")
                time.sleep(0.1)
            return None
        elif kind == 12:
            self.connection.shutdown(socket.SHUT_RDWR)
            return None
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "JPEG", quality=95)
        return self.send(200, stream.getvalue())

    def send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # the client has left
            super().handle()


@pytest.fixture(scope="module")
def viewer() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Viewer)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/viewer/cutout.jpg"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_cutout_is_asked_for_at_the_models_scale_size_and_layer_which_are_stated(
    viewer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    found = fetch_cutout("10:00:27.9", "-0 00 30", FORM, viewer=viewer)
    assert Viewer.asked[-1] == {
        "ra": ["150.116250"],
        "dec": ["-0.008333"],
        "layer": ["ls-dr8"],
        "pixscale": ["0.262"],
        "size": ["64"],
    }
    assert found.picture.pixels.shape == (64, 64, 3) and found.notes == ()
    assert found.caption == (
        "ra 150.11625, dec -0.00833 degrees: Legacy Surveys, layer ls-dr8, 0.262 arcsec/pixel, 64 x 64 pixels (17 arcsec)."
    )
    assert "outside" in fetch_cutout(1, 2, FORM, viewer=viewer).notes[0]
    assert fetch_cutout(1, 7, FORM, viewer=viewer).picture.pixels.shape == (64, 64, 3), "another place of the same host"


@pytest.mark.parametrize(
    "dec, expected",
    [
        (1, "no image of ra 1.00000, dec [+]1.00000, which is outside of their footprint"),
        (3, "64 x 56 pixels, and 64 x 64 were asked for"),
        (4, "not a picture"),
        (5, "HTTP 500"),
        (6, "another place"),
        (8, "HTTP 302"),
        (9, "far more bytes"),
        (10, "within 1 seconds"),
        (11, "within 1 seconds|far more|not a picture"),
        (12, "cannot be reached"),
    ],
)
def test_bad_answers_are_one_sentence_in_time(viewer: str, dec: int, expected: str) -> None:
    before = time.monotonic()
    with pytest.raises(CutoutError, match=expected) as caught:
        fetch_cutout(1, dec, FORM, viewer=viewer, time_limit=1)
    assert time.monotonic() - before < 10 and str(caught.value).endswith(".")


def test_without_a_network_there_is_one_sentence() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}/cutout.jpg"
        with pytest.raises(CutoutError, match="needs a connection to the internet"):
            fetch_cutout(1, 1, FORM, viewer=address)


@pytest.mark.parametrize(
    "ra, dec, degrees",
    [
        (150.1163, 2.2058, (150.1163, 2.2058)),
        ("150.1163", "+2.2058", (150.1163, 2.2058)),
        ("10:00:27.912", "+02:12:20.88", (150.1163, 2.2058)),
        ("10h00m27.912s", "2d12m20.88s", (150.1163, 2.2058)),
        ("10 00 27.912", "2° 12′ 20.88″", (150.1163, 2.2058)),
        ("150d06m58.68s", "+02:12:20.88", (150.1163, 2.2058)),
        ("10° 00′ 27.912″", "0", (10.00775333333, 0)),
        ("0:0:0", "-0:30:00", (0, -0.5)),
        ("360", "−90", (0, -90)),
    ],
)
def test_positions_are_degrees_or_sexagesimal(ra: Any, dec: Any, degrees: tuple[float, float]) -> None:
    assert parse_position(ra, dec) == pytest.approx(degrees, abs=1e-9)


@pytest.mark.parametrize(
    "ra, dec, expected",
    [
        ("", "1", "ra. is missing"),
        ("1", "  ", "dec. is missing"),
        ("NGC 1300", "1", "'NGC 1300' is not a position"),
        ("nan", "1", "not a position"),
        ("inf", "1", "not a position"),
        ("361", "1", "0 to 360"),
        ("-1", "1", "0 to 360"),
        ("1", "90.1", "-90 to 90"),
        ("25:00:00", "1", "0 to 24 hours"),
        ("150 30 00", "1", "0 to 24 hours"),
        ("10:60:00", "1", "60 or more"),
        ("1", "2h12m20s", "dec. 2h12m20s is in hours"),
        ("1", "1:00:61", "60 or more"),
        ("1&layer=sdss", "1", "'1_layer=sdss' is not a position"),
        ("<script>" * 99, "1", "'_script_"),
    ],
)
def test_other_positions_are_refused_with_an_example_or_the_range(ra: str, dec: str, expected: str) -> None:
    with pytest.raises(CutoutError, match=expected) as caught:
        parse_position(ra, dec)
    assert len(str(caught.value)) < 200 and str(caught.value).endswith(".")


def test_cutouts_are_offered_only_if_layer_and_pixel_scale_are_known() -> None:
    form = PictureForm(40, 128, 2, 1.0, (0, 0, 0), (1, 1, 1), pixel_scale=(0.26, 0.262, 0.3))
    config = AppConfig("x", ("a", "b"), form, layer="ls-dr8")
    assert CutoutForm.of(config) == CutoutForm("ls-dr8", 0.262, 128)
    resampled = replace(config, form=replace(form, source_sides=(256, 300)))
    assert CutoutForm.of(resampled) == CutoutForm("ls-dr8", 0.262, 256)
    assert CutoutForm.of(replace(config, layer=None)) is None
    assert CutoutForm.of(replace(config, form=replace(form, pixel_scale=None))) is None
    assert CutoutForm.of(replace(config, form=replace(form, source_sides=(5000, 5000)))) is None
