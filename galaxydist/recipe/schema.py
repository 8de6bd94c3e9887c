"""Schema of a recipe: the type, range, default and description of every key.

A field is a *result* field, which changes the numbers of a run and so the run's folder, unless it is defined with ``run_field``
(tracker, threads, micro-batch: it changes only the execution). New result fields are defined with ``later_field``.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from galaxydist.galaxy import Variant
from galaxydist.recipe.scalars import Location

ModelName = Literal[
    "custom_cnn",
    "d4_cnn",
    "resnet18",
    "resnet26",
    "resnet50",
    "vgg16",
    "vgg19",
    "vit",
    "vit_scratch",
    "reference_vgg16",
    "reference_vgg19",
    "reference_cnn",
    "reference_vit",
]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]


def run_field(default: Any, description: str, **constraints: Any) -> Any:
    """Define a field that changes the execution of a run, but not its numbers."""
    return Field(default, description=description, json_schema_extra={"kind": "run"}, **constraints)


def later_field(default: Any, description: str, **constraints: Any) -> Any:
    """Define a result field that did not exist when the first run folders were created.

    At its default it is left out of the run's hash, so that older runs keep their folders.
    """
    return Field(default, description=description, json_schema_extra={"later": True}, **constraints)


class Section(BaseModel):
    """A section of the recipe: read-only, without unknown keys, nan or inf."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class AugmentConfig(Section):
    """Random augmentation of training images, in one resampling; random numbers are from ``counter_rng``."""

    rotate: Literal["none", "d4", "any"] = Field(
        "any", description="none; quarter turns, exact pixels (d4); or any angle, resampled with reflected edges"
    )
    flip: bool = Field(True, description="mirror half of the images")
    zoom: Annotated[float, Field(ge=1.0, le=4.0)] = Field(
        1.0, description="scale drawn log-uniformly between 1/zoom and zoom (1: off; needs rotate=any or none)"
    )
    shift: Annotated[float, Field(ge=0.0, le=0.5)] = Field(
        0.0, description="largest shift along each axis, as a fraction of the width"
    )
    brightness: Fraction = Field(0.0, description="brightness factor drawn from 1 - b to 1 + b, equal for all channels")
    noise: Fraction = Field(0.0, description="largest standard deviation of added Gaussian noise, as a fraction of full scale")


class DataConfig(Section):
    """Data set and data loading."""

    dataset: str = Field("galaxy10_decals", description="name of the data set under the data root", min_length=1)
    variant: Variant = Field("original", description="which frozen data set of the survey")
    conflicting: Literal["keep", "drop"] = Field("keep", description="training galaxies that stand in the source with two labels")
    manifest: Location | None = Field(
        None, description="manifest.json to use instead of the data root's: a file, or s3://, gs://, https://, hf:// or file://"
    )
    dir: Path | None = run_field(None, "data root (else GALAXYDIST_DATA, else the user cache folder)")
    image_size: Annotated[int, Field(ge=16, le=1024)] = Field(256, description="pixels of the square image that the model sees")
    crop: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0, description="central fraction of the stored width that is kept (train and evaluation)"
    )
    balance: Literal["none", "resample"] = Field(
        "none",
        description="resample: draw training galaxies evenly over the classes (labels are held in memory and shards read in no "
        "sequence, so keep them on a local disk or in a cache that holds them all)",
    )
    num_streams: Count = Field(
        192,
        description="canonical streams of the order, fixed for a run whatever its processes; on many nodes a multiple of their "
        "number lets each shard be fetched by one node (galaxydist bench order)",
    )
    on_error: Literal["raise", "skip"] = run_field(
        "raise", "a training image that cannot be read: stop, or give it weight 0 (evaluation always stops)"
    )
    max_errors: Annotated[int, Field(ge=0)] = run_field(
        100, "with on_error=skip, stop once more galaxies than this cannot be read, over the whole run"
    )
    augment: AugmentConfig = AugmentConfig()
    threads: Annotated[int, Field(ge=0)] = run_field(0, "decoding threads of each process (0: from its cores)")
    prefetch: Count = run_field(4, "batches decoded ahead")
    cache_dir: Path | None = run_field(
        None, "where shards of a URL are kept, on a disk of the node (else the folder cache of the data root)"
    )
    cache_size: Positive = run_field(100.0, "GB that this folder may take; what was not used for the longest time goes first")
    fetch_threads: Count = run_field(8, "shards that each process fetches at the same time")


