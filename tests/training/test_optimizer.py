"""Optimizers: each of the six works and survives a checkpoint bit for bit; any other name is refused with the list."""

import copy
import itertools
import json
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from timm.optim import create_optimizer_v2
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from galaxydist.checkpoints.sharded import own_part
from galaxydist.checkpoints.tensor_files import flatten_state, unflatten_state
from galaxydist.errors import EveryRankError, UserError
from galaxydist.models.performance import deterministic_algorithms
from galaxydist.recipe.rules import OPTIMIZERS
from galaxydist.recipe.schema import OptimConfig
from galaxydist.training.optimizer import (
    FUSED,
    LRSchedule,
    build_optimizer,
    load_optimizer_state,
    set_learning_rate,
    step_if_finite,
)
from galaxydist.training.step import clip_gradients
from galaxydist.training.strategy import open_mesh

CPU = torch.device("cpu")


def tiny_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 4, 5))


def groups_of(model: nn.Module, weight_decay: float = 0.05, scale: float | None = None) -> list[dict[str, Any]]:
    extra = {} if scale is None else {"lr_scale": scale}
    decayed = [p for p in model.parameters() if p.ndim > 1]
    exempt = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay, **extra}, {"params": exempt, "weight_decay": 0.0, **extra}]


def build(model: nn.Module, name: str, **settings: Any) -> torch.optim.Optimizer:
    return build_optimizer(groups_of(model), OptimConfig(name=name, lr=0.01, **settings), CPU)


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, rate: float = 0.01) -> None:
    for step in steps:
        torch.manual_seed(step)
        loss = nn.functional.cross_entropy(model(torch.randn(8, 3, 6, 6)), torch.randint(0, 5, (8,)))
        set_learning_rate(optimizer, rate / (step + 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def through_a_checkpoint(state: dict[str, Any]) -> dict[str, Any]:
    tensors, described = flatten_state("optimizer", state)
    restored: dict[str, Any] = unflatten_state(json.loads(json.dumps(described)), {k: v.clone() for k, v in tensors.items()})
    return restored


def assert_a_restart_changes_nothing(name: str, steps: int) -> None:
    whole = tiny_model()
    take_steps(whole, build(whole, name), range(2 * steps))

    stopped = tiny_model()
    optimizer = build(stopped, name)
    take_steps(stopped, optimizer, range(steps))
    state = through_a_checkpoint(optimizer.state_dict())

    continued = tiny_model()
    assert not equal(whole, continued)
    continued.load_state_dict(copy.deepcopy(stopped.state_dict()))
    optimizer = build(continued, name)
    load_optimizer_state(optimizer, state)
    take_steps(continued, optimizer, range(steps, 2 * steps))
    assert equal(whole, continued)
    assert all(bool(p.isfinite().all()) for p in whole.parameters())


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_step_changes_every_weight_to_a_finite_value(name: str) -> None:
    before, after = tiny_model(), tiny_model()
    take_steps(after, build(after, name), range(1))
    for old, new in zip(before.parameters(), after.parameters(), strict=True):
        assert not torch.equal(old, new) and bool(new.isfinite().all())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_continued_from_a_checkpoint_is_bit_equal(name: str) -> None:
    assert_a_restart_changes_nothing(name, steps=2)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in ("adamw", "sgd")])
def test_lamb_lion_muon_and_adan_are_timms_with_the_moments_of_the_recipe(name: str) -> None:
    """With the same defaults as from timm's factory, so that runs of older versions continue."""
    ours, theirs = tiny_model(), tiny_model()
    betas = (0.8, 0.92, 0.99) if name == "adan" else (0.8, 0.99)
    plain = create_optimizer_v2(groups_of(theirs), name, lr=0.01, weight_decay=0.0, momentum=0.8, betas=betas)
    built = build(ours, name, momentum=0.8, beta2=0.99)
    for group, other in zip(built.param_groups, plain.param_groups, strict=True):
        assert {key: group[key] for key in group if key != "params"} == {key: other[key] for key in other if key != "params"}
    take_steps(ours, built, range(4))
    take_steps(theirs, plain, range(4))
    assert equal(ours, theirs)


class CountReads(TorchDispatchMode):
    """Counts the values that the host reads from tensors, for each of which it would wait for a GPU."""

    reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    yield open_mesh(CPU)
    dist.destroy_process_group()


