"""The hash behind every random choice keeps its values for ever."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from galaxydist.counter_rng import hash64, uniform

integers = st.integers(-(2**63), 2**64 - 1)


def test_hash64_and_uniform_have_their_golden_values() -> None:
    # The first two are the first outputs of the published splitmix64.c for the seeds 0 and 1234567.
    assert int(hash64(0)) == 0xE220A8397B1DCDAF
    assert int(hash64(1234567)) == 6457827717110365317
    assert int(hash64(0, 0)) == 0xA706DD2F4D197E6F
    assert int(hash64(1, 2, 3)) == 0xD0734750FDE362B3
    assert int(hash64(-1)) == int(hash64(2**64 - 1)) == 0xE4D971771B652C20
    assert float(uniform(7, 11)) == 0.8384540140198182


@given(st.lists(integers, min_size=1, max_size=5))
def test_hash64_follows_the_splitmix64_formula(values: list[int]) -> None:
    state, mask = 0, 2**64 - 1
    for value in values:
        state = ((state ^ (value & mask)) + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    assert int(hash64(*values)) == state


def test_hash64_of_arrays_broadcasts_and_equals_single_values() -> None:
    rows, columns = np.arange(-3, 4)[:, None], np.arange(5, dtype=np.int32)
    table = hash64(9, rows, columns)
    assert table.shape == (7, 5) and table.dtype == np.uint64
    assert all(int(table[i, j]) == int(hash64(9, int(rows[i, 0]), j)) for i in range(7) for j in range(5))


def test_hash64_depends_on_the_order_of_its_arguments() -> None:
    assert int(hash64(1, 2)) != int(hash64(2, 1))


def test_uniform_fills_the_unit_interval_evenly() -> None:
    draws = uniform(3, np.arange(100_000))
    assert draws.min() >= 0.0 and draws.max() < 1.0
    counts = np.histogram(draws, bins=20, range=(0, 1))[0]
    chi_square = np.sum((counts - 5000) ** 2 / 5000)
    assert chi_square < 43.8  # 99.9 % point for 19 degrees of freedom


@pytest.mark.parametrize("bad", [0.5, np.array([1.0]), "text"])
def test_hash64_refuses_non_integers(bad: object) -> None:
    with pytest.raises(TypeError, match="integers"):
        hash64(bad)  # type: ignore[arg-type]