class ModelConfig(Section):
    """Architecture and initial weights."""

    name: ModelName = Field(..., description="architecture")
    size: Literal["small", "base"] = Field("small", description="vit and vit_scratch: ViT-S/16 or ViT-B/16")
    pretrained: bool = Field(False, description="start from timm's published weights")
    weights: Path | None = Field(None, description="start from a local safetensors file")
    freeze_backbone: bool = Field(False, description="train the head alone; the rest stays in evaluation mode")
    drop_rate: Fraction = Field(0.0, description="dropout before the head")
    drop_path_rate: Fraction = Field(0.0, description="stochastic depth")
    width: Annotated[int, Field(ge=4, le=512)] = Field(
        32, description="custom_cnn, d4_cnn: channels of the first stage (d4_cnn: fields times their 8 orientations)"
    )
    norm: Literal["batch", "group"] = Field(
        "batch", description="custom_cnn: batch normalisation, or group normalisation, which looks at one image at a time"
    )


class OptimConfig(Section):
    """Optimizer and learning-rate schedule (a function of the step alone)."""

    name: str = Field("adamw", description="adamw, sgd (Nesterov), or any other that timm's factory knows", min_length=1)
    lr: Positive = Field(1e-3, description="peak learning rate")
    weight_decay: NonNegative = Field(0.05, description="not applied to biases and normalisation")
    momentum: Fraction = Field(0.9, description="sgd: momentum; adamw and its like: decay of the first moment")
    beta2: Fraction = Field(0.999, description="adamw and its like: decay of the second moment")
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0, description="the rate of each layer is this times that of the next one towards the head (1: all alike)"
    )
    fused: Literal["auto", "on", "off"] = run_field("auto", "torch's fused kernels; auto: on a GPU, where the optimizer has them")
    schedule: Literal["cosine", "linear", "step", "constant"] = "cosine"
    warmup: Fraction = Field(0.05, description="share of all steps over which the rate rises from 0 to lr")
    final: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.01, description="cosine, linear: rate at the end, as a fraction of lr"
    )
    milestones: tuple[Fraction, ...] = Field((0.5, 0.75), description="step: shares of all steps at which the rate falls")
    gamma: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(0.1, description="step: what it is multiplied by there")