@pytest.mark.parametrize(("name", "is_sharded"), [("adamw", False), ("sgd", False), ("adamw", True), ("sgd", True)])
def test_step_with_a_gradient_that_is_not_finite_changes_nothing(name: str, is_sharded: bool, mesh: DeviceMesh) -> None:
    """Fused kernels, which are a GPU's default, skip the step without a value for the host, also for sharded parameters."""
    is_fused = not (is_sharded and name == "sgd")  # torch has no such kernel for sharded parameters
    models = [nn.Linear(3, 4), nn.Linear(3, 4)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        if is_sharded:
            fully_shard(model, mesh=mesh)
    poisoned, plain = (
        build_optimizer([{"params": [*model.parameters()]}], OptimConfig(name=name, fused="on" if is_fused else "auto"), CPU)
        for model in models
    )
    for factor in (math.nan, 1.0, math.inf, 2.0):
        for model, optimizer in zip(models, (poisoned, plain), strict=True):
            optimizer.zero_grad()
            model(torch.full((2, 3), factor)).square().sum().backward()
            norm = clip_gradients(model.parameters(), norm=1.0, value=0.0)
            if optimizer is poisoned:
                with CountReads() as counted:
                    step_if_finite(optimizer, norm.isfinite())
                assert counted.reads == (0 if is_fused else 1)
            elif math.isfinite(factor):
                optimizer.step()
    for one, other in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        assert torch.equal(own_part(one), own_part(other)) and own_part(one).isfinite().all()


@pytest.mark.parametrize("name", FUSED)
def test_fused_step_left_out_after_a_restart_before_the_first_step_changes_nothing(name: str) -> None:
    """The state of a run whose first steps were all left out has no momentum yet."""
    model, plain = tiny_model(), tiny_model()
    optimizer = build(model, name, fused="on")
    load_optimizer_state(optimizer, through_a_checkpoint(build(model, name).state_dict()))
    with deterministic_algorithms(True, {}):
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]  # with nan
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, math.nan)
        step_if_finite(optimizer, torch.tensor(False))
        optimizer.found_inf = None  # type: ignore[attr-defined]
        take_steps(model, optimizer, range(2))
    take_steps(plain, build(plain, name, fused="on"), range(2))
    assert equal(model, plain)


def test_fused_sgd_of_sharded_parameters_is_refused(mesh: DeviceMesh) -> None:
    model = nn.Linear(3, 4)
    fully_shard(model, mesh=mesh)
    with pytest.raises(EveryRankError, match=r"optim\.fused=on: there are no fused kernels of sgd with train\.strategy=fsdp"):
        build_optimizer([{"params": [*model.parameters()]}], OptimConfig(name="sgd", fused="on"), CPU)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("AdamW", "did you mean adamw?"),
        ("lion1", "did you mean lion?"),
        ("lookahead_sgd", "there is no such optimizer"),
        ("adopt", "there is no such optimizer"),
    ],
)
def test_unknown_optimizer_is_refused_with_the_list_by_build_optimizer(name: str, words: str) -> None:
    config = OptimConfig(name=name)  # the schema takes it: a run of an older version may have it
    with pytest.raises(EveryRankError, match=re.escape(f"optim.name={name}")) as caught:
        build_optimizer(groups_of(tiny_model()), config, CPU)
    assert words in str(caught.value)
    assert "adamw, sgd, lamb, lion, muon, adan" in str(caught.value)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_adamw_and_sgd_are_torchs_own(name: str) -> None:
    ours, theirs = tiny_model(), tiny_model()
    groups = groups_of(theirs)
    plain: torch.optim.Optimizer = (
        torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.99))
        if name == "adamw"
        else torch.optim.SGD(groups, lr=0.01, momentum=0.8, nesterov=True)
    )
    take_steps(ours, build(ours, name, momentum=0.8, beta2=0.99), range(4))
    take_steps(theirs, plain, range(4))
    assert equal(ours, theirs)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_lr_scale_of_a_group_equals_training_at_the_scaled_rate(name: str) -> None:
    """A group with lr_scale moves as it would alone at the scaled rate."""
    scaled, plain = tiny_model(), tiny_model()
    config = OptimConfig(name=name, lr=0.01)
    take_steps(scaled, build_optimizer(groups_of(scaled, scale=0.25), config, CPU), range(3), rate=0.01)
    quarter = config.model_copy(update={"lr": 0.0025})
    take_steps(plain, build_optimizer(groups_of(plain), quarter, CPU), range(3), rate=0.0025)
    assert equal(scaled, plain)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_changes_only_the_parameters_of_its_group(name: str) -> None:
    """Under the same gradients it moves what decays, and nothing else."""
    moved = []
    for weight_decay in (0.0, 0.5):
        model = tiny_model()
        optimizer = build_optimizer(groups_of(model, weight_decay), OptimConfig(name=name, lr=0.01), CPU)
        for step in range(2):
            torch.manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        moved.append([p.detach().clone() for p in model.parameters()])
    for before, after in zip(*moved, strict=True):
        assert torch.equal(before, after) == (before.ndim <= 1)


def test_momentum_and_beta2_of_the_recipe_reach_every_optimizer() -> None:
    settings = {"momentum": 0.7, "beta2": 0.98}
    assert build(tiny_model(), "lamb", **settings).param_groups[0]["betas"] == (0.7, 0.98)
    assert build(tiny_model(), "adan", **settings).param_groups[0]["betas"] == (0.7, 0.92, 0.98)
    assert build(tiny_model(), "lion", **settings).param_groups[0]["betas"] == (0.7, 0.98)
    assert build(tiny_model(), "muon", **settings).param_groups[0]["momentum"] == 0.7
    assert build(tiny_model(), "muon", **settings).param_groups[0]["betas"] == (0.7, 0.98)
    assert build(tiny_model(), "sgd", momentum=0.0).param_groups[0]["nesterov"] is False


