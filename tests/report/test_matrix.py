"""The results matrix: what stands in which cell, with which error, and beside what."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from galaxydist.atomic_files import read_json, write_json
from galaxydist.errors import UserError
from galaxydist.recipe.resolve import list_recipes
from galaxydist.report.claims import choose_rows
from galaxydist.report.finished_runs import read_finished_runs
from galaxydist.report.matrix import Table, build_tables, holm_adjusted
from galaxydist.report.published_results import MODELS, ON_BALANCED, ON_ORIGINAL, ORIGINAL_TO_BALANCED, SETTINGS
from galaxydist.report.statistics import Outcomes, holm
from tests.helpers.trial_folders import write_trial


def tables_of(*folders: Path) -> list[Table]:
    trials, notes = read_finished_runs(folders)
    assert notes == []
    return build_tables(trials)


def test_cells_average_over_seeds_beside_the_published_values(tmp_path: Path) -> None:
    for seed, accuracy in enumerate((0.55, 0.6, 0.65)):
        write_trial(tmp_path / f"a{seed}", ["recipe=resnet50", f"seed={seed}"], accuracy={"original": accuracy, "balanced": 0.5})
    (table,) = tables_of(*tmp_path.iterdir())
    assert table.is_real
    assert [row.display for row in table.rows] == list(MODELS)
    row = table.rows[0]
    assert row.label == "ResNet50"
    cell = table.cells[row, ON_ORIGINAL]
    assert cell.num_seeds == 3
    assert cell.accuracy is not None
    accuracies = [judgement.accuracy for judgement in cell.results]
    assert cell.accuracy.mean == pytest.approx(np.mean(accuracies))
    assert cell.accuracy.seed_error == pytest.approx(np.std(accuracies, ddof=1) / 3**0.5)
    assert cell.loss is not None
    assert cell.loss.mean == pytest.approx(np.mean([judgement.loss for judgement in cell.results]), rel=1e-6)
    assert cell.published is not None
    assert cell.published.accuracy == 0.5259
    assert cell.accuracy_test is not None
    assert cell.accuracy_test.value == pytest.approx(cell.accuracy.mean - 0.5259)
    assert cell.loss_test is not None
    assert cell.loss_test.value == pytest.approx(cell.loss.mean - 1.3268)
    assert cell.notes == ()
    unpublished = table.cells[row, ORIGINAL_TO_BALANCED]
    assert unpublished.accuracy is not None
    assert (unpublished.published, unpublished.accuracy_test) == (None, None)
    not_run = table.cells[row, ON_BALANCED]
    assert (not_run.runs, not_run.accuracy, not_run.accuracy_test) == ((), None, None)
    assert not_run.published is not None
    assert all(table.cells[other, setting].num_seeds == 0 for other in table.rows[1:] for setting in SETTINGS)


def test_every_data_set_has_its_own_table_and_only_galaxy10_has_published_values(tmp_path: Path) -> None:
    write_trial(tmp_path / "sim", ["recipe=vit"], dataset="simulated")
    write_trial(tmp_path / "real", ["recipe=vit"])
    write_trial(tmp_path / "folder", ["recipe=vit"], dataset="my_images")
    tables = tables_of(*tmp_path.iterdir())
    assert [table.dataset for table in tables] == ["galaxy10_decals", "my_images", "simulated"]
    assert [table.is_real for table in tables] == [True, False, False]
    for table in tables:
        found = [cell for cell in table.cells.values() if cell.runs]
        assert {trial.run_dir.name for cell in found for trial in cell.runs} == {
            {"galaxy10_decals": "real", "my_images": "folder", "simulated": "sim"}[table.dataset]
        }
        if not table.is_real:
            assert all(cell.published is None and cell.accuracy_test is None for cell in table.cells.values())
            assert holm_adjusted(table) == {}


def test_recipes_with_other_settings_or_models_have_rows_of_their_own(tmp_path: Path) -> None:
    commands = {
        "plain0": ["recipe=vit"],
        "plain1": ["recipe=vit", "seed=1"],
        "fast": ["recipe=vit", "optim.lr=0.1"],
        "scratch": ["recipe=vit_scratch"],
        "d4": ["recipe=d4_cnn"],
        "long": ["recipe=vgg16", "data.variant=balanced", "train.epochs=99"],
        "short": ["recipe=vgg16"],
    }
    for name, command in commands.items():
        write_trial(tmp_path / name, command)
    (table,) = tables_of(*tmp_path.iterdir())
    run = {row: sorted({trial.run_dir.name for s in SETTINGS for trial in table.cells[row, s].runs}) for row in table.rows}
    assert sorted(names for names in run.values() if names) == [
        ["d4"],
        ["fast"],
        ["long", "short"],
        ["plain0", "plain1"],
        ["scratch"],
    ]
    vits = [row for row in table.rows if row.display == "ViT"]
    assert [len(row.settings) for row in vits].count(8) == 2
    assert {row.label for row in vits if not row.settings} == {"ViT (vit_scratch)"}
    # Other settings on the other variant do not tear a line apart.
    (vgg,) = [row for row in table.rows if row.display == "VGG16"]
    assert run[vgg] == ["long", "short"]
    assert table.rows[-1].label == "d4_cnn"
    assert table.rows[-1].display is None


def test_reference_recipes_have_rows_before_our_recipes(tmp_path: Path) -> None:
    names = [name for name in list_recipes() if name.startswith("reference/")]
    assert len(names) == len(MODELS)
    for number, name in enumerate([*names, "vit", "vgg16"]):
        write_trial(tmp_path / str(number), [f"recipe={name}"], num_galaxies=40)
    (table,) = tables_of(*tmp_path.iterdir())
    assert list(choose_rows(table, "reference")) == list(MODELS)
    assert list(choose_rows(table, "own")) == ["VGG16", "ViT"]
    assert [row.label for row in table.rows] == [
        "ResNet50 (reference)",
        "ResNet26 (reference)",
        "ResNet18 (reference)",
        "VGG16 (reference)",
        "VGG16",
        "VGG19 (reference)",
        "Custom CNN (reference)",
        "ViT (reference)",
        "ViT",
    ]
    assert all(table.cells[row, ON_ORIGINAL].accuracy_test is not None for row in table.rows)


def test_without_predictions_the_loss_is_not_tested(tmp_path: Path) -> None:
    write_trial(tmp_path / "a", ["recipe=vgg19"], keep_predictions=False)
    write_trial(tmp_path / "b", ["recipe=vgg19", "seed=1"])
    (table,) = tables_of(tmp_path / "a", tmp_path / "b")
    cell = table.cells[choose_rows(table, "own")["VGG19"], ON_ORIGINAL]
    assert cell.outcomes is None
    assert cell.accuracy_test is not None
    assert cell.loss_test is None
    assert cell.loss is not None
    assert cell.loss.standard_error is None
    assert cell.loss.seed_error is not None
    assert "only 1 of 2 runs kept predictions" in cell.notes[0]


def test_predictions_of_another_run_or_damaged_ones_are_not_used(tmp_path: Path) -> None:
    run = write_trial(tmp_path / "a", ["recipe=vgg19"])
    other = write_trial(tmp_path / "b", ["recipe=vgg19", "seed=1"])
    source = other.evaluation_dir / "test-predictions.parquet"
    (run.evaluation_dir / source.name).write_bytes(source.read_bytes())
    damaged = run.evaluation_dir / "galaxy10_decals-balanced" / source.name
    damaged.write_bytes(b"PAR1")
    (table,) = tables_of(run.path)
    row = choose_rows(table, "own")["VGG19"]
    first, second = table.cells[row, ON_ORIGINAL], table.cells[row, ORIGINAL_TO_BALANCED]
    assert first.outcomes is None
    assert "is not used: it has" in first.notes[0]
    assert "one seed" in first.notes[1]
    assert second.outcomes is None
    assert "is damaged" in second.notes[0]
    assert second.accuracy is not None


def test_seed_evaluated_on_other_shards_is_left_out_with_a_note(tmp_path: Path) -> None:
    folders = [write_trial(tmp_path / str(seed), ["recipe=vit", f"seed={seed}"]).evaluation_dir for seed in range(3)]
    content = read_json(folders[1] / "test.json")
    write_json(folders[1] / "test.json", content | {"manifest_hash": "other"})
    (table,) = tables_of(*tmp_path.iterdir())
    cell = table.cells[choose_rows(table, "own")["ViT"], ON_ORIGINAL]
    assert [trial.seed for trial in cell.runs] == [0, 2]
    assert "1: left out of trained on original, tested on original" in table.notes[0]


def test_test_sets_of_different_sizes_are_noted(tmp_path: Path) -> None:
    write_trial(tmp_path / "a", ["recipe=vit"], num_galaxies=400)
    write_trial(tmp_path / "b", ["recipe=vgg16"], num_galaxies=300)
    (table,) = tables_of(*tmp_path.iterdir())
    assert "The rows were evaluated on original test sets of different sizes: 300, 400 galaxies." in table.notes


def test_nonfinite_loss_is_noted_and_not_tested(tmp_path: Path) -> None:
    run = write_trial(tmp_path / "a", ["recipe=vit"], keep_predictions=False)
    content = read_json(run.evaluation_dir / "test.json")
    write_json(run.evaluation_dir / "test.json", content | {"loss": None})
    (table,) = tables_of(run.path)
    cell = table.cells[choose_rows(table, "own")["ViT"], ON_ORIGINAL]
    assert (cell.loss, cell.loss_test) == (None, None)
    assert "the loss of a run is not finite" in cell.notes


def test_holm_adjusted_corrects_over_all_cells_with_published_values(tmp_path: Path) -> None:
    for number, recipe in enumerate(("vit", "vgg16", "resnet18")):
        write_trial(tmp_path / recipe, [f"recipe={recipe}"], accuracy={"original": 0.45 + 0.1 * number, "balanced": 0.5})
    (table,) = tables_of(*tmp_path.iterdir())
    adjusted = holm_adjusted(table)
    tests = [table.cells[key].accuracy_test for key in adjusted]
    assert len(adjusted) == 3
    assert list(adjusted.values()) == holm([test.p_value for test in tests if test is not None])
    assert set(holm_adjusted(table, "loss")) == set(adjusted)


def test_rows_are_chosen_by_validation_never_by_test_accuracy(tmp_path: Path) -> None:
    write_trial(tmp_path / "a", ["recipe=vit"], validation=0.5, accuracy={"original": 0.9})
    write_trial(tmp_path / "b", ["recipe=vit_scratch"], validation=0.6, accuracy={"original": 0.2})
    write_trial(tmp_path / "c", ["recipe=vit", "optim.lr=0.1"], validation=None, accuracy={"original": 0.95})
    (table,) = tables_of(*tmp_path.iterdir())
    chosen = choose_rows(table, "own")
    assert chosen["ViT"].recipe == "vit_scratch"
    assert list(chosen) == ["ViT"]
    assert choose_rows(table, "reference") == {}
    write_trial(tmp_path / "d", ["recipe=vgg16", "train.metric=loss"], validation=0.5, accuracy={"original": 0.9})
    write_trial(tmp_path / "e", ["recipe=vgg16", "train.metric=loss", "optim.lr=0.1"], validation=0.6, accuracy={"original": 0.2})
    (table,) = tables_of(tmp_path / "d", tmp_path / "e")
    row = choose_rows(table, "own")["VGG16"]
    assert [trial.run_dir.name for trial in table.cells[row, ON_ORIGINAL].runs] == ["e"]  # the smaller loss


def test_report_modules_import_no_heavy_library() -> None:
    code = (
        "import sys; import galaxydist.report.claims, galaxydist.report.finished_runs, galaxydist.report.statistics; "
        "print(sorted({'torch', 'scipy', 'pyarrow', 'matplotlib', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_build_tables_without_runs_is_empty() -> None:
    assert build_tables([]) == []


def test_unreadable_predictions_are_noted_and_the_accuracy_is_kept(tmp_path: Path) -> None:
    def fail(path: Path) -> Outcomes:
        raise UserError(f"{path.name} cannot be read")

    write_trial(tmp_path / "a", ["recipe=vit"])
    trials, _ = read_finished_runs([tmp_path / "a"])
    (table,) = build_tables(trials, read=fail)
    cell = table.cells[choose_rows(table, "own")["ViT"], ON_ORIGINAL]
    assert cell.accuracy is not None
    assert "test-predictions.parquet cannot be read" in cell.notes
