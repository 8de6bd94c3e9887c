"""``train.strategy=fsdp``: the numbers of one process on any number of them, from any checkpoint."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from galaxydist.checkpoints import store
from galaxydist.checkpoints.tensor_files import flatten_state, unflatten_state
from galaxydist.errors import UserError
from galaxydist.training.optimizer import MovingAverage
from galaxydist.training.state import named_optimizer_state, numbered_optimizer_state
from galaxydist.training.strategy import repeated_blocks
from tests.helpers.checkpoints import save
from tests.helpers.forked_runs import run_forked
from tests.helpers.scripts.sharded_training import (
    COMPARED,
    SAVED_AT,
    STEPS,
    Plain,
    backward,
    build_optimizer,
    build_vit,
    flatten,
    read_final,
    run_tasks,
    unflatten,
)

Expected = tuple[Path, dict[str, dict[str, Tensor]]]


def launch(world_size: int, folder: Path, *tasks: str) -> None:
    done = run_forked(run_tasks, world_size, folder, tasks, size=world_size)
    assert done.returncode == 0, done.stderr[-3000:]


def drain(steps: Iterator[int]) -> None:
    for _ in steps:
        pass


def final_tensors(plain: Plain) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in flatten(plain.states())[0].items() if not name.startswith("optimizer/")}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


# ---- the same steps on one, two and three processes ----


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Expected:
    """What one process without sharding reaches, by optimizer, and a folder with its checkpoint."""
    folder = tmp_path_factory.mktemp("sharded")
    reached = {}
    for optimizer in ("adamw", "sgd"):
        plain = Plain(optimizer)
        for step in plain.train(0, STEPS):
            if step == SAVED_AT:
                save(folder / f"{optimizer}-plain", step, *flatten(plain.states()))
        reached[optimizer] = final_tensors(plain)
    return folder, reached


@pytest.fixture(scope="module")
def two(expected: Expected) -> Path:
    """Two processes have trained with both optimizers, and gone on from one process's checkpoint."""
    folder, _ = expected
    launch(2, folder, "train:adamw:background", "train:sgd:direct", "resume:adamw:adamw-plain")
    return folder


@pytest.mark.slow
@pytest.mark.multiprocess
def test_fsdp_on_2_processes_has_the_weights_of_one_process(two: Path, expected: Expected) -> None:
    start = {f"model/{name}": tensor for name, tensor in build_vit().state_dict().items()}
    for optimizer, tensors in expected[1].items():
        assert largest_difference(start, {name: tensors[name] for name in start}) > 0.01
        assert largest_difference(read_final(two / f"{optimizer}-2.safetensors"), tensors) < 1e-12
    assert largest_difference(read_final(two / "adamw-plain-on-2.safetensors"), expected[1]["adamw"]) < 1e-12


@pytest.mark.slow
@pytest.mark.multiprocess
def test_fsdp_on_3_processes_equals_one_and_continues_checkpoints_of_2(two: Path, expected: Expected) -> None:
    launch(3, two, "train:adamw:background", "resume:adamw:adamw-2", "resume:sgd:sgd-2")
    for name in ("adamw-3", "adamw-2-on-3", "sgd-2-on-3"):
        assert largest_difference(read_final(two / f"{name}.safetensors"), expected[1][name.split("-")[0]]) < 1e-12, name


@pytest.mark.slow
@pytest.mark.multiprocess
def test_fsdp_on_1_process_continues_a_checkpoint_of_2(two: Path, expected: Expected) -> None:
    launch(1, two, "resume:adamw:adamw-2")
    assert largest_difference(read_final(two / "adamw-2-on-1.safetensors"), expected[1]["adamw"]) < 1e-12


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_fsdp_checkpoint_of_2_processes_continues_without_sharding(optimizer: str, two: Path, expected: Expected) -> None:
    newest = store.load(two / f"{optimizer}-2")
    assert newest is not None and list(newest.path.glob("shard-00002-*"))
    plain = Plain(optimizer)
    plain.load(unflatten(newest))
    drain(plain.train(SAVED_AT, STEPS))
    assert largest_difference(final_tensors(plain), expected[1][optimizer]) < 1e-12


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("size", ["small", pytest.param("large", marks=pytest.mark.nightly)])
def test_fsdp_and_ddp_give_equal_weights_for_models_with_batch_norm(size: str, tmp_path: Path) -> None:
    launch(2, tmp_path, f"compare:{size}")
    for rank in (0, 1):
        found = json.loads((tmp_path / f"differences-{rank}.json").read_text())
        assert len(found) == len(COMPARED[size])
        assert max(found.values()) < 1e-12, found


