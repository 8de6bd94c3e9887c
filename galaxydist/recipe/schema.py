"""Schema of a recipe: the type, range, default and description of every key.

A field is a *result* field, which changes the numbers of a run and so the run's folder, unless it is defined with ``run_field``
(tracker, threads, micro-batch: it changes only the execution). New result fields are defined with ``later_field``.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer

from galaxydist.galaxy import Variant
from galaxydist.recipe.model_names import FORMS, NAMED_MODELS, check_model_name
from galaxydist.recipe.scalars import Location, check_address

ModelName = Annotated[str, AfterValidator(check_model_name)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]
# Whoever has such an address may use it: the plain values of a recipe, which are stored, shown and sent to trackers, have null.
SecretAddress = Annotated[str, AfterValidator(check_address), PlainSerializer(lambda _: None, when_used="json")]


def run_field(default: Any, description: str, *, is_secret: bool = False, **constraints: Any) -> Any:
    """Define a field that changes the execution of a run, but not its numbers; no message shows the value of a secret one."""
    extra: dict[str, Any] = {"kind": "run", "secret": is_secret}
    return Field(default, description=description, json_schema_extra=extra, repr=not is_secret, **constraints)


def later_field(default: Any, description: str, **constraints: Any) -> Any:
    """Define a result field that did not exist when the first run folders were created.

    At its default it is left out of the run's hash, so that older runs keep their folders.
    """
    return Field(default, description=description, json_schema_extra={"later": True}, **constraints)


class Section(BaseModel):
    """A section of the recipe: read-only, without unknown keys, nan or inf."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class AugmentConfig(Section):
    """Random augmentation of training images, in one resampling."""

    rotate: Literal["none", "d4", "any"] = Field(
        "any",
        description="random rotation; d4: by quarter turns, which keep exact pixels; any: by any angle, with reflected edges",
    )
    flip: bool = Field(
        True, description="mirror half of the images; set to false if mirrored galaxies belong to different classes"
    )
    zoom: Annotated[float, Field(ge=1.0, le=4.0)] = Field(
        1.0,
        description="largest zoom; the scale is drawn log-uniformly from 1/zoom to zoom; 1 turns it off; not with rotate=d4",
    )
    shift: Annotated[float, Field(ge=0.0, le=0.5)] = Field(
        0.0, description="largest shift along each axis, as a fraction of the image width; not with rotate=d4"
    )
    brightness: Fraction = Field(
        0.0, description="largest change b of the brightness: all channels are multiplied by one factor between 1 - b and 1 + b"
    )
    noise: Fraction = Field(
        0.0, description="largest standard deviation of added Gaussian noise, as a fraction of the full range of pixel values"
    )


class DataConfig(Section):
    """Data set and data loading."""

    dataset: str = Field("galaxy10_decals", description="name of the data set in the data root", min_length=1)
    variant: Variant = Field("original", description="variant of the survey: all galaxies, or equal numbers of each class")
    conflicting: Literal["keep", "drop"] = Field(
        "keep", description="training galaxies that the survey lists twice with different labels: keep or drop them"
    )
    manifest: Location | None = Field(
        None,
        description="manifest.json of shards outside the data root: a path, or a URL with s3://, gs://, https://, hf:// or "
        "file://",
    )
    dir: Path | None = run_field(None, "data root (default: $GALAXYDIST_DATA, then the user's cache folder)")
    image_size: Annotated[int, Field(ge=16, le=1024)] = Field(
        256, description="width and height of the model's input in pixels; stored images are resized to it"
    )
    crop: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0, description="central fraction of the stored width that is kept, in training and evaluation"
    )
    balance: Literal["none", "resample"] = Field(
        "none",
        description="resample: draw training galaxies evenly from the classes; shards are then read in random order: keep "
        "them on a local disk or in a cache that holds all of them",
    )
    num_streams: Count = Field(
        192,
        description="parallel streams that make up the order of an epoch; independent of the number of processes; on many nodes, "
        "a multiple of the number of nodes lets each shard be fetched by one node only",
    )
    on_error: Literal["raise", "skip"] = run_field(
        "raise", "training image that cannot be read: raise stops the run, skip gives it weight 0 (evaluation always stops)"
    )
    max_errors: Annotated[int, Field(ge=0)] = run_field(
        100, "with on_error=skip: stop the run if more galaxies than this cannot be read"
    )
    augment: AugmentConfig = AugmentConfig()
    threads: Annotated[int, Field(ge=0, le=1024)] = run_field(
        0, "decoding threads of each process; 0: one for each of its cores, two fewer with a GPU"
    )
    prefetch: Count = run_field(4, "batches that are decoded in advance; more smooth out a slow disk and use more memory")
    cache_dir: Path | None = run_field(
        None, "cache of remote shards, on a local disk of each node (default: the folder cache in the data root)"
    )
    cache_size: Positive = run_field(100.0, "size limit of the cache in GB; the least recently used shards are removed first")
    fetch_threads: Count = run_field(8, "shards that each process downloads at the same time")


