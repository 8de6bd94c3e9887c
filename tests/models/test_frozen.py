"""With model.freeze_backbone=true only the head moves: parameters and buffers of the rest stay bit-equal."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from galaxydist.models.build import build_model, evaluation_mode, set_train_mode
from galaxydist.models.param_groups import parameter_groups
from galaxydist.models.registry import ARCHITECTURES, MODEL_NAMES
from galaxydist.recipe.schema import ModelConfig, ModelName
from tests.helpers.model_names import marked


def build_frozen(name: ModelName, **settings: float) -> nn.Module:
    return build_model(ModelConfig(name=name, freeze_backbone=True, **settings), 4, 32)  # type: ignore[arg-type]


def train_steps(model: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=0.01)
    for _ in range(steps):
        set_train_mode(model)
        loss = nn.functional.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.tensor([0, 1, 2, 3]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


QUICK = {"custom_cnn", "d4_cnn", "resnet18", "vit", "reference_vit"}


@pytest.mark.parametrize("name", marked(MODEL_NAMES, QUICK))
def test_frozen_parameters_and_buffers_are_bit_equal_after_training(name: ModelName) -> None:
    torch.manual_seed(0)
    model = build_frozen(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train_steps(model)
    heads = tuple(f"{head}." for head in ARCHITECTURES[name].head)
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {key for key in before if key.startswith(heads)}
    assert {key for key, p in model.named_parameters() if p.requires_grad} == moved


def test_unfrozen_model_changes_every_parameter_and_buffer_in_training() -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(name="custom_cnn", width=8), 4, 32)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train_steps(model)
    assert all(not torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_frozen_backbone_stays_in_evaluation_mode_while_the_head_trains() -> None:
    model = build_frozen("vit", drop_rate=0.2, drop_path_rate=0.3)
    set_train_mode(model)
    assert model.training
    assert model.get_submodule("head_drop").training
    assert not model.get_submodule("blocks").training
    assert not any(m.training for m in model.get_submodule("blocks").modules())
    with evaluation_mode(model):
        assert not any(m.training for m in model.modules())
    assert model.get_submodule("head_drop").training and not model.get_submodule("blocks").training


def test_frozen_backbone_is_deterministic_with_drop_path_in_training_mode() -> None:
    model = build_frozen("vit", drop_path_rate=0.5)
    images_BCHW = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images_BCHW), model(images_BCHW))


def test_deep_copy_of_a_frozen_model_stays_frozen() -> None:
    """The moving average of the weights is a deep copy."""
    original = build_frozen("resnet18")
    duplicate = copy.deepcopy(original)
    before = {key: value.clone() for key, value in original.state_dict().items()}
    train_steps(duplicate, steps=1)
    after = duplicate.state_dict()
    assert list(after) == list(before)
    assert {key for key in before if not torch.equal(after[key], before[key])} == {"fc.weight", "fc.bias"}
    assert all(torch.equal(value, before[key]) for key, value in original.state_dict().items())


def test_frozen_random_backbone_is_warned_about_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = ModelConfig(name="custom_cnn", width=8, freeze_backbone=True)
    model = build_model(config, 4, 32)
    assert len(caplog.messages) == 1
    assert "model.weights=FILE" in caplog.messages[0]

    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    build_model(config.model_copy(update={"weights": tmp_path / "weights.safetensors"}), 4, 32)
    assert len(caplog.messages) == 1
