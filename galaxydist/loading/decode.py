"""Stored images to pixels: positioned reads of local tars, decoded straight into the place of the batch. All of it without
Python's lock, so that threads do the work of processes."""

import io
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from galaxydist.errors import UserError
from galaxydist.shards.manifest import Manifest
from galaxydist.shards.remote.cache import SharedFile
from galaxydist.shards.remote.prefetcher import LocalShards, ShardSource, open_shard_source
from galaxydist.shards.shard_usage import evaluation_uses, extend
from galaxydist.shards.tar import BLOCK, parse_index

Pixels = NDArray[np.uint8]


class ImageError(UserError):
    """One image cannot be read or decoded. With data.on_error=skip it costs that galaxy alone.

    Args:
        what: names shard and galaxy, and says why.
        hint: what to do.
    """

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(f"{what}; {hint}")
        self.what = what


@dataclass(frozen=True, slots=True)
class StoredImage:
    """Where a stored image lies."""

    sample: int
    shard: int
    offset: int
    length: int


def reduction(image_size: int, target_size: int, crop: float, max_zoom: float = 1.0) -> int:
    """The factor by which images may be decoded smaller without losing what the model sees: 1, 2, 4 or 8.

    libjpeg's reduced decoding is a mean over whole pixels, and so is the first step of our antialiasing (``changes``), which
    wants at least 1.5 pixels to one that the model sees; at the greatest zoom there must be one.

    Args:
        image_size: stored width in pixels.
        target_size: width that the model sees.
        crop: central fraction of the stored width that is kept.
        max_zoom: greatest magnification of the augmentation.
    """
    for factor in (8, 4, 2):
        if image_size % factor == 0 and crop * image_size / factor >= target_size * max(1.5, max_zoom):
            return factor
    return 1


