"""The ten classes: their distributions of brightness, size and colour, and how each is drawn from components."""

from dataclasses import dataclass, replace

import numpy as np

from galaxydist.surveys.simulate import components
from galaxydist.surveys.simulate.components import Arms, Array, Ellipse, Position, Scene
from galaxydist.surveys.simulate.observation import DECAM_PIXEL, to_fluxes
from galaxydist.surveys.simulate.random_draws import Draws

(DISTURBED, MERGING, ROUND, IN_BETWEEN, CIGAR, BARRED, TIGHT_SPIRAL, LOOSE_SPIRAL, EDGE_ON, EDGE_ON_BULGE) = range(10)

# Galaxies with a larger half-light radius (pixels of 0.262 arcsec) are shown at twice the pixel scale, as in Galaxy10.
_LARGE = 48.0


@dataclass(frozen=True, slots=True)
class ClassDistribution:
    """Distribution of a class: r magnitude, half-light radius (0.262-arcsec pixels; slope and scatter in dex), g-r."""

    magnitude: float
    magnitude_sigma: float
    size: float
    size_slope: float
    size_sigma: float
    colour: float
    colour_sigma: float


# Medians and scatters measured (isophotal, in the unstretched images) on the first 50 rows of each class of the real sample, the
# half used for tuning. They agree with the literature: early types red at g-r = 0.9, late types 0.4 ... 0.7 (Strateva et al.
# 2001, AJ 122, 1861; z = 0.1), sizes that grow with luminosity (Shen et al. 2003, MNRAS 343, 978).
POPULATIONS = (
    ClassDistribution(17.2, 0.95, 13.0, -0.14, 0.13, 0.62, 0.19),
    ClassDistribution(17.0, 0.75, 8.5, -0.20, 0.10, 0.90, 0.16),
    ClassDistribution(17.3, 0.75, 7.0, -0.22, 0.09, 0.86, 0.17),
    ClassDistribution(18.2, 0.70, 5.0, -0.14, 0.08, 0.66, 0.15),
    ClassDistribution(17.7, 0.75, 10.0, -0.15, 0.09, 0.65, 0.13),
    ClassDistribution(16.2, 0.80, 21.0, -0.16, 0.08, 0.78, 0.12),
    ClassDistribution(16.6, 0.60, 20.0, -0.15, 0.10, 0.73, 0.12),
    ClassDistribution(17.0, 0.70, 13.0, -0.18, 0.11, 0.66, 0.15),
    ClassDistribution(16.95, 0.95, 18.5, -0.15, 0.12, 0.63, 0.14),
    ClassDistribution(17.1, 0.75, 14.5, -0.20, 0.10, 0.89, 0.12),
)


@dataclass(frozen=True, slots=True)
class Light:
    """Observed photometry of one galaxy.

    Attributes:
        magnitude: total r magnitude.
        green_red, red_z: total colours g-r and r-z, magnitudes.
        radius: half-light radius, pixels of ``pixel_scale``.
        pixel_scale: arcsec per pixel of the image.
        redshift: redshift of the galaxy.
    """

    magnitude: float
    green_red: float
    red_z: float
    radius: float
    pixel_scale: float
    redshift: float

    def at_scale(self, pixel_scale: float) -> "Light":
        """Return the same galaxy at another pixel scale (arcsec per pixel)."""
        return replace(self, radius=self.radius * self.pixel_scale / pixel_scale, pixel_scale=pixel_scale)

    def fluxes(self, share: float = 1.0, redder: float = 0.0) -> Array:
        """Return g, r, z fluxes (nanomaggies) of ``share`` of the r light, ``redder`` mag in g-r (0.7 of that in r-z)."""
        green_red, red_z = self.green_red + redder, self.red_z + 0.7 * redder
        magnitudes = [self.magnitude + green_red, self.magnitude, self.magnitude - red_z]
        return np.float32(share) * to_fluxes(magnitudes)


