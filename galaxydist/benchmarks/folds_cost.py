"""What a training step of each model costs on this machine, measured with the models in turn."""

import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from timm.utils import ModelEmaV3
from torch import nn

from galaxydist.cpus import available_cores
from galaxydist.loading.dataset import TrainingData, build_augment
from galaxydist.loading.loader import TrainReader
from galaxydist.models.build import build_model
from galaxydist.models.param_groups import parameter_groups
from galaxydist.recipe.schema import Recipe
from galaxydist.shards.manifest import Manifest
from galaxydist.training.optimizer import build_optimizer

# The first steps of a model are not counted: they ask for memory, and decode ahead.
WARM_UP = 2


@dataclass(frozen=True)
class Cost:
    """Of one model.

    Args:
        seconds: of a step, median. On a CPU the processor's, over all threads: other work on the machine does not count.
        num_parameters: of the model.
    """

    seconds: float
    num_parameters: int


def measure_costs(recipes: Mapping[str, Recipe], manifest: Manifest, *, rounds: int = 8, steps: int = 2) -> dict[str, Cost]:
    """Train each recipe for ``rounds`` times ``steps`` steps, in turn, so that a machine that slows down slows all of them.

    A step is what training does: decode, augment, forward, backward, clip, optimizer, moving average.

    Raises:
        UserError: a recipe whose model cannot be built.
    """
    torch.set_num_threads(available_cores())
    with ExitStack() as stack:
        trials = {name: _Trial(recipe, manifest, stack) for name, recipe in recipes.items()}
        for number in range(rounds + 1):
            for trial in trials.values():
                for _ in range(steps if number else WARM_UP):
                    trial.step(counted=number > 0)
    return {name: Cost(statistics.median(trial.seconds), trial.num_parameters) for name, trial in trials.items()}


class _Trial:
    """One model under training, from random weights."""

    def __init__(self, recipe: Recipe, manifest: Manifest, stack: ExitStack) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.recipe = recipe
        data, train = recipe.data, recipe.train
        torch.manual_seed(recipe.seed)
        self.model = build_model(recipe.model, manifest.num_classes, data.image_size).to(self.device)
        groups = [dict(group) for group in parameter_groups(self.model, recipe.optim.weight_decay)]
        self.optimizer = build_optimizer(groups, recipe.optim, self.device)
        self.ema = ModelEmaV3(self.model, decay=train.ema) if train.ema > 0 else None
        self.augment = build_augment(recipe, TrainingData.of(manifest, recipe), threads=available_cores())
        reader = TrainReader(
            manifest,
            seed=recipe.seed,
            batch_size=train.batch_size,
            num_streams=data.num_streams,
            image_size=data.image_size,
            crop=data.crop,
            max_zoom=data.augment.zoom,
            balance=data.balance,
        )
        self.batches = iter(stack.enter_context(reader))
        self.seconds: list[float] = []

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def step(self, *, counted: bool) -> None:
        start = self._clock()
        batch = next(self.batches)
        images_BCHW = self.augment(batch.images_BHWC.to(self.device), batch.epoch, batch.positions_B)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits_BK = self.model(images_BCHW)
        smoothing = self.recipe.train.label_smoothing
        labels_B = batch.labels_B.to(self.device)
        loss = nn.functional.cross_entropy(logits_BK.float(), labels_B, label_smoothing=smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        if self.recipe.train.clip_norm > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.train.clip_norm)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.model)
        if counted:
            self.seconds.append(self._clock() - start)

    def _clock(self) -> float:
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()