class ImageDecoder:
    """Reads the images of one split.

    Args:
        manifest, split: which.
        factor: decode by this factor smaller (JPEG only; see :func:`reduction`).
        source: where the shards come from, if they do not lie in the manifest's folder; closed with this reader.
    """

    def __init__(self, manifest: Manifest, split: str, factor: int = 1, source: ShardSource | None = None) -> None:
        self._manifest, self._split = manifest, split
        self._encoding = manifest.encoding
        self._factor = factor if manifest.encoding == "jpeg" else 1
        self.size = manifest.image_size // self._factor
        shards = manifest.shards(split)
        self._starts = np.concatenate([[0], np.cumsum(shards["samples"])])
        self._shard_bytes = shards["bytes"]
        self._offsets, self._lengths = manifest.offsets(split), manifest.lengths(split)
        self._source = source or LocalShards(manifest, split)
        self._raw_header = _raw_header(manifest.image_size)

    def locate(self, samples: NDArray[np.int64]) -> list[StoredImage]:
        """Where these stored samples lie."""
        shards = np.searchsorted(self._starts, samples, side="right") - 1
        columns = samples, shards, self._offsets[samples], self._lengths[samples]
        return [StoredImage(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]

    def read_into(self, image: StoredImage, pixels: Pixels) -> None:
        """Decode an image into ``size`` x ``size`` x 3 uint8 contiguous pixels.

        Raises:
            ImageError: naming shard and galaxy, if it is cut short, does not decode or has another size.
            UserError: if the shard is missing, cannot be opened or is not the manifest's by its size.
        """
        file = self._open(image)
        try:
            if self._encoding == "raw":
                self._read_raw(file.descriptor, image, pixels)
                return
            data = os.pread(file.descriptor, image.length, image.offset)
            if len(data) != image.length:
                raise ValueError("the shard is cut short")
            shape = self._decode_jpeg(data, pixels) if self._encoding == "jpeg" else _decode_png(data, pixels)
            if shape != pixels.shape:
                raise ValueError(f"{shape[1]} x {shape[0]} pixels where {self.size} x {self.size} belong")
        except (ValueError, OSError, SyntaxError) as error:
            raise ImageError(
                f"{self._name(image)}: its image does not decode ({error})",
                f"look for more with: galaxydist data check {self._manifest.location}, "
                f"then {self._manifest.remedy}, or train without it: data.on_error=skip",
            ) from None

    def close(self) -> None:
        """Let go of the shards; from now on reading may raise."""
        self._source.close()

    def advance(self, step: int) -> None:
        """All batches up to this one have been read."""
        self._source.advance(step)

    def _decode_jpeg(self, data: bytes, pixels: Pixels) -> tuple[int, ...]:
        if self._factor == 1:
            return tuple(simplejpeg.decode_jpeg(data, "RGB", buffer=pixels).shape)
        image = simplejpeg.decode_jpeg(
            data, "RGB", min_height=self.size, min_width=self.size, min_factor=self._factor, buffer=pixels
        )
        return tuple(image.shape)

    def _read_raw(self, descriptor: int, image: StoredImage, pixels: Pixels) -> None:
        header = bytearray(len(self._raw_header))
        length = os.preadv(descriptor, [header, pixels.data.cast("B")], image.offset)
        if length != image.length:
            raise ValueError("the shard is cut short")
        if header != self._raw_header:
            raise ValueError(f"not a .npy file of {self.size} x {self.size} x 3 uint8")

    def _open(self, image: StoredImage) -> SharedFile:
        file = self._source.open(image.shard)
        if file.num_bytes != self._shard_bytes[image.shard]:
            raise UserError(
                f"{self._name(image)}: the shard has {file.num_bytes} bytes where the manifest says "
                f"{self._shard_bytes[image.shard]}: it was cut short or replaced. See what is wrong with: "
                f"galaxydist data check {self._manifest.location}; then copy it anew, or make the shards anew"
            )
        return file

    def _name(self, image: StoredImage) -> str:
        return image_name(self._manifest, self._split, image.shard, image.sample - int(self._starts[image.shard]))


def image_name(manifest: Manifest, split: str, shard: int, number: int) -> str:
    """``shard PATH, galaxy KEY`` for an error message; the key is read from the shard's index, or else from the shard."""
    path = manifest.shard_path(split, shard)
    try:
        key = parse_index(path.with_suffix(".idx").read_text("ascii"))[number][0].name.partition(".")[0]
    except (OSError, ValueError, IndexError):
        key = _key_in_tar(manifest, split, shard, number) or f"number {number}"
    return f"shard {manifest.shard_location(split, shard)}, galaxy {key}"


def sample_name(manifest: Manifest, split: str, sample: int) -> str:
    """The key of a stored sample."""
    ends = np.cumsum(manifest.shards(split)["samples"])
    shard = int(np.searchsorted(ends, sample, side="right"))
    start = int(ends[shard - 1]) if shard else 0
    return image_name(manifest, split, shard, sample - start).rsplit(" ", 1)[-1]


def _key_in_tar(manifest: Manifest, split: str, shard: int, number: int) -> str:
    """The key as the header before the image has it; empty where there is no header."""
    sample = int(manifest.shards(split)["samples"][:shard].sum()) + number
    try:
        with manifest.shard_path(split, shard).open("rb") as file:
            file.seek(int(manifest.offsets(split)[sample]) - BLOCK)
            return tarfile.TarInfo.frombuf(file.read(BLOCK), "ascii", "strict").name.partition(".")[0]
    except (OSError, tarfile.HeaderError):
        return ""


def _raw_header(image_size: int) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": (image_size, image_size, 3)})
    return stream.getvalue()


def _decode_png(data: bytes, pixels: Pixels) -> tuple[int, ...]:
    try:
        with Image.open(io.BytesIO(data)) as image:
            decoded = np.asarray(image.convert("RGB"))
    except UnidentifiedImageError:
        raise ValueError("not a PNG file") from None
    if decoded.shape == pixels.shape:
        pixels[...] = decoded
    return decoded.shape


# A few images of a split by their sample numbers, read where they lie; of shards in a store only those that hold them
# come.


def read_chosen(
    manifest: Manifest, split: str, samples: NDArray[np.int64], factors: Sequence[int] = (1,)
) -> Iterator[tuple[int, tuple[Pixels, ...]]]:
    """Decode images.

    Args:
        manifest, split: of which.
        samples: stored sample numbers, ascending, each once.
        factors: decode each image once for every one of these, by so much smaller (see ``decode.reduction``).

    Returns:
        in turn: sample number, and for each factor H x W x 3 uint8 pixels.

    Raises:
        UserError: naming shard and galaxy, what cannot be read.
    """
    if samples.size == 0:
        return
    sizes = manifest.shards(split)["samples"]
    uses = evaluation_uses(sizes, 1, 0, 1)  # batches of one sample: the steps are the sample numbers
    needed = np.unique(np.searchsorted(np.cumsum(sizes), samples, side="right"))
    uses = uses[np.isin(uses["shard"], needed)]
    source = open_shard_source(manifest, split, iter([uses]), iter([extend(uses, 1)]), steps_ahead=1, why="a few images")
    readers = [ImageDecoder(manifest, split, factor, source) for factor in factors]
    try:
        for image in readers[0].locate(samples):
            yield image.sample, tuple(_read(reader, image) for reader in readers)
            source.advance(image.sample)
    finally:
        source.close()


def _read(reader: ImageDecoder, image: StoredImage) -> Pixels:
    pixels = np.empty((reader.size, reader.size, 3), np.uint8)
    reader.read_into(image, pixels)
    return pixels