class TrainConfig(Section):
    """The training loop."""

    epochs: Count = Field(30, description="passes over the training split")
    batch_size: Count = Field(192, description="global batch: galaxies in one optimizer step, over all processes")
    micro_batch: Literal["auto"] | Annotated[int, Field(ge=0)] = run_field(
        "auto",
        "galaxies in one forward pass of one process (auto: the most that fit the GPU's memory, on a CPU half a minute's work; "
        "0: its whole share of the batch); "
        "smaller values accumulate gradients",
    )
    precision: Literal["auto", "no", "bf16", "fp16", "fp64"] = Field(
        "auto", description="auto: bf16 or fp16 by the GPU, fp32 on CPU; fp64: everything in double precision, to compare runs"
    )
    tf32: bool = Field(True, description="matrix products of float32 on a GPU by TensorFloat-32")
    channels_last: bool = run_field(False, "images as B H W C in memory: often faster for convolutions")
    compile: bool = run_field(False, "torch.compile the model: slower to start, then often faster")
    gradient_checkpointing: bool = run_field(
        False, "compute activations again instead of keeping them: less memory, a third slower"
    )
    sync_batchnorm: bool = Field(False, description="batch normalisation over the micro-batches of all processes together")
    threads: Annotated[int, Field(ge=0)] = run_field(
        0, "processor threads of each process (0: from its cores; a run that is continued keeps its number)"
    )
    strategy: Literal["ddp", "fsdp"] = run_field("ddp", "a whole model on each process (ddp), or each holds a part (fsdp)")
    label_smoothing: Fraction = 0.0
    mixup: NonNegative = Field(0.0, description="mix pairs of images: factor from Beta(a, a) (0: off)")
    cutmix: NonNegative = Field(0.0, description="paste a box of one image into another: area from Beta(a, a) (0: off)")
    mix_prob: Annotated[float, Field(ge=0.0, le=1.0)] = Field(1.0, description="share of the pairs that mixup or cutmix changes")
    mix_switch: Annotated[float, Field(ge=0.0, le=1.0)] = Field(0.5, description="share of cutmix where both are on")
    class_weights: Literal["none", "balanced"] = Field("none", description="balanced: N / (K N_k) in the loss")
    clip_norm: NonNegative = Field(1.0, description="gradient clipping by global norm (0: off)")
    clip_value: NonNegative = Field(0.0, description="gradient clipping of each element (0: off; needs clip_norm=0)")
    ema: Fraction = Field(0.0, description="decay a step of the moving average of the weights (0: off), ramped up at the start")
    patience: Annotated[int, Field(ge=0)] = Field(
        0, description="stop after this many validations without a better one (0: never)"
    )
    metric: Literal["accuracy", "balanced_accuracy", "loss"] = Field(
        "accuracy", description="validation metric that chooses the best checkpoint and stops early"
    )
    on_nonfinite: Literal["stop", "skip"] = run_field(
        "stop", "a step whose loss or gradient is not finite: stop, or leave it out"
    )
    max_nonfinite: Annotated[int, Field(ge=0)] = run_field(10, "with on_nonfinite=skip, stop after more such steps than this")
    spike_threshold: NonNegative = run_field(
        8.0, "warn of a loss so many robust standard deviations above the median of the last 200 steps (0: never)"
    )
    log_every: Count = run_field(20, "steps between lines of metrics.jsonl")
    save_every: Count = run_field(1, "epochs between checkpoints")
    save_steps: Annotated[int, Field(ge=0)] = run_field(0, "also save every so many steps (0: not)")
    save_minutes: NonNegative = run_field(0.0, "also save when the last save is so long ago (0: not)")
    async_save: bool = run_field(True, "write checkpoints beside the training, from a copy in memory")
    hang_timeout: NonNegative = run_field(
        1800.0, "seconds without a step after which the processes that are behind are named and the run ends (0: never)"
    )
    profile: str | None = run_field(None, "steps to trace with torch's profiler, such as 10-20; the trace lies in the run folder")


class EvalConfig(Section):
    """Evaluation during and after training."""

    batch_size: Count = Field(
        64, description="galaxies of one evaluation batch; a result field, since logits change in the last bits"
    )
    every: Count = Field(1, description="epochs between validations")
    checkpoint: Literal["best", "last"] = Field("best", description="which checkpoint is judged on the test split")
    tta: Literal["none", "d4"] = Field("none", description="d4: mean probability over the eight flips and quarter turns")
    figures: bool = run_field(
        True, "draw the evaluation at a run's end; false saves seconds, and `galaxydist evaluate` draws later"
    )
    variants: tuple[Variant, ...] = run_field(
        (), "data sets of the survey on whose test splits the run is judged at its end (on its own it always is)"
    )


class TrackerConfig(Section):
    """Experiment tracker, in addition to metrics.jsonl."""

    name: Literal["none", "wandb"] = run_field("none", "tracker")
    mode: Literal["auto", "online", "offline"] = run_field("auto", "auto: online with a key and a network, else offline")
    project: str = run_field("galaxydist", "wandb project", min_length=1)
    entity: str | None = run_field(None, "wandb team or user")
    tags: tuple[str, ...] = run_field((), "wandb tags")


class RunConfig(Section):
    """The run folder."""

    dir: Path | None = run_field(None, "run folder (else runs/<recipe>-<8 hex of the result fields>)")
    root: Path = run_field(Path("runs"), "folder of the run folders")


class ResumeConfig(Section):
    """Changes that a continued run may make."""

    force: tuple[str, ...] = run_field((), "result keys that may differ from the run folder's")


class Recipe(Section):
    """All settings of one run; read-only: values that are determined during the run are not stored here."""

    name: str = Field(..., description="recipe name: the file's, with that of its folder in recipes/", min_length=1)
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="seed of every random choice")
    order_version: Literal[1] = Field(1, description="version of order and chance; old runs keep theirs")
    data: DataConfig = DataConfig()
    model: ModelConfig
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    tracker: TrackerConfig = TrackerConfig()
    run: RunConfig = RunConfig()
    resume: ResumeConfig = ResumeConfig()
