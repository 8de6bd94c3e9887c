"""Test-time augmentation: a galaxy seen in the eight ways that flips and quarter turns allow, and its mean probabilities.

The sky has no up and down: the eight views are as likely as one another, and each shows every pixel as it was stored.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Views = Literal["none", "d4"]


def views(images_BCHW: Tensor, kind: Views) -> Iterator[Tensor]:
    """The images themselves (``none``), or in turn all their flips and quarter turns (``d4``), in memory one view at a time.

    Args:
        images_BCHW: square; the views have the same memory format.
    """
    yield images_BCHW
    if kind == "none":
        return
    for number in range(1, 8):
        turned = torch.rot90(images_BCHW, number % 4, (2, 3))
        yield torch.empty_like(images_BCHW).copy_(turned.flip(3) if number >= 4 else turned)


def mean_log_probabilities(logits_VBK: Sequence[Tensor]) -> Tensor:
    """The logarithm of the mean over the views of the softmax probabilities; the logits of one view are returned as they are.

    ``logsumexp_v(log_softmax(logits_v)) - log V``: no probability underflows. The result serves as logits, since its own
    softmax is the mean.

    Args:
        logits_VBK: of each view, any float type.

    Returns:
        float64 B x K (on Apple's GPUs, which have none, on the CPU).
    """
    if len(logits_VBK) == 1:
        return logits_VBK[0]
    device = torch.device("cpu") if logits_VBK[0].device.type == "mps" else logits_VBK[0].device
    log_VBK = torch.stack([functional.log_softmax(logits_BK.to(device).double(), dim=1) for logits_BK in logits_VBK])
    return log_VBK.logsumexp(0) - math.log(len(logits_VBK))
