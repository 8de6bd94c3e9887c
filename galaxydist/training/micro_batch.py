"""Micro-batches: size and number of the passes of a step, the largest size that fits (``auto``), and out-of-memory errors."""

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn

from galaxydist.cpus import total_memory
from galaxydist.distributed import World
from galaxydist.errors import EveryRankError, OneRankFailedError, RunFailedError
from galaxydist.models.build import needs_two_images, set_train_mode
from galaxydist.models.performance import choose_memory_format, explained_workspace
from galaxydist.recipe.rules import is_mixing
from galaxydist.recipe.schema import Recipe
from galaxydist.training.throughput import activation_bytes, training_flops

# Parts of the messages of torch's out-of-memory errors.
_MESSAGES = ("out of memory", "can't allocate memory", "_STATUS_ALLOC_FAILED")
# Share of a GPU's memory that is left free for the rest of a step (buffers of NCCL and cuDNN; temporary tensors of augmentation,
# clipping and optimizer) and for fragments that are too small to be used.
MARGIN = 0.05
# A pass on a CPU takes at most this number of floating point operations in training, half a minute of two cores, and at most this
# share of the memory, rounded down to a power of two, so that similar machines choose the same micro-batch.
PASS_FLOPS = 1e12
MEMORY_SHARE = 0.25
# Largest number of tensors of a parameter's size that an optimizer keeps, reserved while the micro-batch is searched.
OPTIMIZER_TENSORS = 2
# Keys of ``train`` that the micro-batch depends on.
_SETTINGS = ("strategy", "gradient_checkpointing", "channels_last", "compile", "sync_batchnorm")


def is_out_of_memory(error: BaseException) -> bool:
    """Return True for an out-of-memory error of an allocator, cuDNN, cuBLAS or the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, RunFailedError):  # it may quote the message of another rank
        return False
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)


@contextmanager
def explained_out_of_memory(recipe: Recipe, world: World, micro_batch: int) -> Iterator[None]:
    """Turn an out-of-memory error of a training step into an error that tells the user what to do.

    Raises:
        OneRankFailedError: with the text of ``explain_out_of_memory``.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OneRankFailedError(explain_out_of_memory(error, recipe, world, micro_batch)) from error


@contextmanager
def explained_validation_memory(recipe: Recipe, world: World) -> Iterator[None]:
    """Turn an out-of-memory error of a validation into an error that tells the user what to do.

    Raises:
        OneRankFailedError: with the settings to lower.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        config = recipe.eval
        raise OneRankFailedError(
            f"No memory left on rank {world.rank} in a validation of eval.batch_size={config.batch_size}, eval.tta={config.tta}: "
            "lower eval.batch_size (with resume.force=[eval.batch_size])."
        ) from error


def explain_out_of_memory(error: BaseException, recipe: Recipe, world: World, micro_batch: int) -> str:
    """Return the message for a training step that ran out of memory: the device, the sizes, and the settings to lower.

    Args:
        error: an error for which ``is_out_of_memory`` is True.
        recipe: recipe of the run.
        world: the processes.
        micro_batch: galaxies in one forward pass (0: the whole share of the rank).
    """
    share = share_of(recipe, world.size)
    count = min(micro_batch or share, share)
    name, memory = describe_device(world.device)
    smaller = [f"train.micro_batch={count // 2}"] if count > 1 else []
    return (
        f"Out of memory on rank {world.rank} ({name} with {memory / 1e9:.0f} GB) in a step with a micro-batch of {count} at "
        f"data.image_size={recipe.data.image_size} (train.batch_size={recipe.train.batch_size}, {world.size} processes). "
        f"{suggest_savings(recipe, world, smaller)} (torch: {str(error).strip().partition('. ')[0] or type(error).__name__})"
    )


def suggest_savings(recipe: Recipe, world: World, first: list[str]) -> str:
    """Return a sentence with settings that save memory, the cheapest first, after those in ``first``."""
    train, model = recipe.train, recipe.model
    choices = list(first)
    if not train.gradient_checkpointing:
        choices.append("train.gradient_checkpointing=true")
    if world.precision in ("no", "fp64") and world.device.type == "cuda":
        choices.append("train.precision=bf16")
    if train.strategy == "ddp" and world.size > 1:
        choices.append("train.strategy=fsdp")
    if recipe.data.image_size > 16:
        choices.append(f"data.image_size={max(16, recipe.data.image_size // 2)}")
    if model.name in ("custom_cnn", "d4_cnn") and model.width > 4:
        choices.append(f"model.width={max(4, model.width // 2)}")
    elif model.name in ("vit", "vit_scratch") and model.size == "base":
        choices.append("model.size=small")
    else:
        choices.append("a smaller model (model.name)")
    return f"Lower what a pass needs: {', '.join(choices[:-1])} or {choices[-1]}." if len(choices) > 1 else f"Use {choices[0]}."


def share_of(recipe: Recipe, world_size: int) -> int:
    """Return the largest number of galaxies of a global batch on any rank."""
    return math.ceil(recipe.train.batch_size / world_size)


def count_micro_batches(batch_size: int, world_size: int, micro_batch: int) -> int:
    """Return the number of forward passes in a step, equal on all ranks since the last pass synchronises the gradients.

    Ranks hold floor or ceil of ``batch_size / world_size`` samples, and no part of any rank is empty, so that with uneven ranks a
    part may hold one sample more than ``micro_batch``.
    """
    if micro_batch == 0:
        return 1
    largest = -(-batch_size // world_size)
    return min(-(-largest // micro_batch), batch_size // world_size)


def describe_device(device: torch.device) -> tuple[str, int]:
    """Return the name and memory in bytes of a GPU, or of this machine for a CPU."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return properties.name, properties.total_memory
    return device.type, psutil.virtual_memory().total


