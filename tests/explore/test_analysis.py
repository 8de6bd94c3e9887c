"""Exploring a data set: what is found in it, from which sources, and what the page says when something is wrong."""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from astropy.table import Table
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image

from galaxydist.cli.main import main
from galaxydist.explore.analysis import Findings, analyse, label_conflicts, split_leaks, summary
from galaxydist.explore.checks import find_duplicates, find_neighbours, near_hashes, odd_kinds, perceptual_hash
from galaxydist.explore.datasets import ExploredDataset, ExploredImage, Positions, choose_sample, open_population
from galaxydist.explore.page import draw_sky, render_page
from galaxydist.explore.scan import THUMBNAIL, _fit, scan_images
from galaxydist.shards.manifest import read_manifest
from galaxydist.shards.remote.cache import CacheConfig
from galaxydist.shards.writer.writer import write_shards
from galaxydist.surveys.survey_sources import open_survey
from tests.helpers.blobs import BlobSurvey
from tests.helpers.foreign_tars import drawn_tars
from tests.helpers.survey_files import write_image, write_survey

PROVENANCE = {"command": "galaxydist data explore", "version": "1", "versions": "numpy 2"}


class Sky:
    """A source of drawn galaxies, which remembers what was read."""

    def __init__(self, images: NDArray[np.uint8], positions: Positions | None = None) -> None:
        self.pixels, self._positions, self.read = images, positions, list[int]()

    def images(self, rows: NDArray[np.int64]) -> Iterator[ExploredImage]:
        for row in rows.tolist():
            self.read.append(row)
            yield ExploredImage(row, f"g{row}", self.pixels[row % len(self.pixels)])

    def positions(self) -> Positions | None:
        return self._positions

    def candidates(self, number: int, seed: int) -> None:
        del number, seed


def drawn(num: int, seed: int = 0, size: int = 64) -> NDArray[np.uint8]:
    """Galaxies of all kinds of positions, widths, angles and colours on a noisy sky."""
    dice = np.random.default_rng(seed)
    y_HW, x_HW = np.mgrid[:size, :size] - size / 2
    images = []
    for _ in range(num):
        image_HWC = dice.normal(30, 3, (size, size, 3))
        for centre, top in ((dice.normal(0, 1, 2), 200), *((dice.uniform(-size / 2, size / 2, 2), 120) for _ in range(6))):
            angle, wide, thin = dice.uniform(0, np.pi), dice.uniform(2, 8), dice.uniform(1, 3)
            along = np.cos(angle) * (x_HW - centre[0]) + np.sin(angle) * (y_HW - centre[1])
            across = np.cos(angle) * (y_HW - centre[1]) - np.sin(angle) * (x_HW - centre[0])
            image_HWC += top * np.exp(-np.hypot(along / wide, across / thin))[..., None] * dice.uniform(0.4, 1, 3)
        images.append(np.clip(image_HWC, 0, 255).astype(np.uint8))
    return np.stack(images)


def population(labels: NDArray[np.int64], source: Sky, splits: int = 1) -> ExploredDataset:
    names = ("train", "test")[:splits]
    split_N = (np.arange(len(labels)) % splits).astype(np.int8)
    classes = ("round_smooth", "merging", "barred_spiral")
    return ExploredDataset("drawn", "original", "test", "nowhere", "", classes, labels, names, split_N, source)


def explored(tmp_path: Path, location: str | Path, **options: int) -> Findings:
    opened = open_population(str(location), None, CacheConfig(tmp_path / "cache"))
    return analyse(opened, sample=options.get("sample", 1000), seed=0)


@pytest.fixture(scope="module")
def survey_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("survey") / "survey.h5"
    write_survey(path)
    return path


@pytest.fixture(scope="module")
def shards_path(tmp_path_factory: pytest.TempPathFactory, survey_path: Path) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "shards"
    return write_shards(open_survey(survey_path), folder, encoding="png", image_size=64, shard_size=16, workers=1).path


