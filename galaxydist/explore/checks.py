"""Checks of a data set: duplicate images, overlapping cutouts, conflicting labels and odd images.

Duplicates are found by a perceptual hash and confirmed on thumbnails. The hash (ImageHash's pHash: the signs of the 8 x 8 lowest
frequencies of a 32 x 32 image, relative to their median) also finds compressed or resampled copies. But many galaxies are round
glows on black, so similar hashes or correlated pixels prove little. Pairs of similar hashes therefore count only if the fine
detail of their thumbnails correlates: brightness minus its local mean, which is noise, stars and structure. Copies of small,
noisy images are missed if strong compression removed most of the noise (64 pixels: JPEG below quality 60).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from galaxydist.explore.datasets import ExploredDataset, Positions
from galaxydist.surveys.split import CUTOUT_ARCSEC, SAME_POSITION_ARCSEC, close_pairs, unit_vectors

HASH_DISTANCE = 6
# Measured on real samples (999 of Galaxy10 DECaLS, 1,000 of SDSS): copies at JPEG quality 50 reach 0.94, those resampled to half
# or to 96 pixels 0.89. The maxima of different galaxies are 0.50 in 2,000 pairs with similar hashes, 0.59 in 200,000 other pairs,
# and 0.67 in 20,000 pairs with hashes within 12 bits. The brightness itself correlates up to 0.97 in SDSS.
LEAST_CORRELATION = 0.7
# Weights of red, green and blue, as in JPEG.
_BRIGHTNESS = np.array([0.299, 0.587, 0.114])
# Width in pixels of the square for the local mean.
_SQUARE = 5
# Number of elements that are compared at once.
_BLOCK = 1 << 22


@dataclass(frozen=True, slots=True)
class Pair:
    """Pair of duplicate images.

    Args:
        first, second: indices in the sample.
        distance: Hamming distance of their hashes.
        correlation: of the fine detail of their thumbnails.
        identical: True if all pixels are equal.
    """

    first: int
    second: int
    distance: int
    correlation: float
    identical: bool


def perceptual_hash(image_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the 64 bits of pHash as (8,) uint8.

    Args:
        image_HWC: H x W x 3 uint8.
    """
    import imagehash

    return np.packbits(np.asarray(imagehash.phash(Image.fromarray(image_HWC)).hash))


def find_duplicates(
    hash_nB: NDArray[np.uint8],
    digests: list[bytes],
    thumbnails_nHWC: NDArray[np.uint8],
    *,
    distance: int = HASH_DISTANCE,
) -> list[Pair]:
    """Find pairs of duplicate images, the most similar first.

    Args:
        hash_nB: (n, 8) uint8 perceptual hashes.
        digests: hashes of the pixels.
        thumbnails_nHWC: n x H x W x 3 uint8.
        distance: largest Hamming distance of the perceptual hashes.
    """
    pairs_P2, distance_P = near_hashes(hash_nB, distance)
    correlation_P = _correlations(thumbnails_nHWC, pairs_P2)
    found = []
    for (first, second), apart, alike in zip(pairs_P2.tolist(), distance_P.tolist(), correlation_P.tolist(), strict=True):
        identical = digests[first] == digests[second] and bool(np.ptp(thumbnails_nHWC[first], axis=(0, 1)).any())
        if identical or alike >= LEAST_CORRELATION:
            found.append(Pair(first, second, apart, 1.0 if identical else alike, identical))
    return sorted(found, key=lambda pair: (not pair.identical, -pair.correlation, pair.first, pair.second))


