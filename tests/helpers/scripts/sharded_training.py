"""A small training in float64, plain or sharded, for the tests of ``train.strategy=fsdp``."""

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from galaxydist.checkpoints import store
from galaxydist.checkpoints.sharded import ShardedWriter, load_sharded, open_saving_group
from galaxydist.checkpoints.tensor_files import flatten_state, unflatten_state
from galaxydist.training.optimizer import MovingAverage
from galaxydist.training.state import named_optimizer_state, numbered_optimizer_state
from galaxydist.training.step import clip_gradients
from galaxydist.training.strategy import (
    WholeCopy,
    gather,
    open_mesh,
    set_gradient_sync,
    shard_maker,
    shard_model,
)

STEPS, SAVED_AT, BATCH = 5, 3, 13  # 13 galaxies are uneven between two and three processes
EMA_DECAY, CLIP_NORM = 0.6, 1.5


def build_vit() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    vit: nn.Module = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=3)
    return vit.double()


def build_optimizer(model: nn.Module, name: str = "adamw") -> torch.optim.Optimizer:
    named = list(model.named_parameters())
    groups = [
        {"params": [p for _, p in named if p.requires_grad and p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for _, p in named if p.requires_grad and p.ndim <= 1], "weight_decay": 0.0},
    ]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))


