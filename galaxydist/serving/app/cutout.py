"""Cutouts of the Legacy Surveys' viewer: a position on the sky to a picture at a model's training pixel scale, size and layer.

The viewer's address is ``https://www.legacysurvey.org/viewer/cutout.jpg?ra=..&dec=..&layer=..&pixscale=..&size=..``: degrees,
arcsec/pixel, and pixels (at most 3,000), as its own source says (github.com/legacysurvey/imagine, ``map/views.py``). A position
outside of the footprint has an image of one colour.
"""

import math
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

import numpy as np

from .pictures import Picture, PictureError, read_picture
from .published_model import AppConfig

VIEWER = "https://www.legacysurvey.org/viewer/cutout.jpg"
MAX_SIDE = 3000
# Largest answer, and the time for all of it, in seconds.
MAX_ANSWER, TIME_LIMIT = 8 << 20, 20.0
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
_SEXAGESIMAL = re.compile(
    rf"([+-]?)\s*(\d{{1,3}})\s*([hd°:\s])\s*(\d{{1,2}})\s*[m′':\s]\s*{_NUMBER}\s*(?:s|″|\"|'')?", re.IGNORECASE
)


class CutoutError(ValueError):
    """Error of a position that is none, or for which the viewer has no picture: one sentence for people."""


@dataclass(frozen=True)
class CutoutForm:
    """The cutouts that a model was trained on.

    Args:
        layer: of the viewer.
        pixel_scale: in arcsec/pixel.
        size: side in pixels.
    """

    layer: str
    pixel_scale: float
    size: int

    @classmethod
    def of(cls, config: AppConfig) -> "CutoutForm | None":
        """Return a model's form: its layer, the median of its pixel scales, the size before resampling; None if unknown."""
        form = config.form
        if config.layer is None or form.pixel_scale is None:
            return None
        size = form.stored_size if form.source_sides is None else form.source_sides[0]
        return cls(config.layer, form.pixel_scale[1], size) if size <= MAX_SIDE else None

    def __str__(self) -> str:
        return (
            f"Legacy Surveys, layer {self.layer}, {self.pixel_scale:.4g} arcsec/pixel, {self.size} x {self.size} pixels "
            f"({self.size * self.pixel_scale:.0f} arcsec)"
        )


@dataclass(frozen=True)
class Cutout:
    """A cutout of the viewer.

    Args:
        picture: the image.
        ra, dec: its centre in degrees (J2000).
        form: its layer, pixel scale and size.
        address: that it came from.
        notes: sentences about it.
    """

    picture: Picture
    ra: float
    dec: float
    form: CutoutForm
    address: str
    notes: tuple[str, ...] = ()

    @property
    def caption(self) -> str:
        """Sentence that says what is shown."""
        return f"ra {self.ra:.5f}, dec {self.dec:+.5f} degrees: {self.form}."


def parse_position(ra: str | float, dec: str | float) -> tuple[float, float]:
    """Return right ascension and declination in degrees.

    Args:
        ra: degrees (``150.1163``, ``150d06m58.7s``), or hours, minutes and seconds (``10:00:27.9``, ``10h00m27.9s``,
            ``10 00 27.9``).
        dec: degrees, or degrees, minutes and seconds (``+02:12:21``, ``2d12m21s``, ``-0 30 00``).

    Raises:
        CutoutError: they are no such values, or outside of 0 to 360 and -90 to 90 degrees.
    """
    right, unit = _angle(ra, "Right ascension (ra)", "150.1163 degrees or 10:00:27.9 hours")
    up, unit_of_dec = _angle(dec, "Declination (dec)", "2.2058 or +02:12:21 degrees")
    if unit_of_dec == "h":
        raise CutoutError(f"Declination (dec) {_shown(dec)} is in hours: give it in degrees, like 2.2058 or +02:12:21.")
    if unit not in ("", "d", "°"):
        if not 0 <= right < 24:
            raise CutoutError(f"Right ascension (ra) {_shown(ra)} is outside of 0 to 24 hours: give degrees as one number.")
        right *= 15
    if not 0 <= right <= 360:
        raise CutoutError(f"Right ascension (ra) {_shown(ra)} is outside of 0 to 360 degrees.")
    if not -90 <= up <= 90:
        raise CutoutError(f"Declination (dec) {_shown(dec)} is outside of -90 to 90 degrees.")
    return right % 360, up


