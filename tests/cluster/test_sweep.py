"""Sweeps: what a file means, which runs it gives, and everything that can be wrong, in one message before anything is sent."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galaxydist.cluster.sweep import SweepError, SweepFile, SweepRun, expand, find_sweep, list_sweeps, read_sweep, resolve
from galaxydist.errors import UserError
from galaxydist.recipe.identity import run_name
from galaxydist.recipe.resolve import Override, load_recipe

SHIPPED = sorted((Path(__file__).parents[2] / "slurm" / "sweeps").glob("*.yaml"))


def write(folder: Path, text: str) -> SweepFile:
    path = folder / "tried.yaml"
    path.write_text(text)
    return read_sweep(path)


def problems(folder: Path, text: str, *arguments: str) -> list[tuple[str, str]]:
    """(line or origin, text) of each."""
    with pytest.raises(SweepError) as caught:
        resolve(write(folder, text), arguments)
    return [(origin.removeprefix(f"{folder}/tried.yaml:"), said) for origin, said in caught.value.problems]


def labels(runs: list[SweepRun]) -> list[str]:
    return [run.label for run in runs]


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_every_shipped_sweep_resolves_to_runs_with_distinct_names(path: Path) -> None:
    runs = resolve(read_sweep(path))
    assert len({run.name for run in runs}) == len(runs) > 1
    assert path.read_text().startswith("# ")
    for run in runs:
        assert run.resolved.recipe.eval.variants == (() if path.stem == "search" else ("original", "balanced"))
        assert run.run_dir == Path.cwd() / "runs" / path.stem / run.name


def test_galaxy10_sweep_has_7_architectures_on_2_variants_with_3_seeds() -> None:
    runs = resolve(read_sweep(find_sweep("galaxy10")))
    recipes = [run.resolved.recipe for run in runs]
    assert len(runs) == 42
    assert {recipe.model.name for recipe in recipes} == {
        *("resnet50", "resnet26", "resnet18", "vgg16", "vgg19", "custom_cnn", "vit")
    }
    assert {(recipe.data.variant, recipe.seed) for recipe in recipes} == {
        (variant, seed) for variant in ("original", "balanced") for seed in range(3)
    }


def test_reference_sweep_has_the_cells_of_galaxy10_with_reference_recipes() -> None:
    def cells(name: str) -> list[str]:
        return [run.label for run in resolve(read_sweep(find_sweep(name)))]

    assert [label.replace("recipe=reference/", "recipe=") for label in cells("reference")] == cells("galaxy10")
    assert all(label.startswith("recipe=reference/") for label in cells("reference"))


def test_encoders_sweep_has_five_pretrained_encoders_with_3_seeds_on_galaxy10() -> None:
    recipes = [run.resolved.recipe for run in resolve(read_sweep(find_sweep("encoders")))]
    assert len(recipes) == 15 == len({(recipe.model.name, recipe.seed) for recipe in recipes})
    assert all(recipe.model.pretrained and recipe.data.dataset == "galaxy10_decals" for recipe in recipes)
    names = {recipe.model.name for recipe in recipes}
    for encoder in ("dinov2", "dinov3", "convnext", "maxvit", "zoobot"):
        assert any(encoder in name for name in names), encoder


def test_smoke_and_simulated_sweeps_are_local_small_and_without_pretrained_weights() -> None:
    for name, parallel in (("smoke", 1), ("simulated", 2)):
        sweep = read_sweep(find_sweep(name))
        assert sweep.cluster == "local" and sweep.parallel == parallel
        recipes = [run.resolved.recipe for run in resolve(sweep)]
        assert {recipe.data.dataset for recipe in recipes} == {"simulated"}
        assert all(recipe.data.image_size == 32 and recipe.train.epochs == 2 for recipe in recipes)
        assert not any(recipe.model.pretrained or recipe.model.weights for recipe in recipes)


def test_simulated_sweep_has_7_architectures_on_2_variants_with_2_seeds() -> None:
    recipes = [run.resolved.recipe for run in resolve(read_sweep(find_sweep("simulated")))]
    galaxy10 = {run.resolved.recipe.model.name for run in resolve(read_sweep(find_sweep("galaxy10")))}
    assert {recipe.model.name for recipe in recipes} == galaxy10 and len(galaxy10) == 7
    assert len(recipes) == len({(recipe.model.name, recipe.data.variant, recipe.seed) for recipe in recipes}) == 28


def test_sweep_file_gives_cluster_root_settings_and_grid_with_origins(tmp_path: Path) -> None:
    sweep = write(
        tmp_path,
        """cluster: a100
