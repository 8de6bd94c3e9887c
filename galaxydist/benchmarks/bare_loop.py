"""Training as one would write it in plain PyTorch, to compare the trainer with."""

import copy

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_

from galaxydist.benchmarks.memory_session import MemoryBatches
from galaxydist.distributed import World
from galaxydist.models.build import build_model
from galaxydist.recipe.schema import Recipe
from galaxydist.training.optimizer import LearningRate
from galaxydist.training.trainer import Parts


class BareLoop:
    """The same start, batches, changes to the images and optimizer as a run of the trainer, and nothing around them.

    Args:
        world: the device and the precision.
        recipe: of the run.
        parts: of the run, before its first step.
        batches: of the run.
        num_classes: K.
    """

    def __init__(self, world: World, recipe: Recipe, parts: Parts, batches: MemoryBatches, num_classes: int) -> None:
        self.device, self.is_mixed = world.device, world.precision == "bf16"
        self.augment, self.batches = parts.augment, batches
        self.rate = LearningRate(recipe.optim, parts.schedule.total_steps)
        self.clip_norm, self.label_smoothing = recipe.train.clip_norm, recipe.train.label_smoothing
        theirs = parts.strategy.model
        self.model = build_model(recipe.model, num_classes, recipe.data.image_size).to(world.device, world.dtype)
        self.model.load_state_dict(theirs.state_dict())
        ours = {id(old): new for old, new in zip(theirs.parameters(), self.model.parameters(), strict=True)}
        self.optimizer: torch.optim.Optimizer = copy.deepcopy(parts.state.optimizer.optimizer, ours)
        self.losses: list[Tensor] = []

    def run(self, steps: range) -> None:
        """Take these steps; the loss of each is kept, on the device."""
        for step in steps:
            batch = self.batches.at(step)
            images_BCHW = self.augment(batch.images_BHWC.to(self.device, non_blocking=True), batch.epoch, batch.positions_B)
            labels_B = batch.labels_B.to(self.device, non_blocking=True)
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate.at(step)
            self.optimizer.zero_grad()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_mixed):
                loss = functional.cross_entropy(self.model(images_BCHW), labels_B, label_smoothing=self.label_smoothing)
            loss.backward()  # type: ignore[no-untyped-call]
            clip_grad_norm_(self.model.parameters(), self.clip_norm)
            self.optimizer.step()
            self.losses.append(loss.detach())
