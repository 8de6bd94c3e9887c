"""One row of the simulated survey: draw the galaxy, its neighbours and its field, and take the picture."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from galaxydist.surveys.simulate import colour, encounters, galaxies, sky
from galaxydist.surveys.simulate.dice import GALAXY, SKY, Dice
from galaxydist.surveys.simulate.morphology import (
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
from galaxydist.surveys.simulate.parts import Place
from galaxydist.surveys.simulate.places import Plan
from galaxydist.surveys.simulate.scene import Scene


@dataclass(frozen=True, slots=True)
class Picture:
    """A row's picture (256 x 256 x 3 uint8 RGB), its redshift and its pixel scale (arcsec per pixel)."""

    image: NDArray[np.uint8]
    redshift: float
    pixel_scale: float


def draw_galaxy(scene: Scene, dice: Dice, light: Light, label: int, place: Place = (0.0, 0.0)) -> None:
    """Draw a galaxy of this class at a place in pixels from the picture's centre."""
    if label == DISTURBED:
        encounters.draw_disturbed(scene, dice, light, place)
    elif label == MERGING:
        encounters.draw_merging(scene, dice, light, place)
    elif label in (ROUND, IN_BETWEEN, CIGAR):
        galaxies.draw_smooth(scene, dice, light, label, place)
    elif label in (EDGE_ON, EDGE_ON_BULGE):
        galaxies.draw_edge_on(scene, dice, light, label == EDGE_ON_BULGE, place)
    else:
        galaxies.draw_spiral(scene, dice, light, label, place)


def take_picture(plan: Plan, row: int) -> Picture:
    """The picture of a row of the plan, from the plan and the row's number alone.

    A row that stands for another row's galaxy (one place, two labels) shows that galaxy; galaxies that lie within the frame are
    drawn in it too.
    """
    shown = int(plan.shown[row])
    label = int(plan.labels[shown])
    dice = Dice(plan.seed, GALAXY, shown)
    light = draw_light(dice, label)
    scene = Scene(light.pixel_scale)
    draw_galaxy(scene, dice, light, label)
    for neighbour, east, north in plan.neighbours(shown):
        beside = Dice(plan.seed, GALAXY, neighbour)
        its_label = int(plan.labels[neighbour])
        its_light = draw_light(beside, its_label)
        its_light = its_light.at_scale(scene.pixel_scale)
        # East is left and north is up; rows count downwards.
        draw_galaxy(scene, beside, its_light, its_label, (-east / scene.pixel_scale, -north / scene.pixel_scale))
    field = Dice(plan.seed, SKY, shown)
    sky.add_background(scene, field)
    sky.add_stars(scene, field)
    light_CHW = sky.blur(scene.light_CHW, sky.draw_seeing(field), scene.pixel_scale)
    sky.add_artefacts(light_CHW, field)
    light_CHW = sky.add_noise(light_CHW, field, scene.pixel_scale, plan.seed, shown)
    return Picture(colour.to_picture(light_CHW), light.redshift, light.pixel_scale)
