"""Exported files give PyTorch's logits, embedding and saliency, for any number of galaxies, and hold no path of the machine."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from galaxydist.errors import UserError
from galaxydist.loading.training_data import StoredImages, TrainingData
from galaxydist.models.build import build_model
from galaxydist.models.features import extract_features
from galaxydist.models.registry import MODEL_NAMES, architecture_of
from galaxydist.models.saliency import GRAD_CAM, ROLLOUT, attention_rollout, grad_cam
from galaxydist.prediction.trained_model import TrainedModel, open_trained_model
from galaxydist.recipe.resolve import load_recipe
from galaxydist.recipe.schema import ModelConfig
from galaxydist.serving.app.onnx_runtime import import_onnxruntime
from galaxydist.serving.model_export import checked_galaxies, export_onnx, export_program
from tests.helpers.published import PublishedRun

# And custom_cnn, as a published run. One of each kind of saliency map.
IN_CI = ("resnet18", "reference_vit")
TIMM = (
    "timm/convnext_atto",
    "timm/efficientnet_lite0",
    "timm/swin_tiny_patch4_window7_224",
    "timm/maxvit_rmlp_pico_rw_256",
    "timm/mobilenetv3_small_050",
    "timm/regnety_002",
    "timm/densenet121",
    "timm/deit_tiny_patch16_224",
    "timm/eva02_tiny_patch14_224",
    "timm/coatnet_nano_rw_224",
    "timm/hrnet_w18_small",
)
NUM_CLASSES = 5


def trained_model(model: nn.Module, name: str, size: int) -> TrainedModel:
    recipe = load_recipe(["recipe=custom_cnn", f"data.image_size={size}", "model.name=custom_cnn"]).recipe
    recipe = recipe.model_copy(update={"model": ModelConfig(name=name)})
    stored = StoredImages("none", size, "png")
    classes = tuple(f"class {number}" for number in range(NUM_CLASSES))
    data = TrainingData("0" * 64, classes, (0.2, 0.2, 0.2), (0.1, 0.1, 0.1), stored)
    return TrainedModel(Path("none"), recipe, model, "none", 0, data, stored, None)


def lively_model(name: str, size: int) -> nn.Module:
    """Random weights, and scales of a trained network's order: those of residual branches start at zero."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(name=name), NUM_CLASSES, size).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() == 1 and parameter_name.endswith("weight"):
            nn.init.normal_(parameter, 0.5, 0.3)
    return model


def real_galaxies(sample: Path, count: int, size: int) -> Tensor:
    """Normalised."""
    files = sorted(sample.glob("*/*.jpg"))[:: 999 // count][:count]
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB").resize((size, size))) for path in files])
    return ((torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - 0.2) / 0.1).contiguous()


def answers(path: Path, images_BCHW: Tensor) -> dict[str, Tensor]:
    session = import_onnxruntime().InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(names, {"images": images_BCHW.numpy()})), strict=True))


def expected_maps(model: nn.Module, name: str, method: str, images_BCHW: Tensor) -> Tensor:
    if method == ROLLOUT:
        return attention_rollout(model, images_BCHW)[:, None]
    layer = model.get_submodule(str(architecture_of(ModelConfig(name=name), model).last_map))
    labels = [torch.full((len(images_BCHW),), label) for label in range(NUM_CLASSES)]
    return torch.stack([grad_cam(model, layer, images_BCHW, labels_B) for labels_B in labels], dim=1)


def check_outputs(model: nn.Module, name: str, path: Path, method: str | None, images_BCHW: Tensor) -> None:
    for count in (1, 3, 8, 17):
        some_BCHW = images_BCHW[:count]
        found = answers(path, some_BCHW)
        with torch.no_grad():
            expected = {"logits": model(some_BCHW), "embedding": extract_features(model, some_BCHW)}
        if method is not None:
            expected["saliency"] = expected_maps(model, name, method, some_BCHW)
            assert expected["saliency"].any(), "a map to compare with"
        assert list(found) == list(expected)
        for output, tensor in expected.items():
            torch.testing.assert_close(found[output], tensor, rtol=1e-4, atol=1e-4 * max(1.0, float(tensor.abs().max())))
            if output == "saliency":  # small numbers
                torch.testing.assert_close(found[output], tensor, rtol=0, atol=1e-4 * float(tensor.abs().max()))


