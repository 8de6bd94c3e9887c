"""A whole training step with fused kernels never makes the host wait for the device; other optimizers make it wait once.

The audit covers what the host does in a step: augmentation, mixup, forward and backward pass, clipping, the update, batch-norm
statistics and the moving average. On the meta device it sees copies from the host and values that the host reads, on a GPU all
that torch's synchronisation warnings see. Neither covers the loader, the exchange between ranks and what compiled code does.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from galaxydist.distributed import World
from galaxydist.evaluation.inference import ForwardPass
from galaxydist.loading.augment import Augment
from galaxydist.loading.device_prefetch import DevicePrefetcher
from galaxydist.loading.loader import Batch
from galaxydist.mixed_precision import MixedPrecision
from galaxydist.models.build import build_model
from galaxydist.recipe.resolve import load_recipe
from galaxydist.recipe.rules import is_mixing
from galaxydist.recipe.schema import OptimConfig
from galaxydist.training.loss import WeightedCrossEntropy
from galaxydist.training.mixup import Mixup
from galaxydist.training.optimizer import LRSchedule, build_optimizer, step_if_finite
from galaxydist.training.step import TrainStep
from galaxydist.training.step_sync import RankFlags, StepSync
from galaxydist.training.stop_signals import StepGates, StopSignal
from galaxydist.training.strategy import DDPStrategy
from galaxydist.training.throughput import StepTimer
from tests.helpers.antialias import PLAIN

META = torch.device("meta")
WIDTH, SIZE, ROWS = 56, 16, 8  # at this pitch some images are halved and others are not
WARP = ("data.augment.zoom=1.3", "data.augment.shift=0.1", "data.augment.noise=0.02", "train.mixup=0.4", "train.cutmix=1.0")
TURN = (
    "data.augment.rotate=d4",
    "data.augment.zoom=1",
    "data.augment.shift=0",
    "data.augment.brightness=0.1",
)
# Operations whose result, or the size of it, the host has to know.
WAITS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "bincount")


class HostWaits(TorchDispatchMode):
    """Notes each operation for which the host would wait if the meta device were a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        masks = [value for value in given if value.device == META and value.dtype == torch.bool]
        is_there = any(value.device == META for value in given)
        if (name in WAITS and is_there) or (name in ("index", "index_put", "index_put_") and masks):
            self.found.append(name)
        result = func(*args, **(kwargs or {}))
        there = any(value.device == META for value in (*given, *tree_leaves(result)) if isinstance(value, Tensor))
        # A kernel takes a number of the host as an argument; anything else of the host is copied first, from pageable memory.
        if there and any(value.device != META and (value.dim() or "copy" in name) for value in given):
            self.found.append(name)
        return result


class HostData(TorchFunctionMode):
    """Notes tensors that are made on the meta device from data of the host, which torch does not even copy."""

    def __init__(self, found: list[str]) -> None:
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor) and result.device == META:
            self._found.append(func.__name__)
        return result


def waits_of(work: Callable[[], object]) -> list[str]:
    with HostWaits() as waits, HostData(waits.found):
        work()
    return waits.found


class OnMeta(MixedPrecision):
    """Full precision without Accelerate, which does not know the meta device."""

    def __init__(self) -> None:
        self.precision, self.device, self.scaler = "no", META, None

    def autocast(self) -> AbstractContextManager[None]:
        return nullcontext()

    def prepare(self, optimizer: torch.optim.Optimizer) -> Any:
        wrapped: Any = optimizer
        wrapped.optimizer = optimizer
        return wrapped

    def backward(self, loss: Tensor) -> None:
        torch.autograd.backward(loss)


def make_step(device: torch.device, settings: tuple[str, ...]) -> TrainStep:
    """The step of a recipe with all that it can do."""
    common = ("train.ema=0.9", "train.clip_norm=1", f"train.batch_size={ROWS}", f"data.image_size={SIZE}", "model.width=4")
    recipe = load_recipe(["recipe=custom_cnn", "optim.fused=on", *common, *settings]).recipe
    mixed_precision = OnMeta() if device == META else MixedPrecision("bf16", device, {})
    world = World(mixed_precision, 0, 1, ranks_on_node=1, cores=1, threads=1, job_id=None, restart_count=0)
    model = build_model(recipe.model, 10, SIZE).to(device)
    optimizer = mixed_precision.prepare(build_optimizer([{"params": list(model.parameters())}], recipe.optim, device))
    gates = StepGates(1, StopSignal())
    gates.is_open = True
    return TrainStep(
        world,
        DDPStrategy(world, model, recipe.train),
        optimizer,
        loss=WeightedCrossEntropy(torch.ones(10, device=device), 0.1),
        augment=Augment(recipe.data.augment, 0, *PLAIN, SIZE, crop=0.9),
        mixup=Mixup(recipe.train, 0, SIZE) if is_mixing(recipe.train) else None,
        schedule=LRSchedule(recipe.optim, 100),
        config=recipe.train,
        micro_batch=3,
        seed=0,
        memory_format=torch.channels_last,
        timer=StepTimer(device, batch_size=ROWS, world_size=1),
        gates=gates,
    )