def test_fused_kernels_are_used_where_available_and_refused_elsewhere() -> None:
    model = tiny_model()
    for name in ("adamw", "sgd"):
        assert not build(model, name).param_groups[0]["fused"]
        assert build(model, name, fused="on").param_groups[0]["fused"] is True
        config = OptimConfig(name=name)
        assert build_optimizer(groups_of(model), config, torch.device("cuda")).param_groups[0]["fused"] is True
        off = config.model_copy(update={"fused": "off"})
        assert not build_optimizer(groups_of(model), off, torch.device("cuda")).param_groups[0]["fused"]
    assert "fused" not in build_optimizer(groups_of(model), OptimConfig(name="lion"), torch.device("cuda")).param_groups[0]
    with pytest.raises(EveryRankError, match=r"optim\.fused=on.*lion.*adamw"):
        build(model, "lion", fused="on")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_fused_and_unfused_optimizers_agree_on_a_gpu(name: str) -> None:
    device = torch.device("cuda")
    models = [tiny_model().to(device), tiny_model().to(device)]
    for model, fused in zip(models, ("auto", "off"), strict=True):
        optimizer = build_optimizer(groups_of(model), OptimConfig.model_validate({"name": name, "fused": fused}), device)
        for step in range(3):
            torch.manual_seed(step)
            images, labels = torch.randn(8, 3, 6, 6, device=device), torch.randint(0, 5, (8,), device=device)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "lamb", "sgd"])
def test_restored_optimizer_uses_the_settings_of_the_new_recipe(name: str) -> None:
    model = tiny_model()
    old = build(model, name, fused="on" if name != "lamb" else "auto")
    take_steps(model, old, range(2))
    config = OptimConfig(name=name, momentum=0.5)
    new = build_optimizer(groups_of(model, weight_decay=0.3, scale=0.5), config, CPU)
    expected = [{key: value for key, value in group.items() if key != "params"} for group in new.param_groups]
    load_optimizer_state(new, through_a_checkpoint(old.state_dict()))
    for group, wanted in zip(new.param_groups, expected, strict=True):
        kept = {key: group.get(key) for key in ("weight_decay", "lr_scale", "betas", "momentum", "fused")}
        assert kept == {key: wanted.get(key) for key in kept}
    take_steps(model, new, range(2, 4))
    for parameter in model.parameters():
        if "step" in new.state[parameter]:
            assert float(new.state[parameter]["step"]) == 4


def test_the_state_of_other_groups_is_refused() -> None:
    model = tiny_model()
    state = build(model, "adamw").state_dict()
    other = build_optimizer(groups_of(model)[:1], OptimConfig(), CPU)
    with pytest.raises(UserError, match=r"optim\.layer_decay"):
        load_optimizer_state(other, state)


def test_linear_schedule_falls_in_a_straight_line() -> None:
    rate = LRSchedule(OptimConfig(lr=1e-2, warmup=0.1, final=0.05, schedule="linear"), total_steps=200)
    assert rate(20) == pytest.approx(1e-2) and rate(19) < 1e-2
    assert rate(110) == pytest.approx(1e-2 * (1 + 0.05) / 2)
    falls = [rate(step) - rate(step + 1) for step in range(20, 200)]
    assert falls == pytest.approx([1e-2 * 0.95 / 180] * 180)
    assert rate(200) == rate(300) == pytest.approx(5e-4)


def test_step_schedule_falls_at_its_milestones() -> None:
    config = OptimConfig(lr=0.1, warmup=0.0, schedule="step", milestones=(0.5, 0.75), gamma=0.1)
    rate = LRSchedule(config, total_steps=100)
    assert [rate(step) for step in (0, 49, 50, 74, 75, 99)] == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_step_schedule_applies_a_milestone_inside_the_warmup_at_its_end() -> None:
    config = OptimConfig(lr=0.1, warmup=0.2, schedule="step", milestones=(0.1, 0.5), gamma=0.5)
    rate = LRSchedule(config, total_steps=100)
    assert [rate(step) for step in (19, 20, 50)] == pytest.approx([0.1 * 20 / 21, 0.05, 0.025])


@given(
    schedule=st.sampled_from(["cosine", "linear", "step", "constant"]),
    total=st.integers(1, 400),
    warmup=st.floats(0, 0.9),
    final=st.floats(0, 1),
)
def test_every_schedule_stays_within_its_peak_and_never_rises_after_warmup(
    schedule: str, total: int, warmup: float, final: float
) -> None:
    config = OptimConfig.model_validate({"lr": 0.3, "schedule": schedule, "warmup": warmup, "final": final})
    rates = [LRSchedule(config, total)(step) for step in range(total + 1)]
    assert all(0 <= rate <= 0.3 * (1 + 1e-12) for rate in rates)
    fallen = rates[round(warmup * total) :]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(fallen))