root: some/runs
parallel: 3
set:
  optim: {lr: 1e-4}
  train.epochs: 5
grid:
  recipe: [vit, vgg16]
  data.variant: [original, balanced]
evaluate: [balanced]
""",
    )
    assert (sweep.cluster, sweep.root, sweep.parallel) == ("a100", Path("some/runs"), 3)
    assert {key: setting.value for key, setting in sweep.common.items()} == {
        "optim.lr": 1e-4,
        "train.epochs": 5,
        "eval.variants": ["balanced"],
    }
    assert sweep.common["optim.lr"].origin == f"{tmp_path}/tried.yaml:5"
    runs = resolve(sweep)
    assert labels(runs) == [
        "recipe=vit data.variant=original",
        "recipe=vit data.variant=balanced",
        "recipe=vgg16 data.variant=original",
        "recipe=vgg16 data.variant=balanced",
    ]
    assert runs[1].resolved.origins["data.variant"] == f"{tmp_path}/tried.yaml:9"
    assert runs[1].resolved.recipe.optim.lr == 1e-4


def test_sweep_runs_are_the_product_of_list_entries_and_grid_points(tmp_path: Path) -> None:
    text = """set: {recipe: custom_cnn, model.width: 8, train.epochs: 2}
list:
  - {optim.lr: 0.1}
  - {optim: {lr: 0.2, warmup: 0.1}, train.epochs: 3}
"""
    alone = resolve(write(tmp_path, text))
    assert labels(alone) == ["optim.lr=0.1", "optim.lr=0.2 optim.warmup=0.1 train.epochs=3"]
    assert [run.resolved.recipe.train.epochs for run in alone] == [2, 3]
    both = resolve(write(tmp_path, f"{text}grid: {{seed: [0, 1]}}\n"))
    assert labels(both) == [f"{entry} seed={seed}" for entry in labels(alone) for seed in (0, 1)]


def test_command_line_replaces_sweep_values_axes_and_root(tmp_path: Path) -> None:
    sweep = write(tmp_path, "root: runs/x\nset: {train.epochs: 2}\ngrid: {recipe: [vit, vgg16], seed: [0, 1]}\n")
    whole = resolve(sweep, ["train.epochs=9", f"run.root={tmp_path}/elsewhere"])
    part = resolve(sweep, ["train.epochs=9", f"run.root={tmp_path}/elsewhere", "recipe=vgg16"])
    assert labels(part) == ["seed=0", "seed=1"]
    assert [run.run_dir for run in part] == [run.run_dir for run in whole[2:]]
    assert part[0].run_dir.parent == tmp_path / "elsewhere"
    assert part[0].resolved.recipe.train.epochs == 9


def test_arguments_of_a_sweep_run_resolve_to_the_checked_recipe(tmp_path: Path) -> None:
    """The job reads its recipe from text."""
    text = "set: {recipe: vit, optim.lr: 1e-5, data.cache_dir: ~/c, tracker.entity: null, optim.milestones: [0.25, 0.5]}\n"
    for run in resolve(write(tmp_path, f"{text}grid: {{seed: [0, 9223372036854775807], train.compile: [true]}}\n")):
        assert load_recipe(run.arguments).recipe == run.resolved.recipe
        assert run.resolved.recipe.run.dir == run.run_dir
        assert run.name == run_name(run.resolved.recipe)


def test_sweep_value_that_no_command_line_can_express_is_refused(tmp_path: Path) -> None:
    text = "set: {recipe: vit, tracker.tags: ['a,b']}\ngrid: {seed: [0, 1]}\n"
    assert problems(tmp_path, text) == [("1", "tracker.tags=[a,b]: cannot be written on a command line (all 2 runs)")]


AXES = st.dictionaries(
    st.sampled_from(["seed", "optim.lr", "train.epochs", "model.width", "data.crop"]),
    st.lists(st.integers(1, 50), min_size=1, max_size=4, unique=True),
    min_size=1,
)
ENTRIES = st.lists(st.dictionaries(st.sampled_from(["train.ema", "optim.warmup"]), st.integers(0, 9)), max_size=3)


def sweep_of(axes: dict[str, list[int]], entries: list[dict[str, int]]) -> SweepFile:
    return SweepFile(
        Path("made.yaml"),
        None,
        Path("runs"),
        None,
        {"recipe": Override("vit", "made.yaml:1")},
        {key: tuple(Override(value, "made.yaml:2") for value in values) for key, values in axes.items()},
        tuple({key: Override(value, "made.yaml:3") for key, value in entry.items()} for entry in entries),
    )


@given(AXES, ENTRIES)
def test_expand_gives_every_point_once_in_file_order(axes: dict[str, list[int]], entries: list[dict[str, int]]) -> None:
    cells = expand(sweep_of(axes, entries))
    assert cells == expand(sweep_of(axes, entries))
    assert len(cells) == max(1, len(entries)) * math.prod(map(len, axes.values()))
    points = [
        (entry, *(axes[key].index(cell.settings[key].value) for key in axes))
        for entry in range(max(1, len(entries)))
        for cell in cells[entry * len(cells) // max(1, len(entries)) : (entry + 1) * len(cells) // max(1, len(entries))]
    ]
    assert points == sorted(set(points)), "the first key changes slowest"
    for number, cell in enumerate(cells):
        assert cell.settings["recipe"].value == "vit"
        for key, value in (entries[number * len(entries) // len(cells)] if entries else {}).items():
            assert cell.settings[key].value == value


def test_a_grid_of_more_runs_than_anyone_wants_is_refused() -> None:
    with pytest.raises(UserError, match="10,000,000,000 runs are more than 100,000"):
        expand(sweep_of({f"key{number}": [*range(10)] for number in range(10)}, []))


@given(AXES, st.data())
def test_axis_overridden_on_the_command_line_is_one_point(axes: dict[str, list[int]], data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(axes)))
    cells = expand(sweep_of(axes, []), [key])
    assert len(cells) * len(axes[key]) == math.prod(map(len, axes.values()))
    assert all(key not in cell.settings for cell in cells)


def test_all_problems_of_a_sweep_file_come_in_one_message(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        """clustr: x
root: 3
parallel: 0
set: {optim.lr: 1, seed: 3, run.dir: x}
optim.x: 3
grid:
  recipe: vit
  seed: []
  optim: {lr: [1, 1], momentum: [0.9]}
