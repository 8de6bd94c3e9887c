"""Mixup and cutmix as pure functions of (seed, epoch, pair), and micro-batches that keep pairs together.

Offset o of a global batch of G galaxies is paired with o + G/2, and both become mixtures of one another: mixup blends the two
images, ``x := lam x + (1 - lam) x'`` (Zhang et al. 2018, arXiv:1710.09412); cutmix replaces a box of each by the other's (Yun et
al. 2019, arXiv:1905.04899). lam is drawn from Beta(a, a); the labels are mixed in the same proportion. The draws of a pair depend
only on the seed, the epoch and the position of its first galaxy, not on processes, micro-batches or devices.
"""

import itertools
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import betaincinv
from torch import Tensor

from galaxydist.counter_rng import Stream, uniform
from galaxydist.recipe.schema import TrainConfig

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PairSlice:
    """The pairs ``start`` ... ``stop - 1`` of a rank's ``num_pairs`` pairs.

    A batch holds all first partners, then all second ones: row i is paired with row i + num_pairs.
    """

    start: int
    stop: int
    num_pairs: int

    def rows(self, values: Tensor) -> Tensor:
        """Return the pairs' rows of a tensor of the rank's batch; without a copy if they are all rows."""
        if self.stop - self.start == self.num_pairs:
            return values
        return torch.cat([values[self.start : self.stop], values[self.num_pairs + self.start : self.num_pairs + self.stop]])


# Columns of ``Mixup.draw_rows``: partner's share of the label, of the pixels outside the box, and the box's four edges.
NUM_MIXUP_DRAWS = 6

# A micro-batch: consecutive rows of a rank's batch, or whole pairs.
Part: TypeAlias = slice | PairSlice


def take(values: Tensor, part: Part) -> Tensor:
    """Return the rows of a part of a rank's batch."""
    return part.rows(values) if isinstance(part, PairSlice) else values[part]