def near_hashes(hash_nB: NDArray[np.uint8], distance: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the indices of all pairs within a Hamming distance, (P, 2), smaller index first, and their distances, (P,).

    All pairs are compared, in blocks of machine words: 10,000 images take a second.

    Args:
        hash_nB: (n, 8) uint8.
    """
    words_n = np.ascontiguousarray(hash_nB).view(np.uint64)[:, 0] if len(hash_nB) else np.empty(0, np.uint64)
    num, height = len(words_n), max(1, _BLOCK // max(len(words_n), 1))
    pairs, distances = [np.empty((0, 2), np.int64)], [np.empty(0, np.int64)]
    for start in range(0, num, height):
        apart_hn = np.bitwise_count(words_n[start : start + height, None] ^ words_n[None, start:])
        rows, columns = np.nonzero(apart_hn <= distance)
        later = columns > rows
        pairs.append(np.stack([rows[later] + start, columns[later] + start], axis=1))
        distances.append(apart_hn[rows[later], columns[later]].astype(np.int64))
    return np.concatenate(pairs), np.concatenate(distances)


def _correlations(thumbnails_nHWC: NDArray[np.uint8], pairs_P2: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the correlations of the pairs' fine detail, (P,); 0 for images without any."""
    parts = [np.empty(0)]
    step = max(1, _BLOCK // max(1, thumbnails_nHWC[:1].size))
    for start in range(0, len(pairs_P2), step):
        detail = [_detail(thumbnails_nHWC[pairs_P2[start : start + step, side]]) for side in (0, 1)]
        product_P = (detail[0] * detail[1]).sum(axis=1)
        norm_P = np.sqrt((detail[0] ** 2).sum(axis=1) * (detail[1] ** 2).sum(axis=1))
        parts.append(np.divide(product_P, norm_P, out=np.zeros(len(norm_P)), where=norm_P > 0))
    return np.concatenate(parts)


def _detail(images_PHWC: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the brightness minus its local mean, (P, D); JPEG preserves fine detail in brightness, but not in colour."""
    from scipy.ndimage import uniform_filter

    brightness = images_PHWC @ _BRIGHTNESS
    return np.asarray(brightness - uniform_filter(brightness, (0, _SQUARE, _SQUARE))).reshape(len(brightness), -1)


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Pairs of galaxies with overlapping cutouts.

    Args:
        pairs_P2: rows of galaxies closer than a cutout's width; pairs of two labels at one position first, then the closest.
        separation_P: arcsec.
        num_galaxies: number of galaxies in these pairs.
        two_labels_P: True if both galaxies are at one position with two labels.
        across_P: True if the galaxies are in different splits, neither of them in the margin.
    """

    pairs_P2: NDArray[np.int64]
    separation_P: NDArray[np.float64]
    num_galaxies: int
    two_labels_P: NDArray[np.bool_]
    across_P: NDArray[np.bool_]


def find_neighbours(population: ExploredDataset, positions: Positions) -> Neighbours:
    """Find the pairs with overlapping cutouts among the galaxies with known positions."""
    pairs_P2 = close_pairs(positions.ra, positions.dec, CUTOUT_ARCSEC)
    first_P, second_P = pairs_P2.T
    # From chord lengths, which are accurate for small angles.
    chords_P3 = np.subtract(*(unit_vectors(positions.ra[rows_P], positions.dec[rows_P]) for rows_P in (first_P, second_P)))
    separation_P = np.degrees(2 * np.arcsin(np.linalg.norm(chords_P3, axis=1) / 2)) * 3600
    two_labels_P = (separation_P <= SAME_POSITION_ARCSEC) & (population.labels_N[first_P] != population.labels_N[second_P])
    across_P = population.are_across(first_P, second_P)
    order = np.lexsort((separation_P, ~two_labels_P))
    return Neighbours(pairs_P2[order], separation_P[order], len(np.unique(pairs_P2)), two_labels_P[order], across_P[order])


# Odd images. Each check is simple and is described on the page.
# Largest span in grey levels (of 255) of a blank image or channel.
_LEAST_SPAN = 2
SATURATED_SHARE = 0.05
REPEATED_SHARE = 0.05

ODD_KINDS = {
    "unreadable": "cannot be read or does not decode",
    "blank": f"blank: all pixels within {_LEAST_SPAN} grey levels of one another",
    "missing channel": f"one channel is constant (within {_LEAST_SPAN} levels) while another is not",
    "saturated": f"more than {100 * SATURATED_SHARE:.0f} % of the pixels are white (255 in a channel)",
    "flat rows": f"more than {100 * REPEATED_SHARE:.0f} % of the rows or of the columns have a single value: a part is missing",
    "repeated rows": f"more than {100 * REPEATED_SHARE:.0f} % of the rows equal the row before: truncated or badly resampled",
    "nothing there": "no source above the sky in the middle of the image",
}


def odd_kinds(image_HWC: NDArray[np.uint8]) -> list[str]:
    """Return the kinds of ``ODD_KINDS`` that the pixels show; a blank image has no other kind.

    Args:
        image_HWC: H x W x 3 uint8.
    """
    channels = [np.ascontiguousarray(image_HWC[..., channel]) for channel in range(3)]  # reducing over a short last axis is slow
    spans = [int(channel_HW.max()) - int(channel_HW.min()) for channel_HW in channels]
    if max(spans) <= _LEAST_SPAN:
        return ["blank"]
    found = []
    if min(spans) <= _LEAST_SPAN:
        found.append("missing channel")
    white_HW = (channels[0] == 255) | (channels[1] == 255) | (channels[2] == 255)
    if white_HW.mean() > SATURATED_SHARE:
        found.append("saturated")
    colour_HW = channels[0].astype(np.uint32) | channels[1].astype(np.uint32) << 8 | channels[2].astype(np.uint32) << 16
    flat_H = (colour_HW == colour_HW[:, :1]).all(axis=1)
    flat_W = (colour_HW == colour_HW[:1]).all(axis=0)
    if max(flat_H.mean(), flat_W.mean()) > REPEATED_SHARE:
        found.append("flat rows")
    repeated = (colour_HW[1:] == colour_HW[:-1]).all(axis=1) & ~flat_H[1:]
    if repeated.sum() > REPEATED_SHARE * len(flat_H):
        found.append("repeated rows")
    return found
