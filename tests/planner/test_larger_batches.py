"""Batches and rates that ``galaxydist plan`` proposes for more GPUs, and its warning of idle ones."""

from pathlib import Path

import pytest

from galaxydist.planner.estimate import ClusterShape, RunPlan, plan_run
from galaxydist.planner.larger_batches import propose_batches
from galaxydist.planner.table import render_plan
from galaxydist.recipe.resolve import load_recipe

MANY = 10**6


def plan(*words: str, gpus: int = 8, images_per_s: float | None = None) -> RunPlan:
    recipe = load_recipe(["recipe=custom_cnn", "model.width=8", "data.image_size=32", *words]).recipe
    return plan_run(recipe, Path("nowhere"), ClusterShape(1, gpus, images_per_s))


@pytest.mark.parametrize(("optimizer", "factor"), [("sgd", 16 / 3), ("adamw", (16 / 3) ** 0.5), ("lion", None)])
def test_proposed_rate_follows_the_rule_of_the_optimizer(optimizer: str, factor: float | None) -> None:
    words = ["recipe=vit", f"optim.name={optimizer}", "optim.lr=1e-3", "train.batch_size=192", "train.ema=0.99"]
    eight, sixteen, _ = propose_batches(load_recipe(words).recipe, MANY, None)
    assert (eight.batch_size, sixteen.batch_size) == (512, 1024)
    assert sixteen.lr == (None if factor is None else pytest.approx(1e-3 * factor, rel=0.005))
    assert sixteen.ema == pytest.approx(0.99 ** (16 / 3), rel=1e-3)


def test_proposals_keep_a_batch_that_is_large_enough_and_ten_steps_an_epoch() -> None:
    recipe = load_recipe(["recipe=vit", "train.batch_size=2048"]).recipe
    assert [p.batch_size for p in propose_batches(recipe, MANY, None)] == [2048, 2048, 4096]
    assert [p.batch_size for p in propose_batches(recipe, MANY, 4000)] == [2048, 3840, 15360]
    uneven = load_recipe(["recipe=vit", "train.batch_size=1000"]).recipe
    assert [p.batch_size for p in propose_batches(uneven, MANY, None)] == [1008, 1024, 4096]
    recipe = load_recipe(["recipe=vit"]).recipe
    (*_, most) = propose_batches(recipe, 14188, None)
    assert (most.num_gpus, most.batch_size, most.steps_per_epoch, most.is_idle) == (64, 1408, 10, True)
    assert [(p.num_gpus, p.batch_size) for p in propose_batches(recipe, 500, None)] == [(8, 240)]


def test_plan_warns_of_idle_gpus_and_shows_the_proposals() -> None:
    text = render_plan(plan())
    assert "warning: a GPU has 30 images a step: it would be idle" in text
    assert "train.batch_size=512" in text and "square-root rule, Malladi et al. 2022" in text
    assert not any("idle" in warning for warning in plan("profile=8gpu").warnings)
    slow, fast = (plan("profile=8gpu", images_per_s=speed).warnings for speed in (1000, 10_000))
    assert not any("idle" in warning for warning in slow)
    assert any("120 images a step, 12 ms at 10000 img/s" in warning for warning in fast)
