"""The reference regimes: their networks and numbers of weights, and ``recipe=reference/NAME`` wherever a recipe is named."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from galaxydist.cli.main import main
from galaxydist.cluster.snapshot import take_snapshot
from galaxydist.cluster.submit import build_request, job_arguments
from galaxydist.cluster.sweep import read_sweep, resolve
from galaxydist.models.build import build_model
from galaxydist.models.hub_weights import weights_file
from galaxydist.models.reference import CNN_CHANNELS, MlpHead
from galaxydist.recipe.identity import run_name
from galaxydist.recipe.resolve import load_recipe
from galaxydist.recipe.schema import ModelConfig, Recipe
from tests.helpers.model_names import marked
from tests.helpers.runs import quick_settings, run_here

# Weights that are trained, and all. Worked out by hand from the layers; see the tests below for the CNN, the ViT and the heads.
WEIGHTS = {
    "resnet18": (512 * 10 + 10, 11_181_642),
    "resnet26": (2048 * 10 + 10, 13_966_666),
    "resnet50": (2048 * 10 + 10, 23_528_522),
    "vgg16": (25088 * 512 + 512 + 512 * 256 + 256 + 256 * 10 + 10, 27_694_154),
    "vgg19": (25088 * 512 + 512 + 512 * 10 + 10, 32_875_082),
    "custom_cnn": (1_711_306, 1_711_306),
    "vit": (5_238_794, 5_238_794),
}
# At their own size, forward and backward, on one core.
QUICK = ("resnet18", "vit")


def recipe_of(name: str) -> Recipe:
    return load_recipe([f"recipe=reference/{name}"]).recipe


def build(name: str) -> nn.Module:
    """The recipe's model with random weights where published ones would stand."""
    recipe = recipe_of(name)
    torch.manual_seed(0)
    config = recipe.model.model_copy(update={"pretrained": False})
    return build_model(config, 10, recipe.data.image_size)


@pytest.mark.parametrize("name", WEIGHTS)
def test_reference_recipes_have_the_published_regime(name: str) -> None:
    recipe = recipe_of(name)
    from_scratch = name in ("custom_cnn", "vit")
    assert recipe.model.pretrained == recipe.model.freeze_backbone == (not from_scratch)
    assert recipe.data.image_size == {"vit": 200, "custom_cnn": 256}.get(name, 224) and recipe.data.crop == 1.0
    assert recipe.train.patience > 0 and recipe.eval.checkpoint == "best"


@pytest.mark.parametrize("name", WEIGHTS)
def test_reference_models_have_the_expected_trained_and_total_weights(name: str) -> None:
    model = build(name)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert (trained, sum(parameter.numel() for parameter in model.parameters())) == WEIGHTS[name]


@pytest.mark.parametrize("name", marked(WEIGHTS, QUICK))
def test_step_of_a_reference_model_changes_exactly_its_trainable_parameters(name: str) -> None:
    model, size = build(name), recipe_of(name).data.image_size
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    logits_BK = model(torch.randn(2, 3, size, size))
    nn.functional.cross_entropy(logits_BK, torch.tensor([3, 7])).backward()
    optimizer.step()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {key for key, parameter in model.named_parameters() if parameter.requires_grad}, "no statistic moves either"
    assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())


def test_reference_cnn_has_5_convolutions_without_normalisation() -> None:
    model = build("custom_cnn")
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert [(conv.in_channels, conv.out_channels) for conv in convolutions] == [
        (3, 512), (512, 256), (256, 128), (128, 128), (128, 64),
    ]  # fmt: skip
    assert CNN_CHANNELS == (512, 256, 128, 128, 64)
    assert not any("Norm" in type(module).__name__ for module in model.modules()) and not list(model.buffers())
    sizes = [9 * a * b + b for a, b in zip((3, *CNN_CHANNELS), CNN_CHANNELS, strict=False)]
    assert sum(sizes) + 64 * 10 + 10 == WEIGHTS["custom_cnn"][0]


def test_reference_cnn_initialisation_preserves_the_second_moment() -> None:
    """He et al. 2015: each layer of ReLUs passes on the second moment that it is given."""
    torch.manual_seed(0)
    model = build("custom_cnn").requires_grad_(False)
    x = torch.randn(2, 3, 32, 32)
    for layer in model.get_submodule("features"):  # type: ignore[attr-defined]
        if isinstance(layer, nn.Conv2d):
            outside, x = x, layer(x)
            assert x[:, :, 1:-1, 1:-1].square().mean().item() == pytest.approx(2 * outside.square().mean().item(), rel=0.3)
        elif isinstance(layer, nn.ReLU):
            x = layer(x)


def test_reference_vit_has_8_by_8_patches_and_6_layers_of_width_256() -> None:
    model = build("vit")
    assert model.get_submodule("patch_embed").get_parameter("proj.weight").shape == (256, 3, 25, 25)
    assert model.get_parameter("pos_embed").shape == (1, 1 + 8 * 8, 256)
    blocks = list(model.get_submodule("blocks").children())
    assert len(blocks) == 6 and all(block.get_submodule("attn").num_heads == 8 for block in blocks)  # type: ignore[comparison-overlap]
    block = 4 * 256**2 + 4 * 256 + 8 * 256**2 + 5 * 256 + 4 * 256
    assert 25 * 25 * 3 * 256 + 256 + 65 * 256 + 256 + 6 * block + 2 * 256 + 2570 == WEIGHTS["vit"][0]


def test_reference_vggs_have_no_batch_norm_and_heads_of_3_and_2_layers() -> None:
    for name, layers in (("vgg16", [(25088, 512), (512, 256), (256, 10)]), ("vgg19", [(25088, 512), (512, 10)])):
        model = build(name)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
        assert [(layer.in_features, layer.out_features) for layer in linear] == layers
        assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [0.5] * (len(layers) - 1)


