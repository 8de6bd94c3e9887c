"""Tars as other programs write them, for tests: real galaxies with names, labels and headers of Galaxy Zoo Evo's tars."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def write_tar(path: Path, files: Iterable[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    """Write a tar; with pax headers, since the time of change has a fraction."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5
            tar.addfile(info, io.BytesIO(data))
    return path


def drawn_image(number: int, size: int = 24, form: str = "png") -> bytes:
    """A small image, another for each number."""
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 255, (size, size, 3), np.uint8)).save(stream, form)
    return stream.getvalue()


def drawn_tars(folder: Path, count: int = 60, per_tar: int = 20, form: str = "png") -> list[Path]:
    """Small drawn images of three classes in tars `part-000.tar`, with `.cls`."""
    rows = [
        [(f"{row:04d}.{form}", drawn_image(row, form=form.replace("jpg", "jpeg"))), (f"{row:04d}.cls", b"%d" % (row % 3))]
        for row in range(count)
    ]
    return [
        write_tar(folder / f"part-{number:03d}.tar", [file for row in rows[start : start + per_tar] for file in row])
        for number, start in enumerate(range(0, count, per_tar))
    ]


def evo_tars(sample: Path, folder: Path, per_class: int = 6, num_tars: int = 3) -> list[dict[str, Any]]:
    """Write real galaxies as tars like those of Galaxy Zoo Evo: `./ID.image.jpg`, `./ID.labels.json`, `./ID.metadata.json`.

    Sizes are mixed, and every seventh image is a PNG. The labels are in the JSON. Returns the rows in the order of the tars.
    """
    rows: list[dict[str, Any]] = []
    for number in range(num_tars):
        files: list[tuple[str, bytes]] = []
        for label in range(10):
            paths = sorted((sample / str(label)).iterdir(), key=lambda path: int(path.stem))[:per_class]
            for of_class, path in list(enumerate(paths))[number::num_tars]:
                place = len(rows)
                with Image.open(path) as image:
                    resized = image.resize((120 + place % 3 * 20, 120 + place % 2 * 30))
                stream, form = io.BytesIO(), "png" if place % 7 == 0 else "jpeg"
                resized.save(stream, form)
                split = ("train", "train", "val", "test", "train")[of_class % 5]
                votes = {"gz10_class": label, "smooth-or-featured_smooth": place % 30, "bars": [place, 1]}
                meta = {"split": split, "redshift": 0.01 * place, "survey": "decals"}
                files += [
                    (f"./{path.stem}.image.{'png' if form == 'png' else 'jpg'}", stream.getvalue()),
                    (f"./{path.stem}.labels.json", json.dumps(votes).encode()),
                    (f"./{path.stem}.metadata.json", json.dumps(meta).encode()),
                ]
                rows.append({"id": path.stem, "label": label, "split": split})
        write_tar(folder / f"evo_{number:03d}.tar", files)
    return rows
