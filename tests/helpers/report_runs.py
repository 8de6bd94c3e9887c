"""Runs for tests of the report: a small sweep as its folders look when it is done, with everything that a report shows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from galaxydist.atomic_files import read_json, write_json
from galaxydist.evaluation.calibration import NUM_BINS
from galaxydist.gallery.gallery import FORMAT_VERSION, KINDS
from galaxydist.runs.folder import RunFolder
from tests.helpers.trial_folders import STEP, write_trial

MODELS = ("resnet18", "custom_cnn", "vit")
REACHED = {"resnet18": 0.5, "custom_cnn": 0.7, "vit": 0.75}
BATCH_SIZE = 64


def write_sweep(
    root: Path,
    *,
    models: Sequence[str] = MODELS,
    seeds: Sequence[int] = (0, 1),
    dataset: str = "simulated",
    num_galaxies: int = 200,
) -> list[RunFolder]:
    """Each model on both variants with each seed, judged on both test sets."""
    runs = []
    for model in models:
        for variant in ("original", "balanced"):
            for seed in seeds:
                reached = REACHED.get(model, 0.6) - (0.1 if variant == "balanced" else 0.0)
                run = write_trial(
                    root / f"{model.replace('/', '-')}-{variant}-{seed}",
                    [f"recipe={model}", f"data.variant={variant}", f"seed={seed}", f"train.batch_size={BATCH_SIZE}"],
                    accuracy={"original": reached, "balanced": reached - 0.05},
                    dataset=dataset,
                    num_galaxies=num_galaxies,
                    validation=None,
                )
                write_logs(run, reached)
                write_calibration(run)
                runs.append(run)
    return runs


def write_logs(run: RunFolder, reached: float, *, devices: int = 2) -> None:
    """Five epochs of metrics and timing."""
    for epoch in range(1, 6):
        step = STEP * epoch // 5
        share = reached * (1 - 0.5**epoch)
        run.metrics.append(step, {"epoch": float(epoch), "train/loss": 2 - share, "train/accuracy": share})
        validation = {"val/loss": 2.1 - share, "val/accuracy": share, "val/balanced_accuracy": share}
        run.metrics.append(step, {"epoch": float(epoch), **validation})
        speed = {"time/img_s": 400.0, "time/img_s_device": 400.0 / devices, "time/data_wait": 0.01, "memory/rss_gb": 1.5}
        run.timing.append(step, speed)


def write_calibration(run: RunFolder) -> None:
    """What a full evaluation says of its confidence, in place of one that counted alone."""
    path = run.evaluation_dir / "test.json"
    bins = [
        {
            "low": n / NUM_BINS,
            "high": (n + 1) / NUM_BINS,
            "count": n,
            "confidence": (n + 0.5) / NUM_BINS,
            "accuracy": n / NUM_BINS,
        }
        for n in range(NUM_BINS)
    ]
    fitted = {"value": 1.25, "count": 50, "loss_before": 1.0, "loss_after": 0.9, "at_bound": False}
    calibration = {
        "ece": 0.08,
        "reliability": bins,
        "temperature": fitted,
        "scaled": {"loss": 0.9, "ece": 0.02, "reliability": bins},
    }
    write_json(path, {**read_json(path), "calibration": calibration})


def write_gallery_of(run: RunFolder) -> None:
    """A gallery of the run's own predictions, with sheets of one colour."""
    content: dict[str, Any] = {"format": FORMAT_VERSION, "split": "test"}
    for kind in KINDS:
        Image.new("RGB", (800, 600), "darkslateblue").save(run.evaluation_dir / f"test-gallery-{kind}.jpg")
        content[kind] = {"caption": f"What the sheet of {kind} shows."}
    write_json(run.evaluation_dir / "test-gallery.json", content)
