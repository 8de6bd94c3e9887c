"""Checks of numbers on one GPU: unit tests, synchronisation, precisions, skipped steps, resumed runs."""

import json
import os
import signal
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.gpu.rig import Rig, Row, TimeUpError, at_least, at_most, equal, needs_cuda, not_possible
from tests.helpers.runs import quick_settings, read_losses, read_metrics, run_here

ROOT = Path(__file__).parents[2]
# No batch statistics and no dropout; three steps an epoch. Without noise, pixels of equal value are ties in pooling layers, which
# the last bit of a number decides.
EXACT: Mapping[str, object] = {
    "train__precision": "fp64",
    "train__log_every": 1,
    "train__epochs": 4,
    "train__ema": 0.9,
    "train__clip_norm": 1.0,
    "data__augment__zoom": 1.2,
    "data__augment__brightness": 0.2,
    "data__augment__noise": 0.02,
    "model__norm": "group",
    "model__drop_rate": 0.0,
    "train__threads": 1,
    "eval__every": 4,
    "eval__checkpoint": "last",
}
# As trained in practice: batch normalisation, dropout, moving average.
USUAL: Mapping[str, object] = {
    "train__log_every": 1,
    "train__epochs": 8,
    "train__ema": 0.9,
    "train__threads": 1,
    "model__drop_rate": 0.1,
    "eval__checkpoint": "last",
}
POISONED_STEP, STOPPED_STEP = 2, 10
AUDITED = range(10, 20)


# ---- unit tests ----


def check_unit_tests(rig: Rig) -> Iterator[Row]:
    """Run all tests that are marked gpu; if the time is over, report those that have ended."""
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8")]
    # Measurements of other loaders come last: the longest, and of the least worth here.
    files.sort(key=lambda path: (path.parent.name == "bench", str(path)))
    record = rig.new_folder() / "outcomes.jsonl"
    late: TimeUpError | None = None
    try:
        rig.call(run_pytest, [*map(str, files)], str(record))
    except TimeUpError as error:
        late = error
    outcomes = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    yield equal("tests that failed", [found["name"] for found in outcomes if found["outcome"] == "failed"], [])
    skipped = [found for found in outcomes if found["outcome"] == "skipped"]
    if rig.is_cuda:
        yield at_least("tests that passed", sum(found["outcome"] == "passed" for found in outcomes), 1)
        yield equal("tests that found no GPU", [found["name"] for found in skipped if "GPU" in found["reason"]], [])
        yield from (not_possible(found["name"], found["reason"]) for found in skipped if "GPU" not in found["reason"])
    else:
        yield needs_cuda(f"{len(skipped)} tests that are marked gpu", "they were collected and skipped")
    if late is not None:
        raise late


def run_pytest(files: list[str], record: str) -> None:
    """Run the tests marked gpu of some files; write the name, the outcome and the reason of each as a line of JSON."""
    import pytest

    def note(name: str, outcome: str, reason: str = "") -> None:
        with Path(record).open("a") as file:
            file.write(json.dumps({"name": name, "outcome": outcome, "reason": reason}) + "\n")

    class Outcomes:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when == "call" or not report.passed:
                reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
                note(report.nodeid, report.outcome, reason.removeprefix("Skipped: "))

    folder = Path(record).parent / "pytest"
    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", "no:xdist", f"--rootdir={ROOT}", f"--basetemp={folder}"]
    os.chdir(ROOT)
    code = pytest.main([*options, *files], plugins=[Outcomes()])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        note(f"pytest itself: {pytest.ExitCode(code).name}", "failed")


# ---- runs in this process, one after the other ----


def train_runs(manifest: str, folder: str, runs: dict[str, dict[str, Any]], on_host: bool = False) -> dict[str, dict[int, float]]:
    """Train some runs; return the losses of each by step.

    Args:
        manifest: of the shards.
        folder: the run folders get the names of the runs.
        runs: changes of ``quick_settings`` by name.
        on_host: augment on the CPU, whatever the device, so that the pixels are bit-equal.
    """
    found = {}
    with host_pixels() if on_host else warnings.catch_warnings():
        for name, changes in runs.items():
            code = run_here(quick_settings(Path(manifest), Path(folder) / name, **changes))
            assert code == 0, f"{name} ended with {code}"
            found[name] = read_losses(Path(folder) / name)
    return found


@contextmanager
def host_pixels() -> Iterator[None]:
    """Let all images be augmented on the CPU."""
    from torch import Tensor
    from torch.utils._pytree import tree_map_only

    from galaxydist.loading.augment import Augment

    augment: Callable[..., Tensor] = Augment.__call__

    def augment_on_host(self: Augment, images_BHWC: Tensor, *others: Any, **named: Any) -> Tensor:
        moved = tree_map_only(Tensor, lambda tensor: tensor.cpu(), others)
        return augment(self, images_BHWC.cpu(), *moved, **named).to(images_BHWC.device)

    Augment.__call__ = augment_on_host  # type: ignore[method-assign]
    try:
        yield
    finally:
        Augment.__call__ = augment  # type: ignore[method-assign]


