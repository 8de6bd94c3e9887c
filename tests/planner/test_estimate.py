"""``galaxydist plan``: its numbers are those of the trainer's own functions, and it refuses what the trainer could not do."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from galaxydist.errors import UserError
from galaxydist.models import registry
from galaxydist.models.build import build_model
from galaxydist.models.registry import MODEL_NAMES
from galaxydist.planner.estimate import (
    BYTES_PER_GALAXY,
    ClusterShape,
    RunPlan,
    find_dataset_size,
    plan_memory,
    plan_run,
    plan_shard_traffic,
    plan_steps,
)
from galaxydist.planner.limits import check_memory
from galaxydist.planner.memory import ModelMemory, Timeline, estimate, model_memory, trace_step
from galaxydist.planner.table import render_plan, show_size, show_time
from galaxydist.recipe.resolve import load_recipe
from galaxydist.recipe.schema import Recipe
from galaxydist.shards.manifest import read_manifest
from galaxydist.shards.order import EpochOrder, evaluation_batches, rank_offsets
from galaxydist.shards.shard_usage import usage_of_rank
from galaxydist.shards.writer.writer import write_shards
from galaxydist.surveys.official_split import read_official_split
from galaxydist.training.micro_batch import count_micro_batches
from galaxydist.training.mixup import split_evenly
from tests.helpers.blobs import BlobSurvey
from tests.helpers.memory import peak_memory
from tests.helpers.model_names import marked

SMALL = ("recipe=custom_cnn", "model.width=8", "data.image_size=32")


def recipe_of(*overrides: str, of: tuple[str, ...] = SMALL) -> Recipe:
    given = {text.partition("=")[0] for text in overrides}
    return load_recipe([*(text for text in of if text.partition("=")[0] not in given), *overrides]).recipe


def plan_of(*overrides: str, root: Path = Path("nowhere"), job: ClusterShape | None = None, **given: Any) -> RunPlan:
    return plan_run(recipe_of(*overrides), root, job or ClusterShape(), **given)


@pytest.fixture(scope="module")
def facts() -> ModelMemory:
    return model_memory(recipe_of(), 10, 256)


@given(st.integers(1, 40), st.integers(0, 400), st.integers(1, 20), st.integers(0, 90), st.integers(1, 30))
def test_planned_steps_and_batches_equal_those_of_the_trainer(
    batch_size: int, more: int, gpus: int, num_val: int, eval_batch: int
) -> None:
    recipe = recipe_of(f"train.batch_size={batch_size}", f"eval.batch_size={eval_batch}", "train.epochs=3")
    job, num_train = ClusterShape(1, gpus, images_per_s=50.0), batch_size + more
    steps = plan_steps(recipe, num_train, num_val, job, 1)
    assert steps.per_epoch * batch_size + steps.dropped == num_train and 0 <= steps.dropped < batch_size
    assert steps.total == 3 * steps.per_epoch
    world = min(job.world_size, batch_size)
    if world == job.world_size:
        shares = [rank_offsets(batch_size, rank, world).size for rank in range(world)]
        assert (steps.rank_batch_least, steps.rank_batch_most) == (min(shares), max(shares))
        assert steps.epoch_s == pytest.approx(steps.per_epoch * max(shares) / 50)
    batches = [len(evaluation_batches(num_val, eval_batch, rank, job.world_size)) for rank in range(job.world_size)]
    assert (steps.validation_batches, steps.validation_batches_most) == (sum(batches), max(batches))


@pytest.mark.parametrize(("batch_size", "gpus", "micro_batch"), [(48, 1, 0), (48, 4, 5), (50, 4, 5), (7, 4, 1)])
def test_planned_micro_batches_equal_those_of_the_trainer(
    facts: ModelMemory, batch_size: int, gpus: int, micro_batch: int
) -> None:
    recipe = recipe_of(f"train.batch_size={batch_size}", f"train.micro_batch={micro_batch}")
    passes, memory = plan_memory(recipe, facts, ClusterShape(1, gpus))
    assert passes == count_micro_batches(batch_size, gpus, micro_batch)
    largest = max(part.stop - part.start for part in split_evenly(-(-batch_size // gpus), passes))
    assert memory.micro_batch == largest


def test_auto_micro_batch_uses_the_fewest_passes_that_fit_the_gpu_memory(facts: ModelMemory) -> None:
    recipe = recipe_of("train.batch_size=4096")
    totals = [estimate(facts, recipe, world_size=1, rank_batch=4096, num_parts=passes).total for passes in (1, 2, 3)]
    assert totals[0] > totals[1] > totals[2]
    assert plan_memory(recipe, facts, ClusterShape())[0] == 1
    for passes in (1, 2, 3):
        assert plan_memory(recipe, facts, ClusterShape(gpu_memory=totals[passes - 1] / 1e9))[0] == passes
    assert plan_memory(recipe, facts, ClusterShape(gpu_memory=totals[1] / 1e9 - 1e-6))[0] == 3


def test_planned_weights_gradients_and_optimizer_bytes_are_exact(facts: ModelMemory) -> None:
    recipe = recipe_of()
    model = build_model(recipe.model, 10, 32)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    assert (facts.num_trained, facts.num_frozen) == (num_parameters, 0)
    assert facts.weights == facts.moving_average == 4 * num_parameters + buffers
    assert facts.gradients == 4 * num_parameters
    assert facts.has_batch_norm and facts.image == 3 * 64**2  # decoded at a quarter of 256
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    state = [tensor for values in optimizer.state.values() for tensor in values.values()]
    assert facts.optimizer == sum(tensor.numel() * tensor.element_size() for tensor in state)
    sgd = model_memory(recipe_of("optim.name=sgd", "optim.momentum=0", "train.ema=0"), 10, 256)
    assert sgd.optimizer == 0 and sgd.moving_average == 0 and sgd.checkpoint == sgd.weights


def test_frozen_backbone_has_no_gradients_and_less_than_half_the_activations(tmp_path: Path) -> None:
    weights = tmp_path / "any.safetensors"  # a plan loads none
    whole = model_memory(recipe_of(), 10, 256)
    frozen = model_memory(recipe_of("model.freeze_backbone=true", f"model.weights={weights}"), 10, 256)
    assert frozen.num_trained == 64 * 10 + 10 and frozen.num_trained + frozen.num_frozen == whole.num_trained
    assert frozen.gradients == 4 * frozen.num_trained
    assert frozen.timeline.activations(64) < 0.5 * whole.timeline.activations(64)
    assert not frozen.has_batch_norm


def test_traced_timeline_of_a_small_mlp_matches_hand_counted_tensors() -> None:
    """A hand-made model whose tensors one can count: two layers without offset, float32, and a ReLU."""
    with torch.device("meta"):
        first, second = torch.nn.Linear(48, 1000, bias=False), torch.nn.Linear(1000, 10, bias=False)
    timeline = trace_step(torch.nn.Sequential(torch.nn.Flatten(), first, torch.nn.ReLU(), second), 4, "no")
    weights, image, hidden = 4 * (48_000 + 10_000), 4 * 48, 4 * 1000
    assert timeline.made[-1] == timeline.new.sum() == weights
    # With many images: the input, the first layer's output, the ReLU's, and its gradient, before anything of that is let go.
    many = 100_000
    assert timeline.activations(many) == pytest.approx(many * (image + 3 * hidden), rel=0.02)
    # With one image, the gradients of all weights at the end.
    assert timeline.peak(1, keeps_gradients=False) == pytest.approx(weights, rel=0.05)
    assert timeline.peak(1, keeps_gradients=True) > weights + 4 * 48_000


def activations(*overrides: str, image_size: int = 64) -> int:
    """Bytes that 32 images more add to a small ViT's step: all but what is the same for any number of them."""
    of = ("recipe=vit_scratch", f"data.image_size={image_size}", "optim.name=sgd")
    timeline = model_memory(recipe_of(*overrides, of=of), 10, 256).timeline
    return timeline.activations(64) - timeline.activations(32)


