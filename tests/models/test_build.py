"""Every architecture is built, takes its images, and refuses what it has no use for."""

from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from galaxydist.errors import UserError
from galaxydist.models.build import build_model, input_statistics
from galaxydist.models.custom_cnn import CustomCNN, num_groups
from galaxydist.models.param_groups import no_decay_names, parameter_groups
from galaxydist.models.registry import MODEL_NAMES
from galaxydist.models.weights import write_weights
from galaxydist.recipe.model_names import NAMED_MODELS
from galaxydist.recipe.schema import ModelConfig, ModelName


def test_registry_has_the_named_models_of_recipes() -> None:
    assert NAMED_MODELS == MODEL_NAMES


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("custom_cnn", 2.8),
        ("d4_cnn", 0.348),
        ("resnet18", 11.2),
        ("resnet26", 14.0),
        ("resnet50", 23.5),
        ("vgg16", 14.7),
        ("vgg19", 20.0),
        ("vit", 21.6),
        ("vit_scratch", 21.6),
        ("reference_cnn", 1.711),
        ("reference_vit", 5.24),
        pytest.param("reference_vgg16", 27.7, marks=pytest.mark.slow),
        pytest.param("reference_vgg19", 32.9, marks=pytest.mark.slow),
    ],
)
def test_every_model_gives_finite_logits_and_gradients(name: ModelName, millions: float) -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(name=name), 10, 64)
    assert model.training
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=0.03)
    logits_BK = model(torch.randn(2, 3, 64, 64))
    assert logits_BK.shape == (2, 10)
    nn.functional.cross_entropy(logits_BK, torch.tensor([0, 9])).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{parameter_name} is not used"
        assert torch.isfinite(parameter.grad).all(), parameter_name


@pytest.mark.parametrize("image_size", [16, 50, 129])
@pytest.mark.parametrize("name", ["custom_cnn", "d4_cnn", "resnet18", "vit"])
def test_models_accept_any_image_size_from_16_pixels(name: ModelName, image_size: int) -> None:
    model = build_model(ModelConfig(name=name), 3, image_size).eval()
    assert model(torch.randn(2, 3, image_size, image_size)).shape == (2, 3)


def test_vit_accepts_other_image_sizes_than_that_of_the_recipe() -> None:
    model = build_model(ModelConfig(name="vit"), 3, 64).eval()
    assert model(torch.randn(1, 3, 96, 96)).shape == (1, 3)


def test_the_same_seed_builds_the_same_weights() -> None:
    def build() -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        return build_model(ModelConfig(name="custom_cnn", width=8), 10, 64).state_dict()

    assert all(torch.equal(a, b) for a, b in zip(build().values(), build().values(), strict=True))


def test_larger_model_width_gives_more_parameters() -> None:
    narrow, wide = (build_model(ModelConfig(name="custom_cnn", width=width), 10, 64) for width in (8, 16))
    assert sum(p.numel() for p in wide.parameters()) > 3 * sum(p.numel() for p in narrow.parameters())


def test_vit_of_size_base_has_86_million_parameters() -> None:
    with torch.device("meta"):
        base = build_model(ModelConfig(name="vit", size="base"), 10, 32)
    assert sum(p.numel() for p in base.parameters()) == pytest.approx(85.7e6, rel=0.01)


def test_drop_rates_reach_the_model() -> None:
    with torch.device("meta"):
        for name in MODEL_NAMES:
            model = build_model(ModelConfig(name=name, drop_rate=0.4), 10, 32)
            dropout = [m.p for m in model.modules() if isinstance(m, nn.Dropout)] + [getattr(model, "drop_rate", 0)]
            assert 0.4 in dropout, name
        for name in ("resnet18", "vit", "vit_scratch"):
            model = build_model(ModelConfig(name=name, drop_path_rate=0.3), 10, 32)
            assert any(type(m).__name__ == "DropPath" for m in model.modules()), name


