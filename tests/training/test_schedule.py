"""Learning rate schedules."""

import itertools
import math

import pytest

from galaxydist.recipe.schema import OptimConfig
from galaxydist.training.optimizer import LRSchedule


def test_cosine_schedule_rises_to_its_peak_and_falls_to_its_final_value() -> None:
    config = OptimConfig(lr=1e-2, warmup=0.1, final=0.05)
    rate = LRSchedule(config, total_steps=200)
    rates = [rate(step) for step in range(200)]
    assert all(earlier < later for earlier, later in itertools.pairwise(rates[:21]))
    assert all(earlier > later for earlier, later in itertools.pairwise(rates[20:]))
    assert rates[20] == max(rates) == pytest.approx(1e-2)
    assert rate(200) == pytest.approx(5e-4)
    # Half-way between the peak and the end of the cosine.
    assert rate(110) == pytest.approx(1e-2 * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi / 2))))


def test_constant_schedule_keeps_the_peak() -> None:
    rate = LRSchedule(OptimConfig(lr=0.1, warmup=0.0, schedule="constant"), total_steps=10)
    assert {rate(step) for step in range(10)} == {0.1}
