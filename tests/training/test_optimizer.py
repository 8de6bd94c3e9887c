"""Optimizers: every one that the recipe can name works, survives a checkpoint bit for bit, or is refused with the reason."""

import copy
import itertools
import json
import re
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.optim import get_optimizer_info, list_optimizers
from torch import nn

from galaxydist.checkpoints.tensor_files import flatten_state, unflatten_state
from galaxydist.errors import EveryRankError, UserError
from galaxydist.recipe.schema import OptimConfig
from galaxydist.training import optimizer
from galaxydist.training.optimizer import (
    REFUSED,
    LRSchedule,
    build_optimizer,
    find_optimizer,
    load_optimizer_state,
    set_learning_rate,
    usable_names,
)

CPU = torch.device("cpu")
OTHER_PACKAGES = {name for name in list_optimizers() if isinstance(get_optimizer_info(name).opt_class, str)}
KRON = {"kron", "kronc", "kronw"}  # compiled, which takes a minute; and only with opt_einsum
PLAIN = sorted(set(list_optimizers()) - OTHER_PACKAGES - KRON - set(REFUSED))


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


@pytest.mark.parametrize("name", PLAIN)
def test_two_steps_a_checkpoint_and_two_more_are_four_steps(name: str) -> None:
    assert_a_restart_changes_nothing(name, steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", PLAIN)
def test_lookahead_survives_a_checkpoint_between_its_syncs(name: str) -> None:
    """It looks ahead every six steps: the checkpoint lies after the first, the comparison after the second."""
    assert_a_restart_changes_nothing(f"lookahead_{name}", steps=7)


# Compiling takes a minute.
@pytest.mark.parametrize("stance", ["force_eager", pytest.param("default", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("name", sorted(KRON))
def test_kron_survives_a_checkpoint_where_its_package_is(name: str, stance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arithmetic needs the package on large layers only: here it runs without."""
    monkeypatch.setattr(optimizer, "find_spec", lambda _: True)
    with torch.compiler.set_stance(stance):
        assert_a_restart_changes_nothing(name, steps=2)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_refused_really_cannot_work(name: str) -> None:
    """The list is exact: built in spite of it, each of these fails."""
    from timm.optim import create_optimizer_v2

    model = tiny_model()
    optimizer = create_optimizer_v2(groups_of(model), name, lr=0.01)
    with pytest.raises((TypeError, RuntimeError)):
        take_steps(model, optimizer, range(1))
        flatten_state("optimizer", optimizer.state_dict())
    with pytest.raises(EveryRankError, match=f"optim.name={name} cannot be used: it "):
        build(model, name)


def test_every_name_is_usable_or_refused_for_a_reason() -> None:
    expected = set(PLAIN) | (KRON if find_spec("opt_einsum") else set())
    assert set(usable_names()) == expected
    assert len(PLAIN) > 70
    for name in set(list_optimizers()) - expected:
        with pytest.raises(EveryRankError, match=r"cannot be used: it (needs|keeps)"):
            find_optimizer(name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("AdamW", "did you mean adamw?"),
        ("lion1", "did you mean lion?"),
        ("lookahead_sgdd", "did you mean lookahead_sgd?"),
        ("warmup_adamw", "there is no such optimizer"),
        ("lookahead_lookahead_sgd", "there is no such optimizer"),
        ("fusedadam", "needs the package apex"),
        ("bnbadamw8bit", "needs the package bitsandbytes"),
        ("lookahead_adahessian", "needs second derivatives"),
    ],
)
def test_a_name_that_is_none_is_answered_with_what_there_is(name: str, words: str) -> None:
    with pytest.raises(EveryRankError, match=re.escape(f"optim.name={name}")) as caught:
        build(tiny_model(), name)
    assert words in str(caught.value)
    if "no such" in words:
        assert "lamb, lambc" in str(caught.value)


def test_kron_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "find_spec", lambda _: None)
    with pytest.raises(EveryRankError, match="pip install opt_einsum"):
        find_optimizer("kron")


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


@pytest.mark.parametrize("name", PLAIN)
def test_the_scale_of_a_layer_counts_once(name: str) -> None:
    """A group with lr_scale moves as it would alone at the scaled rate."""
    scaled, plain = tiny_model(), tiny_model()
    config = OptimConfig(name=name, lr=0.01)
    take_steps(scaled, build_optimizer(groups_of(scaled, scale=0.25), config, CPU), range(3), rate=0.01)
    quarter = config.model_copy(update={"lr": 0.0025})
    take_steps(plain, build_optimizer(groups_of(plain), quarter, CPU), range(3), rate=0.0025)
    assert equal(scaled, plain)


@pytest.mark.parametrize("name", PLAIN)
def test_weight_decay_is_the_groups_own(name: str) -> None:
    """Under the same gradients it moves what decays, and nothing else."""
    moved = []
    for weight_decay in (0.0, 0.5):
        model = tiny_model()
        optimizer = build_optimizer(groups_of(model, weight_decay), OptimConfig(name=name, lr=0.01), CPU)
        for step in range(2):  # ADOPT does not move in the first
            torch.manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        moved.append([p.detach().clone() for p in model.parameters()])
    for before, after in zip(*moved, strict=True):
        assert torch.equal(before, after) == (before.ndim <= 1)


def test_the_recipes_moments_reach_the_optimizer() -> None:
    settings = {"momentum": 0.7, "beta2": 0.98}
    assert build(tiny_model(), "lamb", **settings).param_groups[0]["betas"] == (0.7, 0.98)
    assert build(tiny_model(), "adan", **settings).param_groups[0]["betas"] == (0.7, 0.92, 0.98)
    assert build(tiny_model(), "sgdw", **settings).param_groups[0]["momentum"] == 0.7
    assert build(tiny_model(), "adafactor", **settings).param_groups[0]["beta1"] == 0.7
    assert build(tiny_model(), "sgdw", momentum=0.0).param_groups[0]["nesterov"] is False
    assert build(tiny_model(), "nesterov", momentum=0.0).param_groups[0]["nesterov"] is False


def test_fused_kernels_where_they_are_and_a_message_where_not() -> None:
    model = tiny_model()
    for name in ("adamw", "sgd", "adam", "adagrad", "momentum"):
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
@pytest.mark.parametrize("name", ["adamw", "sgd", "adam", "adagrad"])
def test_fused_kernels_move_the_weights_alike(name: str) -> None:
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
def test_a_restart_takes_the_new_recipes_settings(name: str) -> None:
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
    assert rate.at(20) == pytest.approx(1e-2) and rate.at(19) < 1e-2
    assert rate.at(110) == pytest.approx(1e-2 * (1 + 0.05) / 2)
    falls = [rate.at(step) - rate.at(step + 1) for step in range(20, 200)]
    assert falls == pytest.approx([1e-2 * 0.95 / 180] * 180)
    assert rate.at(200) == rate.at(300) == pytest.approx(5e-4)


def test_step_schedule_falls_at_its_milestones() -> None:
    config = OptimConfig(lr=0.1, warmup=0.0, schedule="step", milestones=(0.5, 0.75), gamma=0.1)
    rate = LRSchedule(config, total_steps=100)
    assert [rate.at(step) for step in (0, 49, 50, 74, 75, 99)] == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_a_milestone_inside_the_warm_up_counts_after_it() -> None:
    config = OptimConfig(lr=0.1, warmup=0.2, schedule="step", milestones=(0.1, 0.5), gamma=0.5)
    rate = LRSchedule(config, total_steps=100)
    assert [rate.at(step) for step in (19, 20, 50)] == pytest.approx([0.1 * 20 / 21, 0.05, 0.025])


@given(
    schedule=st.sampled_from(["cosine", "linear", "step", "constant"]),
    total=st.integers(1, 400),
    warmup=st.floats(0, 0.9),
    final=st.floats(0, 1),
)
def test_every_schedule_stays_between_zero_and_its_peak_and_never_rises_after_the_warm_up(
    schedule: str, total: int, warmup: float, final: float
) -> None:
    config = OptimConfig.model_validate({"lr": 0.3, "schedule": schedule, "warmup": warmup, "final": final})
    rates = [LRSchedule(config, total).at(step) for step in range(total + 1)]
    assert all(0 <= rate <= 0.3 * (1 + 1e-12) for rate in rates)
    fallen = rates[round(warmup * total) :]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(fallen))
