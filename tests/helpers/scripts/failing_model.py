"""A user's model that makes one rank of its run fail: ``model.name=tests.helpers.scripts.failing_model:build``.

``FAULT`` names the error, ``FAULTY_RANK`` and ``FAULT_STEP`` where it comes. With ``OTHERS_STUCK`` the other ranks stand in that
step for ever, as in a kernel of NCCL that waits for its peer; otherwise they meet gloo's error. As with NCCL, destroying the
process group never ends, and with ``DEVICE_STUCK`` neither does a wait for the device.
"""

import os
import threading
import time
from typing import Any

import torch
from torch import nn

from galaxydist.errors import UserError


def raise_fault(name: str) -> None:
    if name == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB")
    if name == "user":
        raise UserError("the disk of this node is full; free some")
    if name == "interrupt":
        raise KeyboardInterrupt
    raise KeyError("a bug")


def block_for_ever(*_: object) -> None:
    threading.Event().wait()


class FailingModel(nn.Sequential):
    """Raises ``fault`` in its next forward pass, if there is one."""

    fault = ""

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        if self.fault:
            raise_fault(self.fault)
        logits_BK: torch.Tensor = super().forward(images_BCHW)
        return logits_BK


def build(num_classes: int, image_size: int) -> nn.Module:  # noqa: ARG001
    """Return a small model, and arrange the fault."""
    from galaxydist.checkpoints import store
    from galaxydist.loading.device_prefetch import DevicePrefetcher
    from galaxydist.training import loop
    from galaxydist.training.step import TrainStep

    rank, fault, faulty_rank = os.environ["RANK"], os.environ["FAULT"], os.environ["FAULTY_RANK"]
    fault_step, are_stuck = int(os.environ["FAULT_STEP"]), bool(os.environ.get("OTHERS_STUCK"))
    take_step, publish = TrainStep.__call__, store.publish
    model = FailingModel(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, num_classes))
    loop.LONG_STEP_S = 0.0  # so that each step has gates, at which the ranks ask one another

    def fail(self: TrainStep, batch: Any, step: int) -> Any:
        if step == fault_step and os.environ.get("DEVICE_STUCK"):
            DevicePrefetcher.close = block_for_ever  # type: ignore[method-assign, assignment]
        if step == fault_step and rank == faulty_rank:
            model.fault = fault
        elif step == fault_step and are_stuck:
            block_for_ever()
        return take_step(self, batch, step)

    def publish_slowly(*arguments: Any, **named: Any) -> Any:
        time.sleep(2)  # the other rank fails during this write
        return publish(*arguments, **named)

    TrainStep.__call__ = fail  # type: ignore[method-assign]
    torch.distributed.destroy_process_group = block_for_ever  # type: ignore[assignment]
    store.publish = publish_slowly
    return model
