"""Leakage checks: no training galaxy among the evaluated ones."""

import json
import math
import re
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from galaxydist.cli.main import main
from galaxydist.errors import UserError
from galaxydist.evaluation import leakage as overlaps
from galaxydist.evaluation.counts import Counts
from galaxydist.evaluation.leakage import SplitGalaxies, check_before_training, check_overlap, find_overlap
from galaxydist.galaxy import Galaxy
from galaxydist.shards.manifest import Manifest
from galaxydist.shards.verify import describe_equal_images
from galaxydist.shards.writer.writer import write_shards
from galaxydist.surveys.folder_scan import fold_name, same_survey
from galaxydist.surveys.official_split import NAME, read_official_split
from galaxydist.surveys.split import TEST, TRAIN, VAL
from tests.helpers.blobs import BlobSurvey
from tests.helpers.runs import quick_settings, read_evaluation, run_here, without_figures
from tests.helpers.shard_surveys import make_old

ARCSEC = 1 / 3600


def table(rows: list[tuple[str, float | None, float | None]]) -> pa.Table:
    ids, ra, dec = zip(*rows, strict=True) if rows else ((), (), ())
    return pa.table({"id": pa.array(ids, pa.string()), "ra": pa.array(ra, pa.float64()), "dec": pa.array(dec, pa.float64())})


def separation(one: tuple[float, float], other: tuple[float, float]) -> float:
    """Arcsec on the sky, by the haversine formula (R. W. Sinnott, Sky and Telescope 68, 1984): good for small distances."""
    ra1, dec1, ra2, dec2 = map(math.radians, (*one, *other))
    part = math.sin((dec2 - dec1) / 2) ** 2 + math.cos(dec1) * math.cos(dec2) * math.sin((ra2 - ra1) / 2) ** 2
    return math.degrees(2 * math.asin(math.sqrt(min(part, 1.0)))) * 3600


# Around 0 degrees, the poles and a position in between, in steps of some arcsec.
PLACES = st.tuples(st.sampled_from([0.0, 359.99, 120.0, 300.0]), st.sampled_from([-90.0, 89.99, 0.0, 35.0]))
ROWS = st.lists(
    st.tuples(
        st.sampled_from("abcdefgh"),
        st.none()
        | PLACES.flatmap(lambda p: st.tuples(*(st.integers(-9, 9).map(lambda n, at=at: at + n * 15 * ARCSEC) for at in p))),
    ),
    max_size=12,
)


@given(others=ROWS, test=ROWS, radius=st.floats(1, 120), chunk=st.integers(1, 5), are_one_survey=st.booleans())
def test_find_overlap_equals_a_brute_force_comparison_of_ids_and_positions(
    others: Any, test: Any, radius: float, chunk: int, are_one_survey: bool
) -> None:
    def at(place: tuple[float, float] | None) -> tuple[float | None, float | None]:
        return (None, None) if place is None else (place[0], max(-90.0, min(90.0, place[1])))

    there, here = ([(name, *at(place)) for name, place in rows] for rows in (others, test))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlaps, "CHUNK", chunk)
        found = find_overlap(table(there), table(here), are_one_survey=are_one_survey, radius_arcsec=radius)
    assert found.by_id.tolist() == [are_one_survey and name in {other for other, _, _ in there} for name, _, _ in here]
    for near, (_, ra, dec) in zip(found.by_position.tolist(), here, strict=True):
        distances = [separation((ra, dec), place) for _, *place in there if None not in (ra, *place)]  # type: ignore[arg-type]
        nearest = min(distances, default=math.inf)
        assert near == (nearest <= radius) or abs(nearest - radius) < 1e-4
    assert found.rows.tolist() == (found.by_id | found.by_position).tolist()


