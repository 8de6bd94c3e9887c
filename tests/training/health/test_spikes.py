"""Warnings of a loss that jumps."""

import json
import math
import random

from hypothesis import given
from hypothesis import strategies as st

from galaxydist.training.health.anomalies import LEAST_KNOWN, QUIET_STEPS, LossSpikes

LOSSES = st.floats(1e-3, 1e3)


def noisy(count: int, seed: int = 0) -> list[float]:
    """A loss that falls from 2.3 with a deviation of 0.1."""
    draw = random.Random(seed)
    return [2.3 - step / count + draw.gauss(0, 0.1) for step in range(count)]


def warnings_of(losses: list[float], threshold: float = 8.0, first: int = 1) -> list[str]:
    detector = LossSpikes(threshold)
    return [told for step, loss in enumerate(losses, first) if (told := detector.update(step, loss)) is not None]


def test_loss_spike_warning_names_step_loss_and_median() -> None:
    losses = noisy(150)
    (told,) = warnings_of([*losses, 9.0, *losses[-30:]])
    assert "the loss of step 151 (from 0) is 9, " in told and "the last 150 steps" in told and "train.spike_threshold=8" in told
    median = float(told.split("the median ")[1].split()[0])
    assert 1.5 < median < 2.3


def test_ordinary_loss_noise_gives_no_spike_warning() -> None:
    assert not any(warnings_of(noisy(3000, seed)) for seed in range(5))


def test_loss_spike_detector_needs_a_minimum_of_known_losses() -> None:
    assert not warnings_of([1.0] * (LEAST_KNOWN - 1) + [1000.0])
    assert warnings_of([1.0] * LEAST_KNOWN + [1000.0])
    assert warnings_of([0.0] * LEAST_KNOWN + [1.0])


def test_loss_spike_detector_warns_once_per_quiet_period() -> None:
    losses = [1.0] * LEAST_KNOWN + [50.0] * 20 + [1.0] * (QUIET_STEPS - 20) + [50.0]
    assert len(warnings_of(losses)) == 2


@given(LOSSES, st.lists(st.floats(-1e-6, 1e-6), min_size=60, max_size=300))
def test_rounding_errors_give_no_spike_warning(level: float, noise: list[float]) -> None:
    assert not warnings_of([level * (1 + value) for value in noise])


@given(st.lists(LOSSES, min_size=LEAST_KNOWN, max_size=300), st.floats(0.5, 20))
def test_falling_loss_gives_no_spike_warning(losses: list[float], threshold: float) -> None:
    assert not warnings_of(sorted(losses, reverse=True), threshold)


@given(st.lists(st.one_of(LOSSES, st.sampled_from([math.inf, math.nan])), max_size=300), st.integers(0, 300))
def test_loss_spike_detector_restored_from_its_state_gives_the_same_warnings(losses: list[float], at: int) -> None:
    whole = LossSpikes(3.0, quiet_steps=5)
    told = [whole.update(step, loss) for step, loss in enumerate(losses)]
    first, second = LossSpikes(3.0, quiet_steps=5), LossSpikes(3.0, quiet_steps=5)
    parts = [first.update(step, loss) for step, loss in enumerate(losses[:at])]
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    parts += [second.update(step, loss) for step, loss in enumerate(losses[at:], at)]
    assert parts == told


@given(st.lists(LOSSES, max_size=300))
def test_spike_threshold_0_gives_no_warning(losses: list[float]) -> None:
    assert not warnings_of([*losses, 1e9], threshold=0.0)


@given(st.lists(LOSSES, min_size=LEAST_KNOWN, max_size=250), st.floats(1, 20), st.floats(0.01, 100))
def test_loss_spike_warnings_do_not_depend_on_the_scale_of_the_loss(losses: list[float], threshold: float, factor: float) -> None:
    """A loss summed instead of averaged warns at the same steps (up to the last digits, which a jump of 1e-6 more decides)."""
    jump = max(losses) * 1.5
    assert len(warnings_of([*losses, jump], threshold)) == len(warnings_of([factor * x for x in [*losses, jump]], threshold))