def draw_light(draws: Draws, label: int) -> Light:
    """Draw brightness, colours, size and redshift of a galaxy of this class.

    Redshifts follow the Galaxy Zoo sample (median 0.08 at r = 17, larger for fainter galaxies). Colours redden with redshift by
    the k-correction, which is larger for red galaxies (Chilingarian et al. 2010, MNRAS 405, 1409: in g-r about 1.6 z for red and
    0.6 z for blue galaxies).
    """
    population = POPULATIONS[label]
    off = draws.normal(0.0, 1.0) * population.magnitude_sigma
    magnitude = float(np.clip(population.magnitude + off, 14.2, 19.8))
    redshift = float(np.clip(0.08 * 10 ** (0.11 * (magnitude - 17.0) + draws.normal(0.0, 0.16)), 0.004, 0.3))
    reddening = (1.6 if population.colour > 0.8 else 0.7) * (redshift - 0.08)
    colour_sigma = population.colour_sigma
    green_red = float(np.clip(population.colour + reddening + draws.normal(0.0, 0.85 * colour_sigma), 0.15, 1.35))
    red_z = 0.03 + 0.66 * green_red + draws.normal(0.0, 0.02)
    log_size = (
        np.log10(population.size)
        + population.size_slope * (magnitude - population.magnitude)
        + draws.normal(0.0, population.size_sigma)
    )
    radius = float(np.clip(10**log_size, 2.5, 110.0))
    coarser = 2.0 if radius > _LARGE else 1.0
    return Light(magnitude, green_red, red_z, radius / coarser, DECAM_PIXEL * coarser, redshift)


# Intrinsic axis ratio of a disc (Holmberg 1958), the usual value for inclinations.
_DISC_THICKNESS = 0.2
# Half-light radius of an exponential disc, in scale lengths.
_HALF_LIGHT = 1.678

# Ranges of pitch angles in degrees of tightly and loosely wound arms.
TIGHT_PITCH = (7.0, 16.0)
LOOSE_PITCH = (17.0, 38.0)


def inclined(draws: Draws, least: float) -> float:
    """Return the axis ratio of a disc at a random inclination (cos i uniform in least ... 1), after Hubble (1926)."""
    cos = draws.uniform(least, 1.0)
    return float(np.sqrt(cos**2 * (1.0 - _DISC_THICKNESS**2) + _DISC_THICKNESS**2))


def draw_smooth(scene: Scene, draws: Draws, light: Light, label: int, position: Position) -> None:
    """Draw a smooth galaxy (round, in-between or cigar-shaped): a Sersic profile, for some with an outer envelope."""
    axis_ratio, index = {
        ROUND: (draws.uniform(0.80, 1.0), float(np.exp(draws.normal(np.log(2.4), 0.45)))),
        IN_BETWEEN: (float(np.clip(draws.normal(0.58, 0.06), 0.45, 0.72)), float(np.exp(draws.normal(np.log(1.5), 0.35)))),
        CIGAR: (float(np.clip(draws.normal(0.34, 0.05), 0.2, 0.45)), float(np.exp(draws.normal(np.log(1.0), 0.25)))),
    }[label]
    index = float(np.clip(index, 0.6, 5.5))
    at = Ellipse(*position, draws.uniform(0.0, np.pi), axis_ratio)
    boxiness = float(np.clip(draws.normal(2.0, 0.1), 1.8, 2.4))
    outer = draws.uniform(0.1, 0.4) if draws.bernoulli(0.35) and label != CIGAR else 0.0
    components.draw_sersic(scene, at, light.radius, index, light.fluxes(1.0 - outer, 0.02), boxiness=boxiness)
    if outer:
        halo = Ellipse(*position, at.angle + draws.normal(0.0, 0.2), min(axis_ratio * 1.1, 1.0))
        components.draw_sersic(scene, halo, light.radius * draws.uniform(1.5, 2.5), 1.0, light.fluxes(outer, -0.05))


