"""Decoding of stored images: positioned reads of local tars, decoded straight into a batch's memory.

Both release the GIL, so that no worker processes are needed. The Python code between them holds it: therefore each thread reads
and decodes its images in one loop, without a call of the pool or an object for each image.
"""

import contextlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from galaxydist.errors import UserError
from galaxydist.shards.manifest import ANY_FILE, Manifest
from galaxydist.shards.remote.prefetcher import LocalShards, ShardSource, open_shard_source
from galaxydist.shards.shard_usage import extend, usage_of_evaluation
from galaxydist.shards.tar import BLOCK, header_key, parse_index
from galaxydist.shards.writer.encode import decode_any_file, raw_header

Pixels = NDArray[np.uint8]


class ImageError(UserError):
    """Error of one image that cannot be read or decoded; with data.on_error=skip only that galaxy is lost.

    Args:
        problem: shard, galaxy and cause.
        hint: advice to the user.
    """

    def __init__(self, problem: str, hint: str) -> None:
        super().__init__(f"{problem}; {hint}")
        self.problem = problem


# Location of a stored image: shard, that of the next image of the batch (-1: there is none), and offset and length of its file.
Location = tuple[int, int, int, int]

# Neighbours in a shard are read at once, with the labels and metadata between them: the largest gap and the most bytes at a time.
LARGEST_GAP, MOST_BYTES = 8192, 1 << 20


def reduction(image_size: int, target_size: int, crop: float, max_zoom: float = 1.0) -> int:
    """Return the factor by which images may be decoded smaller without losing detail that the model sees: 1, 2, 4 or 8.

    libjpeg's reduced decoding is a mean over whole pixels, as is the first step of the antialiasing (``image_ops.antialias``),
    which needs at least 1.5 decoded pixels per pixel of the model, or one at the largest zoom.

    Args:
        image_size: stored width in pixels.
        target_size: width that the model sees.
        crop: central fraction of the stored width that is kept.
        max_zoom: largest magnification of the augmentation.
    """
    for factor in (8, 4, 2):
        if image_size % factor == 0 and crop * image_size / factor >= target_size * max(1.5, max_zoom):
            return factor
    return 1


