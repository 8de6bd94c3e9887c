"""Single pass over the images of a sample: statistics, hashes, thumbnails and odd images.

Memory is a few batches of images, and some numbers and a thumbnail per galaxy.
"""

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby, islice, repeat

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from galaxydist.cpus import available_cores
from galaxydist.explore.checks import odd_kinds, perceptual_hash
from galaxydist.explore.datasets import ExploredImage
from galaxydist.surveys.photometry import measure_images

THUMBNAIL = 64
# Width of the mean images in pixels; smaller images keep their own width.
MEAN_WIDTH = 128
_BATCH = 32


@dataclass(frozen=True, slots=True)
class ImageScan:
    """Measurements of n readable images, in the order of ``rows``.

    Args:
        rows: (n,) rows of the data set.
        ids: names of the galaxies.
        labels: (n,) class numbers.
        size_n, brightness_n, sky_n: see :mod:`galaxydist.surveys.photometry`; nan where the image is too small to measure.
        colour_n: -2.5 log10 of blue over red light above the sky in the galaxy's centre; nan without such light.
        hash_nB: (n, 8) uint8 perceptual hashes.
        digests: hashes of the pixels, equal for identical images.
        thumbnails_nHWC: (n, 64, 64, 3) uint8.
        widths_n: of the images, in pixels.
        odd_images: kind of odd image -> indices (0 ... n-1).
        histograms: label -> (3, 256) numbers of pixels.
        means: label -> H x W x 3 mean image, full scale 255.
        problems: id -> the reason why the image could not be read.
    """

    rows: NDArray[np.int64]
    ids: list[str]
    labels: NDArray[np.int64]
    size_n: NDArray[np.float64]
    brightness_n: NDArray[np.float64]
    sky_n: NDArray[np.float64]
    colour_n: NDArray[np.float64]
    hash_nB: NDArray[np.uint8]
    digests: list[bytes]
    thumbnails_nHWC: NDArray[np.uint8]
    widths_n: NDArray[np.int64]
    odd_images: dict[str, list[int]]
    histograms: dict[int, NDArray[np.int64]]
    means: dict[int, NDArray[np.float64]]
    problems: dict[str, str]

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, slots=True)
class _ImageStats:
    """Measurements of one image."""

    numbers: tuple[float, ...]  # size, brightness, sky, colour, width
    hash_B: NDArray[np.uint8]
    digest: bytes
    thumbnail_HWC: NDArray[np.uint8]
    small_HWC: NDArray[np.uint8]
    histogram_CL: NDArray[np.int64]
    odd_kinds: tuple[str, ...]


def scan_images(images: Iterable[ExploredImage], labels_N: NDArray[np.int64], number: int) -> ImageScan:
    """Measure images on all cores.

    Args:
        images: read lazily.
        labels_N: of the data set, by row.
        number: number of images, for the progress bar.
    """
    from tqdm import tqdm

    scanned: list[tuple[ExploredImage, _ImageStats]] = []
    problems: dict[str, str] = {}
    histograms, totals = dict[int, NDArray[np.int64]](), dict[int, NDArray[np.float64]]()
    width, cores = 0, available_cores()
    with ThreadPoolExecutor(cores) as pool, tqdm(total=number, desc="scan images", unit="img", disable=None) as bar:
        for window in _chunks(iter(images), cores * _BATCH):
            problems |= {image.id: image.problem for image in window if image.image is None}
            readable = [image for image in window if image.image is not None]
            if readable and not width:
                width = min(MEAN_WIDTH, *_shape(readable[0])[:2])
            by_shape = groupby(sorted(readable, key=_shape), _shape)
            batches = [batch for _, same in by_shape for batch in _chunks(same, _BATCH)]
            for batch, ones in zip(batches, pool.map(_measure, batches, repeat(width)), strict=True):
                for image, one in zip(batch, ones, strict=True):
                    label = int(labels_N[image.row])
                    histograms[label] = histograms.get(label, 0) + one.histogram_CL
                    totals[label] = totals.get(label, np.zeros(())) + one.small_HWC.astype(np.float64)
                    # Only numbers and thumbnails stay in memory.
                    scanned.append((replace(image, image=None), replace(one, small_HWC=one.thumbnail_HWC)))
            bar.update(len(window))
    scanned.sort(key=lambda pair: pair[0].row)
    rows = np.array([image.row for image, _ in scanned], np.int64)
    columns = np.array([one.numbers for _, one in scanned], np.float64).reshape(len(scanned), 5)
    odd_images: dict[str, list[int]] = {}
    for index, (_, one) in enumerate(scanned):
        for kind in one.odd_kinds:
            odd_images.setdefault(kind, []).append(index)
    labels = labels_N[rows]
    return ImageScan(
        rows=rows,
        ids=[image.id for image, _ in scanned],
        labels=labels,
        size_n=columns[:, 0],
        brightness_n=columns[:, 1],
        sky_n=columns[:, 2],
        colour_n=columns[:, 3],
        widths_n=columns[:, 4].astype(np.int64),
        hash_nB=np.array([one.hash_B for _, one in scanned], np.uint8).reshape(-1, 8),
        digests=[one.digest for _, one in scanned],
        thumbnails_nHWC=np.array([one.thumbnail_HWC for _, one in scanned], np.uint8).reshape(-1, THUMBNAIL, THUMBNAIL, 3),
        odd_images=odd_images,
        histograms=histograms,
        means={label: total / (labels == label).sum() for label, total in totals.items()},
        problems=problems,
    )


