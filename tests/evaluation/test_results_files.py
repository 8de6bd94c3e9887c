"""Files, figures and tables of an evaluation."""

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from galaxydist.evaluation.metrics import Summary, metrics_from_counts, summarise
from galaxydist.evaluation.plots import (
    draw_accuracy_by_property,
    draw_confusion,
    draw_learning_curves,
    draw_per_class,
    draw_reliability,
    draw_roc_and_pr,
    save_figure,
)
from galaxydist.evaluation.results_files import read_evaluation, render_evaluation, write_evaluation
from galaxydist.evaluation.text_table import title_of
from galaxydist.galaxy import GALAXY10_CLASSES
from galaxydist.pages.contact_sheet import write_class_sheet
from galaxydist.runs.metrics_file import MetricsFile
from tests.helpers.prediction_files import draw_logits, write_logits

CONTEXT = {
    "dataset": "simulated",
    "variant": "original",
    "split": "test",
    "model": "custom_cnn",
    "recipe": "demo",
    "manifest_hash": "ab" * 32,
    "checkpoint": "step-00000120-0003",
}
TITLE = "simulated (original), test split, custom_cnn (recipe demo), N = 560"


@pytest.fixture
def metrics() -> dict[str, Any]:
    confusion_KK = np.random.default_rng(0).integers(0, 6, (10, 10)) + 30 * np.eye(10, dtype=int)
    confusion_KK[4] = 0  # a class without galaxies
    confusion_KK[0, 1] += 560 - confusion_KK.sum()
    return metrics_from_counts(confusion_KK, 500.0, GALAXY10_CLASSES)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    log = MetricsFile(tmp_path / "metrics.jsonl")
    for step in range(20, 200, 20):
        log.append(step, {"train/loss": 2.0 / step, "train/accuracy": 0.5, "train/lr": 1e-3})
        if step % 60 == 0:
            log.append(step, {"val/loss": math.nan, "val/accuracy": 0.4, "val/balanced_accuracy": 0.3})
    return log.path


def texts_of(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


def test_an_evaluation_is_written_with_its_figures_and_read_back(tmp_path: Path, metrics: dict[str, Any], log: Path) -> None:
    folder = tmp_path / "run" / "evaluation"
    assert read_evaluation(folder, "test") is None
    written = write_evaluation(folder, metrics, CONTEXT, metrics_log=log)
    assert read_evaluation(folder, "test") == written
    assert written["dataset"] == "simulated"
    assert written["balanced_accuracy"] == metrics["balanced_accuracy"]
    stems = ("learning-curves", "test-classes", "test-confusion")
    expected = {"test.json", *(f"{stem}.{suffix}" for stem in stems for suffix in ("png", "pdf"))}
    assert {path.name for path in folder.iterdir()} == expected
    for stem in stems:
        with Image.open(folder / f"{stem}.png") as image:
            assert min(image.size) > 300
            levels = np.bincount(np.asarray(image.convert("L")).ravel(), minlength=256)
            assert 0.3 < levels[255] / levels.sum() < 0.99 and levels[:128].any(), stem  # dark lines on a white page
        assert (folder / f"{stem}.pdf").read_bytes().startswith(b"%PDF")
    text = render_evaluation(written, folder)
    assert TITLE in text
    assert str(folder / "test-confusion.png") in text
    assert f"balanced accuracy {metrics['balanced_accuracy']:.3f}" in text
    row = next(line for line in text.splitlines() if line.startswith("cigar-shaped smooth"))
    assert row.split()[2:] == ["0.000", "-", "0.000", "0"]
    assert "merging (" in next(line for line in text.splitlines() if line.startswith("disturbed"))


def test_evaluation_without_figures_or_metrics_log_writes_only_the_rest(tmp_path: Path, metrics: dict[str, Any]) -> None:
    write_evaluation(tmp_path, metrics, {**CONTEXT, "split": "val"}, figures=False)
    assert [path.name for path in tmp_path.iterdir()] == ["val.json"]
    assert "figures (" not in render_evaluation(read_evaluation(tmp_path, "val") or {}, tmp_path)
    write_evaluation(tmp_path, metrics, CONTEXT, metrics_log=tmp_path / "missing.jsonl")
    assert not (tmp_path / "learning-curves.png").exists()


@pytest.mark.parametrize("text", ['{"format": 1', "[]", '{"format": 99, "confusion": []}', '{"format": 1}'])
def test_a_damaged_or_foreign_evaluation_counts_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "test.json").write_text(text)
    assert read_evaluation(tmp_path, "test") is None