def test_an_extension_of_a_fits_file_and_a_pattern_of_tars_are_explored(tmp_path: Path) -> None:
    drawn_tars(tmp_path / "tars", 20, 10)
    for number in range(12):
        write_image(tmp_path / f"{number}.png", number)
    Table({"file": [f"{n}.png" for n in range(12)], "label": np.arange(12) % 2}).write(tmp_path / "t.fits")
    for location, count in ((f"{tmp_path}/t.fits[1]", 12), (f"{tmp_path}/tars/part-{{000..001}}.tar", 20)):
        assert len(open_population(location, None, CacheConfig(tmp_path / "cache"))) == count


def test_explore_of_a_survey_and_its_shards_gives_the_same_findings(tmp_path: Path, survey_path: Path, shards_path: Path) -> None:
    one, two = explored(tmp_path, survey_path), explored(tmp_path, shards_path.parent)
    assert one.population.counts() == two.population.counts()
    assert sorted(one.scan.ids) == sorted(two.scan.ids) and len(one.scan) == 120
    assert one.neighbours is not None and two.neighbours is not None
    assert len(one.neighbours.pairs_P2) == len(two.neighbours.pairs_P2) == 2
    assert one.neighbours.two_labels_P.tolist() == two.neighbours.two_labels_P.tolist() == [True, False]
    assert np.nansum(one.positions.redshift) == pytest.approx(np.nansum(two.positions.redshift))
    for label in range(10):
        assert one.scan.means[label].mean() == pytest.approx(two.scan.means[label].mean(), abs=1)
    assert two.population.source_hash == read_manifest(shards_path).hash


def test_explore_of_a_url_equals_the_folder_and_reads_few_shards(tmp_path: Path, shards_path: Path) -> None:
    spaced = tmp_path / "a space"
    spaced.symlink_to(shards_path.parent)
    url = (spaced / shards_path.name).as_uri()
    assert "%20" in url
    here, there = explored(tmp_path, shards_path), explored(tmp_path, url)
    assert here.scan.ids == there.scan.ids and here.population.counts() == there.population.counts()
    few = explored(tmp_path, url, sample=10)
    assert len(few.scan) == 10 and few.population.counts() == here.population.counts()
    shards = {(int(split), row // 16) for split, row in zip(few.population.split_N[few.scan.rows], few.scan.rows, strict=True)}
    assert len(shards) <= 4
    assert not list((tmp_path / "cache").rglob("*.tar"))


@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(1, 120), st.integers(0, 3))
def test_choose_sample_takes_equally_from_every_class(sizes: list[int], number: int, seed: int) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.int64)
    drawn_from = ExploredDataset(
        "d", "v", "k", "l", "", tuple("abcde"[: len(sizes)]), labels, ("train",), labels.astype(np.int8), Sky(drawn(1))
    )
    rows = choose_sample(drawn_from, number, seed)
    assert len(rows) == min(number, len(labels)) and (np.diff(rows) > 0).all()
    taken = np.bincount(labels[rows], minlength=len(sizes))
    missing = [count for count, size in zip(taken.tolist(), sizes, strict=True) if count < size]
    assert not missing or max(taken) - min(missing) <= 1
    larger = choose_sample(drawn_from, number + 7, seed)
    assert set(rows.tolist()) <= set(larger.tolist())


def test_explore_reads_only_the_sample_but_counts_all_galaxies() -> None:
    labels = np.arange(100_000) % 3
    source = Sky(drawn(30))
    findings = analyse(population(labels, source), sample=60, seed=1)
    assert len(source.read) == 60 and len(findings.scan) == 60
    assert findings.population.counts() == {"train": [33334, 33333, 33333]}
    page = render_page(findings, {}, PROVENANCE)
    assert "60 of 100,000" in page and "A duplicate whose other half is not in the sample" in page