def _measure(batch: list[ExploredImage], mean_width: int) -> list[_ImageStats]:
    """Measure images of equal shape."""
    images_BHWC = np.stack([image.image for image in batch if image.image is not None])
    measured = measure_images(images_BHWC)
    columns = measured.size_px, measured.brightness, measured.sky
    ones = []
    for image_HWC, size, brightness, sky in zip(images_BHWC, *columns, strict=True):
        histogram_CL = np.stack([np.bincount(image_HWC[..., channel].ravel(), minlength=256) for channel in range(3)])
        kinds = odd_kinds(image_HWC)
        if not kinds and np.isfinite(sky) and np.isnan(size):
            kinds = ["nothing there"]
        colour = _colour(image_HWC, size, histogram_CL)
        numbers = (size, brightness, sky, colour, image_HWC.shape[1])
        ones.append(
            _ImageStats(
                numbers=tuple(map(float, numbers)),
                hash_B=perceptual_hash(image_HWC),
                digest=hashlib.blake2b(image_HWC.tobytes(), digest_size=16).digest(),
                thumbnail_HWC=_fit(image_HWC, THUMBNAIL),
                small_HWC=_fit(image_HWC, mean_width),
                histogram_CL=histogram_CL,
                odd_kinds=tuple(kinds),
            )
        )
    return ones


def _colour(image_HWC: NDArray[np.uint8], size: float, histogram_CL: NDArray[np.int64]) -> float:
    """Return -2.5 log10 (blue / red light) within the half-light radius, above each channel's median; nan if one has no light.

    In images of the Legacy Surveys blue is the g band and red the z band: the colour resembles g - z, but of stretched light.
    """
    if not np.isfinite(size):
        return np.nan
    (height, width), radius = image_HWC.shape[:2], max(size, 1.5)
    top, left = (max(0, int(length / 2 - radius)) for length in (height, width))
    middle_HWC = image_HWC[top : height - top, left : width - left]
    y_HW, x_HW = np.ogrid[: middle_HWC.shape[0], : middle_HWC.shape[1]]
    inside_HW = np.hypot(y_HW - (middle_HWC.shape[0] - 1) / 2, x_HW - (middle_HWC.shape[1] - 1) / 2) <= radius
    cumulated_CL = histogram_CL.cumsum(axis=1)
    median_C = (cumulated_CL < cumulated_CL[:, -1:] / 2).sum(axis=1)
    light_C = middle_HWC[inside_HW].mean(axis=0) - median_C
    return float(-2.5 * np.log10(light_C[2] / light_C[0])) if min(light_C[0], light_C[2]) > 0 else np.nan


def _fit(image_HWC: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """Return the central square, resized to another width."""
    if image_HWC.shape[:2] == (width, width):
        return image_HWC
    return np.asarray(ImageOps.fit(Image.fromarray(image_HWC), (width, width), Image.Resampling.BOX))


def _shape(image: ExploredImage) -> tuple[int, ...]:
    assert image.image is not None
    return image.image.shape


def _chunks(images: Iterator[ExploredImage], length: int) -> Iterator[list[ExploredImage]]:
    while chunk := list(islice(images, length)):
        yield chunk