class ModelConfig(Section):
    """Architecture and initial weights."""

    name: ModelName = Field(..., description=f"architecture: {', '.join(NAMED_MODELS)}; or {FORMS}")
    size: Literal["small", "base"] = Field("small", description="vit and vit_scratch: ViT-S/16 or ViT-B/16")
    pretrained: bool = Field(
        False,
        description="start from published weights, which `galaxydist weights fetch` downloads; custom_cnn: from those "
        "in the package",
    )
    weights: Path | None = Field(
        None, description="start from this local safetensors file (`galaxydist weights save` writes one)"
    )
    freeze_backbone: bool = Field(False, description="train the head only; the backbone stays in evaluation mode")
    drop_rate: Fraction = Field(0.0, description="dropout rate before the head")
    drop_path_rate: Fraction = Field(
        0.0, description="stochastic depth: rate of the last residual block, growing linearly from 0"
    )
    normalization: Literal["auto", "data", "pretrained"] = later_field(
        "auto",
        "channel mean and standard deviation that images are normalised with; data: of the data set; pretrained: of the "
        "published weights, also without them; auto: of the starting weights, if they have them, else of the data set",
    )
    width: Annotated[int, Field(ge=4, le=512)] = Field(
        32,
        description="custom_cnn and d4_cnn: channels of the first stage; for d4_cnn a multiple of its 8 orientations",
    )
    norm: Literal["batch", "group"] = Field(
        "batch",
        description="custom_cnn: batch or group normalisation; group makes the logits of an image independent of the batch",
    )


class OptimConfig(Section):
    """Optimizer and learning-rate schedule (a function of the step alone)."""

    name: str = Field(
        "adamw", description="optimizer: adamw, sgd (with Nesterov momentum), lamb, lion, muon or adan", min_length=1
    )
    lr: Positive = Field(1e-3, description="peak learning rate; scale it if you change train.batch_size")
    weight_decay: NonNegative = Field(
        0.05, description="weight decay of convolutions and matrices; not of biases and normalisation"
    )
    momentum: Fraction = Field(
        0.9, description="momentum of sgd and muon; decay of the first moment of the other optimizers (beta1)"
    )
    beta2: Fraction = Field(0.999, description="decay of the second moment of all optimizers but sgd")
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0,
        description="factor of the learning rate from each layer to the one before it, for fine-tuning; 1: the same rate for all",
    )
    fused: Literal["auto", "on", "off"] = run_field("auto", "torch's fused kernels of adamw and sgd; auto: on a GPU")
    schedule: Literal["cosine", "linear", "step", "constant"] = Field(
        "cosine", description="learning-rate schedule after the warm-up"
    )
    warmup: Fraction = Field(0.05, description="fraction of all steps in which the learning rate rises linearly from 0 to lr")
    final: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.01, description="schedule=cosine and linear: learning rate at the end, as a fraction of lr"
    )
    milestones: tuple[Fraction, ...] = Field(
        (0.5, 0.75), description="schedule=step: fractions of all steps at which the learning rate is multiplied by gamma"
    )
    gamma: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(0.1, description="schedule=step: factor at each milestone")