def batches_of(step: TrainStep, device: torch.device) -> Iterator[Batch]:
    """Batches as a loader makes them, on the device."""

    def on_host() -> Iterator[Batch]:
        for number in range(100):
            images_BHWC = torch.full((ROWS, WIDTH, WIDTH, 3), number, dtype=torch.uint8, pin_memory=device.type == "cuda")
            positions = number * ROWS + np.arange(ROWS)
            rows_B, draws_BN = torch.from_numpy(positions), torch.from_numpy(step.draw(0, positions, WIDTH))
            yield Batch(images_BHWC, rows_B % 10, torch.ones(ROWS), rows_B, rows_B, 0, number, draws_BN=draws_BN)

    return DevicePrefetcher(on_host(), device)


@pytest.mark.parametrize("settings", [WARP, TURN], ids=["warp", "turn"])
def test_training_step_copies_nothing_from_the_host_and_asks_for_no_value(
    settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device, which has no values to wait for; fused kernels know its tensors, but torch does not offer them."""
    monkeypatch.setattr(sys.modules["torch.optim.optimizer"], "_get_fused_kernels_supported_devices", lambda: ["meta"])
    step = make_step(META, settings)
    batches = batches_of(step, META)
    step(next(batches), 0)  # constants are copied in the first step
    batch = next(batches)
    sums: list[Tensor] = []
    assert waits_of(lambda: sums.append(step(batch, 1))) == []
    assert (sums[0].shape, sums[0].device) == ((7,), META)


@pytest.mark.parametrize("name", ["lamb", "lion", "muon", "adan"])
def test_updates_without_fused_kernels_wait_for_nothing_but_the_gradient_being_finite(name: str) -> None:
    """Their updates have no mask on the device, and most count steps on the host: it has to know whether a step is taken."""
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)).to(META)
    optimizer = build_optimizer([{"params": list(model.parameters())}], OptimConfig(name=name), META)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    assert waits_of(optimizer.step) == []
    with pytest.raises(RuntimeError, match="meta"):
        step_if_finite(optimizer, torch.ones((), dtype=torch.bool, device=META))


def test_evaluation_pass_copies_nothing_from_the_host() -> None:
    step = make_step(META, TURN)
    forward = ForwardPass(
        step.strategy.model.eval(), step.augment.normalise, torch.float32, nullcontext, torch.channels_last, tta="d4"
    )
    images_BHWC = torch.empty(ROWS, WIDTH, WIDTH, 3, dtype=torch.uint8, device=META)
    with torch.inference_mode():
        forward(images_BHWC)
        assert waits_of(lambda: forward(images_BHWC)) == []


@pytest.mark.parametrize(
    "work",
    [
        lambda x: torch.tensor([1.0, 2.0], device=x.device),
        lambda x: torch.tensor(1.0, device=x.device),
        lambda x: torch.from_numpy(np.ones(3)).to(x.device),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: x[torch.tensor([0, 2])],
        lambda x: x[x > 0],
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x + 1),
    ],
)
def test_audit_finds_copies_and_waits(work: Callable[[Tensor], object]) -> None:
    x = torch.ones(3, device=META)
    waits = HostWaits()
    with waits, HostData(waits.found):
        try:
            work(x)
        except (RuntimeError, NotImplementedError):  # the meta device has no values
            waits.found.append("no value")
    assert waits.found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("settings", [WARP, TURN], ids=["warp", "turn"])
def test_training_steps_on_a_gpu_never_synchronise(settings: tuple[str, ...], tmp_path: Path) -> None:
    """With the feed, DistributedDataParallel in a world of one, and the shared values of each step."""
    device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group("nccl", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1, device_id=device)
    try:
        step = make_step(device, settings)
        step.strategy._wrapped = nn.parallel.DistributedDataParallel(  # type: ignore[attr-defined]
            step.strategy.model, broadcast_buffers=False, gradient_as_bucket_view=True
        )
        batches, sync = batches_of(step, device), StepSync(1, device)
        losses = []
        for number in range(12):
            if number == 4:  # until then memory is pinned, constants are copied and buckets rebuilt
                torch.cuda.set_sync_debug_mode("error")
            sync.post(number, step(next(batches), number), RankFlags())
            if number:
                losses.append(sync.read().sums.loss)
        assert np.isfinite(losses).all() and len(losses) == 11
    finally:
        torch.cuda.set_sync_debug_mode("default")
        dist.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
