"""Out of memory: how it is told from other errors, and what a user can do about it."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from galaxydist.distributed import World
from galaxydist.errors import OneRankFailedError
from galaxydist.recipe.schema import Recipe

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
