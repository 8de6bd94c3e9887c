"""Many pictures at once: tables of files and archives, hostile archives, and CSV that no spreadsheet computes."""

import csv
import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from galaxydist.serving.app.batch_table import BatchLimits, BatchRow, BatchTable, label_many
from galaxydist.serving.app.model import Answer, ServedModel
from galaxydist.serving.app.pictures import PictureError, read_picture
from galaxydist.serving.app.reference_set import Reference
from tests.helpers.memory import peak_memory
from tests.helpers.published import PublishedRun, galaxy_files


@pytest.fixture(scope="module")
def model(published_run: PublishedRun) -> ServedModel:
    return ServedModel.open(published_run.folder)


@pytest.fixture(scope="module")
def galaxies(published_run: PublishedRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    files = galaxy_files(published_run, tmp_path_factory.mktemp("batch_files"))
    return {file.name: file.read_bytes() for file in files}


def archive(entries: dict[str, bytes], kind: int = zipfile.ZIP_DEFLATED) -> io.BytesIO:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", kind) as target:
        for name, data in entries.items():
            target.writestr(name, data)
    stream.seek(0)
    return stream


def known_unlike(reference: Reference | None, answer: Answer) -> bool | None:
    novelty = None if reference is None else reference.novelty(answer.seen)
    return None if novelty is None else novelty.is_unlike


def test_files_and_an_archive_of_them_get_the_answers_of_single_pictures(model: ServedModel, galaxies: dict[str, bytes]) -> None:
    done: list[tuple[int, int | None]] = []
    reference = Reference.open(model.folder)
    files = [(name, io.BytesIO(data)) for name, data in galaxies.items()]
    table = label_many(model, files, progress=lambda count, total: done.append((count, total)))
    packed = label_many(model, [("all.zip", archive(galaxies))], reference=reference)
    single = [model.predict([read_picture(data)], saliency=False)[0] for data in galaxies.values()]
    for row, other, answer in zip(table.rows, packed.rows, single, strict=True):
        assert (row.predicted, row.problem, row.is_unlike) == (answer.class_name, "", None)
        assert other.is_unlike is known_unlike(reference, answer)
        assert row.confidence == pytest.approx(answer.confidence, abs=1e-6) == other.confidence
        assert row.probabilities == pytest.approx(answer.probabilities, abs=1e-6)
        assert row.agreement == answer.agreement == other.agreement
    assert [row.name for row in table.rows] == [row.name for row in packed.rows] == list(galaxies)
    assert done[-1] == (len(galaxies), len(galaxies)) and done == sorted(done)
    read = list(csv.DictReader(io.StringIO(packed.to_csv())))
    classes = [f"p_{name}" for name in model.config.classes]
    assert list(read[0]) == ["name", "predicted", "confidence", *classes, "agreement", "unlike", "problem"]
    assert sum(float(read[0][name]) for name in classes) == pytest.approx(1, abs=1e-5)
    assert [row["unlike"] for row in read] == [{True: "yes", False: "no", None: ""}[row.is_unlike] for row in packed.rows]


def test_an_archive_of_everything_has_a_row_for_each_picture_and_each_thing_that_is_none(
    model: ServedModel, galaxies: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    galaxy = next(iter(galaxies.values()))
    stream = archive(
        {
            "night/a.png": galaxy,
            "night/": b"",
            "__MACOSX/night/._a.png": b"x",
            "night/.DS_Store": b"x",
            "../../up.png": galaxy,
            "/etc/root.png": galaxy,
            "=cmd.png": galaxy,
            "notes.txt": b"seeing 1.2 arcsec",
            "inner.zip": archive({"b.png": galaxy}).getvalue(),
            "empty.png": b"",
            "zeros.bmp": bytes(3 << 20),
            "large.png": bytes(21 << 20),
        }
    )
    table = label_many(model, [("all.zip", stream), ("b.png", io.BytesIO(galaxy)), ("c.txt", io.BytesIO(b"c"))])
    found = {row.name: row.problem for row in table.rows}
    answered = {name for name, problem in found.items() if not problem}
    assert answered == {"night/a.png", "../../up.png", "/etc/root.png", "=cmd.png", "b.png"}
    expected = {
        "notes.txt": "not a picture",
        "inner.zip": "archive inside",
        "empty.png": "is empty",
        "zeros.bmp": "far more bytes",
        "large.png": "21 MB",
        "c.txt": "not a picture",
    }
    assert set(found) == answered | set(expected)
    assert all(text in found[name] for name, text in expected.items())
    assert not [*tmp_path.iterdir()], "nothing is unpacked to a disk"
    names = [row["name"] for row in csv.DictReader(io.StringIO(table.to_csv()))]
    assert "'=cmd.png" in names and "=cmd.png" not in names


def changed(stream: io.BytesIO, offset_local: int, offset_central: int, value: bytes) -> io.BytesIO:
    """The archive of one entry with a field changed in both of its headers."""
    data = bytearray(stream.getvalue())
    central = data.index(b"PK\x01\x02")
    data[offset_local : offset_local + len(value)] = value
    data[central + offset_central : central + offset_central + len(value)] = value
    return io.BytesIO(bytes(data))


def test_entries_that_could_harm_are_left_out_with_their_reason(model: ServedModel, galaxies: dict[str, bytes]) -> None:
    galaxy = next(iter(galaxies.values()))
    one = archive({"a.png": galaxy}, zipfile.ZIP_STORED)
    place = one.getvalue().index(galaxy) + len(galaxy) // 2
    wrong = bytearray(one.getvalue())
    wrong[place] ^= 255
    hostile = {
        "protected by a password": changed(one, 6, 8, struct.pack("<H", 1)),
        "uncommon way": archive({"a.png": galaxy}, zipfile.ZIP_LZMA),
        "damaged in its archive": io.BytesIO(bytes(wrong)),
        "far more bytes": archive({"a.png": bytes(19 << 20)}),
    }
    for reason, stream in hostile.items():
        with peak_memory() as peak:
            table = label_many(model, [("x.zip", stream)])
        assert [row.predicted for row in table.rows] == [""] and reason in table.rows[0].problem
        assert peak() < 8 << 20


def test_archives_outside_of_the_limits_are_refused_or_cut_before_they_cost_anything(
    model: ServedModel, galaxies: dict[str, bytes]
) -> None:
    galaxy = next(iter(galaxies.values()))
    many = archive({f"{number:05d}.png": b"" for number in range(6000)})
    long_directory = bytearray(archive({"a.png": galaxy}).getvalue())
    struct.pack_into("<I", long_directory, long_directory.rindex(b"PK\x05\x06") + 12, 1 << 30)
    for stream in (many, io.BytesIO(bytes(long_directory))):
        with pytest.raises(PictureError, match="split the archive"):
            label_many(model, [("x.zip", stream)])
    with pytest.raises(PictureError, match="damaged or incomplete zip"):
        label_many(model, [("x.zip", io.BytesIO(archive({"a.png": galaxy}).getvalue()[:-30]))])
    for nothing in ([], [("x.zip", archive({}))], [("x.zip", archive({"__MACOSX/._a": b"x"}))]):
        with pytest.raises(PictureError, match="no picture in it"):
            label_many(model, nothing)
    cut = label_many(
        model, [("x.zip", archive({f"{number}.png": galaxy for number in range(9)}))], limits=BatchLimits(pictures=4)
    )
    assert len(cut.rows) == 4 and cut.notes[0].startswith("5 further files were left out")
    cut = label_many(model, [("x.zip", archive({"a.png": galaxy, "b.png": galaxy}))], limits=BatchLimits(total_bytes=10))
    assert len(cut.rows) == 1 and len(cut.notes) == 1
    # Damaged entries count with the bytes that they announce: each is unpacked before the damage is found.
    broken = bytearray(archive({"a.png": galaxy, "b.png": galaxy}, zipfile.ZIP_STORED).getvalue())
    broken[broken.index(galaxy) + len(galaxy) // 2] ^= 255
    cut = label_many(model, [("x.zip", io.BytesIO(bytes(broken)))], limits=BatchLimits(total_bytes=10))
    assert len(cut.rows) == 1 and "damaged in its archive" in cut.rows[0].problem and len(cut.notes) == 1

    class Stop(Exception):
        pass

    def stop(_done: int, _total: int | None) -> None:
        raise Stop

    with pytest.raises(Stop):
        label_many(model, [(name, io.BytesIO(data)) for name, data in galaxies.items()], progress=stop)


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t=", "\r="])
def test_no_text_of_the_csv_begins_a_formula(start: str) -> None:
    table = BatchTable((f"{start}A1", "b"), [BatchRow(f"{start}HYPERLINK(1)", f"{start}A1", 0.5, np.ones(2, np.float32))])
    cells = [cell for row in csv.reader(io.StringIO(table.to_csv(), newline="")) for cell in row]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]


def test_pictures_of_any_size_may_be_in_one_batch(model: ServedModel) -> None:
    streams = []
    for number, size in enumerate([(20, 30), (200, 90), (32, 32)]):
        stream = io.BytesIO()
        Image.new("RGB", size, "navy").save(stream, "PNG")
        stream.seek(0)
        streams.append((f"{number}.png", stream))
    assert all(row.predicted for row in label_many(model, streams).rows)
