"""``train.micro_batch=auto``: the most galaxies of one forward pass that fit the memory of every process."""

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch import nn

from galaxydist.cpus import total_memory
from galaxydist.distributed import World
from galaxydist.errors import EveryRankError, OneRankFailedError
from galaxydist.models.build import set_train_mode
from galaxydist.recipe.schema import Recipe
from galaxydist.training.throughput import activation_bytes, training_flops

# Out of memory: how it is told from other errors, and what a user can do about it.

_MESSAGES = ("out of memory", "can't allocate memory", "_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """A lack of memory, by whichever of torch's errors it is told: of an allocator, of cuDNN or cuBLAS, of the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)


@contextmanager
def explained_out_of_memory(recipe: Recipe, world: World, micro_batch: int) -> Iterator[None]:
    """Around steps of the training: a lack of memory becomes an error that says what a user can do about it.

    Raises:
        OneRankFailedError: with the text of ``explain_out_of_memory``.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OneRankFailedError(explain_out_of_memory(error, recipe, world, micro_batch)) from error


def explain_out_of_memory(error: BaseException, recipe: Recipe, world: World, micro_batch: int) -> str:
    """What to tell when a step of the training ran out of memory: on which device, of what, and what to lower.

    Args:
        error: for which ``is_out_of_memory`` holds.
        recipe: of the run.
        world: the processes.
        micro_batch: galaxies in one forward pass (0: the whole share).
    """
    share = share_of(recipe, world.size)
    count = min(micro_batch or share, share)
    name, memory = describe_device(world.device)
    smaller = [f"train.micro_batch={count // 2}"] if count > 1 else []
    return (
        f"Out of memory on rank {world.rank} ({name} with {memory / 1e9:.0f} GB) in a step with a micro-batch of {count} at "
        f"data.image_size={recipe.data.image_size} (train.batch_size={recipe.train.batch_size}, {world.size} processes). "
        f"{what_to_lower(recipe, world, smaller)} (torch: {str(error).strip().partition('. ')[0] or type(error).__name__})"
    )


def what_to_lower(recipe: Recipe, world: World, first: list[str]) -> str:
    """A sentence on what would help with this recipe, what costs least first, after the choices in ``first``."""
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
    """Galaxies of a global batch on the rank that has most."""
    return -(-recipe.train.batch_size // world_size)


def describe_device(device: torch.device) -> tuple[str, int]:
    """Name, and memory in bytes, of a GPU, or of this machine for a CPU."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return properties.name, properties.total_memory
    return device.type, psutil.virtual_memory().total


def free_memory(device: torch.device) -> None:
    """Give back what a GPU's allocator keeps, so that it counts neither for the next try nor against other processes.

    Nothing on a CPU: what is dropped there is free at once, and a collection takes a third of a second.
    """
    if device.type == "cuda":
        gc.collect()
        with torch.cuda.device(device):
            torch.cuda.empty_cache()


# Left free on a GPU: what a step takes beside the passes (buffers of NCCL and cuDNN, temporaries of augmentation, clipping and
# optimizer), and pieces of memory that are too small to be used.
MARGIN = 0.05

# On a CPU a pass has no more images than these operations in training allow, half a minute of two cores; and no more than keep
# this part of the memory, taken down to a power of two, so that machines of one kind cut alike.
PASS_FLOPS = 1e12
MEMORY_SHARE = 0.25

_SETTINGS = ("strategy", "gradient_checkpointing", "channels_last", "compile", "sync_batchnorm")


def choose_micro_batch(
    world: World,
    recipe: Recipe,
    model: nn.Module,
    *,
    stored: Mapping[str, Any] | None = None,
    ballast_bytes: int = 0,
    unit: int = 1,
) -> tuple[int, dict[str, Any]]:
    """The recipe's micro-batch; for ``auto`` the stored one where it still applies, else the largest that fits. All ranks take
    part.

    Args:
        world, recipe, model, ballast_bytes, unit: as for ``find_micro_batch``.
        stored: what an earlier start of this run gave, the same on all ranks; None: there was none.

    Returns:
        Galaxies in one forward pass (0: the whole share), and what is to be stored (empty where the recipe says the number).

    Raises:
        EveryRankError: as ``find_micro_batch``.
    """
    if recipe.train.micro_batch != "auto":
        return recipe.train.micro_batch, {}
    now = conditions(world, recipe)
    found = remembered(stored, now)
    if found is None:
        found = find_micro_batch(world, recipe, model, ballast_bytes=ballast_bytes, unit=unit)
    return found, {**now, "micro_batch": found}


def thrown_away_loss(logits_BK: torch.Tensor) -> torch.Tensor:
    """Return a scalar with a gradient for every logit, for passes whose results are thrown away."""
    return logits_BK.float().logsumexp(1).sum()


def find_micro_batch(
    world: World,
    recipe: Recipe,
    model: nn.Module,
    *,
    ballast_bytes: int = 0,
    unit: int = 1,
    loss: Callable[[torch.Tensor], torch.Tensor] = thrown_away_loss,
    force: bool = False,
) -> int:
    """Try how many galaxies fit: forward and backward of the model on empty images. All ranks take part, and agree.

    A CPU is not tried: its system would rather swap, or kill the process, than refuse memory. See ``most_on_cpu``.
    The model, its gradients and the random numbers are afterwards as they were before.

    Args:
        world: the processes.
        recipe: batch, image size and layout; names what to lower.
        model: on its device, not wrapped by DDP and not compiled: ranks try different sizes, so a pass must wait for no other
            rank (nor must synchronised batch normalisation be in it yet).
        ballast_bytes: what else a step will hold: the optimizer's state if it is not allocated yet, DDP's buckets, the batch.
        unit: galaxies that must stay in one pass (2 where pairs are mixed); the share is a multiple of it.
        loss: logits to a scalar.
        force: try it on a CPU too.

    Returns:
        Galaxies in one forward pass.

    Raises:
        EveryRankError: not even one unit fits on some rank.
    """
    share = share_of(recipe, world.size)
    if world.device.type == "cpu" and not force:
        most = min(world.all_gather(most_on_cpu(model, recipe.data.image_size, total_memory() // world.ranks_on_node)))
        return largest_that_fits(share // unit, lambda count: count == 1 or count * unit <= most) * unit
    probe = Probe(world, recipe, model, ballast_bytes=ballast_bytes, loss=loss)
    with unchanged(model, world.device):
        fitting = largest_that_fits(share // unit, lambda count: probe.fits(count * unit)) * unit
    everywhere = world.all_gather(fitting)
    if min(everywhere) == 0:
        name, memory = describe_device(world.device)
        ranks = ", ".join(str(rank) for rank, count in enumerate(everywhere) if count == 0)
        raise EveryRankError(
            f"Out of memory: not even a micro-batch of {unit} at data.image_size={recipe.data.image_size} fits on rank {ranks} "
            f"(train.batch_size={recipe.train.batch_size}, {world.size} processes, {name} with {memory / 1e9:.0f} GB). "
            f"{what_to_lower(recipe, world, [])}"
        )
    return min(everywhere)


def most_on_cpu(model: nn.Module, image_size: int, memory: int) -> int:
    """Return the most images of a pass on a CPU, at least 1: a function of its arguments alone, since equal runs must cut alike.

    Args:
        model: as for ``find_micro_batch``.
        image_size: pixels of the square images.
        memory: bytes that a process may use.
    """
    kept = MEMORY_SHARE * 2 ** math.floor(math.log2(memory))
    by_time = PASS_FLOPS / max(1, training_flops(model, image_size))
    return max(1, int(min(by_time, kept / max(1, activation_bytes(model, image_size)))))


def largest_that_fits(upper: int, fits: Callable[[int], bool]) -> int:
    """The size of the largest part when ``upper`` galaxies are cut evenly into as few parts as can be.

    The whole is tried first: usually it fits. Then halves, then the sizes between the one that fits and the one that does not;
    a size that would not make the parts fewer is not tried.

    Args:
        upper: galaxies, at least 1.
        fits: whether so many fit; if it is true of a number it is true of all smaller ones.

    Returns:
        ``ceil(upper / parts)`` for the smallest possible number of parts; 0 if not even 1 fits.
    """
    fitting, failing = upper, upper + 1
    while fitting and not fits(fitting):
        fitting, failing = fitting // 2, fitting
    if fitting == 0:
        return 0
    while -(-upper // (failing - 1)) < -(-upper // fitting):
        middle = (fitting + failing) // 2
        if fits(middle):
            fitting = middle
        else:
            failing = middle
    return -(-upper // -(-upper // fitting))


class Probe:
    """Forward and backward passes that are thrown away.

    Args:
        world, recipe, model, ballast_bytes, loss: as for ``find_micro_batch``.
    """

    def __init__(
        self,
        world: World,
        recipe: Recipe,
        model: nn.Module,
        *,
        ballast_bytes: int,
        loss: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self._world, self._model, self._loss = world, model, loss
        self._size = recipe.data.image_size
        self._layout = torch.channels_last if recipe.train.channels_last else torch.contiguous_format
        margin = MARGIN * describe_device(world.device)[1] if world.device.type == "cuda" else 0.0
        self._ballast_bytes = ballast_bytes + round(margin)

    def fits(self, count: int) -> bool:
        """Whether ``count`` images go through the model and back. Errors other than a lack of memory pass through."""
        try:
            self._run(count)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            is_fitting = False
        else:
            is_fitting = True
        # Here the error, whose frames hold the tensors, is gone, but for cycles.
        self._model.zero_grad(set_to_none=True)
        if not is_fitting:
            gc.collect()
        free_memory(self._world.device)
        return is_fitting

    def seconds(self, count: int) -> float:
        """Time that ``count`` images, which fit, take through the model and back."""
        start = time.perf_counter()
        self._run(count)
        return time.perf_counter() - start

    def _run(self, count: int) -> None:
        device = self._world.device
        parameters = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        ballast = torch.empty(self._ballast_bytes, dtype=torch.uint8, device=device)
        for parameter in parameters:  # all passes but the first of a step find gradients there
            parameter.grad = torch.zeros_like(parameter)
        dtype = next(self._model.parameters()).dtype
        images_BCHW = torch.zeros(count, 3, self._size, self._size, dtype=dtype, device=device).to(memory_format=self._layout)
        with self._world.accelerator.autocast():
            logits_BK = self._model(images_BCHW)
        torch.autograd.backward(self._loss(logits_BK))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        del ballast


@contextmanager
def unchanged(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, the model is in training mode and without gradients; afterwards its gradients, buffers (batch-norm statistics) and
    modes, and torch's random numbers, are bit for bit what they were."""
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
    """What a micro-batch was found under, in plain JSON values: for ``remembered``. All ranks take part."""
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


def remembered(stored: Mapping[str, Any] | None, now: Mapping[str, Any]) -> int | None:
    """The micro-batch of an earlier start; None where there is none, or anything that it depends on has changed.

    Args:
        stored: what ``choose_micro_batch`` gave to store.
        now: ``conditions`` of this start.
    """
    if stored is None or {key: value for key, value in stored.items() if key != "micro_batch"} != dict(now):
        return None
    found = stored.get("micro_batch")
    return found if type(found) is int and found >= 1 else None
