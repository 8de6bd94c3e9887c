"""How well an epoch is shuffled, compared with a uniformly random permutation measured in the same way.

The same galaxies in two kinds of shards: sorted by class (as Galaxy10's file is), and as our writer stores them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from galaxydist.counter_rng import Purpose, hash64
from galaxydist.shards.order import EpochOrder
from galaxydist.surveys.official_split import read_official_split
from galaxydist.surveys.split import TRAIN

NUM_STREAMS = 192
WORLD_SIZE = 8
EPOCHS = 3
_BLOCK = 10
_CHUNK = 1 << 18
_TITLES = {
    "rank_correlation": "rank correlation of storage and reading order (rms)",
    "recurring_mates": "batch-mates that are so again in the next epoch, against chance",
    "sorted_run": "class-sorted shards: mean run of one class",
    "sorted_longest_run": "                     longest run",
    "sorted_batch_spread": "                     class counts of a batch, chi2/dof",
    "sorted_rank_spread": f"                     of one rank's share of it (of {WORLD_SIZE})",
    "sorted_block_spread": f"                     of {_BLOCK} successive batches",
    "written_run": "as our writer stores: mean run of one class",
    "written_longest_run": "                     longest run",
    "written_batch_spread": "                     class counts of a batch, chi2/dof",
    "written_rank_spread": f"                     of one rank's share of it (of {WORLD_SIZE})",
    "written_block_spread": f"                     of {_BLOCK} successive batches",
}


@dataclass(frozen=True)
class Store:
    """A training split: its name, samples in each shard, and the labels in storage order, sorted by class."""

    name: str
    shard_samples: NDArray[np.int64]
    sorted_labels: NDArray[np.int64]


def galaxy10_store() -> Store:
    """Galaxy10's training split in the shards that the writer makes of it by default."""
    official = read_official_split()
    labels = np.sort(official.labels[official.original == TRAIN].astype(np.int64))
    return Store("Galaxy10 DECaLS, train", _even_shards(labels.size, 16), labels)


def survey_store(num_shards: int, shard_samples: int = 1000) -> Store:
    """A survey with Galaxy10's mix of classes."""
    counts = np.bincount(galaxy10_store().sorted_labels)
    num_samples = num_shards * shard_samples
    labels = np.searchsorted(np.cumsum(counts), (np.arange(num_samples) + 0.5) / num_samples * counts.sum(), side="right")
    return Store("survey-like", _even_shards(num_samples, num_shards), labels.astype(np.int64))


def measure_quality(store: Store, batch_size: int = 192, seed: int = 0) -> dict[str, Any]:
    """Measure the order's first epochs on a store, and as many random permutations.

    Args:
        store: at least ten batches.
        batch_size: G.
        seed: of the order and of the permutations.

    Returns:
        ``{"task", "store", "num_samples", "num_shards", "batch_size", "num_streams", "order": {...}, "random": {...}}``. Both
        hold ``rank_correlation`` (Spearman's, root mean square over the epochs); ``recurring_mates``: pairs of one batch that
        share a batch in the next epoch too, divided by their number expected by chance; and for both ways of storing
        (``sorted_``, ``written_``) ``run`` and ``longest_run`` of equal labels, and the ``spread`` of class counts in a batch, in
        a rank's share of it and in successive batches: chi square over degrees of freedom, 1 by chance, less where batches are
        more alike than that.
    """
    num_samples = store.sorted_labels.size
    stored_rows = np.argsort(hash64(seed, 0, np.arange(num_samples), Purpose.STORAGE), kind="stable")  # what the writer does
    labels = {"sorted": store.sorted_labels, "written": store.sorted_labels[stored_rows]}
    random = np.random.default_rng(seed)
    drawn = [random.permutation(num_samples) for _ in range(EPOCHS)]
    return {
        "task": "order.quality",
        "store": store.name,
        "num_samples": num_samples,
        "num_shards": store.shard_samples.size,
        "batch_size": batch_size,
        "num_streams": NUM_STREAMS,
        "order": _describe([_read(store, seed, epoch) for epoch in range(EPOCHS)], labels, batch_size),
        "random": _describe(drawn, labels, batch_size),
    }


