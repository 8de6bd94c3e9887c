"""The weights in the package: small files of the stated hash that still know simulated galaxies of another seed."""

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from galaxydist.checkpoints import store
from galaxydist.loading.augment import Normalise
from galaxydist.models.build import build_model, evaluation_mode, input_statistics
from galaxydist.models.hub_weights import SHIPPED_DIR, shipped_path
from galaxydist.recipe.resolve import load_recipe
from galaxydist.runs.folder import RunFolder
from galaxydist.shards.writer.writer import write_shards
from galaxydist.surveys.simulate.survey import draw_rows, plan_survey
from tests.helpers.blobs import BlobSurvey
from tests.helpers.runs import quick_settings, run_here

CARD = SHIPPED_DIR / "README.md"
NETWORKS = {"custom_cnn": ("model.width=18",), "d4_cnn": ("model.width=32",)}


@pytest.fixture(scope="module")
def simulated() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """200 galaxies, equally many of each class, of a seed that no network was trained on."""
    plan = plan_survey(200, 20_261_129, balanced=True)
    return draw_rows(plan, workers=1), plan.labels


@pytest.mark.parametrize("name", NETWORKS)
def test_shipped_network_knows_simulated_galaxies_of_another_seed(
    name: str, simulated: tuple[NDArray[np.uint8], NDArray[np.int64]]
) -> None:
    """It fails if the file, the model's code, the normalisation or the simulator drift apart; by chance, 10 % would be right."""
    overrides = [f"model.name={name}", *NETWORKS[name], "model.pretrained=true"]
    recipe = load_recipe(["recipe=simulated_start", *overrides]).recipe
    model = build_model(recipe.model, 10, recipe.data.image_size)
    statistics = input_statistics(recipe.model)
    assert statistics is not None
    normalise = Normalise(*statistics, recipe.data.image_size, recipe.data.crop)
    images_BHWC, labels_B = simulated
    with evaluation_mode(model), torch.inference_mode():
        logits_BK = torch.cat([model(normalise(part)) for part in torch.split(torch.from_numpy(images_BHWC), 50)])
    accuracy = float((logits_BK.argmax(1).numpy() == labels_B).mean())
    assert accuracy >= 0.75


@pytest.mark.parametrize("name", NETWORKS)
def test_shipped_file_is_small_and_has_the_hash_of_its_card(name: str) -> None:
    data = shipped_path(name).read_bytes()
    assert len(data) < 2_000_000
    assert hashlib.sha256(data).hexdigest() in re.findall(r"[0-9a-f]{64}", CARD.read_text())


def test_recipe_small_trains_two_steps_from_the_shipped_weights_on_other_classes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = write_shards(BlobSurvey(num_galaxies=80, size=64), tmp_path / "shards")
    own = {"recipe": "small", "model__width": None, "optim__lr": None, "data__image_size": None, "train__epochs": 1}
    assert run_here(quick_settings(manifest.path, tmp_path / "run", **own)) == 0
    assert "its head does not fit this model's classes" in caplog.text, "three classes, not ten"
    checkpoint = store.load(RunFolder(tmp_path / "run").checkpoints_dir, groups=())
    assert checkpoint is not None and checkpoint.step == 2