def fetch_cutout(
    ra: str | float, dec: str | float, form: CutoutForm, *, viewer: str = VIEWER, time_limit: float = TIME_LIMIT
) -> Cutout:
    """Fetch the cutout at a position.

    Nothing but the viewer's own host is asked: its redirects elsewhere are refused. A proxy of the environment is used, except
    for addresses of this machine.

    Args:
        ra, dec: as in :func:`parse_position`.
        form: layer, pixel scale and size.
        viewer: address of the viewer's cutouts; never a user's.
        time_limit: for the whole answer, in seconds.

    Raises:
        CutoutError: no such position, no network, no answer in time, or no image there.
    """
    right, up = parse_position(ra, dec)
    asked = {"ra": f"{right:.6f}", "dec": f"{up:.6f}", "layer": form.layer, "pixscale": f"{form.pixel_scale:.6g}"}
    address = f"{viewer}?{urllib.parse.urlencode(asked | {'size': str(form.size)})}"
    data = _download(address, time_limit)
    try:
        picture = read_picture(data, "the viewer's cutout")
    except PictureError:
        raise CutoutError("The Legacy Surveys' viewer answered with something that is not a picture: try again later.") from None
    if picture.pixels.shape[:2] != (form.size, form.size):
        height, width = picture.pixels.shape[:2]
        raise CutoutError(
            f"The Legacy Surveys' viewer gave {width} x {height} pixels, and {form.size} x {form.size} were asked for."
        )
    blank = _blank_share(picture)
    where = f"ra {right:.5f}, dec {up:+.5f}"
    if blank == 1:
        raise CutoutError(
            f"The Legacy Surveys have no image of {where}, which is outside of their footprint (layer {form.layer})."
        )
    notes = (f"About {100 * blank:.0f} % of the cutout are outside of the survey's footprint.",) if blank > 0.02 else ()
    return Cutout(picture, right, up, form, address, notes)


def _angle(value: str | float, name: str, example: str) -> tuple[float, str]:
    """Return a number and an empty text, or the value of a sexagesimal text and the sign after its first number, like ``h``."""
    text = _shown(value).replace("−", "-").strip()
    try:
        number = float(text)
    except ValueError:
        found = _SEXAGESIMAL.fullmatch(text)
        if found is None:
            given = f"{_shown(value)!r} is not a position" if text else "is missing"
            raise CutoutError(f"{name} {given}: give it as {example}.") from None
        sign, whole, unit, minutes, seconds = found.groups()
        if not (int(minutes) < 60 and float(seconds) < 60):
            raise CutoutError(f"{name} {_shown(value)} has 60 or more minutes or seconds.") from None
        number = int(whole) + int(minutes) / 60 + float(seconds) / 3600
        return (-number if sign == "-" else number), unit.lower()
    if not math.isfinite(number):
        raise CutoutError(f"{name} {_shown(value)!r} is not a position: give it as {example}.")
    return number, ""


def _shown(value: str | float) -> str:
    return re.sub(r"[<>&`\x00-\x1f]", "_", str(value))[:40]


def _download(address: str, time_limit: float) -> bytes:
    """Return the bytes of an answer."""
    deadline = time.monotonic() + time_limit
    is_own = urllib.parse.urlsplit(address).hostname in _LOOPBACK
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({} if is_own else None), _SameHost())
    late = CutoutError(f"The Legacy Surveys' viewer did not answer within {time_limit:.0f} seconds: try again later.")
    blocks: list[bytes] = []
    try:
        with opener.open(address, timeout=time_limit) as answer:
            while block := answer.read1(1 << 16):
                blocks.append(block)
                if sum(map(len, blocks)) > MAX_ANSWER:
                    raise CutoutError("The Legacy Surveys' viewer answered with far more bytes than a cutout has.")
                if time.monotonic() > deadline:
                    raise late
    except urllib.error.HTTPError as error:
        error.close()
        raise CutoutError(f"The Legacy Surveys' viewer has no cutout there, or is out of order (HTTP {error.code}).") from None
    except TimeoutError:
        raise late from None
    except (OSError, HTTPException, ValueError) as error:
        if isinstance(error, CutoutError):
            raise
        if isinstance(getattr(error, "reason", None), TimeoutError):
            raise late from None
        raise CutoutError("The Legacy Surveys' viewer cannot be reached: this needs a connection to the internet.") from None
    return b"".join(blocks)


class _SameHost(urllib.request.HTTPRedirectHandler):
    """Redirects to another place of the same host are followed, others are errors."""

    def redirect_request(self, req: urllib.request.Request, *args: Any, **kwargs: Any) -> urllib.request.Request | None:
        old, new = urllib.parse.urlsplit(req.full_url), urllib.parse.urlsplit(args[-1])
        if (old.scheme, old.netloc) != (new.scheme, new.netloc):
            raise CutoutError("The Legacy Surveys' viewer sent us to another place, which is not asked.")
        return super().redirect_request(req, *args, **kwargs)


def _blank_share(picture: Picture) -> float:
    """Return the share of rows or columns of one colour, whichever is larger: those outside of the footprint."""
    levels = picture.pixels.astype(np.int16)
    spans = [(levels.max(axis=axis) - levels.min(axis=axis)).max(axis=-1) for axis in (0, 1)]
    return max(float((span <= 1).mean()) for span in spans)
