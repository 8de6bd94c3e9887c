"""Tars that other programs wrote: names, headers and patterns, and what is refused."""

import gzip
import io
import tarfile
import threading
from pathlib import Path

import pytest

from galaxydist.errors import UserError
from galaxydist.surveys.tables.tar_scan import FILE, KEY, LENGTH, OFFSET, ScanOptions, find_tars, scan_tar
from tests.helpers.foreign_tars import drawn_image, drawn_tars, write_tar

IMAGE = drawn_image(0)


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("is_hashed", [True, False])
def test_offsets_are_right_under_long_names_folders_and_extended_headers(tmp_path: Path, form: int, is_hashed: bool) -> None:
    folder = "./train.v1/" + "a" * 90 + "/" + "b" * 60
    names = [f"{folder}/{number:04d}.Image.PNG" for number in range(3)]
    images = [drawn_image(number) for number in range(3)]
    files = [
        pair for name, image in zip(names, images, strict=True) for pair in ((name, image), (f"{name[:-9]}cls", b"spiral\n"))
    ]
    extra = [("__info__.json", b"{}"), ("._hidden.png", b"no image"), ("train.v1/readme", b"text")]
    path = write_tar(tmp_path / "t.tar", [*extra, *files], form)
    found = scan_tar(str(path), ScanOptions(is_hashed=is_hashed), threading.Event())
    data = path.read_bytes()
    rows = found.samples.to_pylist()
    assert [row[KEY] for row in rows] == [f"{folder[2:]}/{number:04d}" for number in range(3)]
    assert [data[row[OFFSET] : row[OFFSET] + row[LENGTH]] for row in rows] == images
    assert [row["cls"] for row in rows] == [b"spiral\n"] * 3 and rows[0][FILE] == names[0]
    assert (found.num_bytes, len(found.sha256)) == (len(data), 64 if is_hashed else 0)


