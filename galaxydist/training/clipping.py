"""Gradient clipping, and the size of the gradient, without waiting for the device."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm


def clip_gradients(parameters: Iterable[nn.Parameter], *, norm: float, value: float) -> Tensor:
    """Clip the gradients in place: all together by their global norm, or each element to a range.

    With fp16 the gradients must have been unscaled before. Nothing is read by the host; a gradient that is not finite stays so.

    Args:
        parameters: those without a gradient are passed over. Gradients may be sharded over processes (DTensor); then every
            process calls this.
        norm: largest Euclidean norm of all gradients together (0: do not clip by it).
        value: largest magnitude of an element (0: do not clip by it).

    Returns:
        The norm before clipping, a scalar on the gradients' device and in their float type; nan or inf where a gradient is.
    """
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    total: Any = get_total_norm([parameter.grad for parameter in trained if parameter.grad is not None])
    if hasattr(total, "full_tensor"):
        total = total.full_tensor()
    if norm > 0:
        clip_grads_with_norm_(trained, norm, total)
    if value > 0:
        clip_grad_value_(trained, value)
    whole: Tensor = total
    return whole.detach() if isinstance(whole, Tensor) else torch.tensor(whole)
