"""The classes that come from encounters: merging galaxies and disturbed ones."""

from dataclasses import replace

import numpy as np

from galaxydist.surveys.simulate import galaxies, parts
from galaxydist.surveys.simulate.dice import Dice
from galaxydist.surveys.simulate.morphology import IN_BETWEEN, LOOSE_SPIRAL, ROUND, TIGHT_SPIRAL, Light
from galaxydist.surveys.simulate.parts import Ellipse
from galaxydist.surveys.simulate.scene import Scene


def draw_merging(scene: Scene, dice: Dice, light: Light, x: float, y: float) -> None:
    """Two (seldom three) galaxies that overlap, within a common envelope for some, with a tail or bridge for others.

    Mass ratios are those of major mergers, down to 1:4 (Lotz et al. 2008, MNRAS 391, 1137).
    """
    num = 3 if dice.chance(0.12) else 2
    dimmer = [0.0] + [abs(dice.normal(0.0, 0.8)) for _ in range(num - 1)]
    shares = 10.0 ** (-0.4 * np.array(dimmer))
    envelope = dice.uniform(0.08, 0.35) if dice.chance(0.6) else 0.0
    shares *= (1.0 - envelope) / shares.sum()
    direction = dice.uniform(0.0, 2.0 * np.pi)
    first = (x, y)
    for share in shares:
        other = dice.normal(0.0, 0.12)
        part = replace(
            light,
            magnitude=light.magnitude - 2.5 * np.log10(share),
            radius=max(light.radius * share**0.5 * dice.uniform(0.6, 1.0), 2.0),
            green_red=light.green_red + other,
            red_z=light.red_z + 0.66 * other,
        )
        _draw_member(scene, dice, part, x, y)
        distance = light.radius * np.exp(dice.normal(np.log(2.4), 0.45)) + 5.0
        direction += dice.normal(0.0, 0.8)
        x, y = first[0] + distance * np.cos(direction), first[1] + distance * np.sin(direction)
    middle = ((first[0] + x) / 2, (first[1] + y) / 2)
    if envelope:
        halo = Ellipse(*middle, direction, dice.uniform(0.5, 0.9))
        parts.draw_sersic(scene, halo, light.radius * dice.uniform(2.0, 3.5), 1.0, light.fluxes(envelope))
    if dice.chance(0.45):
        draw_tail(scene, dice, light, *first, light.fluxes(dice.uniform(0.04, 0.15), -0.1))


def _draw_member(scene: Scene, dice: Dice, light: Light, x: float, y: float) -> None:
    kind = dice.pick((0.32, 0.28, 0.20, 0.20))
    if kind == 0:
        galaxies.draw_smooth(scene, dice, light, ROUND, x, y)
    elif kind == 1:
        galaxies.draw_smooth(scene, dice, light, IN_BETWEEN, x, y)
    elif kind == 2:
        galaxies.draw_spiral(scene, dice, light, TIGHT_SPIRAL if dice.chance(0.5) else LOOSE_SPIRAL, x, y)
    else:
        galaxies.draw_edge_on(scene, dice, light, dice.chance(0.8), x, y)


def draw_tail(scene: Scene, dice: Dice, light: Light, x: float, y: float, fluxes: parts.Array) -> None:
    """A tidal tail that leaves a galaxy at its edge and bends away (Toomre & Toomre 1972, ApJ 178, 623)."""
    direction, sense = dice.uniform(0.0, 2.0 * np.pi), 1.0 if dice.chance(0.5) else -1.0
    bend = light.radius * dice.uniform(1.3, 3.5)
    # The circle passes near the galaxy's centre, so that the tail starts inside the galaxy.
    middle = (x - (bend - 0.6 * light.radius) * np.cos(direction), y - (bend - 0.6 * light.radius) * np.sin(direction))
    parts.draw_arc(
        scene, *middle, bend, light.radius * dice.uniform(0.15, 0.4), direction, sense * dice.uniform(0.9, 2.2), fluxes
    )


def draw_disturbed(scene: Scene, dice: Dice, light: Light, x: float, y: float) -> None:
    """One galaxy with tails, shells, a plume or a heavy lean to one side: what an encounter leaves.

    Shells lie on alternate sides at growing radii (Malin & Carter 1983, ApJ 274, 534); lopsided discs: Rix & Zaritsky (1995, ApJ 447, 82).
    """
    at = Ellipse(x, y, dice.uniform(0.0, np.pi), galaxies.inclined(dice, 0.15))
    early = dice.chance(0.35)
    debris, knots = dice.uniform(0.12, 0.32), (0.0 if early else dice.uniform(0.0, 0.12))
    core = dice.uniform(0.5, 0.75) if early else dice.uniform(0.08, 0.3)
    scale = light.radius / 2.0
    disc = light.fluxes(max(1.0 - core - debris - knots, 0.05), -0.05)
    arms = galaxies.draw_arms(dice, tight=False) if not early and dice.chance(0.4) else None
    parts.draw_disc(scene, dice, at, scale, disc, arms, dice.uniform(0.5, 0.95))
    rounder = Ellipse(x + dice.normal(0.0, 0.2 * scale), y + dice.normal(0.0, 0.2 * scale), at.angle, 0.5 + 0.5 * at.axis_ratio)
    parts.draw_sersic(scene, rounder, scale * (0.9 if early else 0.4), dice.uniform(1.5, 3.5), light.fluxes(core, 0.05))
    parts.draw_knots(scene, dice, at, scale, dice.integer(3, 15), light.fluxes(knots))
    kind = dice.pick((0.60, 0.20, 0.20))
    if kind == 0:
        tails = 2 if dice.chance(0.35) else 1
        for _ in range(tails):
            draw_tail(scene, dice, light, x, y, light.fluxes(debris / tails, -0.08))
    elif kind == 1:
        num, side = dice.integer(2, 3), dice.uniform(0.0, 2.0 * np.pi)
        for i in range(num):
            radius = light.radius * (1.3 + 0.7 * i + dice.uniform(0.0, 0.4))
            span = dice.uniform(1.0, 2.0)
            start = side + np.pi * (i % 2) - span / 2
            parts.draw_arc(scene, x, y, radius, 0.07 * radius + 0.6, start, span, light.fluxes(debris / num))
    else:
        lean = dice.uniform(0.0, 2.0 * np.pi)
        distance = light.radius * dice.uniform(0.8, 1.8)
        plume = Ellipse(
            x + distance * np.cos(lean), y + distance * np.sin(lean), lean + dice.normal(0.0, 0.5), dice.uniform(0.3, 0.7)
        )
        parts.draw_sersic(scene, plume, light.radius * dice.uniform(0.7, 1.3), 0.7, light.fluxes(debris, -0.05))