def largest_gap(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """Return the largest difference of the losses of two runs, which must have the same steps."""
    assert one and one.keys() == other.keys()
    return max(abs(one[step] - other[step]) for step in one)


# ---- synchronisation ----


def check_synchronisation(rig: Rig) -> Iterator[Row]:
    """Ten steps of the real loop, in which only the agreement may make the host wait for the device."""
    found = rig.call(audit_steps, str(rig.blobs), str(rig.new_folder()))
    yield equal("steps audited", found["steps"], len(AUDITED))
    if not rig.is_cuda:
        yield needs_cuda("waits of the host for the device", "a CPU has no stream to wait for")
        return
    yield equal("synchronising operations", found["warnings"], {})
    yield equal("copies from or to pageable memory", found["pageable"], 0)
    # The profiler itself waits once, at its end.
    yield at_most("cudaStreamSynchronize and cudaDeviceSynchronize in all steps", found["synchronised"], 1)
    yield at_most("cudaEventSynchronize in a step (the agreement's)", found["events"] / len(AUDITED), 1.0)


def audit_steps(manifest: str, folder: str) -> dict[str, Any]:
    """Train, and record what makes the host wait in some steps."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from galaxydist.training.loop import TrainLoop

    is_cuda = torch.cuda.is_available()
    take_step = TrainLoop._step
    profiler = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])])
    waits: Counter[str] = Counter()
    taken: list[int] = []

    def show(message: Any, *_: Any, **__: Any) -> None:
        if "called a synchronizing" in str(message):
            frames = [frame for frame in traceback.extract_stack() if "/galaxydist/" in frame.filename]
            place = f"{frames[-1].filename.rpartition('/galaxydist/')[2]}:{frames[-1].lineno}" if frames else "outside galaxydist"
            waits[place] += 1

    def audited(self: TrainLoop, *given: Any) -> None:
        step = self.state.step
        if step == AUDITED.start:
            if is_cuda:
                torch.cuda.synchronize()
            profiler.start()
            if is_cuda:
                torch.cuda.set_sync_debug_mode("warn")
        elif step == AUDITED.stop:
            if is_cuda:
                torch.cuda.set_sync_debug_mode("default")
            profiler.stop()
        if step in AUDITED:
            taken.append(step)
        take_step(self, *given)

    TrainLoop._step = audited  # type: ignore[method-assign]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        changes = {**USUAL, "train__save_every": 8, "train__log_every": 5, "train__precision": "auto"}
        code = run_here(quick_settings(Path(manifest), Path(folder) / "run", **changes))
    assert code == 0
    names = Counter(event.name for event in profiler.events() or ())
    return {
        "steps": len(taken),
        "warnings": dict(waits),
        "pageable": sum(count for name, count in names.items() if "Pageable" in name),
        "synchronised": names["cudaStreamSynchronize"] + names["cudaDeviceSynchronize"],
        "events": names["cudaEventSynchronize"],
    }


# ---- numbers ----


def check_numbers(rig: Rig) -> Iterator[Row]:
    """Double precision against the CPU, micro-batches, mixed precision, and a batch that is not finite."""
    exact = {"whole": dict(EXACT), "micro-batches": {**EXACT, "train__micro_batch": 7}}
    manifest = str(rig.blobs)
    found = rig.call(train_runs, manifest, str(rig.new_folder()), exact, True)
    yield at_most("fp64 losses: micro-batches against the whole batch", largest_gap(found["whole"], found["micro-batches"]), 1e-9)
    if rig.is_cuda:
        cpu = rig.call(
            train_runs, manifest, str(rig.new_folder()), {"whole": dict(EXACT)}, True, environ={"CUDA_VISIBLE_DEVICES": ""}
        )
        yield at_most("fp64 losses: GPU against CPU", largest_gap(found["whole"], cpu["whole"]), 1e-9)
    else:
        yield needs_cuda("fp64 losses: GPU against CPU", "there is only a CPU")
    precisions = ("no", "bf16", "fp16") if rig.is_cuda else ("no", "bf16")
    # Masks of dropout differ between precisions, and the loss scale of fp16 costs some steps.
    usual = {**USUAL, "model__drop_rate": 0.0, "train__epochs": 16 if rig.is_cuda else 8}
    runs = {name: {**usual, "train__precision": name} for name in precisions}
    curves = rig.call(train_runs, manifest, str(rig.new_folder()), runs)
    ends = {name: mean_of_last(losses, 6) for name, losses in curves.items()}
    for name in precisions[1:]:
        yield at_most(f"{name}: last losses against fp32's {ends['no']:.4f}", abs(ends[name] - ends["no"]), 0.1)
    if not rig.is_cuda:
        yield needs_cuda("fp16: last losses against fp32's", "fp16 needs a GPU's loss scale")
    for precision in ("auto", "no"):
        found = rig.call(skip_poisoned_step, manifest, str(rig.new_folder()), precision)
        yield equal(f"tensors changed by a step with nan, precision {precision}", found["changed"], [])
        name = f"moving average after it, precision {precision}: against the average with the same weights once more"
        yield at_most(name, found["ema_gap"], 1e-6)
        yield equal(f"steps skipped, precision {precision}", found["skipped"], 1)


def mean_of_last(losses: Mapping[str, float], number: int) -> float:
    """Return the mean of the last losses by step."""
    steps = sorted(losses, key=int)[-number:]
    return sum(losses[step] for step in steps) / number


def skip_poisoned_step(manifest: str, folder: str, precision: str) -> dict[str, Any]:
    """Train one epoch whose last step has a pixel that is not a number; return the tensors that this step changed.

    The moving average takes the unchanged weights in once more; returned is its largest difference from what it should be then.
    """
    import torch

    from galaxydist.checkpoints import store
    from galaxydist.training.optimizer import MovingAverage
    from tests.helpers.scripts.poisoned_launch import poison

    poison(0, {POISONED_STEP})
    run_dir = Path(folder) / "run"
    changes: dict[str, object] = {"train__epochs": 1, "train__save_steps": 1, "train__on_nonfinite": "skip"}
    assert run_here(quick_settings(Path(manifest), run_dir, train__precision=precision, **{**USUAL, **changes})) == 0
    last, before = (store.read_sound(path) for path in store.list_checkpoints(run_dir / "checkpoints"))
    assert (last.step, before.step) == (POISONED_STEP + 1, POISONED_STEP)
    changed = [name for name, tensor in last.tensors.items() if not torch.equal(tensor, before.tensors[name])]
    (line,) = [line for line in read_metrics(run_dir) if line["step"] == last.step and "train/loss" in line]
    weight = 1 - MovingAverage(torch.nn.Identity(), float(str(USUAL["train__ema"]))).decay_at(last.step)
    gaps = [0.0]
    for name in [name for name in last.tensors if name.startswith("ema/")]:
        old, new = before.tensors[name], last.tensors[f"model/{name.removeprefix('ema/')}"]
        expected = torch.lerp(old, new, weight) if old.is_floating_point() else new
        gaps.append(float((last.tensors[name] - expected).abs().max()))
    assert len(gaps) > 1, "the run has a moving average"
    return {
        "changed": [name for name in changed if not name.startswith(("ema/", "ranks/"))],
        "ema_gap": max(gaps),
        "skipped": line["train/nonfinite"],
    }


# ---- resumed runs ----


def check_resume(rig: Rig) -> Iterator[Row]:
    """Stop and continue a run, with and without deterministic algorithms, and count the numbers that differ."""
    for deterministic in (True, False):
        found = rig.call(compare_resumed, str(rig.blobs), str(rig.new_folder()), {"train__deterministic": deterministic})
        name = "with train.deterministic" if deterministic else "without train.deterministic"
        yield equal(f"exit code of the stopped run, {name}", found["stopped"], 75)
        differing = f"{found['losses']} losses, {found['weights']} of {found['of_weights']} weights"
        if deterministic or not rig.is_cuda:
            yield equal(f"numbers that differ after a stop, {name}", differing, f"0 losses, 0 of {found['of_weights']} weights")
        else:
            yield Row(f"numbers that differ after a stop, {name}", differing)


def compare_resumed(manifest: str, folder: str, keys: dict[str, Any]) -> dict[str, Any]:
    """Train a run as a whole, and one that is stopped by SIGTERM and continued; return the numbers that differ."""
    from galaxydist.checkpoints import store
    from galaxydist.training.loop import TrainLoop

    changes = {**USUAL, "train__precision": "auto", **keys}
    whole, stopped = (Path(folder) / name for name in ("whole", "stopped"))
    assert run_here(quick_settings(Path(manifest), whole, **changes), os.environ) == 0
    take_step = TrainLoop._step

    def stopping(self: TrainLoop, *given: Any) -> None:
        if self.state.step == STOPPED_STEP:
            os.kill(os.getpid(), signal.SIGTERM)
        take_step(self, *given)

    TrainLoop._step = stopping  # type: ignore[method-assign]
    code = run_here(quick_settings(Path(manifest), stopped, **changes), os.environ)
    TrainLoop._step = take_step  # type: ignore[method-assign]
    assert run_here(quick_settings(Path(manifest), stopped, **changes), os.environ) == 0
    losses, others = read_losses(whole), read_losses(stopped)
    assert losses.keys() == others.keys()
    one, other = (store.load(path / "checkpoints") for path in (whole, stopped))
    assert one is not None and other is not None and one.tensors.keys() == other.tensors.keys()
    weights = [name for name in one.tensors if name.startswith("model/")]
    return {
        "stopped": code,
        "losses": sum(losses[step] != others[step] for step in losses),
        "weights": sum(int((one.tensors[name] != other.tensors[name]).sum()) for name in weights),
        "of_weights": sum(one.tensors[name].numel() for name in weights),
    }