def split_evenly(length: int, num_parts: int) -> list[slice]:
    """Return ``num_parts`` slices of 0 ... length-1 whose sizes differ by at most one."""
    edges = [length * part // num_parts for part in range(num_parts + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]


def split_pairs(length: int, num_parts: int) -> list[PairSlice]:
    """Split a rank's batch of ``length`` rows into ``num_parts`` parts of whole pairs, which differ by at most one pair.

    Raises:
        ValueError: an odd length, or fewer pairs than parts.
    """
    num_pairs = length // 2
    if length % 2 or not 1 <= num_parts <= num_pairs:
        raise ValueError(f"{length} galaxies cannot be cut into {num_parts} parts of whole pairs")
    return [PairSlice(part.start, part.stop, num_pairs) for part in split_evenly(num_pairs, num_parts)]


def count_pair_parts(batch_size: int, world_size: int, micro_batch: int) -> int:
    """Return the number of forward passes in a step of whole pairs.

    Args:
        batch_size, world_size: values that ``check_world`` accepts.
        micro_batch: largest number of galaxies in one forward pass, at least one pair; 0: the whole share.
    """
    num_pairs = batch_size // (2 * world_size)
    return 1 if micro_batch == 0 else -(-num_pairs // max(1, micro_batch // 2))


@dataclass(frozen=True)
class MixupDraws:
    """Random draws for P pairs.

    Args:
        partner_shares: P, 1 - lam: the partner's share of the label, in [0, 1]; 0 for a pair that is not mixed.
        blends: P, the partner's share of each pixel outside the box: 1 - lam with mixup, 0 with cutmix.
        boxes: P x 4, pixels that come from the partner: first row, row after the last, the same for columns; empty with mixup.
    """

    partner_shares: Floats
    blends: Floats
    boxes: Ints


class Mixup:
    """Draws the mixtures of a run's pairs.

    Args:
        config: the keys ``mixup``, ``cutmix``, ``mix_prob`` and ``mix_switch``.
        seed: the recipe's seed.
        image_size: width of the model's input in pixels.
    """

    def __init__(self, config: TrainConfig, seed: int, image_size: int) -> None:
        self._mixup, self._cutmix = config.mixup, config.cutmix
        self._changed_share, self._cutmix_share = config.mix_prob, config.mix_switch
        self._seed, self._size = seed, image_size

    def draw(self, epoch: int, pairs: Ints) -> MixupDraws:
        """Return the draws of pairs.

        Args:
            epoch: epoch of training.
            pairs: P positions of the pairs' first galaxies in the epoch's order.
        """
        factor = self._uniform(epoch, pairs, Stream.MIXUP_FACTOR)
        changed = self._uniform(epoch, pairs, Stream.MIX_CHANGED) < self._changed_share
        cut = changed & self._is_cut(epoch, pairs)
        blends = np.where(changed & ~cut, 1 - _beta(self._mixup, factor), 0.0)
        boxes = np.where(cut[:, None], self._boxes(epoch, pairs, 1 - _beta(self._cutmix, factor)), 0)
        areas = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2])
        return MixupDraws(np.where(cut, areas / self._size**2, blends), blends, boxes)

    def draw_rows(self, epoch: int, positions: Ints) -> Floats:
        """Return the draws of a rank's batch of B galaxies, B x 6 for :meth:`prepare`; the galaxies of a pair have the same.

        Args:
            epoch: training epoch.
            positions: B positions in the epoch's order; B is even, which ``check_world`` ensures.
        """
        draws = self.draw(epoch, positions[: len(positions) // 2])
        numbers_P6 = np.concatenate([draws.partner_shares[:, None], draws.blends[:, None], draws.boxes], axis=1)
        return np.concatenate([numbers_P6, numbers_P6])

    def prepare(self, draws_B6: Tensor, weights_B: Tensor) -> "MixedBatch":
        """Return the mixtures of a rank's batch, on the device of its tensors; on a GPU the host does not wait.

        A pair with a galaxy of weight 0 (an unreadable image, which is black) is not mixed: the other galaxy keeps its image and
        label.

        Args:
            draws_B6: from :meth:`draw_rows`.
            weights_B: weight of each galaxy.
        """
        num_pairs = len(draws_B6) // 2
        is_whole_P = (weights_B[:num_pairs] > 0) & (weights_B[num_pairs:] > 0)
        return MixedBatch(draws_B6[:num_pairs].float() * is_whole_P[:, None], has_boxes=self._cutmix > 0)

    def _uniform(self, epoch: int, pairs: Ints, stream: Stream) -> Floats:
        return uniform(self._seed, epoch, pairs, stream)

    def _is_cut(self, epoch: int, pairs: Ints) -> NDArray[np.bool_]:
        if self._mixup > 0 and self._cutmix > 0:
            return self._uniform(epoch, pairs, Stream.MIX_KIND) < self._cutmix_share
        return np.full(pairs.shape, self._cutmix > 0)

    def _boxes(self, epoch: int, pairs: Ints, areas: Floats) -> Ints:
        """Draw squares with these shares of the image's area, around uniform centres, in whole pixels, cut off at the edges."""
        edges = []
        for axis in range(2):
            centre = uniform(self._seed, epoch, pairs, axis, Stream.CUTMIX_BOX)
            edges += [centre - np.sqrt(areas) / 2, centre + np.sqrt(areas) / 2]
        return np.rint(np.stack(edges, axis=1) * self._size).clip(0, self._size).astype(np.int64)


@dataclass(frozen=True)
class MixedBatch:
    """``MixupDraws`` of a rank's P pairs on the device.

    Args:
        numbers_P6: float32; partner's share of the label, of the pixels outside the box, and the box's four edges.
        has_boxes: False if no pair of the run can have a box.
    """

    numbers_P6: Tensor
    has_boxes: bool

    @property
    def partner_shares_B(self) -> Tensor:
        """Partner's share of each galaxy's label, float32 of the batch's length."""
        return self.numbers_P6[:, 0].repeat(2)

    def partners(self, values_B: Tensor) -> Tensor:
        """Return the partner's value for each galaxy of the batch."""
        return values_B.roll(len(self.numbers_P6), 0)

    def take(self, part: Part) -> "MixedBatch":
        """Return the mixtures of a part from ``split_pairs``."""
        assert isinstance(part, PairSlice), "a part of consecutive rows may separate the galaxies of a pair"
        return replace(self, numbers_P6=self.numbers_P6[part.start : part.stop])

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """Mix augmented, normalised images.

        Each pixel is rounded on its own (two products, one sum), so that its value does not depend on the rest of the batch.

        Args:
            images_BCHW: float32 or float64, the first galaxies of all pairs, then the second ones.

        Returns:
            Images of the same type, shape and memory format.
        """
        blend = self._blend(images_BCHW)
        keep = 1 - blend
        mixed_BCHW = torch.empty_like(images_BCHW)
        halves, (first, second) = mixed_BCHW.chunk(2), images_BCHW.chunk(2)
        for half, own, other in zip(halves, (first, second), (second, first), strict=True):
            torch.mul(own, keep, out=half)
            half.add_(other * blend)
        return mixed_BCHW

    def _blend(self, images_BCHW: Tensor) -> Tensor:
        """Return the partner's share of each pixel: P x 1 x 1 x 1, or P x 1 x H x W with boxes."""
        blend = self.numbers_P6[:, 1, None, None, None].to(images_BCHW.dtype)
        if not self.has_boxes:
            return blend
        top, bottom, left, right = self.numbers_P6[:, 2:, None, None, None].unbind(1)
        rows_H1 = torch.arange(images_BCHW.shape[2], device=blend.device)[:, None]
        columns_W = torch.arange(images_BCHW.shape[3], device=blend.device)
        inside = (rows_H1 >= top) & (rows_H1 < bottom) & (columns_W >= left) & (columns_W < right)
        return torch.where(inside, 1.0, blend)


def _beta(a: float, draws: Floats) -> Floats:
    """Turn uniform draws into Beta(a, a) draws by the inverse of the cumulative distribution; 1 if a is 0 (off)."""
    if a == 0:
        return np.ones_like(draws)
    return draws if a == 1 else np.asarray(betaincinv(a, a, draws))
