"""Clipping gives torch's own numbers, reports the norm from before, and keeps nan, inf and double precision."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from galaxydist.training.step import clip_gradients


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    made = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((4, 5), (7,), (2, 3, 3))]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
    return [*made, nn.Parameter(torch.zeros(3, dtype=dtype))]  # the last has no gradient


def gradients(given: list[nn.Parameter]) -> list[torch.Tensor]:
    return [parameter.grad for parameter in given if parameter.grad is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", [0.5, 100.0])
def test_clipping_by_norm_is_bit_equal_to_clip_grad_norm(dtype: torch.dtype, norm: float) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    found, expected = clip_gradients(iter(ours), norm=norm, value=0.0), nn.utils.clip_grad_norm_(theirs, norm)
    assert found.dtype == dtype and found.shape == () and torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(gradients(ours), gradients(theirs), strict=True))
    after = torch.cat([g.flatten() for g in gradients(ours)]).norm()
    assert after.item() == pytest.approx(min(norm, expected.item()), rel=1e-5)


def test_clipping_by_value_bounds_each_element_and_returns_the_norm_before() -> None:
    given = parameters(torch.float64)
    before = [g.clone() for g in gradients(given)]
    found = clip_gradients(given, norm=0.0, value=0.3)
    assert found.item() == pytest.approx(math.sqrt(sum(g.square().sum().item() for g in before)), rel=1e-14)
    assert all(torch.equal(g, old.clamp(-0.3, 0.3)) for g, old in zip(gradients(given), before, strict=True))


def test_without_clipping_gradients_are_unchanged_and_the_norm_is_returned() -> None:
    given = parameters()
    before = [g.clone() for g in gradients(given)]
    assert clip_gradients(given, norm=0.0, value=0.0).item() > 1
    assert all(torch.equal(g, old) for g, old in zip(gradients(given), before, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("norm", "value"), [(0.0, 0.0), (1.0, 0.0), (0.0, 0.5)])
def test_clip_gradients_returns_a_nonfinite_norm_for_nan_or_inf_gradients(bad: float, norm: float, value: float) -> None:
    given = parameters()
    gradients(given)[1][2] = bad
    assert not clip_gradients(given, norm=norm, value=value).isfinite()


def test_clip_gradients_without_gradients_returns_0() -> None:
    assert clip_gradients([nn.Parameter(torch.zeros(3))], norm=1.0, value=0.0).item() == 0


def test_sharded_gradients_are_clipped_by_their_whole_norm(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        whole = parameters(torch.float64)[:3]
        sharded = [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in whole]
        for parameter, other in zip(sharded, whole, strict=True):
            assert other.grad is not None
            parameter.grad = distribute_tensor(other.grad, mesh, [Shard(0)])
        found = clip_gradients(sharded, norm=0.5, value=0.0)
        assert not isinstance(found, DTensor)
        torch.testing.assert_close(found, clip_gradients(whole, norm=0.5, value=0.0), rtol=1e-14, atol=0)
        for parameter, other in zip(sharded, whole, strict=True):
            assert isinstance(parameter.grad, DTensor)
            torch.testing.assert_close(parameter.grad.full_tensor(), other.grad, rtol=1e-14, atol=0)
    finally:
        dist.destroy_process_group()
