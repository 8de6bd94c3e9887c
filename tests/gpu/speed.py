"""Checks of speed and memory on one GPU: the training loop, the loader, and the plan of the memory."""

import itertools
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any, Literal

from tests.gpu.rig import Rig, Row, at_least, at_most, equal, needs_cuda, not_possible
from tests.helpers.runs import quick_settings, run_here

# Least speed from memory relative to the bare loop, whose augmentation is timed apart, and of the loader relative to memory.
OF_BARE, OF_MEMORY = 0.97, 0.95
MAX_IDLE = 0.05
# Model, images in a step, and further keys.
MEASURED: tuple[tuple[str, int, Mapping[str, object]], ...] = (
    ("resnet50", 192, {}),
    ("custom_cnn", 192, {}),
    ("vit_scratch", 192, {"model.size": "small"}),
    ("resnet18", 192, {}),
    ("resnet18", 30, {}),
    ("resnet50", 192, {"train.compile": "true"}),
)
REHEARSED = (("custom_cnn", 8, {}),)
REHEARSED_KEYS: Mapping[str, object] = {"train__batch_size": 12, "train__threads": 1}
PROFILED = range(10, 20)
# Bytes that a ballast leaves free, beside the margin of the search for a micro-batch; a quarter of a smaller card.
BALLAST_LEAVES = 4 << 30
# Bytes of a card that takes the batches of this module; on a smaller one they are smaller.
SPEED_CARD, MEMORY_CARD = 32 << 30, 16 << 30