def free_memory(device: torch.device) -> None:
    """Return the memory that a GPU's allocator caches, so that the next try and other processes can use it.

    Does nothing on a CPU, where memory is freed at once and a garbage collection takes a third of a second.
    """
    if device.type == "cuda":
        gc.collect()
        with torch.cuda.device(device):
            torch.cuda.empty_cache()


def choose_micro_batch(
    world: World, recipe: Recipe, model: nn.Module, *, stored: Mapping[str, Any] | None = None
) -> tuple[int, dict[str, Any]]:
    """Return the recipe's micro-batch; for ``auto`` the stored one if it is still valid, else the largest that fits.

    For FSDP ``auto`` is the whole share: the model cannot be tried, since whole it needs more memory than sharded. All ranks must
    call it.

    Args:
        world, recipe, model: as for ``find_micro_batch``.
        stored: values to store from an earlier start of this run, the same on all ranks; None: there was none.

    Returns:
        Galaxies in one forward pass (0: the whole share), and the values to store (empty if nothing was tried).

    Raises:
        EveryRankError: as ``find_micro_batch``.
    """
    config = recipe.train
    if config.micro_batch != "auto":
        return config.micro_batch, {}
    if config.strategy == "fsdp":
        return 0, {}
    now = conditions(world, recipe)
    found = reusable_micro_batch(stored, now)
    if found is None:
        trained_bytes = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        ballast_bytes, unit = OPTIMIZER_TENSORS * trained_bytes, 2 if is_mixing(config) else 1
        found = find_micro_batch(world, recipe, model, ballast_bytes=ballast_bytes, unit=unit)
    if has_single_pass(recipe, world, model, found):
        found = least_micro_batch(recipe, world) or 0
    return found, {**now, "micro_batch": found}


def dummy_loss(logits_BK: torch.Tensor) -> torch.Tensor:
    """Return a scalar with a gradient for every logit, for passes whose results are discarded."""
    return logits_BK.float().logsumexp(1).sum()