def test_mlp_head_pools_and_applies_its_linear_layers_with_dropout() -> None:
    torch.manual_seed(0)
    head = MlpHead(6, 4, (5, 3), pool_size=2, drop_rate=0.3).eval()
    features_BCHW = torch.randn(7, 6, 4, 4)
    first, second, last = (layer for layer in head.layers if isinstance(layer, nn.Linear))
    pooled_BD = features_BCHW.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(4, 5)).flatten(1)
    torch.testing.assert_close(head(features_BCHW), last(second(first(pooled_BD).relu()).relu()))
    assert (first.in_features, second.in_features, last.in_features, last.out_features) == (24, 5, 3, 4)
    assert head(torch.randn(2, 6, 1, 1)).shape == head(torch.randn(2, 6, 9, 9)).shape == (2, 4)
    assert not torch.equal(head.train()(features_BCHW), head(features_BCHW)), "dropout"
    single = MlpHead(6, 4, drop_rate=0.3)
    assert [type(layer) for layer in single.layers] == [nn.Dropout, nn.Linear]


@pytest.mark.parametrize("name", WEIGHTS)
def test_plan_of_reference_recipes_counts_trained_and_frozen_weights(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", f"recipe=reference/{name}", "--json", "--data-dir", str(tmp_path)]) == 0
    plan = json.loads(capsys.readouterr().out)
    trained, total = WEIGHTS[name]
    assert (plan["recipe"], plan["num_trained"], plan["num_frozen"]) == (f"reference-{name}", trained, total - trained)
    # AdamW keeps two numbers a trained weight; of frozen layers nothing is kept for the way back.
    assert plan["memory"]["optimizer"] == pytest.approx(8 * trained, rel=0.01)
    assert plan["memory"]["activations"] < (60e9 if name == "custom_cnn" else 5e9)


def test_reference_recipes_are_listed_shown_and_fetched_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # the recipes that ship are found anywhere
    assert main(["recipes"]) == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert {f"reference/{name}" for name in WEIGHTS} <= listed
    assert main(["recipes", "reference/vgg16"]) == 0
    assert "; run folder reference-vgg16-" in capsys.readouterr().out
    file = weights_file(ModelConfig(name="reference_vgg16"), tmp_path / "weights")
    file.parent.mkdir()
    file.touch()  # what is there is not fetched again
    assert main(["weights", "fetch", "recipe=reference/vgg16", "--data-dir", str(tmp_path)]) == 0
    source = "source: timm/vgg16.tv_in1k; licence: bsd-3-clause"
    assert capsys.readouterr().out == f"weights of reference_vgg16: {file}\n{source}\n"
    assert file.name == "vgg16.tv_in1k.safetensors"
    assert main(["weights", "fetch", "recipe=reference/vit", "--data-dir", str(tmp_path)]) == 2
    assert "reference_vit has no published weights" in capsys.readouterr().err


def test_a_job_reads_the_same_recipe_from_its_snapshot(tmp_path: Path) -> None:
    """By another path and from another folder it is the same run: the same name, the same hash."""
    resolved = load_recipe(["recipe=reference/vit", "seed=3"])
    request = build_request(resolved, ["recipe=reference/vit", "seed=3"])
    assert request.run_dir.name == run_name(resolved.recipe) and request.run_dir.name.startswith("reference-vit-")
    code = take_snapshot(tmp_path / "code", {request.recipe_name: request.recipe_path})
    again = load_recipe(job_arguments(request, code)).recipe
    assert again.name == "reference-vit" and run_name(again) == request.run_dir.name
    assert (code / "recipes" / "reference" / "vit.yaml").is_file() and (code / "recipes" / "vit.yaml").is_file()
    elsewhere = load_recipe([f"recipe={code / 'recipes' / 'reference' / 'vit.yaml'}"], folders=[code / "recipes"]).recipe
    assert elsewhere.name == "reference-vit"


def test_sweep_of_vit_and_reference_vit_gives_distinct_labels_and_folders(tmp_path: Path) -> None:
    (tmp_path / "both.yaml").write_text("grid: {recipe: [vit, reference/vit], seed: [0, 1]}\n")
    trials = resolve(read_sweep(tmp_path / "both.yaml"))
    assert [trial.label for trial in trials] == [
        *("recipe=vit seed=0", "recipe=vit seed=1", "recipe=reference/vit seed=0", "recipe=reference/vit seed=1")
    ]
    assert [trial.name.rpartition("-")[0] for trial in trials] == ["vit", "vit", "reference-vit", "reference-vit"]
    assert len({trial.run_dir for trial in trials}) == 4 and {trial.run_dir.parent for trial in trials} == {
        Path.cwd() / "runs" / "both"
    }


@pytest.mark.slow
def test_reference_recipe_trains_and_is_evaluated_by_its_name(
    blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    few = {"recipe": "reference/vit", "model__width": None, "data__image_size": 50, "train__epochs": 1, "optim__lr": 1e-3}
    words = [word for word in quick_settings(blobs, tmp_path, **few) if not word.startswith("run.dir=")]
    assert run_here(words) == 0
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name.startswith("reference-vit-") and (run_dir / "result.json").is_file()
    capsys.readouterr()
    assert main(["evaluate", *words]) == 0
    assert "accuracy" in capsys.readouterr().out
    evaluation = json.loads((run_dir / "evaluation" / "test.json").read_text())
    assert (evaluation["recipe"], evaluation["model"]) == ("reference-vit", "reference_vit")
