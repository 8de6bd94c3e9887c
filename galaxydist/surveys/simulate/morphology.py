"""Distributions of brightness, size and colour of each class, and their correlations."""

from dataclasses import dataclass, replace

import numpy as np

from galaxydist.surveys.simulate.observation import DECAM_PIXEL, to_fluxes
from galaxydist.surveys.simulate.random_draws import Draws
from galaxydist.surveys.simulate.scene import Array

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
