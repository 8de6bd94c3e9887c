"""Simulated survey files in Galaxy10's HDF5 schema: class counts, positions and pairs are planned, then all is drawn."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from galaxydist.counter_rng import hash64
from galaxydist.cpus import available_cores, bounded_map, start_workers
from galaxydist.errors import UserError
from galaxydist.galaxy import GALAXY10_COUNTS
from galaxydist.surveys.hdf5_schema import SurveyFileWriter
from galaxydist.surveys.simulate import galaxy_types, observation
from galaxydist.surveys.simulate.components import SIZE, Position, Scene
from galaxydist.surveys.simulate.galaxy_types import (
    CIGAR,
    DISTURBED,
    EDGE_ON,
    EDGE_ON_BULGE,
    IN_BETWEEN,
    MERGING,
    ROUND,
    Light,
    draw_light,
)
from galaxydist.surveys.simulate.random_draws import GALAXY, PAIRS, POSITIONS, SKY, TWICE, Draws

# Minimum number of galaxies per class, even if its share is smaller (fewer only in surveys too small for it).
HANDFUL = 6
# Galaxy10 has 236 pairs within an image width among 17,736 galaxies: one per 75.
_GALAXIES_PER_PAIR = 75
# Range of pair separations, arcsec: two distinct galaxies that share one image (67 arcsec wide).
_PAIR_SEPARATION = (18.0, 55.0)
# Approximate DECaLS footprint in degrees: two ranges of right ascension, one of declination.
_RIGHT_ASCENSIONS = ((112.0, 258.0), (318.0, 418.0))
_DECLINATIONS = (-15.0, 32.0)


@dataclass(frozen=True)
class SurveyPlan:
    """Contents of a survey, planned before any image is drawn.

    Attributes:
        seed: seed of the survey.
        balanced: equal number of galaxies of each class.
        labels: N class numbers, sorted as in the official file.
        ra, dec: N positions, degrees.
        shown: N rows whose galaxies the images show: the row itself, except for the second row of the galaxy with two labels.
        pairs: P x 2 rows that lie in each other's images.
    """

    seed: int
    balanced: bool
    labels: NDArray[np.int64]
    ra: NDArray[np.float64]
    dec: NDArray[np.float64]
    shown: NDArray[np.int64]
    pairs: NDArray[np.int64]

    def neighbours(self, row: int) -> Iterator[tuple[int, float, float]]:
        """Yield the rows that lie in this row's image, with their offsets east and north in arcsec."""
        for there in self.pairs[(self.pairs == row).any(axis=1)].ravel():
            if there != row:
                across = (self.ra[there] - self.ra[row] + 180.0) % 360.0 - 180.0
                east = across * np.cos(np.radians(self.dec[row])) * 3600.0
                yield int(there), float(east), float((self.dec[there] - self.dec[row]) * 3600.0)