def draw_spiral(scene: Scene, draws: Draws, light: Light, label: int, position: Position) -> None:
    """Draw a spiral: a disc with logarithmic arms, a redder bulge and knots of young stars; arms start at the ends of a bar.

    Tight and loose pitch angles follow Kennicutt (1981, AJ 86, 1847) and Seigar & James (1998, MNRAS 299, 685), from Sa to Sd.
    The half-length of a bar is 1 ... 1.8 scale lengths (Erwin 2005, MNRAS 364, 283, has 0.4 ... 2.5 from late to early types).
    """
    at = Ellipse(*position, draws.uniform(0.0, np.pi), inclined(draws, 0.45 if label == BARRED else 0.32))
    scale = light.radius / _HALF_LIGHT * 1.1
    if label == BARRED:
        _draw_barred(scene, draws, light, at, scale)
        return
    tight = label == TIGHT_SPIRAL
    bulge = float(np.clip(draws.normal(0.18, 0.09), 0.02, 0.5))
    # A lens: a bright, redder inner disc inside the arms, on which they have little contrast (Kormendy 1979, ApJ 227, 714).
    lens = draws.uniform(0.1, 0.35) if draws.bernoulli(0.3 if tight else 0.5) else 0.0
    ring = draws.uniform(0.04, 0.15) if draws.bernoulli(0.15) else 0.0
    scale *= 1.0 + 0.8 * lens
    knots = draws.uniform(0.0, 0.06) if tight else draws.uniform(0.0, 0.12)
    arms, redder = draw_arms(draws, tight), draws.uniform(0.05, 0.3)
    disc = light.fluxes(1.0 - bulge - lens - ring - knots, -redder * (bulge + lens))
    components.draw_disc(scene, draws, at, scale, disc, arms=arms, lopsided=draws.uniform(0.0, 0.15 if tight else 0.4))
    components.draw_knots(scene, draws, at, scale, light.fluxes(knots), num=draws.integer(6, 40), arms=arms)
    if lens:
        inner = replace(at, axis_ratio=min(1.0, at.axis_ratio * draws.uniform(0.9, 1.2)))
        components.draw_sersic(scene, inner, scale * draws.uniform(0.5, 0.9), draws.uniform(0.5, 1.0), light.fluxes(lens, redder))
    if ring:
        components.draw_ring(scene, at, scale * draws.uniform(1.0, 2.2), max(1.0, 0.25 * scale), light.fluxes(ring, -0.1))
    components.draw_sersic(
        scene, _bulge_of(at), scale * draws.uniform(0.25, 0.5), draws.uniform(1.0, 3.0), light.fluxes(bulge, redder)
    )


def draw_arms(draws: Draws, tight: bool) -> Arms:
    """Draw random parameters for the arms of an unbarred spiral."""
    if tight:
        num, pitch = (2, 3, 4, 5, 6)[draws.pick((0.45, 0.20, 0.15, 0.10, 0.10))], draws.uniform(*TIGHT_PITCH)
        share, sharpness, ragged = draws.uniform(0.15, 0.7), draws.uniform(0.7, 2.2), draws.uniform(0.3, 1.0)
    else:
        num, pitch = (1, 2, 3, 4)[draws.pick((0.15, 0.55, 0.18, 0.12))], draws.uniform(*LOOSE_PITCH)
        share, sharpness, ragged = draws.uniform(0.3, 0.92), draws.uniform(0.7, 2.6), draws.uniform(0.4, 1.3)
    return Arms(
        num=num,
        pitch=float(np.radians(pitch)),
        sense=1 if draws.bernoulli(0.5) else -1,
        phase=draws.uniform(0.0, 2.0 * np.pi),
        sharpness=sharpness,
        share=share,
        ragged=ragged,
        broken=draws.uniform(0.05, 0.6),
        inner=draws.uniform(0.25, 0.6),
    )