# ---- parts ----


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9999])
def test_moving_average_is_bit_equal_to_timms_model_ema(decay: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3)).double()
    ours, theirs = MovingAverage(model, decay), ModelEmaV3(model, decay=decay, use_warmup=True)
    optimizer = build_optimizer(model)
    for step in range(6):
        model(torch.randn(4, 3, 6, 6, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
        assert ours.decay_at(step + 1) == theirs.get_decay(step + 1)
        ours.update(step + 1)
        theirs.update(model, step=step + 1)
        expected = theirs.module.state_dict()
        assert ours.state_dict().keys() == expected.keys()
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, expected[name]), name
    assert {name for name, _ in ours.named_buffers()} == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    other = MovingAverage(copy.deepcopy(model), decay)
    other.load_state_dict(ours.state_dict())
    assert largest_difference(dict(other.state_dict()), dict(ours.state_dict())) == 0
    with pytest.raises(KeyError):
        other.load_state_dict({})


def step_once(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    backward(model, step, 0, 1, lambda _: None)
    optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("numbered", [False, True], ids=["names", "numbers"])
def test_optimizer_continues_from_named_and_numbered_state(name: str, numbered: bool) -> None:
    model = build_vit()
    optimizer = build_optimizer(model, name)
    step_once(model, optimizer, 0)
    state: Any = optimizer.state_dict() if numbered else named_optimizer_state(model, optimizer)
    if not numbered:
        assert set(state["state"]) == {name for name, _ in model.named_parameters()}
    tensors, described = flatten_state("optimizer", state)
    assert ("optimizer/state/head.weight" in "".join(tensors)) != numbered
    other = copy.deepcopy(model)
    restored = build_optimizer(other, name)
    state = unflatten_state(json.loads(json.dumps(described)), tensors)
    restored.load_state_dict(copy.deepcopy(numbered_optimizer_state(other, restored, state)))
    for trained, its in ((model, optimizer), (other, restored)):
        step_once(trained, its, 1)
    assert largest_difference(model.state_dict(), other.state_dict()) == 0


def test_optimizer_with_other_groups_loads_named_state() -> None:
    model = build_vit()
    optimizer = build_optimizer(model)
    step_once(model, optimizer, 0)
    state = named_optimizer_state(model, optimizer)
    other = copy.deepcopy(model)
    restored = torch.optim.AdamW([{"params": [p]} for p in reversed(list(other.parameters()))])
    restored.load_state_dict(copy.deepcopy(numbered_optimizer_state(other, restored, state)))
    for trained, its in ((model, optimizer), (other, restored)):
        step_once(trained, its, 1)
    assert largest_difference(model.state_dict(), other.state_dict()) == 0


@pytest.mark.parametrize("numbered", [False, True], ids=["names", "numbers"])
def test_optimizer_state_of_other_parameters_is_refused(numbered: bool) -> None:
    model = build_vit()
    optimizer = build_optimizer(model)
    state = optimizer.state_dict() if numbered else named_optimizer_state(model, optimizer)
    model.head.requires_grad_(False)
    with pytest.raises(UserError, match="model.freeze_backbone" if numbered else r"\(head.bias\)"):
        numbered_optimizer_state(model, build_optimizer(model), state)


@pytest.mark.parametrize(
    ("name", "num_blocks"),
    [("custom_cnn", 4), ("resnet18", 8), ("d4_cnn", 4), ("resnet50", 16), ("vgg16", 5), ("vgg19", 5), ("vit", 12)],
)
def test_repeated_blocks_hold_most_parameters_of_every_architecture(name: Any, num_blocks: int) -> None:
    from galaxydist.models.build import build_model
    from galaxydist.recipe.schema import ModelConfig

    with torch.device("meta"):
        model = build_model(ModelConfig(name=name), 10, 64)
    blocks = repeated_blocks(model)
    assert len(blocks) == num_blocks
    inside = sum(parameter.numel() for block in blocks for module in block for parameter in module.parameters())
    assert inside > 0.9 * sum(parameter.numel() for parameter in model.parameters())
