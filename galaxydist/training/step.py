"""One optimizer step over a global batch, on any number of processes and in any number of micro-batches."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from galaxydist.checkpoints.sharded import own_part
from galaxydist.counter_rng import Stream, hash64
from galaxydist.distributed import World
from galaxydist.loading.augment import Augment
from galaxydist.loading.loader import Batch
from galaxydist.models.build import set_train_mode
from galaxydist.recipe.rules import is_mixing
from galaxydist.recipe.schema import Recipe, TrainConfig
from galaxydist.training.batch_norm import BatchNormBackup
from galaxydist.training.loss import LossTargets, WeightedCrossEntropy
from galaxydist.training.micro_batch import count_micro_batches
from galaxydist.training.mixup import NUM_MIXUP_DRAWS, MixedBatch, Mixup, Part, count_pair_parts, split_evenly, split_pairs, take
from galaxydist.training.optimizer import LRSchedule, set_learning_rate, step_if_finite
from galaxydist.training.stop_signals import StepAbandoned, StepGates
from galaxydist.training.strategy import Strategy
from galaxydist.training.throughput import StepTimer


@dataclass(slots=True)
class TrainStep:
    """Forward pass, backward pass and optimizer step of a global batch.

    The loss of a step is the sum of its numerators over all ranks and micro-batches, divided once by the sum of the weights. A
    step whose loss or gradient is not finite is skipped: weights, optimizer and batch-norm statistics stay as they were. If the
    optimizer's kernels are fused, a GPU does this without making the host wait. A step that is abandoned at a gate changes
    nothing either. The model is put into training mode once, since an evaluation restores the modes of its modules.

    Args:
        world: the processes.
        strategy: how the processes share the model.
        optimizer: the optimizer, prepared by Accelerate.
        loss: numerator and weights of the loss.
        augment: turns pixels into model input, on the device.
        mixup: mixup and cutmix, or None.
        schedule: learning rate by step.
        config: micro-batches, clipping and non-finite steps.
        micro_batch: galaxies in one forward pass of one process (0: its whole share of the batch).
        seed: the recipe's seed.
        memory_format: of the model's images.
        timer: measures the parts of a step.
        gates: points at which a long step may be abandoned.
    """

    world: World
    strategy: Strategy
    optimizer: Any
    loss: WeightedCrossEntropy
    augment: Augment
    mixup: Mixup | None
    schedule: LRSchedule
    config: TrainConfig
    micro_batch: int
    seed: int
    memory_format: torch.memory_format
    timer: StepTimer
    gates: StepGates
    parameters: list[nn.Parameter] = field(init=False)
    statistics: BatchNormBackup = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = [parameter for parameter in self.strategy.model.parameters() if parameter.requires_grad]
        self.statistics = BatchNormBackup(self.strategy.model)
        set_train_mode(self.strategy.model)

    def __call__(self, batch: Batch, step: int) -> torch.Tensor:
        """Take step number ``step``.

        Args:
            batch: this rank's part of the global batch, on the device.
            step: optimizer steps done before.

        Returns:
            This rank's sums, float64 of shape 7: loss numerator, loss weight, correct, counted samples, 1 if its loss or the
            gradient is not finite, the next step's loss scale (0 without fp16), and the norm of the gradient before clipping (of
            the whole gradient, on rank 0; 0 on the others).

        Raises:
            StepAbandoned: on all ranks; nothing has changed.
        """
        self.optimizer.zero_grad(set_to_none=True)
        self.statistics.keep(is_needed=self.config.on_nonfinite == "skip" or not self.gates.is_open)
        try:
            with self.timer.part("forward_backward"), self.gates.step() as pass_gate:
                sums = self.forward_backward(batch, step, pass_gate)
        except StepAbandoned:
            self.optimizer.zero_grad(set_to_none=True)
            self.statistics.restore()
            raise
        with self.timer.part("optimizer"):
            set_learning_rate(self.optimizer, self.schedule(step))
            is_finite, norm = self.optimizer_step()
            is_finite &= sums[0].isfinite()
            self.statistics.restore(where=~is_finite)
            if self.strategy.ema is not None:
                self.strategy.ema.update(step + 1)
        scale = self.world.mixed_precision.loss_scale
        zero = torch.zeros_like(is_finite)
        last = [is_finite.logical_not(), zero if scale is None else scale, norm if self.world.is_main else zero]
        return torch.cat([sums, *(value.double().reshape(1) for value in last)])

    def forward_backward(self, batch: Batch, step: int, pass_gate: Callable[[], None]) -> torch.Tensor:
        """Compute the gradients of the global batch's loss, with a gate before each micro-batch.

        Returns:
            This rank's sums, float64 of shape 4: loss numerator, loss weight, correct, counted samples.
        """
        mix = self.mixup.prepare(batch.draws[:, -NUM_MIXUP_DRAWS:], batch.weights_B) if self.mixup is not None else None
        targets = self.loss.targets(batch.labels_B, batch.weights_B, mix)
        total_weight = targets.total_weights_B.sum(dtype=torch.float64)
        # The sum is needed in the first backward pass only: the forward pass does not wait for the other ranks.
        work = dist.all_reduce(total_weight, async_op=True) if self.world.size > 1 else None
        sums = torch.zeros(4, dtype=torch.float64, device=self.world.device)
        parts = self.micro_batches(len(batch.labels_B))
        for number, part in enumerate(parts):
            pass_gate()
            part_targets = targets.take(part)
            images_BCHW = self.augmented(batch, part, mix)
            with self.strategy.gradient_sync(is_last=number == len(parts) - 1):
                self._seed_model(step, number)
                logits_BK = self.strategy.forward(images_BCHW)
                numerator = self.loss.summed_loss(logits_BK, part_targets)
                if work is not None and number == 0:
                    work.wait()
                # DDP averages gradients over the ranks; times the world size this is their sum.
                scale = (self.world.size / total_weight.clamp(min=1e-12)).to(numerator.dtype)
                # A loss that is inf or nan can have a finite gradient. This makes the gradient nan on all ranks.
                scale = scale + 0.0 * numerator.detach()
                self.world.mixed_precision.backward(numerator * scale)
            sums += self._count(numerator, logits_BK, part_targets, take(batch.weights_B, part))
        return sums

    def draw(self, epoch: int, positions: NDArray[np.int64], width: int) -> NDArray[np.float64]:
        """Draw the random numbers of a rank's batch, which the step needs as ``Batch.draws_BN``: pure, for the loader's threads.

        Args:
            epoch: training epoch.
            positions: B positions in the epoch's order.
            width: width of the batch's images in pixels.

        Returns:
            B x N, those of the augmentation, then those of mixup.
        """
        draws_BN = self.augment.draw(epoch, positions, width)
        return draws_BN if self.mixup is None else np.concatenate([draws_BN, self.mixup.draw_rows(epoch, positions)], axis=1)

    def micro_batches(self, length: int) -> Sequence[Part]:
        """Split a rank's batch of ``length`` rows into the parts of the forward passes."""
        return split_batch(self.config, self.world.size, self.micro_batch, length, in_pairs=self.mixup is not None)

    def augmented(self, batch: Batch, part: Part, mix: MixedBatch | None) -> torch.Tensor:
        """Return a part of the batch as model input, B x C x H x W."""
        images_BHWC, draws_BN = take(batch.images_BHWC, part), take(batch.draws, part)
        images_BCHW = self.augment(images_BHWC, draws_BN, memory_format=self.memory_format).to(self.world.dtype)
        return images_BCHW if mix is None else mix.take(part)(images_BCHW)

    def optimizer_step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Clip the gradient, and take the optimizer's step if it is finite.

        Returns:
            True if the gradient is finite, a boolean scalar, and the norm of the gradient before clipping; both on the device and
            equal on all ranks.
        """
        scaler = self.world.mixed_precision.scaler
        self.world.mixed_precision.unscale_gradients(self.optimizer)
        norm = clip_gradients(self.parameters, norm=self.config.clip_norm, value=self.config.clip_value)
        is_finite = norm.isfinite()
        if scaler is not None:
            # With fp16 an overflowing gradient is expected: the scaler skips the step and lowers its scale.
            self.optimizer.step()
            return torch.ones_like(is_finite), norm
        step_if_finite(self.optimizer.optimizer, is_finite)
        return is_finite, norm

    @staticmethod
    def _count(
        numerator: torch.Tensor, logits_BK: torch.Tensor, targets: LossTargets, sample_weights_B: torch.Tensor
    ) -> torch.Tensor:
        present_B = sample_weights_B > 0
        correct = ((logits_BK.detach().argmax(1) == targets.majority_B) & present_B).sum()
        weight = targets.total_weights_B.sum(dtype=torch.float64)
        return torch.stack([numerator.detach().double(), weight, correct.double(), present_B.sum().double()])

    def _seed_model(self, step: int, part: int) -> None:
        """Seed torch's generators, from which dropout and drop path draw, so that a resumed run draws the same numbers."""
        seed = int(hash64(self.seed, step, part, self.world.rank, Stream.MODEL)) >> 1
        # torch.manual_seed takes a millisecond, since it seeds every possible kind of device.
        torch.default_generator.manual_seed(seed)
        if self.world.device.type == "cuda":
            torch.cuda.manual_seed(seed)


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], *, norm: float, value: float) -> torch.Tensor:
    """Clip the gradients in place: all together by their global norm, or each element to a range.

    The host does not wait for the device; a gradient that is not finite stays so. For sharded gradients (DTensors) all ranks take
    part, and send one message, where torch's functions send one for each parameter. With fp16 the gradients must be unscaled.

    Args:
        parameters: the trained parameters; those without a gradient are skipped.
        norm: largest Euclidean norm of all gradients together (0: no limit).
        value: largest magnitude of an element (0: no limit).

    Returns:
        The norm before clipping, a scalar on the gradients' device, in their float type and equal on all ranks; nan or inf if a
        gradient is not finite.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    parts = [own_part(gradient) for gradient in gradients]
    total = torch.nn.utils.get_total_norm(parts)
    if gradients and isinstance(first := gradients[0], DTensor):
        assert all(isinstance(placement, Shard) for placement in first.placements)
        total = total.square()
        dist.all_reduce(total, group=first.device_mesh.get_group())
        total = total.sqrt()
    if norm > 0 and parts:
        torch._foreach_mul_(parts, (norm / (total + 1e-6)).clamp(max=1.0))
    if value > 0 and parts:
        torch._foreach_clamp_min_(parts, -value)
        torch._foreach_clamp_max_(parts, value)
    return total


# Micro-batches: the parts of a rank's batch that go through the model one after the other.


def split_batch(config: TrainConfig, world_size: int, micro_batch: int, length: int, *, in_pairs: bool) -> Sequence[Part]:
    """Split a rank's batch into micro-batches.

    Args:
        config: the global batch size.
        world_size: number of processes.
        micro_batch: galaxies in one forward pass (0: the whole share).
        length: rows of the rank's batch.
        in_pairs: keep the pairs of mixup together.
    """
    if in_pairs:
        return split_pairs(length, count_pair_parts(config.batch_size, world_size, micro_batch))
    return split_evenly(length, count_micro_batches(config.batch_size, world_size, micro_batch))


def example_images(
    world: World, recipe: Recipe, augment: Augment, micro_batch: int, memory_format: torch.memory_format
) -> torch.Tensor:
    """Return two black images as model input, for passes whose results are thrown away.

    For a compiled model there are as many as in this rank's first pass of a step, since torch compiles for the first shape it
    gets.
    """
    config, size = recipe.train, recipe.data.image_size
    share = len(range(world.rank, config.batch_size, world.size))
    first = split_batch(config, world.size, micro_batch, share, in_pairs=is_mixing(config))[0]
    count = len(take(torch.arange(share), first))
    pixels_BHWC = torch.zeros(count if config.compile else min(2, count), size, size, 3, dtype=torch.uint8, device=world.device)
    draws_BN = torch.from_numpy(augment.draw(0, np.arange(len(pixels_BHWC)), size)).to(world.device)
    return augment(pixels_BHWC, draws_BN, memory_format=memory_format).to(world.dtype)
