"""How much of its device a run uses, for the log."""

from collections.abc import Callable

import torch
from torch import nn

from galaxydist.distributed import World
from galaxydist.recipe.schema import Recipe
from galaxydist.training.flops import device_peak_flops, training_flops, utilisation

Utilisation = Callable[[float], dict[str, float]]


def build_utilisation(world: World, recipe: Recipe, model: nn.Module) -> Utilisation:
    """Images a second of one device to ``gpu/mfu``; to nothing where the device's peak is not known.

    Args:
        model: as it is built, neither wrapped nor divided nor compiled.
    """
    if world.device.type != "cuda":
        return _unknown
    name, tf32 = torch.cuda.get_device_name(world.device), recipe.train.tf32
    peak_flops = device_peak_flops(name, world.precision, tf32=tf32)
    if peak_flops is None:
        return _unknown
    flops = training_flops(model, recipe.data.image_size)
    return lambda img_s_device: {"gpu/mfu": utilisation(img_s_device, flops, peak_flops)}


def _unknown(_img_s_device: float) -> dict[str, float]:
    return {}