@given(
    hnp.arrays(np.uint8, st.tuples(st.integers(0, 25), st.just(8)), elements=st.sampled_from([0, 1, 3, 255])), st.integers(0, 20)
)
def test_near_hashes_equals_a_loop_over_all_pairs(hash_nB: NDArray[np.uint8], distance: int) -> None:
    apart = [
        (i, j, int(np.unpackbits(hash_nB[i] ^ hash_nB[j]).sum())) for i in range(len(hash_nB)) for j in range(i + 1, len(hash_nB))
    ]
    pairs, distances = near_hashes(hash_nB, distance)
    assert [(*pair, d) for pair, d in zip(pairs.tolist(), distances.tolist(), strict=True)] == [
        p for p in apart if p[2] <= distance
    ]


def test_duplicates_are_found_as_identical_or_recompressed_and_blank_images_reported() -> None:
    images = drawn(40)
    buffer = io.BytesIO()
    Image.fromarray(images[3]).save(buffer, "JPEG", quality=60)
    images = np.concatenate([images, images[:1], np.asarray(Image.open(buffer))[None], np.full((2, 64, 64, 3), 9, np.uint8)])
    labels = np.arange(44) % 3
    found = analyse(population(labels, Sky(images), splits=2), sample=100, seed=0)
    pairs = {(pair.first, pair.second): pair.identical for pair in found.duplicates}
    assert pairs == {(0, 40): True, (3, 41): False}  # blank ones show nothing
    # Labels go by thirds, splits by halves: 0 and 40 share a split, 3 and 41 too; no pair shares a label.
    assert (label_conflicts(found), split_leaks(found)) == (2, 0)
    assert found.scan.odd_images["blank"] == [42, 43]


@pytest.mark.parametrize(("survey", "most"), [("galaxy10_decals_sample/[23]", 120), ("gz2_votes_sample/images", 400)])
def test_real_galaxies_have_no_duplicates_but_their_copies(real_data: Path, survey: str, most: int) -> None:
    """Round ones of DECaLS, and SDSS, whose smooth galaxies have light that correlates up to 0.97."""
    files = sorted(real_data.glob(f"{survey}/*.jpg"))
    images = [np.asarray(Image.open(file).convert("RGB")) for file in files[:most]]
    buffer = io.BytesIO()
    Image.fromarray(images[5]).save(buffer, "JPEG", quality=50)
    half = Image.fromarray(images[9]).resize((128, 128), Image.Resampling.LANCZOS)
    images += [np.asarray(Image.open(buffer)), np.asarray(half)]
    hashes = np.stack([perceptual_hash(image) for image in images])
    small = np.stack([_fit(image, THUMBNAIL) for image in images])
    assert len(near_hashes(hashes, 12)[0]) > 2  # the hash alone would be wrong
    found = find_duplicates(hashes, [image.tobytes() for image in images], small, distance=12)
    assert {(pair.first, pair.second) for pair in found} == {(5, most), (9, most + 1)}


def test_every_kind_of_odd_image_is_recognised() -> None:
    sound = drawn(1)[0]
    assert odd_kinds(sound) == []
    flat, repeated, channel, white = (sound.copy() for _ in range(4))
    flat[50:] = 128
    repeated[41:50] = repeated[40]
    channel[..., 1] = 7
    white[:20] = np.where(np.arange(64)[:, None] % 2, 255, white[:20])
    assert odd_kinds(flat) == ["flat rows"]
    assert odd_kinds(np.ascontiguousarray(flat.transpose(1, 0, 2))) == ["flat rows"]
    assert odd_kinds(repeated) == ["repeated rows"]
    assert odd_kinds(channel) == ["missing channel"]
    assert odd_kinds(white) == ["saturated"]
    assert odd_kinds(np.full((64, 64, 3), 255, np.uint8)) == ["blank"]


