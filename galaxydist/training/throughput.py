"""Throughput of training: shares of the step time, images per second, memory, model FLOPs utilisation."""

import re
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import psutil
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from galaxydist.distributed import World
from galaxydist.recipe.schema import Recipe

PARTS = ("data_wait", "forward_backward", "optimizer", "checkpoint")
OTHER = "other"
# Validation counts neither in the shares nor in the images per second.
OUTSIDE = "validation"
NOT_TRAINING = frozenset({"checkpoint", OUTSIDE})
GB = 1e9
# Marks on the device that are kept before they are read.
MAX_PENDING = 64


class HostClock:
    """Clock of the host: the work of a call is done when the call returns."""

    def stamp(self) -> Any:
        """Return the point in time after all work given so far, which may be in the future."""
        return time.perf_counter()

    def is_past(self, _stamp: Any) -> bool:
        """Return True once the work before this point in time is done."""
        return True

    def seconds(self, start: Any, stop: Any) -> float:
        """Return the seconds between two points in time that are past."""
        return float(stop - start)


class CudaClock(HostClock):
    """Clock of a GPU: events on the current stream, for which the host never waits.

    A wait for data during which the GPU still computes does not count as waiting.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def stamp(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def is_past(self, stamp: torch.cuda.Event) -> bool:
        return bool(stamp.query())

    def seconds(self, start: torch.cuda.Event, stop: torch.cuda.Event) -> float:
        return float(start.elapsed_time(stop)) / 1000


class StepTimer:
    """Divides the time of a loop into parts without gaps: each mark ends one part and begins the next.

    Args:
        device: device of the model.
        batch_size: global batch size in images.
        world_size: number of processes, each with its own device.
        clock: clock to use; None: the device's.
    """

    def __init__(self, device: torch.device, *, batch_size: int, world_size: int, clock: HostClock | None = None) -> None:
        self._device = device
        self._batch_size = batch_size
        self._world_size = world_size
        self._clock = clock or (CudaClock(device) if device.type == "cuda" else HostClock())
        self._process = psutil.Process()
        self._part = OTHER
        self._pending: deque[tuple[str, Any, Any]] = deque()
        self._since = self._clock.stamp()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._host_since = time.perf_counter()
        self._training_s = 0.0

    def mark(self, part: str) -> None:
        """End the current part and begin ``part``: one of PARTS, ``validation`` or ``other``."""
        stamp = self._clock.stamp()
        self._pending.append((self._part, self._since, stamp))
        host = time.perf_counter()
        if self._part not in NOT_TRAINING:
            self._training_s += host - self._host_since
        self._part, self._since, self._host_since = part, stamp, host
        if len(self._pending) > MAX_PENDING:
            self._read_past_marks()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside the context as part ``name``; afterwards the part before it continues."""
        before = self._part
        self.mark(name)
        try:
            yield
        finally:
            self.mark(before)

    def window(self, num_steps: int) -> dict[str, float]:
        """Return the numbers for the log since the last call (or the start).

        Args:
            num_steps: optimizer steps in this time.

        Returns:
            ``time/<part>`` and ``time/other``: shares of the time without validations, with sum 1; on a GPU, of the work that is
            done. ``time/img_s`` and ``time/img_s_device``: images per second, without validations and checkpoints.
            ``gpu/memory_gb`` (maximum allocated in this time), ``gpu/memory_reserved_gb``; without a GPU ``memory/rss_gb``.
        """
        self.mark(self._part)
        self._read_past_marks()
        self._seconds.pop(OUTSIDE, None)
        total = sum(self._seconds.values())
        shares = {f"time/{part}": self._seconds[part] / total if total > 0 else 0.0 for part in PARTS}
        shares[f"time/{OTHER}"] = max(0.0, 1.0 - sum(shares.values()))
        img_s = num_steps * self._batch_size / max(self._training_s, 1e-9)
        self._seconds.clear()
        self._training_s = 0.0
        return {**shares, "time/img_s": img_s, "time/img_s_device": img_s / self._world_size, **self._memory()}

    def _read_past_marks(self) -> None:
        """Add up the marks that are past; the others count in the next window."""
        while self._pending and self._clock.is_past(self._pending[0][2]):
            part, start, stop = self._pending.popleft()
            self._seconds[part] += self._clock.seconds(start, stop)

    def _memory(self) -> dict[str, float]:
        if self._device.type != "cuda":
            return {"memory/rss_gb": self._process.memory_info().rss / GB}
        used = {
            "gpu/memory_gb": torch.cuda.max_memory_allocated(self._device) / GB,
            "gpu/memory_reserved_gb": torch.cuda.memory_reserved(self._device) / GB,
        }
        torch.cuda.reset_peak_memory_stats(self._device)
        return used


