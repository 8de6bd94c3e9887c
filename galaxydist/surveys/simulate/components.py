"""The sky patch, and the components of galaxies drawn on it: bulges, discs with arms, bars, dust, knots and tails."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import gamma, i0e

from galaxydist.surveys.simulate.random_draws import Draws

Array = NDArray[np.float32]

SIZE = 256
# Pixels drawn beyond each image edge, so that the PSF blurs light into the image as well as out of it, and so that the
# wrap-around of the Fourier transform stays outside.
MARGIN = 16
CANVAS = SIZE + 2 * MARGIN
CENTRE = CANVAS / 2 - 0.5


@dataclass(frozen=True, slots=True)
class Window:
    """A rectangle of the scene.

    Attributes:
        rows, columns: slices of the scene.
        x: 1 x W, y: H x 1: pixel coordinates relative to the object's centre.
        whole: True if the square around the object lies completely inside the canvas.
    """

    rows: slice
    columns: slice
    x: Array
    y: Array
    whole: bool

    @property
    def is_empty(self) -> bool:
        """True if the object lies outside the canvas."""
        return self.x.size == 0 or self.y.size == 0

    def turned(self, angle: float) -> tuple[Array, Array]:
        """Return coordinates along and across an axis at this position angle (radians), H x W each."""
        cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        return self.x * cos + self.y * sin, self.y * cos - self.x * sin


class Scene:
    """Surface brightness in g, r, z, nanomaggies per pixel, before the PSF.

    Attributes:
        light_CHW: 3 x CANVAS x CANVAS float32.
        pixel_scale: arcsec per pixel.
    """

    def __init__(self, pixel_scale: float) -> None:
        self.light_CHW = np.zeros((3, CANVAS, CANVAS), np.float32)
        self.pixel_scale = pixel_scale

    def window(self, x: float, y: float, radius: float) -> Window:
        """Return the square of half-width ``radius`` around x, y (pixels from the centre), clipped to the canvas."""
        column, row = CENTRE + x, CENTRE + y
        left, low = max(int(np.floor(column - radius)), 0), max(int(np.floor(row - radius)), 0)
        right = max(min(int(np.ceil(column + radius)) + 1, CANVAS), left)
        high = max(min(int(np.ceil(row + radius)) + 1, CANVAS), low)
        whole = column - radius >= 0 and row - radius >= 0 and column + radius < CANVAS and row + radius < CANVAS
        return Window(
            slice(low, high),
            slice(left, right),
            (np.arange(left, right) - column).astype(np.float32)[None, :],
            (np.arange(low, high) - row).astype(np.float32)[:, None],
            whole,
        )

    def add(self, window: Window, profile_HW: Array, fluxes: Array) -> None:
        """Add a profile whose sum over the whole plane is 1, times the fluxes in g, r, z (nanomaggies)."""
        target = self.light_CHW[:, window.rows, window.columns]
        target += profile_HW * fluxes.astype(np.float32)[:, None, None]

    def dim(self, window: Window, depth_HW: Array, reddening: Array) -> None:
        """Dim the light behind dust by exp(-depth * reddening) in each band."""
        target = self.light_CHW[:, window.rows, window.columns]
        target *= np.exp(-depth_HW * reddening.astype(np.float32)[:, None, None])

    def add_points(self, x: NDArray[np.float64], y: NDArray[np.float64], fluxes_NC: Array) -> None:
        """Add point sources (stars, knots) at x, y pixels from the image centre, distributed over the four nearest pixels."""
        column, row = CENTRE + x, CENTRE + y
        left, low = np.floor(column).astype(int), np.floor(row).astype(int)
        for right in (0, 1):
            for high in (0, 1):
                weight = np.abs(1 - right - (column - left)) * np.abs(1 - high - (row - low))
                ok = (left + right >= 0) & (left + right < CANVAS) & (low + high >= 0) & (low + high < CANVAS)
                for band in range(3):
                    np.add.at(
                        self.light_CHW[band],
                        (low[ok] + high, left[ok] + right),
                        (weight[ok] * fluxes_NC[ok, band]).astype(np.float32),
                    )


# Surface-brightness profiles: pure functions of pixel coordinates, normalised to a total of 1.

# Softens a central cusp to its average over a pixel; in pixels squared.
_CUSP = 0.12


def sersic(u: Array, v: Array, radius: float, axis_ratio: float, index: float, *, boxiness: float = 2.0) -> Array:
    """Return a Sersic (1968) profile: exp(-b (r / R)^(1/n)); n = 1 is an exponential disc, n = 4 a de Vaucouleurs bulge.

    Args:
        u, v: coordinates along and across the major axis.
        radius: half-light radius along the major axis.
        axis_ratio: minor over major axis.
        index: Sersic's n.
        boxiness: exponent of the isophotes: 2 for ellipses, larger for boxy ones (Athanassoula et al. 1990, MNRAS 245, 130).
    """
    if boxiness == 2.0:
        square = u * u + (v / axis_ratio) ** 2
    else:
        square = (np.abs(u) ** boxiness + np.abs(v / axis_ratio) ** boxiness) ** (2.0 / boxiness)
    # Half of the light is within the radius: Ciotti & Bertin (1999, A&A 352, 447), equation 18, good to 1e-4 for n > 0.5.
    b = 2.0 * index - 1.0 / 3.0 + 4.0 / (405.0 * index) + 46.0 / (25515.0 * index**2)
    scaled = (square + np.float32(_CUSP)) * np.float32(1.0 / radius**2)
    profile = np.exp(np.float32(-b) * scaled ** np.float32(0.5 / index))
    total = 2.0 * np.pi * index * radius**2 * axis_ratio * b ** (-2.0 * index) * gamma(2.0 * index)
    return np.asarray(profile / np.float32(total), np.float32)


def edge_on_disc(u: Array, v: Array, length: float, height: float) -> Array:
    """Return an edge-on exponential disc: (R/h) K1(R/h) along, sech^2(z/z0) across.

    van der Kruit & Searle (1981, A&A 95, 105), equation 5. The Bessel function is approximated by x K1(x) = sqrt(1 + pi x / 2)
    exp(-x), exact at both ends and at most 4 % off between. The disc is truncated softly at four scale lengths, as they observe.

    Args:
        u, v: coordinates along and across the disc.
        length: scale length h.
        height: scale height z0.
    """
    x = np.abs(u) / np.float32(length)
    along = np.sqrt(1.0 + np.float32(np.pi / 2) * x) * np.exp(-x) / (1.0 + (x / 4.0) ** 10)
    # sech^2 without overflow
    decay = np.exp(-2.0 * np.abs(v) / np.float32(height))
    across = 4.0 * decay / (1.0 + decay) ** 2
    # integral of x K1(x) over all x is pi, of sech^2 is 2
    return np.asarray(along * across / np.float32(np.pi * length * 2.0 * height), np.float32)


def bar(u: Array, v: Array, length: float, axis_ratio: float) -> Array:
    """Return a flat bar with sharp, squarish ends: a Ferrers (1877) profile (1 - r^2)^n, n = 1.5, superellipse exponent 2.6.

    Args:
        u, v: coordinates along and across the bar.
        length: half of the bar's length.
        axis_ratio: width over length.
    """
    square = (np.abs(u / np.float32(length)) ** 2.6 + np.abs(v / np.float32(length * axis_ratio)) ** 2.6) ** np.float32(2 / 2.6)
    profile = np.maximum(1.0 - square, 0.0) ** np.float32(1.5)
    # a superellipse of exponent 2.6 has an area of 3.42 times the product of its half axes; the mean of (1 - r^2)^1.5 is 0.4
    return np.asarray(profile / np.float32(3.42 * 0.4 * length**2 * axis_ratio), np.float32)


def spiral_arms(theta: Array, log_radius: Array, *, num_arms: int, pitch: float, phase: Array | float, sharpness: float) -> Array:
    """Return logarithmic spiral arms r = r0 exp(theta tan(pitch)), as a factor on the disc with azimuthal mean 1.

    The profile is a von Mises function: exp(k cos(m (theta - ln r / tan(pitch)) - phase)) / I0(k).

    Args:
        theta: azimuth in the disc's plane, radians.
        log_radius: natural logarithm of the radius.
        num_arms: m.
        pitch: pitch angle, radians; small for tightly wound arms.
        phase: rotation of the pattern, radians; an array makes the arms irregular.
        sharpness: k; 0 gives no arms, 3 narrow ones.
    """
    wave = np.cos(np.float32(num_arms) * theta - np.float32(num_arms / np.tan(pitch)) * log_radius - phase)
    return np.asarray(np.exp(np.float32(sharpness) * (wave - 1.0)) / np.float32(i0e(sharpness)), np.float32)


def arc(u: Array, v: Array, *, radius: float, width: float, start: float, span: float) -> Array:
    """Return a tidal tail or shell: light along part of a circle that fades and widens from its start.

    Args:
        u, v: coordinates.
        radius: radius of the circle.
        width: Gaussian sigma at the start; twice that at the end.
        start: azimuth of the start, radians.
        span: length in radians; the sign gives the direction.
    """
    distance = np.hypot(u, v)
    along = np.mod(np.sign(span) * (np.arctan2(v, u) - start), 2.0 * np.pi) / abs(span)
    along = np.where(along > np.pi / abs(span) + 0.5, along - 2.0 * np.pi / abs(span), along)
    sigma = np.float32(width) * (1.0 + np.clip(along, 0.0, 1.5))
    fade = np.exp(-0.5 * (np.minimum(along, 0.0) / 0.08) ** 2 - 0.5 * (np.maximum(along - 0.35, 0.0) / 0.33) ** 2)
    profile = fade * np.exp(-0.5 * ((distance - np.float32(radius)) / sigma) ** 2) / sigma
    return np.asarray(profile / np.float32(abs(span) * radius * np.sqrt(2.0 * np.pi) * 0.76), np.float32)


# Extinction in g, r, z for a depth of 1 in r: Schlafly & Finkbeiner (2011, ApJ 737, 103), table 6 for DECam, R_V = 3.1: 3.237,
# 2.176, 1.217.
REDDENING = np.array([1.49, 1.0, 0.56], np.float32)
# Flux ratio in g, r, z of a young to an old stellar population of equal r flux: bluer by 0.6 in g-r and 0.5 in r-z.
_YOUNG = np.array([1.74, 1.0, 0.63], np.float32)


# x, y in pixels from the image centre.
Position = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Ellipse:
    """Position and orientation: x, y in pixels from the image centre, position angle in radians, minor over major axis."""

    x: float
    y: float
    angle: float
    axis_ratio: float


@dataclass(frozen=True, slots=True)
class Arms:
    """Spiral structure of a disc.

    Attributes:
        num: number of arms.
        pitch: pitch angle, radians.
        sense: +1 or -1, the winding direction.
        phase: rotation of the pattern, radians.
        sharpness: see :func:`spiral_arms`.
        share: fraction of the disc's light that follows the pattern.
        ragged: amplitude of the arms' irregularity, radians of phase.
        broken: amplitude of short, broken arms across the pattern, see :func:`draw_disc`.
        inner: radius at which the arms begin, in scale lengths.
    """

    num: int
    pitch: float
    sense: int
    phase: float
    sharpness: float
    share: float
    ragged: float
    broken: float
    inner: float


def draw_sersic(scene: Scene, at: Ellipse, radius: float, index: float, fluxes: Array, *, boxiness: float = 2.0) -> None:
    """Draw a spheroid or smooth disc of half-light radius ``radius`` pixels and total fluxes in g, r, z."""
    window = scene.window(at.x, at.y, min(8.0 + radius * (3.5 + 2.5 * index), 400.0))
    u, v = window.turned(at.angle)
    profile = sersic(u, v, radius, at.axis_ratio, index, boxiness=boxiness)
    if window.whole:
        profile /= profile.sum()
    scene.add(window, profile, fluxes)


def draw_disc(
    scene: Scene, draws: Draws, at: Ellipse, scale: float, fluxes: Array, *, arms: Arms | None, lopsided: float = 0.0
) -> None:
    """Draw an inclined disc of scale length ``scale`` pixels, with arms bluer than the rest and dust on their inner edge."""
    window = scene.window(at.x, at.y, 7.0 * scale + 6.0)
    if window.is_empty:
        return  # draws nothing, so that later random numbers stay the same
    u, v = window.turned(at.angle)
    v = v / np.float32(at.axis_ratio)
    radius = np.sqrt(u * u + v * v + np.float32(0.1))
    # Most discs steepen in the outer parts (Pohlen & Trujillo 2006, A&A 454, 759): exp(-(r/s)^k) with k = 1 ... 1.6 at the same
    # half-light radius.
    bend = draws.uniform(1.0, 1.6)
    wide = scale * (1.0 + 1.25 * (bend - 1.0))
    base = np.exp(-((radius / np.float32(wide)) ** np.float32(bend)))
    base *= np.float32(bend / (2.0 * np.pi * wide**2 * at.axis_ratio * gamma(2.0 / bend)))
    if lopsided:
        lean = draws.uniform(0.0, 2.0 * np.pi)
        base = base * (1.0 + lopsided * np.tanh(radius / (2 * scale)) * (u * np.cos(lean) + v * np.sin(lean)) / radius)
    if arms is None:
        scene.add(window, base.astype(np.float32), fluxes)
        return
    theta = np.arctan2(v, u) * np.float32(arms.sense)
    log_radius = np.log(radius / np.float32(scale))
    phase = _frayed(draws, theta, log_radius, arms)
    pattern = spiral_arms(theta, log_radius, num_arms=arms.num, pitch=arms.pitch, phase=phase, sharpness=arms.sharpness)
    pattern = np.maximum(pattern * _flocculent(draws, theta, log_radius, arms), 0.0)
    # Arms begin outside the bulge or at the end of the bar.
    begun = 1.0 / (1.0 + np.exp(-(radius / np.float32(scale) - arms.inner) / 0.12))
    strength = np.float32(arms.share) * begun
    smooth = base * (1.0 - strength)
    armed = base * strength * pattern
    share = float(armed.sum() / max(float(base.sum()), 1e-12))
    # Arms are bluer and the rest redder, so that the disc as a whole keeps its colour.
    young: Array = _YOUNG ** np.float32(draws.uniform(0.05, 0.65))
    whole = np.asarray(share * young + (1.0 - share) / young, np.float32)
    scene.add(window, smooth.astype(np.float32), fluxes / (young * whole))
    scene.add(window, armed.astype(np.float32), fluxes * young / whole)
    depth = draws.uniform(0.0, 0.5)
    inner_edge = phase - np.float32(0.9)
    lane = spiral_arms(theta, log_radius, num_arms=arms.num, pitch=arms.pitch, phase=inner_edge, sharpness=2.5 * arms.sharpness)
    scene.dim(
        window,
        (depth * 0.35 * begun * np.minimum(lane, 3.0) * np.exp(-radius / np.float32(2.0 * scale))).astype(np.float32),
        REDDENING,
    )


def _frayed(draws: Draws, theta: Array, log_radius: Array, arms: Arms) -> Array:
    """Return a phase that varies over the disc, so that arms bend, fork and fade like real ones."""
    phase = np.full(theta.shape, arms.phase, np.float32)
    for order in (1, 2, 3):
        amplitude = arms.ragged * draws.normal(0.0, 0.9) / order**0.5
        turn, wind = draws.uniform(0.0, 2.0 * np.pi), draws.normal(0.0, 2.0)
        phase += np.float32(amplitude) * np.cos(np.float32(order) * theta + np.float32(wind) * log_radius + np.float32(turn))
    return phase


def _flocculent(draws: Draws, theta: Array, log_radius: Array, arms: Arms) -> Array:
    """Return a factor for short, broken arms (Elmegreen & Elmegreen 1982, MNRAS 201, 1021): interfering many-armed waves."""
    waves = np.zeros(theta.shape, np.float32)
    for _ in range(4):
        num = draws.integer(3, 11)
        wind = num / np.tan(np.clip(arms.pitch * draws.uniform(0.9, 2.2), 0.2, 1.2))
        waves += np.cos(np.float32(num) * theta - np.float32(wind) * log_radius + np.float32(draws.uniform(0.0, 2.0 * np.pi)))
    return np.asarray(1.0 + np.float32(arms.broken) * waves, np.float32)


def draw_knots(
    scene: Scene, draws: Draws, at: Ellipse, scale: float, fluxes: Array, *, num: int, arms: Arms | None = None
) -> None:
    """Draw star-forming knots (HII regions): blue points with power-law brightnesses, along the arms if there are any."""
    if num == 0:
        return
    weight = draws.uniforms(num) ** -0.6
    radius = scale * (0.5 + np.sqrt(-np.log(1.0 - 0.95 * draws.uniforms(num))) * 1.5)
    theta = 2.0 * np.pi * draws.uniforms(num)
    if arms is not None:
        arm = np.floor(arms.num * draws.uniforms(num)) / arms.num * 2.0 * np.pi
        theta = arms.sense * (
            np.log(radius / scale) / np.tan(arms.pitch) + arms.phase / arms.num + arm + 0.2 * draws.normals(num)
        )
    u, v = radius * np.cos(theta), radius * np.sin(theta) * at.axis_ratio
    x = at.x + u * np.cos(at.angle) - v * np.sin(at.angle)
    y = at.y + u * np.sin(at.angle) + v * np.cos(at.angle)
    scene.add_points(x, y, (weight / weight.sum())[:, None].astype(np.float32) * (fluxes * _YOUNG**1.3))


def draw_bar(scene: Scene, at: Ellipse, fluxes: Array, *, length: float, thickness: float, turn: float) -> None:
    """Draw a bar of half-length ``length`` pixels in the plane of an inclined disc, ``turn`` radians from its major axis."""
    window = scene.window(at.x, at.y, length * 1.1 + 3.0)
    u, v = window.turned(at.angle)
    v = v / np.float32(max(at.axis_ratio, 0.3))
    cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    profile = bar(u * cos + v * sin, v * cos - u * sin, length, thickness)
    if window.whole:
        profile /= max(float(profile.sum()), 1e-9)
    else:
        profile /= np.float32(at.axis_ratio)
    scene.add(window, profile, fluxes)


def draw_ring(scene: Scene, at: Ellipse, radius: float, width: float, fluxes: Array) -> None:
    """Draw a ring in a disc's plane (bars gather gas into a ring at their resonance)."""
    window = scene.window(at.x, at.y, radius + 4.0 * width + 2.0)
    u, v = window.turned(at.angle)
    distance = np.hypot(u, v / np.float32(at.axis_ratio)) - np.float32(radius)
    profile = np.exp(-0.5 * (distance / np.float32(width)) ** 2) / np.float32((2 * np.pi) ** 1.5 * radius * width * at.axis_ratio)
    scene.add(window, profile.astype(np.float32), fluxes)