def test_find_neighbours_counts_pairs_with_two_labels_and_across_splits() -> None:
    ra, dec = np.array([10, 10.01, 200, 200, 300]), np.array([0.0, 0, 89, 89, -5])
    positions = Positions(ra, dec, np.full(5, np.nan))
    near = find_neighbours(population(np.array([0, 0, 1, 2, 1]), Sky(drawn(1)), splits=2), positions)
    assert near.pairs_P2.tolist() == [[2, 3], [0, 1]] and near.num_galaxies == 4
    assert near.separation_P == pytest.approx([0, 36])
    assert near.two_labels_P.tolist() == [True, False] and near.across_P.tolist() == [True, True]


@pytest.mark.parametrize("ra", [[359.8, 0.1, 0.3], [-0.2, 0.1, 0.3], [179.8, 179.9, -179.9]])
def test_field_across_the_end_of_right_ascensions_is_drawn_in_one_piece(ra: list[float]) -> None:
    figure, _ = draw_sky(Positions(np.array(ra), np.zeros(3), np.full(3, np.nan)))
    assert figure.axes[0].name == "rectilinear" and abs(np.subtract(*figure.axes[0].get_xlim())) < 1


def test_official_positions_have_236_close_pairs_of_which_59_have_two_labels(real_data: Path) -> None:
    table = np.genfromtxt(real_data / "galaxy10_decals_positions.csv", delimiter=",", names=True)
    labels = table["label"].astype(np.int64)
    whole = ExploredDataset(
        "g", "o", "k", "l", "", tuple("abcdefghij"), labels, ("train",), np.zeros(len(labels), np.int8), Sky(drawn(1))
    )
    near = find_neighbours(whole, Positions(table["ra"], table["dec"], np.full(len(labels), np.nan)))
    assert (len(near.pairs_P2), int(near.two_labels_P.sum())) == (236, 59)


