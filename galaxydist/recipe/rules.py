"""Rules between a recipe and the number of processes, seen before a run is sent and again when it starts."""

from galaxydist.errors import EveryRankError
from galaxydist.recipe.schema import TrainConfig


def check_world(batch_size: int, world_size: int) -> None:
    """See that both galaxies of each pair are the same process's.

    Raises:
        EveryRankError: twice the number of processes does not divide the global batch.
    """
    least = 2 * world_size
    if batch_size % least == 0:
        return
    sizes = [size for size in (batch_size // least * least, (batch_size // least + 1) * least) if size]
    text = (
        f"Mixup and cutmix pair the halves of the global batch within a process: train.batch_size={batch_size} is no multiple of "
        f"2 x {world_size} processes. Use train.batch_size={' or '.join(map(str, sizes))}"
    )
    worlds = [world for world in range(1, batch_size // 2 + 1) if batch_size % (2 * world) == 0]
    near = [*[world for world in worlds if world < world_size][-1:], *[world for world in worlds if world > world_size][:1]]
    if near:
        text += f", or {' or '.join(map(str, near))} process{'' if near == [1] else 'es'}"
    raise EveryRankError(f"{text}, or set train.mixup=0 and train.cutmix=0.")


def is_mixing(config: TrainConfig) -> bool:
    """Return True if a recipe uses mixup or cutmix."""
    return config.mix_prob > 0 and (config.mixup > 0 or config.cutmix > 0)


def check_strategy(config: TrainConfig, precision: str) -> None:
    """Refuse what does not go together.

    Raises:
        EveryRankError: on every rank the same.
    """
    if config.strategy == "ddp":
        return
    problems = {
        "train.precision=fp16": precision == "fp16"
        and "its loss scaling would differ between the parts: use train.precision=bf16",
        "train.compile=true": config.compile and "set it to false",
        "train.channels_last=true": config.channels_last and "set it to false",
    }
    refused = [f"{key} and train.strategy=fsdp do not go together here; {remedy}" for key, remedy in problems.items() if remedy]
    if refused:
        raise EveryRankError("; ".join(refused))
