"""Micro-batches of a step, and the batch of the first passes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from galaxydist.loading.augment import Augment
from galaxydist.recipe.resolve import load_recipe
from galaxydist.recipe.schema import AugmentConfig
from galaxydist.training.micro_batch import count_micro_batches
from galaxydist.training.mixup import split_evenly
from galaxydist.training.step import example_images
from tests.helpers.antialias import PLAIN


@given(batch=st.integers(1, 500), world=st.integers(1, 500), micro=st.integers(0, 500))
def test_micro_batches_cover_every_share_and_none_is_empty(batch: int, world: int, micro: int) -> None:
    world = min(world, batch)
    num_parts = count_micro_batches(batch, world, micro)
    for share in {batch // world, -(-batch // world)}:
        parts = split_evenly(share, num_parts)
        sizes = [part.stop - part.start for part in parts]
        assert sum(sizes) == share and parts[0].start == 0 and parts[-1].stop == share
        assert min(sizes) >= 1
        if micro:
            assert max(sizes) <= micro + (batch % world > 0)


@pytest.mark.parametrize(
    ("settings", "rank", "micro_batch", "count"),
    [
        (("train.batch_size=20",), 0, 0, 2),
        (("train.batch_size=20",), 2, 1, 1),
        (("train.batch_size=20", "train.compile=true"), 0, 0, 7),  # three ranks have 7, 7 and 6
        (("train.batch_size=20", "train.compile=true"), 2, 0, 6),
        (("train.batch_size=20", "train.compile=true"), 0, 4, 3),  # two parts, of 3 and 4
        (("train.batch_size=24", "train.compile=true", "train.mixup=0.4"), 0, 4, 4),
    ],
)
def test_example_batch_has_the_shape_of_a_steps_first_micro_batch(
    settings: tuple[str, ...], rank: int, micro_batch: int, count: int
) -> None:
    recipe = load_recipe(["recipe=custom_cnn", "data.image_size=16", *settings])
    world: Any = SimpleNamespace(rank=rank, size=3, device=torch.device("cpu"), dtype=torch.float64)
    augment = Augment(AugmentConfig(), 0, *PLAIN, 16)
    images_BCHW = example_images(world, recipe.recipe, augment, micro_batch, torch.channels_last)
    assert images_BCHW.is_contiguous(memory_format=torch.channels_last)
    assert (images_BCHW.shape, images_BCHW.dtype) == ((count, 3, 16, 16), torch.float64)
