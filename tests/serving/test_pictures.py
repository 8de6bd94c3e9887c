"""Bytes of files as pictures: each bad file gets one sentence, whatever the bytes are, within a memory bound."""

import io
import re
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from galaxydist.serving.app import pictures
from galaxydist.serving.app.pictures import PictureError, read_picture
from galaxydist.surveys.image_files import decode_file

RNG = np.random.default_rng(18)
NOISE = RNG.integers(0, 256, (24, 40, 3)).astype(np.uint8)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def frames(kind: str) -> bytes:
    shown = Image.fromarray(NOISE)
    return saved(shown, kind, save_all=True, append_images=[shown.rotate(180), shown.rotate(90)], duration=100)


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(Image.fromarray(NOISE), "JPEG", exif=exif)


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_of(width: int, height: int, bits: int, colours: int, rows: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def png_of_16_bits() -> bytes:
    """Pillow writes no RGB PNG of 16 bits."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in NOISE.astype(np.uint16) * 257)
    return png_of(NOISE.shape[1], NOISE.shape[0], 16, 2, rows)


def large_webp() -> bytes:
    """A small lossless WebP whose header says 12000 x 3000."""
    data = bytearray(saved(Image.fromarray(NOISE), "WEBP", lossless=True))
    data[21:25] = (11999 | 2999 << 14).to_bytes(4, "little")
    return bytes(data)


def transparent() -> bytes:
    return saved(Image.fromarray(np.dstack([NOISE, np.full(NOISE.shape[:2], 128, np.uint8)])), "PNG")


GOOD: dict[str, tuple[Callable[[], bytes], str]] = {
    "JPEG": (lambda: saved(Image.fromarray(NOISE), "JPEG"), ""),
    "PNG": (lambda: saved(Image.fromarray(NOISE), "PNG"), ""),
    "BMP": (lambda: saved(Image.fromarray(NOISE), "BMP"), ""),
    "WebP": (lambda: saved(Image.fromarray(NOISE), "WEBP"), ""),
    "palette": (lambda: saved(Image.fromarray(NOISE).quantize(16), "PNG"), ""),
    "grey": (lambda: saved(Image.fromarray(NOISE[..., 0]), "PNG"), "grey"),
    "transparent": (transparent, "transparent"),
    "CMYK": (lambda: saved(Image.fromarray(NOISE).convert("CMYK"), "JPEG"), "CMYK"),
    "turned by EXIF": (turned, "upright"),
    "16 bits a colour": (png_of_16_bits, "16 bits"),
    "animated GIF": (lambda: frames("GIF"), "animated"),
    "animated WebP": (lambda: frames("WEBP"), "animated"),
    "animated PNG": (lambda: frames("PNG"), "animated"),
}


@pytest.mark.parametrize("name", GOOD)
def test_pictures_have_the_pixels_that_the_training_would_see_and_a_note_of_what_was_changed(name: str) -> None:
    make, note = GOOD[name]
    data = make()
    picture = read_picture(data, "galaxy")
    np.testing.assert_array_equal(picture.pixels, decode_file(data, name))
    assert picture.pixels.dtype == np.uint8 and picture.pixels.shape[2] == 3
    assert (note in " ".join(picture.notes)) if note else not picture.notes
    assert (picture.jpeg == data) == (name == "JPEG")


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "is empty"),
    "text": (lambda: b"NGC 1300 is a barred spiral", "not a picture in one of the formats"),
    "FITS": (lambda: b"SIMPLE  =                    T" + bytes(3000), "RGB picture of three bands"),
    "SVG": (lambda: b'<?xml version="1.0"?>\n<!-- x -->\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
    "web page": (lambda: b"<!DOCTYPE html><html></html>", "web page"),
    "PDF": (lambda: saved(Image.fromarray(NOISE), "PDF"), "document"),
    "HEIC": (lambda: b"\0\0\0\x18ftypheic" + bytes(99), "HEIC"),
    "AVIF": (lambda: saved(Image.fromarray(NOISE), "AVIF"), "AVIF"),
    "film": (lambda: b"\0\0\0\x18ftypmp42" + bytes(99), "film"),
    "TIFF of floats": (lambda: saved(Image.fromarray(NOISE[..., 0].astype(np.float32)), "TIFF"), "TIFF.*8 bits"),
    "16-bit grey": (lambda: saved(Image.fromarray(NOISE[..., 0].astype(np.uint16)), "PNG"), "more than 8 bits"),
    "zip": (lambda: b"PK\x03\x04" + bytes(40), "zip"),
    "sound": (lambda: b"RIFF\0\0\0\0WAVEfmt ", "not a picture in one"),
    "pickle": (lambda: b"cos\nsystem\n(S'touch /tmp/owned'\ntR.", "not a picture in one"),
    "truncated": (lambda: saved(Image.fromarray(NOISE), "PNG")[:900], "damaged or incomplete"),
    "header alone": (lambda: saved(Image.fromarray(NOISE), "JPEG")[:40], "damaged or incomplete"),
    "tiny": (lambda: saved(Image.fromarray(NOISE[:8]), "PNG"), "only 40 x 8 pixels"),
    "many pixels": (lambda: png_of(8000, 8000, 8, 2, b""), "8000 x 8000 pixels"),
    "far too many": (lambda: png_of(20000, 20000, 8, 2, b""), "far too many pixels"),
    "many in WebP": (large_webp, "12000 x 3000 pixels"),
    "large file": (lambda: b"\xff\xd8" + bytes(pictures.MAX_BYTES), "at most 20 MB"),
    "endless passes": (
        lambda: saved(Image.fromarray(NOISE), "JPEG") + b"\xff\xda\0\x02" * (pictures.MAX_SCANS + 1),
        "too many passes",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_other_files_are_refused_with_one_sentence(name: str, recwarn: pytest.WarningsRecorder) -> None:
    make, expected = BAD[name]
    with pytest.raises(PictureError, match=expected) as caught:
        read_picture(make(), "galaxy.png")
    sentence = str(caught.value)
    assert sentence.startswith("galaxy.png ") and sentence.endswith(".") and len(sentence) < 260 and "\n" not in sentence
    assert not recwarn.list


# Prints by how many MB the largest memory of a process of its own grows while it reads files.
MEASURE = """
import sys
from pathlib import Path
from galaxydist.serving.app.pictures import PictureError, read_picture

def peak_mb():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024

contents = [Path(name).read_bytes() for name in sys.argv[1:]]
before = peak_mb()
for content in contents:
    try:
        read_picture(content, "galaxy.png")
    except PictureError:
        pass
print(peak_mb() - before)
"""


def test_pictures_of_too_many_pixels_are_not_decoded(tmp_path: Path) -> None:
    def growth_mb(*contents: bytes) -> float:
        files = [tmp_path / str(number) for number in range(len(contents))]
        for file, content in zip(files, contents, strict=True):
            file.write_bytes(content)
        command = [sys.executable, "-c", MEASURE, *map(str, files)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert growth_mb(*(BAD[name][0]() for name in ("many pixels", "far too many", "many in WebP"))) < 40
    assert growth_mb(saved(Image.new("RGB", (6000, 4000)), "PNG")) > 60, "one of the largest size is decoded, and that is seen"


def test_names_are_shown_without_what_a_page_or_terminal_would_interpret() -> None:
    with pytest.raises(PictureError) as caught:
        read_picture(b"", "<img src=x onerror=alert(1)>\x1b[31m\n[a](b)\u202egnp.jpg")
    assert not re.search(r"[<>\x1b\n\[\]\u202e]", str(caught.value))
    with pytest.raises(PictureError, match=r"\.\.\.a+\.png is empty"):
        read_picture(b"", "a" * 5000 + ".png")


REAL = [make() for make, _ in GOOD.values()]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_bytes_are_a_picture_or_a_picture_error_within_a_memory_bound(data: st.DataObject) -> None:
    """Arbitrary bytes, and cut, changed and joined real files, whose headers may then state any size."""
    file = bytearray(data.draw(st.one_of(st.binary(max_size=300), st.sampled_from(REAL))))
    for place, value in data.draw(st.lists(st.tuples(st.integers(0, 1200), st.integers(0, 255)), max_size=6)):
        if file:
            file[place % len(file)] = value
    file = file[: data.draw(st.one_of(st.just(len(file)), st.integers(0, len(file))))]
    before = psutil.Process().memory_info().rss
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            found = read_picture(bytes(file), "x").pixels
            assert found.dtype == np.uint8 and found.ndim == 3 and found.size <= 3 * pictures.MAX_PIXELS
            assert min(found.shape[:2]) >= pictures.MIN_SIDE
        except PictureError as error:
            assert str(error).endswith(".")
    assert psutil.Process().memory_info().rss - before < 12 * pictures.MAX_PIXELS


@example(b"")
@given(st.binary(max_size=40))
@settings(max_examples=50, deadline=None)
def test_damaged_metadata_do_not_hide_a_good_picture(noise: bytes) -> None:
    data = saved(Image.fromarray(NOISE), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0" + noise)
    np.testing.assert_array_equal(read_picture(data).pixels.shape[2], 3)


def test_real_galaxies_are_read_as_the_training_reads_them() -> None:
    folder = Path(__file__).parents[3] / "shared" / "data" / "galaxy10_decals_sample"
    if not folder.is_dir():
        pytest.skip("needs the sample of real galaxies beside the repository")
    for path in sorted(folder.rglob("*.jpg"))[::50]:
        data = path.read_bytes()
        np.testing.assert_array_equal(read_picture(data, path.name).pixels, decode_file(data, path))
