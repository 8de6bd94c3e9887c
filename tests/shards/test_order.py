"""Order: a bijection, the same for every number of processes, another every epoch, and fixed for good by golden values."""

import hashlib
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from galaxydist.errors import UserError
from galaxydist.loading.loader import Batch, DecodeOptions, RankInfo, TrainLoader
from galaxydist.shards.manifest import read_manifest
from galaxydist.shards.order import (
    WINDOW,
    EpochOrder,
    Order,
    ResampledOrder,
    evaluation_batches,
    permute,
    rank_offsets,
    steps_per_epoch,
)
from tests.helpers.memory import peak_memory

shard_sizes = st.lists(st.integers(0, 60), min_size=1, max_size=40).filter(lambda sizes: sum(sizes) > 0)
seeds = st.integers(0, 2**63 - 1)


@given(size=st.integers(1, 700), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size: int, key: int) -> None:
    indexes = np.arange(size)
    images = permute(indexes, size, np.uint64(key))
    assert np.array_equal(np.sort(images), indexes)


def test_permute_is_uniform_over_keys() -> None:
    keys = np.random.default_rng(0).integers(0, 2**63, 60_000).astype(np.uint64)
    counts = np.bincount(permute(3, 10, keys), minlength=10)
    assert ((counts - 6000) ** 2 / 6000).sum() < 30  # chi square with 9 degrees of freedom: 1 in 2,000


@given(sizes=shard_sizes, seed=seeds, epoch=st.integers(0, 1000), num_streams=st.integers(1, 3000), window=st.integers(1, 200))
def test_epoch_order_holds_each_sample_once(sizes: list[int], seed: int, epoch: int, num_streams: int, window: int) -> None:
    order = EpochOrder(sizes, seed=seed, epoch=epoch, num_streams=num_streams, window=window)
    positions = np.arange(sum(sizes))
    samples = order.samples(positions)
    assert np.array_equal(np.sort(samples), positions)


@given(sizes=shard_sizes, seed=seeds, batch_size=st.integers(1, 100), num_streams=st.integers(1, 300), data=st.data())
def test_a_global_batch_is_the_same_for_every_number_of_processes(
    sizes: list[int], seed: int, batch_size: int, num_streams: int, data: st.DataObject
) -> None:
    batch_size = min(batch_size, sum(sizes))
    world_size = data.draw(st.integers(1, batch_size))
    order = EpochOrder(sizes, seed=seed, epoch=1, num_streams=num_streams)
    for batch in range(steps_per_epoch(sum(sizes), batch_size)):
        whole = order.samples(batch * batch_size + np.arange(batch_size))
        dealt = np.full(batch_size, -1)
        for rank in range(world_size):
            offsets = rank_offsets(batch_size, rank, world_size)
            assert batch_size // world_size <= offsets.size <= -(-batch_size // world_size)
            dealt[offsets] = order.samples(batch * batch_size + offsets)
        assert np.array_equal(dealt, whole)


@pytest.mark.parametrize(
    ("sizes", "num_streams", "batch_size"),
    [
        ([5, 4, 3], 500, 4),  # more streams than samples
        ([40, 40, 41], 50, 7),  # more streams than shards, and than a batch
        ([10] * 30, 8, 300),  # one batch an epoch
        ([0, 0, 17, 0, 3, 0], 6, 5),  # empty shards
        ([1] * 50, 7, 11),
        ([9], 1, 1),
        ([1], 192, 1),
        ([9000], 2, 100),  # several windows in a stream
    ],
)
def test_epoch_order_is_a_bijection_for_extreme_shard_stream_and_batch_sizes(
    sizes: list[int], num_streams: int, batch_size: int
) -> None:
    order = EpochOrder(sizes, seed=8, epoch=2, num_streams=num_streams)
    positions = np.arange(sum(sizes))
    assert np.array_equal(np.sort(order.samples(positions)), positions)
    for world_size in {1, min(2, batch_size), min(3, batch_size), batch_size}:
        dealt = [rank_offsets(batch_size, rank, world_size) for rank in range(world_size)]
        assert np.array_equal(np.sort(np.concatenate(dealt)), np.arange(batch_size))


@given(sizes=shard_sizes, seed=seeds, batch_size=st.integers(1, 100), num_streams=st.integers(1, 300))
def test_training_epoch_drops_less_than_one_batch(sizes: list[int], seed: int, batch_size: int, num_streams: int) -> None:
    batch_size = min(batch_size, sum(sizes))
    order = EpochOrder(sizes, seed=seed, epoch=0, num_streams=num_streams)
    num_read = steps_per_epoch(sum(sizes), batch_size) * batch_size
    assert 0 <= sum(sizes) - num_read < batch_size
    assert np.unique(order.samples(np.arange(num_read))).size == num_read


