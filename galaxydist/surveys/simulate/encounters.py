"""The classes that come from encounters: merging galaxies and disturbed ones."""

from dataclasses import replace

import numpy as np

from galaxydist.surveys.simulate import galaxies, parts
from galaxydist.surveys.simulate.dice import Dice
from galaxydist.surveys.simulate.morphology import IN_BETWEEN, LOOSE_SPIRAL, ROUND, TIGHT_SPIRAL, Light
from galaxydist.surveys.simulate.parts import Ellipse, Place
from galaxydist.surveys.simulate.scene import Array, Scene


def draw_merging(scene: Scene, dice: Dice, light: Light, place: Place) -> None:
    """Two (seldom three) galaxies that overlap, within a common envelope for some, with a tail or bridge for others.

    Mass ratios are those of major mergers, down to about 1:4 (Lotz et al. 2008, MNRAS 391, 1137).
    """
    num = 3 if dice.chance(0.12) else 2
    shares = 10.0 ** (-0.4 * np.array([0.0] + [abs(dice.normal(0.0, 0.8)) for _ in range(num - 1)]))
    envelope = dice.uniform(0.08, 0.35) if dice.chance(0.6) else 0.0
    shares *= (1.0 - envelope) / shares.sum()
    direction = dice.uniform(0.0, 2.0 * np.pi)
    member = place
    for i, share in enumerate(shares):
        if i:
            distance = light.radius * np.exp(dice.normal(np.log(2.4), 0.45)) + 5.0
            direction += dice.normal(0.0, 0.8)
            member = _away(place, distance, direction)
        other = dice.normal(0.0, 0.12)
        part = replace(
            light,
            magnitude=light.magnitude - 2.5 * np.log10(share),
            radius=max(light.radius * share**0.5 * dice.uniform(0.6, 1.0), 2.0),
            green_red=light.green_red + other,
            red_z=light.red_z + 0.66 * other,
        )
        _draw_member(scene, dice, part, member)
    if envelope:
        middle = ((place[0] + member[0]) / 2, (place[1] + member[1]) / 2)
        halo = Ellipse(*middle, direction, dice.uniform(0.5, 0.9))
        parts.draw_sersic(scene, halo, light.radius * dice.uniform(2.0, 3.5), 1.0, light.fluxes(envelope))
    if dice.chance(0.45):
        draw_tail(scene, dice, light, place, light.fluxes(dice.uniform(0.04, 0.15), -0.1))


def _draw_member(scene: Scene, dice: Dice, light: Light, place: Place) -> None:
    kind = dice.pick((0.32, 0.28, 0.20, 0.20))
    if kind == 0:
        galaxies.draw_smooth(scene, dice, light, ROUND, place)
    elif kind == 1:
        galaxies.draw_smooth(scene, dice, light, IN_BETWEEN, place)
    elif kind == 2:
        galaxies.draw_spiral(scene, dice, light, TIGHT_SPIRAL if dice.chance(0.5) else LOOSE_SPIRAL, place)
    else:
        galaxies.draw_edge_on(scene, dice, light, dice.chance(0.8), place)


def draw_tail(scene: Scene, dice: Dice, light: Light, place: Place, fluxes: Array) -> None:
    """A tidal tail that leaves a galaxy at its edge and bends away (Toomre & Toomre 1972, ApJ 178, 623)."""
    direction, sense = dice.uniform(0.0, 2.0 * np.pi), 1.0 if dice.chance(0.5) else -1.0
    bend = light.radius * dice.uniform(1.3, 3.5)
    # The circle passes near the galaxy's centre, so that the tail starts inside the galaxy.
    middle = _away(place, 0.6 * light.radius - bend, direction)
    width, span = light.radius * dice.uniform(0.15, 0.4), sense * dice.uniform(0.9, 2.2)
    parts.draw_arc(scene, middle, fluxes, radius=bend, width=width, start=direction, span=span)


def draw_disturbed(scene: Scene, dice: Dice, light: Light, place: Place) -> None:
    """One galaxy with tails, shells, a plume or a heavy lean to one side: what an encounter leaves.

    Lopsided discs: Rix & Zaritsky (1995, ApJ 447, 82).
    """
    at = Ellipse(*place, dice.uniform(0.0, np.pi), galaxies.inclined(dice, 0.15))
    early = dice.chance(0.35)
    debris, knots = dice.uniform(0.18, 0.4), (0.0 if early else dice.uniform(0.0, 0.12))
    core = dice.uniform(0.5, 0.75) if early else dice.uniform(0.08, 0.3)
    scale = light.radius / 2.0
    disc = light.fluxes(max(1.0 - core - debris - knots, 0.05), -0.05)
    arms = galaxies.draw_arms(dice, tight=False) if not early and dice.chance(0.4) else None
    parts.draw_disc(scene, dice, at, scale, disc, arms=arms, lopsided=dice.uniform(0.5, 0.95))
    shift = dice.normals(2) * 0.2 * scale
    rounder = Ellipse(place[0] + shift[0], place[1] + shift[1], at.angle, 0.5 + 0.5 * at.axis_ratio)
    parts.draw_sersic(scene, rounder, scale * (0.9 if early else 0.4), dice.uniform(1.5, 3.5), light.fluxes(core, 0.05))
    parts.draw_knots(scene, dice, at, scale, light.fluxes(knots), num=dice.integer(3, 15))
    kind = dice.pick((0.65, 0.20, 0.15))
    if kind == 0:
        tails = 2 if dice.chance(0.35) else 1
        for _ in range(tails):
            draw_tail(scene, dice, light, place, light.fluxes(debris / tails, -0.08))
    elif kind == 1:
        _draw_shells(scene, dice, light, place, light.fluxes(debris))
    else:
        lean = dice.uniform(0.0, 2.0 * np.pi)
        beside = _away(place, light.radius * dice.uniform(0.8, 1.8), lean)
        plume = Ellipse(*beside, lean + dice.normal(0.0, 0.5), dice.uniform(0.3, 0.7))
        parts.draw_sersic(scene, plume, light.radius * dice.uniform(0.7, 1.3), 0.7, light.fluxes(debris, -0.05))


def _draw_shells(scene: Scene, dice: Dice, light: Light, place: Place, fluxes: Array) -> None:
    """Shells, on alternate sides at growing radii (Malin & Carter 1983, ApJ 274, 534)."""
    num, side = dice.integer(2, 3), dice.uniform(0.0, 2.0 * np.pi)
    for i in range(num):
        radius, span = light.radius * (1.3 + 0.7 * i + dice.uniform(0.0, 0.4)), dice.uniform(1.0, 2.0)
        start = side + np.pi * (i % 2) - span / 2
        parts.draw_arc(scene, place, fluxes / np.float32(num), radius=radius, width=0.07 * radius + 0.6, start=start, span=span)


def _away(place: Place, distance: float, direction: float) -> Place:
    return place[0] + float(distance * np.cos(direction)), place[1] + float(distance * np.sin(direction))
