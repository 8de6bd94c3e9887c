"""The run of `make demo`, shared: the app and each published form answer as the evaluation in the run folder did."""

import re
import tarfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import galaxydist
from galaxydist.cli.main import main
from galaxydist.evaluation.predictions import predictions_path, read_predictions, softmax
from galaxydist.serving.app.model import ServedModel, normalise, prepare
from galaxydist.serving.app.pictures import read_picture
from galaxydist.serving.app.reference_set import Reference
from tests.helpers.app_page import AppPage, running_app
from tests.helpers.page_client import PageClient
from tests.helpers.spaces import linked_environment, running_space

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
NUM_GALAXIES = 24


@dataclass(frozen=True)
class SharedDemo:
    """The demo's run, published.

    Args:
        run: the run folder.
        folder: the published folder.
        files: stored images of test galaxies.
        logits: of these galaxies, from the evaluation in the run folder.
    """

    run: Path
    folder: Path
    files: list[Path]
    logits: NDArray[np.float32]

    @property
    def probabilities(self) -> NDArray[np.float64]:
        temperature = ServedModel.open(self.folder).config.temperature
        assert temperature is not None
        return softmax(self.logits.astype(np.float64) / temperature)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> SharedDemo:
    finished = sorted(ROOT.glob("runs/demo-*/result.json"))
    if not finished:
        pytest.skip("there is no run of `make demo` in runs/")
    run, target = finished[-1].parent, tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GALAXYDIST_DATA", str(ROOT / "data"))
        assert main(["publish", str(run), str(target / "model")]) == 0
    with tarfile.open(min((ROOT / "data" / "shards" / "simulated" / "original").glob("test-*.tar"))) as tar:
        images = [*islice((member for member in tar if member.name.endswith(".jpg")), NUM_GALAXIES)]
        contents = {member.name: tar.extractfile(member) for member in images}
        for name, content in contents.items():
            assert content is not None
            (target / name).write_bytes(content.read())
    batches = read_predictions(predictions_path(run / "evaluation", "test")).batches(["id", "logits"])
    stored = {str(name): row for batch in batches for name, row in zip(batch["id"], batch["logits"], strict=True)}
    files = [target / name for name in contents]
    return SharedDemo(run, target / "model", files, np.stack([stored[path.stem] for path in files]))


def test_weights_onnx_and_program_give_the_logits_of_the_evaluation(shared: SharedDemo) -> None:
    predictions = galaxydist.load_predictor(shared.folder)([*shared.files])
    np.testing.assert_allclose(predictions.logits, shared.logits, atol=1e-4)
    model, reference = ServedModel.open(shared.folder), Reference.open(shared.folder)
    assert reference is not None
    pictures = [read_picture(path.read_bytes(), path.name) for path in shared.files]
    answers = model.predict(pictures, saliency=False)
    np.testing.assert_allclose([answer.probabilities for answer in answers], predictions.probabilities, atol=1e-4)
    assert sum(reference.novelty(answer.seen).is_unlike for answer in answers) <= 2
    form = model.config.form
    images = torch.from_numpy(np.stack([normalise(prepare(picture, form), form) for picture in pictures]))
    program = torch.export.load(shared.folder / "model.pt2").module()
    np.testing.assert_allclose(program(images).detach().numpy(), shared.logits, atol=1e-4)


@pytest.mark.browser
@pytest.mark.multiprocess
def test_the_app_of_the_demo_answers_as_the_evaluation_did(shared: SharedDemo, tmp_path: Path) -> None:
    classes = ServedModel.open(shared.folder).config.classes
    environ = {"GALAXYDIST_DATA": str(ROOT / "data")}
    with running_app([str(shared.run)], tmp_path / "log", tmp_path / "temporary", environ) as app, AppPage(app) as page:
        for path, wanted in zip(shared.files[:3], shared.probabilities, strict=False):
            page.give("#gd-drop", path)
            text = page.answer_about(path.name)
            assert page.evaluate("document.querySelector('#gd-answer h2').innerText") == classes[wanted.argmax()]
            shown = re.search(r"([\d.]+)\s%, calibrated", text)
            assert shown and float(shown[1]) == pytest.approx(100 * wanted.max(), abs=0.06)
        page.check_quiet()


def test_a_space_of_the_demo_answers_as_the_evaluation_did(shared: SharedDemo, tmp_path: Path) -> None:
    assert main(["publish", str(shared.folder), "--space", str(tmp_path / "space")]) == 0
    python = linked_environment(tmp_path / "environment")
    (tmp_path / "temporary").mkdir()
    with running_space(python, tmp_path / "space", tmp_path / "temporary") as address:
        client = PageClient(address)
        for path, wanted in zip(shared.files[:3], shared.probabilities, strict=False):
            found = client.predict(path, "demo on simulated")
            np.testing.assert_allclose([*found["probabilities"].values()], wanted, atol=1e-4)
            assert found["class"] == [*found["probabilities"]][wanted.argmax()]
