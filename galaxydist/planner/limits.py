"""Limits of a run that are checked before it starts: errors with a remedy, and warnings."""

from collections.abc import Callable
from math import gcd
from typing import TYPE_CHECKING

from galaxydist.errors import UserError
from galaxydist.recipe.rules import check_strategy, check_world, is_mixing
from galaxydist.recipe.schema import Recipe

if TYPE_CHECKING:  # torch
    from galaxydist.planner.memory import Memory, ModelMemory

# Batch normalisation's error grows quickly below this many images (Wu & He 2018, arXiv:1803.08494, figure 1).
FEW_IMAGES = 8


def plan_options(num_nodes: int, gpus_per_node: int) -> str:
    """Return the flags of ``galaxydist plan`` for these processes."""
    return f"--nodes {num_nodes} --gpus-per-node {gpus_per_node}"


def check_processes(
    recipe: Recipe, num_train: int, num_nodes: int, gpus_per_node: int, *, fewer: Callable[[int, int], str] = plan_options
) -> None:
    """Raise an error if processes, batch size and training split do not fit together.

    Args:
        recipe: the run.
        num_train: training galaxies.
        num_nodes, gpus_per_node: one process for each GPU.
        fewer: returns the options for other numbers of nodes and processes per node.

    Raises:
        UserError: more processes than images in a batch, a batch larger than the training split, a mixup pair on two processes.
    """
    batch_size, world_size = recipe.train.batch_size, num_nodes * gpus_per_node
    if batch_size > num_train:
        multiple = num_train // world_size * world_size
        fits = f"{multiple} (a multiple of {world_size} processes) or less" if multiple else f"{num_train} or less"
        raise UserError(f"train.batch_size={batch_size} is more than the {num_train} training galaxies. Set it to {fits}.")
    if world_size > batch_size:
        smaller = _fewer(batch_size, num_nodes, gpus_per_node, fewer)
        enough = (
            f", or set train.batch_size={world_size} or a multiple of it"
            if world_size <= num_train
            else f" (there are only {num_train} training galaxies for a batch)"
        )
        raise UserError(
            f"{world_size} processes ({num_nodes} nodes x {gpus_per_node}) are more than the global batch holds "
            f"(train.batch_size={batch_size}). Use {smaller}{enough}."
        )
    check_strategy(recipe.train, "bf16" if recipe.train.precision == "auto" else recipe.train.precision)
    if is_mixing(recipe.train):
        check_world(batch_size, world_size)


def check_cache(num_bytes: int, cache_size: float) -> None:
    """Raise the data loader's error if a node's cache cannot hold the shards in use at a time.

    Args:
        num_bytes: size of these shards.
        cache_size: size of a node's cache in GB (10^9 bytes).

    Raises:
        UserError: the cache is too small; names a sufficient size.
    """
    if num_bytes > cache_size * 1e9:
        raise UserError(
            f"data.cache_size={cache_size:g} GB do not hold the {num_bytes / 1e9:.2f} GB of shards that a node reads at the same "
            f"time: set data.cache_size={num_bytes * 1.5 / 1e9:.2g} or more, or use more nodes."
        )


def check_memory(recipe: Recipe, memory: "Memory", gpu_memory: float, world_size: int) -> None:
    """Raise an error if a training step does not fit a GPU.

    Args:
        recipe: the run.
        memory: with the smallest possible micro-batch, or the recipe's.
        gpu_memory: memory of one GPU in GB (10^9 bytes).
        world_size: number of processes.

    Raises:
        UserError: the step does not fit; names the largest part and how to reduce it.
    """
    if memory.total <= gpu_memory * 1e9:
        return
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer state": memory.optimizer,
        "moving average": memory.moving_average,
        "blocks gathered by fsdp": memory.gathered,
        "decoded images": memory.images,
        "activations": memory.activations,
        "allowance for CUDA": memory.allowance,
    }
    largest = max(parts, key=lambda name: parts[name])
    helps = []
    train = recipe.train
    if isinstance(train.micro_batch, int) and memory.micro_batch > 1:
        helps.append("train.micro_batch=auto (or a smaller number)")
    if largest == "activations":
        if not train.gradient_checkpointing:
            helps.append("train.gradient_checkpointing=true")
        helps.append(f"a smaller data.image_size (now {recipe.data.image_size})")
    if largest == "decoded images":
        helps.append("more GPUs, or a smaller train.batch_size")
    if largest in ("weights", "gradients", "optimizer state", "moving average"):
        if train.strategy != "fsdp" and world_size > 1:
            helps.append("train.strategy=fsdp")
        helps.append("more GPUs with train.strategy=fsdp" if world_size == 1 or train.strategy == "fsdp" else "a smaller model")
    helps.append(f"a GPU of {-(-memory.total // 10**9)} GB")
    images = "1 image" if memory.micro_batch == 1 else f"{memory.micro_batch} images"
    raise UserError(
        f"--gpu-memory {gpu_memory:g} GB do not hold a step of {images} at a time, which takes {memory.total / 1e9:.2f} GB; "
        f"most of it: {largest}, {parts[largest] / 1e9:.2f} GB. Remedies: {'; '.join(helps)}."
    )


def find_warnings(
    recipe: Recipe, model: "ModelMemory", memory: "Memory", *, world_size: int, num_nodes: int, fetches: float
) -> list[str]:
    """Return warnings about settings that work but may not be intended.

    Args:
        recipe: the run.
        model: memory of its model.
        memory: of one GPU.
        world_size, num_nodes: numbers of processes and nodes.
        fetches: nodes that read a shard in an epoch, on average.
    """
    batch_size, streams = recipe.train.batch_size, recipe.data.num_streams
    found = []
    if batch_size % world_size:
        few, more = batch_size // world_size, -(-batch_size // world_size)
        found.append(
            f"train.batch_size={batch_size} is not a multiple of {world_size} processes: some process {more} galaxies a step, "
            f"others {few}, and wait; {few * world_size} or {more * world_size} would be even"
        )
    is_even = streams % world_size == 0 and batch_size % world_size == 0
    if num_nodes > 1 and fetches > 1.05 and not is_even and recipe.data.balance == "none":
        found.append(
            f"each shard is read by {fetches:.1f} nodes an epoch, and is fetched as often if it comes from a URL: "
            f"about one node reads it if {world_size} processes divide both data.num_streams (now {streams}, greatest common "
            f"divisor {gcd(streams, world_size)}) and train.batch_size"
        )
    if model.has_batch_norm and not recipe.train.sync_batchnorm and memory.micro_batch < FEW_IMAGES:
        group = ", model.norm=group" if recipe.model.name == "custom_cnn" else ""
        found.append(
            f"batch normalisation sees {memory.micro_batch} images at a time, too few for good statistics: set "
            f"train.sync_batchnorm=true{group}, or fewer processes"
        )
    return found


def _fewer(batch_size: int, num_nodes: int, gpus_per_node: int, options: Callable[[int, int], str]) -> str:
    """Return the options for the most processes that a batch allows, on whole nodes if possible."""
    nodes = min(num_nodes, batch_size // gpus_per_node)
    even = next((n for n in range(nodes, 0, -1) if batch_size % (n * gpus_per_node) == 0), nodes)
    if even:
        return f"{options(even, gpus_per_node)} ({even * gpus_per_node} processes; at most {batch_size} work)"
    return options(1, batch_size)