def test_evaluation_json_is_written_after_the_figures(
    tmp_path: Path, metrics: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("killed here")

    monkeypatch.setattr("galaxydist.evaluation.results_files.write_json", fail)
    with pytest.raises(RuntimeError, match="killed here"):
        write_evaluation(tmp_path, metrics, CONTEXT)
    assert (tmp_path / "test-classes.pdf").exists()
    assert not (tmp_path / "test.json").exists()


def test_evaluation_figures_have_titles_classes_and_axis_labels(metrics: dict[str, Any], log: Path) -> None:
    title = title_of({**CONTEXT, **metrics})
    assert title == TITLE
    confusion, classes = draw_confusion(metrics, title), draw_per_class(metrics, title)
    for figure in (confusion, classes):
        texts = " ".join(texts_of(figure)).replace("\n", " ").replace("\N{NO-BREAK SPACE}", " ")
        assert TITLE in texts
        assert all(name in texts for name in ("edge-on without bulge", "unbarred tight spiral", "disturbed"))
    texts = texts_of(confusion)
    assert str(metrics["confusion"][0][0]) in texts
    assert len(confusion.axes) == 2
    curves = draw_learning_curves(MetricsFile(log).read(), "simulated (original), custom_cnn")
    assert [axes.get_ylabel() for axes in curves.axes] == ["loss", "accuracy", "learning rate"]
    assert {"training", "validation", "validation, balanced"} <= set(texts_of(curves))
    assert "simulated (original), custom_cnn" in texts_of(curves)


def overlapping(figure: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Pairs of (upright) texts of a figure that are drawn over each other."""
    boxes = []
    draw = matplotlib.text.Text.draw

    def draw_noted(text: Any, renderer: Any) -> None:
        if text.get_visible() and text.get_text() and not text.get_rotation():
            boxes.append((text.get_text(), text.get_window_extent(renderer).padded(-1.5)))
        draw(text, renderer)

    with monkeypatch.context() as patch:
        patch.setattr(matplotlib.text.Text, "draw", draw_noted)
        FigureCanvasAgg(figure).draw()
    return [(a, b) for i, (a, one) in enumerate(boxes) for b, other in boxes[:i] if one.overlaps(other)]


def test_evaluation_figures_have_no_overlapping_text(metrics: dict[str, Any], log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    doubled = draw_per_class(metrics, TITLE)
    doubled.text(0.5, 0.98, TITLE, ha="center")
    assert overlapping(doubled, monkeypatch) != []
    assert overlapping(draw_confusion(metrics, TITLE), monkeypatch) == []
    assert overlapping(draw_per_class(metrics, TITLE), monkeypatch) == []
    assert overlapping(draw_learning_curves(MetricsFile(log).read(), TITLE), monkeypatch) == []


@pytest.fixture
def summary(tmp_path: Path) -> Summary:
    """Of 700 galaxies in Galaxy10's classes, one of them empty, with a temperature."""
    files = {}
    for split, seed in (("val", 1), ("test", 2)):
        logits_NK, labels_N = draw_logits(seed, 700, 10, classes=9, sharpness=3.0)
        known = np.abs(np.random.default_rng(seed).normal(size=700))
        files[split] = write_logits(
            tmp_path / f"{split}.parquet",
            logits_NK,
            labels_N,
            split=split,
            properties={"redshift": known, "size": 10 * known, "sky_brightness": known / 10},
            units={"size": "arcsec", "sky_brightness": "full scale = 1"},
            class_names=GALAXY10_CLASSES,
        )
    return summarise(files["test"], files["val"])


def test_prediction_figures_have_titles_values_and_axis_labels(summary: Summary, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = summary.metrics
    reliability, areas = draw_reliability(metrics, TITLE), draw_roc_and_pr(metrics, summary.curves, TITLE)
    dependence = draw_accuracy_by_property(metrics, TITLE)
    for figure in (reliability, areas, dependence):
        assert overlapping(figure, monkeypatch) == []
        assert TITLE in " ".join(texts_of(figure)).replace("\n", " ").replace("\N{NO-BREAK SPACE}", " ")
    ece, scaled = metrics["calibration"]["ece"], metrics["calibration"]["scaled"]["ece"]
    texts = texts_of(reliability)
    assert f"as trained: ECE {ece:.3f}" in texts
    assert f"divided by T = {metrics['calibration']['temperature']['value']:.2f}: ECE {scaled:.3f}" in texts
    texts = " ".join(texts_of(areas))
    roc, precision = metrics["roc_auc"]["per_class"][8], metrics["average_precision"]["per_class"][8]
    assert f"edge-on without bulge ({roc:.3f}, {precision:.3f})" in texts
    assert "edge-on with bulge" not in texts, "a class without galaxies has no curve"
    labels = ["redshift", "half-light radius (arcsec)", "sky brightness (full scale = 1)"]
    assert [axes.get_xlabel() for axes in dependence.axes] == labels
    alone = {**metrics, "calibration": {**metrics["calibration"], "temperature": None}}
    assert len(draw_reliability(alone, TITLE).axes) == 2 and len(reliability.axes) == 4


def test_figures_of_many_classes_fit_an_image() -> None:
    """Of 65,536 pixels at most."""
    confusion_KK = np.eye(200, dtype=np.int64)
    many = metrics_from_counts(confusion_KK, 1.0, [f"class {label}" for label in range(200)])
    for figure in (draw_confusion(many, "title"), draw_per_class(many, "title")):
        assert max(figure.get_size_inches()) < 60
        assert not any(axes.texts for axes in figure.axes)


def test_roc_and_precision_recall_curves_have_their_end_points(summary: Summary) -> None:
    for curve in summary.curves[:9]:
        assert curve is not None
        assert curve.roc[:, 0].tolist() == [0, 0] and curve.roc[:, -1].tolist() == [1, 1]
        assert curve.precision_recall[0, 0] == 0 and curve.precision_recall[0, -1] == 1
        assert curve.roc.shape[1] <= 200 and (np.diff(curve.roc) >= 0).all()
        assert np.trapezoid(curve.roc[1], curve.roc[0]) > 0.7
    assert summary.curves[9] is None


def test_learning_curves_without_validation_show_only_the_loss(tmp_path: Path) -> None:
    figure = draw_learning_curves([{"step": 1, "train/loss": None}, {"step": 2, "train/loss": 1.0}], "t")
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss"]
    draw_learning_curves([{"step": 1, "other": 1.0}], "t")
    paths = save_figure(draw_learning_curves([{"step": 1, "train/loss": None}], "t"), tmp_path / "a.b")
    assert [path.name for path in paths] == ["a.b.png", "a.b.pdf"]


def test_equal_figures_are_equal_files(tmp_path: Path, metrics: dict[str, Any]) -> None:
    first = [path.read_bytes() for path in save_figure(draw_per_class(metrics, "t"), tmp_path / "a")]
    second = [path.read_bytes() for path in save_figure(draw_per_class(metrics, "t"), tmp_path / "b")]
    assert first == second


def test_class_sheet_of_noisy_images_stays_below_its_size_limit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = {f"class_{i}": [rng.integers(0, 256, (80, 90, 3), dtype=np.uint8) for _ in range(3)] for i in range(13)}
    images["class_4"] = []
    path = tmp_path / "gallery.jpg"
    write_class_sheet(path, images, "noise: three of each class", max_bytes=150_000)
    assert path.stat().st_size <= 150_000
    with Image.open(path) as image:
        assert image.width > image.height > 100
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_class_sheet_needs_images_and_is_written_small_if_they_are_too_many(tmp_path: Path) -> None:
    image = np.zeros((10, 10, 3), np.uint8)
    with pytest.raises(ValueError, match="a contact sheet needs images"):
        write_class_sheet(tmp_path / "a.jpg", {"a": []}, "t")
    write_class_sheet(tmp_path / "a.jpg", {"a": [image]}, "t", max_bytes=10)
    with Image.open(tmp_path / "a.jpg") as sheet:
        assert sheet.width < 40


def test_class_sheet_of_real_galaxies_is_wide_and_below_300_kb(real_sample: Path, tmp_path: Path) -> None:
    images = {
        name: [np.asarray(Image.open(file)) for file in sorted((real_sample / str(label)).glob("*.jpg"))[:4]]
        for label, name in enumerate(GALAXY10_CLASSES)
    }
    path = tmp_path / "classes.jpg"
    write_class_sheet(path, images, "Galaxy10 DECaLS: four galaxies of each class")
    assert path.stat().st_size < 300_000
    with Image.open(path) as image:
        assert image.width > 900