def print_quality(result: Mapping[str, Any]) -> None:
    """A line a measure: the order, and random permutations."""
    print(
        f"\nshuffle quality: {result['store']}, {result['num_samples']:,} samples in {result['num_shards']:,} shards, "
        f"C = {NUM_STREAMS}, G = {result['batch_size']}, {EPOCHS} epochs"
    )
    print(f"{'':<66}{'order':>10}{'random':>10}")
    for name, title in _TITLES.items():
        values = (result[kind][name] for kind in ("order", "random"))
        print(f"{title:<66}" + "".join(f"{value:10d}" if isinstance(value, int) else f"{value:10.4f}" for value in values))


def _describe(epochs: list[NDArray[np.int64]], labels: Mapping[str, NDArray[np.int64]], batch_size: int) -> dict[str, Any]:
    correlations = [_rank_correlation(samples) for samples in epochs]
    found: dict[str, Any] = {
        "rank_correlation": float(np.sqrt(np.mean(np.square(correlations)))),
        "recurring_mates": float(np.mean([_recurring_mates(first, second, batch_size) for first, second in pairwise(epochs)])),
    }
    for way, label in labels.items():
        read = [label[samples] for samples in epochs]
        shares = np.bincount(label) / label.size
        runs = [np.diff(np.flatnonzero(np.diff(classes, prepend=-1, append=-1))) for classes in read]
        found[f"{way}_run"] = float(np.mean([run.mean() for run in runs]))
        found[f"{way}_longest_run"] = int(max(run.max() for run in runs))
        batches = [classes[: classes.size // batch_size * batch_size].reshape(-1, batch_size) for classes in read]
        found[f"{way}_batch_spread"] = float(np.mean([_spread(batch, shares) for batch in batches]))
        found[f"{way}_rank_spread"] = float(np.mean([_spread(batch[:, ::WORLD_SIZE], shares) for batch in batches]))
        blocks = [batch[: len(batch) // _BLOCK * _BLOCK].reshape(-1, _BLOCK * batch_size) for batch in batches]
        found[f"{way}_block_spread"] = float(np.mean([_spread(block, shares) for block in blocks]))
    return found


def _rank_correlation(samples: NDArray[np.int64]) -> float:
    """Spearman's: both are permutations of 0 ... N-1, so they are their own ranks."""
    return float(np.corrcoef(np.arange(samples.size, dtype=np.float64), samples.astype(np.float64))[0, 1])


def _recurring_mates(first: NDArray[np.int64], second: NDArray[np.int64], batch_size: int) -> float:
    """Pairs that share a batch in both epochs, over those expected of two independent permutations."""
    num_batches = first.size // batch_size
    batch_of = np.empty(first.size, np.int64)
    batch_of[second] = np.arange(first.size) // batch_size
    later = batch_of[first[: num_batches * batch_size]]
    meetings = np.arange(later.size) // batch_size * (num_batches + 1) + later
    counts = np.unique(meetings[later < num_batches], return_counts=True)[1]
    same = batch_size * (batch_size - 1) / 2 * num_batches  # pairs that share a batch in one epoch
    expected = same * same / (first.size * (first.size - 1) / 2)
    return float((counts * (counts - 1) // 2).sum() / expected)


def _spread(classes_RB: NDArray[np.int64], shares_K: NDArray[np.float64]) -> float:
    """Mean over rows of chi square over degrees of freedom of the class counts."""
    num_rows, row_size = classes_RB.shape
    cells = np.arange(num_rows)[:, None] * shares_K.size + classes_RB
    counts = np.bincount(cells.ravel(), minlength=num_rows * shares_K.size).reshape(num_rows, -1)
    expected = row_size * shares_K
    return float(((counts - expected) ** 2 / expected).sum(axis=1).mean() / (shares_K.size - 1))


def _read(store: Store, seed: int, epoch: int) -> NDArray[np.int64]:
    """All samples of an epoch, in reading order."""
    order = EpochOrder(store.shard_samples, seed=seed, epoch=epoch, num_streams=NUM_STREAMS)
    starts = range(0, order.num_positions, _CHUNK)
    return np.concatenate([order.samples(np.arange(s, min(s + _CHUNK, order.num_positions))) for s in starts])


def _even_shards(num_samples: int, num_shards: int) -> NDArray[np.int64]:
    return np.diff(np.arange(num_shards + 1) * num_samples // num_shards)
