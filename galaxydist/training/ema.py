"""The moving average of a model's weights: each process averages what it holds, and nothing is sent."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from galaxydist.checkpoints.sharded import own_part
from galaxydist.training.sharding import cut_like


class MovingAverage:
    """The same numbers as timm's ``ModelEmaV3(model, decay, use_warmup=True)``, also for a sharded model, which cannot be copied.

    All floating-point tensors of the state dict are averaged, batch-norm statistics too; others are copied. The decay is ramped
    up: ``min(decay, 1 - (1 + t)^(-2/3))`` at the t-th update after the first, which copies (timm's ``warmup_power`` and
    ``warmup_gamma``). timm's own class is not used: importing
    timm takes more than a second, which runs of our own networks do not need.

    Args:
        model: sharded, or not.
        decay: a step, in the end.
        tensors: where the averages are kept, under the model's names; None: new ones, with the model's present values.
    """

    def __init__(self, model: nn.Module, decay: float, tensors: Mapping[str, Tensor] | None = None) -> None:
        self.decay = decay
        found = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()} if tensors is None else tensors
        self._tensors: Mapping[str, Tensor] = found
        self._buffer_names = {name for name, _ in model.named_buffers()}

    def decay_at(self, step: int) -> float:
        """The decay of the update after optimizer step number ``step``, counted from 1."""
        after_first = max(0, step - 1)
        if after_first == 0:
            return 0.0
        ramp: float = 1.0 - (1.0 + after_first) ** (-2 / 3)
        return min(ramp, self.decay)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after optimizer step number ``step``, counted from 1."""
        averages: list[Tensor] = []
        values: list[Tensor] = []
        for average, value in zip(self._tensors.values(), model.state_dict().values(), strict=True):
            if average.is_floating_point():
                averages.append(own_part(average))
                values.append(own_part(value))
            else:
                average.copy_(value)
        torch._foreach_lerp_(averages, values, weight=1.0 - self.decay_at(step))

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """The averages of the model's buffers, which are whole: those of batch-norm statistics are made equal over the ranks."""
        return ((name, tensor) for name, tensor in self._tensors.items() if name in self._buffer_names)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages under the model's names: the same tensors, not copies."""
        return dict(self._tensors)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put averages back, sharded or whole. Nothing is sent.

        Raises:
            KeyError: one is missing.
        """
        for name, average in self._tensors.items():
            own_part(average).copy_(own_part(cut_like(state[name], average)))
