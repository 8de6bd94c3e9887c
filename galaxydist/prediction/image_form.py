"""Preparation of new images: into the form in which the training images were stored, decoded as evaluations decode them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from galaxydist.errors import DamagedImageError, UserError
from galaxydist.galaxy import EncodedImage
from galaxydist.loading.decode import reduction
from galaxydist.loading.training_data import StoredImages
from galaxydist.recipe.schema import DataConfig
from galaxydist.shards.writer.encode import decode_image, resize_square

Pixels = NDArray[np.uint8]

# Relative difference up to which two pixel scales count as equal.
SCALE_TOLERANCE = 0.1


class OtherImagesError(UserError):
    """Error of images that do not look like the training images: another size or another pixel scale."""


@dataclass(frozen=True)
class ImageForm:
    """The form in which a model's training images were stored, and into which new images are brought.

    An image of the stored size is taken as it is. Other images are cut to their central square and resampled as the writer of
    shards does it, if the training images were resampled from such sizes, or if the user asks for it. JPEG files are decoded
    smaller by the same factor as in an evaluation; the pixels of other images are averaged by this factor.

    Args:
        stored: form of the training images.
        factor: 1, 2, 4 or 8, by which images are made smaller (``loading.decode.reduction``).
        resize: resample images of any size.
        rescale: cut images so that they show as much sky as the training images, by their pixel scale.
    """

    stored: StoredImages
    factor: int
    resize: bool = False
    rescale: bool = False

    @classmethod
    def of(cls, stored: StoredImages, data: DataConfig, *, resize: bool = False, rescale: bool = False) -> "ImageForm":
        """Return the form for a run's images.

        Raises:
            UserError: ``rescale`` without known pixel scales of the training galaxies.
        """
        if rescale and stored.pxscale is None:
            raise UserError("--rescale needs the pixel scale of the training galaxies (pxscale), which is unknown for this run")
        is_jpeg, is_any_size = stored.encoding == "jpeg", stored.encoding == "file"
        factor = reduction(stored.image_size, data.image_size, data.crop, data.augment.zoom) if is_jpeg else 1
        return cls(stored, factor, resize or is_any_size, rescale)

    @property
    def size(self) -> int:
        """Side of the prepared images in pixels."""
        return self.stored.image_size // self.factor

    def prepare(self, image: Pixels | EncodedImage, name: str, pxscale: float | None = None, out: Pixels | None = None) -> Pixels:
        """Return ``size`` x ``size`` x 3 uint8 pixels of one image.

        Args:
            image: H x W x 3 uint8 pixels, or the bytes of a JPEG or PNG file.
            name: of the image, for messages.
            pxscale: arcsec/pixel; None or nan: unknown.
            out: contiguous memory for the result; None: new memory.

        Raises:
            DamagedImageError: the file does not decode.
            OtherImagesError: another size or pixel scale than that of the training images.
        """
        if isinstance(image, EncodedImage):
            decoded = self._decode_stored(image, out)
            if decoded is not None:
                self._check_scale(name, self.stored.image_size, pxscale)
                return decoded
            pixels = decode_image(image, f"{name}: ")
        else:
            pixels = image
        pixels = self._to_stored_size(pixels, name, pxscale)
        prepared = pixels if self.factor == 1 else block_mean(pixels, self.factor)
        if out is None:
            return prepared
        out[...] = prepared
        return out

    def _decode_stored(self, image: EncodedImage, out: Pixels | None) -> Pixels | None:
        """Decode a JPEG file of the stored size as an evaluation does; return None for other files."""
        size = self.stored.image_size
        if self.rescale or not simplejpeg.is_jpeg(image.data):
            return None
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(image.data)
            if (height, width) != (size, size) or colours == "CMYK":
                return None
            smaller = {"min_height": self.size, "min_width": self.size, "min_factor": self.factor} if self.factor > 1 else {}
            return np.asarray(simplejpeg.decode_jpeg(image.data, "RGB", buffer=out, **smaller))
        except ValueError as error:
            raise DamagedImageError(f"{image.file or 'the image'}: its image does not decode ({error})") from None

    def _to_stored_size(self, pixels: Pixels, name: str, pxscale: float | None) -> Pixels:
        height, width = pixels.shape[:2]
        side, size = min(height, width), self.stored.image_size
        if self.rescale:
            return resize_square(_centre(pixels, self._field(side, name, pxscale)), size)
        self._check_scale(name, side, pxscale)
        if height == width == size:
            return pixels
        low, high = self.stored.source_sides or (0, -1)
        if not (self.resize or low <= side <= high):
            sizes = f"{size} x {size}" if not high > 0 else f"{low}" if low == high else f"{low} to {high}"
            raise OtherImagesError(
                f"{name} is {width} x {height} pixels, and the training images were {sizes} pixels. Give --resize (resize=True) "
                "to cut images to their central square and resample them; the galaxies should then fill as much of the image as "
                "those of the training"
            )
        return resize_square(pixels, size)

    def _check_scale(self, name: str, side: int, pxscale: float | None) -> None:
        """Refuse a pixel scale, at the stored size, that no training galaxy has; ``side`` is the image's, in pixels."""
        known, size = self.stored.stored_scales, self.stored.image_size
        if self.resize or known is None or pxscale is None or not np.isfinite(pxscale):
            return
        scale, (low, high) = pxscale * side / size, known
        if not low * (1 - SCALE_TOLERANCE) <= scale <= high * (1 + SCALE_TOLERANCE):
            raise OtherImagesError(
                f"{name} has {scale:.4g} arcsec/pixel (pxscale) at {size} x {size} pixels, and the training galaxies had "
                f"{low:.4g} to {high:.4g}. Give --rescale (rescale=True) to cut and resample the images to the scale of the "
                "training, or --resize (resize=True) to take them as they are"
            )

    def _field(self, side: int, name: str, pxscale: float | None) -> int:
        """Return the number of an image's pixels that show as much sky as a training image."""
        known = self.stored.pxscale
        assert known is not None
        if pxscale is None or not pxscale > 0:
            raise OtherImagesError(f"{name} has no pixel scale (pxscale, arcsec/pixel), which --rescale needs")
        source = self.stored.source_sides
        wanted = known[1] * (self.stored.image_size if source is None else source[0])
        field = round(wanted / pxscale)
        if field > side:
            raise OtherImagesError(
                f"{name} shows {side * pxscale:.3g} arcsec of the sky, and the training images {wanted:.3g}: it cannot be "
                "brought to their scale. Cut a larger image of this galaxy out of the survey"
            )
        return max(1, field)


def _centre(pixels: Pixels, side: int) -> Pixels:
    height, width = pixels.shape[:2]
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side]


def block_mean(pixels: NDArray[Any], factor: int) -> Pixels:
    """Return the mean of blocks of pixels, rounded: ... x H x W x 3 uint8 to ... x H/factor x W/factor x 3."""
    *rest, height, width, channels = pixels.shape
    blocks = pixels.reshape(*rest, height // factor, factor, width // factor, factor, channels)
    sums = blocks.sum(axis=(-4, -2), dtype=np.uint32)
    return np.asarray((sums + factor**2 // 2) // factor**2, np.uint8)