def fitting(num_images: int, card_bytes: int, whole: int) -> int:
    """Return the images of a batch on a card: ``num_images`` from ``whole`` bytes on, else in proportion, a multiple of eight."""
    return num_images if card_bytes >= whole else max(8, num_images * card_bytes // whole // 8 * 8)


# ---- the training loop ----


def check_throughput(rig: Rig) -> Iterator[Row]:
    """Images per second of the trainer against a bare loop over images that are on the device."""
    if rig.is_cuda:
        idle = rig.call(idle_share, str(rig.galaxies), str(rig.new_folder()), fitting(96, rig.card_bytes, MEMORY_CARD))
        yield at_most("resnet50 with its loader: share of the time that the GPU is idle", idle, MAX_IDLE)
    else:
        yield needs_cuda("share of the time that the GPU is idle", "there is no GPU")
    for model, whole_batch, keys in MEASURED if rig.is_cuda else REHEARSED:
        batch_size = fitting(whole_batch, rig.card_bytes, SPEED_CARD) if rig.is_cuda else whole_batch
        name = ", ".join([model, f"{batch_size} images a step", *(f"{key}={value}" for key, value in keys.items())])
        if "train.compile" in keys and (reason := rig.call(why_not_compiled, rig.device)):
            yield not_possible(name, reason)
            continue
        found = rig.call(measure, rig.device, model, batch_size, {**keys, "tracker.name": "none"})
        yield Row(f"{name}: bare loop, img/s", found["bare"])
        yield Row(f"{name}: augmentation, ms a step", 1000 * found["augment_s"])
        for key, label, limit in (
            ("ratio", "trainer from memory / (bare loop and augmentation)", OF_BARE),
            ("ratio_loader", "trainer with its loader / from memory", OF_MEMORY),
        ):
            yield at_least(f"{name}: {label}", found[key], limit) if rig.is_cuda else Row(f"{name}: {label}", found[key])


def why_not_compiled(device: str) -> str:
    """Return the reason why nothing can be compiled on this machine, such as no C compiler; empty: there is none."""
    import torch

    from galaxydist.errors import EveryRankError
    from galaxydist.models.performance import check_compiler

    try:
        check_compiler(torch.device(device, 0) if device == "cuda" else torch.device(device))
    except EveryRankError as error:
        return str(error)
    return ""


def measure(device: str, model: str, batch_size: int, keys: dict[str, object]) -> dict[str, Any]:
    """Measure one model as ``galaxydist bench trainer`` does."""
    import torch

    from galaxydist.bench.trainer_speed import Sizes, measure_trainer

    is_cuda = device == "cuda"
    if not is_cuda:  # one thread: several that wait for one another take many times as long
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    sizes = Sizes(batch_size=batch_size) if is_cuda else Sizes(width=4, image_size=32, batch_size=batch_size)
    rounds, steps = (5, 10) if is_cuda else (1, 4)
    # On older GPUs auto is fp16, for which the bare loop has no scaler.
    precision: Literal["auto", "no"] = "auto" if not is_cuda or torch.cuda.get_device_capability() >= (8, 0) else "no"
    (found,) = measure_trainer(
        os.environ, models=[model], sizes=sizes, steps=steps, rounds=rounds, precision=precision, settings=keys
    )
    return found


def idle_share(manifest: str, folder: str, batch_size: int) -> float:
    """Train a ResNet-50 with the real loader, and return the share of ten steps in which no kernel runs."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    from galaxydist.training.loop import TrainLoop

    take_step = TrainLoop._step
    profiler = profile(activities=[ProfilerActivity.CUDA])

    def profiled(self: TrainLoop, *given: Any) -> None:
        step = self.state.step
        if step in (PROFILED.start, PROFILED.stop):
            (profiler.start if step == PROFILED.start else profiler.stop)()
        take_step(self, *given)

    TrainLoop._step = profiled  # type: ignore[method-assign]
    changes = {"data__image_size": 224, "train__batch_size": batch_size, "train__epochs": 1}
    epoch = long_epoch(manifest, folder, batch_size * (PROFILED.stop + 5))
    assert run_here(settings_of(epoch, folder, "resnet50", changes)) == 0
    events = [event for event in profiler.events() or () if event.device_type == DeviceType.CUDA]
    kernels = [event.time_range for event in events if not event.is_user_annotation]
    return 1 - busy_time([(kernel.start, kernel.end) for kernel in kernels]) / (
        max(kernel.end for kernel in kernels) - min(kernel.start for kernel in kernels)
    )


def long_epoch(manifest: str, folder: str, num_images: int) -> str:
    """Return the manifest of an epoch with the images many times: the host waits for the last step of an epoch."""
    from galaxydist.bench.loader_speed import repeat_source
    from galaxydist.shards.manifest import read_manifest

    options = {"num_images": num_images, "least": num_images, "shard_size": 256, "workers": 1}
    return str(repeat_source(read_manifest(Path(manifest)), Path(folder), **options).path)


def busy_time(intervals: list[tuple[float, float]]) -> float:
    """Return the length of the union of some intervals."""
    busy, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy


def settings_of(manifest: str, folder: str, model: str, changes: Mapping[str, object]) -> list[str]:
    """Return the settings of a short run of a model from random weights, as it would be trained on its device."""
    usual: dict[str, object] = {"recipe": model, "data__num_streams": 192, "eval__batch_size": 96, "eval__checkpoint": "last"}
    usual |= {"train__log_every": 1, "eval__every": 100, "train__save_every": 100}
    if model != "custom_cnn":
        usual["model__width"] = None
    return quick_settings(Path(manifest), Path(folder) / "run", **{**usual, **changes})


# ---- the loader ----


def check_loader(rig: Rig) -> Iterator[Row]:
    """Images per second of the loader alone by threads, and what decoding costs the thread that launches kernels."""
    cores = len(os.sched_getaffinity(0))
    threads = [count for count in (1, 2, 4, 8, 16, 32, 64) if count <= cores] if rig.is_cuda else [1]
    manifest = str(rig.galaxies)
    for count, speed in rig.call(measure_loader, manifest, threads, 2.0 if rig.is_cuda else 0.2).items():
        yield Row(f"loader alone, {count} threads, img/s", speed)
    if not rig.is_cuda:
        yield needs_cuda("launch time of a step with and without decoding threads", "a CPU launches no kernels")
        return
    found = rig.call(measure_launch, manifest, cores)
    yield Row("resnet50, 30 images: launch time of a step, ms", found["idle_ms"])
    yield Row("the same beside decoding threads, ms", found["decoding_ms"])
    yield Row("resnet50, 30 images: time of a step on the device, ms", found["device_ms"])


def measure_loader(manifest: str, threads: list[int], seconds: float) -> dict[str, float]:
    """Return images per second by number of threads."""
    from galaxydist.loading.loader import DecodeOptions, TrainLoader
    from galaxydist.shards.manifest import read_manifest

    found: dict[str, float] = {}
    for count in threads:
        with TrainLoader(read_manifest(Path(manifest)), seed=0, batch_size=16, decode=DecodeOptions(threads=count)) as loader:
            for _ in range(6):  # more than are decoded ahead
                next(loader)
            started, images = time.perf_counter(), 0
            while time.perf_counter() - started < seconds:
                images += len(next(loader).labels_B)
            found[str(count)] = images / (time.perf_counter() - started)
    return found


def measure_launch(manifest: str, threads: int) -> dict[str, float]:
    """Return the milliseconds in which the host launches a step, beside idle and busy decoding threads, and those of the step."""
    import torch

    from galaxydist.bench.in_memory import plain_step
    from galaxydist.loading.loader import DecodeOptions, TrainLoader
    from galaxydist.models.build import build_model
    from galaxydist.recipe.schema import ModelConfig
    from galaxydist.shards.manifest import read_manifest

    model = build_model(ModelConfig(name="resnet50"), 10, 224).cuda().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images_BCHW = torch.randn(30, 3, 224, 224, device="cuda").to(memory_format=torch.channels_last)
    labels_B = torch.randint(10, (30,), device="cuda")

    def steps(count: int) -> tuple[float, float]:
        launched, finished = [], []
        for _ in range(count):
            torch.cuda.synchronize()
            started = time.perf_counter()
            plain_step(model, optimizer, images_BCHW, labels_B, bf16=True)
            launched.append(time.perf_counter() - started)
            torch.cuda.synchronize()
            finished.append(time.perf_counter() - started)
        return 1000 * median(launched), 1000 * median(finished)

    steps(10)
    idle_ms, device_ms = steps(30)
    is_over = threading.Event()
    with TrainLoader(read_manifest(Path(manifest)), seed=0, batch_size=64, decode=DecodeOptions(threads=threads)) as loader:
        reader = threading.Thread(target=lambda: [None for _ in itertools.takewhile(lambda _: not is_over.is_set(), loader)])
        reader.start()
        decoding_ms, _ = steps(30)
        is_over.set()
        reader.join()
    return {"idle_ms": idle_ms, "decoding_ms": decoding_ms, "device_ms": device_ms}


# ---- memory ----


def check_memory(rig: Rig) -> Iterator[Row]:
    """The planned memory against a run's, and ``train.micro_batch=auto`` on a GPU that is nearly full."""
    card = rig.card_bytes if rig.is_cuda else 0
    model, changes = (
        ("resnet50", {"data__image_size": 224, "train__batch_size": fitting(128, card, MEMORY_CARD)})
        if rig.is_cuda
        else ("custom_cnn", REHEARSED_KEYS)
    )
    manifest = str(rig.galaxies)
    found = rig.call(planned_memory, manifest, str(rig.new_folder()), model, {**changes, "train__epochs": 1 + rig.is_cuda})
    yield Row(f"{model}, {changes['train__batch_size']} images: planned memory, GB", found["planned"])
    if rig.is_cuda:
        yield at_most(f"{model}: memory of a run / planned", found["used"] / found["planned"], 1.0)
        yield at_least(f"{model}: memory of a run / planned", found["used"] / found["planned"], 0.5)
    else:
        yield needs_cuda(f"{model}: memory of a run / planned", "the plan is of a GPU's memory")
    batch_size, left = fitting(192, card, MEMORY_CARD), min(BALLAST_LEAVES, card // 4)
    larger = {"train__batch_size": batch_size, "train__epochs": 3} if rig.is_cuda else {"train__epochs": 1}
    larger = {**changes, **larger, "train__micro_batch": "auto"}
    found = rig.call(train_under_ballast, manifest, str(rig.new_folder()), model, larger, left)
    if rig.is_cuda:
        name = f"micro_batch=auto with {left / 2**30:.1f} GiB beside its margin: galaxies of {batch_size} in a pass"
        yield at_most(name, found["micro_batch"], batch_size - 1)
    yield equal("micro_batch=auto: the run is finished", found["steps"] > 0, True)


def planned_memory(manifest: str, folder: str, model: str, changes: dict[str, object]) -> dict[str, float]:
    """Return the gigabytes that are planned for a run, and the most that it has allocated after its first epoch."""
    import torch

    from galaxydist.planner.memory import estimate, model_memory
    from galaxydist.recipe.resolve import load_recipe
    from galaxydist.runs.folder import RunFolder
    from galaxydist.shards.manifest import read_manifest

    settings = settings_of(manifest, folder, model, changes)
    assert run_here(settings) == 0
    recipe, shards = load_recipe(settings).recipe, read_manifest(Path(manifest))
    planned = estimate(
        model_memory(recipe, shards.num_classes, shards.image_size),
        recipe,
        world_size=1,
        rank_batch=recipe.train.batch_size,
        num_parts=1,
    )
    lines = RunFolder(Path(folder) / "run").timing.read()
    # Not the first epoch: in its first step cuDNN tries each kernel that fits, with workspaces as large as what is free.
    used = max((line.get("gpu/memory_gb", 0.0) for line in lines[len(lines) // 2 :]), default=0.0)
    # The context and the libraries are not torch's.
    context = (torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0] - torch.cuda.memory_reserved()) / 1e9 if used else 0.0
    return {"planned": planned.total / 1e9, "used": used + context}


def train_under_ballast(manifest: str, folder: str, model: str, changes: dict[str, object], left: int) -> dict[str, float]:
    """Train with all of the GPU's memory taken but ``left`` bytes and a margin; return the steps done and the micro-batch."""
    import torch

    from galaxydist.checkpoints import store
    from galaxydist.training.micro_batch import MARGIN

    ballast = None
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        ballast = torch.empty(free - left - round(MARGIN * total), dtype=torch.uint8, device="cuda")
    assert run_here(settings_of(manifest, folder, model, changes)) == 0
    del ballast
    found = store.load(Path(folder) / "run" / "checkpoints")
    assert found is not None
    return {"steps": found.step, "micro_batch": found.state["progress"]["micro_batch"]["micro_batch"]}
