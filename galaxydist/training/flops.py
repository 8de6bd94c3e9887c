"""How much of a device a model uses: model FLOPs utilisation (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).

It is the FLOPs that the model needs for the images it is given, over the peak of the device in the same time. What is computed
again to save memory does not count.
"""

import re
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

# The backward pass needs the products with the weights and those with the inputs: twice the forward pass.
BACKWARD = 2
TERA = 1e12
# Batch normalisation of a map of one pixel refuses to train on one image.
COUNTED_IMAGES = 2


def forward_flops(model: nn.Module, image_size: int) -> int:
    """Floating point operations of one image's forward pass, in matrix products and convolutions (one multiply-add is two).

    Nothing is computed: shapes alone go through the model, on torch's meta device.

    Args:
        model: images B x 3 x H x W in; as it is built, neither compiled nor wrapped. It stays as it is.
        image_size: H and W.
    """
    return _count(model, image_size).flops[""]


def training_flops(model: nn.Module, image_size: int) -> int:
    """Floating point operations of one image in training: three times the forward pass; once for frozen parts."""
    counts = _count(model, image_size).flops
    parameters = list(model.parameters())
    if all(parameter.requires_grad for parameter in parameters):
        return (1 + BACKWARD) * counts[""]
    trained = sum(
        counts.get(name, 0)
        for name, module in model.named_modules()
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    )
    return counts[""] + BACKWARD * trained


def activation_bytes(model: nn.Module, image_size: int) -> int:
    """Bytes of the outputs of all layers for one image: about what a forward pass keeps for the way back. Nothing is computed.

    Args:
        model, image_size: as for ``forward_flops``.
    """
    return _count(model, image_size).activation_bytes


class _ForwardPass(NamedTuple):
    """What one image needs: forward FLOPs of each module by name (the whole model is ``""``), bytes of all layers' outputs."""

    flops: dict[str, int]
    activation_bytes: int


# By image size. Each count takes as long as some training steps of a small model, and a start asks three times.
_COUNTED: WeakKeyDictionary[nn.Module, dict[int, _ForwardPass]] = WeakKeyDictionary()


def _count(model: nn.Module, image_size: int) -> _ForwardPass:
    known = _COUNTED.setdefault(model, {})
    if image_size not in known:
        known[image_size] = _count_anew(model, image_size)
    return known[image_size]


def _count_anew(model: nn.Module, image_size: int) -> _ForwardPass:
    total = 0

    def add(_layer: nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal total
        if isinstance(output, torch.Tensor):
            total += output.numel() * output.element_size()

    tensors = {
        name: tensor.detach().to("meta")
        for tensors in (model.named_parameters(), model.named_buffers())
        for name, tensor in tensors
    }
    images_BCHW = torch.empty(COUNTED_IMAGES, 3, image_size, image_size, device="meta", dtype=next(model.parameters()).dtype)
    hooks = [module.register_forward_hook(add) for module in model.modules() if not any(module.children())]
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            functional_call(model, tensors, (images_BCHW,))
    finally:
        for hook in hooks:
            hook.remove()
    root = f"{type(model).__name__}."
    counts = {
        name.removeprefix(root): sum(by_kind.values()) // COUNTED_IMAGES for name, by_kind in counter.get_flop_counts().items()
    }
    return _ForwardPass({**counts, "": counter.get_total_flops() // COUNTED_IMAGES}, total // COUNTED_IMAGES)


class Peak(NamedTuple):
    """Dense (not sparse) peaks in TFLOP/s. None: the device does not have it.

    Args:
        half: float16 and bfloat16 on tensor cores, with sums in float32.
        tf32: TensorFloat-32 on tensor cores.
        single: float32.
        has_bf16: whether ``half`` holds for bfloat16.
    """

    half: float
    tf32: float | None
    single: float
    has_bf16: bool = True


# By torch's name of the device without NVIDIA, Tesla and GeForce; the whole name must match, so that slices (MIG), laptop and
# export variants, which are slower, stay unknown. From NVIDIA's data sheets; where they give sparse figures alone, halved.
PEAKS: dict[str, Peak] = {
    r"V100-SXM2-\d+GB": Peak(125.0, None, 15.7, has_bf16=False),
    r"V100-PCIE-\d+GB": Peak(112.0, None, 14.0, has_bf16=False),
    r"V100S-PCIE-\d+GB": Peak(130.0, None, 16.4, has_bf16=False),
    r"T4": Peak(65.0, None, 8.1, has_bf16=False),
    r"A10": Peak(125.0, 62.5, 31.2),
    r"A30": Peak(165.0, 82.0, 10.3),
    r"A40": Peak(149.7, 74.8, 37.4),
    r"A100-(SXM4|PCIE|PCIe)-\d+GB|A100 80GB PCIe": Peak(312.0, 156.0, 19.5),
    r"L4": Peak(121.0, 60.0, 30.3),
    r"L40S": Peak(362.05, 183.0, 91.6),
    r"H100 80GB HBM3|H200": Peak(989.4, 494.7, 67.0),
    r"H100 PCIe": Peak(756.0, 378.0, 51.0),
    r"B200": Peak(2250.0, 1100.0, 80.0),
    # GA102 and AD102 whitepapers, tables of the GeForce and RTX cards.
    r"RTX 3090": Peak(71.0, 35.6, 35.6),
    r"RTX 4090": Peak(165.2, 82.6, 82.6),
    r"RTX A6000": Peak(154.8, 77.4, 38.7),
}


def device_peak_flops(device_name: str, precision: Literal["no", "bf16", "fp16", "fp64"], *, tf32: bool = False) -> float | None:
    """Peak of a device in FLOP/s, dense; None where it is not known.

    Args:
        device_name: as ``torch.cuda.get_device_name`` gives it.
        precision: of the forward pass.
        tf32: whether matrix products of float32 are TensorFloat-32's.
    """
    name = re.sub(r"^(NVIDIA |Tesla |GeForce )+", "", device_name.strip())
    peak = next((peak for pattern, peak in PEAKS.items() if re.fullmatch(pattern, name)), None)
    if peak is None or precision == "fp64" or (precision == "bf16" and not peak.has_bf16):
        return None
    if precision == "no":
        return (peak.tf32 if tf32 and peak.tf32 is not None else peak.single) * TERA
    return peak.half * TERA


def utilisation(images_per_second: float, flops_per_image: int, peak_flops: float) -> float:
    """Share of one device's peak that its training uses.

    Args:
        images_per_second: of one device.
        flops_per_image: see ``training_flops``.
        peak_flops: see ``device_peak_flops``.
    """
    return images_per_second * flops_per_image / peak_flops
