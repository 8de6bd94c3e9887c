"""Loading recipes: precedence, origins, and everything that can be wrong, in one message."""

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from galaxydist.errors import UserError, first_line
from galaxydist.recipe.fields import RECIPE
from galaxydist.recipe.identity import flatten, run_name
from galaxydist.recipe.resolve import Override, RecipeError, ResolvedRecipe, list_recipes, load_recipe

PLAIN = "model: {name: custom_cnn}\n"


def resolve(folder: Path, yaml: str, *overrides: str, name: str = "plain") -> ResolvedRecipe:
    (folder / f"{name}.yaml").write_text(yaml)
    return load_recipe([f"recipe={name}", *overrides], folders=[folder])


def problems(folder: Path, yaml: str, *overrides: str) -> list[tuple[str, str]]:
    with pytest.raises(RecipeError) as caught:
        resolve(folder, yaml, *overrides)
    return list(caught.value.problems)


def test_command_line_overrides_recipe_file_and_every_key_has_an_origin(tmp_path: Path) -> None:
    resolved = resolve(
        tmp_path, "model:\n  name: vit\noptim:\n  lr: 1e-4\n  warmup: 0.1\n", "optim.warmup=0.2", "tracker.tags=[a, b]"
    )
    recipe, origins = resolved.recipe, resolved.origins
    assert (recipe.name, recipe.optim.lr, recipe.optim.warmup, recipe.tracker.tags) == ("plain", 1e-4, 0.2, ("a", "b"))
    assert origins["optim.lr"] == f"{tmp_path}/plain.yaml:4"
    assert origins["optim.warmup"] == origins["tracker.tags"] == "command line"
    assert origins["train.epochs"] == "schema default"
    assert origins["name"] == "file name"
    assert set(origins) == set(RECIPE.fields)


