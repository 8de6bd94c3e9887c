"""The largest micro-batch that fits: few tries, agreed by all ranks, stored, and nothing changed by trying."""

import json
import math
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from galaxydist.distributed import World, init_distributed
from galaxydist.errors import EveryRankError, RunFailedError
from galaxydist.models.build import build_model
from galaxydist.models.performance import deterministic_algorithms
from galaxydist.recipe.model_names import NAMED_MODELS
from galaxydist.recipe.resolve import load_recipe
from galaxydist.recipe.schema import ModelConfig, Recipe
from galaxydist.training.micro_batch import (
    check_deterministic,
    choose_micro_batch,
    conditions,
    count_micro_batches,
    explain_out_of_memory,
    find_micro_batch,
    is_out_of_memory,
    largest_that_fits,
    most_on_cpu,
    reusable_micro_batch,
    suggest_savings,
)
from galaxydist.training.mixup import split_evenly
from tests.helpers.forked_runs import run_forked
from tests.helpers.scripts.limited_model import LimitedModel, raise_cpu, raise_cuda, raise_host
from tests.helpers.scripts.micro_batch_rank import find_micro_batches


@pytest.fixture
def world() -> Iterator[World]:
    from accelerate.state import AcceleratorState, PartialState

    world = init_distributed("no", {})
    yield world
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def build_recipe(*settings: str, image_size: int = 16) -> Recipe:
    return load_recipe(["recipe=custom_cnn", f"data.image_size={image_size}", *settings]).recipe


@given(upper=st.integers(1, 3000), limit=st.integers(0, 3500))
def test_largest_that_fits_gives_the_fewest_parts_in_logarithmic_tries(upper: int, limit: int) -> None:
    tried: list[int] = []

    def fits(count: int) -> bool:
        assert 1 <= count <= upper
        tried.append(count)
        return count <= limit

    found = largest_that_fits(upper, fits)
    if limit == 0:
        assert found == 0
    else:
        num_parts = count_micro_batches(upper, 1, found)
        assert num_parts == math.ceil(upper / min(limit, upper))
        sizes = [part.stop - part.start for part in split_evenly(upper, num_parts)]
        assert max(sizes) == found <= limit
    assert len(set(tried)) == len(tried) <= 1 + 2 * math.log2(upper)


@pytest.mark.parametrize(
    ("upper", "limit", "tried"),
    [
        (192, 500, [192]),
        (192, 100, [192, 96]),  # nothing between makes it one part
        (192, 64, [192, 96, 48, 72, 60]),  # 64 is three parts; so is 72, while 60 is four
        (5, 0, [5, 2, 1]),
    ],
)
def test_largest_that_fits_tries_only_the_necessary_sizes(upper: int, limit: int, tried: Sequence[int]) -> None:
    found: list[int] = []

    def fits(count: int) -> bool:
        found.append(count)
        return count <= limit

    largest_that_fits(upper, fits)
    assert found[: len(tried)] == list(tried)


def snapshot(model: nn.Module) -> list[Any]:
    states = [tensor.detach().clone() for tensor in [*model.parameters(), *model.buffers()]]
    gradients = [parameter.grad for parameter in model.parameters()]
    return [[tensor.numpy().tobytes() for tensor in states], gradients, [module.training for module in model.modules()]]


@pytest.mark.parametrize("run_out", [raise_cuda, raise_cpu, raise_host])
@pytest.mark.parametrize("in_backward", [False, True])
def test_find_micro_batch_finds_the_limit_and_restores_model_and_random_state(
    world: World, run_out: Callable[[], None], in_backward: bool
) -> None:
    model = LimitedModel(10, run_out, in_backward=in_backward)
    model.norm.eval()
    model.head.weight.grad = torch.ones(3, 4)
    before, random_before = snapshot(model), torch.get_rng_state()
    assert find_micro_batch(world, build_recipe("train.batch_size=24"), model, force=True) == 8  # three of 8, not two of 12
    assert model.sizes == [24, 12, 6, 9]
    after = snapshot(model)
    assert after[0] == before[0] and after[2] == before[2]
    assert all(new is old for new, old in zip(after[1], before[1], strict=True))
    assert torch.equal(torch.get_rng_state(), random_before)