class TrainConfig(Section):
    """The training loop."""

    epochs: Count = Field(30, description="passes over the training split")
    batch_size: Count = Field(192, description="global batch size: galaxies of one optimizer step, over all processes")
    micro_batch: Literal["auto"] | Annotated[int, Field(ge=0)] = run_field(
        "auto",
        "galaxies in one forward pass of one process; smaller values accumulate gradients and save memory; auto: the most that "
        "fit into GPU memory (on a CPU, some 30 s of work); 0: the process's whole share of the batch",
    )
    precision: Literal["auto", "no", "bf16", "fp16", "fp64"] = Field(
        "auto",
        description="mixed precision; auto: bf16 or fp16, as the GPU supports it, and float32 on a CPU; no: float32; fp64: all "
        "in double precision, to compare runs",
    )
    tf32: bool = Field(True, description="use TensorFloat-32 for float32 products on a GPU: faster, with 10 bits of mantissa")
    channels_last: Literal["auto"] | bool = run_field(
        "auto",
        "store images and convolutions in memory as B H W C, with the channels last; auto: for convolutional models on a GPU",
    )
    deterministic: bool = later_field(
        False, "use deterministic kernels only, so that a run on a GPU repeats and continues bit for bit: slower"
    )
    compile: bool = run_field(False, "compile the model with torch.compile: slower to start, often faster afterwards")
    gradient_checkpointing: bool = run_field(
        False, "compute activations again in the backward pass instead of storing them: less memory, about a third slower"
    )
    sync_batchnorm: bool = Field(
        False, description="batch-norm statistics over the micro-batches of all processes; for few images in each process"
    )
    threads: Annotated[int, Field(ge=0, le=1024)] = run_field(
        0, "CPU threads of torch in each process; 0: from the number of its cores (a continued run keeps its number)"
    )
    strategy: Literal["ddp", "fsdp"] = run_field(
        "ddp", "ddp: each process holds the whole model; fsdp: model and optimizer are sharded, for models too large for one GPU"
    )
    label_smoothing: Fraction = Field(
        0.0, description="label smoothing: this share of the target is spread evenly over all classes"
    )
    mixup: NonNegative = Field(
        0.0, description="mixup of image pairs: alpha of the Beta distribution of the mixing factor; 0 turns it off"
    )
    cutmix: NonNegative = Field(
        0.0, description="cutmix of image pairs: alpha of the Beta distribution of the pasted area; 0 turns it off"
    )
    mix_prob: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        1.0, description="fraction of pairs to which mixup or cutmix applies"
    )
    mix_switch: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.5, description="fraction of cutmix if mixup and cutmix are both on"
    )
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="class weights in the loss; balanced: N / (K N_k) for class k, with N galaxies and K classes"
    )
    clip_norm: NonNegative = Field(1.0, description="largest global norm of the gradient; 0 turns clipping by norm off")
    clip_value: NonNegative = Field(
        0.0, description="largest absolute value of each gradient element; 0 turns it off; needs clip_norm=0"
    )
    ema: Fraction = Field(
        0.0, description="decay per step of the moving average of the weights, ramped up at the start; 0 turns it off"
    )
    patience: Annotated[int, Field(ge=0)] = Field(
        0, description="early stopping: validations without improvement before training stops; 0 turns it off"
    )
    metric: Literal["accuracy", "balanced_accuracy", "loss"] = Field(
        "accuracy", description="validation metric for the best checkpoint and early stopping"
    )
    on_nonfinite: Literal["stop", "skip"] = run_field(
        "stop", "step with a non-finite loss or gradient: stop ends the run, skip skips the step"
    )
    max_nonfinite: Annotated[int, Field(ge=0)] = run_field(10, "with on_nonfinite=skip: stop after more such steps than this")
    spike_threshold: NonNegative = run_field(
        8.0, "warn of a loss this many robust standard deviations above the median of the last 200 steps; 0 turns it off"
    )
    data_wait_limit: Annotated[float, Field(ge=0.0, le=1.0)] = run_field(
        0.5, "warn once a start if more than this share of a minute's training waits for data; 0 turns it off"
    )
    log_every: Count = run_field(20, "steps between lines of metrics.jsonl")
    save_every: Count = run_field(
        1, "epochs between checkpoints; one that is not the best is skipped while an earlier one is still being written"
    )
    save_steps: Annotated[int, Field(ge=0)] = run_field(0, "steps between additional checkpoints; 0: none")
    save_minutes: NonNegative = run_field(0.0, "minutes between additional checkpoints; 0: none")
    async_save: bool = run_field(True, "write checkpoints in the background, from a copy in memory")
    hang_timeout: NonNegative = run_field(
        600.0,
        "seconds without progress in a step after which the run ends and names the processes that are behind; the first "
        "step, validation, saving and evaluation may take longer; 0 turns it off",
    )
    profile: str | None = run_field(None, "steps to trace with torch's profiler, such as 10-20; the trace is in the run folder")


