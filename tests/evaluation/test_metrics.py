"""Metrics of stored predictions against scikit-learn and torchmetrics, and the command that prints them."""

import json
import math
import shutil
import subprocess
import sys
import time
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as reference
from torchmetrics.functional.classification import multiclass_calibration_error

from galaxydist.cli.main import main
from galaxydist.errors import UserError
from galaxydist.evaluation import bootstrap
from galaxydist.evaluation.calibration import HIGHEST, LOWEST, NUM_BINS, Reliability, fit_temperature
from galaxydist.evaluation.counts import Counts
from galaxydist.evaluation.metrics import LEAST_GALAXIES, accuracy_by_property, in_top_two, metrics_from_counts, summarise
from galaxydist.evaluation.predictions import PredictionsFile, softmax
from tests.helpers.prediction_files import draw_logits, write_logits

CASES = [
    pytest.param(1, 400, 5, None, id="plain"),
    pytest.param(2, 300, 6, 4, id="classes-without-galaxies"),
    pytest.param(3, 60, 4, 1, id="one-class"),
    pytest.param(4, 200, 2, None, id="two-classes"),
    pytest.param(5, 1, 3, None, id="one-galaxy"),
    pytest.param(6, 20_000, 10, None, id="several-row-groups"),
]


def counted(logits_NK: np.ndarray, labels_N: np.ndarray) -> dict[str, Any]:
    """The exact counts' metrics."""
    counts = Counts(logits_NK.shape[1])
    counts.add(torch.from_numpy(logits_NK), torch.from_numpy(labels_N), torch.ones(len(labels_N)))
    names = [f"class_{label}" for label in range(logits_NK.shape[1])]
    return metrics_from_counts(counts.confusion_KK.numpy(), counts.loss_sum, names)


