"""Models by timm's names: built at the recipe's image size, with rates, head, weights and saliency; refused with the reason."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from galaxydist.errors import UserError
from galaxydist.models.build import build_model
from galaxydist.models.features import extract_features
from galaxydist.models.param_groups import layer_depths
from galaxydist.models.performance import checkpoint_activations
from galaxydist.models.registry import architecture_of
from galaxydist.models.saliency import GRAD_CAM, ROLLOUT, explain
from galaxydist.recipe.schema import ModelConfig

# timm's small models for tests: a transformer, a convolutional network, both together, and one with functional dropout.
SMALL = {
    "test_vit": ROLLOUT,
    "test_convnext": GRAD_CAM,
    "test_maxvit": GRAD_CAM,
    "test_efficientnet": GRAD_CAM,
}


def config_of(name: str, **settings: object) -> ModelConfig:
    return ModelConfig.model_validate({"name": f"timm/{name}", **settings})


def check_all(name: str, image_size: int, method: str | None) -> None:
    """Build, train, freeze, explain and take features of a model."""
    torch.manual_seed(0)
    config = config_of(name)
    model = build_model(config, 5, image_size)
    images_BCHW = torch.randn(2, 3, image_size, image_size)
    nn.functional.cross_entropy(model(images_BCHW), torch.tensor([0, 4])).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    heads = {key for key, p in build_frozen(config, image_size).named_parameters() if p.requires_grad}
    classifier = timm.get_pretrained_cfg(name).classifier
    named = (classifier,) if isinstance(classifier, str) else classifier
    assert heads == {key for key, _ in model.named_parameters() if key.startswith(tuple(f"{one}." for one in named))}
    depths = layer_depths(model)
    assert max(depths.values()) >= 3 and all(depths[key] == 0 for key in heads)
    features_BD = extract_features(model, images_BCHW)
    assert features_BD.ndim == 2 and features_BD.shape[0] == 2 and torch.isfinite(features_BD).all()
    found = explain(model, architecture_of(config, model), images_BCHW, torch.tensor([1, 2]))
    assert (found.method if found is not None else None) == method
    if found is not None:
        assert found.maps_BHW.shape == (2, image_size, image_size) and torch.isfinite(found.maps_BHW).all()


def build_frozen(config: ModelConfig, image_size: int) -> nn.Module:
    return build_model(config.model_copy(update={"freeze_backbone": True}), 5, image_size)


@pytest.mark.parametrize(("name", "method"), SMALL.items())
def test_models_of_timm_train_and_have_head_layers_features_and_saliency(name: str, method: str) -> None:
    check_all(name, 64, method)


@pytest.mark.parametrize("name", SMALL)
def test_weights_for_another_image_size_and_number_of_classes_are_loaded(tmp_path: Path, name: str) -> None:
    torch.manual_seed(1)
    stored = build_model(config_of(name), 7, 96)
    save_file(stored.state_dict(), tmp_path / "w.safetensors")
    config = config_of(name, weights=tmp_path / "w.safetensors")
    own, known = build_model(config, 5, 64).state_dict(), stored.state_dict()
    same = {key for key in own if own[key].shape == known[key].shape and torch.equal(own[key], known[key])}
    resized = {key for key in own.keys() - same if "pos" in key}
    heads = {key for key in own if own[key].shape[:1] == (5,)}
    assert own.keys() - same == resized | heads and heads
    again = build_model(config, 7, 96).state_dict()
    assert all(torch.equal(again[key], known[key]) for key in known), "the head of as many classes is kept"


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    state = build_model(config_of("test_convnext"), 5, 64).state_dict()
    first = next(iter(state))
    save_file({key: tensor for key, tensor in state.items() if key != first}, tmp_path / "less.safetensors")
    save_file({**state, first: torch.full_like(state[first], float("nan"))}, tmp_path / "nan.safetensors")
    for name, words in (("less", rf"do not fit timm/test_convnext.*{first}"), ("nan", f"{first} have nan")):
        with pytest.raises(UserError, match=words):
            build_model(config_of("test_convnext", weights=tmp_path / f"{name}.safetensors"), 5, 64)


@pytest.mark.parametrize(
    ("name", "settings", "image_size", "words"),
    [
        ("test_convnet", {}, 64, "did you mean timm/test_convnext"),
        ("test_vit.r16", {}, 64, r"no such weights; did you mean timm/test_vit\.r160_in1k"),
        ("vgg11", {"drop_path_rate": 0.1}, 32, r"model\.drop_path_rate=0\.1: timm/vgg11 does not take this setting"),
        ("halonet26t", {}, 80, r"data\.image_size=80: .*set data\.image_size=256"),
        ("efficientformer_l1", {}, 64, r"data\.image_size=64: timm/efficientformer_l1 does not take images .*=224"),
    ],
)
def test_names_sizes_and_rates_that_timm_does_not_take_are_refused(
    name: str, settings: dict[str, float], image_size: int, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        build_model(config_of(name, **settings), 5, image_size)


def test_rates_reach_the_model() -> None:
    for name in SMALL:
        model = build_model(config_of(name, drop_rate=0.4, drop_path_rate=0.3), 5, 64)
        rates = [m.p for m in model.modules() if isinstance(m, nn.Dropout)] + [getattr(model, "drop_rate", 0)]
        assert 0.4 in rates, name
        assert max(getattr(m, "drop_prob", 0) or 0 for m in model.modules()) > 0.1, name


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_gradient_checkpointing_of_timm_models_is_bit_equal(name: str) -> None:
    def gradients(*, is_checkpointed: bool) -> list[torch.Tensor | None]:
        torch.manual_seed(0)
        model = build_model(config_of(name), 5, 64)
        if is_checkpointed:
            assert checkpoint_activations(model) > 1
        model(torch.ones(2, 3, 64, 64)).sum().backward()
        return [p.grad for p in model.parameters()]

    for plain, checkpointed in zip(gradients(is_checkpointed=False), gradients(is_checkpointed=True), strict=True):
        assert plain is not None and checkpointed is not None and torch.equal(plain, checkpointed)