def draw_edge_on(
    scene: Scene, draws: Draws, at: Ellipse, fluxes: Array, *, length: float, height: float, dust: float, warp: float
) -> None:
    """Draw an edge-on disc: scale length and height in pixels, a dust lane of depth ``dust``, bent by ``warp``."""
    window = scene.window(at.x, at.y, 7.0 * length + 4.0)
    if window.is_empty:
        return  # draws nothing, so that later random numbers stay the same
    u, v = window.turned(at.angle)
    v = v - np.float32(warp / (9.0 * length)) * u * u - np.float32(draws.normal(0.0, 0.3) * abs(warp) / (60.0 * length**2)) * u**3
    profile = edge_on_disc(u, v, length, height)
    unevenness = (
        1.0
        + 0.25 * draws.normal() * np.tanh(u / np.float32(2.0 * length))
        + 0.15 * np.cos(u / np.float32(length) * draws.uniform(1.5, 4.0))
    )
    scene.add(window, (profile * unevenness).astype(np.float32), fluxes)
    if dust:
        # The lane lies off the midplane unless the disc is exactly edge-on.
        offset = np.float32(height * draws.uniform(-0.5, 0.5))
        lane = np.exp(-np.abs(u) / np.float32(1.6 * length) - 0.5 * ((v - offset) / np.float32(0.45 * height)) ** 2)
        scene.dim(window, (dust * lane).astype(np.float32), REDDENING)


def draw_arc(scene: Scene, position: Position, fluxes: Array, *, radius: float, width: float, start: float, span: float) -> None:
    """Draw a tail or shell: part of a circle around ``position``, see :func:`arc`."""
    window = scene.window(*position, radius + 5.0 * width)
    u, v = window.turned(0.0)
    scene.add(window, arc(u, v, radius=radius, width=width, start=start, span=span), fluxes)
