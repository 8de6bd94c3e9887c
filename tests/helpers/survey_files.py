"""Small survey files and image folders to test with, and a run in which files may not grow."""

import resource
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from galaxydist.surveys.hdf5_schema import SurveyFileWriter


def write_survey(path: Path, counts: Sequence[int] = (12,) * 10, seed: int = 0, *, simulated: bool = True) -> NDArray[np.int64]:
    """A survey file with ``counts`` galaxies a class, an overlapping pair and a place with two labels; returns the labels."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    num = len(labels)
    ra, dec = rng.uniform(0, 360, num), rng.uniform(-30, 60, num)
    ra[-1], dec[-1] = ra[0], dec[0]  # the first and the last class at one place
    ra[2], dec[2] = ra[1] + 0.005, dec[1]  # 18 arcsec or less
    redshift = rng.uniform(0.01, 0.1, num)
    redshift[::5] = np.nan
    images = rng.integers(0, 256, (num, 16, 16, 3), dtype=np.uint8).repeat(16, axis=1).repeat(16, axis=2)
    with SurveyFileWriter(path, num, {"seed": seed}, simulated=simulated) as writer:
        for start in range(0, num, 50):
            part = slice(start, start + 50)
            writer.append(
                images[part],
                labels=labels[part],
                ra=ra[part],
                dec=dec[part],
                redshift=redshift[part],
                pxscale=np.full(len(labels[part]), 0.262),
            )
    return labels


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = (20, 24), mode: str = "RGB") -> Path:
    """A small image, another one in a folder of another name; its format is its name's."""
    pixels = np.random.default_rng([seed, zlib.crc32(path.parent.name.encode())]).integers(0, 256, (*size, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def run_with_file_limit(code: str, limit_bytes: int) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process whose files cannot grow past ``limit_bytes``: a full disk as the writer sees it."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes)),
    )
