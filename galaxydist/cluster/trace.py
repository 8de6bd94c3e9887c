"""The memory of a forward and a backward pass, moment by moment, found without any: on tensors that have shapes and no content.

The model runs under torch's ``FakeTensorMode`` as if it were on a CPU. There attention takes the fused kernel, which keeps no
matrix of tokens by tokens, and autocast keeps the same tensors in half precision as it does on a GPU.
"""

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

Int64 = NDArray[np.int64]

# Images of the two passes from which all others are worked out. Not 1: such tensors have layouts of their own.
FEW, MORE = 2, 4


@dataclass(frozen=True)
class Timeline:
    """Bytes that are alive after each operation of a forward and a backward pass, beside weights and kept gradients.

    Args:
        constant, per_image: int64, an entry an operation: ``constant + per_image * B`` bytes, gradients of weights not counted.
        made: bytes of the gradients of weights made so far.
        new: bytes of a gradient of a weight that is made by this operation.
    """

    constant: Int64
    per_image: Int64
    made: Int64
    new: Int64

    def activations(self, num_images: int) -> int:
        """The most at one moment that is neither weight nor gradient of a weight."""
        return int(self._at(num_images).max())

    def peak(self, num_images: int, *, keeps_gradients: bool) -> int:
        """The most at one moment, gradients included.

        Args:
            num_images: in the pass.
            keeps_gradients: gradients are there from the start (DDP's buckets, or those of an earlier micro-batch), and new ones
                are added to them; else they come one by one while activations go.
        """
        if keeps_gradients:
            return int((self._at(num_images) + self.new).max() + self.made[-1])
        return int((self._at(num_images) + self.made).max())

    def _at(self, num_images: int) -> Int64:
        return self.constant + self.per_image * num_images


def trace_step(model: nn.Module, image_size: int, precision: str) -> Timeline:
    """The timeline of a model's training step.

    Args:
        model: in training mode, on the device "meta"; of no use afterwards.
        image_size: of its square RGB input, in pixels.
        precision: ``bf16`` and ``fp16``: the forward pass under autocast; all others: as it is.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device="cpu")
        few, more = (_run(model, image_size, num_images, precision) for num_images in (FEW, MORE))
    assert len(few.bytes) == len(more.bytes), "the operations must not depend on the number of images"
    per_image = (more.without_gradients() - few.without_gradients()) // (MORE - FEW)
    return Timeline(few.without_gradients() - per_image * FEW, per_image, few.gradients_made(), few.new_gradients())


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages that are alive, after each operation; ``known`` ones are not counted."""

    def __init__(self, known: Sequence[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes: list[int] = []
        self._alive = 0
        self._births: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._gradients: dict[int, int] = {}
        for tensor in known:
            self._births[tensor.untyped_storage()] = -1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # asked for ten times as often as anything is done
            return args[0].device
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor):
                self.add(value)
        self.bytes.append(self._alive)
        return result

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._births:
            self._births[storage] = len(self.bytes)
            self._alive += storage.nbytes()
            weakref.finalize(storage, self._drop, storage.nbytes())

    def note_gradients(self, model: nn.Module) -> None:
        """After the backward pass: which of the storages are gradients of weights."""
        for parameter in model.parameters():
            if parameter.grad is not None:
                storage = parameter.grad.untyped_storage()
                birth = self._births[storage]
                self._gradients[birth] = self._gradients.get(birth, 0) + storage.nbytes()

    def new_gradients(self) -> Int64:
        new = np.zeros(len(self.bytes), np.int64)
        for birth, size in self._gradients.items():
            new[birth] += size
        return new

    def gradients_made(self) -> Int64:
        return np.cumsum(self.new_gradients())

    def without_gradients(self) -> Int64:
        return np.asarray(self.bytes, np.int64) - self.gradients_made()

    def _drop(self, num_bytes: int) -> None:
        self._alive -= num_bytes


def _run(model: nn.Module, image_size: int, num_images: int, precision: str) -> _Recorder:
    model.zero_grad(set_to_none=True)
    recorder = _Recorder([*model.parameters(), *model.buffers()])
    images_BCHW = torch.empty(num_images, 3, image_size, image_size, dtype=next(model.parameters()).dtype)
    labels_B = torch.zeros(num_images, dtype=torch.int64)
    recorder.add(images_BCHW)
    with recorder:
        with _autocast(precision):
            logits_BK = model(images_BCHW)
        # As the trainer does: the loss in float32 at least, a sum.
        logits_BK = logits_BK if logits_BK.dtype == torch.float64 else logits_BK.float()
        loss = functional.cross_entropy(logits_BK, labels_B, reduction="none").sum()
        loss.backward()  # type: ignore[no-untyped-call]
    recorder.note_gradients(model)
    return recorder


def _autocast(precision: str) -> AbstractContextManager[Any]:
    types = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.autocast("cpu", dtype=types[precision]) if precision in types else nullcontext()