def test_overlap_by_id_counts_only_within_one_survey() -> None:
    trained, test = table([("galaxy_000001", None, None)]), table([("galaxy_000001", None, None), ("b", 1.0, 1.0)])
    galaxies = SplitGalaxies(trained, "a", "x")
    assert check_overlap(galaxies, None, SplitGalaxies(test, "b", "y")).tolist() == [False, False]
    with pytest.raises(
        UserError, match=r"1 of the 2 galaxies of y were in the training set of this model, x: 1 by id \(galaxy_000001\)"
    ):
        check_overlap(galaxies, None, SplitGalaxies(test, "a", "y"))
    with pytest.raises(UserError, match="1 by id"):
        check_overlap(replace(galaxies, dataset=fold_name("a", 0, 5)), None, SplitGalaxies(test, fold_name("a", 3, 5), "y"))
    assert same_survey("a", fold_name("a", 1, 10)) and not same_survey("a", "a-2") and not same_survey("a", "b")


def test_overlap_error_counts_and_names_galaxies_by_id_and_position() -> None:
    rows = [(f"g{n}", 10.0 + n, 0.0) for n in range(9)]
    near = [(f"n{n}", 10.0 + n, 60 * ARCSEC) for n in range(2)]
    far = [("far", 10.0, 80 * ARCSEC), ("g8", 200.0, 0.0)]
    with pytest.raises(UserError) as error:
        check_overlap(
            SplitGalaxies(table(rows), "a", "train of a"), None, SplitGalaxies(table([*rows[:7], *near, *far]), "a", "test of b")
        )
    text = str(error.value)
    assert "10 of the 11 galaxies of test of b were in the training set of this model, train of a: " in text
    assert "8 by id (g0, g1, g2, g3, g4 and 3 more); 2 within 67 arcsec of one of them on the sky (n0, n1)." in text
    assert "1 of these are far from every galaxy of the training set" in text and "--name NAME" in text
    assert "Evaluate it on another data set, or train it on shards" in text
    seen = check_overlap(
        SplitGalaxies(table([("z", 1.0, 1.0)]), "a", "x"),
        SplitGalaxies(table(rows[:1]), "a", "v"),
        SplitGalaxies(table([*rows[:2], *far]), "a", "y"),
    )
    assert seen.tolist() == [True, False, False, False]


def test_no_test_galaxy_of_galaxy10_trains_either_variant(real_data: Path) -> None:
    """All four of training x test, on the real positions; the 32 of original validation are those of balanced test."""
    path = real_data / "galaxy10_decals_positions.csv"
    if not path.is_file():
        pytest.skip("../shared/data/galaxy10_decals_positions.csv is not on this machine")
    positions, split = np.genfromtxt(path, delimiter=",", names=True), read_official_split()

    def galaxies(variant: str, code: int) -> SplitGalaxies:
        rows = np.flatnonzero(getattr(split, variant) == code)
        columns = {"id": [f"g10-{row:05d}" for row in rows], "ra": positions["ra"][rows], "dec": positions["dec"][rows]}
        return SplitGalaxies(pa.table(columns), NAME, variant)

    chosen_on = {}
    for trained in ("original", "balanced"):
        for evaluated in ("original", "balanced"):
            test = galaxies(evaluated, TEST)
            mask = check_overlap(galaxies(trained, TRAIN), galaxies(trained, VAL), test)
            chosen_on[trained, evaluated] = (int(mask.sum()), len(mask))
    assert chosen_on == {
        ("original", "original"): (0, 1774),
        ("original", "balanced"): (32, 660),
        ("balanced", "original"): (0, 1774),
        ("balanced", "balanced"): (0, 660),
    }
    for dataset, how in ((NAME, r"2409 by id \(g10-"), ("renamed", r"2409 within 67 arcsec of one of them on the sky \(g10-")):
        with pytest.raises(UserError, match=f"2409 of the 2410 galaxies of balanced .*: {how}"):
            check_overlap(galaxies("original", TRAIN), None, replace(galaxies("balanced", TRAIN), dataset=dataset))


