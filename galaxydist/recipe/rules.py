"""Rules between the keys of a recipe, and between a recipe and the number of processes.

Each rule between keys names its keys and runs if they are valid.
"""

import re
from difflib import get_close_matches
from typing import Any

from galaxydist.errors import EveryRankError
from galaxydist.paths import is_dataset_name
from galaxydist.recipe.fields import RECIPE, CrossFieldRule
from galaxydist.recipe.model_names import parse_model_name
from galaxydist.recipe.schema import TrainConfig

PATCHES = {"vit": 16, "vit_scratch": 16, "reference_vit": 25}  # pixels
ORIENTATIONS = 8  # flips and quarter turns of d4_cnn
ANY_WIDTH = ("custom_cnn", "d4_cnn")
UNPUBLISHED = ("reference_cnn", "reference_vit")  # architectures without published weights
OPTIMIZERS = ("adamw", "sgd", "lamb", "lion", "muon", "adan")


def _start(pretrained: bool, weights: Any) -> str | None:
    return "choose one: published weights or your own file" if pretrained and weights is not None else None


def _published(pretrained: bool, name: str) -> str | None:
    if pretrained and name in UNPUBLISHED:
        return f"there are no published weights of {name}; set model.pretrained=false"
    if pretrained and name == "vit_scratch":
        return "vit_scratch starts from random weights; use model.name=vit, or model.pretrained=false"
    reference = parse_model_name(name)
    if pretrained and reference.kind == "timm" and reference.version is None:
        return (
            "timm has several weights of some models, and its choice among them changes; name them: timm/NAME.TAG "
            f"(`galaxydist weights fetch {name}` lists them)"
        )
    if pretrained and reference.kind == "function":
        return "weights of your own model are in a file of yours: set model.weights=FILE and model.pretrained=false"
    return None


def _frozen(freeze: bool, pretrained: bool, weights: Any) -> str | None:
    if freeze and not pretrained and weights is None:
        return "a frozen backbone needs trained weights; set model.pretrained=true or model.weights=FILE"
    return None


def _micro_batch(micro_batch: int | str, batch_size: int) -> str | None:
    if isinstance(micro_batch, int) and micro_batch > batch_size:
        return (
            f"a micro-batch of {micro_batch} is larger than the global batch of {batch_size}; use 0 for a process's whole share"
        )
    return None


def _quarter_turns(rotate: str, zoom: float, shift: float) -> str | None:
    if rotate == "d4" and (zoom > 1.0 or shift > 0.0):
        return "quarter turns keep exact pixels, zoom and shift do not; use rotate=any or none, or zoom=1 and shift=0"
    return None


def _patches(name: str, image_size: int) -> str | None:
    patch = PATCHES.get(name)
    if patch is None or image_size % patch == 0:
        return None
    below = image_size // patch * patch
    return f"{name} needs a multiple of {patch} pixels; try {f'{below} or ' if below else ''}{below + patch}"


def _size(name: str, size: str) -> str | None:
    return f"{name} has one size only; leave model.size out" if size != "small" and name not in ("vit", "vit_scratch") else None