class EvalConfig(Section):
    """Evaluation during and after training."""

    batch_size: Count = Field(
        64, description="galaxies of one evaluation batch; a result key, because it changes the last bits of the logits"
    )
    every: Count = Field(1, description="epochs between validations")
    checkpoint: Literal["best", "last"] = Field("best", description="checkpoint that is evaluated on the test split")
    tta: Literal["none", "d4"] = Field(
        "none", description="test-time augmentation; d4: mean probability over the eight flips and quarter turns"
    )
    figures: bool = run_field(True, "draw figures at the end of a run; `galaxydist evaluate` can draw them later")
    variants: tuple[Variant, ...] = run_field(
        (), "variants of the survey on whose test splits the finished run is evaluated, in addition to its own"
    )


class TrackerConfig(Section):
    """Experiment tracker, in addition to metrics.jsonl."""

    name: Literal["none", "wandb", "trackio", "tensorboard"] = run_field("none", "experiment tracker")
    mode: Literal["auto", "online", "offline"] = run_field(
        "auto", "of wandb; auto: online if there is an API key and a network, else offline"
    )
    project: str = run_field("galaxydist", "project of wandb and trackio", min_length=1)
    entity: str | None = run_field(None, "wandb team or user (default: wandb's own)")
    tags: tuple[str, ...] = run_field((), "wandb tags")
    log_model: bool = run_field(True, "send the best model of a finished run to wandb, as an artifact with its card")
    webhook: SecretAddress | None = run_field(
        None,
        "http(s) address to which alerts are posted, such as a webhook of Slack, Mattermost or Discord; a secret, which "
        "neither recipe.json nor a tracker shows (default: $GALAXYDIST_WEBHOOK)",
        is_secret=True,
    )


class RunConfig(Section):
    """The run folder."""

    dir: Path | None = run_field(None, "run folder (default: RECIPE-HASH in run.root, with a hash of the result keys)")
    root: Path = run_field(Path("runs"), "folder that contains the run folders")


class ResumeConfig(Section):
    """Changes that a continued run may make."""

    force: tuple[str, ...] = run_field((), "result keys that may differ from those of the continued run; the change is recorded")


class Recipe(Section):
    """All settings of one run; read-only: values that are determined during the run are not stored here."""

    name: str = Field(
        ..., description="name of the recipe, from its file and its folder inside recipes/; cannot be set", min_length=1
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="seed of all random choices")
    order_version: Literal[1] = Field(1, description="version of the sample order and the random numbers; old runs keep theirs")
    data: DataConfig = DataConfig()
    model: ModelConfig
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    tracker: TrackerConfig = TrackerConfig()
    run: RunConfig = RunConfig()
    resume: ResumeConfig = ResumeConfig()