@pytest.mark.slow
def test_overlap_of_a_million_with_a_million_galaxies_takes_under_40_seconds() -> None:
    rng, num = np.random.default_rng(0), 10**6

    def draw(prefix: str) -> pa.Table:
        dec = np.degrees(np.arcsin(rng.uniform(-0.5, 0.9, num)))
        return pa.table({"id": [f"{prefix}{n}" for n in range(num)], "ra": rng.uniform(0, 360, num), "dec": dec})

    one, other = draw("a"), draw("b")
    started = time.process_time()
    found = find_overlap(one, other, are_one_survey=True)
    assert time.process_time() - started < 40
    assert 30_000 < found.by_position.sum() < 45_000 and not found.by_id.any()


@given(seed=st.integers(0, 2**31), num_ranks=st.integers(1, 3))
def test_subset_counts_equal_counts_of_only_the_subsets_galaxies(seed: int, num_ranks: int) -> None:
    rng = np.random.default_rng(seed)
    num, classes = 23, 4
    logits_NK, labels_N = torch.from_numpy(rng.normal(size=(num, classes))), torch.from_numpy(rng.integers(0, classes, num))
    is_counted_N = rng.random(num) < 0.6
    parts = [Counts(classes, subset_N=is_counted_N) for _ in range(num_ranks)]
    for batch, start in enumerate(range(0, num, 5)):
        samples_B = torch.arange(start, start + 5)
        samples_B[samples_B >= num] = -1
        weights_B = (samples_B >= 0).float()
        rows = samples_B.clamp(min=0)
        parts[batch % num_ranks].add(logits_NK[rows], labels_N[rows], weights_B, samples_B)
    total = Counts.from_vector(torch.stack([part.vector() for part in parts]).sum(dim=0))
    alone = Counts(classes)
    alone.add(logits_NK[is_counted_N], labels_N[is_counted_N], torch.ones(int(is_counted_N.sum())))
    assert torch.equal(total.vector(), alone.vector())
    total.check(int(is_counted_N.sum()))


@dataclass(frozen=True)
class PlacedBlobs(BlobSurvey):
    """Blobs far apart on the sky; ``moved`` and ``renamed`` give rows another position or id, ``prefix`` begins ids."""

    moved: tuple[tuple[int, float, float], ...] = ()
    renamed: tuple[tuple[int, str], ...] = ()
    prefix: str = "blob"
    first_ra: float = 10.0

    def read(self, start: int, stop: int) -> Any:
        for row, galaxy in enumerate(super().read(start, stop), start):
            places = {moved: (ra, dec) for moved, ra, dec in self.moved}
            ra, dec = places.get(row, (self.first_ra + row / 10, 20.0))
            name = dict(self.renamed).get(row, f"{self.prefix}-{row:05d}")
            yield Galaxy(name, galaxy.image, galaxy.label, ra, dec, galaxy.extras)


