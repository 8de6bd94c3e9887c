"""Runs of models that the package does not name: a repository of a hub, and a user's own function."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save

from galaxydist.cli.main import main
from galaxydist.models.hub_weights import fetch_weights
from galaxydist.recipe.schema import ModelConfig
from galaxydist.shards.writer.writer import write_shards
from galaxydist.surveys.image_folder import open_image_folder
from tests.helpers.imagenet_weights import write_lite0
from tests.helpers.mini_hub import Repository, mini_hub
from tests.helpers.runs import quick_settings, read_evaluation, run_here, without_figures

HUB_NAME = "hf-hub:me/encoder"
# Settings of recipe=custom_cnn that belong to its model.
KEPT: dict[str, object] = {"model__width": None}
# The example of the documentation.
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
SOURCE = PAGE.read_text(encoding="utf-8").split("```python\n", 1)[1].split("```", 1)[0]


# ``put_`` has no deterministic algorithm, on a CPU either; on a GPU it is some backward passes that have none.
PUT_NET = """
class PutNet(nn.Sequential):
    def forward(self, images):
        logits = super().forward(images)
        zeros = logits.new_zeros(1)
        return logits + zeros.put_(zeros.long(), logits.new_zeros(1)) if self.training else logits


def put_net(num_classes: int, image_size: int, drop_rate: float = 0.0) -> nn.Module:
    return PutNet(*small_net(num_classes, image_size, drop_rate))
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GALAXYDIST_TRUST_CODE", "0")
    path = tmp_path / "my_nets.py"
    path.write_text(SOURCE)
    yield path
    sys.modules.pop("my_nets", None)


def test_model_without_a_deterministic_algorithm_is_refused_if_one_is_asked_for(
    blobs: Path, tmp_path: Path, own_module: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own_module.write_text(f"import torch\n{SOURCE}\n{PUT_NET}")
    settings = quick_settings(blobs, tmp_path / "run", model__name="my_nets:put_net", **KEPT, train__epochs=1)
    assert run_here([*settings, "train.deterministic=true"]) == 2
    error = capsys.readouterr().err
    assert "train.deterministic=true: my_nets:put_net uses put_, for which torch has no deterministic algorithm on cpu" in error
    assert torch.get_deterministic_debug_mode() == 0
    assert run_here(settings) == 0  # the same folder


def test_own_function_trains_and_its_code_runs_elsewhere_only_if_trusted(
    blobs: Path, tmp_path: Path, own_module: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    settings = quick_settings(blobs, run_dir, model__name="my_nets:small_net", **KEPT, train__epochs=6)
    assert run_here(settings) == 0
    assert read_evaluation(run_dir)["model"] == "my_nets:small_net"
    capsys.readouterr()
    for command in (["evaluate", str(run_dir), "--tta", "d4"], ["gallery", str(run_dir)]):
        sys.modules.pop("my_nets", None)
        assert main(command) == 2
        assert "--trust-code" in capsys.readouterr().err
        assert "my_nets" not in sys.modules
        with without_figures():
            assert main([*command, "--trust-code"]) == 0, capsys.readouterr().err
    own_module.write_text(f"{SOURCE}\n# another line\n")
    more = [word for word in settings if not word.startswith("train.epochs")] + ["train.epochs=7"]
    assert run_here([*more, "resume.force=[train.epochs]"]) == 2
    assert "its source" in capsys.readouterr().err
    assert run_here([*more, "resume.force=[train.epochs,model.name]"]) == 0


def test_repository_of_a_hub_trains_and_its_run_needs_its_files_no_more(
    blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GALAXYDIST_DATA", str(tmp_path / "data"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    torch.manual_seed(0)
    state = timm.create_model("test_convnext", num_classes=0).state_dict()
    facts = {"mean": [0.2, 0.3, 0.4], "std": [0.5, 0.6, 0.7], "classifier": "head.fc", "input_size": [3, 32, 32]}
    content = {"architecture": "test_convnext", "num_classes": 0, "pretrained_cfg": facts}
    repository = Repository(
        {"config.json": json.dumps(content).encode(), "model.safetensors": save(state)}, {"license": "cc-by-4.0"}
    )
    weights_dir = tmp_path / "data" / "weights"
    with mini_hub({"me/encoder": repository}) as endpoint:
        fetch_weights(ModelConfig(name=HUB_NAME), weights_dir, endpoint=endpoint)
    run_dir = tmp_path / "run"
    settings = quick_settings(blobs, run_dir, model__name=HUB_NAME, model__pretrained="true", **KEPT, train__epochs=2)
    assert run_here(settings) == 0
    assert "licence cc-by-4.0" in capsys.readouterr().err
    shutil.rmtree(weights_dir)
    with without_figures():
        assert main(["evaluate", str(run_dir), "--tta", "d4"]) == 0
    (checkpoint, *_) = sorted(run_dir.glob("checkpoints/step-*/checkpoint.json"))
    kept = json.loads(checkpoint.read_text())["content"]["state"]
    assert kept["model"]["licence"] == "cc-by-4.0" and kept["model"]["architecture"] == "test_convnext"
    assert kept["data"]["channel_mean"] == [0.2, 0.3, 0.4]
    capsys.readouterr()
    assert run_here(settings) == 2
    assert f"galaxydist weights fetch {HUB_NAME}" in capsys.readouterr().err


@pytest.mark.slow
def test_imagenet_weights_beat_random_weights_on_few_real_galaxies(
    tmp_path: Path, real_sample: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 galaxies of each of four classes to train on, 30 others to test on; the published weights are real ones."""
    monkeypatch.setenv("GALAXYDIST_DATA", str(tmp_path / "data"))
    write_lite0(tmp_path / "data" / "weights")
    for label in "2457":
        files = sorted((real_sample / label).glob("*.jpg"), key=lambda path: int(path.stem))
        for split, chosen in (("train", files[:24]), ("test", files[60:90])):
            (tmp_path / "images" / split / label).mkdir(parents=True)
            for file in chosen:
                (tmp_path / "images" / split / label / file.name).symlink_to(file)
    manifest = write_shards(open_image_folder(tmp_path / "images"), tmp_path / "shards", workers=1)
    accuracies = {}
    for is_pretrained in ("true", "false"):
        run_dir = tmp_path / is_pretrained
        settings = {
            "recipe": "efficientnet_lite0",
            "data.manifest": manifest.path,
            "run.dir": run_dir,
            "data.image_size": 64,
            "model.pretrained": is_pretrained,
            "model.normalization": "pretrained",
            "train.batch_size": 24,
            "train.epochs": 8,
            "train.ema": 0,
            "eval.checkpoint": "last",
            "eval.figures": "false",
            "data.num_streams": 8,
        }
        assert run_here([f"{key}={value}" for key, value in settings.items()]) == 0
        accuracies[is_pretrained] = read_evaluation(run_dir)["accuracy"]
    assert accuracies["true"] > 0.6 and accuracies["true"] > accuracies["false"] + 0.2, accuracies