def test_all_recipe_problems_come_in_one_message_with_their_origins(tmp_path: Path) -> None:
    yaml = """model: {name: vit, pretrained: yes}
optim:
  lr: -1
  lrr: 2
  lr: 3
train: {epochs: 0, batch_size: 012, ema: .nan}
data: {image_size: 100}
"""
    found = problems(
        tmp_path,
        yaml,
        "lr=3",
        "train.micro_batch=99",
        "seed=true",
        "optim.warmup=1",
        "optim.warmup=0",
        "--fast",
        "trian.epochs=1",
    )
    here = f"{tmp_path}/plain.yaml"
    assert found == [
        ("command line", "optim.warmup is given twice, 1 and 0; keep one"),
        ("command line", "'--fast' is not key=value (like recipe=vit or optim.lr=1e-4)"),
        (f"{here}:5", "optim.lr is set again here, first on line 3: keep one"),
        (f"{here}:1", "model.pretrained=yes: must be true or false"),
        (f"{here}:3", "optim.lr=-1: must be more than 0"),
        (f"{here}:4", "optim.lrr: no such key; did you mean optim.lr?"),
        (f"{here}:6", "train.epochs=0: must be at least 1"),
        (f"{here}:6", "train.ema=nan: must be finite"),
        ("command line", "lr: no such key; did you mean optim.lr?"),
        ("command line", "seed=true: must be a whole number"),
        ("command line", "optim.warmup=1: must be less than 1"),
        ("command line", "trian.epochs: no such key; did you mean train.epochs?"),
        (
            f"command line and {here}:6",
            "train.micro_batch=99, train.batch_size=12: a micro-batch of 99 is larger than the global batch of 12; "
            "use 0 for a process's whole share",
        ),
        (f"{here}:1 and {here}:7", "model.name=vit, data.image_size=100: vit needs a multiple of 16 pixels; try 96 or 112"),
    ]  # fmt: skip
    with pytest.raises(UserError, match="14 problems in the recipe:"):
        resolve(
            tmp_path,
            yaml,
            "lr=3",
            "train.micro_batch=99",
            "seed=true",
            "optim.warmup=1",
            "optim.warmup=0",
            "--fast",
            "trian.epochs=1",
        )


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optim.lr=1", 1.0),
        ("optim.lr=1e-3", 1e-3),
        ("optim.lr=.5", 0.5),
        ("train.epochs=012", 12),
        ("train.epochs=0o14", 12),
        ("train.epochs=0xC", 12),
        ("train.epochs=+3", 3),
        ("data.augment.flip=False", False),
        ("tracker.project=012", "012"),
        ("tracker.project=no", "no"),
        ("tracker.project=a=b", "a=b"),
        ("tracker.entity=null", None),
        ("tracker.entity=~", None),
        ("data.manifest=./a//b c.json", "a/b c.json"),
        ("data.manifest=s3://bucket/folder//manifest.json?x=./y", "s3://bucket/folder//manifest.json?x=./y"),
        ("run.root=a/b c", Path("a/b c")),
        ("run.dir=null", None),
        ("tracker.tags=[]", ()),
        ("tracker.tags=a,b", ("a", "b")),
        ("tracker.tags=a", ("a",)),
        ("optim.milestones=0.25,0.5", (0.25, 0.5)),
        ("resume.force=[optim.lr]", ("optim.lr",)),
        ("order_version=1", 1),
    ],
)
def test_override_text_is_converted_to_the_type_of_its_field(tmp_path: Path, override: str, value: object) -> None:
    resolved = resolve(tmp_path, PLAIN, override)
    found: object = resolved.recipe
    for part in override.split("=", maxsplit=1)[0].split("."):
        found = getattr(found, part)
    assert (found == value and type(found) is type(value)) or (isinstance(value, Path) and found == value)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("train.epochs=1.0", "must be a whole number"),
        ("train.epochs=1_000", "must be a whole number"),
        ("train.epochs=" + "9" * 5000, "too long"),
        ("train.epochs=", "must be a whole number"),
        ("seed=9223372036854775808", "must be less than"),
        ("optim.lr=inf", "must be a number"),
        ("optim.lr=.inf", "must be finite"),
        ("optim.lr=1e999", "must be finite"),
        ("optim.lr=nan", "must be a number"),
        ("optim.lr=.nan", "must be finite"),
        ("optim.lr=true", "must be a number"),
        ("data.augment.flip=yes", "must be true or false"),
        ("data.augment.flip=1", "must be true or false"),
        ("tracker.tags=[a,b", r"must be a list like a,b"),
        ("tracker.project=", "must not be empty"),
        ("model.weights=", "must be a path or null"),
        ("model.name=vitt", "there is no such model; did you mean vit"),
        ("model.name=convnext_nano", "timm's models are written timm/convnext_nano"),
        ("model.name=mwalmsley/zoobot", "repositories of the Hugging Face hub are written hf-hub:mwalmsley/zoobot"),
        ("model.name=hf-hub:zoobot", "timm/NAME"),
        ("model.name=a-b:c", "package.module:function"),
        ("order_version=2", "must be 1"),
        ("optim={}", "optim is a section; set its keys: optim.name, optim.lr"),
        ("name=other", "named by its file"),
        ("data.dataset=../other", "folder name under the data root"),
        ("resume.force=[optim.lrr]", "'optim.lrr' is no key of the recipe; did you mean optim.lr?"),
        ("resume.force=[tracker.name]", "may change freely"),
    ],
)
def test_invalid_override_is_refused_with_exactly_one_problem(tmp_path: Path, override: str, text: str) -> None:
    with pytest.raises(RecipeError, match=text) as caught:
        resolve(tmp_path, PLAIN, override)
    assert len(caught.value.problems) == 1 and caught.value.problems[0][0] == "command line"


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["model.name=vit", "model.pretrained=true", "model.weights=w.safetensors"], "choose one"),
        (["model.name=timm/convnext_nano", "model.pretrained=true"], "name them: timm/NAME.TAG"),
        (["model.name=my.models:net", "model.pretrained=true"], "set model.weights=FILE"),
        (["model.name=hf-hub:me/net", "model.norm=group"], "has its own normalisation"),
        (["model.name=vit_scratch", "model.pretrained=true"], "use model.name=vit"),
        (["model.freeze_backbone=true"], "needs trained weights"),
        (["train.batch_size=8", "train.micro_batch=9"], "larger than the global batch"),
        (["data.augment.rotate=d4", "data.augment.zoom=1.2"], "quarter turns keep exact pixels"),
        (["data.augment.rotate=d4", "data.augment.shift=0.1"], "quarter turns keep exact pixels"),
        (["model.name=vit_scratch", "data.image_size=72"], "try 64 or 80"),
        (["model.name=reference_vit", "data.image_size=224"], "needs a multiple of 25 pixels; try 200 or 225"),
        (["model.name=reference_vit", "data.image_size=20"], "pixels; try 25$"),
        (["model.name=reference_cnn", "model.pretrained=true"], "no published weights of reference_cnn"),
        (["model.name=reference_cnn", "model.width=64"], "reference_cnn has a fixed width"),
        (["model.size=base"], "custom_cnn has one size only"),
        (["model.name=resnet18", "model.width=64"], "resnet18 has a fixed width"),
    ],
)
def test_incompatible_recipe_fields_are_refused_with_one_problem(tmp_path: Path, overrides: list[str], text: str) -> None:
    with pytest.raises(RecipeError, match=text) as caught:
        resolve(tmp_path, PLAIN, *overrides)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("yaml", "text"),
    [
        ("", "model.name is missing"),
        ("- a\n", "must be a mapping"),
        ("model: {name: vit\n", "cannot be read as YAML"),
        ("model:\n\tname: vit\n", "cannot be read as YAML"),
        ("model: &m {name: vit}\ndata: *m\n", "aliases"),
        ("model: &m {name: *m}\n", "aliases"),
        ("model: {name: !!python/name:os.system x}\n", "the tag tag:yaml.org,2002:python/name:os.system is not used"),
        ("model.name: vit\n", "has a dot"),
        ("1: 2\nmodel: {name: vit}\n", "must be text"),
        ("name: other\nmodel: {name: vit}\n", "take the line out"),
        ("model: {name: vit}\nmodel: {name: vit}\n", "model is set again here, first on line 1"),
        ("model: vit\n", "model is a section"),
        ("model: {name: {a: b}}\n", "model.name.a: no such key"),
        ("model: {name: vit}\ntrain: {epochs: '3'}\n", "train.epochs=3: must be a whole number"),
        ("model: {name: vit}\ntrain: {epochs: 3.0}\n", "must be a whole number"),
        ("model: {name: vit}\ntracker: {tags: [1]}\n", "must be a list"),
        ("model: {name: vit}\ntracker: {tags: [{a: 1}]}\n", "plain values only"),
        ("[" * 3000, "cannot be read as YAML|nested too deeply"),
        ("model: {name: vit}\n---\nmodel: {name: vit}\n", "cannot be read as YAML"),
    ],
)
def test_invalid_recipe_file_is_refused_with_its_problem(tmp_path: Path, yaml: str, text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        resolve(tmp_path, yaml)


def test_recipe_file_that_is_not_utf_8_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "plain.yaml").write_bytes(b"model: {name: vit}\n# \xff\n")
    with pytest.raises(RecipeError, match=r"plain.yaml:2: is not UTF-8 text"):
        load_recipe(["recipe=plain"], folders=[tmp_path])