def draw_batch(step: int, size: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels and weights of the global batch of a step."""
    random = torch.Generator().manual_seed(100 + step)
    images_BCHW = torch.randn(BATCH, 3, size, size, generator=random, dtype=torch.float64)
    labels_B = torch.randint(0, 3, (BATCH,), generator=random)
    return images_BCHW, labels_B, torch.rand(BATCH, generator=random, dtype=torch.float64)


def backward(model: nn.Module, step: int, rank: int, world_size: int, sync: Callable[[bool], None]) -> None:
    """As the training does it: two micro-batches, numerators times the world size over the weight of all ranks."""
    images_BCHW, labels_B, weights_B = draw_batch(step)
    total_weight = weights_B.sum()
    own = torch.arange(rank, BATCH, world_size)
    for number, part in enumerate((own[:2], own[2:])):
        sync(number == 1)
        losses_B = nn.functional.cross_entropy(model(images_BCHW[part]), labels_B[part], reduction="none")
        ((losses_B * weights_B[part]).sum() * (world_size / total_weight)).backward()  # type: ignore[no-untyped-call]


class Plain:
    """One process without any sharding: the numbers that all others must reach."""

    def __init__(self, optimizer: str = "adamw") -> None:
        from timm.utils import ModelEmaV3

        self.model = build_vit()
        self.optimizer = build_optimizer(self.model, optimizer)
        self.ema = ModelEmaV3(self.model, decay=EMA_DECAY, use_warmup=True)

    def train(self, first: int, stop: int) -> Iterator[int]:
        for step in range(first, stop):
            self.optimizer.zero_grad()
            backward(self.model, step, 0, 1, lambda _: None)
            nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
            self.optimizer.step()
            self.ema.update(self.model, step=step + 1)
            yield step + 1

    def states(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizer": named_optimizer_state(self.model, self.optimizer),
        }

    def load(self, states: dict[str, Any]) -> None:
        self.model.load_state_dict(states["model"])
        self.ema.module.load_state_dict(states["ema"])
        self.optimizer.load_state_dict(numbered_optimizer_state(self.model, self.optimizer, states["optimizer"]))


class Sharded:
    def __init__(self, optimizer: str = "adamw") -> None:
        self.mesh = open_mesh(torch.device("cpu"))
        self.model = build_vit()
        if dist.get_rank() > 0:  # rank 0's weights count
            nn.init.zeros_(self.model.get_parameter("head.weight"))
        self.whole = WholeCopy(self.model)
        shard_model(self.model, self.mesh)
        self.optimizer = build_optimizer(self.model, optimizer)
        self.ema = MovingAverage(self.model, EMA_DECAY)

    def train(self, first: int, stop: int) -> Iterator[int]:
        for step in range(first, stop):
            self.optimizer.zero_grad()
            backward(self.model, step, dist.get_rank(), dist.get_world_size(), lambda last: set_gradient_sync(self.model, last))
            assert all(isinstance(p.grad, DTensor) for p in self.model.parameters())
            clip_gradients(self.model.parameters(), norm=CLIP_NORM, value=0)
            self.optimizer.step()
            self.ema.update(step + 1)
            yield step + 1

    def states(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": named_optimizer_state(self.model, self.optimizer),
        }

    def load(self, states: dict[str, Any]) -> None:
        self.model.load_state_dict(states["model"])
        self.ema.load_state_dict(states["ema"])
        self.optimizer.load_state_dict(numbered_optimizer_state(self.model, self.optimizer, states["optimizer"]))

    def check_parts(self) -> None:
        """Everything large is held in parts."""
        for name, parameter in self.model.named_parameters():
            assert isinstance(parameter, DTensor), name
            state = self.optimizer.state[parameter]
            tensors = [value for value in state.values() if isinstance(value, Tensor) and value.shape == parameter.shape]
            tensors += [self.ema.state_dict()[name]]
            assert all(isinstance(t, DTensor) and t.to_local().shape == parameter.to_local().shape for t in tensors), name
        held = sum(p.to_local().numel() for p in self.model.parameters() if isinstance(p, DTensor))
        assert held <= 1.2 * sum(p.numel() for p in self.model.parameters()) / dist.get_world_size() + 500


def flatten(states: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    described: dict[str, Any] = {}
    for name, state in states.items():
        found, described[name] = flatten_state(name, state)
        tensors |= found
    return tensors, described


def unflatten(checkpoint: store.Checkpoint) -> dict[str, Any]:
    return {name: unflatten_state(described, checkpoint.tensors) for name, described in checkpoint.state.items()}


def write_final(trained: Sharded, path: Path) -> None:
    """Weights and averages, whole, from rank 0; before that an evaluation in which ranks run different numbers of batches."""
    for state in (trained.model.state_dict(), trained.ema.state_dict()):
        with trained.whole.filled(state) as model:
            assert not model.training and not any(isinstance(p, DTensor) for p in model.parameters())
            for step in range(dist.get_rank() + 1):
                logits_BK = model(draw_batch(step)[0])
        assert logits_BK.isfinite().all()
        assert all(parameter.is_meta for parameter in trained.whole._model.parameters())
    whole = {f"model/{name}": tensor for name, tensor in gather(trained.model.state_dict()).items()}
    whole |= {f"ema/{name}": tensor for name, tensor in gather(trained.ema.state_dict()).items()}
    if dist.get_rank() == 0:
        save_file({name: tensor.contiguous() for name, tensor in whole.items()}, path)


def train(folder: Path, optimizer: str, saving: str) -> None:
    """From the start to the end, with a checkpoint on the way."""
    trained = Sharded(optimizer)
    group = open_saving_group()
    calls: list[int] = []
    saver = ShardedWriter(
        folder / f"{optimizer}-{dist.get_world_size()}",
        group=group,
        background=saving == "background",
        check=lambda: calls.append(1),
    )
    with saver:
        for step in trained.train(0, STEPS):
            if step == SAVED_AT:
                trained.check_parts()
                saver.save(step, *flatten(trained.states()), best=True)
    assert len(calls) == (2 if dist.get_rank() == 0 else 0)
    write_final(trained, folder / f"{optimizer}-{dist.get_world_size()}.safetensors")


def resume(folder: Path, optimizer: str, source: str) -> None:
    trained = Sharded(optimizer)
    checkpoint = load_sharded(folder / source, make=shard_maker(trained.model), group=open_saving_group())
    assert checkpoint is not None and checkpoint.step == SAVED_AT
    for name, tensor in checkpoint.tensors.items():
        assert isinstance(tensor, DTensor) == (tensor.ndim > 0), name
    trained.load(unflatten(checkpoint))
    for _ in trained.train(SAVED_AT, STEPS):
        pass
    trained.check_parts()
    write_final(trained, folder / f"{source}-on-{dist.get_world_size()}.safetensors")


# Model, and what is special.
COMPARED = {
    "small": (
        ("custom_cnn", ""),
        ("custom_cnn", "frozen"),
        ("custom_cnn", "half"),
        ("d4_cnn", ""),
        ("resnet18", "checkpointed, channels last"),
        ("vit", "frozen"),
    ),
    "large": (("vgg16", "frozen"), ("vgg16", "checkpointed")),
}


def compare_with_ddp(folder: Path, size: str) -> None:
    """Train networks with batch normalisation, frozen backbones, half precision, and activation checkpointing.

    Each process has batch statistics of its own.
    """
    from galaxydist.models.build import build_model
    from galaxydist.models.performance import checkpoint_activations
    from galaxydist.recipe.schema import ModelConfig

    mesh = open_mesh(torch.device("cpu"))
    largest: dict[str, float] = {}
    for name, special in COMPARED[size]:
        torch.manual_seed(1)
        half = special == "half"
        config = ModelConfig(name=name, width=16, freeze_backbone=special == "frozen")
        model = build_model(config, 3, 32).to(torch.float32 if half else torch.float64)
        if "checkpointed" in special:
            checkpoint_activations(model)
        ddp = nn.parallel.DistributedDataParallel(copy.deepcopy(model), broadcast_buffers=False)
        shard_model(model, mesh)
        train_batches(ddp, half)
        train_batches(model, half, torch.channels_last if "channels last" in special else torch.contiguous_format)
        whole = gather(model.state_dict())
        differences = [(whole[key] - value).abs().max().item() for key, value in ddp.module.state_dict().items()]
        largest[f"{name} {special}"] = max(differences)
    (folder / f"differences-{dist.get_rank()}.json").write_text(json.dumps(largest))


def train_batches(model: nn.Module, half: bool, memory_format: torch.memory_format = torch.contiguous_format) -> None:
    from galaxydist.models.build import set_train_mode

    own = slice(dist.get_rank(), None, dist.get_world_size())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(2):
        images_BCHW, labels_B, _ = draw_batch(step)
        images_BCHW = images_BCHW.to(next(model.parameters()).dtype, memory_format=memory_format)
        set_train_mode(model)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False):
            logits_BK = model(images_BCHW[own])
        nn.functional.cross_entropy(logits_BK, labels_B[own]).backward()
        optimizer.step()


TASKS: dict[str, Callable[..., None]] = {"train": train, "resume": resume, "compare": compare_with_ddp}


def run_tasks(world_size: int, folder: Path, tasks: Sequence[str]) -> None:
    """Tasks are written ``name:argument:argument``."""
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo")
    else:
        open_mesh(torch.device("cpu"))
    assert dist.get_world_size() == world_size
    for task in tasks:
        name, *arguments = task.split(":")
        TASKS[name](folder, *arguments)
    dist.destroy_process_group()


def read_final(path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(path)
    return found
