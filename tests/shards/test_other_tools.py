"""Other tools open the shards: Hugging Face ``datasets`` reads them, and the index is the one that DALI's own tool would make."""

import io
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from galaxydist.galaxy import Galaxy
from galaxydist.shards.manifest import Manifest
from galaxydist.shards.writer.writer import write_shards
from tests.helpers.shard_surveys import MemorySurvey, draw_galaxies

GALAXIES = {galaxy.id: galaxy for galaxy in draw_galaxies(60, redshift=0.05)}


@pytest.fixture(scope="module", params=["jpeg", "png", "raw"])
def manifest(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("tools") / "shards"
    return write_shards(MemorySurvey(tuple(GALAXIES.values())), folder, encoding=request.param, shard_size=8)


def assert_shows(pixels: np.ndarray, galaxy: Galaxy, encoding: str) -> None:
    assert isinstance(galaxy.image, np.ndarray) and pixels.shape == galaxy.image.shape and pixels.dtype == np.uint8
    difference = np.abs(pixels.astype(int) - galaxy.image)
    assert difference.mean() < 2.5 if encoding == "jpeg" else difference.max() == 0


@pytest.mark.parametrize("streaming", [True, False])
def test_datasets_reads_every_galaxy_once(
    manifest: Manifest, streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = datasets.load_dataset(
        "webdataset",
        data_files={"train": str(manifest.dir / "train-*.tar")},
        split="train",
        streaming=streaming,
        cache_dir=str(tmp_path / "cache"),
    )
    keys = []
    for row in rows:
        keys.append(row["__key__"])
        galaxy = GALAXIES[row["__key__"]]
        # .npy arrives as nested lists; datasets makes numpy arrays of them with with_format("numpy").
        assert_shows(np.asarray(row[manifest.extension], np.uint8), galaxy, manifest.encoding)
        assert (row["cls"], row["json"]["id"], row["json"]["ra"]) == (galaxy.label, galaxy.id, galaxy.ra)
        assert row["json"]["redshift"] == 0.05
    assert len(keys) == len({*keys}) == manifest.splits["train"].num_samples


def read_dali_index(path: Path) -> list[list[tuple[str, int, int, str]]]:
    """Read an index as DALI does.

    Written from its documentation (fn.readers.webdataset, "The format of the index file") and from its reader of version 1.2:
    first the version and the number of samples; then a line a sample, with the extension, offset and size of each component,
    and, since 1.2, its file's name. Fields are separated by white space.
    """
    head, *lines = path.read_text("ascii").splitlines()
    version, count = re.fullmatch(r"(v\d+\.\d+) (\d+)", head).groups()  # type: ignore[union-attr]
    assert version == "v1.2" and int(count) == len(lines)
    samples = []
    for line in lines:
        fields = iter(line.split())
        samples.append([(extension, int(next(fields)), int(next(fields)), next(fields)) for extension in fields])
    return samples


def test_dali_index_locates_every_component_of_every_sample(manifest: Manifest) -> None:
    for split, totals in manifest.splits.items():
        labels, row = manifest.labels(split), 0
        for number in range(totals.num_shards):
            path = manifest.shard_path(split, number)
            tar = path.read_bytes()
            for sample in read_dali_index(path.with_suffix(".idx")):
                contents = {}
                for extension, offset, size, name in sample:
                    assert offset % 512 == 0, "DALI refuses other offsets"
                    key, _, rest = name.partition(".")
                    assert rest == extension, "an extension is all after the first dot"
                    contents[extension] = tar[offset : offset + size]
                    assert tar[offset - 512 : offset].startswith(name.encode() + b"\0"), "its header stands right before"
                assert contents.keys() == {manifest.extension, "cls", "json"}
                assert int(contents["cls"]) == labels[row] == GALAXIES[key].label
                image = io.BytesIO(contents[manifest.extension])
                pixels = np.load(image) if manifest.encoding == "raw" else np.asarray(Image.open(image))
                assert_shows(pixels, GALAXIES[key], manifest.encoding)
                row += 1
        assert row == totals.num_samples


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar here")
def test_dali_index_equals_the_block_list_of_gnu_tar(manifest: Manifest) -> None:
    """DALI's tool makes an index of ``tar --list --block-number``: blocks of 512 bytes, the header one before the content."""
    path = manifest.shard_path("train", 1)
    listed = subprocess.run(
        ["tar", "--list", "--block-number", "--file", path], capture_output=True, text=True, check=True
    ).stdout
    if "block 0: " not in listed:
        pytest.skip("not GNU's tar")
    found = [(int(block) * 512 + 512, name) for block, name in re.findall(r"^block (\d+): (\S+)$", listed, re.MULTILINE)]
    ends = [(offset, name) for offset, name in found if not name.startswith("**")]
    assert ends == [(offset, name) for sample in read_dali_index(path.with_suffix(".idx")) for _, offset, _, name in sample]
