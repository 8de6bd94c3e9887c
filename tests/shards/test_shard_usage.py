"""What a cache must hold: never less than the batches read, never more than the rule of windows says."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from galaxydist.shards.order import EpochOrder, evaluation_batches, rank_offsets
from galaxydist.shards.shard_usage import (
    INTERVAL,
    peak_bytes,
    usage_of_evaluation,
    usage_of_nodes,
    usage_of_rank,
    usage_of_resampling,
)
from tests.helpers.memory import peak_memory

shard_sizes = st.lists(st.integers(0, 40), min_size=1, max_size=25).filter(lambda sizes: sum(sizes) > 0)


def shard_of(sizes: list[int], samples: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.searchsorted(np.cumsum(sizes), samples, side="right")


def marked(uses: NDArray[np.void], num_shards: int, num_steps: int) -> NDArray[np.bool_]:
    """(shard, step): is it in use? Checks on the way that the rows are sorted, inside, and as few as they can be."""
    assert uses.dtype == INTERVAL
    rows = [(int(row["first_step"]), int(row["shard"]), int(row["last_step"])) for row in uses]
    assert rows == sorted(rows)
    used = np.zeros((num_shards, num_steps + 2), bool)
    for first, shard, last in rows:
        assert 0 <= first <= last < num_steps
        assert not used[shard, first : last + 3].any()  # a step of air on both sides: shifted by one below
        used[shard, first + 1 : last + 2] = True
    return used[:, 1:-1]


@given(
    sizes=shard_sizes, num_streams=st.integers(1, 60), window=st.integers(1, 60), batch_size=st.integers(1, 70), data=st.data()
)
def test_usage_of_rank_follows_the_windows_and_covers_every_sample_read(
    sizes: list[int], num_streams: int, window: int, batch_size: int, data: st.DataObject
) -> None:
    """Against every sample read, and against the rule worked out sample by sample."""
    seed = data.draw(st.integers(0, 99))
    offsets = np.array(data.draw(st.sets(st.integers(0, batch_size - 1), min_size=1, max_size=8).map(sorted)))
    order = EpochOrder(sizes, seed=seed, epoch=1, num_streams=num_streams, window=window)
    num_steps = sum(sizes) // batch_size
    used = marked(usage_of_rank(order, batch_size, offsets), len(sizes), num_steps)

    shards = shard_of(sizes, order.samples(np.arange(sum(sizes))))
    for step in range(num_steps):
        assert used[shards[step * batch_size + offsets], step].all()

    expected = np.zeros((len(sizes), sum(sizes) // batch_size + 1), bool)
    hit = {(step * batch_size + int(offset)) % num_streams for step in range(num_streams) for offset in offsets}
    for stream in hit:
        positions = np.arange(stream, sum(sizes), num_streams)
        for shard in set(shards[positions].tolist()):
            windows = np.flatnonzero(shards[positions] == shard) // window
            mixed = positions[windows.min() * window : (windows.max() + 1) * window]
            expected[shard, mixed[0] // batch_size : mixed[-1] // batch_size + 1] = True
    assert np.array_equal(used, expected[:, :num_steps])


def test_rank_uses_only_shards_of_its_streams_if_world_size_divides_streams() -> None:
    order = EpochOrder([100] * 120, seed=2, epoch=0, num_streams=12, window=64)
    all_shards = []
    for rank in range(4):
        uses = usage_of_rank(order, 24, rank_offsets(24, rank, 4))
        own = order.samples([p for p in range(order.num_positions) if p % 4 == rank])
        assert set(uses["shard"].tolist()) == set((own // 100).tolist())
        all_shards.extend(np.unique(uses["shard"]).tolist())
    # Beside the shards that two streams share, each is fetched by one rank.
    assert 120 <= len(all_shards) <= 120 + 12


def test_every_rank_uses_all_shards_if_world_size_does_not_divide_streams() -> None:
    order = EpochOrder([100] * 120, seed=2, epoch=0, num_streams=12, window=64)
    for rank in range(5):
        assert np.unique(usage_of_rank(order, 25, rank_offsets(25, rank, 5))["shard"]).size == 120


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 30), st.integers(1, 40))
def test_usage_of_nodes_equals_the_usage_of_their_ranks(num_nodes: int, ranks_per_node: int, more: int, num_streams: int) -> None:
    world_size = num_nodes * ranks_per_node
    batch_size = world_size + more
    order = EpochOrder([7, 30, 0, 12, 25] * 6, seed=3, epoch=1, num_streams=num_streams, window=4)
    for node, uses in enumerate(usage_of_nodes(order, batch_size, num_nodes, ranks_per_node)):
        ranks = range(node * ranks_per_node, (node + 1) * ranks_per_node)
        offsets = np.concatenate([rank_offsets(batch_size, rank, world_size) for rank in ranks])
        assert np.array_equal(uses, usage_of_rank(order, batch_size, offsets))


def test_shard_shared_by_two_streams_is_not_held_between_its_uses() -> None:
    """It is the last of one stream and the first of the next: needed at the end of the epoch and at its start."""
    order = EpochOrder([100] * 15, seed=4, epoch=0, num_streams=2, window=10)
    uses = usage_of_rank(order, 10, np.arange(10))
    (between,) = [shard for shard in range(15) if np.count_nonzero(uses["shard"] == shard) == 2]
    first, second = uses[uses["shard"] == between]
    assert (first["first_step"], second["last_step"]) == (0, 149)
    assert first["last_step"] < 20
    assert second["first_step"] > 130
    assert peak_bytes(uses, 7) <= 4 * 7


@given(sizes=shard_sizes, batch_size=st.integers(1, 50), world_size=st.integers(1, 9))
def test_usage_of_evaluation_is_the_shards_of_the_ranks_own_batches(sizes: list[int], batch_size: int, world_size: int) -> None:
    num_batches = -(-sum(sizes) // batch_size)
    for rank in range(world_size):
        mine = np.array(evaluation_batches(sum(sizes), batch_size, rank, world_size), np.int64)
        uses = usage_of_evaluation(sizes, batch_size, mine)
        if world_size == 1:
            assert np.array_equal(uses, usage_of_evaluation(sizes, batch_size))
        rows = [(int(row["first_step"]), int(row["shard"])) for row in uses]
        assert rows == sorted(rows)
        needed: dict[int, list[int]] = {}
        for batch in mine.tolist():
            samples = np.arange(batch * batch_size, min((batch + 1) * batch_size, sum(sizes)))
            for shard in set(shard_of(sizes, samples).tolist()):
                needed.setdefault(shard, []).append(batch)
        assert {int(row["shard"]): (int(row["first_step"]), int(row["last_step"])) for row in uses} == {
            shard: (batches[0], batches[-1]) for shard, batches in needed.items()
        }
        assert uses.size == 0 or uses["last_step"].max() < num_batches


def test_usage_of_resampling_is_every_shard_for_the_whole_epoch() -> None:
    assert usage_of_resampling(3, 5).tolist() == [(0, 0, 4), (1, 0, 4), (2, 0, 4)]
    assert usage_of_resampling(3, 0).size == 0
    assert peak_bytes(usage_of_resampling(3, 5), [10, 20, 40]) == 70


@given(
    rows=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9), st.integers(0, 9)), max_size=12),
    sizes=st.lists(st.integers(0, 50), min_size=5, max_size=5),
)
def test_peak_bytes_is_the_maximum_over_steps(rows: list[tuple[int, int, int]], sizes: list[int]) -> None:
    uses = np.array([(shard, min(span), max(span)) for shard, *span in rows], INTERVAL)
    at = [sum(sizes[row["shard"]] for row in uses if row["first_step"] <= step <= row["last_step"]) for step in range(10)]
    assert peak_bytes(uses, sizes) == max(at)
    assert peak_bytes(uses, 1) == (
        0 if not rows else max(sum(r["first_step"] <= s <= r["last_step"] for r in uses) for s in range(10))
    )


@pytest.mark.parametrize("num_streams", [192, 1024])
def test_usage_of_rank_is_computed_for_a_billion_samples(num_streams: int) -> None:
    """10^9 samples in 10^5 shards: the memory is that of a few numbers for each shard."""
    with peak_memory() as peak:
        order = EpochOrder(np.full(100_000, 10_000), seed=1, epoch=1, num_streams=num_streams)
        uses = usage_of_rank(order, 1024, rank_offsets(1024, 5, 1024))
    assert peak() < 20_000_000
    steps = np.array([0, 1, 500_000, 976_561])
    read = order.samples(steps * 1024 + 5) // 10_000
    for step, shard in zip(steps, read, strict=True):
        row = uses[uses["shard"] == shard]
        assert ((row["first_step"] <= step) & (step <= row["last_step"])).any()
    assert peak_bytes(uses, 1) <= 8