@pytest.mark.slow
def test_precision_attention_and_checkpointing_change_the_activations() -> None:
    half = activations("train.precision=bf16")
    full = activations("train.precision=no")
    assert activations() == half < 0.8 * full
    assert activations("train.precision=fp64") == pytest.approx(2 * full, rel=0.02)
    assert activations("train.gradient_checkpointing=true") < 0.5 * half
    # No matrix of tokens by tokens: four times the tokens need four times the memory, not sixteen.
    assert activations(image_size=128) == pytest.approx(4 * half, rel=0.1)


def test_fsdp_divides_weights_gradients_and_optimizer_state_by_the_world_size(facts: ModelMemory) -> None:
    ddp, fsdp = (
        estimate(facts, recipe_of(f"train.strategy={name}"), world_size=8, rank_batch=30, num_parts=1) for name in ("ddp", "fsdp")
    )
    for name in ("weights", "gradients", "optimizer", "moving_average"):
        assert getattr(fsdp, name) == -(-getattr(ddp, name) // 8), name
    assert ddp.gathered == 0 < fsdp.gathered
    alone = estimate(facts, recipe_of("train.strategy=fsdp"), world_size=1, rank_batch=30, num_parts=1)
    assert alone.weights == ddp.weights and alone.gathered == 0
    parts = ("weights", "gradients", "optimizer", "moving_average", "gathered", "images", "activations", "allowance")
    for memory in (ddp, fsdp):
        assert memory.total == sum(getattr(memory, part) for part in parts)


def test_plan_with_a_local_manifest_uses_its_exact_samples_bytes_and_shards(blobs: Path) -> None:
    manifest = read_manifest(blobs)
    plan = plan_of(f"data.manifest={blobs}", "train.batch_size=20", "data.num_streams=8", job=ClusterShape(2, 2))
    assert plan.steps.samples == manifest.splits["train"].num_samples == 72
    assert (plan.steps.per_epoch, plan.steps.dropped) == (3, 12)
    assert plan.reading.num_bytes == manifest.splits["train"].num_bytes
    assert plan.reading.num_shards == manifest.splits["train"].num_shards
    assert "estimated" not in plan.data and str(blobs) in plan.data
    order = EpochOrder(manifest.shards("train")["samples"], seed=0, epoch=0, num_streams=8)
    sizes = manifest.shards("train")["bytes"]
    nodes = [np.concatenate([rank_offsets(20, rank, 4) for rank in ranks]) for ranks in ((0, 1), (2, 3))]
    read = [np.unique(usage_of_rank(order, 20, offsets)["shard"]) for offsets in nodes]
    assert plan.reading.shards_per_node_most == max(shards.size for shards in read)
    assert plan.reading.bytes_per_node_most == max(sizes[shards].sum() for shards in read)
    assert plan.reading.nodes_per_shard == sum(shards.size for shards in read) / sizes.size


@pytest.mark.parametrize(
    ("changes", "num_train", "num_val"),
    [([], 14_188, 1774), (["data.variant=balanced"], 2410, 270), (["data.conflicting=drop"], 14_188 - 118, 1774)],
)
def test_galaxy10_sizes_are_known_without_local_shards(changes: list[str], num_train: int, num_val: int) -> None:
    data = find_dataset_size(recipe_of(*changes).data, Path("nowhere"))
    assert (data.num_train, data.num_val, data.manifest) == (num_train, num_val, None)
    assert data.shard_bytes.sum() == num_train * BYTES_PER_GALAXY and "estimated" in data.origin
    assert len(read_official_split().labels) == 17_736


def test_galaxies_and_shards_flags_set_the_size_of_the_data_set() -> None:
    data = find_dataset_size(recipe_of().data, Path("nowhere"), galaxies=8_700_000, shards=8700)
    assert (data.num_train, data.shard_samples.size, data.num_val) == (8_700_000, 8700, None)
    assert find_dataset_size(recipe_of().data, Path("nowhere"), galaxies=2000).shard_samples.tolist() == [125] * 16


def test_reading_of_a_billion_galaxies_on_1024_nodes_can_be_planned() -> None:
    recipe = recipe_of("train.batch_size=16384", "data.num_streams=192")
    data = find_dataset_size(recipe.data, Path("nowhere"), galaxies=1_000_000_000, shards=100_000)
    by_stream = recipe_of("train.batch_size=16384", "data.num_streams=8192")
    with peak_memory() as peak:
        reading = plan_shard_traffic(recipe, data, ClusterShape(1024, 8))
        split = plan_shard_traffic(by_stream, data, ClusterShape(1024, 8))
    assert peak() < 40_000_000  # bytes; one for each galaxy would be 1 GB, one for each shard and node 100 MB
    assert reading.num_shards == 100_000 and reading.nodes_per_shard > 1
    assert split.nodes_per_shard == pytest.approx(1, abs=0.1)
    assert split.shards_per_node_most < 150


def test_resampling_reads_all_shards_on_every_node() -> None:
    recipe = recipe_of("data.balance=resample", "train.batch_size=64")
    reading = plan_shard_traffic(recipe, find_dataset_size(recipe.data, Path("nowhere")), ClusterShape(4, 2))
    assert reading.shards_per_node_least == reading.num_shards == reading.shards_held_most == reading.nodes_per_shard * 4


def refusal(*overrides: str, job: ClusterShape, **given: Any) -> str:
    with pytest.raises(UserError) as error:
        plan_of(*overrides, job=job, **given)
    return str(error.value)


def test_plan_with_more_processes_than_the_batch_suggests_nodes_or_batch_size() -> None:
    said = refusal("train.batch_size=96", job=ClusterShape(16, 8))
    assert "128 processes (16 nodes x 8)" in said and "train.batch_size=96" in said
    assert "--nodes 12 --gpus-per-node 8" in said and "train.batch_size=128" in said
    plan_of("train.batch_size=96", job=ClusterShape(12, 8))
    plan_of("train.batch_size=128", job=ClusterShape(16, 8))
    assert "--nodes 1 --gpus-per-node 6" in refusal("train.batch_size=6", job=ClusterShape(2, 8))
    assert "only 50 training galaxies" in refusal("train.batch_size=40", job=ClusterShape(8, 8), galaxies=50)


def test_plan_with_a_batch_above_the_training_split_suggests_a_batch_size() -> None:
    said = refusal("train.batch_size=200", job=ClusterShape(1, 8), galaxies=150)
    assert "more than the 150 training galaxies" in said and "144 (a multiple of 8 processes)" in said
    plan_of("train.batch_size=144", job=ClusterShape(1, 8), galaxies=150)


@pytest.mark.parametrize("kind", ["train.mixup=0.2", "train.cutmix=1.0"])
def test_plan_with_mixup_or_cutmix_refuses_batches_that_split_pairs_between_processes(kind: str) -> None:
    said = refusal(kind, "train.batch_size=240", job=ClusterShape(2, 8))
    assert "no multiple of 2 x 16 processes" in said and "train.batch_size=224 or 256" in said and "15 or 20 processes" in said
    plan_of(kind, "train.batch_size=224", job=ClusterShape(2, 8))
    plan_of(kind, "train.batch_size=240", job=ClusterShape(15, 1))
    plan_of(kind, "train.batch_size=250", job=ClusterShape(1, 1))


def test_plan_that_exceeds_the_gpu_memory_names_the_cause_and_remedies() -> None:
    big = ("data.image_size=512", "train.batch_size=512")
    said = refusal("train.micro_batch=0", *big, job=ClusterShape(gpu_memory=8))
    assert "a step of 512 images at a time" in said and "most of it: activations" in said
    assert "train.micro_batch=auto" in said and "data.image_size (now 512)" in said and "a GPU of" in said
    assert "train.gradient_checkpointing=true" in said
    plan = plan_of(*big, job=ClusterShape(gpu_memory=8))
    assert plan.memory.total <= 8e9 and 1 <= plan.memory.micro_batch < 512
    assert "of 1 image at a time" in refusal(*big, job=ClusterShape(gpu_memory=1.01))


def test_memory_error_suggests_remedies_for_its_largest_part() -> None:
    zero = np.zeros(1, np.int64)
    none = Timeline(zero, zero, made=np.array([10**9]), new=zero)
    images = replace(none, per_image=np.array([2 * 10**9]))
    facts = ModelMemory(1, 0, 10**9, 10**9, 9 * 10**9, 0, 10**8, 100, False, none)

    def said(facts: ModelMemory, *overrides: str, world_size: int) -> str:
        recipe = recipe_of(*overrides)
        memory = estimate(facts, recipe, world_size=world_size, rank_batch=4, num_parts=4)
        with pytest.raises(UserError) as error:
            check_memory(recipe, memory, 1.0, world_size)
        return str(error.value)

    assert "optimizer state, 9.00 GB" in said(facts, world_size=8) and "; a smaller model" in said(facts, world_size=8)
    assert "Remedies: train.strategy=fsdp" in said(facts, world_size=8)
    assert "more GPUs with train.strategy=fsdp" in said(facts, "train.strategy=fsdp", world_size=2)
    assert "train.gradient_checkpointing=true" in said(replace(facts, optimizer=0, timeline=images), world_size=8)


class WithoutVal(BlobSurvey):
    """Blobs for training and testing alone."""

    @property
    def splits(self) -> Mapping[str, NDArray[np.int64]]:
        return {name: rows for name, rows in super().splits.items() if name != "val"}


def test_plan_refuses_unusable_data_and_settings_like_the_trainer(tmp_path: Path) -> None:
    assert "--galaxies N" in refusal("data.dataset=simulated", job=ClusterShape())
    assert "is a URL" in refusal("data.manifest=s3://bucket/shards/manifest.json", job=ClusterShape())
    remote = ("data.manifest=s3://bucket/shards/manifest.json", "data.cache_size=0.01", "train.batch_size=64")
    said = refusal(*remote, job=ClusterShape(), galaxies=1_000_000)
    assert "set data.cache_size=" in said
    assert "no shards at" in refusal("data.manifest=elsewhere/manifest.json", job=ClusterShape())
    assert "--galaxies" in refusal(job=ClusterShape(), shards=5)
    assert "more than --galaxies" in refusal(job=ClusterShape(), shards=5, galaxies=3)
    no_val = write_shards(WithoutVal(), tmp_path / "shards", encoding="png", shard_size=16, workers=1).path
    assert "no validation split" in refusal(f"data.manifest={no_val}", "train.batch_size=24", job=ClusterShape())
    both = ("train.compile=true", "train.gradient_checkpointing=true")
    assert "do not go together in CustomCNN" in refusal(*both, "model.norm=batch", job=ClusterShape())
    plan_of(*both, "model.norm=group", job=ClusterShape())


def test_plan_warns_of_uneven_shares_and_few_shards() -> None:
    uneven = " ".join(plan_of("train.batch_size=240", job=ClusterShape(16, 8)).warnings)
    assert "some process 2 galaxies a step, others 1" in uneven and "128 or 256" in uneven
    assert "greatest common divisor 64" in uneven and "batch normalisation sees 2 images" in uneven
    even = plan_of("train.batch_size=256", "data.num_streams=128", "model.norm=batch", job=ClusterShape(2, 4), galaxies=1_000_000)
    assert even.warnings == ()
    few = " ".join(plan_of("train.batch_size=256", "data.num_streams=128", job=ClusterShape(2, 4)).warnings)
    assert "is fetched as often" not in few  # both are multiples of 8 already: what is few is shards
    assert "has all 16 shards in use" in " ".join(plan_of("train.batch_size=192", job=ClusterShape()).warnings)
    assert "batch norm" not in " ".join(
        plan_of("train.batch_size=240", "train.sync_batchnorm=true", job=ClusterShape(16, 8)).warnings
    )


def test_plan_table_shows_job_steps_memory_and_epoch_time() -> None:
    plan = plan_of("train.batch_size=192", job=ClusterShape(4, 8, images_per_s=100, gpu_memory=16))
    text = render_plan(plan)
    for part in ("4 nodes x 8 GPUs = 32 processes", "73 of 192: 14,188 training galaxies, 172 of", "fits 16 GB", "/s", "kept"):
        assert part in text, part
    assert "4.4 s an epoch" in text  # 73 steps of 6 images at 100 a second
    assert "galaxydist bench trainer" in render_plan(plan_of("train.batch_size=192"))


@pytest.mark.parametrize(
    ("size", "text"), [(12, "12 B"), (999_600, "1.00 MB"), (45_600_000, "45.6 MB"), (3.21e12, "3.21 TB"), (325_400_000, "325 MB")]
)
def test_show_size_uses_three_significant_figures(size: float, text: str) -> None:
    assert show_size(size) == text


def test_show_time_uses_seconds_minutes_or_hours() -> None:
    assert [show_time(s) for s in (3.14, 600, 86_400)] == ["3.1 s", "10.0 min", "24.0 h"]


@pytest.mark.parametrize("name", marked(MODEL_NAMES))
def test_every_architecture_can_be_planned(name: str) -> None:
    size = 100 if name == "reference_vit" else 64  # of patches of 25 pixels
    whole = ("model.pretrained=false", "model.freeze_backbone=false")
    facts = model_memory(recipe_of(f"data.image_size={size}", *whole, of=(f"recipe={registry.recipe_of(name)}",)), 10, 256)
    assert facts.num_trained > 0 and facts.timeline.activations(8) > facts.timeline.activations(2) > 0