# Model FLOPs utilisation (MFU): the floating point operations that the model needs for its images, relative to the peak of the
# device in the same time; recomputation to save memory does not count (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).

# The backward pass needs the products with the weights and those with the inputs: twice the forward pass.
BACKWARD = 2
TERA = 1e12
# Batch normalisation of a map of one pixel cannot train on a single image.
COUNTED_IMAGES = 2


def forward_flops(model: nn.Module, image_size: int) -> int:
    """Return the floating point operations of one image's forward pass, in matrix products and convolutions.

    A multiply-add counts as two. Nothing is computed: only shapes pass through the model, on torch's meta device.

    Args:
        model: takes images B x 3 x H x W; neither compiled nor wrapped. It is not changed.
        image_size: H and W.
    """
    return _count(model, image_size).flops[""]


def training_flops(model: nn.Module, image_size: int) -> int:
    """Return the floating point operations of one image in training: three times the forward pass, once for frozen parts."""
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
    """Return the bytes of all layers' outputs for one image, about what a forward pass keeps for the backward pass.

    Args:
        model, image_size: as for ``forward_flops``.
    """
    return _count(model, image_size).activation_bytes


class _ForwardPass(NamedTuple):
    """FLOPs of one image by module name (``""``: the whole model), and bytes of all layers' outputs."""

    flops: dict[str, int]
    activation_bytes: int


# By image size. A count takes as long as some training steps of a small model, and a start needs it three times.
_COUNTED: WeakKeyDictionary[nn.Module, dict[int, _ForwardPass]] = WeakKeyDictionary()


def _count(model: nn.Module, image_size: int) -> _ForwardPass:
    counted = _COUNTED.setdefault(model, {})
    if image_size in counted:
        return counted[image_size]
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
    counts[""] = counter.get_total_flops() // COUNTED_IMAGES
    return counted.setdefault(image_size, _ForwardPass(counts, total // COUNTED_IMAGES))


class Peak(NamedTuple):
    """Dense (not sparse) peak performance in TFLOP/s; None if the device lacks the data type.

    Args:
        half: float16 and bfloat16 on tensor cores, with sums in float32.
        tf32: TensorFloat-32 on tensor cores.
        single: float32.
        has_bf16: True if ``half`` is valid for bfloat16.
    """

    half: float
    tf32: float | None
    single: float
    has_bf16: bool = True


# By torch's name of the device without NVIDIA, Tesla and GeForce. The whole name must match, so that slices (MIG), laptop and
# export variants, which are slower, are unknown. From NVIDIA's data sheets; half of the figure if only the sparse one is given.
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
    """Return the dense peak performance of a device in FLOP/s; None if it is unknown.

    Args:
        device_name: name from ``torch.cuda.get_device_name``.
        precision: precision of the forward pass.
        tf32: True if float32 matrix products use TensorFloat-32.
    """
    name = re.sub(r"^(NVIDIA |Tesla |GeForce )+", "", device_name.strip())
    peak = next((peak for pattern, peak in PEAKS.items() if re.fullmatch(pattern, name)), None)
    if peak is None or precision == "fp64" or (precision == "bf16" and not peak.has_bf16):
        return None
    if precision == "no":
        return (peak.tf32 if tf32 and peak.tf32 is not None else peak.single) * TERA
    return peak.half * TERA


# Images per second of one device -> metrics.
Utilisation = Callable[[float], dict[str, float]]


def build_utilisation(world: World, recipe: Recipe, model: nn.Module) -> Utilisation:
    """Return a function from the images per second of one device to ``gpu/mfu``; to nothing if the device's peak is unknown.

    Args:
        world: the processes.
        recipe: recipe of the run.
        model: neither wrapped nor sharded nor compiled.
    """
    is_cuda, tf32 = world.device.type == "cuda", recipe.train.tf32
    peak_flops = device_peak_flops(torch.cuda.get_device_name(world.device), world.precision, tf32=tf32) if is_cuda else None
    if peak_flops is None:
        return lambda _img_s_device: {}
    flops = training_flops(model, recipe.data.image_size)
    return lambda img_s_device: {"gpu/mfu": img_s_device * flops / peak_flops}
