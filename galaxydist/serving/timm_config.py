"""timm's keys of a published ``config.json``: with them ``timm.create_model("local-dir:DIR")`` loads the model.

timm's own preparation of a picture (``timm.data.create_transform``) then uses the run's mean, deviation, crop and size. The keys
are written only if the model that timm builds from them gives the same logits.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from galaxydist.atomic_files import to_json
from galaxydist.counter_rng import uniform
from galaxydist.errors import UserError, first_line
from galaxydist.loading.decode import read_samples
from galaxydist.loading.training_data import build_augment, has_split
from galaxydist.models.build import evaluation_mode, timm_arguments
from galaxydist.prediction.image_form import ImageForm
from galaxydist.prediction.predictor import probabilities_of
from galaxydist.prediction.trained_model import TrainedModel
from galaxydist.serving.app.published_model import CONFIG, WEIGHTS, PictureForm
from galaxydist.serving.reference_galaxies import choose_galaxies
from galaxydist.shards.manifest import Manifest

# timm's facts about an architecture that hold for other weights of it, too.
_KEPT = ("first_conv", "classifier", "min_input_size")
# Largest difference of the logits, relative to their largest value.
TOLERANCE = 1e-5
# Validation galaxies on which timm's transform is compared with the run's preparation, and the share that must get the same
# class. It was measured to be 65 to 100 %, by the network (docs/benchmarks.md, "Exported models").
NUM_COMPARED, LEAST_AGREEMENT = 64, 0.9
_BATCH = 16


def build_timm_keys(trained: TrainedModel, form: PictureForm, licence: str | None) -> dict[str, Any] | None:
    """Return the keys at the top of ``config.json``; None for a model that timm cannot build.

    Args:
        trained: the model.
        form: preparation of a picture.
        licence: of the weights; None: unknown.
    """
    recipe = trained.recipe
    found = timm_arguments(recipe.model, trained.started_from, recipe.data.image_size)
    if found is None:
        return None
    architecture, arguments = found
    model: Any = trained.model
    published = getattr(model, "pretrained_cfg", None) or {}
    pretrained_cfg = {
        **{name: published[name] for name in _KEPT if published.get(name) is not None},
        "input_size": [3, form.image_size, form.image_size],
        "fixed_input_size": _has_fixed_size(published, arguments),
        "interpolation": "bilinear",
        "crop_pct": centred_crop(form.image_size, form.crop),
        "crop_mode": "center",
        "mean": list(form.mean),
        "std": list(form.std),
        "num_classes": len(trained.class_names),
        "pool_size": None,
        **({"license": licence} if licence else {}),
    }
    return {
        "architecture": architecture,
        "num_classes": len(trained.class_names),
        "num_features": getattr(model, "num_features", None),
        "label_names": list(trained.class_names),
        **({"model_args": dict(arguments)} if arguments else {}),
        "pretrained_cfg": pretrained_cfg,
    }


def centred_crop(image_size: int, crop: float) -> float:
    """Return the crop for timm, whose centre is that of the picture.

    timm resizes a picture to floor(T / crop) pixels and cuts T of them out. If the difference is odd, the cut is half a pixel
    off, which changed the class of every eighth real galaxy at 64 pixels: the nearest even difference is taken instead.

    Args:
        image_size: T, in pixels.
        crop: the recipe's, a fraction of the width.
    """
    exact = image_size / crop
    if (int(exact) - image_size) % 2 == 0:
        return crop
    nearest = min((int(exact) - 1, int(exact) + 1), key=lambda size: (abs(size - exact), size))
    return image_size / (max(nearest, image_size) + 0.25)  # not the fraction itself, which may be rounded down


def prepares_alike(form: PictureForm) -> bool:
    """Return True if timm's own transform gives the network the same pixels as the run, from a picture of the stored size.

    It does not if pictures are decoded smaller (``factor``), or cut out and resampled: timm resamples before it cuts.
    """
    is_cut_only = (
        form.image_size == round(form.crop * form.stored_size)
        and int(form.image_size / centred_crop(form.image_size, form.crop)) == form.stored_size
    )
    return form.factor == 1 and (form.crop == 1 or is_cut_only)


def measure_agreement(trained: TrainedModel, keys: Mapping[str, Any], shards: Manifest) -> dict[str, Any]:
    """Classify validation galaxies as timm's own transform prepares them, and as the run does.

    Args:
        trained: the model, on the CPU.
        keys: from ``build_timm_keys``.
        shards: of its training.

    Returns:
        For ``results.json``: ``galaxies``, ``same_class`` (galaxies) and ``largest_difference`` (of a probability).

    Raises:
        UserError: there is no validation split, or a galaxy cannot be read.
    """
    import timm

    if not has_split(shards, "val"):
        raise UserError(f"{shards.location} has no validation split")
    transform: Any = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=dict(keys["pretrained_cfg"])))
    normalise = build_augment(trained.recipe, trained.trained_on, threads=1).normalise
    factors = 1, ImageForm.of(trained.stored, trained.recipe.data).factor
    samples = choose_galaxies(shards, "val", NUM_COMPARED, by_class=False).samples
    ours, theirs = list[Tensor](), list[Tensor]()
    for _, (stored, smaller) in read_samples(shards, "val", samples, factors):
        ours.append(normalise(torch.from_numpy(smaller[None]))[0])
        theirs.append(transform(Image.fromarray(stored)))

    def classify(images: list[Tensor]) -> NDArray[np.float32]:
        batches = [torch.stack(images[start : start + _BATCH]) for start in range(0, len(images), _BATCH)]
        logits_NK = torch.cat([_logits(trained.model, images_BCHW) for images_BCHW in batches])
        return probabilities_of(logits_NK.numpy(), trained.temperature)

    ours_NK, theirs_NK = classify(ours), classify(theirs)
    return {
        "galaxies": len(samples),
        "same_class": int((ours_NK.argmax(axis=1) == theirs_NK.argmax(axis=1)).sum()),
        "largest_difference": float(np.abs(ours_NK - theirs_NK).max()),
    }


def describe_agreement(measured: Mapping[str, Any] | None) -> str:
    """Return how far the answers differ if timm's own transform prepares the pictures, as a sentence."""
    if not measured:
        return "timm's own transform resamples pictures otherwise than the training did, so that probabilities differ."
    return (
        f"timm's own transform resamples pictures otherwise than the training did: {measured['same_class']} of "
        f"{measured['galaxies']} validation galaxies that it prepared got the same class, with probabilities within "
        f"{measured['largest_difference']:.2g}."
    )


