"""Summary of a run before its first step (folder, data, model, steps, time) and after its last one."""

from collections.abc import Mapping

from torch import nn

from galaxydist.atomic_files import write_json
from galaxydist.distributed import World
from galaxydist.models.registry import ModelRecord
from galaxydist.paths import PACKAGE_DIR
from galaxydist.recipe.identity import flatten
from galaxydist.recipe.resolve import COMMAND_LINE, ResolvedRecipe
from galaxydist.recipe.scalars import to_text
from galaxydist.recipe.schema import Recipe
from galaxydist.runs.code_version import CodeVersion, write_diff
from galaxydist.runs.folder import RunFolder
from galaxydist.shards.manifest import Manifest
from galaxydist.training.metric_logger import RunLength
from galaxydist.training.micro_batch import Probe, share_of, unchanged
from galaxydist.training.throughput import training_flops
from galaxydist.version import __version__

# If a run would take longer than this on a CPU, the summary suggests a smaller one.
LONG_RUN_S = 1800.0
# Floating point operations of the pass that is timed on a CPU: a second or less of one core.
TIMED_FLOPS = 2e10
SMALLER = {"data.image_size": 64, "train.epochs": 5}
SMALL_RECIPE = "custom_cnn"


def describe_run(
    resolved: ResolvedRecipe,
    manifest: Manifest,
    folder: RunFolder,
    model: nn.Module,
    schedule: RunLength,
    *,
    record: ModelRecord,
) -> str:
    """Return the lines that describe a new run, except its time.

    Args:
        resolved: the recipe.
        manifest: the shards.
        folder: the run folder.
        model: the model to be trained.
        schedule: length of the run.
        record: of the model, with the source of its weights.
    """
    recipe = resolved.recipe
    num_samples = {name: split.num_samples for name, split in manifest.splits.items()}
    counts = ", ".join(f"{number:,} {name}" for name, number in num_samples.items())
    total, trained = count_parameters(model)
    left_out = num_samples["train"] % schedule.batch_size
    epochs = schedule.total_steps // schedule.steps_per_epoch
    licence = f"; licence {manifest.origin.describe()['licence']}" if manifest.origin and manifest.origin.licence else ""
    lines = {
        "run folder": str(folder),
        "data": f"{manifest.dataset} ({manifest.variant}), {manifest.num_classes} classes, {counts}" + licence,
        "model": f"{recipe.model.name}, {total / 1e6:,.2f} million parameters"
        + (f", {trained / 1e6:,.2f} million trained" if trained != total else "")
        + f", images of {recipe.data.image_size} pixels",
        **({"weights": f"{record.source}, licence {record.licence or 'not stated'}"} if record.source else {}),
        "steps": f"{schedule.steps_per_epoch:,} an epoch, {schedule.total_steps:,} in {epochs:,} epochs, "
        f"{schedule.batch_size:,} galaxies each"
        + (f"; {left_out:,} galaxies are left out of each epoch, others each time" if left_out else ""),
    }
    return "\n".join(f"{name:<11} {text}" for name, text in lines.items())


