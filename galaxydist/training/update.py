"""One optimizer step over one global batch, whatever the number of processes and micro-batches."""

import itertools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import nn

from galaxydist.chance import hash64
from galaxydist.recipe.schema import TrainConfig
from galaxydist.shards.augment import Augment
from galaxydist.shards.purposes import Purpose
from galaxydist.shards.reader import Batch
from galaxydist.training.objective import Objective
from galaxydist.training.optimizer import LearningRate, set_learning_rate
from galaxydist.training.world import World


class Update:
    """Forward, backward and optimizer step.

    The loss of a step is the sum of its numerators over all ranks and micro-batches, divided once by the sum of the weights.

    Args:
        world: the processes.
        model: the model, as Accelerate prepared it.
        optimizer: likewise.
        objective: numerator and weights of the loss.
        augment: pixels to model input, on the device.
        rate: learning rate by step.
        ema: moving average of the weights, or None.
        config: micro-batch and clipping.
        seed: of the recipe.
    """

    def __init__(
        self,
        world: World,
        model: nn.Module,
        optimizer: Any,
        *,
        objective: Objective,
        augment: Augment,
        rate: LearningRate,
        ema: ModelEmaV3 | None,
        config: TrainConfig,
        seed: int,
    ) -> None:
        self.world = world
        self.model = model
        self.optimizer = optimizer
        self.objective = objective
        self.augment = augment
        self.rate = rate
        self.ema = ema
        self.seed = seed
        self.clip_norm = config.clip_norm
        self.num_parts = count_micro_batches(config.batch_size, world.size, config.micro_batch)
        self.bare_model: nn.Module = world.accelerator.unwrap_model(model)

    def __call__(self, batch: Batch, step: int) -> torch.Tensor:
        """Take step number ``step``.

        Args:
            batch: this rank's part of the global batch, on the device.
            step: optimizer steps done before.

        Returns:
            This rank's sums, float64 of shape 4: loss numerator, loss weight, correct, counted samples.
        """
        labels_B, sample_weights_B = batch.labels_B, batch.weights_B
        weights_B = self.objective.weights(labels_B, sample_weights_B)
        total_weight = weights_B.sum(dtype=torch.float64)
        # Ranks wait for one another only where the sum is needed: at the first backward.
        work = dist.all_reduce(total_weight, async_op=True) if self.world.size > 1 else None

        set_learning_rate(self.optimizer, self.rate.at(step))
        self.optimizer.zero_grad(set_to_none=True)
        self.model.train()
        sums = torch.zeros(4, dtype=torch.float64, device=self.world.device)
        parts = split_evenly(len(labels_B), self.num_parts)
        for number, part in enumerate(parts):
            images_BCHW = self.augment(batch.images_BHWC[part], batch.epoch, batch.positions_B[part])
            is_last = number == len(parts) - 1
            with nullcontext() if is_last else self.world.accelerator.no_sync(self.model):
                self._seed_model(step, number)
                logits_BK = self.model(images_BCHW)
                numerator = self.objective.numerator(logits_BK, labels_B[part], weights_B[part])
                if work is not None and number == 0:
                    work.wait()
                # DDP averages gradients over the ranks: times the world size it is their sum.
                scale = (self.world.size / total_weight.clamp(min=1e-12)).to(numerator.dtype)
                self.world.accelerator.backward(numerator * scale)
            sums += self._count(numerator, logits_BK, labels_B[part], weights_B[part], sample_weights_B[part])
        if self.clip_norm > 0:
            self.world.accelerator.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.bare_model, step=step + 1)
        return sums

    @staticmethod
    def _count(
        numerator: torch.Tensor,
        logits_BK: torch.Tensor,
        labels_B: torch.Tensor,
        weights_B: torch.Tensor,
        sample_weights_B: torch.Tensor,
    ) -> torch.Tensor:
        present_B = sample_weights_B > 0
        correct = ((logits_BK.detach().argmax(1) == labels_B) & present_B).sum()
        return torch.stack([numerator.detach().double(), weights_B.sum().double(), correct.double(), present_B.sum().double()])

    def _seed_model(self, step: int, part: int) -> None:
        """Dropout and drop path draw from torch's generator: the same again after a resume."""
        torch.manual_seed(int(hash64(self.seed, step, part, self.world.rank, Purpose.MODEL)) >> 1)


def count_micro_batches(batch_size: int, world_size: int, micro_batch: int) -> int:
    """Forward passes in a step: the same on all ranks, since gradients are exchanged in the last one.

    Ranks hold floor or ceil of ``batch_size / world_size`` samples; no part of any rank is empty, so with uneven ranks a part
    may hold one sample more than ``micro_batch``.
    """
    if micro_batch == 0:
        return 1
    largest = -(-batch_size // world_size)
    return min(-(-largest // micro_batch), batch_size // world_size)


def split_evenly(length: int, num_parts: int) -> Sequence[slice]:
    """``num_parts`` slices of 0 ... length-1 whose sizes differ by one at most."""
    edges = [length * part // num_parts for part in range(num_parts + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]
