"""Tensors of every kind that a checkpoint has to bring back bit for bit."""

from typing import Any

import torch
from torch import nn


def bits(tensor: torch.Tensor) -> tuple[Any, ...]:
    """All that makes two tensors the same."""
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def every_kind_of_tensor() -> dict[str, torch.Tensor]:
    """By name in a checkpoint; some share memory, some are views."""
    base = torch.randn(6, 4)
    return {
        "model/weight": base,
        "model/tied": base,
        "model/rows": base[2:4],
        "model/transposed": base.t(),
        "model/channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "model/parameter": nn.Parameter(torch.randn(3)),
        "model/expanded": torch.randn(3, 1).expand(3, 4),
        "model/conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "model/num_batches_tracked": torch.tensor(7),
        "optimizer/step": torch.tensor(3.0),
        "optimizer/special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "optimizer/double": torch.randn(2, dtype=torch.float64),
        "ema/half": torch.randn(5).half(),
        "ema/bfloat": torch.randn(5).bfloat16(),
        "ema/nothing": torch.empty(0, 3),
        "ema/flags": torch.tensor([True, False]),
        "rng": torch.arange(256, dtype=torch.uint8),
    }