def _draw_barred(scene: Scene, draws: Draws, light: Light, at: Ellipse, scale: float) -> None:
    bulge, bar = draws.uniform(0.05, 0.18), draws.uniform(0.1, 0.25)
    length, turn = scale * draws.uniform(0.9, 1.8), draws.uniform(0.0, np.pi)
    ring = draws.uniform(0.05, 0.18) if draws.bernoulli(0.5) else 0.0
    # Many bars lie in a lens of their own size (Kormendy 1979, ApJ 227, 714).
    lens = draws.uniform(0.1, 0.25) if draws.bernoulli(0.4) else 0.0
    scale *= 1.0 + 0.5 * lens
    redder = draws.uniform(0.05, 0.2)
    sense, pitch = (1 if draws.bernoulli(0.5) else -1), float(np.radians(draws.uniform(10.0, 30.0)))
    arms = Arms(
        num=2,
        pitch=pitch,
        sense=sense,
        # The arms pass through the ends of the bar.
        phase=2.0 * float(sense * turn - np.log(length / scale) / np.tan(pitch)),
        sharpness=draws.uniform(0.8, 2.2),
        share=draws.uniform(0.08, 0.6),
        ragged=draws.uniform(0.1, 0.8),
        broken=draws.uniform(0.0, 0.35),
        inner=length / scale,
    )
    disc = light.fluxes(1.0 - bulge - bar - ring - lens, -redder * (bulge + bar + lens))
    components.draw_disc(scene, draws, at, scale, disc, arms=arms, lopsided=draws.uniform(0.0, 0.15))
    components.draw_bar(scene, at, light.fluxes(bar, redder), length=length, thickness=draws.uniform(0.15, 0.42), turn=turn)
    if lens:
        components.draw_sersic(scene, at, length * draws.uniform(0.55, 0.8), 0.6, light.fluxes(lens, redder))
    if ring:
        components.draw_ring(scene, at, length * draws.uniform(1.0, 1.15), max(1.0, 0.15 * length), light.fluxes(ring, -0.1))
    components.draw_knots(scene, draws, at, scale, light.fluxes(draws.uniform(0.0, 0.04)), num=draws.integer(0, 20), arms=arms)
    centre = light.fluxes(bulge, redder + 0.05)
    components.draw_sersic(scene, _bulge_of(at), scale * draws.uniform(0.2, 0.35), draws.uniform(1.0, 2.5), centre)


def _bulge_of(disc: Ellipse) -> Ellipse:
    return Ellipse(disc.x, disc.y, disc.angle, 1.0 - 0.6 * (1.0 - disc.axis_ratio))


def draw_edge_on(scene: Scene, draws: Draws, light: Light, bulge: bool, position: Position) -> None:
    """Draw an edge-on disc with or without a bulge; some without are inclined late spirals that are not quite edge-on.

    Scale heights are 1/8 ... 1/3 of the scale length, as for thin and thick discs together (Kregel, van der Kruit & de Grijs
    2002, MNRAS 334, 646).
    """
    at = Ellipse(*position, draws.uniform(0.0, np.pi), 1.0)
    if bulge:
        length = light.radius / 1.35
        share, redder = draws.uniform(0.22, 0.5), draws.uniform(0.0, 0.1)
        round_part, boxiness = Ellipse(*position, at.angle, draws.uniform(0.5, 0.9)), draws.uniform(1.9, 2.6)
        radius, index = length * draws.uniform(0.3, 0.5), draws.uniform(1.5, 3.5)
        components.draw_sersic(scene, round_part, radius, index, light.fluxes(share, redder), boxiness=boxiness)
        disc, height = light.fluxes(1.0 - share, -redder * share), length * draws.uniform(0.18, 0.36)
        dust, warp = (draws.uniform(0.5, 2.5) if draws.bernoulli(0.4) else 0.0), draws.normal(0.0, 0.05)
        components.draw_edge_on(scene, draws, at, disc, length=length, height=height, dust=dust, warp=warp)
        return
    if draws.bernoulli(0.35):
        tilted, scale = Ellipse(*position, at.angle, draws.uniform(0.16, 0.36)), light.radius / _HALF_LIGHT * 1.15
        arms, knots = draw_arms(draws, tight=False), draws.uniform(0.0, 0.12)
        components.draw_disc(scene, draws, tilted, scale, light.fluxes(1.0 - knots), arms=arms, lopsided=draws.uniform(0.0, 0.4))
        components.draw_knots(scene, draws, tilted, scale, light.fluxes(knots), num=draws.integer(5, 30), arms=arms)
        return
    length, knots = light.radius / 1.45, draws.uniform(0.0, 0.06)
    height, disc = length * draws.uniform(0.12, 0.28), light.fluxes(1.0 - knots)
    dust, warp = (draws.uniform(0.2, 1.5) if draws.bernoulli(0.3) else 0.0), draws.normal(0.0, 0.08)
    components.draw_edge_on(scene, draws, at, disc, length=length, height=height, dust=dust, warp=warp)
    flat = Ellipse(*position, at.angle, 0.05)
    components.draw_knots(scene, draws, flat, length, light.fluxes(knots), num=draws.integer(3, 20))