@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(name, marks=pytest.mark.slow) for name in IN_CI),
        *(pytest.param(name, marks=pytest.mark.nightly) for name in (*MODEL_NAMES, *TIMM) if name not in IN_CI),
    ],
)
def test_every_architecture_is_exported_with_its_saliency(
    name: str, tmp_path: Path, real_sample: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    size = 56 if "patch14" in name else 64
    model = lively_model(name, size)
    images_BCHW = real_galaxies(real_sample, 17, size)
    capfd.readouterr()
    recwarn.clear()
    found = export_onnx(trained_model(model, name, size), tmp_path / "model.onnx", {"title": "a"}, images_BCHW[:8])
    difference = export_program(trained_model(model, name, size), tmp_path / "model.pt2", images_BCHW[:8])
    assert capfd.readouterr() == ("", "") and not [str(one.message) for one in recwarn.list]
    is_plain_vit = name.rpartition("/")[2].startswith(("vit", "reference_vit", "deit", "eva"))
    has_no_map = "hrnet" in name  # its last feature is a list of maps
    assert found.saliency == (ROLLOUT if is_plain_vit else None if has_no_map else GRAD_CAM)
    assert max(found.max_difference, difference) <= 1e-4
    check_outputs(model, name, tmp_path / "model.onnx", found.saliency, images_BCHW)
    with capfd.disabled():  # the table of docs/benchmarks.md
        print(f"\n| {name} | {found.saliency} | {found.max_difference:.0e} | {difference:.0e} |")


def test_published_files_know_the_model_and_no_path_of_the_machine(published_run: PublishedRun) -> None:
    trained = open_trained_model(published_run.run_dir, {})
    session = import_onnxruntime().InferenceSession(published_run.folder / "model.onnx")
    facts: dict[str, str] = session.get_modelmeta().custom_metadata_map
    assert facts["saliency"] == GRAD_CAM and json.loads(facts["saliency_size"]) == [32, 32]
    assert json.loads(facts["classes"]) == list(trained.class_names) and facts["torch"] == torch.__version__
    assert session.get_inputs()[0].shape == ["batch", 3, 32, 32]
    for name in ("model.onnx", "model.pt2"):
        data = (published_run.folder / name).read_bytes()
        for path in (Path(torch.__file__).parents[1], Path(__file__).parents[2], published_run.run_dir, Path.home()):
            assert str(path).encode() not in data
        assert b".py" not in data


def test_program_runs_where_galaxydist_is_not_installed(published_run: PublishedRun, tmp_path: Path) -> None:
    trained = open_trained_model(published_run.run_dir, {})
    images_BCHW = checked_galaxies(trained, {})
    np.save(tmp_path / "images.npy", images_BCHW.numpy())
    script = (
        "import sys, numpy, torch; folder, program = sys.argv[1:]; images = torch.from_numpy(numpy.load(folder + '/images.npy'));"
        "model = torch.export.load(program).module();"
        "numpy.save(folder + '/logits.npy', torch.cat([model(images[:1]), model(images[1:])]).detach().numpy());"
        "assert 'galaxydist' not in sys.modules"
    )
    command = [sys.executable, "-I", "-c", script, str(tmp_path), str(published_run.folder / "model.pt2")]
    subprocess.run(command, check=True, timeout=240, cwd=tmp_path)
    with torch.no_grad():
        expected = trained.model.eval()(images_BCHW)
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "logits.npy")), expected, rtol=1e-4, atol=1e-4)


def test_galaxies_to_compare_on_are_stored_ones_or_simulated(published_run: PublishedRun) -> None:
    trained = open_trained_model(published_run.run_dir, {})
    stored, drawn = checked_galaxies(trained, {}), checked_galaxies(trained)
    assert stored.shape == drawn.shape == (8, 3, 32, 32) and not torch.equal(stored, drawn)
    moved = dataclasses.replace(trained, trained_on=dataclasses.replace(trained.trained_on, manifest_hash="1" * 64))
    assert torch.equal(checked_galaxies(moved, {}), drawn)


class Counting(nn.Module):
    """A graph that depends on the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, NUM_CLASSES)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        logits_BK: Tensor = self.head(images_BCHW.mean(dim=(2, 3)))
        return logits_BK * 2 if bool(images_BCHW.sum() > 0) else logits_BK


class Huge(Counting):
    """Logits of which 1e-4 is below the last bit."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        logits_BK: Tensor = self.head(images_BCHW.mean(dim=(2, 3)))
        return logits_BK * 1e6


class NotANumber(Counting):
    def forward(self, images_BCHW: Tensor) -> Tensor:
        logits_BK: Tensor = self.head(images_BCHW.mean(dim=(2, 3)))
        return logits_BK / 0 - logits_BK / 0


@pytest.mark.parametrize(
    ("model", "words"), [(Counting(), "cannot be exported"), (NotANumber(), "does not give PyTorch's logits")]
)
def test_model_that_cannot_be_exported_is_an_error_that_leaves_no_file(model: nn.Module, words: str, tmp_path: Path) -> None:
    trained = trained_model(model.eval(), "tests.serving.own:build", 16)
    images_BCHW = torch.randn(2, 3, 16, 16)
    calls: list[tuple[Any, str]] = [
        (lambda path: export_onnx(trained, path, {}, images_BCHW), "--no-onnx"),
        (lambda path: export_program(trained, path, images_BCHW), "--no-program"),
    ]
    for export, option in calls:
        with pytest.raises(UserError, match=words) as caught:
            export(tmp_path / "model")
        assert option in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_huge_logits_are_compared_relative_to_the_largest(tmp_path: Path) -> None:
    trained = trained_model(Huge().eval(), "tests.serving.own:build", 16)
    assert 0 < export_onnx(trained, tmp_path / "model.onnx", {}, torch.randn(64, 3, 16, 16)).max_difference <= 1e-6