def _has_fixed_size(published: Mapping[str, Any], arguments: Mapping[str, Any]) -> bool:
    is_flexible = arguments.get("dynamic_img_size") or arguments.get("strict_img_size") is False
    return bool(published.get("fixed_input_size", "img_size" in arguments)) and not is_flexible


def compare_with_timm(trained: TrainedModel, keys: Mapping[str, Any], weights: Path) -> str | None:
    """Build the model with timm alone, from these keys and the published weights, and compare its logits of two images.

    Returns:
        None if they are equal, otherwise the reason why timm cannot be used.
    """
    import timm

    with tempfile.TemporaryDirectory(prefix="galaxydist-timm-") as name:
        folder = Path(name)
        (folder / CONFIG).write_text(to_json(dict(keys)), encoding="utf-8")
        (folder / WEIGHTS).symlink_to(weights.absolute())
        try:
            built: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
        except Exception as error:  # a model may raise anything
            return f"timm cannot build it ({type(error).__name__}: {first_line(error)})"
    size = trained.recipe.data.image_size
    draws = uniform(0, torch.arange(2 * 3 * size * size).numpy())
    images_BCHW = torch.from_numpy(draws).float().reshape(2, 3, size, size)
    ours_BK, theirs_BK = _logits(trained.model, images_BCHW), _logits(built, images_BCHW)
    if ours_BK.shape != theirs_BK.shape:
        return f"timm's model returns {tuple(theirs_BK.shape)}, ours {tuple(ours_BK.shape)}"
    difference = float((ours_BK - theirs_BK).abs().max() / ours_BK.abs().max().clamp(min=1.0))
    return None if difference <= TOLERANCE else f"the logits of timm's model differ by {difference:.3g} of the largest"


@torch.inference_mode()
def _logits(model: nn.Module, images_BCHW: Tensor) -> Tensor:
    with evaluation_mode(model):
        logits_BK: Tensor = model(images_BCHW)
    return logits_BK