@pytest.mark.filterwarnings("ignore:A single label was found", "ignore:y_pred contains classes", "ignore:y_true contains")
@pytest.mark.parametrize(("seed", "num", "num_classes", "classes"), CASES)
def test_metrics_of_predictions_equal_counts_scikit_learn_and_torchmetrics(
    tmp_path: Path, seed: int, num: int, num_classes: int, classes: int | None
) -> None:
    logits_NK, labels_N = draw_logits(seed, num, num_classes, classes=classes)
    found = summarise(write_logits(tmp_path / "a.parquet", logits_NK, labels_N)).metrics
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    exact = counted(logits_NK, labels_N)
    assert found["loss"] == pytest.approx(exact["loss"], abs=1e-9)
    assert {name: found[name] for name in exact if name != "loss"} == {name: exact[name] for name in exact if name != "loss"}
    probabilities_NK, labels = softmax(logits_NK), list(range(num_classes))
    assert found["loss"] == pytest.approx(reference.log_loss(labels_N, probabilities_NK, labels=labels), rel=1e-12)
    top2 = 1.0 if num_classes == 2 else reference.top_k_accuracy_score(labels_N, logits_NK, k=2, labels=labels)
    assert found["top2_accuracy"] == pytest.approx(top2)
    for label in labels:
        is_class_N = labels_N == label
        areas = [found[name]["per_class"][label] for name in ("roc_auc", "average_precision")]
        if is_class_N.all() or not is_class_N.any():
            assert areas == [None, None]
            continue
        scores_N = probabilities_NK[:, label]
        assert areas[0] == pytest.approx(reference.roc_auc_score(is_class_N, scores_N), abs=1e-12)
        assert areas[1] == pytest.approx(reference.average_precision_score(is_class_N, scores_N), abs=1e-12)
    known = [area for area in found["roc_auc"]["per_class"] if area is not None]
    assert found["roc_auc"]["macro"] == (pytest.approx(np.mean(known)) if known else None)
    ece = multiclass_calibration_error(
        torch.from_numpy(probabilities_NK), torch.from_numpy(labels_N), num_classes, n_bins=NUM_BINS
    )
    assert found["calibration"]["ece"] == pytest.approx(ece.item(), abs=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shares_KK = reference.confusion_matrix(labels_N, logits_NK.argmax(1), labels=labels, normalize="true")
    for row, expected in zip(found["confusion_normalised"], shares_KK, strict=True):
        assert row is None if not expected.any() else row == pytest.approx(expected.tolist())


def test_summary_reports_the_counted_loss_and_refuses_predictions_of_another_loss(tmp_path: Path) -> None:
    logits_NK, labels_N = draw_logits(0, 100, 3)
    loss = counted(logits_NK, labels_N)["loss"] + 1e-6  # as with double precision, whose logits are rounded
    assert summarise(write_logits(tmp_path / "a.parquet", logits_NK, labels_N, loss=loss)).metrics["loss"] == loss
    with pytest.raises(UserError, match=r"give a loss of .* was counted"):
        summarise(write_logits(tmp_path / "b.parquet", logits_NK, labels_N, loss=loss + 0.1))


def test_metrics_of_no_galaxies_or_nonfinite_logits_omit_undefined_values(tmp_path: Path) -> None:
    none = summarise(write_logits(tmp_path / "a.parquet", np.empty((0, 3), np.float32), np.empty(0, np.int64))).metrics
    json.dumps(none, allow_nan=False)
    assert none["count"] == 0 and none["accuracy"] is none["loss"] is none["top2_accuracy"] is none["calibration"]["ece"] is None
    assert none["intervals"]["accuracy"] is none["intervals"]["loss"] is None
    logits_NK, labels_N = draw_logits(0, 50, 3)
    logits_NK[7, 1] = np.nan
    found = summarise(write_logits(tmp_path / "b.parquet", logits_NK, labels_N)).metrics
    json.dumps(found, allow_nan=False)
    assert found["loss"] is None and found["count"] == 50 and "roc_auc" not in found and "calibration" not in found
    assert any("of 50 galaxies 1 have logits that are not finite" in sentence for sentence in found["left_out"])
    assert found["intervals"]["accuracy"] is not None


def test_top_two_of_equal_logits_prefers_the_first_class() -> None:
    logits_BK = np.array([[1.0, 1.0, 1.0], [0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    for label, expected in ((0, [True, False, True]), (1, [True, True, True]), (2, [False, True, False])):
        assert in_top_two(logits_BK, np.full(3, label)).tolist() == expected


def test_confidence_bins_include_their_lower_edge_and_the_last_includes_1() -> None:
    reliability = Reliability()
    bins = reliability.add(np.array([0.0, 1 / 15, 14 / 15, 1.0, np.nextafter(1 / 15, 0)]), np.array([True] * 5))
    assert bins.tolist() == [0, 1, 14, 14, 0]
    assert reliability.count.tolist() == [2, 1, *[0] * 12, 2]
    # In its own bin by torchmetrics, which makes a sixteenth of a confidence of 1; the sum is the same where one is right there.
    assert reliability.ece == pytest.approx(((2 - 1 / 15) + (1 - 1 / 15) + (2 - 14 / 15 - 1)) / 5)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.7])
def test_fit_temperature_recovers_a_known_temperature(tmp_path: Path, temperature: float) -> None:
    """Labels drawn from the softmax of the logits are calibrated; logits times T want to be divided by T."""
    rng = np.random.default_rng(1)
    calibrated_NK = (2 * rng.normal(size=(40_000, 4))).astype(np.float32)
    labels_N = (softmax(calibrated_NK).cumsum(1) < rng.random((40_000, 1))).sum(1).clip(max=3)
    scaled_NK = (temperature * calibrated_NK).astype(np.float32)
    validation = write_logits(tmp_path / "val.parquet", scaled_NK[:20_000], labels_N[:20_000], split="val")
    evaluated = write_logits(tmp_path / "test.parquet", scaled_NK[20_000:], labels_N[20_000:])
    found = fit_temperature(validation)
    assert found is not None and found.value == pytest.approx(temperature, rel=0.03) and not found.at_bound
    assert found.loss_after <= found.loss_before == pytest.approx(counted(scaled_NK[:20_000], labels_N[:20_000])["loss"])
    metrics = summarise(evaluated, validation).metrics
    scaled = metrics["calibration"]["scaled"]
    assert scaled["ece"] < 0.02 and metrics["calibration"]["temperature"]["fitted_on"]["split"] == "val"
    divided_NK = (scaled_NK[20_000:].astype(np.float64) / found.value).astype(np.float32)
    assert scaled["loss"] == pytest.approx(counted(divided_NK, labels_N[20_000:])["loss"], abs=1e-6)
    assert metrics["accuracy"] == counted(scaled_NK[20_000:], labels_N[20_000:])["accuracy"]
    if temperature != 1.0:
        assert scaled["ece"] < metrics["calibration"]["ece"] / 2
    low, high = metrics["intervals"]["scaled_loss"]
    assert low < scaled["loss"] < high


def test_temperature_is_fitted_only_on_validation_and_stays_within_bounds(tmp_path: Path) -> None:
    logits_NK, labels_N = draw_logits(0, 100, 3)
    evaluated = write_logits(tmp_path / "test.parquet", logits_NK, labels_N)
    assert summarise(evaluated).metrics["calibration"]["temperature"] is None
    for answers, bound in ((labels_N, LOWEST), ((labels_N + 1) % 3, HIGHEST)):
        sure_NK = 10 * np.eye(3, dtype=np.float32)[answers]
        found = fit_temperature(write_logits(tmp_path / "val.parquet", sure_NK, labels_N, split="val"))
        assert found is not None and found.value == pytest.approx(bound, rel=1e-3) and found.at_bound
    empty = write_logits(tmp_path / "none.parquet", logits_NK[:0], labels_N[:0], split="val")
    assert fit_temperature(empty) is None
    others = write_logits(tmp_path / "others.parquet", logits_NK, labels_N, split="val", class_names=("x", "y", "z"))
    with pytest.raises(UserError, match=r"has the classes x, y, z, .* has class_0"):
        summarise(evaluated, others)


@given(st.integers(0, 50), st.integers(2, 5), st.integers(0, 1000))
@settings(max_examples=20)
def test_resampled_counts_give_the_metrics_of_each_resample(count: int, num_classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    cells = rng.integers(0, num_classes**2, count)
    confusion_KK = np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)
    # Drawn with its empty cells, as earlier versions did: stored intervals stay what they are.
    generator = np.random.Generator(np.random.Philox(key=bootstrap.SEED))
    shares = confusion_KK.ravel() / max(1, count)
    drawn_RKK = generator.multinomial(count, shares, size=bootstrap.RESAMPLES).reshape(-1, num_classes, num_classes)
    names = [str(label) for label in range(num_classes)]
    found = [bootstrap.count_metrics(*resamples) for resamples in bootstrap.resample_confusion(confusion_KK)]
    assert bool(found) == (count > 0)
    for metrics in found:
        assert metrics.keys() == set(bootstrap.COUNTED)
        for number, matrix_KK in enumerate(drawn_RKK[:20]):
            expected = metrics_from_counts(matrix_KK, 0.0, names)
            for name, values_R in metrics.items():
                assert values_R[number] == pytest.approx(expected[name]), name


def test_bootstrap_intervals_of_1500_classes_need_under_300_mb() -> None:
    rng = np.random.default_rng(3)
    label_N, num_classes = rng.integers(0, 1500, 3000), 1500
    predicted_N = np.where(rng.random(3000) < 0.7, label_N, rng.integers(0, 1500, 3000))
    confusion_KK = np.bincount(label_N * num_classes + predicted_N, minlength=num_classes**2).reshape(num_classes, num_classes)
    tracemalloc.start()
    found = bootstrap.count_intervals(confusion_KK)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300e6  # all cells of all resamples: 18 GB
    low, high = found["accuracy"] or (0, 0)
    assert low < np.trace(confusion_KK) / 3000 < high


def test_bootstrap_intervals_have_the_width_of_the_standard_error(tmp_path: Path) -> None:
    logits_NK, labels_N = draw_logits(7, 4000, 3)
    found = summarise(write_logits(tmp_path / "a.parquet", logits_NK, labels_N)).metrics
    losses_N = -np.log(softmax(logits_NK)[np.arange(4000), labels_N])
    errors = {
        "accuracy": math.sqrt(found["accuracy"] * (1 - found["accuracy"]) / 4000),
        "top2_accuracy": math.sqrt(found["top2_accuracy"] * (1 - found["top2_accuracy"]) / 4000),
        "loss": losses_N.std() / math.sqrt(4000),
    }
    for name, error in errors.items():
        low, high = found["intervals"][name]
        # A quantile of a thousand resamples is itself good to some percent.
        assert (high - low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.08), name
        assert (low + high) / 2 == pytest.approx(found[name], abs=0.25 * error), name
    assert found["intervals"]["level"] == 0.95


def test_bootstrap_weights_are_poisson_with_golden_sums_for_any_chunking() -> None:
    table = bootstrap.poisson_table()
    for value in range(6):
        assert (table == value).mean() == pytest.approx(stats.poisson.pmf(value, 1.0), abs=2e-5)
    values_BM = np.random.default_rng(0).normal(size=(2500, 3))
    sums = []
    for cuts in ([], [1], [999, 1030, 2048]):
        sampler = bootstrap.GalaxyBootstrap(3)
        for part_BM in np.split(values_BM, cuts):
            sampler.add(part_BM)
        sums.append(sampler.sums_RM)
    assert np.allclose(sums[0], sums[1], rtol=1e-12) and np.allclose(sums[0], sums[2], rtol=1e-12)
    weights = bootstrap.GalaxyBootstrap(1)
    weights.add(np.ones((2500, 1)))
    assert weights.sums_RM.mean() == pytest.approx(2500, rel=3e-3)
    assert weights.sums_RM.std() == pytest.approx(50, rel=0.1)
    # The words of a Philox stream are promised by numpy.
    assert weights.sums_RM[:4, 0].tolist() == GOLDEN_SUMS


GOLDEN_SUMS = [2449.0, 2481.0, 2485.0, 2551.0]


def test_accuracy_against_a_property_uses_bins_of_equal_count(tmp_path: Path) -> None:
    num = 1000
    logits_NK, labels_N = draw_logits(3, num, 3)
    size_N = np.random.default_rng(0).permutation(num).astype(float)
    logits_NK[np.arange(num), labels_N] = np.where(size_N < 500, -9, 9)  # the larger half is right
    few_N = np.where(np.arange(num) < LEAST_GALAXIES - 1, 1.0, np.nan)
    tied_N = np.where(np.arange(num) < 900, 0.5, 0.7)
    properties = {"size": size_N, "redshift": few_N, "sky_brightness": tied_N}
    units = {"size": "arcsec"}
    found, left_out = accuracy_by_property(
        write_logits(tmp_path / "a.parquet", logits_NK, labels_N, properties=properties, units=units)
    )
    assert list(found) == ["size", "sky_brightness"] and left_out == ["redshift: only 24 galaxies have it"]
    bins = found["size"]["bins"]
    assert [row["count"] for row in bins] == [125] * 8 and found["size"]["unit"] == "arcsec"
    assert [row["accuracy"] for row in bins] == [0.0] * 4 + [1.0] * 4
    assert bins[3]["high"] < 500 <= bins[4]["low"]
    low, high = stats.binomtest(125, 125).proportion_ci(0.95, "wilson")
    assert bins[-1]["interval"] == [low, high]
    assert sum(row["count"] for row in found["sky_brightness"]["bins"]) == num
    none, left_out = accuracy_by_property(write_logits(tmp_path / "b.parquet", logits_NK, labels_N))
    assert none == {} and left_out[0] == "redshift: no galaxy has it"


def written(folder: Path, **context: Any) -> PredictionsFile:
    """Test and validation predictions of one model in a folder."""
    for split, seed in (("val", 1), ("test", 2)):
        logits_NK, labels_N = draw_logits(seed, 500, 10, sharpness=3.0)
        redshift = np.abs(np.random.default_rng(seed).normal(size=500)) / 10
        path = folder / f"{split}-predictions.parquet"
        found = write_logits(path, logits_NK, labels_N, properties={"redshift": redshift}, split=split, **context)
    return found


@pytest.mark.slow
def test_evaluate_predictions_writes_metrics_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path).path
    assert main(["evaluate", "--predictions", str(path)]) == 0
    printed = capsys.readouterr().out
    evaluation = json.loads((tmp_path / "test.json").read_text())
    assert "blobs (original), test split, vit, N = 500" in printed
    for name, label in (("accuracy", "accuracy"), ("macro_f1", "macro F1"), ("loss", "loss")):
        low, high = evaluation["intervals"][name]
        line = next(line for line in printed.splitlines() if line.startswith(label))
        assert f"{evaluation[name]:.3f}   {low:.3f} to {high:.3f}" in line
    value = evaluation["calibration"]["temperature"]["value"]
    assert f"logits divided by T = {value:.3f}, fitted on 500 galaxies of the validation split" in printed
    assert "left out: size: no galaxy has it" in printed
    names = ("confusion", "classes", "reliability", "areas", "dependence")
    assert all(str(tmp_path / f"test-{name}.png") in printed and (tmp_path / f"test-{name}.pdf").exists() for name in names)
    # Elsewhere, without the validation split: figures of an earlier evaluation that this one lacks go.
    out = shutil.copytree(tmp_path, tmp_path / "out")
    (tmp_path / "val-predictions.parquet").unlink()
    write_logits(path, *draw_logits(2, 20, 10))
    assert main(["evaluate", "--predictions", str(path), "--out", str(out)]) == 0
    assert not (out / "test-dependence.png").exists() and (out / "test-areas.png").exists()
    assert "left out: temperature scaling" in capsys.readouterr().out


def test_evaluate_refuses_unusable_predictions_and_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path).path
    other = written_elsewhere(tmp_path / "other")
    cases = [
        (["--predictions", str(tmp_path / "none.parquet")], "no predictions at"),
        (["--predictions", str(path), "--validation", str(other)], "a temperature is fitted on the same model"),
        (["--predictions", str(path), "--validation", str(path)], "is of the test split: give one of val"),
        (["--predictions", str(path), "some-run"], "needs no RUN"),
        (["--predictions", str(path), "--tta", "d4"], "needs no --tta"),
        (["--out", "x", "run"], "--out goes with --predictions"),
        ([], "give a run folder"),
        (["a", "b"], "one run at a time, not 2"),
        (["a", "optim.lr=1"], "optim.lr cannot be changed"),
        (["a", "data.manifest=x", "data.variant=balanced"], "keep one"),
        (["a", "data.variant=other"], "there are original and balanced"),
        (["a", "data.manifest=x", "--manifest", "y"], "both name the data"),
        (["no-such-run"], "there is no such folder, nor runs/no-such-run"),
    ]
    for arguments, text in cases:
        assert main(["evaluate", *arguments]) == 2, arguments
        assert text in capsys.readouterr().err, arguments
    path.write_bytes(path.read_bytes()[:-50])
    assert main(["evaluate", "--predictions", str(path)]) == 2
    assert "is damaged" in capsys.readouterr().err


