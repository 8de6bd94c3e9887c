"""Architectures on both variants of a small simulated survey, through the commands, to a complete report."""

from pathlib import Path

import pytest
import yaml

from galaxydist.cli.main import main
from galaxydist.report.collect import collect
from galaxydist.report.page import galleries
from galaxydist.report.published_results import DISPLAY_NAMES, SETTINGS
from galaxydist.report.tables import NOTHING

ROOT = Path(__file__).parents[2]
SWEEP = ROOT / "slurm" / "sweeps" / "simulated.yaml"
ARCHITECTURES = tuple(yaml.safe_load(SWEEP.read_text())["grid"]["recipe"])


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("recipes", "num_galaxies"),
    [(("resnet18", "custom_cnn"), 300), pytest.param(ARCHITECTURES, 500, marks=pytest.mark.nightly)],
    ids=["two", "all"],
)
def test_architectures_on_both_variants_make_a_complete_report(
    recipes: tuple[str, ...],
    num_galaxies: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GALAXYDIST_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def command(*words: str) -> str:
        """Results and log of ``galaxydist``; only the sweep's runs are processes of their own."""
        assert main(words) == 0, capfd.readouterr().err
        return "".join(capfd.readouterr())

    command("data", "simulate", "--num-galaxies", str(num_galaxies))
    command("data", "shard", "--dataset", "simulated", "--variant", "both")
    # The sweep as it is shipped, of these recipes, with one seed and one epoch of its two.
    sweep = yaml.safe_load(SWEEP.read_text())
    sweep["grid"]["recipe"] = list(recipes)
    (tmp_path / SWEEP.name).write_text(yaml.safe_dump(sweep))
    said = command("sweep", SWEEP.name, "seed=0", "train.epochs=1", "eval.figures=false", "--yes")
    trials = 2 * len(recipes)
    assert f"{trials} runs: {trials} to submit" in said and said.count("\nfinished ") == trials
    said = command("report", str(tmp_path / "runs" / "simulated"), "--gallery", "-o", "report.html")
    assert said.count("gallery: ") == trials and "note: " not in said and f"{trials} runs on simulated" in said

    results = collect(path for path in (tmp_path / "runs" / "simulated").iterdir() if (path / "recipe.json").exists())
    (found,) = results.datasets
    labels = [label for name in recipes if (label := DISPLAY_NAMES[name]) is not None]
    rows = [row for row in found.table.rows if row.label in labels]
    assert results.notes == () and len(rows) == len(labels) == len(recipes)
    for row in rows:
        for setting in SETTINGS:
            cell = found.table.cells[row, setting]
            assert cell.num_seeds == 1 and cell.accuracy is not None and cell.loss is not None, (row.label, setting)
    assert len(found.facts) == trials and all(facts.cost is not None and facts.calibration for facts in found.facts)
    assert len(found.pairs) == len(SETTINGS)
    assert found.claims == {}
    shown = galleries(found)
    assert len(shown["shown"]) == trials and shown["missing"] == []
    matrix = next(part for part in (tmp_path / "report.md").read_text().split("\n#") if f"| {labels[0]} |" in part)
    lines = [line for line in matrix.splitlines() if line.startswith(tuple(f"| {label} |" for label in labels))]
    assert len(lines) >= len(labels) and not any(NOTHING in line for line in lines)
    assert (tmp_path / "report.tex").read_text().count(r"\\") > len(labels)
