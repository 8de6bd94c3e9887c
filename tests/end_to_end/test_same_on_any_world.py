"""The same run on any number of processes and micro-batches.

Galaxies, augmentations and learning rates are equal; in double precision losses and weights are too.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from galaxydist.checkpoints import store
from galaxydist.evaluation.galaxy_table import NUM_GALAXIES
from galaxydist.runs.folder import RunFolder
from galaxydist.shards.tar_index import IndexOptions, index_tars
from galaxydist.shards.writer.writer import write_shards
from galaxydist.surveys.image_table import TableOptions
from galaxydist.surveys.table_columns import ColumnNames
from galaxydist.surveys.tables.tar_scan import find_tars
from tests.helpers.blobs import BlobSurvey
from tests.helpers.foreign_tars import evo_tars
from tests.helpers.forked_runs import run_forked, train
from tests.helpers.runs import count_errors, quick_settings, read_losses, read_metrics, read_validations
from tests.helpers.scripts.traced_launch import train_traced
from tests.helpers.traces import read_steps

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

STEPS = 30
# No batch statistics and no dropout. Every image is warped, made brighter and noisy.
EXACT: Mapping[str, object] = {
    "train__precision": "fp64",
    "train__batch_size": 48,
    "train__epochs": 10,
    "train__log_every": 1,
    "train__ema": 0.9,
    "train__clip_norm": 1.0,
    "train__class_weights": "balanced",
    "train__label_smoothing": 0.1,
    "optim__schedule": "step",
    "data__augment__zoom": 1.2,
    "data__augment__brightness": 0.2,
    "data__augment__noise": 0.02,
    "eval__every": 5,
    "model__norm": "group",
    "model__drop_rate": 0.0,
}
MIXED = {**EXACT, "train__mixup": 0.4, "train__cutmix": 1.0, "train__mix_prob": 0.8}
BATCH_NORM = {**EXACT, "model__norm": "batch", "train__sync_batchnorm": True, "train__ema": 0.0, "train__epochs": 4}


@pytest.fixture(scope="module")
def uneven_blobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """270 galaxies, with uneven classes in train (so that class weights differ); 3 steps an epoch."""
    survey = UnevenBlobs(num_galaxies=270)
    return write_shards(survey, tmp_path_factory.mktemp("uneven") / "shards", encoding="png", shard_size=16, workers=1).path


class UnevenBlobs(BlobSurvey):
    """A third of the round ones is left out of the training split; no test split, since what is judged is the training."""

    @property
    def splits(self):  # type: ignore[no-untyped-def]
        splits = dict(super().splits)
        train = splits["train"]
        return {"val": splits["val"], "train": train[~((self.labels[train] == 0) & (train % 9 == 0))]}


def run(manifest: Path, folder: Path, num_processes: int, changes: Mapping[str, object]) -> Path:
    """A traced run of so many processes, to its end."""
    settings = quick_settings(manifest, folder / "run", **changes)
    done = run_forked(train_traced, folder / "trace", settings, size=num_processes)
    assert done.returncode == 0, done.stderr
    processes = "1 process," if num_processes == 1 else f"{num_processes} processes,"
    assert processes in done.stderr
    assert num_processes in {step.world_size for step in read_steps(folder / "trace").values()}
    return folder


def weights(folder: Path, steps: int) -> dict[str, torch.Tensor]:
    found = store.load(folder / "run" / "checkpoints")
    assert found is not None and found.step == steps
    return {name: tensor for name, tensor in found.tensors.items() if name.startswith(("model/", "ema/", "optimizer/"))}


def largest_difference(one: Path, other: Path, steps: int = STEPS) -> float:
    """Of any loss and gradient norm of a step, any weight, average or moment after the last."""
    first, second = weights(one, steps), weights(other, steps)
    assert first.keys() == second.keys()
    differences = [float((first[name] - second[name]).abs().max()) for name in first if first[name].is_floating_point()]
    losses, others = read_losses(one / "run"), read_losses(other / "run")
    assert sorted(losses) == list(range(1, steps + 1)) == sorted(others)
    norms = [[line["train/grad_norm"] for line in read_metrics(run / "run") if "train/grad_norm" in line] for run in (one, other)]
    differences += [abs(norm - other_norm) for norm, other_norm in zip(*norms, strict=True)]
    return max(*differences, *(abs(losses[step] - others[step]) for step in losses))


def assert_same_validations(one: Path, other: Path) -> None:
    """The counts are equal, and of each galaxy of the table the prediction; its image is the same file."""
    pairs = [read_validations(RunFolder(folder / "run")) for folder in (one, other)]
    for first, second in zip(*pairs, strict=True):
        assert (first.step, first.confusion_KK, first.recall_K) == (second.step, second.confusion_KK, second.recall_K)
        assert [each["count"] for each in first.calibration] == [each["count"] for each in second.calibration]
        assert len(first.galaxies) == NUM_GALAXIES
        for galaxy, same in zip(first.galaxies, second.galaxies, strict=True):
            assert replace(galaxy, probability=0, image=Path()) == replace(same, probability=0, image=Path())
            assert galaxy.probability == pytest.approx(same.probability, abs=1e-9)
            assert galaxy.image.read_bytes() == same.image.read_bytes()


def assert_same_steps(one: Path, other: Path) -> None:
    first, second = read_steps(one / "trace"), read_steps(other / "trace")
    assert sorted(first) == list(range(STEPS)) == sorted(second)
    for step, taken in first.items():
        assert len(taken.samples) == 48
        assert (taken.samples, taken.images, taken.rate) == (second[step].samples, second[step].images, second[step].rate), step
    assert [line["train/lr"] for line in read_metrics(one / "run") if "train/lr" in line] == [
        line["train/lr"] for line in read_metrics(other / "run") if "train/lr" in line
    ]


@pytest.fixture(scope="module")
def one_process(uneven_blobs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(uneven_blobs, tmp_path_factory.mktemp("one"), 1, EXACT)


@pytest.mark.parametrize(
    ("processes", "changes"),
    [
        (3, {}),
        (5, {}),
        (2, {"train__micro_batch": 5}),
        pytest.param(2, {}, marks=pytest.mark.nightly),
        pytest.param(1, {"train__micro_batch": 12}, marks=pytest.mark.nightly),
    ],
    ids=["3 x 16", "5 uneven", "2 x 5 micro-batches", "2 x 24", "4 micro-batches"],
)
def test_fp64_losses_and_weights_on_any_world_size_and_micro_batch_equal_one_process(
    uneven_blobs: Path, one_process: Path, tmp_path: Path, processes: int, changes: Mapping[str, object]
) -> None:
    other = run(uneven_blobs, tmp_path, processes, {**EXACT, **changes})
    assert_same_steps(one_process, other)
    assert_same_validations(one_process, other)
    assert largest_difference(one_process, other) < 1e-9


def test_mixup_and_cutmix_give_equal_fp64_weights_on_1_and_3_processes_and_micro_batches(
    uneven_blobs: Path, one_process: Path, tmp_path: Path
) -> None:
    """On three processes, and in four micro-batches of one."""
    one = run(uneven_blobs, tmp_path / "one", 1, MIXED)
    for num_processes, changes in ((3, {}), (1, {"train__micro_batch": 12})):
        other = run(uneven_blobs, tmp_path / f"{num_processes}-{len(changes)}", num_processes, {**MIXED, **changes})
        assert_same_steps(one, other)
        assert largest_difference(one, other) < 1e-9
    assert largest_difference(one_process, one) > 1e-3


def test_fsdp_and_ddp_runs_are_equal_in_fp64_and_continue_from_each_other(uneven_blobs: Path, tmp_path: Path) -> None:
    """What two processes saved in parts goes on as whole models on three, and the reverse."""
    # The rate of a step does not depend on how many follow: the first half of a run is a run.
    steady = {**EXACT, "optim__schedule": "constant", "optim__warmup": 0.0}
    whole = run(uneven_blobs, tmp_path / "whole", 1, steady)
    halves = (("parts", 2, {"train__strategy": "fsdp", "train__micro_batch": 5}, "ddp"), ("all", 1, {}, "fsdp"))
    for name, num_processes, changes, then in halves:
        half = {**steady, "train__epochs": 5, **changes}
        folder = run(uneven_blobs, tmp_path / name, num_processes, half)
        (folder / "run" / "result.json").unlink()
        on = {"train__epochs": 10, "train__strategy": then, "resume__force": "[train.epochs]"}
        run(uneven_blobs, folder, 3, {**half, **on})
        assert_same_steps(whole, folder)
        assert largest_difference(whole, folder) < 1e-9


def test_mixup_with_an_odd_number_of_images_per_rank_is_refused(uneven_blobs: Path, tmp_path: Path) -> None:
    settings = quick_settings(uneven_blobs, tmp_path / "run", **{**MIXED, "train__batch_size": 50})
    done = run_forked(train, settings, size=2)
    assert done.returncode != 0
    assert count_errors(done.stderr) == 1 and "train.batch_size" in done.stderr
    assert not (tmp_path / "run").exists()


def test_synchronised_batch_norm_gives_equal_fp64_weights_on_1_and_5_processes(uneven_blobs: Path, tmp_path: Path) -> None:
    """On five processes, which have uneven shares."""
    one = run(uneven_blobs, tmp_path / "one", 1, BATCH_NORM)
    local = run(uneven_blobs, tmp_path / "local", 2, {**BATCH_NORM, "train__sync_batchnorm": False})
    assert largest_difference(one, local, 12) > 1e-6
    assert largest_difference(one, run(uneven_blobs, tmp_path / "five", 5, BATCH_NORM), 12) < 1e-9


def test_foreign_tars_give_equal_fp64_losses_on_1_2_and_3_processes_without_being_rewritten(
    real_sample: Path, tmp_path: Path
) -> None:
    """Tars like those of Galaxy Zoo Evo: real galaxies of mixed sizes and formats, labels in JSON, splits across tars."""
    evo_tars(real_sample, tmp_path / "tars", per_class=9)
    before = {path.name: path.read_bytes() for path in (tmp_path / "tars").iterdir()}
    table = TableOptions("evo", ColumnNames(label="gz10_class"), classes="galaxy10")
    index = index_tars(find_tars({None: str(tmp_path / "tars")}), tmp_path / "index", table, IndexOptions(image_size=64))
    assert index.encoding == "file" and index.split("train").num_samples == 50
    changes = {**EXACT, "train__batch_size": 15, "train__epochs": 3, "eval__every": 3}
    one, *others = (run(index.path, tmp_path / str(size), size, changes) for size in (1, 2, 3))
    for other in others:
        assert largest_difference(one, other, 9) < 1e-9
    assert {path.name: path.read_bytes() for path in (tmp_path / "tars").iterdir()} == before
