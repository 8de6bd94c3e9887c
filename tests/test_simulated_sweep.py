"""Seven architectures on both variants of a small simulated survey, through the commands, to a complete report."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from galaxydist.evaluation.published import MODELS, SETTINGS
from galaxydist.evaluation.results.galleries import galleries
from galaxydist.evaluation.results.gather import gather
from galaxydist.evaluation.results.words import NOTHING

ROOT = Path(__file__).parents[1]


def command(folder: Path, *words: str) -> str:
    """What ``galaxydist`` prints, in a process of its own."""
    environ = {**os.environ, "GALAXYDIST_DATA": str(folder / "data"), "PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-m", "galaxydist.cli.main", *words]
    done = subprocess.run(program, cwd=folder, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(1200)
def test_all_architectures_on_both_variants_make_a_complete_report(tmp_path: Path) -> None:
    command(tmp_path, "data", "simulate", "--num-galaxies", "500")
    command(tmp_path, "data", "shard", "--dataset", "simulated", "--variant", "both")
    # The sweep as it is shipped, with one seed and one epoch of its two.
    settings = ("seed=0", "train.epochs=1", "eval.figures=false")
    said = command(tmp_path, "sweep", "simulated", *settings, "--yes")
    assert "14 trials: 14 to submit" in said and said.count("\nfinished ") == 14
    said = command(tmp_path, "report", str(tmp_path / "runs" / "simulated"), "--gallery", "-o", "report.html")
    assert said.count("gallery: ") == 14 and "note: " not in said and "14 runs on simulated" in said

    results = gather(path for path in (tmp_path / "runs" / "simulated").iterdir() if (path / "recipe.json").exists())
    (found,) = results.findings
    assert results.notes == () and len(found.table.rows) == len(MODELS) == 7
    for row in found.table.rows:
        for setting in SETTINGS:
            cell = found.table.cells[row, setting]
            assert cell.num_seeds == 1 and cell.accuracy is not None and cell.loss is not None, (row.label, setting)
    assert len(found.facts) == 14 and all(facts.cost is not None and facts.calibration for facts in found.facts)
    assert len(found.observations["own"]) == 6 and len(found.pairs) == len(SETTINGS)
    shown = galleries(found)
    assert len(shown["shown"]) == 14 and shown["missing"] == []
    matrix = next(part for part in (tmp_path / "report.md").read_text().split("\n#") if "| ViT |" in part)
    lines = [line for line in matrix.splitlines() if line.startswith("| ") and not line.startswith("| model")]
    assert len(lines) >= 7 and not any(NOTHING in line for line in lines)
    assert (tmp_path / "report.tex").read_text().count(r"\\") > 7