def test_explore_of_shards_names_unreadable_images_and_continues(
    tmp_path: Path, survey_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = write_shards(open_survey(survey_path), tmp_path / "s", encoding="png", image_size=64, shard_size=16, workers=1)
    first, second, third = sorted(shards.dir.glob("train-*.tar"))[:3]
    data = bytearray(first.read_bytes())
    at = data.index(b"IDAT") + 8
    data[at : at + 16] = bytes(16)
    first.write_bytes(data)
    second.unlink()
    third.unlink()
    page = tmp_path / "page.html"
    assert main(["data", "explore", str(shards.dir), "-o", str(page), "--data-dir", str(tmp_path / "root")]) == 0
    text, printed = page.read_text(), capsys.readouterr().out
    assert "unreadable: 33 of 120" in printed and "87 of 120 looked at" in printed
    assert f"shard {first}, galaxy sim-" in text and f"shard {second} cannot be read" in text
    assert not (tmp_path / "root" / "explore").exists()


def test_explore_of_a_folder_names_damaged_images(tmp_path: Path) -> None:
    for number, image in enumerate(drawn(24)):
        path = tmp_path / "images" / ("left", "right")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (tmp_path / "images" / "left" / "0.png").write_bytes(b"not an image")
    cut = tmp_path / "images" / "left" / "2.png"
    cut.write_bytes(cut.read_bytes()[:2000])
    found = explored(tmp_path, tmp_path / "images")
    assert set(found.scan.problems) == {"left/0.png", "2"} and len(found.scan) == 22
    page = render_page(found, {}, PROVENANCE)
    assert "cannot be decoded" in page and "has no positions on the sky" in page
    json.dumps(summary(found), allow_nan=False)
    none = scan_images([ExploredImage(0, "damaged", None, "it does not decode")], np.zeros(1, np.int64), 1)
    assert not find_duplicates(none.hash_nB, none.digests, none.thumbnails_nHWC)


def test_explore_page_supports_images_without_labels_or_positions(tmp_path: Path, blobs: Path) -> None:
    found = explored(tmp_path, blobs)
    assert len(found.scan) == sum(split.num_samples for split in read_manifest(blobs).splits.values())
    assert tuple(found.population.class_names) == BlobSurvey().class_names
    few = analyse(population(np.full(6, -1), Sky(drawn(6))), sample=10, seed=0)
    page = render_page(few, {}, PROVENANCE)
    assert few.map is None and "unlabelled" in page and "it needs ten" in page


def test_table_of_galaxies_without_labels_is_explored_without_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, image_HWC in enumerate(drawn(12)):
        Image.fromarray(image_HWC).save(tmp_path / f"{number}.png")
    (tmp_path / "table.csv").write_text("file\n" + "".join(f"{number}.png\n" for number in range(12)))
    words = ["data", "explore", "--from", str(tmp_path / "table.csv"), "-o", str(tmp_path / "page.html")]
    assert main(words) == 2
    assert "--unlabelled" in capsys.readouterr().err
    assert main([*words, "--unlabelled"]) == 0
    printed = capsys.readouterr().out
    assert "unlabelled" in printed and "12 of 12 looked at" in printed and "map:" not in printed
    assert "uninformative features" not in (tmp_path / "page.html").read_text()


def test_explore_page_is_one_file_without_external_resources(tmp_path: Path, survey_path: Path) -> None:
    page = tmp_path / "deep" / "page.html"
    arguments = ["data", "explore", str(survey_path), "-o", str(page), "--sample", "50", "--per-class", "2", "--seed", "3"]
    assert main(arguments) == 0
    text = page.read_text()
    assert [*page.parent.iterdir()] == [page] and len(text) < 15_000_000
    assert "galaxydist data explore" in text and "--sample 50 --per-class 2 --seed 3" in text
    addresses = set(re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", text))
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert set(re.findall(r"https?://[^\"'\s<]+", text)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    ids = re.findall(r'<[^>]* id="([^"]+)"', re.sub(r"<defs>.*?</defs>", "", text, flags=re.DOTALL))
    assert len(ids) == len(set(ids))


@pytest.mark.slow
def test_explore_page_is_byte_equal_for_the_same_command(tmp_path: Path, shards_path: Path) -> None:
    page, texts = tmp_path / "page.html", []
    for _ in range(2):
        assert main(["data", "explore", str(shards_path), "-o", str(page)]) == 0
        texts.append(page.read_bytes())
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_explore_out_writes_page_json_and_figures_of_the_balanced_variant(tmp_path: Path, survey_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["data", "explore", "--from", str(survey_path), "--variant", "balanced", "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {"explore.html", "survey.json", "gallery.jpg", "counts.png", "counts.pdf"}
    found = json.loads((out / "survey.json").read_text())
    assert found["variant"] == "balanced" and found["sample"]["of"] == sum(map(sum, found["counts"].values()))
    assert len({tuple(counts) for counts in np.array([*found["counts"].values()]).T.tolist()}) == 1


def test_explore_refuses_wrong_sources_with_one_message(
    tmp_path: Path, shards_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("not a survey")
    (tmp_path / "empty").mkdir()
    with h5py.File(tmp_path / "other.h5", "w") as h5:
        h5["spectra"] = np.zeros(3)
    (tmp_path / "manifest.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    for words, expected in (
        (["nowhere.h5"], "give a manifest.json of shards"),
        ([str(tmp_path / "notes.txt")], "has no rows, only the header"),
        ([str(tmp_path / "other.h5")], "has no data set with images; it has spectra (3 float64)"),
        ([str(tmp_path / "empty")], "one folder of images for each class"),
        ([str(tmp_path / "manifest.json")], "is not a manifest of shards"),
        ([str(shards_path), "--variant", "balanced"], "leave out --variant"),
        ([str(shards_path), "--from", "x"], "leave one out"),
        ([str(shards_path), "-o", str(tmp_path)], "give the name of a file"),
        (["ftp://host/manifest.json"], "cannot be read through ftp://"),
    ):
        assert main(["data", "explore", *words, "--data-dir", str(tmp_path / "root")]) == 2, words
        captured = capsys.readouterr()
        assert expected in captured.err and captured.err.count("galaxydist: error:") == 1 and not captured.out
    assert sorted(tmp_path.rglob("*")) == before