def test_epochs_drop_different_samples() -> None:
    """40 of 1,000 an epoch: as many different ones over 20 epochs as by chance, 1,000 (1 - 0.96^20) = 558."""

    def dropped(epoch: int) -> frozenset[int]:
        order = EpochOrder([100] * 10, seed=6, epoch=epoch, num_streams=12)
        return frozenset(order.samples(np.arange(steps_per_epoch(1000, 64) * 64, 1000)).tolist())

    epochs = [dropped(epoch) for epoch in range(20)]
    assert {len(galaxies) for galaxies in epochs} == {40} and len(set(epochs)) == 20
    assert 500 < len(frozenset.union(*epochs)) < 620


def test_epoch_positions_are_dealt_to_streams_in_turn() -> None:
    """Position p is stream p mod C, place p div C, and segment i of the line has ceil((N - i) / C) samples."""
    sizes, num_streams = [30, 30, 30, 13], 8
    order = EpochOrder(sizes, seed=3, epoch=0, num_streams=num_streams)
    samples = order.samples(np.arange(sum(sizes)))
    shards_in_sequence = np.searchsorted(np.cumsum(sizes), samples, side="right")
    lengths = [samples[stream::num_streams].size for stream in range(num_streams)]
    assert lengths == [-(-(sum(sizes) - stream) // num_streams) for stream in range(num_streams)]
    line = np.concatenate([np.sort(shards_in_sequence[stream::num_streams]) for stream in range(num_streams)])
    assert all(len(set(shards_in_sequence[stream::num_streams].tolist())) <= 2 for stream in range(num_streams))
    assert np.array_equal(np.bincount(line), sizes)


def test_rank_reads_only_its_own_streams_if_world_size_divides_streams_and_batch() -> None:
    num_streams, batch_size, world_size = 12, 24, 4
    for rank in range(world_size):
        positions = 5 * batch_size + rank_offsets(batch_size, rank, world_size)
        assert {int(p) % num_streams % world_size for p in positions} == {rank}


@given(seed=seeds, epoch=st.integers(0, 1000), num_streams=st.integers(1, 500), num_shards=st.integers(1, 40))
def test_orders_of_other_epochs_and_seeds_differ(seed: int, epoch: int, num_streams: int, num_shards: int) -> None:
    """As unlike as random permutations: of 1,000 places one or so holds the same galaxy by chance."""
    sizes = np.diff(np.arange(num_shards + 1) * 1000 // num_shards)

    def orders(seed: int, epoch: int) -> list[Order]:
        labels = np.arange(1000) % 7
        return [
            EpochOrder(sizes, seed=seed, epoch=epoch, num_streams=num_streams),
            ResampledOrder(labels, seed=seed, epoch=epoch),
        ]

    for other in (orders(seed, epoch + 1), orders(seed + 1, epoch)):
        for one, two in zip(orders(seed, epoch), other, strict=True):
            same = one.samples(np.arange(1000)) == two.samples(np.arange(1000))
            # One shard in 500 streams of two places: the stream's two galaxies stay or swap.
            assert same.mean() < (0.65 if 3 * num_streams > 1000 else 0.45)


def test_order_version_1_has_its_golden_values() -> None:
    """Fixed for order_version 1: a change here breaks the resuming of every run."""
    order = EpochOrder([7, 5, 9, 4], seed=42, epoch=3, num_streams=4, window=5)
    assert order.samples(np.arange(25)).tolist() == GOLDEN_ORDER
    resampled = ResampledOrder([0, 0, 0, 0, 1, 2, 2, 0, -1, 0], seed=42, epoch=3)
    assert resampled.samples(np.arange(10)).tolist() == GOLDEN_RESAMPLED


GOLDEN_DIGESTS = {
    "windows": "1db38414ed292dea",
    "defaults": "5d400f3d837b6abd",
    "streams": "4a45c9d02c86ce49",
    "resampled": "befd6dd0057b17ef",
}
GOLDEN_LARGE = [621992249, 723469716, 621990715, 529978736, 344173214]


@pytest.mark.parametrize(("name", "digest"), GOLDEN_DIGESTS.items())
def test_whole_epochs_have_their_golden_digests(name: str, digest: str) -> None:
    """Whole epochs: several windows in a stream, streams shorter than a window, empty shards, more streams than samples."""
    orders: dict[str, Order] = {
        "windows": EpochOrder([5000, 0, 7001, 4500, 9000], seed=1, epoch=0, num_streams=2),
        "defaults": EpochOrder(np.arange(300) % 97, seed=2**62 + 1, epoch=12),
        "streams": EpochOrder([3, 0, 1, 4], seed=5, epoch=1, num_streams=1000),
        "resampled": ResampledOrder(np.arange(5000) ** 2 % 23 % 10 - 1, seed=3, epoch=7),
    }
    samples = orders[name].samples(np.arange(orders[name].num_positions))
    assert hashlib.sha256(samples.astype("<i8").tobytes()).hexdigest()[:16] == digest


def test_order_of_a_billion_samples_has_its_golden_values() -> None:
    order = EpochOrder(np.full(100_000, 10_000), seed=1, epoch=1)
    assert order.samples([0, 1, 192, 10**9 // 2, 10**9 - 1]).tolist() == GOLDEN_LARGE


GOLDEN_ORDER = [24, 3, 15, 20, 21, 12, 17, 8, 22, 4, 18, 7, 23, 5, 16, 9, 0, 6, 14, 10, 2, 13, 19, 11, 1]
GOLDEN_RESAMPLED = [7, 4, 6, 4, 5, 1, 4, 6, 4, 2]


@given(labels=st.lists(st.integers(-1, 6), min_size=1, max_size=400), seed=seeds, epoch=st.integers(0, 9))
def test_resampled_order_is_balanced_over_classes_and_within_them(labels: list[int], seed: int, epoch: int) -> None:
    label = np.array(labels)
    if (label < 0).all():
        with pytest.raises(UserError, match="labelled"):
            ResampledOrder(label, seed=seed, epoch=epoch)
        return
    samples = ResampledOrder(label, seed=seed, epoch=epoch).samples(np.arange(label.size))
    drawn = label[samples]
    classes = np.unique(label[label >= 0])
    counts = np.array([(drawn == k).sum() for k in classes])
    assert counts.sum() == label.size
    assert set(counts.tolist()) <= {label.size // classes.size, -(-label.size // classes.size)}
    for k, count in zip(classes, counts, strict=True):
        times = np.bincount(samples[drawn == k], minlength=label.size)[label == k]
        assert set(times.tolist()) <= {count // times.size, -(-count // times.size)}


def test_batch_size_above_the_split_is_refused() -> None:
    with pytest.raises(UserError, match=r"train.batch_size=64 is more than the 63 training galaxies; use 63"):
        steps_per_epoch(63, 64)
    assert steps_per_epoch(64, 64) == 1


def test_rank_offsets_refuse_more_processes_than_the_global_batch() -> None:
    with pytest.raises(UserError, match=r"9 processes are more than the global batch holds .*=8"):
        rank_offsets(8, 0, 9)


def test_epoch_order_raises_index_error_outside_the_epoch() -> None:
    order = EpochOrder([5], seed=0, epoch=0)
    with pytest.raises(IndexError):
        order.samples([5])
    with pytest.raises(IndexError):
        order.samples([-1])


@given(num_samples=st.integers(0, 500), batch_size=st.integers(1, 60), world_size=st.integers(1, 12))
def test_evaluation_batches_are_dealt_to_ranks_exactly_once(num_samples: int, batch_size: int, world_size: int) -> None:
    dealt = [batch for rank in range(world_size) for batch in evaluation_batches(num_samples, batch_size, rank, world_size)]
    assert sorted(dealt) == list(range(-(-num_samples // batch_size)))


def test_order_of_100000_shards_gives_distinct_samples_at_its_end() -> None:
    """The memory is that of a few numbers for each shard; and a window of a stream is a permutation of its stretch."""
    with peak_memory() as peak:
        order = EpochOrder(np.full(100_000, 10_000), seed=1, epoch=1)
        samples = order.samples(10**9 - 1 - np.arange(256))
    assert peak() < 20_000_000
    assert np.unique(samples).size == 256 and samples.min() >= 0 and samples.max() < 10**9
    for stream, window in ((0, 0), (100, 700)):
        found = np.sort(order.samples(stream + (window * WINDOW + np.arange(WINDOW)) * order.num_streams))
        gaps = np.diff(found)
        assert (gaps >= 1).all() and (gaps > 1).sum() <= 1  # two shards at most, without holes


def test_epoch_order_is_uncorrelated_with_storage_and_with_other_epochs() -> None:
    """Rank correlation near 0, and the mates of a batch are new ones in the next epoch."""
    sizes, batch_size = [100] * 100, 64
    orders = [EpochOrder(sizes, seed=5, epoch=epoch).samples(np.arange(10_000)) for epoch in (0, 1)]
    assert abs(np.corrcoef(orders[0], np.arange(10_000))[0, 1]) < 0.05
    batch_of = [np.empty(10_000, np.int64) for _ in orders]
    for of, order in zip(batch_of, orders, strict=True):
        of[order] = np.arange(10_000) // batch_size
    pairs = np.random.default_rng(0).integers(0, 10_000, (400_000, 2))
    together = [of[pairs[:, 0]] == of[pairs[:, 1]] for of in batch_of]
    twice = together[0] & together[1] & (pairs[:, 0] != pairs[:, 1])
    assert twice.sum() < 40  # by chance 400,000 / 157^2 = 16


def read(manifest_path: Path, steps: int, **settings: object) -> list[Batch]:
    with TrainLoader(read_manifest(manifest_path), seed=3, decode=DecodeOptions(threads=1), **settings) as reader:  # type: ignore[arg-type]
        return list(islice(reader, steps))


def contents(batch: Batch) -> NDArray[np.int64]:
    """(4, B): position, sample, label, and a sum that tells images apart."""
    images = batch.images_BHWC.numpy().astype(np.int64).sum(axis=(1, 2, 3))
    return np.stack([batch.positions_B.numpy(), batch.samples_B.numpy(), batch.labels_B.numpy(), images])


@pytest.mark.parametrize("balance", ["none", "resample"])
@pytest.mark.parametrize(("num_streams", "batch_size"), [(192, 24), (500, 7), (3, 5), (5, 72), (1, 1)])
def test_train_loaders_of_any_world_size_share_each_global_batch(
    blobs: Path, num_streams: int, batch_size: int, balance: str
) -> None:
    """More streams than galaxies; fewer and more than a batch; one batch an epoch. Across the end of an epoch."""
    steps = min(5, 72 // batch_size + 2)
    settings = {"num_streams": num_streams, "batch_size": batch_size, "balance": balance}
    alone = [contents(batch) for batch in read(blobs, steps, **settings)]
    labels = read_manifest(blobs).labels("train")
    for world_size in sorted({w for w in (2, 3, 5, batch_size) if 1 < w <= min(batch_size, 24)}):
        dealt = [np.full_like(whole, -1) for whole in alone]
        for rank in range(world_size):
            for step, batch in enumerate(read(blobs, steps, ranks=RankInfo(rank, world_size), **settings)):
                assert batch.step == step and batch.epoch == step // (72 // batch_size)
                dealt[step][:, rank_offsets(batch_size, rank, world_size)] = contents(batch)
        assert np.array_equal(dealt, alone)
    for whole in alone:
        assert np.array_equal(whole[2], labels[whole[1]])


@pytest.mark.parametrize("balance", ["none", "resample"])
def test_train_loader_resumes_exactly_at_any_step_and_world_size(blobs: Path, balance: str) -> None:
    """In the middle of an epoch, at its end, in the next, and with another number of processes than before."""
    settings = {"num_streams": 5, "batch_size": 20, "balance": balance}  # 3 steps an epoch
    whole = [contents(batch) for batch in read(blobs, 8, **settings)]
    for start in range(1, 8):
        late = read(blobs, 8 - start, start_step=start, **settings)
        assert [(batch.step, batch.epoch) for batch in late] == [(step, step // 3) for step in range(start, 8)]
        assert all(np.array_equal(contents(batch), expected) for batch, expected in zip(late, whole[start:], strict=True))
        for rank in range(3):
            late = read(blobs, 8 - start, start_step=start, ranks=RankInfo(rank, 3), **settings)
            mine = rank_offsets(20, rank, 3)
            assert all(np.array_equal(contents(b), expected[:, mine]) for b, expected in zip(late, whole[start:], strict=True))


def test_resampled_epochs_of_the_train_loader_are_balanced_and_differ(blobs: Path) -> None:
    """72 positions over 3 classes of 24 galaxies: every galaxy once, each epoch in another order."""
    (first, second) = (contents(batch) for batch in read(blobs, 2, num_streams=5, batch_size=72, balance="resample"))
    for epoch in (first, second):
        assert np.bincount(epoch[2]).tolist() == [24, 24, 24]
        assert sorted(epoch[1].tolist()) == list(range(72))
    assert not np.array_equal(first[1], second[1])