list:
  - vit
  - {train.ema: 0.5, optim.momentum: 0.3}
evaluate: original
""",
    )
    keys = "cluster, root, parallel, set, grid, list, evaluate, search, method, trials, prune, seed"
    hides = "whose values would replace this one; keep one of them"
    assert found == [
        ("1", f"clustr: a sweep has no such key; did you mean cluster? (it has {keys})"),
        ("2", "root=3: must be a folder"),
        ("3", "parallel=0: must be a whole number of at least 1"),
        ("4", "run.dir: each run's folder is named after its recipe; root: DIR sets their parent folder"),
        ("4", f"optim.lr: is in the grid too ({tmp_path}/tried.yaml:9), {hides}"),
        ("5", f"optim.x: a sweep has no such key; write recipe keys under set, grid or list: optim (it has {keys})"),
        ("7", "recipe=vit: a key of the grid has a list of values, like [vit]"),
        ("8", "seed: has no values; give some, like [0, 1], or remove the key"),
        ("9", "optim.lr: 1 is given twice; keep one"),
        ("11", "list: each entry is a mapping of keys to values, like {recipe: vit, seed: 1}"),
        ("12", f"optim.momentum: is in the grid too ({tmp_path}/tried.yaml:9), {hides}"),
        ("13", "evaluate=original: must be a list, like [original, balanced]"),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a sweep needs grid:, list: or search:, in which its runs differ"),
        ("grid:\n", "grid: has no keys; write one like seed: [0, 1, 2], or remove it"),
        ("grid: {optim: {}}\n", "grid: has no keys; write one like seed: [0, 1, 2], or remove it"),
        ("grid: 3\n", "grid=3: must be a mapping of keys to values"),
        ("list: []\n", "list: has no entries; write one like - {recipe: vit, seed: 1}, or remove it"),
        ("list: vit\n", "list: must be a list of mappings, like - {recipe: vit, seed: 1}"),
        ("list: {a: 1}\n", "list.a: list has no keys"),
        ("- vit\n", "must be a mapping of keys to values, like 'grid: {seed: [0, 1]}'"),
        ("grid: {seed: [0, {a: 1}]}\n", "grid.seed: a list holds plain values only"),
        ("grid: {seed: [0], seed: [1]}\n", "grid.seed is set again here, first on line 1: keep one"),
        ("grid: {optim.lr: [1], optim: {lr: [2]}}\n", "grid.optim.lr is set again here, first on line 1: keep one"),
        ("grid: {seed: &a [0]}\nset: {tracker.tags: *a}\n", "cannot be read as YAML: aliases (*name) are not used in sweeps"),
        ("grid: {cluster: [a, b]}\n", "cluster: a sweep is submitted to one cluster; write cluster: NAME beside set and grid"),
    ],
)
def test_invalid_sweep_file_is_refused_with_its_problem(tmp_path: Path, text: str, said: str) -> None:
    assert said in [problem for _, problem in problems(tmp_path, text)]


def test_problem_of_several_runs_is_reported_once_with_their_count(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        """set: {optim.lrr: 1}
grid:
  recipe: [vgg16, vitt]
  seed: ['0', 1]
  data.image_size: [224]
