"""The text table of a plan."""

from galaxydist.planner.estimate import KEPT_CHECKPOINTS, RunPlan
from galaxydist.planner.larger_batches import RULES
from galaxydist.planner.memory import ALLOWED_BYTES, ALLOWED_SHARE

WIDTH = 28


def render_plan(plan: RunPlan) -> str:
    """Return the plan as text: one line for each figure, then the warnings."""
    job, kept = plan.job, plan.checkpoints_bytes
    machines = f"{_count(job.num_nodes, 'node')} x {_count(job.gpus_per_node, 'GPU')}"
    processes = f"{machines} = {_count(job.world_size, 'process', 'es')}"
    lines = [
        f"plan of {plan.recipe}: {plan.model}, {plan.strategy}, {plan.precision}, {processes}",
        f"data: {plan.data}",
        "",
        *_steps(plan),
        "",
        *_memory(plan),
        "",
        *_reading(plan),
        "",
        _line("checkpoint", f"{show_size(plan.checkpoint_bytes)}: weights, optimizer, moving average"),
        _line(
            f"{KEPT_CHECKPOINTS} kept (2 and the best)",
            f"{show_size(kept)}; {show_size(kept + plan.checkpoint_bytes)} while one is written",
        ),
        *_scaling(plan),
    ]
    if plan.warnings:
        lines += ["", *(f"warning: {text}" for text in plan.warnings)]
    return "\n".join(lines)


def show_size(num_bytes: float) -> str:
    """Format a size with three digits in kB, MB, GB or TB (10^3 to 10^12 bytes)."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= 0.9995 * size:
            value = num_bytes / size
            return f"{value:,.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"
    return f"{num_bytes:.0f} B"


def show_time(seconds: float) -> str:
    """Format a duration in seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:,.1f} h"


def _steps(plan: RunPlan) -> list[str]:
    steps, job = plan.steps, plan.job
    least, most = steps.rank_batch_least, steps.rank_batch_most
    share = f"{least}" if least == most else f"{least} or {most}"
    dropped = f", {steps.dropped:,} of the incomplete last batch left out" if steps.dropped else ""
    lines = [
        _line("steps an epoch", f"{steps.per_epoch:,} of {plan.batch_size:,}: {steps.samples:,} training galaxies{dropped}"),
        _line("steps of the run", f"{steps.total:,} ({_count(plan.epochs, 'epoch')})"),
        _line("a process's batch", f"{share}, in {_count(steps.passes, 'pass', 'es')} of up to {plan.memory.micro_batch}"),
    ]
    if steps.validation_batches is None:
        lines.append(_line("validation", "not known (--galaxies counts training galaxies)"))
    elif steps.validation_batches == 0:
        lines.append(_line("validation", "no such split"))
    else:
        each = f"at most {steps.validation_batches_most:,} a process"
        lines.append(_line("validation", f"{_count(steps.validation_batches, 'batch', 'es')}, {each}"))
    if steps.epoch_s is None or steps.run_s is None:
        lines.append(_line("time", "give --img-s, the images a second of one GPU; `galaxydist bench trainer` measures it"))
    else:
        speed = f"at {job.images_per_s:g} img/s a GPU, training alone"
        lines.append(_line("time", f"{show_time(steps.epoch_s)} an epoch, {show_time(steps.run_s)} the run ({speed})"))
    return lines


def _memory(plan: RunPlan) -> list[str]:
    memory = plan.memory
    frozen = f", {plan.num_frozen:,} frozen" if plan.num_frozen else ""
    rows = [
        ("weights", memory.weights, ""),
        ("gradients", memory.gradients, ""),
        ("optimizer", memory.optimizer, ""),
        ("moving average", memory.moving_average, ""),
        ("gathered blocks", memory.gathered, "estimated"),
        ("images", memory.images, "decoded batches, this and the next"),
        ("activations", memory.activations, f"{memory.micro_batch} at a time"),
        ("allowance", memory.allowance, f"{show_size(ALLOWED_BYTES)} for CUDA and {ALLOWED_SHARE:.0%} of what comes and goes"),
    ]
    total = f"{show_size(memory.total)}; {show_size(memory.per_image)} for each image more in a pass"
    if plan.job.gpu_memory is not None:
        total += f"; fits {plan.job.gpu_memory:g} GB"
    return [
        _line("parameters", f"{plan.num_trained:,} trained{frozen}"),
        "memory of one GPU, estimated:",
        *(_line(f"  {name}", show_size(size) + (f" ({note})" if note else "")) for name, size, note in rows if size),
        _line("  at most together", total),
    ]


def _reading(plan: RunPlan) -> list[str]:
    reading = plan.reading
    least, most = reading.shards_per_node_least, reading.shards_per_node_most
    span = f"{most:,}" if least == most else f"{least:,} to {most:,}"
    rate = "" if reading.bytes_per_s is None else f", {show_size(reading.bytes_per_s)}/s"
    return [
        _line("training shards", f"{reading.num_shards:,}, {show_size(reading.num_bytes)}"),
        _line("a node reads an epoch", f"{span} shards, up to {show_size(reading.bytes_per_node_most)}{rate}"),
        _line("nodes that read a shard", f"{reading.nodes_per_shard:.3g} on average"),
        _line("in use at a time", f"up to {_count(reading.shards_held_most, 'shard')} on a node"),
        _line("cache of a node", f"{show_size(reading.cache_bytes)} or more, if the shards lie at a URL"),
    ]


def _scaling(plan: RunPlan) -> list[str]:
    if not plan.scaling:
        return []
    rule = RULES.get(plan.optimizer, (None, f"no rule for the rate of {plan.optimizer}"))[1]
    lines = ["", f"batches for more GPUs ({rule}; not trained):"]
    for proposal in plan.scaling:
        keys = [f"train.batch_size={proposal.batch_size}"]
        keys += [f"optim.lr={proposal.lr:g}"] if proposal.lr is not None else []
        keys += [f"train.ema={proposal.ema:g}"] if proposal.ema else []
        idle = "; the GPUs would still be idle" if proposal.is_idle else ""
        images = f"{proposal.batch_size // proposal.num_gpus} images a GPU a step"
        about = f"{images}, {_count(proposal.steps_per_epoch, 'step')} an epoch{idle}"
        lines.append(_line(f"  {_count(proposal.num_gpus, 'GPU')}", f"{' '.join(keys)} ({about})"))
    return lines


def _line(name: str, value: str) -> str:
    return f"{name:{WIDTH}}{value}"


def _count(number: int, name: str, ending: str = "s") -> str:
    return f"{number:,} {name if number == 1 else name + ending}"
