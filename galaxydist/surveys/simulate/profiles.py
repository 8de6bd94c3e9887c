"""Surface-brightness profiles, each normalised to a total of 1: pure functions of coordinates in pixels."""

import numpy as np
from scipy.special import gamma, i0e

from galaxydist.surveys.simulate.scene import Array

# Softens a profile's cusp to what a pixel averages over; pixels, squared.
_CUSP = 0.12


def sersic_b(index: float) -> float:
    """The b of a Sersic profile, so that the half-light radius holds half of the light.

    Ciotti & Bertin (1999, A&A 352, 447), equation 18, good to 1e-4 for n > 0.5.
    """
    return 2.0 * index - 1.0 / 3.0 + 4.0 / (405.0 * index) + 46.0 / (25515.0 * index**2)


def sersic(u: Array, v: Array, radius: float, axis_ratio: float, index: float, *, boxiness: float = 2.0) -> Array:
    """A Sersic (1968) profile: exp(-b (r / R)^(1/n)); n = 1 is an exponential disc, n = 4 de Vaucouleurs' bulge.

    Args:
        u, v: coordinates along and across the major axis.
        radius: half-light radius along the major axis.
        axis_ratio: minor over major axis.
        index: Sersic's n.
        boxiness: exponent of the ellipses, 2 for true ones, more for boxes (Athanassoula et al. 1990, MNRAS 245, 130).
    """
    if boxiness == 2.0:
        square = u * u + (v / axis_ratio) ** 2
    else:
        square = (np.abs(u) ** boxiness + np.abs(v / axis_ratio) ** boxiness) ** (2.0 / boxiness)
    b = sersic_b(index)
    scaled = (square + np.float32(_CUSP)) * np.float32(1.0 / radius**2)
    profile = np.exp(np.float32(-b) * scaled ** np.float32(0.5 / index))
    total = 2.0 * np.pi * index * radius**2 * axis_ratio * b ** (-2.0 * index) * gamma(2.0 * index)
    return np.asarray(profile / np.float32(total), np.float32)


def edge_on_disc(u: Array, v: Array, length: float, height: float) -> Array:
    """An exponential disc seen from its side: (R/h) K1(R/h) along, sech^2(z/z0) across.

    van der Kruit & Searle (1981, A&A 95, 105), equation 5; the Bessel function in the form x K1(x) = sqrt(1 + pi x / 2) exp(-x),
    exact at both ends and 4 % off at most between; cut softly at four scale lengths, as they find discs cut.

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
    """A bar: flat along, sharply ended, with squarish ends (a Ferrers 1877 ellipse (1 - r^2)^n with n = 1.5, exponent 2.6).

    Args:
        u, v: coordinates along and across the bar.
        length: half of the bar's length.
        axis_ratio: across over along.
    """
    square = (np.abs(u / np.float32(length)) ** 2.6 + np.abs(v / np.float32(length * axis_ratio)) ** 2.6) ** np.float32(2 / 2.6)
    profile = np.maximum(1.0 - square, 0.0) ** np.float32(1.5)
    # a superellipse of exponent 2.6 has 3.42 times the product of its half axes; (1 - r^2)^1.5 averages 0.4 over an ellipse
    return np.asarray(profile / np.float32(3.42 * 0.4 * length**2 * axis_ratio), np.float32)


def spiral_arms(theta: Array, log_radius: Array, *, num_arms: int, pitch: float, phase: Array | float, sharpness: float) -> Array:
    """Logarithmic spiral arms r = r0 exp(theta tan(pitch)), as a factor on the disc whose mean over a turn is 1.

    The ridge is von Mises shaped: exp(k cos(m (theta - ln r / tan(pitch)) - phase)) / I0(k).

    Args:
        theta: azimuth in the disc's plane, radians.
        log_radius: natural logarithm of the radius there.
        num_arms: m.
        pitch: pitch angle, radians; small is tightly wound.
        phase: turns the pattern, radians; an array bends and frays the arms.
        sharpness: k; 0 is no arm, 3 a narrow one.
    """
    wave = np.cos(np.float32(num_arms) * theta - np.float32(num_arms / np.tan(pitch)) * log_radius - phase)
    return np.asarray(np.exp(np.float32(sharpness) * (wave - 1.0)) / np.float32(i0e(sharpness)), np.float32)


def arc(u: Array, v: Array, *, radius: float, width: float, start: float, span: float) -> Array:
    """A tidal tail or shell: light along part of a circle, fading and widening from its start.

    Args:
        u, v: coordinates.
        radius: of the circle.
        width: Gaussian sigma at the start; twice that at the end.
        start: azimuth of the start, radians.
        span: length in radians; the sign is the sense.
    """
    distance = np.hypot(u, v)
    along = np.mod(np.sign(span) * (np.arctan2(v, u) - start), 2.0 * np.pi) / abs(span)
    along = np.where(along > np.pi / abs(span) + 0.5, along - 2.0 * np.pi / abs(span), along)
    sigma = np.float32(width) * (1.0 + np.clip(along, 0.0, 1.5))
    fade = np.exp(-0.5 * (np.minimum(along, 0.0) / 0.08) ** 2 - 0.5 * (np.maximum(along - 0.35, 0.0) / 0.33) ** 2)
    profile = fade * np.exp(-0.5 * ((distance - np.float32(radius)) / sigma) ** 2) / sigma
    return np.asarray(profile / np.float32(abs(span) * radius * np.sqrt(2.0 * np.pi) * 0.76), np.float32)
