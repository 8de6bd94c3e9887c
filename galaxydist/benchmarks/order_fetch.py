"""How many shards each node of a large job fetches in an epoch, and how many it must hold at once: worked out, not read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from galaxydist.shards.order import EpochOrder
from galaxydist.shards.shard_usage import node_uses, shard_uses, working_set


@dataclass(frozen=True)
class Job:
    """Ranks on nodes (contiguous), and a data set of ``num_shards`` shards of ``shard_samples`` each."""

    num_nodes: int
    ranks_per_node: int
    num_shards: int
    shard_samples: int

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.ranks_per_node


def default_jobs() -> list[Job]:
    """1,024 ranks in 128 nodes."""
    return [Job(128, 8, num_shards, 10_000) for num_shards in (10_000, 100_000)]


def default_choices(world_size: int) -> list[tuple[int, int]]:
    """(C, G) to compare: the default C, one that shares more divisors with 1,024, and multiples of the world size."""
    return [
        (192, world_size),
        (192, world_size * 3 // 2),
        (256, world_size),
        (world_size, world_size),
        (world_size, world_size * 3 // 2),
        (world_size, world_size * 4),
        (world_size * 3, world_size * 3),
    ]


def measure_fetches(job: Job, choices: Sequence[tuple[int, int]], seed: int = 0) -> dict[str, Any]:
    """Shards a node fetches in an epoch, if each shard is fetched once by a node that needs it.

    Returns:
        ``{"task", "num_nodes", "ranks_per_node", "num_shards", "shard_samples", "choices": [...]}``, for each choice
        ``num_streams``, ``batch_size``, ``divides_streams`` and ``divides_batch`` (does W divide them), ``shards_per_node``
        {"min", "median", "max"}, ``fetches_per_shard`` (total over the nodes, divided by the number of shards), ``held_per_node``
        (the most that any node needs at one step) and ``held_by_one`` (the same, were all ranks on one node).
    """
    return {
        "task": "order.fetch",
        "num_nodes": job.num_nodes,
        "ranks_per_node": job.ranks_per_node,
        "num_shards": job.num_shards,
        "shard_samples": job.shard_samples,
        "choices": [_measure(job, num_streams, batch_size, seed) for num_streams, batch_size in choices],
    }


def _measure(job: Job, num_streams: int, batch_size: int, seed: int) -> dict[str, Any]:
    order = EpochOrder(np.full(job.num_shards, job.shard_samples), seed=seed, epoch=0, num_streams=num_streams)
    uses = node_uses(order, batch_size, job.num_nodes, job.ranks_per_node)
    fetched = [np.unique(use["shard"]).size for use in uses]
    return {
        "num_streams": num_streams,
        "batch_size": batch_size,
        "divides_streams": num_streams % job.world_size == 0,
        "divides_batch": batch_size % job.world_size == 0,
        "shards_per_node": {"min": min(fetched), "median": float(np.median(fetched)), "max": max(fetched)},
        "fetches_per_shard": sum(fetched) / job.num_shards,
        "held_per_node": max(working_set(use, 1) for use in uses),
        "held_by_one": working_set(shard_uses(order, batch_size, np.arange(batch_size)), 1),
    }


def print_fetches(result: Mapping[str, Any]) -> None:
    """A line a choice of C and G."""
    world_size = result["num_nodes"] * result["ranks_per_node"]
    print(
        f"\nshards fetched in an epoch: W = {world_size:,} ranks in {result['num_nodes']} nodes, "
        f"{result['num_shards']:,} shards of {result['shard_samples']:,}"
    )
    print(f"{'W divides':>22}{'shards fetched by a node':>30}{'fetches':>10}{'held at once':>14}{'all ranks on':>14}")
    print(f"{'C':>6}{'G':>6}{'C':>5}{'G':>5}{'min':>10}{'median':>10}{'max':>10}{'a shard':>10}{'by a node':>14}{'one node':>14}")
    for choice in result["choices"]:
        shards = choice["shards_per_node"]
        divides = "".join(f"{'yes' if choice[of] else 'no':>5}" for of in ("divides_streams", "divides_batch"))
        print(
            f"{choice['num_streams']:6d}{choice['batch_size']:6d}{divides}"
            f"{shards['min']:10,d}{shards['median']:10,.0f}{shards['max']:10,d}{choice['fetches_per_shard']:10.2f}"
            f"{choice['held_per_node']:14,d}{choice['held_by_one']:14,d}"
        )


ADVICE = """
Where W divides train.batch_size (G), each shard is fetched by about W / gcd(C, W) nodes: by one where W divides data.num_streams
(C) too. The order does not depend on it, only how often a shard crosses the network. For shards in an object store, set
data.num_streams to a multiple of the most processes you will use: it is fixed for a run. More streams also have more shards in
use at once, so fewer nodes then need a larger cache (last column). Nor should C be many times G: a batch smaller than C is made
of neighbouring streams, which lie in the same shards where shards are few.
"""