@pytest.mark.parametrize(
    ("config", "image_size", "words"),
    [
        (ModelConfig(name="reference_cnn"), 24, "data.image_size=24: reference_cnn needs at least 32"),
        (ModelConfig(name="reference_vit"), 24, "data.image_size=24: reference_vit needs at least 25"),
        (ModelConfig(name="reference_vgg16", drop_path_rate=0.1), 64, "model.drop_path_rate=0.1"),
        (ModelConfig(name="reference_vit", pretrained=True), 64, "reference_vit has no published weights"),
        (ModelConfig(name="vgg16"), 24, "data.image_size=24: vgg16 needs at least 32"),
        (ModelConfig(name="vgg16", drop_path_rate=0.1), 64, "model.drop_path_rate=0.1"),
        (ModelConfig(name="vit_scratch", pretrained=True), 64, "vit_scratch has no published weights"),
    ],
)
def test_build_model_refuses_settings_the_architecture_does_not_support(config: ModelConfig, image_size: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_model(config, 10, image_size)


def test_build_model_lists_all_problems_in_one_message() -> None:
    with pytest.raises(UserError, match=r"(?s)image_size=20.*drop_path_rate=0\.2"):
        build_model(ModelConfig(name="vgg19", drop_path_rate=0.2), 10, 20)


def test_published_weights_bring_their_normalisation() -> None:
    assert input_statistics(ModelConfig(name="resnet50")) is None
    assert input_statistics(ModelConfig(name="custom_cnn")) is None
    assert input_statistics(ModelConfig(name="vgg16", pretrained=True)) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert input_statistics(ModelConfig(name="vit", pretrained=True)) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_normalisation_of_the_data_or_of_published_weights_can_be_forced(tmp_path: Path) -> None:
    own = tmp_path / "w.safetensors"
    write_weights(own, {"head.bias": torch.zeros(2)})
    assert input_statistics(ModelConfig(name="vit", pretrained=True, normalization="data")) is None
    assert input_statistics(ModelConfig(name="vit", normalization="pretrained")) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    timm_model = ModelConfig(name="timm/test_vit", normalization="pretrained")
    found = input_statistics(timm_model, build_model(timm_model, 2, 32))
    assert found == (timm.get_pretrained_cfg("test_vit").mean, timm.get_pretrained_cfg("test_vit").std)
    for config in (
        ModelConfig(name="reference_cnn", normalization="pretrained"),
        ModelConfig(name="reference_cnn", normalization="pretrained", weights=own),
    ):
        with pytest.raises(UserError, match=r"normalization=pretrained: no normalisation is known for .*; use auto or data"):
            input_statistics(config)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_parameter_groups_hold_every_parameter_once(name: ModelName) -> None:
    model = build_model(ModelConfig(name=name), 10, 32)
    decayed, exempt = parameter_groups(model, 0.05)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.05, 0.0)
    together = [id(p) for p in decayed["params"] + exempt["params"]]
    assert sorted(together) == sorted(id(p) for p in model.parameters())
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert {id(p) for n, p in model.named_parameters() if n.endswith("bias")} <= {id(p) for p in exempt["params"]}


def test_vits_exempt_position_embedding_and_class_token_from_decay() -> None:
    assert {"pos_embed", "cls_token"} <= no_decay_names(build_model(ModelConfig(name="vit"), 10, 32))


def test_custom_cnn_gives_equal_logits_for_contiguous_and_channels_last_input() -> None:
    model = CustomCNN(5, width=8).eval()
    images_BCHW = torch.randn(3, 3, 40, 40)
    logits_BK = model(images_BCHW.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(model(images_BCHW), logits_BK)


@pytest.mark.parametrize(("width", "groups"), [(4, 1), (5, 1), (7, 1), (24, 6), (32, 8), (256, 32), (509, 1)])
def test_group_norm_groups_divide_the_width_and_have_several_channels(width: int, groups: int) -> None:
    assert num_groups(width) == groups


@pytest.mark.parametrize("width", [4, 6, 32])
def test_group_norm_logits_do_not_depend_on_other_images_of_the_batch(width: int) -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(name="custom_cnn", width=width, norm="group"), 5, 16).double()
    assert not list(model.buffers())
    for name, parameter in model.named_parameters():
        if name.endswith("second.norm.weight"):
            assert not parameter.any(), "the branch starts at zero"
            nn.init.normal_(parameter)
    images_BCHW = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    logits_BK = model(images_BCHW)
    assert logits_BK.std(dim=0).min() > 1e-3
    torch.testing.assert_close(torch.cat([model(image[None]) for image in images_BCHW]), logits_BK, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.eval()(images_BCHW), logits_BK, rtol=0, atol=0)
