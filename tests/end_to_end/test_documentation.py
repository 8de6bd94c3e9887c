"""The README and the pages of ``docs/``: short, true to the tree, without broken links, and with commands that run."""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import galaxydist
from galaxydist.cli.main import build_parser
from galaxydist.recipe.fields import RECIPE
from galaxydist.recipe.resolve import load_recipe
from tests.helpers.shell_blocks import Block, commands, read_blocks, run_pages

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
# Any option, and those of the GPU checks, accelerate, torchrun, srun, timeout, docker and apptainer.
OTHER_OPTIONS = {
    "--repo-type",  # hf
    "--kill-on-bad-exit",  # srun
    *("--target", "--rm", "--init", "--gpus", "--shm-size", "--read-only", "--tmpfs", "--nv", "--bind", "--shutdown-timeout"),
    "--logdir",  # tensorboard
    "--device",
    "--only",
    "--python",
    "--flag",
    "--multi_gpu",
    "--multi",
    "--num",
    "--quiet",
    "--nproc-per-node",
    "--ntasks-per-node",
    "--gpus-per-node",
    "--gpus-per-task",
    "--preserve-status",
    "--signal",
}
# Files of a published model, whose names look like keys.
FILE_ENDINGS = (".json", ".safetensors", ".onnx", ".pt2")
# Commands whose words are a recipe and its overrides.
RECIPE_COMMANDS = ("train", "submit", "plan", "evaluate", "gallery", "launch.py")


def test_the_readme_has_at_most_200_lines_and_10_kb() -> None:
    text = README.read_bytes()
    assert len(text.splitlines()) <= 200 and len(text) <= 10_000


def test_the_layers_of_the_architecture_name_every_folder_of_the_package() -> None:
    layers = re.findall(r"^\| \d+ \| (.*?) \|", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"), re.MULTILINE)
    named = {name for layer in layers for name in re.findall(r"`(\w+)/`", layer)}
    assert named == {path.parent.name for path in (ROOT / "galaxydist").glob("*/__init__.py")}


@pytest.mark.parametrize("page", [README, *ROOT.glob("[CS]*.md"), *PAGES], ids=lambda page: page.stem)
def test_relative_links_of_the_documentation_lead_to_files(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert re.match(r"https?://", target) or (page.parent / target).is_file(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_name_files_that_exist(page: Path) -> None:
    for name in re.findall(r"`(?:galaxydist/)?([\w/]+/\w+\.py)`", page.read_text(encoding="utf-8")):
        assert any((folder / name).is_file() for folder in (ROOT, ROOT / "galaxydist", ROOT / "galaxydist/training")), name


def test_each_page_is_in_the_navigation_once() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert sorted(re.findall(r": (\w+\.md)$", text, re.MULTILINE)) == [page.name for page in PAGES]


def test_the_citation_file_has_the_fields_of_cff_1_2_0() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and {"message", "title", "authors"} <= set(citation)
    assert citation["version"] == galaxydist.__version__ and citation["license"] == "MIT"


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_commands_of_the_pages_parse(page: Path) -> None:
    for name, *words in (command for block in read_blocks(page) for command in commands(block)):
        if name == "galaxydist":
            parsed = build_parser().parse_args(words)
            assert parsed.run, words
        command = words[0] if name == "galaxydist" else name
        if command in RECIPE_COMMANDS and any(word.startswith("recipe=") for word in words):
            load_recipe([word for word in words if "=" in word and not word.startswith(("cluster", "--"))])


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_keys_and_options_of_the_pages_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    keys = {
        key
        for key in re.findall(r"\b(\w+\.\w+)=", text) + re.findall(r"`(\w+\.\w+)`", text)
        if key.split(".")[0] in RECIPE.sections and not key.endswith(FILE_ENDINGS)
    }
    assert keys <= set(RECIPE.fields) | set(RECIPE.sections)
    options = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text)) - OTHER_OPTIONS
    assert options <= set(all_options(build_parser()))


def all_options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield the options of a parser and of its sub-commands."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from all_options(inner)


def test_commands_are_found_in_a_block() -> None:
    text = "make x && galaxydist data fetch  # why\nA=1 accelerate launch launch.py recipe=vit \\\n  seed=1 > log\nls | head\n"
    expected = [["galaxydist", "data", "fetch"], ["launch.py", "recipe=vit", "seed=1"]]
    assert list(commands(Block(text, None))) == expected


@pytest.mark.slow
def test_the_commands_of_quickstart_and_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GALAXYDIST_DATA", str(tmp_path / "data"))
    (tmp_path / "launch.py").touch()
    done = run_pages([ROOT / "docs" / "quickstart.md", README], tmp_path)
    assert done.returncode == 0, done.stdout[-6000:]
    assert "the same confusion matrix: True" in done.stdout
    losses = [
        json.loads((tmp_path / f"runs/{name}/metrics.jsonl").read_text().splitlines()[0])["train/loss"] for name in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-9)
    assert (tmp_path / "report.html").is_file() and (tmp_path / "explore" / "explore.html").is_file()
    assert (tmp_path / "runs" / "first" / "evaluation" / "test-gallery.html").is_file()