OTHER = PlacedBlobs(num_galaxies=60, name="other", prefix="other", first_ra=200.0)
# Rows of the first 60 that are in test, and that the run has trained and been chosen on.
TEST_ROW, TRAIN_ROW, VAL_ROW = 24, 3, 20
TRAIN_PLACE, VAL_PLACE = (10.0 + TRAIN_ROW / 10, 20.0), (10.0 + VAL_ROW / 10, 20.0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of one epoch, and the folder of its shards."""
    folder = tmp_path_factory.mktemp("overlap")
    manifest = write(PlacedBlobs(), folder / "shards")
    assert run_here(quick_settings(manifest.path, folder / "run", train__epochs=1)) == 0
    return folder / "run", folder / "shards"


@pytest.fixture
def run_dir(trained: tuple[Path, Path], tmp_path: Path) -> Path:
    return shutil.copytree(trained[0], tmp_path / "run")


def write(survey: BlobSurvey, folder: Path) -> Manifest:
    return write_shards(survey, folder, encoding="png", shard_size=16, workers=1)


def evaluate(run_dir: Path, *arguments: object) -> int:
    from accelerate.state import AcceleratorState, PartialState

    try:
        with without_figures():
            return main(["evaluate", str(run_dir), *map(str, arguments)])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()


NEAR = replace(OTHER, moved=((TEST_ROW, TRAIN_PLACE[0], TRAIN_PLACE[1] + 60 * ARCSEC),))
NAMED = replace(OTHER, renamed=((TEST_ROW, f"blob-{TRAIN_ROW:05d}"),))


@pytest.mark.parametrize(
    ("survey", "refused", "with_catalogues"),
    [
        (NEAR, "1 within 67 arcsec of .*other-00024", True),
        (NEAR, "1 within 67 arcsec of .*other-00024", False),
        (replace(OTHER, moved=((TEST_ROW, TRAIN_PLACE[0], TRAIN_PLACE[1] + 80 * ARCSEC),)), None, True),
        (NAMED, None, True),
        (replace(NAMED, name="blobs"), r"1 by id \(blob-00003\)", True),
        (replace(NAMED, name="blobs-fold1of5"), r"1 by id \(blob-00003\)", True),
    ],
)
def test_evaluate_refuses_test_galaxies_from_the_runs_training_set(  # noqa: PLR0917
    run_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    survey: PlacedBlobs,
    refused: str | None,
    with_catalogues: bool,
) -> None:
    manifest = write(survey, tmp_path / "shards")
    if not with_catalogues:
        make_old(manifest.dir)
    capsys.readouterr()
    code = evaluate(run_dir, "--manifest", manifest.path)
    printed = capsys.readouterr()
    written = run_dir / "evaluation" / f"{survey.name}-{survey.variant}" / "test.json"
    if refused is None:
        assert code == 0 and written.exists()
        assert "without_validation" not in json.loads(written.read_text())
        return
    assert code == 2 and not written.exists()
    assert f"1 of the 12 galaxies of the test split of {manifest.path} were in the training set of this model" in printed.err
    assert re.search(refused, printed.err)


def test_evaluation_reports_metrics_with_and_without_validation_galaxies(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = read_evaluation(run_dir)
    assert "without_validation" not in own and own["trained_on_hash"] == own["manifest_hash"]
    survey = replace(
        OTHER,
        name="blobs",
        moved=((TEST_ROW, VAL_PLACE[0], VAL_PLACE[1] - 60 * ARCSEC),),
        renamed=((TEST_ROW + 1, f"blob-{VAL_ROW:05d}"),),
        variant="balanced",
    )
    seen = write(survey, tmp_path / "seen")
    assert evaluate(run_dir, "--manifest", seen.path) == 0
    found = json.loads((run_dir / "evaluation" / "blobs-balanced" / "test.json").read_text())
    without = found["without_validation"]
    assert (found["count"], without["count"]) == (12, 10)
    labels = [row % 3 for row in (TEST_ROW, TEST_ROW + 1)]
    for label in range(3):
        assert found["per_class"]["support"][label] - without["per_class"]["support"][label] == labels.count(label)
    assert without["loss"] != found["loss"] and without["loss"] > 0
    assert "without the 2 galaxies of its validation set (N = 10): accuracy" in capsys.readouterr().out
    # The same galaxies alone give the same numbers.
    splits = survey.splits["test"].tolist()
    kept = [row for row in splits if row not in (TEST_ROW, TEST_ROW + 1)]

    @dataclass(frozen=True)
    class Kept(PlacedBlobs):
        @property
        def splits(self) -> Any:
            return {**super().splits, "test": np.array(kept)}

    alone = write(Kept(**{**vars(survey), "name": "kept"}), tmp_path / "alone")
    assert evaluate(run_dir, "--manifest", alone.path) == 0
    other = json.loads((run_dir / "evaluation" / "kept-balanced" / "test.json").read_text())
    assert other["confusion"] == without["confusion"]
    assert other["loss"] == pytest.approx(without["loss"], rel=1e-6)


def test_evaluation_without_the_training_shards_requires_trained_on(
    trained: tuple[Path, Path],
    run_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    other = write(OTHER, tmp_path / "shards")
    moved = tmp_path / "moved"
    trained[1].rename(moved)
    try:
        capsys.readouterr()
        assert evaluate(run_dir, "--manifest", other.path) == 2
        printed = capsys.readouterr().err
        assert "only if none of them was in the training set, and the shards that the run was trained on" in printed
        assert "--trained-on MANIFEST" in printed and "no shards at" in printed
        assert evaluate(run_dir, "--manifest", moved) == 0, "its own shards, elsewhere"
        assert evaluate(run_dir, "--manifest", other.path, "--trained-on", moved) == 0
        capsys.readouterr()
        # What stands in their place is not what it was trained on, unless the user says so.
        write(replace(PlacedBlobs(), source_hash="3" * 64), trained[1])
        near = write(replace(OTHER, moved=((TEST_ROW, *TRAIN_PLACE),), name="near"), tmp_path / "near")
        assert evaluate(run_dir, "--manifest", near.path) == 2
        printed = capsys.readouterr().err
        assert f"are no longer at {trained[1] / 'manifest.json'}, which has others" in printed and "--trained-on" in printed
        assert evaluate(run_dir, "--manifest", near.path, "--trained-on", trained[1]) == 2
        assert "1 within 67 arcsec" in capsys.readouterr().err
        assert "its galaxies are used as those of the run" in caplog.text
        classes = write(replace(OTHER, class_names=("a", "b", "c")), tmp_path / "classes")
        assert evaluate(run_dir, "--manifest", near.path, "--trained-on", classes.path) == 2
        assert "has the classes a, b, c, the run was trained on round, flat, pair" in capsys.readouterr().err
    finally:
        shutil.rmtree(trained[1], ignore_errors=True)
        moved.rename(trained[1])


def test_shards_with_overlapping_train_and_test_are_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write(PlacedBlobs(moved=((TEST_ROW, *TRAIN_PLACE),)), tmp_path / "shards")
    arguments = quick_settings(manifest.path, tmp_path / "run", train__epochs=1)
    assert run_here(arguments) == 2
    assert "1 within 67 arcsec of one of them on the sky (blob-00024)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    make_old(manifest.dir)  # found only when the evaluation reads the tars
    assert run_here(arguments) == 2
    assert "1 within 67 arcsec of one of them on the sky (blob-00024)" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoints").exists() and not (tmp_path / "run" / "evaluation").exists()


def test_equal_images_under_other_names_and_positions_are_refused(
    run_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Copied(PlacedBlobs):
        def _draw(self, row: int) -> Any:
            return super()._draw({TEST_ROW: TRAIN_ROW}.get(row, row))

    other = Copied(**vars(OTHER))
    assert evaluate(run_dir, "--manifest", write(other, tmp_path / "resized").path) == 2
    assert "1 by their images, which are equal pixel for pixel (other-00024)" in capsys.readouterr().err
    # A data set's own splits stay as they were given, with a warning.
    manifest = write(Copied(), tmp_path / "own")
    assert [line.split(": ")[1] for line in describe_equal_images(manifest)] == [
        f"train/blob-{TRAIN_ROW:05d} = test/blob-{TEST_ROW:05d}. A model would be evaluated on images that it has learnt from"
    ]
    check_before_training(manifest, manifest)
    assert "1 of the 24 galaxies of the test split" in caplog.text and "pixel for pixel (blob-00024)" in caplog.text
    # Shards of an earlier version have no hashes.
    monkeypatch.setattr("galaxydist.shards.writer.encode.hash_pixels", lambda _: None)
    old = write(other, tmp_path / "old")
    assert evaluate(run_dir, "--manifest", old.path) == 0
    assert "has no hashes of its images" in caplog.text and "has no hashes" in describe_equal_images(old)[0]


def test_evaluation_without_leakage_checks_is_recomputed(run_dir: Path) -> None:
    path = run_dir / "evaluation" / "test.json"
    content = json.loads(path.read_text())
    del content["apart_arcsec"]
    path.write_text(json.dumps({**content, "accuracy": 2.0}))
    assert evaluate(run_dir) == 0
    assert read_evaluation(run_dir)["accuracy"] <= 1.0