def find_micro_batch(
    world: World,
    recipe: Recipe,
    model: nn.Module,
    *,
    ballast_bytes: int = 0,
    unit: int = 1,
    force: bool = False,
) -> int:
    """Find the largest micro-batch that fits on all ranks, by forward and backward passes on empty images.

    All ranks must call it. On a CPU nothing is tried, because the system would swap or kill the process rather than refuse
    memory: see ``most_on_cpu``. The model, its gradients and the random numbers are unchanged afterwards.

    Args:
        world: the processes.
        recipe: batch size, image size and memory layout.
        model: on its device, not wrapped by DDP, not compiled and without synchronised batch normalisation: ranks try different
            sizes, so a pass must not wait for other ranks.
        ballast_bytes: other memory of a step: the optimizer's state if it is not allocated yet, DDP's buckets, the batch.
        unit: galaxies that must stay in one pass (2 if pairs are mixed); the share is a multiple of it.
        force: try on a CPU too.

    Returns:
        Galaxies in one forward pass.

    Raises:
        EveryRankError: not even one unit fits on some rank.
    """
    share = share_of(recipe, world.size)
    if world.device.type == "cpu" and not force:
        most = min(world.all_gather(most_on_cpu(model, recipe.data.image_size, total_memory() // world.ranks_on_node)))
        return largest_that_fits(share // unit, lambda count: count == 1 or count * unit <= most) * unit
    probe = Probe(world, recipe, model, ballast_bytes)
    with unchanged(model, world.device):
        fitting = largest_that_fits(share // unit, lambda count: probe.fits(count * unit)) * unit
    everywhere = world.all_gather(fitting)
    if min(everywhere) == 0:
        name, memory = describe_device(world.device)
        ranks = ", ".join(str(rank) for rank, count in enumerate(everywhere) if count == 0)
        raise EveryRankError(
            f"Out of memory: not even a micro-batch of {unit} at data.image_size={recipe.data.image_size} fits on rank {ranks} "
            f"(train.batch_size={recipe.train.batch_size}, {world.size} processes, {name} with {memory / 1e9:.0f} GB). "
            f"{suggest_savings(recipe, world, [])}"
        )
    return min(everywhere)


def most_on_cpu(model: nn.Module, image_size: int, memory: int) -> int:
    """Return the largest number of images of a pass on a CPU, at least 1.

    It depends on the arguments only, because equal runs must have equal micro-batches.

    Args:
        model: as for ``find_micro_batch``.
        image_size: pixels of the square images.
        memory: memory of a process in bytes.
    """
    kept = MEMORY_SHARE * 2 ** math.floor(math.log2(memory))
    by_time = PASS_FLOPS / max(1, training_flops(model, image_size))
    return max(1, int(min(by_time, kept / max(1, activation_bytes(model, image_size)))))


def largest_that_fits(upper: int, fits: Callable[[int], bool]) -> int:
    """Return the size of the largest part if ``upper`` galaxies are divided evenly into as few parts as possible.

    The whole is tried first, because it usually fits; then halves, then a bisection. A size that would not reduce the number of
    parts is not tried.

    Args:
        upper: galaxies, at least 1.
        fits: returns True if a part of this size fits; then all smaller parts fit.

    Returns:
        ``ceil(upper / parts)`` for the smallest possible number of parts; 0 if not even 1 fits.
    """
    fitting, failing = upper, upper + 1
    while fitting and not fits(fitting):
        fitting, failing = fitting // 2, fitting
    if fitting == 0:
        return 0
    while math.ceil(upper / (failing - 1)) < math.ceil(upper / fitting):
        middle = (fitting + failing) // 2
        if fits(middle):
            fitting = middle
        else:
            failing = middle
    return math.ceil(upper / math.ceil(upper / fitting))


@dataclass(frozen=True)
class Probe:
    """Runs forward and backward passes whose results are discarded; all arguments are as for ``find_micro_batch``."""

    world: World
    recipe: Recipe
    model: nn.Module
    ballast_bytes: int = 0

    def fits(self, count: int) -> bool:
        """Return True if ``count`` images fit; errors other than a lack of memory are raised."""
        try:
            self._run(count)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            is_fitting = False
        else:
            is_fitting = True
        # Outside of the except clause the error, whose frames hold the tensors, is gone, except for reference cycles.
        self.model.zero_grad(set_to_none=True)
        if not is_fitting:
            gc.collect()
        free_memory(self.world.device)
        return is_fitting

    def seconds(self, count: int) -> float:
        """Return the time of a forward and backward pass of ``count`` images, which fit."""
        start = time.perf_counter()
        self._run(count)
        return time.perf_counter() - start

    def _run(self, count: int) -> None:
        device, size = self.world.device, self.recipe.data.image_size
        margin = MARGIN * describe_device(device)[1] if device.type == "cuda" else 0.0
        ballast = torch.empty(self.ballast_bytes + round(margin), dtype=torch.uint8, device=device)
        for parameter in self.model.parameters():  # all passes of a step except the first find gradients there
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        dtype = next(self.model.parameters()).dtype
        layout = choose_memory_format(self.recipe.train.channels_last, self.model, device, dtype)
        images_BCHW = torch.zeros(count, 3, size, size, dtype=dtype, device=device).to(memory_format=layout)
        with self.world.mixed_precision.autocast():
            logits_BK = self.model(images_BCHW)
        torch.autograd.backward(dummy_loss(logits_BK))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        del ballast


def check_passes(recipe: Recipe, world: World, model: nn.Module) -> None:
    """Refuse forward passes of a single galaxy if the model's batch normalisation needs two.

    Args:
        model: the model, on the CPU.

    Raises:
        EveryRankError: equally on all ranks.
    """
    config = recipe.train
    micro_batch = 0 if config.micro_batch == "auto" else config.micro_batch
    if not has_single_pass(recipe, world, model, micro_batch):
        return
    text = (
        f"{recipe.model.name} at data.image_size={recipe.data.image_size} normalises over the batch what is one pixel by then, "
        f"which takes two galaxies in each forward pass; train.batch_size={config.batch_size} on {world.size} processes with "
        f"train.micro_batch={config.micro_batch} has passes of one."
    )
    if (enough := least_micro_batch(recipe, world)) is not None:
        raise EveryRankError(f"{text} Use train.micro_batch={enough} or more.")
    remedy = ", or train.sync_batchnorm=true" if world.size > 1 else ""
    raise EveryRankError(f"{text} Use train.batch_size={2 * world.size} or more{remedy}.")


def has_single_pass(recipe: Recipe, world: World, model: nn.Module, micro_batch: int) -> bool:
    """Return True if a pass has a single galaxy although the model needs two."""
    config = recipe.train
    if is_mixing(config) or (config.sync_batchnorm and world.size > 1):
        return False  # any pass has two galaxies, or normalises over the passes of all processes
    return _smallest_pass(recipe, world, micro_batch) == 1 and needs_two_images(model, recipe.data.image_size)


def least_micro_batch(recipe: Recipe, world: World) -> int | None:
    """Return the smallest micro-batch without passes of a single galaxy; None if there is none."""
    return next((size for size in (2, 3, 4) if _smallest_pass(recipe, world, size) > 1), None)


def _smallest_pass(recipe: Recipe, world: World, micro_batch: int) -> int:
    batch_size = recipe.train.batch_size
    return batch_size // world.size // count_micro_batches(batch_size, world.size, micro_batch)


def check_deterministic(world: World, recipe: Recipe, model: nn.Module) -> None:
    """Refuse a model with operations that have no deterministic algorithm on its device.

    Args:
        world, recipe: of the run.
        model: on its device, neither wrapped nor compiled.

    Raises:
        EveryRankError: equally on all ranks; the text names the operation, or what to do about the workspace of cuBLAS.
    """
    size = recipe.data.image_size
    images_BCHW = torch.zeros(2, 3, size, size, dtype=world.dtype, device=world.device)
    try:
        with explained_workspace(), unchanged(model, world.device):
            with world.mixed_precision.autocast():
                logits_BK = model(images_BCHW)
            torch.autograd.backward(dummy_loss(logits_BK))
    except RuntimeError as error:
        operation, found, _ = str(error).partition(" does not have a deterministic implementation")
        if not found:
            raise
        raise EveryRankError(
            f"train.deterministic=true: {recipe.model.name} uses {operation.split()[-1]}, for which torch has no deterministic "
            f"algorithm on {world.device.type}. Use another model, or set train.deterministic=false."
        ) from error


@contextmanager
def unchanged(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Set the model to training mode without gradients, and restore it afterwards bit for bit.

    Gradients, buffers (batch-norm statistics), modes, and torch's random number generators are restored.
    """
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    modes = [(module, module.training) for module in model.modules()]
    model.zero_grad(set_to_none=True)
    free_memory(device)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            set_train_mode(model)
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, kept in buffers:
                buffer.copy_(kept)
        for module, mode in modes:
            module.training = mode
        free_memory(device)


def conditions(world: World, recipe: Recipe) -> dict[str, Any]:
    """Return all that a micro-batch depends on, in plain JSON values; all ranks must call it."""
    devices = world.all_gather(list(describe_device(world.device)))
    return {
        "share": share_of(recipe, world.size),
        "world_size": world.size,
        "image_size": recipe.data.image_size,
        "precision": world.precision,
        "model": recipe.model.name,
        "torch": torch.__version__,
        "devices": sorted([name, memory] for name, memory in {(name, memory) for name, memory in devices}),
        **{name: getattr(recipe.train, name) for name in _SETTINGS},
    }


def reusable_micro_batch(stored: Mapping[str, Any] | None, now: Mapping[str, Any]) -> int | None:
    """Return the micro-batch of an earlier start; None if there is none or its conditions have changed.

    Args:
        stored: the values that ``choose_micro_batch`` returned to store.
        now: ``conditions`` of this start.
    """
    if stored is None or {key: value for key, value in stored.items() if key != "micro_batch"} != dict(now):
        return None
    found = stored.get("micro_batch")
    return found if type(found) is int and found >= 1 else None