PROFILES = """model: {name: vit}
optim: {lr: 1e-4}
train: {epochs: 2}
profiles:
  1gpu: {train: {compile: true}}
  8gpu:
    optim: {lr: 4e-4, warmup: 0.2}
    train: {epochs: 5}
"""


def test_chosen_profile_overrides_the_recipe_and_is_overridden_by_sweep_and_command_line(tmp_path: Path) -> None:
    assert resolve(tmp_path, PROFILES).recipe == resolve(tmp_path, PROFILES.partition("profiles")[0]).recipe
    resolved = resolve(tmp_path, PROFILES, "profile=8gpu", "optim.warmup=0.3")
    recipe, origins = resolved.recipe, resolved.origins
    assert (recipe.optim.lr, recipe.optim.warmup, recipe.train.epochs, recipe.train.compile) == (4e-4, 0.3, 5, False)
    assert origins["optim.lr"] == f"{tmp_path}/plain.yaml:7, profile 8gpu" and origins["optim.warmup"] == "command line"
    assert resolved.profiles == ("1gpu", "8gpu")
    # The run is that of its values, however they were chosen.
    typed = resolve(tmp_path, PROFILES, "optim.lr=4e-4", "optim.warmup=0.3", "train.epochs=5")
    assert typed.recipe == recipe and run_name(typed.recipe) == run_name(recipe)
    settings = {"recipe": Override("plain", "sweep:1"), "profile": Override("8gpu", "sweep:2")}
    settings["train.epochs"] = Override(7, "sweep:3")
    swept = load_recipe([], folders=[tmp_path], settings=settings).recipe
    assert (swept.optim.lr, swept.train.epochs) == (4e-4, 7)