def plan_survey(num_galaxies: int, seed: int, balanced: bool = False) -> SurveyPlan:
    """Plan a survey of ``num_galaxies`` galaxies: classes in Galaxy10's proportions, or an equal number of each.

    A survey of at least 20 galaxies has overlapping pairs, and exactly one position with two labels.
    """
    labels = np.repeat(np.arange(len(GALAXY10_COUNTS)), class_counts(num_galaxies, balanced))
    ra, dec = random_positions(num_galaxies, seed)
    shown = np.arange(num_galaxies)
    pairs = np.zeros((0, 2), np.int64)
    if num_galaxies >= 20:
        order = np.argsort(hash64(seed, PAIRS, np.arange(num_galaxies)), kind="stable")
        first = int(order[0])
        second = int(next(row for row in order if labels[row] != labels[first]))
        rest = order[(order != first) & (order != second)]
        num_pairs = min(max(2, num_galaxies // _GALAXIES_PER_PAIR), len(rest) // 2)
        pairs = rest[: 2 * num_pairs].reshape(-1, 2).astype(np.int64)
        for one, other in pairs:
            _move_beside(ra, dec, (int(one), int(other)), Draws(seed, PAIRS, int(one), 1), _PAIR_SEPARATION)
        _move_beside(ra, dec, (first, second), Draws(seed, TWICE, first), (0.05, 0.5))
        shown[second] = first
    return SurveyPlan(seed, balanced, labels, ra, dec, shown, pairs)


def class_counts(num_galaxies: int, balanced: bool = False) -> NDArray[np.int64]:
    """Return the number of galaxies of each class: Galaxy10's proportions with at least ``HANDFUL`` each, or equal shares."""
    num_classes = len(GALAXY10_COUNTS)
    weights = np.ones(num_classes) if balanced else np.array(GALAXY10_COUNTS, np.float64)
    least = min(HANDFUL, num_galaxies // num_classes)
    exact = np.maximum(weights / weights.sum() * num_galaxies, least)
    # The classes above the minimum share the galaxies that remain.
    for _ in range(num_classes):
        free = exact > least
        exact[free] = weights[free] / weights[free].sum() * (num_galaxies - least * (~free).sum())
        exact = np.maximum(exact, least)
    counts: NDArray[np.int64] = np.floor(exact + 1e-9).astype(np.int64)
    for i in np.argsort(counts - exact, kind="stable")[: num_galaxies - counts.sum()]:
        counts[i] += 1
    return counts


def random_positions(num_galaxies: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return random positions (ra, dec in degrees), each in its own cell of the footprint, so that none coincide by chance."""
    widths = [high - low for low, high in _RIGHT_ASCENSIONS]
    low, high = np.sin(np.radians(_DECLINATIONS))
    columns = int(np.ceil(np.sqrt(max(num_galaxies, 1) * 5.0)))
    rows = -(-max(num_galaxies, 1) // columns) + 1
    cell = np.argsort(hash64(seed, POSITIONS, np.arange(columns * rows)), kind="stable")[:num_galaxies]
    inside = 0.05 + 0.9 * (hash64(seed, POSITIONS, np.arange(2 * num_galaxies), 1).astype(np.float64) / 2.0**64)
    along = (cell % columns + inside[:num_galaxies]) / columns * sum(widths)
    ra = np.where(along < widths[0], _RIGHT_ASCENSIONS[0][0] + along, _RIGHT_ASCENSIONS[1][0] + along - widths[0]) % 360.0
    dec = np.degrees(np.arcsin(low + (high - low) * (cell // columns + inside[num_galaxies:]) / rows))
    return ra, dec


def _move_beside(
    ra: NDArray[np.float64], dec: NDArray[np.float64], pair: tuple[int, int], draws: Draws, separation: tuple[float, float]
) -> None:
    one, other = pair
    distance, angle = draws.uniform(*separation) / 3600.0, draws.uniform(0.0, 2.0 * np.pi)
    dec[other] = dec[one] + distance * np.sin(angle)
    ra[other] = (ra[one] + distance * np.cos(angle) / np.cos(np.radians(dec[one]))) % 360.0


def draw_galaxy(scene: Scene, draws: Draws, light: Light, label: int, position: Position = (0.0, 0.0)) -> None:
    """Draw a galaxy of this class at an x, y offset in pixels from the image centre."""
    if label == DISTURBED:
        galaxy_types.draw_disturbed(scene, draws, light, position)
    elif label == MERGING:
        galaxy_types.draw_merging(scene, draws, light, position)
    elif label in (ROUND, IN_BETWEEN, CIGAR):
        galaxy_types.draw_smooth(scene, draws, light, label, position)
    elif label in (EDGE_ON, EDGE_ON_BULGE):
        galaxy_types.draw_edge_on(scene, draws, light, label == EDGE_ON_BULGE, position)
    else:
        galaxy_types.draw_spiral(scene, draws, light, label, position)


def draw_image(plan: SurveyPlan, row: int) -> tuple[NDArray[np.uint8], float, float]:
    """Return the image of a row (256 x 256 x 3 uint8 RGB), its redshift and its pixel scale (arcsec per pixel).

    They depend on the plan and the row number alone. The second row of the galaxy with two labels shows the same galaxy as the
    first. Neighbours within the frame are drawn too.
    """
    shown = int(plan.shown[row])
    label = int(plan.labels[shown])
    draws = Draws(plan.seed, GALAXY, shown)
    light = draw_light(draws, label)
    scene = Scene(light.pixel_scale)
    draw_galaxy(scene, draws, light, label)
    for neighbour, east, north in plan.neighbours(shown):
        beside = Draws(plan.seed, GALAXY, neighbour)
        its_label = int(plan.labels[neighbour])
        its_light = draw_light(beside, its_label).at_scale(scene.pixel_scale)
        # East is left and north is up; rows count downwards.
        draw_galaxy(scene, beside, its_light, its_label, (-east / scene.pixel_scale, -north / scene.pixel_scale))
    field = Draws(plan.seed, SKY, shown)
    observation.add_background(scene, field)
    observation.add_stars(scene, field)
    light_CHW = observation.blur(scene.light_CHW, observation.draw_seeing(field), scene.pixel_scale)
    observation.add_artefacts(light_CHW, field)
    light_CHW = observation.add_noise(light_CHW, field, scene.pixel_scale, plan.seed, shown)
    return observation.to_image(light_CHW), light.redshift, light.pixel_scale


# Written into the file; increase it whenever the same seed gives different galaxies.
SIMULATOR_VERSION = 2
_SLAB = 32
# Fewer galaxies than this are drawn before other processes would have started.
_WORTH_PROCESSES = 200

Slab = tuple[NDArray[np.uint8], NDArray[np.float64], NDArray[np.float64]]


def simulate_survey(path: Path, num_galaxies: int, seed: int, workers: int | None = None, balanced: bool = False) -> None:
    """Write a simulated survey in Galaxy10's schema; the file appears only once it is complete.

    The same (num_galaxies, seed, balanced) gives the same bytes with any number of workers: random numbers are hashes of seed
    and row.

    Args:
        path: the HDF5 file to write or replace.
        num_galaxies: at least 1; from 20 on the survey has overlapping pairs and one position with two labels.
        seed: 0 to 2^63 - 1.
        workers: processes; by default one for each core available to this process.
        balanced: an equal number of galaxies of each class instead of Galaxy10's proportions.

    Raises:
        UserError: the number of galaxies or the seed is out of range, or the disk is full.
    """
    if num_galaxies < 1:
        raise UserError(f"a survey needs at least 1 galaxy, not {num_galaxies}")
    if not 0 <= seed < 2**63:
        raise UserError(f"the seed must be between 0 and 2^63 - 1, not {seed}")
    plan = plan_survey(num_galaxies, seed, balanced)
    attributes = {"simulator_version": SIMULATOR_VERSION, "seed": seed, "num_galaxies": num_galaxies, "balanced": int(balanced)}
    with SurveyFileWriter(path, num_galaxies, attributes) as file:
        for rows, (images, redshift, pxscale) in _slabs(plan, workers, "simulate"):
            file.append(
                images, labels=plan.labels[rows], ra=plan.ra[rows], dec=plan.dec[rows], redshift=redshift, pxscale=pxscale
            )


def draw_rows(plan: SurveyPlan, workers: int | None = None, description: str = "simulate") -> NDArray[np.uint8]:
    """Draw all images of the plan into memory, N x 256 x 256 x 3 uint8 (197 kB each), for measurements on small surveys."""
    images = np.empty((len(plan.labels), SIZE, SIZE, 3), np.uint8)
    for rows, (slab, _, _) in _slabs(plan, workers, description):
        images[rows] = slab
    return images


def draw_slab(plan: SurveyPlan, start: int, stop: int) -> Slab:
    """Draw images, redshifts and pixel scales of the plan's rows ``start`` ... ``stop - 1``."""
    images, redshifts, pixel_scales = zip(*(draw_image(plan, row) for row in range(start, stop)), strict=True)
    return np.stack(images), np.array(redshifts), np.array(pixel_scales)


_plan_once = lru_cache(maxsize=1)(plan_survey)


def _draw_planned(num_galaxies: int, seed: int, balanced: bool, start: int, stop: int) -> Slab:
    # Each process makes the plan itself, once: the pickled plan of a large survey would be larger than a slab.
    return draw_slab(_plan_once(num_galaxies, seed, balanced), start, stop)


def _slabs(plan: SurveyPlan, workers: int | None, description: str) -> Iterator[tuple[slice, Slab]]:
    """Yield the rows and contents of each slab, drawn on all cores, with a progress bar."""
    from tqdm import tqdm

    num_galaxies = len(plan.labels)
    workers = workers or (available_cores() if num_galaxies >= _WORTH_PROCESSES else 1)
    edges = [(start, min(start + _SLAB, num_galaxies)) for start in range(0, num_galaxies, _SLAB)]
    slabs: Iterator[Slab]
    with ExitStack() as stack:
        if workers == 1:
            slabs = (draw_slab(plan, *edge) for edge in edges)
        else:
            tasks = [(num_galaxies, plan.seed, plan.balanced, *edge) for edge in edges]
            slabs = bounded_map(stack.enter_context(start_workers(workers)), _draw_planned, tasks, 3 * workers)
        bar = stack.enter_context(tqdm(total=num_galaxies, unit="galaxy", desc=description, disable=None))
        for (start, stop), slab in zip(edges, slabs, strict=True):
            yield slice(start, stop), slab
            bar.update(stop - start)