def write_facts(folder: RunFolder, model: nn.Module) -> None:
    """Write facts of a run that its recipe does not hold: run.json, and code.diff if the package has uncommitted changes.

    run.json has ``parameters`` and ``trained_parameters``, ``galaxydist`` (its version), and, if the code lies in a clone or was
    submitted from one, ``commit`` and ``uncommitted_changes``.

    Args:
        folder: the run folder.
        model: bare or sharded.
    """
    total, trained = count_parameters(model)
    version = CodeVersion.of(PACKAGE_DIR)
    facts = {"parameters": total, "trained_parameters": trained, "galaxydist": __version__}
    write_json(folder.facts_path, facts if version is None else {**facts, **version.facts()})
    write_diff(version, folder.path)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the number of all parameters, and of those that are trained."""
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(count for count, _ in counts), sum(count for count, is_trained in counts if is_trained)


def describe_time(world: World, resolved: ResolvedRecipe, model: nn.Module, schedule: RunLength, micro_batch: int) -> str | None:
    """Return a line with the estimated time of a run, from a pass whose results are discarded; None if it cannot be estimated.

    All ranks must call it. The model, its gradients and torch's random numbers are unchanged.

    Args:
        world: the processes.
        resolved: the recipe.
        model: on its device; neither sharded nor wrapped by DistributedDataParallel.
        schedule: length of the run.
        micro_batch: galaxies in one forward pass of one process (0: the whole share of the rank).
    """
    recipe = resolved.recipe
    if recipe.train.strategy == "fsdp" or recipe.train.compile:  # a sharded model cannot run on one rank alone; compiling is slow
        return None
    share = share_of(recipe, world.size)
    count = min(micro_batch or share, share)
    if world.device.type == "cpu":
        with unchanged(model, world.device):
            model.eval()  # in training mode, synchronised batch normalisation communicates
            flops = training_flops(model, recipe.data.image_size)
        count = max(1, min(count, int(TIMED_FLOPS / flops)))
        count = max(count, min(2, share))  # batch normalisation needs two values
    probe = Probe(world, recipe, model)
    with unchanged(model, world.device):
        if not min(world.all_gather(probe.fits(count))):  # the first pass allocates
            return None
        seconds = min(probe.seconds(count) for _ in range(2))
    step_s = max(world.all_gather(seconds)) / count * share
    epoch_s, run_s = step_s * schedule.steps_per_epoch, step_s * schedule.total_steps
    line = f"{'time':<11} about {duration(epoch_s)} an epoch, {duration(run_s)} in all, without validation"
    if world.device.type == "cpu" and run_s > LONG_RUN_S:
        line += f"\nThere is no GPU here. The run continues; a smaller run: {smaller_command(recipe, resolved.origins)}"
    return line


def duration(seconds: float) -> str:
    """Return a time in words, with two digits: ``50 seconds``, ``12 minutes``, ``3.4 hours``, ``5 days``."""
    for unit, length, limit in (("seconds", 1.0, 100.0), ("minutes", 60.0, 100.0), ("hours", 3600.0, 48.0)):
        if seconds < limit * length:
            value = seconds / length
            return f"{value:.1f} {unit}" if value < 9.95 else f"{value:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"


def smaller_command(recipe: Recipe, origins: Mapping[str, str]) -> str:
    """Return the user's command, changed to a run that is feasible on a CPU.

    Args:
        recipe: the recipe.
        origins: dotted key -> origin of the value.
    """
    values = flatten(recipe)
    is_small = recipe.model.name in (SMALL_RECIPE, "d4_cnn")
    name = recipe.name if is_small else SMALL_RECIPE
    of_the_model = ("model.", "run.") if is_small else ("model.", "run.", "optim.")
    words = {key: values[key] for key in values if origins.get(key) == COMMAND_LINE and not key.startswith(of_the_model)}
    words |= {key: min(limit, values[key]) for key, limit in SMALLER.items()}
    return " ".join(["galaxydist train", f"recipe={name}", *(f"{key}={to_text(value)}" for key, value in words.items())])


def describe_end(folder: RunFolder) -> str:
    """Return the lines with the commands that come after a finished run."""
    return (
        f"its mistakes, with saliency maps: galaxydist gallery {folder}\n"
        f"beside other runs:                galaxydist report {folder.path.parent}"
    )


def describe_result(summary: Mapping[str, float]) -> str:
    """Return one line about the result of a run, from its final metrics."""
    names = {"test/accuracy": "test accuracy", "test/balanced_accuracy": "balanced accuracy"}
    parts = [f"{shown} {summary[name]:.4f}" for name, shown in names.items() if isinstance(summary.get(name), float)]
    return f"the run is finished: {', '.join(parts)}" if parts else "the run is finished"
