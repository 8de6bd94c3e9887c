"""Finished runs read as records; what cannot be used is said, and the rest is read on."""

import json
from pathlib import Path

import pytest

from galaxydist.atomic_files import read_json, write_json
from galaxydist.galaxy import GALAXY10_CLASSES
from galaxydist.report.finished_runs import read_finished_runs
from galaxydist.report.matrix import build_tables
from galaxydist.report.published_results import BALANCED_TO_ORIGINAL, ON_BALANCED, ON_ORIGINAL
from galaxydist.shards.writer.writer import write_shards
from tests.helpers.blobs import BlobSurvey
from tests.helpers.runs import quick_settings, read_evaluation, read_metrics, run_here
from tests.helpers.trial_folders import STEP, write_trial


def test_finished_run_is_read_with_recipe_validation_and_evaluations(tmp_path: Path) -> None:
    run = write_trial(tmp_path / "a", ["recipe=vgg16", "seed=3", "data.variant=balanced"], validation=0.71)
    (trial,), notes = read_finished_runs([run.path, run.path])
    assert notes == []
    assert (trial.recipe, trial.model, trial.dataset, trial.variant, trial.seed) == (
        "vgg16",
        "vgg16",
        "galaxy10_decals",
        "balanced",
        3,
    )
    assert trial.class_names == GALAXY10_CLASSES
    assert trial.regime == "own"
    assert trial.validation is not None
    assert (trial.validation.metric, trial.validation.value, trial.validation.step) == ("accuracy", 0.71, STEP)
    own, other = trial.result_in(ON_BALANCED), trial.result_in(BALANCED_TO_ORIGINAL)
    assert trial.result_in(ON_ORIGINAL) is None
    assert own is not None
    assert other is not None
    written = json.loads((run.evaluation_dir / "test.json").read_text())
    assert own.accuracy == written["accuracy"]
    assert own.loss == written["loss"]
    assert list(own.recall) == written["per_class"]["recall"]
    assert list(own.support) == written["per_class"]["support"]
    assert [list(row) for row in own.confusion] == written["confusion"]
    assert own.predictions_path == run.evaluation_dir / "test-predictions.parquet"
    assert other.predictions_path == run.evaluation_dir / "galaxy10_decals-original" / "test-predictions.parquet"
    assert other.variant == "original"


def test_run_evaluated_with_d4_views_and_without_predictions_is_read(tmp_path: Path) -> None:
    run = write_trial(tmp_path / "a", ["recipe=vit", "eval.tta=d4"], keep_predictions=False)
    assert (run.evaluation_dir / "test-d4.json").is_file()
    (trial,), notes = read_finished_runs([run.path])
    assert notes == []
    assert [judgement.predictions_path for judgement in trial.results.values()] == [None, None]


def test_settings_are_equal_only_for_repeats_with_another_seed_variant_or_micro_batch(tmp_path: Path) -> None:
    changes = [[], ["seed=1"], ["data.variant=balanced"], ["train.micro_batch=8"], ["optim.lr=0.5"], ["eval.tta=d4"]]
    runs = [write_trial(tmp_path / str(number), ["recipe=resnet18", *more]) for number, more in enumerate(changes)]
    found = [read_finished_runs([run.path])[0][0].settings for run in runs]
    assert len(set(found[:4])) == 1
    assert len(set(found)) == 3
    recipe = read_json(runs[0].recipe_path)
    del recipe["recipe"]["train.deterministic"]  # a run of a version without this key
    write_json(runs[0].recipe_path, recipe)
    assert read_finished_runs([runs[0].path])[0][0].settings == found[0]


def test_reference_recipes_have_the_regime_reference(tmp_path: Path) -> None:
    recipe = tmp_path / "recipes" / "reference" / "resnet50.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text("model: {name: resnet50, pretrained: true, freeze_backbone: true}\noptim: {lr: 0.001}\n")
    named = tmp_path / "reference_vit.yaml"
    named.write_text("model: {name: vit_scratch}\n")
    runs = [write_trial(tmp_path / str(number), [f"recipe={path}"]) for number, path in enumerate((recipe, named))]
    trials, _ = read_finished_runs([run.path for run in runs])
    assert [trial.regime for trial in trials] == ["reference", "reference"]


def test_unusable_runs_are_noted_with_a_reason_and_the_others_are_read(tmp_path: Path) -> None:
    good = write_trial(tmp_path / "good")
    same = write_trial(tmp_path / "same")
    (tmp_path / "empty").mkdir()
    unfinished = write_trial(tmp_path / "unfinished", ["recipe=resnet50", "seed=1"], finished=False)
    unjudged = write_trial(tmp_path / "unjudged", ["recipe=resnet50", "seed=2"])
    (unjudged.evaluation_dir / "test.json").unlink()
    broken = write_trial(tmp_path / "broken", ["recipe=resnet50", "seed=3"])
    (broken.evaluation_dir / "test.json").write_text('{"format": 1')
    result = write_trial(tmp_path / "result", ["recipe=resnet50", "seed=4"])
    result.result_path.write_text("{")
    false = write_trial(tmp_path / "false", ["recipe=resnet50", "seed=5"])
    content = json.loads((false.evaluation_dir / "test.json").read_text())
    write_json(false.evaluation_dir / "test.json", content | {"count": 7})
    classes = write_trial(tmp_path / "classes", ["recipe=resnet50", "seed=6"], class_names=["a", "b", "c"])
    runs = [good, same, unfinished, unjudged, broken, result, false, classes]
    more = [write_trial(tmp_path / f"vgg{seed}", ["recipe=vgg16", f"seed={seed}"]) for seed in range(2)]
    trials, notes = read_finished_runs([tmp_path / "empty", tmp_path / "nowhere", *(run.path for run in [*runs, *more])])
    assert [trial.run_dir.name for trial in trials] == ["good", "vgg0", "vgg1"]
    said = {Path(folder).name: text for folder, text in (note.split(": ", 1) for note in notes)}
    assert list(said) == ["empty", "nowhere", "unfinished", "unjudged", "broken", "result", "false", "same", "classes"]
    assert "not a run folder" in said["empty"]
    assert "has not finished" in said["unfinished"]
    assert f"galaxydist evaluate {unjudged.path}" in said["unjudged"]
    assert "test.json is damaged" in said["broken"]
    assert "result.json is not readable" in said["result"]
    assert "7 galaxies" in said["false"]
    assert "good has the same settings, variant and seed (0)" in said["same"]
    assert "its classes (a, b, c)" in said["classes"]


