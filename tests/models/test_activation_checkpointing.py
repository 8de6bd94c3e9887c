"""Gradient checkpointing: less is kept, and loss, gradients, dropout and batch-norm statistics are bit for bit the same."""

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from galaxydist.errors import EveryRankError, UserError
from galaxydist.models.build import build_model, freeze_backbone, set_train_mode
from galaxydist.models.performance import check_compilable, checkpoint_activations
from galaxydist.models.registry import ARCHITECTURES, MODEL_NAMES
from galaxydist.recipe.schema import ModelConfig, ModelName
from tests.helpers.model_names import marked

QUICK = {"custom_cnn", "resnet18", "vit"}
NAMES = marked(MODEL_NAMES, QUICK)


def build(name: ModelName) -> nn.Module:
    """With dropout and drop path, where there are branches to drop."""
    torch.manual_seed(0)
    path = 0.3 if ARCHITECTURES[name].has_drop_path else 0.0
    return build_model(ModelConfig(name=name, drop_rate=0.2, drop_path_rate=path), 5, 64)


def take_steps(model: nn.Module, steps: int = 2) -> tuple[list[float], dict[str, torch.Tensor], int]:
    """Losses, all gradients and the whole state after some steps, and the bytes kept for the last backward pass."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    losses, kept = [], 0
    for step in range(steps):
        torch.manual_seed(step)
        set_train_mode(model)
        storages: dict[int, Any] = {}

        def keep(tensor: torch.Tensor, storages: dict[int, Any] = storages) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = nn.functional.cross_entropy(model(torch.randn(4, 3, 64, 64)), torch.arange(4))
        kept = sum(storage.nbytes() for place, storage in storages.items() if place not in weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    gradients = {f"d {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return losses, {**model.state_dict(), **gradients}, kept


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert list(one) == list(other)
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_is_bit_equal_and_keeps_under_60_percent_of_the_bytes(name: ModelName) -> None:
    plain = build(name)
    saving = copy.deepcopy(plain)
    assert checkpoint_activations(saving) >= 5
    (losses, state, kept), (saving_losses, saving_state, saving_kept) = take_steps(plain), take_steps(saving)
    assert losses == saving_losses and len(set(losses)) == 2
    assert_same(state, saving_state)
    assert saving_kept < 0.6 * kept
    has_statistics = any(name.endswith("running_mean") for name in state)
    with pytest.raises(EveryRankError, match="statistics") if has_statistics else nullcontext():
        check_compilable(saving)


@pytest.mark.parametrize("name", NAMES)
def test_deep_copy_and_evaluation_with_gradient_checkpointing_are_bit_equal(name: ModelName) -> None:
    plain = build(name)
    saving = copy.deepcopy(plain)
    checkpoint_activations(saving)
    twin = copy.deepcopy(saving)
    assert_same(take_steps(plain, 1)[1], take_steps(twin, 1)[1])
    images = torch.randn(2, 3, 64, 64)
    saving.load_state_dict(plain.state_dict())
    assert torch.equal(plain.eval()(images), saving.eval()(images))


@pytest.mark.parametrize("name", NAMES)
def test_frozen_backbone_with_gradient_checkpointing_trains_only_its_head(name: ModelName) -> None:
    plain = build(name)
    freeze_backbone(plain, ARCHITECTURES[name].head)
    saving = copy.deepcopy(plain)
    checkpoint_activations(saving)
    before = {key: value.clone() for key, value in saving.state_dict().items()}
    state = take_steps(saving)[1]
    assert_same(take_steps(plain)[1], state)
    heads = tuple(f"{head}." for head in ARCHITECTURES[name].head)
    assert {key for key in before if not torch.equal(before[key], state[key])} == {k for k in before if k.startswith(heads)}


def test_checkpointed_batch_norm_statistics_are_updated_once_per_step() -> None:
    model = build("resnet18")
    checkpoint_activations(model)
    take_steps(model, 3)
    counts = {name: int(value) for name, value in model.named_buffers() if name.endswith("num_batches_tracked")}
    assert len(counts) == 20 and set(counts.values()) == {3}


def test_gradient_checkpointing_under_autocast_is_bit_equal() -> None:
    plain = build("custom_cnn")
    saving = copy.deepcopy(plain)
    checkpoint_activations(saving)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(take_steps(plain, 1)[1], take_steps(saving, 1)[1])


def test_gradient_checkpointing_of_a_model_without_repeated_blocks_is_refused() -> None:
    with pytest.raises(UserError, match=r"train\.gradient_checkpointing=true: Linear has no repeated blocks"):
        checkpoint_activations(nn.Linear(3, 3))
