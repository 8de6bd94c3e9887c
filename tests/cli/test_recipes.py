"""``galaxydist recipes``, and what other commands take a recipe for."""

from pathlib import Path

import pytest

from galaxydist.cli.main import main
from galaxydist.recipe.fields import RECIPE


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with one recipe of its own."""
    (tmp_path / "recipes").mkdir()
    comment = "# A recipe of my own, whose first sentence goes on\n# in a second line (Somebody et al. 2022). Not this one.\n"
    (tmp_path / "recipes" / "mine.yaml").write_text(f"{comment}model: {{name: custom_cnn}}\noptim:\n  lr: 1e-2\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("folder")
def test_recipes_lists_own_and_shipped_recipes_sorted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    names = [line.split()[0] for line in out.splitlines() if not line.startswith(" ")]
    assert {"mine", "demo", "vit"} <= set(names) and names == sorted(names)
    assert "mine A recipe of my own, whose first sentence goes on in a second line (Somebody et al. 2022). ref" in " ".join(
        out.split()
    )
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.usefixtures("folder")
def test_recipes_with_a_name_prints_every_key_with_value_and_origin(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "mine", "train.epochs=7"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("# recipes/mine.yaml; run folder mine-")
    assert max(map(len, out.splitlines())) <= 100
    rows = {line[2:].split(" ", 1)[0]: line for line in out.splitlines()[2:] if " = " in line[:40]}
    assert list(rows) == list(RECIPE.fields)
    assert rows["optim.lr"].startswith("* ") and "= 0.01 " in rows["optim.lr"] and "# (recipes/mine.yaml:5)" in rows["optim.lr"]
    assert "= 7 " in rows["train.epochs"] and "# (command line)" in rows["train.epochs"]
    assert rows["seed"].startswith("  ") and "# seed of all random choices" in rows["seed"]
    assert "# [run] " in rows["tracker.name"] and "= null " in rows["run.dir"] and "= [] " in rows["tracker.tags"]


def test_docs_recipe_md_equals_the_output_of_recipes_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    page = Path(__file__).resolve()
    page = next(parent / "docs" / "recipe.md" for parent in page.parents if (parent / "docs").is_dir())
    assert main(["recipes", "--markdown"]) == 0
    printed = capsys.readouterr().out
    assert printed == page.read_text(), "docs/recipe.md is out of date; run: galaxydist recipes --markdown > docs/recipe.md"
    assert "| `train.micro_batch` | auto or a whole number, at least 0 | `auto` | run |" in printed
    assert main(["recipes", "--markdown", "vit"]) == 2


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["evaluate", "recipe=mine"], "train it first: accelerate launch launch.py recipe=mine"),
        (["evaluate", "runs/none"], "runs/none"),
        (["evaluate", "a", "b"], "one run at a time"),
        (["weights", "fetch", "recipe=mine", "model.name=reference_cnn"], "no published weights"),
        (["weights", "fetch", "mine", "model.name=vit_scratch"], "no published weights"),
        (["plan", "mien"], "did you mean mine?"),
        (["plan", "mine", "optim.lr"], "'optim.lr' is not key=value"),
        (["plan", "recipe=mine", "vit"], "'vit' is not key=value"),
    ],
)
def test_evaluate_weights_fetch_and_plan_refuse_unusable_recipe_arguments(
    arguments: list[str], text: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert text in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["recipes"]