# Classes that result from encounters: merging and disturbed galaxies.


def draw_merging(scene: Scene, draws: Draws, light: Light, position: Position) -> None:
    """Draw two (rarely three) overlapping galaxies, some with a common envelope, some with a tidal tail.

    Mass ratios are those of major mergers, down to about 1:4 (Lotz et al. 2008, MNRAS 391, 1137).
    """
    num = 3 if draws.bernoulli(0.12) else 2
    shares = 10.0 ** (-0.4 * np.array([0.0] + [abs(draws.normal(0.0, 0.8)) for _ in range(num - 1)]))
    envelope = draws.uniform(0.08, 0.35) if draws.bernoulli(0.6) else 0.0
    shares *= (1.0 - envelope) / shares.sum()
    direction = draws.uniform(0.0, 2.0 * np.pi)
    member = position
    for i, share in enumerate(shares):
        if i:
            distance = light.radius * np.exp(draws.normal(np.log(2.4), 0.45)) + 5.0
            direction += draws.normal(0.0, 0.8)
            member = _away(position, distance, direction)
        other = draws.normal(0.0, 0.12)
        part = replace(
            light,
            magnitude=light.magnitude - 2.5 * np.log10(share),
            radius=max(light.radius * share**0.5 * draws.uniform(0.6, 1.0), 2.0),
            green_red=light.green_red + other,
            red_z=light.red_z + 0.66 * other,
        )
        _draw_member(scene, draws, part, member)
    if envelope:
        middle = ((position[0] + member[0]) / 2, (position[1] + member[1]) / 2)
        halo = Ellipse(*middle, direction, draws.uniform(0.5, 0.9))
        components.draw_sersic(scene, halo, light.radius * draws.uniform(2.0, 3.5), 1.0, light.fluxes(envelope))
    if draws.bernoulli(0.45):
        draw_tail(scene, draws, light, position, light.fluxes(draws.uniform(0.04, 0.15), -0.1))


def _draw_member(scene: Scene, draws: Draws, light: Light, position: Position) -> None:
    kind = draws.pick((0.32, 0.28, 0.20, 0.20))
    if kind == 0:
        draw_smooth(scene, draws, light, ROUND, position)
    elif kind == 1:
        draw_smooth(scene, draws, light, IN_BETWEEN, position)
    elif kind == 2:
        draw_spiral(scene, draws, light, TIGHT_SPIRAL if draws.bernoulli(0.5) else LOOSE_SPIRAL, position)
    else:
        draw_edge_on(scene, draws, light, draws.bernoulli(0.8), position)


def draw_tail(scene: Scene, draws: Draws, light: Light, position: Position, fluxes: Array) -> None:
    """Draw a tidal tail that leaves a galaxy at its edge and bends away (Toomre & Toomre 1972, ApJ 178, 623)."""
    direction, sense = draws.uniform(0.0, 2.0 * np.pi), 1.0 if draws.bernoulli(0.5) else -1.0
    bend = light.radius * float(np.exp(draws.uniform(np.log(0.9), np.log(4.5))))
    # The circle passes near the centre, so that the tail starts inside the galaxy.
    middle = _away(position, 0.6 * light.radius - bend, direction)
    width, span = light.radius * draws.uniform(0.12, 0.5), sense * draws.uniform(0.8, 3.2) * min(1.0, 2.5 * light.radius / bend)
    components.draw_arc(scene, middle, fluxes, radius=bend, width=width, start=direction, span=span)