class ImageDecoder:
    """Reads and decodes the images of one split.

    Args:
        manifest, split: the data set and its split.
        factor: decode by this factor smaller (JPEG only; see :func:`reduction`).
        source: source of the shards, closed with this decoder; None: the manifest's own folder.
    """

    def __init__(self, manifest: Manifest, split: str, factor: int = 1, source: ShardSource | None = None) -> None:
        self._manifest, self._split = manifest, split
        self._factor = factor if manifest.encoding == "jpeg" else 1
        self.size = manifest.image_size // self._factor
        self._shape = self.size, self.size, 3
        smaller = {"min_height": self.size, "min_width": self.size, "min_factor": self._factor} if self._factor > 1 else {}
        self._decode: Callable[..., Pixels] = _decode_png
        if manifest.encoding == "jpeg":
            self._decode = partial(simplejpeg.decode_jpeg, colorspace="RGB", **smaller)
        elif manifest.encoding == ANY_FILE:
            self._decode = partial(_decode_any_file, size=self.size)
        self._is_raw = manifest.encoding == "raw"
        shards = manifest.shards(split)
        self._starts = np.concatenate([[0], np.cumsum(shards["samples"])])
        self._shard_bytes = shards["bytes"]
        self._offsets, self._lengths = manifest.offsets(split), manifest.lengths(split)
        self._source = source or LocalShards(manifest, split)
        self._raw_header = raw_header(manifest.image_size)

    def read(self, samples: NDArray[np.int64], pixels_BHWC: Pixels, first: int = 0) -> dict[int, UserError]:
        """Decode images into the rows of a batch from ``first`` on; may be called from several threads.

        Args:
            samples: stored sample numbers.
            pixels_BHWC: B x ``size`` x ``size`` x 3 uint8, contiguous.
            first: row of the first image.

        Returns:
            The errors by row, whose pixels are then 0. ``ImageError``: the image is truncated, does not decode or has another
            size. Another ``UserError``: the shard is missing, cannot be opened, or has another size than in the manifest.
        """
        errors: dict[int, UserError] = {}
        images = self.locate(samples)
        open_shard, shard_bytes, decode, shape = self._source.open, self._shard_bytes, self._decode, self._shape
        block, block_shard, start, end = b"", -1, 0, 0
        for number, (shard, next_shard, offset, length) in enumerate(images):
            pixels = pixels_BHWC[first + number]
            try:
                file = open_shard(shard)  # kept: the descriptor is closed with the last reference
                if file.num_bytes != shard_bytes[shard]:
                    raise self._size_error(shard, samples[number], file.num_bytes)
                if self._is_raw:
                    self._read_raw(file.descriptor, offset, length, pixels)
                    continue
                if shard == block_shard and start <= offset <= end - length:
                    data = block[offset - start : offset - start + length]
                elif shard == next_shard:
                    block, block_shard, start = _read_neighbours(file.descriptor, images[number:]), shard, offset
                    end, data = start + len(block), block[:length]
                else:
                    data = os.pread(file.descriptor, length, offset)
                if len(data) != length:
                    raise ValueError("the shard is truncated")
                found = decode(data, buffer=pixels).shape
                if found != shape:
                    raise ValueError(f"it has {found[1]} x {found[0]} pixels instead of {self.size} x {self.size}")
            except UserError as error:
                errors[first + number] = error
            except (ValueError, OSError, SyntaxError) as error:
                errors[first + number] = self._image_error(shard, samples[number], error)
        for row in errors:
            pixels_BHWC[row] = 0
        return errors

    def read_file(self, sample: int) -> bytes:
        """Return the bytes of the file of an image that :meth:`read` has decoded without an error."""
        ((shard, _, offset, length),) = self.locate(np.array([sample]))
        return os.pread(self._source.open(shard).descriptor, length, offset)

    def locate(self, samples: NDArray[np.int64]) -> list[Location]:
        """Return the locations of stored samples."""
        shards = np.searchsorted(self._starts, samples, side="right") - 1
        columns = shards, np.append(shards[1:], -1), self._offsets[samples], self._lengths[samples]
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def close(self) -> None:
        """Release the shards; later reads may raise."""
        self._source.close()

    def advance(self, step: int) -> None:
        """Report that all batches up to this step have been read."""
        self._source.advance(step)

    def _read_raw(self, descriptor: int, offset: int, length: int, pixels: Pixels) -> None:
        header = bytearray(len(self._raw_header))
        if os.preadv(descriptor, [header, pixels.data.cast("B")], offset) != length:
            raise ValueError("the shard is truncated")
        if header != self._raw_header:
            raise ValueError(f"not a .npy file of {self.size} x {self.size} x 3 uint8")

    def _size_error(self, shard: int, sample: int, num_bytes: int) -> UserError:
        return UserError(
            f"{self._name(shard, sample)}: the shard has {num_bytes} bytes where the manifest says "
            f"{self._shard_bytes[shard]}: it was truncated or replaced. List all damage with: "
            f"galaxydist data check {self._manifest.location}; then copy it again, or {self._manifest.remedy}"
        )

    def _image_error(self, shard: int, sample: int, error: Exception) -> ImageError:
        return ImageError(
            f"{self._name(shard, sample)}: its image does not decode ({error})",
            f"look for more with: galaxydist data check {self._manifest.location}, "
            f"then {self._manifest.remedy}, or train without it: data.on_error=skip",
        )

    def _name(self, shard: int, sample: int) -> str:
        key = sample_key(self._manifest, self._split, sample)
        return f"shard {self._manifest.shard_location(self._split, shard)}, galaxy {key}"


def _read_neighbours(descriptor: int, images: Sequence[Location]) -> bytes:
    """Read the bytes from the first image to the last of the images that follow it in its shard, without large gaps."""
    shard, _, start, length = images[0]
    end = start + length
    for next_shard, _, offset, next_length in images[1:]:
        if next_shard != shard or not end <= offset <= end + LARGEST_GAP or offset + next_length > start + MOST_BYTES:
            break
        end = offset + next_length
    if end > start + length:
        with contextlib.suppress(OSError):  # of one of them, perhaps: each is then read alone
            return os.pread(descriptor, end - start, start)
    return os.pread(descriptor, length, start)