def written_elsewhere(folder: Path) -> Path:
    folder.mkdir()
    written(folder, step=240)
    return folder / "val-predictions.parquet"


MEASURE = """
import re, sys, time
from pathlib import Path
from galaxydist.evaluation.metrics import summarise
from galaxydist.evaluation.predictions import read_predictions
import scipy.optimize, scipy.stats, sklearn.metrics
started = time.process_time()
summarise(*(read_predictions(Path(path)) for path in sys.argv[1:]))
used = time.process_time() - started
# Not getrusage's, which has the parent's memory in it.
print(used, int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_summary_of_100000_predictions_takes_under_20_s_and_80_mb_more_memory(tmp_path: Path) -> None:
    used = {}
    for num in (1000, 100_000):
        logits_NK, labels_N = draw_logits(0, num, 10)
        known = np.random.default_rng(0).random(num)
        properties = {"redshift": known, "size": known, "sky_brightness": known}
        paths = []
        for split in ("test", "val"):
            paths.append(
                write_logits(tmp_path / f"{split}-{num}.parquet", logits_NK, labels_N, properties=properties, split=split)
            )
        started = time.monotonic()
        command = [sys.executable, "-c", MEASURE, *(str(file.path) for file in paths)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
        used[num] = tuple(map(float, done.stdout.split()))
        print({"galaxies": num, "processor seconds": used[num][0], "MB": used[num][1], "seconds": time.monotonic() - started})
    assert used[100_000][0] < 20
    assert used[100_000][1] - used[1000][1] < 80
