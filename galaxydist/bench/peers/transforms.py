"""Decoding and augmentation of the other loaders."""

from collections.abc import Callable
from typing import Any

import simplejpeg
import torch
from torch import Tensor
from torchvision.transforms import v2

from galaxydist.bench.loader_worker import SMALLEST_CROP, LoaderJob


def our_decoder(data: bytes | memoryview) -> Tensor:
    """Decode a JPEG to uint8 H x W x 3, as galaxydist does."""
    return torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB"))


def train_transform(job: LoaderJob) -> Callable[[Any], Tensor]:
    """Return random zoom-crop, mirrors and normalisation.

    They apply to a PIL image or a uint8 tensor (3 x H x W, or H x W x 3 from our decoder).
    """
    transform: Callable[[Any], Tensor] = v2.Compose(
        [
            v2.Lambda(channels_first) if job.ours else v2.PILToTensor(),
            v2.RandomResizedCrop(job.image_size, scale=(SMALLEST_CROP**2, 1.0), ratio=(1.0, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomVerticalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(job.mean, job.std),
        ]
    )
    return transform


def channels_first(image_HWC: Tensor) -> Tensor:
    """Return a view of H x W x 3 as 3 x H x W."""
    return image_HWC.permute(2, 0, 1)
