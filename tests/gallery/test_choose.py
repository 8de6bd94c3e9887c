"""Which galaxies a gallery shows: the same that a sort of all of them would put first."""

import math
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from galaxydist.evaluation.predictions import ROW_GROUP, PredictionsFile, PredictionsInfo, read_predictions, write_predictions
from galaxydist.gallery.choose import SelectedGalaxy, Selection, choose_mistakes

CONTEXT = {"dataset": "blobs", "variant": "original", "split": "test", "tta": "none", "model": "vit", "recipe": "vit"}


def write(path: Path, logits_NK: np.ndarray[Any, Any], labels_N: np.ndarray[Any, Any]) -> PredictionsFile:
    """Predictions of these logits; ids name the sample number."""
    num_galaxies, num_classes = logits_NK.shape

    def blocks() -> Iterator[dict[str, Any]]:
        for start in range(0, num_galaxies, 1000):
            rows = slice(start, start + 1000)
            samples = np.arange(num_galaxies)[rows]
            yield {
                "id": [f"galaxy-{sample}" for sample in samples],
                "sample": samples,
                "label": labels_N[rows],
                "predicted": logits_NK[rows].argmax(axis=1),
                "logits": logits_NK[rows].astype(np.float32),
            }

    write_predictions(path, PredictionsInfo(tuple(f"class_{k}" for k in range(num_classes)), CONTEXT), blocks())
    return read_predictions(path)


def by_sorting(predictions: PredictionsFile, per_class: int) -> Selection:
    """All galaxies in memory, one at a time in plain Python."""
    columns = {name: predictions.column(name) for name in ("id", "label", "predicted", "probabilities")}
    galaxies, undefined = [], 0
    for row, (name, label, predicted, p_K) in enumerate(zip(*(column.tolist() for column in columns.values()), strict=True)):
        if not all(map(math.isfinite, p_K)):
            undefined += 1
            continue
        entropy = -sum(p * math.log(p) for p in p_K if p > 0)
        galaxies.append(SelectedGalaxy(name, row, label, predicted, p_K[predicted], p_K[label], entropy))
    classes = range(predictions.info.num_classes)
    wrong = sorted((galaxy for galaxy in galaxies if galaxy.is_mistake), key=lambda galaxy: (-galaxy.probability, galaxy.sample))
    # Sums of logarithms in another order differ in the last digits: of equal galaxies only that must not decide.
    unsure = sorted(galaxies, key=lambda galaxy: (-round(galaxy.entropy, 12), galaxy.sample))
    labels_N, predicted_N = columns["label"], columns["predicted"]
    return Selection(
        tuple(tuple(galaxy for galaxy in wrong if galaxy.label == k)[:per_class] for k in classes),
        tuple(tuple(galaxy for galaxy in unsure if galaxy.label == k)[:per_class] for k in classes),
        tuple(int((labels_N == k).sum()) for k in classes),
        tuple(int(((labels_N == k) & (predicted_N != k)).sum()) for k in classes),
        undefined,
    )


def samples_of(chosen: tuple[tuple[SelectedGalaxy, ...], ...]) -> list[list[int]]:
    return [[galaxy.sample for galaxy in galaxies] for galaxies in chosen]


# Few different logits, so that many galaxies tie.
logits = st.sampled_from([0.0, 1.0, 3.0, 8.0])


@given(data=st.data(), per_class=st.integers(1, 5), num_classes=st.integers(2, 4))
def test_choose_mistakes_equals_a_full_sort(
    data: st.DataObject, per_class: int, num_classes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows = data.draw(st.lists(st.tuples(*[logits] * num_classes, st.integers(0, num_classes - 1)), max_size=40))
    table = np.array(rows, np.float64).reshape(-1, num_classes + 1)
    predictions = write(tmp_path_factory.mktemp("p") / "p.parquet", table[:, :-1], table[:, -1].astype(int))
    found, expected = choose_mistakes(predictions, per_class), by_sorting(predictions, per_class)
    assert samples_of(found.confident) == samples_of(expected.confident)
    assert (found.num_galaxies, found.num_mistakes) == (expected.num_galaxies, expected.num_mistakes)
    for ours, theirs in zip(found.uncertain, expected.uncertain, strict=True):
        assert [galaxy.entropy for galaxy in ours] == pytest.approx([galaxy.entropy for galaxy in theirs], abs=1e-12)


def test_choose_mistakes_handles_row_groups_ties_and_undefined_logits(tmp_path: Path) -> None:
    count, rng = 2 * ROW_GROUP + 500, np.random.default_rng(0)
    logits_NK = rng.normal(size=(count, 3)) * 3
    labels_N = rng.integers(0, 3, count)
    labels_N[labels_N == 1] = 2  # a class without galaxies
    logits_NK[7] = np.nan
    same = [20, ROW_GROUP + 20, 2 * ROW_GROUP + 20]  # in three row groups: as sure of the same mistake, and surest of all
    logits_NK[same], labels_N[same] = [0, 40, 0], 2
    flat = [30, ROW_GROUP + 30, 2 * ROW_GROUP + 30]
    logits_NK[flat], labels_N[flat] = 0.0, 0
    predictions = write(tmp_path / "p.parquet", logits_NK, labels_N)
    found, expected = choose_mistakes(predictions, 4), by_sorting(predictions, 4)
    assert samples_of(found.confident) == samples_of(expected.confident)
    assert samples_of(found.uncertain) == samples_of(expected.uncertain)
    assert samples_of(found.confident)[2][:3] == same and samples_of(found.uncertain)[0][:3] == flat
    assert found.confident[1] == found.uncertain[1] == () and found.num_galaxies[1] == 0
    assert found.num_undefined == 1 and sum(found.num_galaxies) == count
    first = found.confident[2][0]
    assert (first.id, first.label, first.predicted, first.is_mistake) == ("galaxy-20", 2, 1, True)
    assert first.probability == pytest.approx(1) and found.uncertain[0][0].entropy == pytest.approx(math.log(3))
    chosen = {galaxy.sample for galaxies in (*found.confident, *found.uncertain) for galaxy in galaxies}
    assert list(found.predicted_classes()) == sorted(chosen)


def test_memory_does_not_grow_with_the_number_of_galaxies(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        rng = np.random.default_rng(1)
        predictions = write(tmp_path / f"{count}.parquet", rng.normal(size=(count, 3)), rng.integers(0, 3, count))
        tracemalloc.start()
        try:
            choose_mistakes(predictions, 4)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(4 * ROW_GROUP) < 1.2 * peak(2 * ROW_GROUP)


def test_choose_mistakes_without_predictions_is_empty(tmp_path: Path) -> None:
    found = choose_mistakes(write(tmp_path / "p.parquet", np.empty((0, 2)), np.empty(0, int)), 3)
    assert found == Selection(((), ()), ((), ()), (0, 0), (0, 0), 0)
    assert found.predicted_classes() == {}