def test_mistakes_about_profiles_are_refused_also_in_those_not_chosen(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, PROFILES, "profile=8gpus")
    assert found == (
        "command line",
        "profile=8gpus: the recipe has no such profile; did you mean 8gpu? (profiles: 1gpu, 8gpu)",
    )
    assert problems(tmp_path, PLAIN, "profile=8gpu")[0][1].endswith("no such profile (it has no profiles)")
    assert "is not key=value" in problems(tmp_path, PROFILES, "profile")[0][1]
    wrong = "model: {name: vit}\nprofiles:\n  a: {optim: {lrr: 1}, train: {epochs: 0}, name: b}\n  c: 3\n"
    texts = [text for _, text in problems(tmp_path, wrong)]
    assert len(texts) == 4 and "profiles.c: must be a mapping" in texts[0] and "did you mean optim.lr" in texts[1]


def test_recipe_section_with_only_comments_is_ignored(tmp_path: Path) -> None:
    assert resolve(tmp_path, PLAIN + "optim:\n  # lr: 1\n").recipe == resolve(tmp_path, PLAIN).recipe


def test_unknown_recipe_is_refused_with_the_list_and_the_other_problems(tmp_path: Path) -> None:
    for name in ("vit", "resnet18"):
        (tmp_path / f"{name}.yaml").write_text(PLAIN)
    with pytest.raises(RecipeError) as caught:
        load_recipe(["recipe=vitt", "optim.lr=0"], folders=[tmp_path])
    assert caught.value.problems == (
        ("command line", "recipe=vitt: no such recipe; did you mean vit? (recipes: resnet18, vit; or recipe=FILE.yaml)"),
        ("command line", "optim.lr=0: must be more than 0"),
    )
    with pytest.raises(RecipeError, match=r"recipe=NAME is missing; recipes: resnet18, vit"):
        load_recipe([], folders=[tmp_path])
    with pytest.raises(RecipeError, match="there is no such file"):
        load_recipe(["recipe=here/vit.yaml"], folders=[tmp_path])