def test_names_in_another_encoding_than_utf8_are_read(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as archive:
        for name, data in (("é/1.png", IMAGE), ("é/1.cls", b"a")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    (row,) = scan_tar(str(tmp_path / "t.tar"), ScanOptions(), threading.Event()).samples.to_pylist()
    assert (row[KEY], row[FILE], row["cls"]) == ("\\xe9/1", "\\xe9/1.png", b"a")


def test_an_image_of_several_is_chosen_by_its_extension(tmp_path: Path) -> None:
    files = [("a.jpg", IMAGE), ("a.seg.png", drawn_image(1)), ("b.seg.png", IMAGE), ("b.jpg", IMAGE), ("c.seg.png", IMAGE)]
    path = str(write_tar(tmp_path / "t.tar", files))
    with pytest.raises(UserError, match=r"t.tar: the sample a has 2 images, jpg and seg.png: choose one with --image-column jpg"):
        scan_tar(path, ScanOptions(), threading.Event())
    rows = scan_tar(path, ScanOptions(".JPG"), threading.Event()).samples.to_pylist()
    assert [(row[KEY], row[FILE]) for row in rows] == [("a", "a.jpg"), ("b", "b.jpg"), ("c", "")]
    with pytest.raises(
        UserError, match=r"t.tar has no image .webp: its files end with .jpg, .seg.png; choose one with --image-col"
    ):
        scan_tar(path, ScanOptions("webp"), threading.Event())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([("a.png", IMAGE), ("b.png", IMAGE), ("a.cls", b"1")], "the key a occurs twice, in two places"),
        ([("a.png", IMAGE), ("a.cls", b"1"), ("a.png", IMAGE)], r"the key a occurs twice, with two files \.png"),
        ([("a.npy", b"1"), ("a.cls", b"1")], r"has no images: its files end with \.npy, \.cls"),
        ([], "has no images: it has no samples"),
    ],
)
def test_samples_that_are_none_are_refused(tmp_path: Path, files: list[tuple[str, bytes]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        scan_tar(str(write_tar(tmp_path / "t.tar", files)), ScanOptions(), threading.Event())


@pytest.mark.parametrize("is_hashed", [True, False])
def test_every_truncation_and_a_damaged_header_are_noticed(tmp_path: Path, is_hashed: bool) -> None:
    path = write_tar(tmp_path / "t.tar", [(f"{number}.png", drawn_image(number, 4)) for number in range(4)], tarfile.USTAR_FORMAT)
    data = path.read_bytes()
    ends = data.rstrip(b"\0")
    for length in (*range(512, len(ends) - len(ends) % 512 + 512, 512), len(ends) - 3):
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match=r"t.tar is truncated or damaged at byte \d+: copy it again"):
            scan_tar(str(path), ScanOptions(is_hashed=is_hashed), threading.Event())
    path.write_bytes(data[:1024] + b"x" * 512 + data[1536:])
    with pytest.raises(UserError, match=r"t.tar is truncated or damaged at byte 1024"):
        scan_tar(str(path), ScanOptions(is_hashed=is_hashed), threading.Event())
    path.write_bytes(data + data)
    with pytest.raises(UserError, match="goes on after the end of the tar"):
        scan_tar(str(path), ScanOptions(is_hashed=is_hashed), threading.Event())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzip.compress(tarfile.TarInfo("a").tobuf()), "x is a gzip-compressed tar, by its content, .*unpack it first: `gunzip"),
        (b"\x28\xb5\x2f\xfd" + b"x" * 2000, "x is a zstd file, by its content, not a tar of images: unpack it first"),
        (b"PAR1" + b"x" * 2000, "x is a Parquet file, by its content, not a tar of images"),
        (b"id,label\n1,a\n" * 99, "x is a CSV file, by its content, not a tar of images"),
        (b"", "x is empty"),
    ],
    ids=("gzip", "zstd", "parquet", "csv", "empty"),
)
def test_files_that_are_no_tars_are_called_what_they_are(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(UserError, match=message):
        scan_tar(str(tmp_path / "x"), ScanOptions(), threading.Event())


def test_patterns_have_braces_wildcards_and_folders(tmp_path: Path) -> None:
    paths = [str(path) for path in drawn_tars(tmp_path, 4, 1)]
    (tmp_path / "sizes.json").write_text("{}")

    def found(pattern: str) -> list[str]:
        return [location.path for location in find_tars({None: pattern})]

    assert found(f"{tmp_path}/part-{{000..003}}.tar") == paths
    assert found(f"{tmp_path}/part-{{003,001}}.tar") == [paths[3], paths[1]]
    assert found(f"{tmp_path}/part-*.tar") == found(f"{tmp_path}/**/*.tar") == found(str(tmp_path)) == paths
    splits = find_tars({"train": f"{tmp_path}/part-{{000..002}}.tar", "test": paths[3]})
    assert [(location.path, location.split) for location in splits] == [
        *((path, "train") for path in paths[:3]),
        (paths[3], "test"),
    ]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({None: "{tmp}/part-*.tr"}, "no tar matches .*part-.*tr: give a folder, or a pattern"),
        ({None: "{tmp}/part-{{000..009}}.tar"}, "there is no tar .*part-001.tar"),
        ({None: "{tmp}/part-{{000..000.tar"}, "its braces do not match"),
        ({None: "{tmp}/packed"}, "a.tar.gz is a gzip-compressed tar, by its content"),
        ({"train": "{tmp}/part-*.tar", "val": "{tmp}/part-000.tar"}, "part-000.tar is in two splits, train and val"),
        ({None: "https://host/part-*.tar"}, "a web server does not list its files; name them with braces"),
        ({None: "https://host/part-0.tar?token=secret"}, r"a URL of tars has no query"),
        ({"train": "{tmp}/part-000.tar", "val": "https://host/val.tar"}, "some tars are on this machine and some are remote"),
    ],
)
def test_patterns_that_name_no_tars_are_refused(tmp_path: Path, patterns: dict[str | None, str], message: str) -> None:
    drawn_tars(tmp_path, 1, 1)
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "a.tar.gz").write_bytes(gzip.compress(tarfile.TarInfo("a").tobuf()))
    with pytest.raises(UserError, match=message):
        find_tars({split: pattern.format(tmp=tmp_path) for split, pattern in patterns.items()})
