"""A published folder in timm: the same logits, from a picture that timm itself has prepared."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import galaxydist
from galaxydist.recipe.model_names import NAMED_MODELS
from galaxydist.serving.publish import PublishOptions, publish
from tests.helpers.blobs import BlobSurvey
from tests.helpers.published import train_blobs

BARE = PublishOptions(onnx=False, program=False, reference=0)
# Built by timm with arguments; the others have a head or layers that timm does not have.
IN_TIMM = {"resnet18", "resnet26", "resnet50", "vit", "vit_scratch", "reference_vit"}


def logits_of_timm(folder: Path, images: list[Image.Image]) -> tuple[dict[str, Any], np.ndarray[Any, Any]]:
    """timm's data config of a published folder, and the logits of pictures that timm prepares by it."""
    import timm

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    transform: Any = timm.data.create_transform(**config, is_training=False)
    with torch.inference_mode():
        return config, model(torch.stack([transform(image) for image in images])).numpy()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("reference_vit", marks=pytest.mark.slow),
        pytest.param("resnet18", marks=pytest.mark.slow),
        *(pytest.param(name, marks=pytest.mark.nightly) for name in NAMED_MODELS if name not in ("reference_vit", "resnet18")),
        *(
            pytest.param(f"timm/{name}", marks=pytest.mark.nightly)
            for name in ("convnext_atto", "test_efficientnet", "regnety_002", "mobilenetv3_small_050")
        ),
    ],
)
def test_timm_gives_the_logits_of_the_run_from_pictures_that_it_prepares(name: str, tmp_path: Path) -> None:
    # Stored at 64 pixels, of which the central 48 are seen: nothing is resampled.
    size = 50 if name == "reference_vit" else 48
    run, _ = train_blobs(
        tmp_path,
        BlobSurvey(num_galaxies=60, size=64),
        recipe="vit_scratch" if name == "reference_vit" else "resnet18",
        model__name=name,
        model__width=None,
        model__pretrained="false",
        data__image_size=size,
        data__crop=size / 64,
        train__epochs=1,
        model__drop_path_rate=0,
    )
    report = publish(run, tmp_path / "out", {}, BARE)
    images = [Image.fromarray(np.asarray(galaxy.image)) for galaxy in BlobSurvey(size=64).read(0, 12)]
    known = galaxydist.load_predictor(run, device="cpu")(images)
    np.testing.assert_array_equal(galaxydist.load_predictor(tmp_path / "out", device="cpu")(images).logits, known.logits)
    keys = json.loads((tmp_path / "out" / "config.json").read_text())
    assert report.loads_in_timm == ("architecture" in keys) == (name in IN_TIMM or name.startswith("timm/")), report.notes
    if not report.loads_in_timm:
        return
    config, logits = logits_of_timm(tmp_path / "out", images)
    assert np.abs(logits - known.logits).max() <= 1e-4 * max(1, np.abs(known.logits).max())
    assert (tuple(config["input_size"]), config["crop_pct"], config["interpolation"]) == ((3, size, size), size / 64, "bilinear")
    stored = keys["galaxydist"]["data"]
    assert list(config["mean"]) == stored["channel_mean"] and list(config["std"]) == stored["channel_std"]
    assert keys["label_names"] == stored["class_names"]
