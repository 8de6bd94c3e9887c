"""One optimizer step over one global batch, whatever the number of processes and micro-batches."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from galaxydist.counter_rng import Stream, hash64
from galaxydist.distributed import World
from galaxydist.loading.augment import Augment
from galaxydist.loading.loader import Batch
from galaxydist.models.build import set_train_mode
from galaxydist.models.performance import images_channels_last
from galaxydist.recipe.schema import TrainConfig
from galaxydist.training.batch_norm import ALL_STATISTICS
from galaxydist.training.ddp import Strategy
from galaxydist.training.loss import LossTargets, WeightedCrossEntropy
from galaxydist.training.mixup import MixedBatch, Mixup, Part, count_pair_parts, split_pairs, take
from galaxydist.training.optimizer import LRSchedule, set_learning_rate
from galaxydist.training.stop_signals import StepAbandoned, StepGates
from galaxydist.training.throughput import StepTimer


class TrainStep:
    """Forward, backward and optimizer step.

    The loss of a step is the sum of its numerators over all ranks and micro-batches, divided once by the sum of the weights.
    A step whose gradient is not finite is left out: weights, optimizer and batch-norm statistics stay as they were. On a GPU
    the host does not wait to know, where the optimizer's kernels are fused. So do they where a gate says that the step is left.

    Args:
        world: the processes.
        strategy: the model, and how the processes share it.
        optimizer: as Accelerate prepared it.
        objective: numerator and weights of the loss.
        augment: pixels to model input, on the device.
        mixing: mixup and cutmix, or None.
        rate: learning rate by step.
        config: clipping, and what to do without finite numbers.
        micro_batch: galaxies in one forward pass of one process (0: its whole share).
        seed: of the recipe.
        timer: told where the time goes.
        gates: where a long step may be left.
    """

    def __init__(
        self,
        world: World,
        strategy: Strategy,
        optimizer: Any,
        *,
        objective: WeightedCrossEntropy,
        augment: Augment,
        mixing: Mixup | None,
        rate: LRSchedule,
        config: TrainConfig,
        micro_batch: int,
        seed: int,
        timer: StepTimer,
        gates: StepGates,
    ) -> None:
        self.world = world
        self.strategy = strategy
        self.optimizer = optimizer
        self.objective = objective
        self.augment = augment
        self.mixing = mixing
        self.rate = rate
        self.seed = seed
        self.timer = timer
        self.gates = gates
        self.clip_norm, self.clip_value = config.clip_norm, config.clip_value
        self.is_channels_last = config.channels_last
        count_parts = count_micro_batches if mixing is None else count_pair_parts
        self.num_parts = count_parts(config.batch_size, world.size, micro_batch)
        self.parameters = [parameter for parameter in strategy.model.parameters() if parameter.requires_grad]
        self.statistics = BatchNormBackup(strategy.model)
        self.skips_nonfinite = config.on_nonfinite == "skip"

    def __call__(self, batch: Batch, step: int) -> torch.Tensor:
        """Take step number ``step``.

        Args:
            batch: this rank's part of the global batch, on the device.
            step: optimizer steps done before.

        Returns:
            This rank's sums, float64 of shape 5: loss numerator, loss weight, correct, counted samples, and 1 where its loss or
            the gradient is not finite.

        Raises:
            StepAbandoned: on all ranks; nothing has changed.
        """
        self.optimizer.zero_grad(set_to_none=True)
        set_train_mode(self.strategy.model)
        self.statistics.keep(is_needed=self.skips_nonfinite or not self.gates.is_open)
        try:
            with self.timer.part("forward_backward"), self.gates.step() as pass_gate:
                sums = self._backward(batch, step, pass_gate)
        except StepAbandoned:
            self.optimizer.zero_grad(set_to_none=True)
            self.statistics.put_back()
            raise
        with self.timer.part("optimizer"):
            set_learning_rate(self.optimizer, self.rate(step))
            is_finite = self._move() & sums[0].isfinite()
            self.statistics.put_back(where=~is_finite)
            if self.strategy.ema is not None:
                self.strategy.ema.update(self.strategy.model, step=step + 1)
        return torch.cat([sums, (~is_finite).double().reshape(1)])

    def _backward(self, batch: Batch, step: int, pass_gate: Callable[[], None]) -> torch.Tensor:
        """Gradients of the global batch's loss, and this rank's sums. Gates stand before each micro-batch."""
        mix = self.mixing.prepare(batch) if self.mixing is not None else None
        targets = self.objective.targets(batch.labels_B, batch.weights_B, mix)
        total_weight = targets.total_weights_B.sum(dtype=torch.float64)
        # Ranks wait for one another only where the sum is needed: at the first backward.
        work = dist.all_reduce(total_weight, async_op=True) if self.world.size > 1 else None
        sums = torch.zeros(4, dtype=torch.float64, device=self.world.device)
        parts = self._parts(len(batch.labels_B))
        for number, part in enumerate(parts):
            pass_gate()
            part_targets = targets.take(part)
            images_BCHW = self._images(batch, part, mix)
            is_last = number == len(parts) - 1
            with self.strategy.exchange(is_last=is_last):
                self._seed_model(step, number)
                logits_BK = self.strategy.forward(images_BCHW)
                numerator = self.objective.summed_loss(logits_BK, part_targets)
                if work is not None and number == 0:
                    work.wait()
                # DDP averages gradients over the ranks: times the world size it is their sum.
                scale = (self.world.size / total_weight.clamp(min=1e-12)).to(numerator.dtype)
                self.world.accelerator.backward(numerator * scale)
            sums += self._count(numerator, logits_BK, part_targets, take(batch.weights_B, part))
        return sums

    def _parts(self, length: int) -> Sequence[Part]:
        return split_evenly(length, self.num_parts) if self.mixing is None else split_pairs(length, self.num_parts)

    def _images(self, batch: Batch, part: Part, mix: MixedBatch | None) -> torch.Tensor:
        """A part of the batch as the model sees it."""
        images_BCHW = self.augment(take(batch.images_BHWC, part), batch.epoch, take(batch.positions_B, part))
        images_BCHW = images_BCHW.to(self.world.dtype)
        if self.is_channels_last:
            images_BCHW = images_channels_last(images_BCHW)
        return images_BCHW if mix is None else mix.take(part)(images_BCHW)

    def _move(self) -> torch.Tensor:
        """Clip, and let the optimizer take its step if the gradient is finite; whether it is, alike on all ranks."""
        scaler = self.world.accelerator.scaler
        if scaler is not None:
            self.world.accelerator.unscale_gradients(self.optimizer)
        norm = self.strategy.clip(self.parameters, norm=self.clip_norm, value=self.clip_value)
        is_finite = norm.isfinite()
        if scaler is not None:
            # With fp16 a gradient that overflows is a part of the plan: the scaler leaves out the step and scales less.
            self.optimizer.step()
            return torch.ones_like(is_finite)
        optimizer = self.optimizer.optimizer
        is_fused = norm.device.type == "cuda" and getattr(optimizer, "_step_supports_amp_scaling", False)
        if is_fused and not self.strategy.is_collective:
            optimizer.grad_scale, optimizer.found_inf = None, (~is_finite).float()
            self.optimizer.step()
        elif bool(is_finite):
            self.optimizer.step()
        return is_finite

    @staticmethod
    def _count(
        numerator: torch.Tensor, logits_BK: torch.Tensor, targets: LossTargets, sample_weights_B: torch.Tensor
    ) -> torch.Tensor:
        present_B = sample_weights_B > 0
        correct = ((logits_BK.detach().argmax(1) == targets.majority_B) & present_B).sum()
        weight = targets.total_weights_B.sum(dtype=torch.float64)
        return torch.stack([numerator.detach().double(), weight, correct.double(), present_B.sum().double()])

    def _seed_model(self, step: int, part: int) -> None:
        """Dropout and drop path draw from torch's generator: the same again after a resume."""
        seed = int(hash64(self.seed, step, part, self.world.rank, Stream.MODEL)) >> 1
        # torch.manual_seed asks for every kind of device that there might be, which takes a millisecond.
        torch.default_generator.manual_seed(seed)
        if self.world.device.type == "cuda":
            torch.cuda.manual_seed(seed)


class BatchNormBackup:
    """A model's batch-norm statistics as they were before a step, to put back where the step is left out: one activation that is
    not finite would spoil them for good.

    Args:
        model: not wrapped.
    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers = [b for name, b in model.named_buffers() if name.rsplit(".", 1)[-1] in ALL_STATISTICS]
        self._kept: list[torch.Tensor] = []

    def keep(self, *, is_needed: bool) -> None:
        """Remember them; if they are not needed, nothing is kept and nothing will be put back."""
        self._kept = [buffer.clone() for buffer in self._buffers] if is_needed else []

    def put_back(self, where: torch.Tensor | None = None) -> None:
        """Those that were kept; with ``where`` (a boolean scalar on the device) only if it is true."""
        if self._kept:
            for buffer, kept in zip(self._buffers, self._kept, strict=True):
                buffer.copy_(kept if where is None else torch.where(where, kept, buffer))


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
