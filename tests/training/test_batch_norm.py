"""Synchronised batch normalisation: several processes with unequal shares give what one process gives of all images together."""

import copy
import datetime
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from galaxydist.errors import EveryRankError
from galaxydist.models.build import build_model, freeze_backbone, set_train_mode
from galaxydist.models.performance import checkpoint_activations
from galaxydist.recipe.schema import ModelConfig
from galaxydist.training.batch_norm import BatchNormBackup, SynchronisedNorm, synchronise_batch_norm
from tests.helpers.forked_runs import run_forked

# Images of each process, by how many there are.
SHARES = {2: [3, 5], 3: [4, 1, 2]}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.BatchNorm2d(6),
    "slow": lambda: nn.BatchNorm2d(6, momentum=0.01, eps=1e-3),
    "cumulative": lambda: nn.BatchNorm2d(6, momentum=None),
    "bare": lambda: nn.BatchNorm2d(6, affine=False),
    "untracked": lambda: nn.BatchNorm2d(6, track_running_stats=False),
    "activated": lambda: BatchNormAct2d(6, inplace=False),
}
MODELS = {"custom_cnn": {"width": 8}, "resnet18": {}}


def images_of(step: int, num: int, shape: tuple[int, ...] = (6, 5, 4)) -> Tensor:
    """Far from zero, where a variance as the difference of two squares would lose its digits."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(num, *shape, dtype=torch.float64, generator=generator) * 3 + 1e4


def try_layer(layer: nn.Module, mine: slice, num: int) -> dict[str, Tensor]:
    """Three steps; outputs, gradients and statistics of ``mine`` out of ``num`` images."""
    torch.manual_seed(1)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    found: dict[str, Tensor] = {}
    for step in range(3):
        x = images_of(step, num)[mine].requires_grad_()
        y = layer(x)
        (y * images_of(step + 10, num)[mine].sin()).sum().backward()
        assert x.grad is not None
        found |= {f"y{step}": y.detach(), f"dx{step}": x.grad}
    found |= {f"d {name}": parameter.grad for name, parameter in layer.named_parameters() if parameter.grad is not None}
    found |= {f"state {name}": value.clone() for name, value in layer.named_buffers()}
    layer.eval()
    found["eval"] = layer(images_of(99, num)[mine])
    return found


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(ModelConfig.model_validate({"name": name, **MODELS[name]}), 4, 32).double()
    for module in model.modules():  # the branches' zeros would hide their gradients
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def try_model(model: nn.Module, mine: slice, num: int, world_size: int) -> dict[str, Tensor]:
    """Two steps with the loss scaled as the trainer does; gradients of the second, weights and statistics."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    for step in range(2):
        images = torch.randn(num, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(step))[mine]
        labels = torch.arange(num)[mine] % 4
        optimizer.zero_grad()
        (nn.functional.cross_entropy(model(images), labels, reduction="sum") * world_size / num).backward()
        optimizer.step()
    found = {name: value.clone() for name, value in bare.state_dict().items()}
    return found | {f"d {name}": p.grad for name, p in bare.named_parameters() if p.grad is not None}


def worker(world_size: int, folder: Path) -> None:
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world_size, timeout=limit)
    shares = SHARES[world_size]
    mine = slice(sum(shares[:rank]), sum(shares[: rank + 1]))
    found: dict[str, dict[str, Tensor]] = {}
    for name, make in LAYERS.items():
        layer = synchronise_batch_norm(nn.Sequential(nn.Identity(), make(), nn.Conv2d(6, 6, 1)).double())[1]
        assert isinstance(layer, SynchronisedNorm)
        found[name] = try_layer(layer, mine, sum(shares))
    for name in MODELS:
        for checkpointed in (False, True):
            model = synchronise_batch_norm(model_of(name))
            if checkpointed:
                checkpoint_activations(model)
            wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
            found[name + ("+" if checkpointed else "")] = try_model(wrapped, mine, sum(shares), world_size)
    found["autocast"] = try_autocast(mine, sum(shares))
    found["frozen"] = try_frozen(mine, sum(shares))
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def try_autocast(mine: slice, num: int) -> dict[str, Tensor]:
    """bfloat16 in, bfloat16 out, weights and statistics in float32, as the plain layer does it."""
    images = (images_of(0, num) - 1e4).float()[mine].bfloat16()
    plain = nn.BatchNorm2d(6)
    layer = synchronise_batch_norm(copy.deepcopy(plain))
    with torch.autocast("cpu", torch.bfloat16):
        expected, y = plain(images), layer(images.requires_grad_())
    assert y.dtype == expected.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert images.grad is not None and images.grad.dtype == torch.bfloat16
    return {"y": y.detach().float(), **{f"state {name}": value for name, value in layer.named_buffers()}}