def draw_disturbed(scene: Scene, draws: Draws, light: Light, position: Position) -> None:
    """Draw a galaxy after an encounter: a lopsided disc with tidal tails, shells or a plume.

    Lopsided discs: Rix & Zaritsky (1995, ApJ 447, 82).
    """
    at = Ellipse(*position, draws.uniform(0.0, np.pi), inclined(draws, 0.15))
    early = draws.bernoulli(0.4)
    debris, knots = draws.uniform(0.12, 0.4), (0.0 if early else draws.uniform(0.0, 0.12))
    core = draws.uniform(0.5, 0.75) if early else draws.uniform(0.08, 0.3)
    scale = light.radius / 2.0
    disc = light.fluxes(max(1.0 - core - debris - knots, 0.05), -0.05)
    arms = draw_arms(draws, tight=False) if not early and draws.bernoulli(0.4) else None
    components.draw_disc(scene, draws, at, scale, disc, arms=arms, lopsided=draws.uniform(0.3, 0.95))
    shift = draws.normals(2) * 0.2 * scale
    rounder = Ellipse(position[0] + shift[0], position[1] + shift[1], at.angle, 0.5 + 0.5 * at.axis_ratio)
    components.draw_sersic(scene, rounder, scale * (0.9 if early else 0.4), draws.uniform(1.5, 3.5), light.fluxes(core, 0.05))
    components.draw_knots(scene, draws, at, scale, light.fluxes(knots), num=draws.integer(3, 15))
    if draws.bernoulli(0.4):  # old debris around the galaxy, off its centre
        cloud = draws.uniform(0.2, 0.6) * debris
        debris -= cloud
        beside = _away(position, light.radius * draws.uniform(0.2, 1.0), draws.uniform(0.0, 2.0 * np.pi))
        spread = Ellipse(*beside, draws.uniform(0.0, np.pi), draws.uniform(0.4, 1.0))
        components.draw_sersic(scene, spread, light.radius * draws.uniform(1.2, 2.5), 0.7, light.fluxes(cloud, -0.05))
    kind = draws.pick((0.65, 0.20, 0.15))
    if kind == 0:
        tails = 2 if draws.bernoulli(0.35) else 1
        for _ in range(tails):
            draw_tail(scene, draws, light, position, light.fluxes(debris / tails, -0.08 if not early else 0.0))
    elif kind == 1:
        _draw_shells(scene, draws, light, position, light.fluxes(debris))
    else:
        lean = draws.uniform(0.0, 2.0 * np.pi)
        beside = _away(position, light.radius * draws.uniform(0.8, 1.8), lean)
        plume = Ellipse(*beside, lean + draws.normal(0.0, 0.5), draws.uniform(0.3, 0.7))
        components.draw_sersic(scene, plume, light.radius * draws.uniform(0.7, 1.3), 0.7, light.fluxes(debris, -0.05))


def _draw_shells(scene: Scene, draws: Draws, light: Light, position: Position, fluxes: Array) -> None:
    """Draw shells on alternate sides at growing radii (Malin & Carter 1983, ApJ 274, 534)."""
    num, side = draws.integer(2, 3), draws.uniform(0.0, 2.0 * np.pi)
    for i in range(num):
        radius, span = light.radius * (1.3 + 0.7 * i + draws.uniform(0.0, 0.4)), draws.uniform(1.0, 2.0)
        start = side + np.pi * (i % 2) - span / 2
        components.draw_arc(
            scene, position, fluxes / np.float32(num), radius=radius, width=0.07 * radius + 0.6, start=start, span=span
        )


def _away(position: Position, distance: float, direction: float) -> Position:
    return position[0] + float(distance * np.cos(direction)), position[1] + float(distance * np.sin(direction))