def test_find_micro_batch_runs_real_steps_and_restores_batch_norm_statistics(world: World) -> None:
    """Batch-norm statistics move and random numbers are drawn while it tries: what is put back was really changed."""
    model, seen = LimitedModel(100), []
    model.norm.register_forward_hook(lambda module, *_: seen.append(int(module.num_batches_tracked)))
    model.dropout.register_forward_hook(lambda *_: seen.append(hash(torch.get_rng_state().numpy().tobytes())))
    random_before = hash(torch.get_rng_state().numpy().tobytes())
    find_micro_batch(world, build_recipe("train.batch_size=4"), model, force=True)
    assert seen[0] == 1 and seen[1] != random_before
    assert int(model.norm.num_batches_tracked) == 0


def test_find_micro_batch_reraises_other_errors_and_restores_the_model(world: World) -> None:
    def fail() -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    model = LimitedModel(1, fail)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        find_micro_batch(world, build_recipe("train.batch_size=4"), model, force=True)
    assert snapshot(model) == before


def test_find_micro_batch_allocates_the_ballast_while_trying(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    allocate, model = torch.empty, LimitedModel(2)
    ballasts: list[weakref.ref[torch.Tensor]] = []
    held: list[list[bool]] = []

    def empty(*size: Any, **options: Any) -> torch.Tensor:
        tensor = allocate(*size, **options)
        if tensor.nbytes == 12_345:
            ballasts.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(torch, "empty", empty)
    model.head.register_full_backward_hook(lambda *_: held.append([ballast() is not None for ballast in ballasts]))
    assert find_micro_batch(world, build_recipe("train.batch_size=4"), model, ballast_bytes=12_345, force=True) == 2
    assert held == [[False, True]]  # of the passes of 4 and of 2 images: one at a time, and for the whole pass
    assert [ballast() for ballast in ballasts] == [None, None]
    monkeypatch.undo()
    with pytest.raises(EveryRankError, match="not even a micro-batch of 1"):
        find_micro_batch(world, build_recipe("train.batch_size=4"), LimitedModel(100), ballast_bytes=1 << 50, force=True)


def test_find_micro_batch_with_pairs_tries_only_even_sizes(world: World) -> None:
    model = LimitedModel(7)
    assert find_micro_batch(world, build_recipe("train.batch_size=24"), model, unit=2, force=True) == 6
    assert all(size % 2 == 0 for size in model.sizes)


def test_cpu_micro_batch_limit_has_golden_values_for_2_gb_to_256_gb_of_memory() -> None:
    """Pinned: another number would change how runs are cut that are started again."""
    resnet18 = build_model(ModelConfig(name="resnet18"), 10, 256)
    assert [most_on_cpu(resnet18, 256, memory) for memory in (2**31, 3 * 2**30, 2**38)] == [11, 11, 70]
    small = build_model(ModelConfig(name="custom_cnn", width=4), 10, 64)
    assert most_on_cpu(small, 64, 2**34) > 1000 > most_on_cpu(small, 1024, 2**34)


def test_cpu_micro_batch_is_cut_evenly_and_keeps_pairs(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = build_recipe("train.batch_size=24")
    assert find_micro_batch(world, recipe, LimitedModel(5)) == 24
    monkeypatch.setattr("galaxydist.training.micro_batch.most_on_cpu", lambda *_: 7)
    assert find_micro_batch(world, recipe, LimitedModel(5)) == 6
    assert find_micro_batch(world, recipe, LimitedModel(5), unit=2) == 6
    monkeypatch.setattr("galaxydist.training.micro_batch.most_on_cpu", lambda *_: 1)
    assert find_micro_batch(world, recipe, LimitedModel(5), unit=2) == 2


def test_model_that_fits_no_image_is_refused_naming_settings_to_lower(world: World) -> None:
    recipe = build_recipe("train.batch_size=24", "model.width=32", image_size=64)
    with pytest.raises(EveryRankError) as raised:
        find_micro_batch(world, recipe, LimitedModel(0), force=True)
    text = str(raised.value)
    for part in ("micro-batch of 1", "data.image_size=64", "train.batch_size=24", "rank 0"):
        assert part in text
    for part in ("train.gradient_checkpointing=true", "data.image_size=32", "model.width=16"):
        assert part in text


def test_out_of_memory_advice_omits_settings_already_at_their_lowest(world: World) -> None:
    recipe = build_recipe("train.gradient_checkpointing=true", "model.width=4")
    assert suggest_savings(recipe, world, []) == "Use a smaller model (model.name)."


def test_out_of_memory_in_a_step_is_explained_with_the_next_micro_batch(world: World) -> None:
    recipe = build_recipe("train.batch_size=24")
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB")
    text = explain_out_of_memory(error, recipe, world, 8)
    for part in ("micro-batch of 8", "data.image_size=16", "train.batch_size=24", "train.micro_batch=4", "(torch: CUDA out of"):
        assert part in text
    assert "train.micro_batch=12" in explain_out_of_memory(MemoryError(), recipe, world, 0)
    assert "train.micro_batch=" not in explain_out_of_memory(error, recipe, world, 1)


def test_is_out_of_memory_recognises_only_memory_errors() -> None:
    for run_out in (raise_cuda, raise_cpu, raise_host):
        with pytest.raises((RuntimeError, MemoryError)) as raised:
            run_out()
        assert is_out_of_memory(raised.value)
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    of_another = RunFailedError("rank 1 failed: OutOfMemoryError: CUDA out of memory")
    for error in (RuntimeError("CUDA error: an illegal memory access"), ValueError("out of memory"), KeyError(1), of_another):
        assert not is_out_of_memory(error)


def test_restart_reuses_the_stored_micro_batch_if_conditions_are_unchanged(world: World) -> None:
    recipe = build_recipe("train.batch_size=24")
    found, stored = choose_micro_batch(world, recipe, LimitedModel(5))
    assert found == 24
    stored = json.loads(json.dumps({**stored, "micro_batch": 6}))
    assert choose_micro_batch(world, recipe, LimitedModel(5), stored=stored) == (6, stored)
    now = conditions(world, recipe)
    assert reusable_micro_batch(stored, now) == 6
    assert reusable_micro_batch(None, now) is None and reusable_micro_batch({}, now) is None
    for changed in (build_recipe("train.batch_size=48"), build_recipe("train.batch_size=24", image_size=32)):
        assert reusable_micro_batch(stored, conditions(world, changed)) is None
    for key in now:
        assert reusable_micro_batch({**stored, key: "another"}, now) is None
    for damage in (0, "6", None, True):
        assert reusable_micro_batch({**stored, "micro_batch": damage}, now) is None
    assert reusable_micro_batch(now, now) is None


def test_micro_batch_of_the_recipe_is_used_without_trying(world: World) -> None:
    for number in (0, 5):
        assert choose_micro_batch(world, build_recipe(f"train.micro_batch={number}"), LimitedModel(1)) == (number, {})


@pytest.mark.multiprocess
def test_two_ranks_with_different_memory_choose_the_same_micro_batch(tmp_path: Path) -> None:
    done = run_forked(find_micro_batches, tmp_path, [(100, 100), (100, 7), (0, 100)], size=2)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert [answer["found"] for answer in first] == [answer["found"] for answer in second]
    assert [answer["found"] for answer in first[:2]] == [24, 6]
    assert first[1]["sizes"] == [24] and second[1]["sizes"][:3] == [24, 12, 6]
    for part in ("not even a micro-batch of 1", "on rank 0 ", "train.batch_size=47, 2 processes", "train.strategy=fsdp"):
        assert part in first[2]["found"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", NAMED_MODELS)
def test_models_without_deterministic_algorithms_on_a_gpu_are_refused(name: str, world: World) -> None:
    """The average pooling of the reference VGGs has none in its backward pass."""
    size = 200 if name == "reference_vit" else 224
    recipe = build_recipe(f"model.name={name}", "model.width=32", image_size=size)
    model = build_model(recipe.model, 10, size).to(world.device)
    is_refused = name.startswith("reference_vgg")
    expected = pytest.raises(EveryRankError, match=r"train\.deterministic=true") if is_refused else nullcontext()
    with deterministic_algorithms(True, os.environ), expected:
        check_deterministic(world, recipe, model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_find_micro_batch_on_a_nearly_full_gpu_reduces_the_batch_and_frees_memory(world: World) -> None:
    recipe = build_recipe("train.batch_size=512", image_size=256)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten()
    )
    model = model.to(world.device)
    free = torch.cuda.mem_get_info(world.device)[0]
    total = torch.cuda.get_device_properties(world.device).total_memory
    found = find_micro_batch(world, recipe, model, ballast_bytes=int(free - 0.05 * total) - (2 << 30))
    assert 1 <= found < 512
    assert torch.cuda.memory_reserved(world.device) < 1 << 28