def try_frozen(mine: slice, num: int) -> dict[str, Tensor]:
    model = model_of("custom_cnn")
    freeze_backbone(model, ("head",))
    before = {name: value.clone() for name, value in model.named_buffers()}
    model = synchronise_batch_norm(model)
    set_train_mode(model)
    try_model(model, mine, num, 1)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    return {}


@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.nightly), 3])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """What each of 2 or 3 processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    done = run_forked(worker, request.param, folder, size=request.param)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


Found = list[dict[str, dict[str, Tensor]]]


def assert_alike(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    scale = expected.abs().max().clamp(min=1.0).item()
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("name", LAYERS)
def test_synchronised_batch_norm_over_uneven_ranks_equals_one_layer_of_all_images(ranks: Found, name: str) -> None:
    num = sum(SHARES[len(ranks)])
    expected = try_layer(LAYERS[name]().double(), slice(0, num), num)
    if name == "untracked":  # which in evaluation takes each process's own images, as torch's does
        del expected["eval"], ranks[0][name]["eval"]
    assert expected.keys() == ranks[0][name].keys()
    for key, value in expected.items():
        if key.startswith("d "):
            assert_alike(sum((found[name][key] for found in ranks), torch.zeros(())), value)
        elif key.startswith("state"):
            for found in ranks:
                assert_alike(found[name][key].double(), value.double(), 1e-11)
        else:
            assert_alike(torch.cat([found[name][key] for found in ranks]), value, 1e-9)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("name", MODELS)
def test_models_with_synchronised_batch_norm_have_the_gradients_of_one_process(ranks: Found, name: str) -> None:
    num = sum(SHARES[len(ranks)])
    expected = try_model(model_of(name), slice(0, num), num, 1)
    for found in ranks:
        assert found[name].keys() == expected.keys()
        for key, value in expected.items():
            assert_alike(found[name][key].double(), value.double(), 1e-9)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("name", MODELS)
def test_synchronised_batch_norm_is_bit_equal_with_gradient_checkpointing(ranks: Found, name: str) -> None:
    for found in ranks:
        assert all(torch.equal(found[name][key], value) for key, value in found[f"{name}+"].items())


@pytest.mark.slow
@pytest.mark.multiprocess
def test_synchronised_batch_norm_of_bf16_images_computes_in_float32(ranks: Found) -> None:
    num = sum(SHARES[len(ranks)])
    images = (images_of(0, num) - 1e4).float().bfloat16().float()
    plain = nn.BatchNorm2d(6)
    expected = plain(images)
    torch.testing.assert_close(torch.cat([found["autocast"]["y"] for found in ranks]), expected, rtol=0.01, atol=0.01)
    for name, value in plain.named_buffers():
        assert_alike(ranks[0]["autocast"][f"state {name}"].double(), value.double(), 1e-6)


def test_synchronised_batch_norm_of_one_process_and_in_evaluation_is_the_plain_layer(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        plain = model_of("custom_cnn")
        names = list(plain.state_dict())
        synced = synchronise_batch_norm(copy.deepcopy(plain))
        assert list(synced.state_dict()) == names
        images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
        assert torch.equal(synced(images), plain(images))
        assert torch.equal(synced.eval()(images), plain.eval()(images))
        assert all(torch.equal(a, b) for a, b in zip(synced.state_dict().values(), plain.state_dict().values(), strict=True))
    finally:
        dist.destroy_process_group()


def test_backup_restores_the_statistics_of_a_step_that_is_not_finite_bit_for_bit() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.BatchNorm1d(2).double())
    backup = BatchNormBackup(model)
    images = torch.randn(4, 3, 2, 2)
    model[:3](images)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def is_as_before() -> bool:
        return all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())

    for where in (None, torch.tensor(True), torch.tensor(False)):
        backup.keep(is_needed=True)
        model[:3](images * math.nan)
        assert not is_as_before()
        backup.restore(where)
        assert is_as_before() == (where is None or bool(where))
    backup.keep(is_needed=False)
    backup.restore()
    assert not is_as_before()


def test_an_unknown_batch_normalisation_is_refused() -> None:
    class Odd(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    with pytest.raises(EveryRankError, match=r"train\.sync_batchnorm=true: the layer 0 is a Odd"):
        synchronise_batch_norm(nn.Sequential(Odd(3)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_synchronised_batch_norm_on_a_gpu_is_torchs_sync_batch_norm(tmp_path: Path) -> None:
    dist.init_process_group("nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        plain = model_of("resnet18").cuda()
        names = list(plain.state_dict())
        synced = copy.deepcopy(synchronise_batch_norm(copy.deepcopy(plain)))
        layers = [m for m in synced.modules() if isinstance(m, nn.SyncBatchNorm)]
        assert len(layers) == 20
        assert list(synced.state_dict()) == names
        images = torch.randn(4, 3, 32, 32, dtype=torch.float64, device="cuda")
        torch.testing.assert_close(synced(images), plain(images), rtol=1e-9, atol=1e-9)
    finally:
        dist.destroy_process_group()