def _width(name: str, width: int) -> str | None:
    default = RECIPE.fields["model.width"].default
    if name == "d4_cnn" and width % ORIENTATIONS:
        lower = max(ORIENTATIONS, width // ORIENTATIONS * ORIENTATIONS)
        return f"d4_cnn needs a multiple of its {ORIENTATIONS} orientations; try {lower} or {lower + ORIENTATIONS}"
    return f"{name} has a fixed width; leave model.width out" if width != default and name not in ANY_WIDTH else None


def _norm(name: str, norm: str) -> str | None:
    return f"{name} has its own normalisation; leave model.norm out" if norm != "batch" and name != "custom_cnn" else None


def _clip(norm: float, value: float) -> str | None:
    return "clip by norm or by value, not by both; set one of them to 0" if norm > 0 and value > 0 else None


def _pairs(mixup: float, cutmix: float, batch_size: int) -> str | None:
    if (mixup > 0 or cutmix > 0) and batch_size % 2:
        return f"mixup and cutmix pair the halves of the global batch; try {batch_size - 1 or 2} or {batch_size + 1}"
    return None


def _milestones(schedule: str, milestones: tuple[float, ...]) -> str | None:
    if schedule == "step" and (not milestones or list(milestones) != sorted(set(milestones))):
        return "the steps down need increasing shares of the run, such as [0.5,0.75]"
    return None


def _profile(profile: str | None) -> str | None:
    if profile is None:
        return None
    match = re.fullmatch(r"(\d{1,12})(?:-(\d{1,12}))?", profile)
    if match is None or not 1 <= int(match[1]) <= int(match[2] or match[1]):
        return "give the first and the last step to trace, such as 10-20, counted from 1"
    return None


def _dataset_name(dataset: str) -> str | None:
    if is_dataset_name(dataset):
        return None
    return "is a folder name under the data root: letters, digits, _, -, + and .; for a file elsewhere use data.manifest=FILE"


def _forced_keys(force: tuple[str, ...]) -> str | None:
    for key in force:
        known = RECIPE.fields.get(key)
        if known is None:
            return f"{key!r} is no key of the recipe{RECIPE.suggest(key)}"
        if known.kind == "run":
            return f"{key} may change freely between restarts; take it out of the list"
    return None


RULES = (
    CrossFieldRule(("model.pretrained", "model.weights"), _start),
    CrossFieldRule(("model.pretrained", "model.name"), _published),
    CrossFieldRule(("model.freeze_backbone", "model.pretrained", "model.weights"), _frozen),
    CrossFieldRule(("train.micro_batch", "train.batch_size"), _micro_batch),
    CrossFieldRule(("data.augment.rotate", "data.augment.zoom", "data.augment.shift"), _quarter_turns),
    CrossFieldRule(("model.name", "data.image_size"), _patches),
    CrossFieldRule(("model.name", "model.size"), _size),
    CrossFieldRule(("model.name", "model.width"), _width),
    CrossFieldRule(("model.name", "model.norm"), _norm),
    CrossFieldRule(("train.clip_norm", "train.clip_value"), _clip),
    CrossFieldRule(("train.mixup", "train.cutmix", "train.batch_size"), _pairs),
    CrossFieldRule(("optim.schedule", "optim.milestones"), _milestones),
    CrossFieldRule(("train.profile",), _profile),
    CrossFieldRule(("data.dataset",), _dataset_name),
    CrossFieldRule(("resume.force",), _forced_keys),
)


# Rules of a run's start, checked at submission and again before training.


def check_optimizer(name: str) -> None:
    """Refuse an unknown optimizer.

    The schema accepts any name, so that run folders of older versions, which had more optimizers, can be read and evaluated.

    Raises:
        EveryRankError: the optimizer is not one of ``OPTIMIZERS``; the text lists them.
    """
    if name not in OPTIMIZERS:
        close = get_close_matches(name.lower(), OPTIMIZERS, n=1)
        hint = f"; did you mean {close[0]}?" if close else "."
        raise EveryRankError(f"optim.name={name}: there is no such optimizer{hint} There are {', '.join(OPTIMIZERS)}.")


def check_world(batch_size: int, world_size: int) -> None:
    """Check that mixup and cutmix can pair galaxies within each process.

    Raises:
        EveryRankError: the global batch is not a multiple of twice the number of processes.
    """
    least = 2 * world_size
    if batch_size % least == 0:
        return
    sizes = [size for size in (batch_size // least * least, (batch_size // least + 1) * least) if size]
    text = (
        f"Mixup and cutmix pair the halves of the global batch within a process: train.batch_size={batch_size} is no multiple of "
        f"2 x {world_size} processes. Use train.batch_size={' or '.join(map(str, sizes))}"
    )
    worlds = [world for world in range(1, batch_size // 2 + 1) if batch_size % (2 * world) == 0]
    near = [*[world for world in worlds if world < world_size][-1:], *[world for world in worlds if world > world_size][:1]]
    if near:
        text += f", or {' or '.join(map(str, near))} process{'' if near == [1] else 'es'}"
    raise EveryRankError(f"{text}, or set train.mixup=0 and train.cutmix=0.")


def is_mixing(config: TrainConfig) -> bool:
    """Return True if a recipe uses mixup or cutmix."""
    return config.mix_prob > 0 and (config.mixup > 0 or config.cutmix > 0)


def check_strategy(config: TrainConfig, precision: str) -> None:
    """Refuse settings that FSDP does not support here.

    Raises:
        EveryRankError: such settings are present; the text lists all of them.
    """
    if config.strategy == "ddp":
        return
    problems = {
        "train.precision=fp16": precision == "fp16"
        and "its loss scaling would differ between the parts: use train.precision=bf16",
        "train.compile=true": config.compile and "set it to false",
    }
    refused = [f"{key} and train.strategy=fsdp do not go together here; {remedy}" for key, remedy in problems.items() if remedy]
    if refused:
        raise EveryRankError("; ".join(refused))