def test_recipe_names_are_searched_in_folder_order_and_files_by_path(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, epochs in ((first, 1), (second, 2)):
        folder.mkdir()
        (folder / "vit.yaml").write_text(f"{PLAIN}train: {{epochs: {epochs}}}\n")
    (second / "other.yaml").write_text(PLAIN)
    assert list_recipes([first, second]) == {"other": second / "other.yaml", "vit": first / "vit.yaml"}
    assert load_recipe(["recipe=vit"], folders=[first, second]).recipe.train.epochs == 1
    resolved = load_recipe([f"recipe={second / 'vit.yaml'}"], folders=[first])
    assert (resolved.recipe.train.epochs, resolved.recipe.name) == (2, "vit")


def test_recipe_in_a_subfolder_has_the_folder_in_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, elsewhere = tmp_path / "recipes", tmp_path / "elsewhere"
    for place in (folder, folder / "reference", folder / ".ipynb_checkpoints", elsewhere):
        place.mkdir()
        (place / "vit.yaml").write_text(PLAIN)
    assert list_recipes([folder]) == {"reference/vit": folder / "reference" / "vit.yaml", "vit": folder / "vit.yaml"}
    (tmp_path / "link.yaml").symlink_to(folder / "reference" / "vit.yaml")
    (tmp_path / "linked").symlink_to(folder)
    monkeypatch.chdir(folder / "reference")
    for given_as, name in (
        ("reference/vit", "reference-vit"),
        (folder / "reference" / "vit.yaml", "reference-vit"),
        (tmp_path / "linked" / "reference" / "vit.yaml", "reference-vit"),
        ("../reference/vit.yaml", "reference-vit"),
        ("vit.yaml", "reference-vit"),
        ("vit", "vit"),
        (elsewhere / "vit.yaml", "vit"),
        (tmp_path / "link.yaml", "link"),
    ):
        resolved = load_recipe([f"recipe={given_as}"], folders=[folder])
        assert resolved.recipe.name == name, given_as
    with pytest.raises(RecipeError, match=r"recipe=reference/vitt: there is no such file; did you mean reference/vit\?"):
        load_recipe(["recipe=reference/vitt"], folders=[folder])


def test_one_line_about_an_invalid_recipe_names_the_problem(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        resolve(tmp_path, PLAIN, "optim.lr=-1")
    assert first_line(caught.value) == "a problem in the recipe: command line: optim.lr=-1: must be more than 0"


SOUND_ARGUMENTS = ("recipe=plain", "optim.lr=0.5", "train.epochs=3", "seed=1")


@given(st.lists(st.sampled_from(SOUND_ARGUMENTS) | st.text(max_size=30), max_size=4))
@example(list(SOUND_ARGUMENTS))
@example([*SOUND_ARGUMENTS, "seed=1"])
def test_any_arguments_without_a_known_recipe_raise_recipe_error(
    tmp_path_factory: pytest.TempPathFactory, arguments: list[str]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "plain.yaml").write_text(PLAIN)
    is_sound = "recipe=plain" in arguments and set(arguments) <= set(SOUND_ARGUMENTS) and len(set(arguments)) == len(arguments)
    try:
        resolved = load_recipe(arguments, folders=[folder])
    except RecipeError as error:
        assert error.problems and not is_sound
    else:
        assert is_sound
        assert flatten(resolved.recipe).keys() == RECIPE.fields.keys()
        given_keys = {argument.partition("=")[0] for argument in arguments} - {"recipe"}
        assert {key for key, origin in resolved.origins.items() if origin == "command line"} == given_keys


@given(
    key=st.sampled_from(sorted(set(RECIPE.fields) - {"name"})),
    text=st.text(max_size=20) | st.sampled_from(["1", "0.5", "true", "[a]"]),
)
def test_any_recipe_value_is_accepted_or_refused_with_its_key(
    tmp_path_factory: pytest.TempPathFactory, key: str, text: str
) -> None:
    folder = tmp_path_factory.getbasetemp()
    try:
        resolved = resolve(folder, PLAIN, f"{key}={text}")
    except RecipeError as error:
        assert key.rsplit(".", maxsplit=1)[-1] in str(error)
    else:
        assert resolved.origins[key] == "command line"
        assert key in flatten(resolved.recipe)
