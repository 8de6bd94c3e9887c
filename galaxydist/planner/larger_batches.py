"""Batches and learning rates for more GPUs, and steps too short to keep a GPU busy.

Rules of the learning rate from one batch size to another: linear for SGD (Goyal et al. 2017, arXiv:1706.02677, section 2.1), by
the square root for AdamW (Malladi et al. 2022, arXiv:2205.10287) and LAMB (You et al. 2020, arXiv:1904.00962). The decay of the
moving average is raised to the power of the ratio (Busbridge et al. 2023, arXiv:2307.13813). The rule for AdamW also changes the
betas and epsilon, which are kept here. All hold to a largest batch that depends on the data, so a proposal is where to begin, not
a result.
"""

from dataclasses import dataclass

from galaxydist.recipe.schema import Recipe

PROPOSED_GPUS = (8, 16, 64)
# Rules of thumb, measured on no GPU: 3,000 kernels of 10 microseconds of a CPU each; images of a step without a known speed.
LAUNCH_S = 0.03
FEW_IMAGES_OF_GPU = 32
ENOUGH_IMAGES_OF_GPU = 64
LEAST_STEPS = 10  # of an epoch: fewer leave a schedule of some ten epochs too few updates
# Optimizer -> exponent of the batch's ratio in the learning rate, name of the rule.
RULES = {
    "sgd": (1.0, "linear rule, Goyal et al. 2017"),
    "adamw": (0.5, "square-root rule, Malladi et al. 2022"),
    "lamb": (0.5, "square-root rule, You et al. 2020"),
}


@dataclass(frozen=True)
class ScalingProposal:
    """A batch for a number of GPUs.

    Args:
        num_gpus, batch_size: the GPUs and the global batch, in equal shares of an even number of images.
        steps_per_epoch: optimizer steps of an epoch.
        lr: learning rate; None if there is no rule for the optimizer.
        ema: decay of the moving average.
        is_idle: the GPUs would wait even so: the data set is too small for so many.
    """

    num_gpus: int
    batch_size: int
    steps_per_epoch: int
    lr: float | None
    ema: float
    is_idle: bool


def is_idle(images: float, images_per_s: float | None) -> bool:
    """Return True if a GPU computes a step faster than a CPU starts its kernels.

    Args:
        images: of one GPU in a step.
        images_per_s: training speed of one GPU; None if unknown, then few images count as idle.
    """
    return images < FEW_IMAGES_OF_GPU if images_per_s is None else images / images_per_s < LAUNCH_S


def propose_batches(recipe: Recipe, num_train: int, images_per_s: float | None) -> tuple[ScalingProposal, ...]:
    """Return a proposal for each of ``PROPOSED_GPUS``; none where larger batches leave an epoch fewer than ``LEAST_STEPS`` steps.

    Args:
        recipe: its batch, rate and decay are scaled; a batch that keeps the GPUs busy stays, but for equal shares.
        num_train: training galaxies.
        images_per_s: training speed of one GPU; None if unknown.
    """
    enough = ENOUGH_IMAGES_OF_GPU if images_per_s is None else max(ENOUGH_IMAGES_OF_GPU, 2 * LAUNCH_S * images_per_s)
    own, found = recipe.train.batch_size, []
    for num_gpus in PROPOSED_GPUS:
        pairs = max(round(enough / 2), -(-own // (2 * num_gpus)))
        batch_size = max(own, 2 * num_gpus * min(pairs, num_train // (2 * LEAST_STEPS * num_gpus)))
        if batch_size % (2 * num_gpus):  # the data set is too small for a larger batch in equal shares
            continue
        ratio = batch_size / own
        exponent, _ = RULES.get(recipe.optim.name, (None, ""))
        found.append(
            ScalingProposal(
                num_gpus=num_gpus,
                batch_size=batch_size,
                steps_per_epoch=num_train // batch_size,
                lr=None if exponent is None else float(f"{recipe.optim.lr * ratio**exponent:.3g}"),
                ema=float(f"{recipe.train.ema**ratio:.4g}"),
                is_idle=is_idle(batch_size / num_gpus, images_per_s),
            )
        )
    return tuple(found)


def idle_warning(recipe: Recipe, world_size: int, images_per_s: float | None) -> str | None:
    """Return a warning of GPUs that would wait for a CPU in most of each step, or None."""
    images = recipe.train.batch_size / world_size
    if not is_idle(images, images_per_s):
        return None
    took = "" if images_per_s is None else f", {1000 * images / images_per_s:.2g} ms at {images_per_s:g} img/s"
    unmeasured = "; give --img-s for a better estimate" if images_per_s is None else ""
    return (
        f"a GPU has {images:.3g} images a step{took}: it would be idle while a CPU starts the step's kernels (some "
        f"{1000 * LAUNCH_S:.0f} ms, a rule of thumb); use a larger train.batch_size, fewer GPUs or train.compile=true{unmeasured}"
    )