@pytest.mark.parametrize("text", ["[]", '{"format": 1, "recipe": {}}', '{"format": 1, "recipe": {"seed": "x"}}', "\x00"])
def test_run_with_a_damaged_recipe_is_noted_and_the_others_are_read(tmp_path: Path, text: str) -> None:
    good, bad = write_trial(tmp_path / "good"), write_trial(tmp_path / "bad", ["recipe=resnet50", "seed=1"])
    bad.recipe_path.write_text(text)
    trials, notes = read_finished_runs([bad.path, good.path])
    assert [trial.run_dir.name for trial in trials] == ["good"]
    assert [note.split(": ")[0] for note in notes] == [str(bad.path)]


def test_evaluations_that_fit_in_no_table_are_noted_and_left_out(tmp_path: Path) -> None:
    run = write_trial(tmp_path / "a")
    place = run.evaluation_dir / "galaxy10_decals-balanced" / "test.json"
    content = json.loads(place.read_text())
    changes = {
        "step": content | {"step": 3},
        "dataset": content | {"dataset": "simulated"},
        "own": content | {"variant": "original", "manifest_hash": "png"},
        "classes": content | {"classes": [f"c{number}" for number in range(10)]},
        "variant": content | {"variant": "odd"},
    }
    place.write_text("{")
    for name, changed in changes.items():
        (run.evaluation_dir / name).mkdir()
        write_json(run.evaluation_dir / name / "test.json", changed)
    (trial,), notes = read_finished_runs([run.path])
    assert list(trial.results) == ["original"]
    said = " | ".join(notes)
    assert len(notes) == 6
    for part in ("step 3", "is in no table", "from other shards", "other classes", "'odd'", "is damaged"):
        assert part in said


def test_validation_value_is_that_of_the_evaluated_checkpoint(tmp_path: Path) -> None:
    run = write_trial(tmp_path / "a", ["recipe=resnet50", "train.metric=loss"], validation=0.6)
    run.metrics.append(STEP + 10, {"val/loss": 0.1})
    (trial,), _ = read_finished_runs([run.path])
    assert trial.validation is not None
    assert (trial.validation.metric, trial.validation.value) == ("loss", pytest.approx(0.4))
    silent = write_trial(tmp_path / "b", validation=None)
    assert read_finished_runs([silent.path])[0][0].validation is None
    run.metrics_path.write_text("nonsense\n")
    assert read_finished_runs([run.path])[0][0].validation is None


def test_forced_recipe_changes_of_a_run_are_noted(tmp_path: Path) -> None:
    run = write_trial(tmp_path / "a")
    stored = json.loads(run.recipe_path.read_text())
    stored["forced"] = [{"step": 5, "changes": [{"key": "optim.lr", "old": 1, "new": 2}]}]
    write_json(run.recipe_path, stored)
    trials, notes = read_finished_runs([run.path])
    assert len(trials) == 1
    assert "optim.lr" in notes[0]


@pytest.mark.slow
def test_run_of_the_trainer_is_read_with_its_evaluations_and_best_validation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The files are those that a real run leaves."""
    for variant, num_galaxies in (("original", 120), ("balanced", 60)):
        survey = BlobSurvey(variant=variant, num_galaxies=num_galaxies)
        write_shards(survey, tmp_path / "shards" / variant, encoding="png", shard_size=16, workers=1)
    manifest = tmp_path / "shards" / "original" / "manifest.json"
    arguments = quick_settings(manifest, tmp_path / "run", train__epochs=2, eval__variants="[original,balanced]")
    assert run_here(arguments) == 0
    capsys.readouterr()
    (trial,), notes = read_finished_runs([tmp_path / "run"])
    assert notes == []
    assert {variant: judgement.count for variant, judgement in trial.results.items()} == {"original": 24, "balanced": 12}
    own = read_evaluation(tmp_path / "run")
    assert trial.results["original"].accuracy == own["accuracy"]
    assert trial.validation is not None
    assert trial.validation.step == own["step"]
    validated = [line["val/accuracy"] for line in read_metrics(tmp_path / "run") if "val/accuracy" in line]
    assert trial.validation.value == max(validated)
    (table,) = build_tables([trial])
    assert table.dataset == "blobs"
    cells = [cell for (row, _), cell in table.cells.items() if row.model]
    assert [cell.num_seeds for cell in cells] == [1, 0, 0, 1]
    assert [cell.outcomes is not None for cell in cells] == [True, False, False, True]
