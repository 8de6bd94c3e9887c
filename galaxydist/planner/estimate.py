"""Estimated cost of a run: steps, time, memory, shards read and disk space.

Nothing is started and no GPU is needed.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from galaxydist.errors import UserError
from galaxydist.galaxy import GALAXY10_CLASSES, SPLITS
from galaxydist.loading.training_data import find_cache, has_split, open_manifest, shard_commands
from galaxydist.loading.training_data import find_manifest as manifest_location
from galaxydist.object_store import is_url
from galaxydist.paths import weights_dir
from galaxydist.planner.larger_batches import ScalingProposal, idle_warning, propose_batches
from galaxydist.planner.limits import check_cache, check_memory, check_processes, find_warnings
from galaxydist.planner.memory import Memory, ModelMemory, estimate, model_memory, planned_precision
from galaxydist.recipe.rules import is_mixing
from galaxydist.recipe.schema import DataConfig, Recipe
from galaxydist.shards.manifest import Manifest, read_manifest
from galaxydist.shards.order import EpochOrder, steps_per_epoch
from galaxydist.shards.shard_usage import extend, peak_bytes, usage_of_nodes, usage_of_resampling
from galaxydist.shards.writer.layout import default_shard_size
from galaxydist.surveys.official_split import NAME, read_official_split
from galaxydist.surveys.split import NONE
from galaxydist.training.micro_batch import count_micro_batches
from galaxydist.training.mixup import count_pair_parts

# Bytes of a galaxy in a shard: 300 real Galaxy10 DECaLS cutouts of 256 x 256 pixels as JPEG of quality 95 took 27,700 bytes on
# average; the tar file adds three headers, padding, the class and the metadata.
BYTES_PER_GALAXY = 30_500
STORED_SIZE = 256
ESTIMATED = f"bytes estimated: {BYTES_PER_GALAXY / 1000:g} kB a galaxy ({STORED_SIZE} x {STORED_SIZE} JPEG of quality 95)"


@dataclass(frozen=True)
class DatasetSize:
    """Size of a data set.

    Args:
        origin: source of the numbers, in words.
        shard_samples, shard_bytes: of the training split's shards, int64, in storage order.
        num_val: validation galaxies; None if unknown.
        num_classes: K.
        stored_size: width of the stored images in pixels.
        manifest: the shards' manifest, if they are on this machine.
        is_remote: True if the recipe's shards lie at a URL.
    """

    origin: str
    shard_samples: NDArray[np.int64]
    shard_bytes: NDArray[np.int64]
    num_val: int | None
    num_classes: int
    stored_size: int
    manifest: Manifest | None = None
    is_remote: bool = False

    @property
    def num_train(self) -> int:
        return int(self.shard_samples.sum())


def find_dataset_size(config: DataConfig, root: Path, *, galaxies: int | None = None, shards: int | None = None) -> DatasetSize:
    """Return the size of a recipe's data set; only local files are opened.

    Args:
        config: the data set.
        root: the data root.
        galaxies, shards: numbers of training galaxies and shards, instead of those on this machine.

    Raises:
        UserError: contradicting flags, damaged shards, or an unknown size.
    """
    location = manifest_location(config, root)
    is_remote = is_url(location)
    if galaxies is not None:
        if shards is not None and shards > galaxies:
            raise UserError(f"--shards {shards} are more than --galaxies {galaxies}: a shard holds at least one")
        return _divided(f"--galaxies {galaxies}", galaxies, shards, num_val=None, is_remote=is_remote)
    if shards is not None:
        raise UserError(f"--shards {shards} needs --galaxies: give --galaxies N (training galaxies) too, or neither")
    if not is_remote and (config.manifest is not None or Path(location).exists()):
        return _of_manifest(read_manifest(Path(location)))
    if config.manifest is None and config.dataset == NAME:
        return _of_official(config)
    if is_remote:
        raise UserError(f"{location} is a URL, and a plan fetches nothing: give --galaxies N (training galaxies) and --shards M")
    make = "`, `".join(shard_commands(config))
    raise UserError(
        f"there are no shards of {config.dataset} ({config.variant}) at {location}, so their number is unknown: give "
        f"--galaxies N (training galaxies), or make them (`{make}`)"
    )


def _of_manifest(manifest: Manifest) -> DatasetSize:
    table = manifest.shards("train")
    return DatasetSize(
        origin=f"{manifest.dataset}, {manifest.variant} ({manifest.location})",
        shard_samples=table["samples"].astype(np.int64),
        shard_bytes=table["bytes"].astype(np.int64),
        num_val=manifest.splits["val"].num_samples if has_split(manifest, "val") else 0,
        num_classes=manifest.num_classes,
        stored_size=manifest.image_size,
        manifest=manifest,
    )


def _of_official(config: DataConfig) -> DatasetSize:
    split = read_official_split()
    codes = (split.original if config.variant == "original" else split.balanced).copy()
    train, val = SPLITS.index("train"), SPLITS.index("val")
    if config.conflicting == "drop":
        codes[split.sky.conflicting] = NONE
    count = int((codes == train).sum())
    return _divided(
        f"{NAME}, {config.variant}: the shipped split (no shards here)", count, None, num_val=int((codes == val).sum())
    )


def _divided(origin: str, num_train: int, shards: int | None, *, num_val: int | None, is_remote: bool = False) -> DatasetSize:
    """Divide galaxies into shards of nearly equal size, as the writer does."""
    number = shards or -(-num_train // default_shard_size(num_train))
    samples = np.diff(np.arange(number + 1) * num_train // number).astype(np.int64)
    return DatasetSize(
        origin=f"{origin}; {ESTIMATED}",
        shard_samples=samples,
        shard_bytes=samples * BYTES_PER_GALAXY,
        num_val=num_val,
        num_classes=len(GALAXY10_CLASSES),
        stored_size=STORED_SIZE,
        is_remote=is_remote,
    )


# Checkpoints that a run keeps: the newest two and the best. While it saves, there is one more.
KEPT_CHECKPOINTS = 3


@dataclass(frozen=True)
class ClusterShape:
    """The nodes and GPUs of a run, with one process for each GPU.

    Args:
        num_nodes, gpus_per_node: nodes, and GPUs of each.
        images_per_s: training speed of one GPU; None if unknown.
        gpu_memory: memory of one GPU in GB (10^9 bytes); None if unknown.
    """

    num_nodes: int = 1
    gpus_per_node: int = 1
    images_per_s: float | None = None
    gpu_memory: float | None = None

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.gpus_per_node


@dataclass(frozen=True)
class Steps:
    """Steps, samples and duration of a run.

    Args:
        samples: galaxies of the training split.
        per_epoch: optimizer steps of an epoch; the incomplete last batch is dropped.
        dropped: galaxies of that batch.
        total: steps of the run, without early stopping.
        rank_batch_least, rank_batch_most: least and most galaxies of a rank in a step.
        passes: micro-batches of a rank in a step.
        validation_batches, validation_batches_most: of all ranks, and of the rank with most; None if the number of galaxies is
            unknown, 0 if there is no validation split.
        epoch_s, run_s: seconds of training steps, without validation; None if the speed is unknown.
    """

    samples: int
    per_epoch: int
    dropped: int
    total: int
    rank_batch_least: int
    rank_batch_most: int
    passes: int
    validation_batches: int | None
    validation_batches_most: int | None
    epoch_s: float | None
    run_s: float | None


@dataclass(frozen=True)
class ShardTraffic:
    """Training shards and bytes that the nodes read in the first epoch (others differ little).

    Args:
        num_shards, num_bytes: of the split.
        shards_per_node_least, shards_per_node_most, bytes_per_node_most: least and most that a node reads.
        nodes_per_shard: nodes that read a shard, on average.
        shards_held_most: most shards in use on a node at the same time.
        cache_bytes: least cache of a node if the shards lie at a URL, prefetch included.
        bytes_per_s: read rate of a node at the given training speed; None if that is unknown.
    """

    num_shards: int
    num_bytes: int
    shards_per_node_least: int
    shards_per_node_most: int
    bytes_per_node_most: int
    nodes_per_shard: float
    shards_held_most: int
    cache_bytes: int
    bytes_per_s: float | None


@dataclass(frozen=True)
class RunPlan:
    """The estimated cost of a run.

    Args:
        recipe, optimizer, model, strategy, precision: names.
        batch_size, epochs: of the recipe.
        data: source of the numbers of galaxies and bytes.
        num_trained, num_frozen: numbers of parameters.
        checkpoint_bytes, checkpoints_bytes: size of one checkpoint, and of all that are kept.
        scaling: batches and rates for more GPUs.
        warnings: settings that may not be intended.
    """

    recipe: str
    optimizer: str
    model: str
    strategy: str
    precision: str
    batch_size: int
    epochs: int
    data: str
    job: ClusterShape
    steps: Steps
    num_trained: int
    num_frozen: int
    memory: Memory
    reading: ShardTraffic
    checkpoint_bytes: int
    checkpoints_bytes: int
    scaling: tuple[ScalingProposal, ...]
    warnings: tuple[str, ...]


def plan_run(recipe: Recipe, root: Path, job: ClusterShape, *, galaxies: int | None = None, shards: int | None = None) -> RunPlan:
    """Estimate the cost of a run.

    Args:
        recipe: the run.
        root: the data root, searched for the recipe's shards.
        job: nodes and GPUs.
        galaxies, shards: numbers of training galaxies and shards, instead of those on this machine.

    Raises:
        UserError: the run is impossible; says what to change.
    """
    data = find_dataset_size(recipe.data, root, galaxies=galaxies, shards=shards)
    check_processes(recipe, data.num_train, job.num_nodes, job.gpus_per_node)
    if data.manifest is not None:  # raises the trainer's errors
        open_manifest(data.manifest.location, find_cache(recipe.data, root), recipe, job.world_size)
    reading = plan_shard_traffic(recipe, data, job)
    if data.is_remote:
        check_cache(reading.cache_bytes, recipe.data.cache_size)
    model = model_memory(recipe, data.num_classes, data.stored_size, weights_dir(root))
    passes, memory = plan_memory(recipe, model, job)
    warnings = find_warnings(
        recipe, model, memory, world_size=job.world_size, num_nodes=job.num_nodes, fetches=reading.nodes_per_shard
    )
    if idle := idle_warning(recipe, job.world_size, job.images_per_s):
        warnings.append(idle)
    if reading.num_shards > 1 and reading.shards_held_most == reading.num_shards and recipe.data.balance == "none":
        warnings.append(
            f"a node has all {reading.num_shards} shards in use at the same time: use smaller shards if they come from a URL "
            "(galaxydist data shard --shard-size N)"
        )
    return RunPlan(
        recipe=recipe.name,
        optimizer=recipe.optim.name,
        model=recipe.model.name if recipe.model.size == "small" else f"{recipe.model.name} ({recipe.model.size})",
        strategy=recipe.train.strategy,
        precision=planned_precision(recipe),
        batch_size=recipe.train.batch_size,
        epochs=recipe.train.epochs,
        data=data.origin,
        job=job,
        steps=plan_steps(recipe, data.num_train, data.num_val, job, passes),
        num_trained=model.num_trained,
        num_frozen=model.num_frozen,
        memory=memory,
        reading=reading,
        checkpoint_bytes=model.checkpoint,
        checkpoints_bytes=KEPT_CHECKPOINTS * model.checkpoint,
        scaling=propose_batches(recipe, data.num_train, job.images_per_s),
        warnings=tuple(warnings),
    )


def plan_steps(recipe: Recipe, num_train: int, num_val: int | None, job: ClusterShape, passes: int) -> Steps:
    """Compute steps, samples and duration of a run.

    Args:
        recipe: batch sizes and epochs.
        num_train, num_val: galaxies of the splits; None if unknown.
        job: nodes and GPUs.
        passes: micro-batches of a rank in a step.

    Raises:
        UserError: a batch is larger than the training split.
    """
    batch_size, world_size = recipe.train.batch_size, job.world_size
    per_epoch = steps_per_epoch(num_train, batch_size)
    most = -(-batch_size // world_size)
    batches = None if num_val is None else -(-num_val // recipe.eval.batch_size)
    # All ranks wait for the one with the most galaxies.
    epoch_s = None if job.images_per_s is None else per_epoch * most / job.images_per_s
    return Steps(
        samples=num_train,
        per_epoch=per_epoch,
        dropped=num_train - per_epoch * batch_size,
        total=per_epoch * recipe.train.epochs,
        rank_batch_least=batch_size // world_size,
        rank_batch_most=most,
        passes=passes,
        validation_batches=batches,
        validation_batches_most=None if batches is None else -(-batches // world_size),
        epoch_s=epoch_s,
        run_s=None if epoch_s is None else epoch_s * recipe.train.epochs,
    )


def plan_memory(recipe: Recipe, model: ModelMemory, job: ClusterShape) -> tuple[int, Memory]:
    """Return the number of micro-batches in a step, and the memory of one GPU.

    With ``train.micro_batch=auto`` it is the smallest number that fits into ``job.gpu_memory``, or one if that is not given.

    Raises:
        UserError: no number of micro-batches fits.
    """
    batch_size, world_size, micro_batch = recipe.train.batch_size, job.world_size, recipe.train.micro_batch
    rank_batch = -(-batch_size // world_size)

    def memory_of(passes: int) -> Memory:
        return estimate(model, recipe, world_size=world_size, rank_batch=rank_batch, num_parts=passes)

    mixes = is_mixing(recipe.train)
    if isinstance(micro_batch, int):
        passes = (count_pair_parts if mixes else count_micro_batches)(batch_size, world_size, micro_batch)
    elif job.gpu_memory is None or recipe.train.strategy == "fsdp":  # FSDP with auto uses a single pass
        passes = 1
    else:
        most = batch_size // world_size // (2 if mixes else 1)  # no micro-batch may be empty, or split a mixup pair
        passes = next((passes for passes in range(1, most) if memory_of(passes).total <= job.gpu_memory * 1e9), most)
    memory = memory_of(passes)
    if job.gpu_memory is not None:
        check_memory(recipe, memory, job.gpu_memory, world_size)
    return passes, memory


def plan_shard_traffic(recipe: Recipe, data: DatasetSize, job: ClusterShape) -> ShardTraffic:
    """Compute the training shards and bytes that the nodes read in the first epoch."""
    batch_size = recipe.train.batch_size
    sizes = data.shard_bytes
    if recipe.data.balance == "resample":
        uses = [usage_of_resampling(sizes.size, steps_per_epoch(data.num_train, batch_size))] * job.num_nodes
    else:
        order = EpochOrder(data.shard_samples, seed=recipe.seed, epoch=0, num_streams=recipe.data.num_streams)
        uses = usage_of_nodes(order, batch_size, job.num_nodes, job.gpus_per_node)
    # Nodes that read the same shards share one array, which is processed once.
    different = {id(use): use for use in uses}
    read = {key: np.unique(use["shard"]) for key, use in different.items()}
    counts = [read[id(use)].size for use in uses]
    bytes_most = max(int(sizes[shards].sum()) for shards in read.values())
    epoch_s = plan_steps(recipe, data.num_train, None, job, 1).epoch_s
    return ShardTraffic(
        num_shards=sizes.size,
        num_bytes=int(sizes.sum()),
        shards_per_node_least=min(counts),
        shards_per_node_most=max(counts),
        bytes_per_node_most=bytes_most,
        nodes_per_shard=sum(counts) / sizes.size,
        shards_held_most=max(peak_bytes(use, 1) for use in different.values()),
        cache_bytes=max(peak_bytes(extend(use, recipe.data.prefetch + 1), sizes) for use in different.values()),
        bytes_per_s=None if epoch_s is None else bytes_most / epoch_s,
    )