list:
  - {model.size: small}
  - {model.size: base}
""",
        "train.epochs=x",
    )
    assert [(origin, said.partition(" (recipes: ")[0]) for origin, said in found[:3]] == [
        ("1", "optim.lrr: no such key; did you mean optim.lr? (all 8 runs)"),
        (
            "4",
            "seed=0: must be a whole number (4 of 8 runs, the first: model.size=small recipe=vgg16 seed=0 data.image_size=224)",
        ),
        ("command line", "train.epochs=x: must be a whole number (all 8 runs)"),
    ]
    (unknown,) = [said for origin, said in found if origin == "3"]
    assert unknown.startswith("recipe=vitt: no such recipe; did you mean vit?") and "4 of 8 runs" in unknown
    (refused,) = [said for _, said in found if "has one size only" in said]
    assert refused.endswith("(2 of 8 runs, the first: model.size=base recipe=vgg16 seed=0 data.image_size=224)")


def test_problem_of_one_run_names_that_run(tmp_path: Path) -> None:
    found = problems(tmp_path, "set: {recipe: vit}\ngrid: {data.image_size: [100, 224, 1.5]}\n")
    assert [said for _, said in found] == [
        "model.name=vit, data.image_size=100: vit needs a multiple of 16 pixels; try 96 or 112 (data.image_size=100)",
        "data.image_size=1.5: must be a whole number (data.image_size=1.5)",
    ]


def test_two_sweep_points_with_the_same_run_name_are_refused_naming_both(tmp_path: Path) -> None:
    found = problems(tmp_path, "set: {recipe: vit}\nlist:\n  - {optim.lr: 1}\n  - {optim.lr: 2}\n  - {optim.lr: 1.0}\n")
    assert len(found) == 1
    assert found[0][1].startswith("2 entries are the same run vit-") and found[0][1].endswith(
        ": optim.lr=1 | optim.lr=1.0; keep one"
    )
    ((_, said),) = problems(tmp_path, "set: {recipe: vit}\ngrid: {train.compile: [true, false]}\n")
    assert said.endswith("they differ in train.compile, which does not change a run's numbers: keep one")


def test_two_recipes_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder, width in (("a", 8), ("b", 16)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "own.yaml").write_text(f"model: {{name: custom_cnn, width: {width}}}\n")
    ((_, said),) = problems(tmp_path, f"grid: {{recipe: [{tmp_path}/a/own.yaml, {tmp_path}/b/own.yaml]}}\n")
    assert said.startswith("two recipes have the name own: ")


def test_errors_of_the_check_callback_are_reported_with_the_other_problems(tmp_path: Path) -> None:
    def check(_: object) -> None:
        raise UserError("There are no shards.")

    sweep = write(tmp_path, "set: {recipe: vit}\ngrid: {seed: [0, 1, x]}\n")
    with pytest.raises(SweepError) as caught:
        resolve(sweep, check=check)
    assert [said for _, said in caught.value.problems] == [
        "There are no shards. (2 of 3 runs, the first: seed=0)",
        "seed=x: must be a whole number (seed=x)",
    ]


@pytest.mark.parametrize("argument", ["run.dir=x", "name=x", "seed", "recipe=nothing"])
def test_invalid_sweep_arguments_are_refused_as_command_line_problems(tmp_path: Path, argument: str) -> None:
    found = problems(tmp_path, "set: {recipe: vit}\ngrid: {seed: [0, 1]}\n", argument)
    assert [origin for origin, _ in found] == ["command line"]


def test_sweep_without_a_recipe_is_refused(tmp_path: Path) -> None:
    ((_, said),) = problems(tmp_path, "grid: {seed: [0, 1]}\n")
    assert said == "recipe is missing: write it under set, grid or list, or give recipe=NAME (all 2 runs)"


def test_sweeps_are_found_by_name_or_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert set(list_sweeps()) == {path.stem for path in SHIPPED}, "those that ship are found everywhere"
    (tmp_path / "own.yaml").write_text("grid: {seed: [0]}\n")
    assert find_sweep("own.yaml") == Path("own.yaml")
    with pytest.raises(UserError, match=r"there is no sweep galaxy11; sweeps: .*galaxy10\.yaml"):
        find_sweep("galaxy11")