def sample_key(manifest: Manifest, split: str, sample: int) -> str:
    """Return the key of a stored sample; ``number N`` if it cannot be read."""
    sizes = manifest.shards(split)["samples"]
    ends = np.cumsum(sizes)
    shard = int(np.searchsorted(ends, sample, side="right"))
    number = sample - int(ends[shard] - sizes[shard])
    path, offset = manifest.shard_path(split, shard), int(manifest.offsets(split)[sample])
    if manifest.tars is None:
        with contextlib.suppress(OSError, ValueError, IndexError):
            return parse_index(path.with_suffix(".idx").read_text("ascii"))[number][0].name.partition(".")[0]
    with contextlib.suppress(OSError, ValueError), path.open("rb") as file:
        file.seek(offset - BLOCK)
        return header_key(file.read(BLOCK))
    return f"number {number}"


def _decode_png(data: bytes, buffer: Pixels) -> Pixels:
    try:
        with Image.open(io.BytesIO(data)) as image:
            decoded = np.asarray(image.convert("RGB"))
    except UnidentifiedImageError:
        raise ValueError("not a PNG file") from None
    if decoded.shape == buffer.shape:
        buffer[...] = decoded
    return decoded


def _decode_any_file(data: bytes, buffer: Pixels, size: int) -> Pixels:
    return decode_any_file(data, size, buffer)


def read_samples(
    manifest: Manifest, split: str, samples: NDArray[np.int64], factors: Sequence[int] = (1,)
) -> Iterator[tuple[int, tuple[Pixels, ...]]]:
    """Decode single images by their sample numbers; of a remote data set, only their shards are fetched.

    Args:
        manifest, split: the data set and its split.
        samples: stored sample numbers, ascending, without repetition.
        factors: each image is decoded once per factor, by that factor smaller (see :func:`reduction`).

    Yields:
        sample number, and H x W x 3 uint8 pixels for each factor.

    Raises:
        UserError: an image cannot be read; names shard and galaxy.
    """
    for sample, decoders in _single_samples(manifest, split, samples, factors):
        yield int(sample), tuple(_decode_one(decoder, sample) for decoder in decoders)


def read_stored_files(manifest: Manifest, split: str, samples: NDArray[np.int64]) -> Iterator[tuple[int, bytes, Pixels]]:
    """Read the files of single images; arguments and errors are those of :func:`read_samples`.

    Yields:
        sample number, the bytes of its image file, and its H x W x 3 uint8 pixels.
    """
    for sample, (decoder,) in _single_samples(manifest, split, samples, (1,)):
        pixels = _decode_one(decoder, sample)
        yield int(sample), decoder.read_file(int(sample)), pixels


def _decode_one(decoder: ImageDecoder, sample: np.int64) -> Pixels:
    """Return the pixels of one image, H x W x 3 uint8; its error is raised."""
    pixels_1HWC = np.empty((1, decoder.size, decoder.size, 3), np.uint8)
    for error in decoder.read(np.array([sample]), pixels_1HWC).values():
        raise error
    pixels: Pixels = pixels_1HWC[0]
    return pixels


def _single_samples(
    manifest: Manifest, split: str, samples: NDArray[np.int64], factors: Sequence[int]
) -> Iterator[tuple[np.int64, list[ImageDecoder]]]:
    """Yield each sample number while its shard can be read, with a decoder for each factor."""
    if samples.size == 0:
        return
    sizes = manifest.shards(split)["samples"]
    intervals = usage_of_evaluation(sizes, 1)  # batches of one sample: the steps are the sample numbers
    needed = np.searchsorted(np.cumsum(sizes), samples, side="right")
    intervals = intervals[np.isin(intervals["shard"], needed)]
    source = open_shard_source(
        manifest, split, iter([intervals]), iter([extend(intervals, 1)]), steps_ahead=1, why="single images"
    )
    decoders = [ImageDecoder(manifest, split, factor, source) for factor in factors]
    try:
        for sample in samples:
            yield sample, decoders
            source.advance(int(sample))
    finally:
        source.close()
