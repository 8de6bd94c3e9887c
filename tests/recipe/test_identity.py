"""The plain form of a recipe and the name that its result fields give a run; where data lies."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from galaxydist.errors import UserError
from galaxydist.paths import data_root, hdf5_path, manifest_path
from galaxydist.recipe.fields import RECIPE
from galaxydist.recipe.identity import flatten, from_dict, later_defaults, result_fields, result_hash, run_name, to_dict
from galaxydist.recipe.resolve import RecipeError, load_recipe
from galaxydist.recipe.schema import ModelConfig, Recipe

BASE = Recipe(name="base", model=ModelConfig(name="vit"))


def changed(*overrides: str, folder: Path) -> Recipe:
    (folder / "base.yaml").write_text("model: {name: vit}\n")
    return load_recipe(["recipe=base", *overrides], folders=[folder]).recipe


def test_recipe_survives_conversion_to_json_and_back(tmp_path: Path) -> None:
    recipe = changed("data.manifest=a/m.json", "tracker.tags=[x,y]", "optim.lr=1", "train.clip_norm=0", folder=tmp_path)
    assert from_dict(json.loads(json.dumps(to_dict(recipe)))) == recipe
    assert list(flatten(recipe)) == list(RECIPE.fields)


def test_invalid_stored_recipe_is_refused_with_its_problems() -> None:
    plain = to_dict(BASE)
    plain["optim"]["lr"] = "fast"
    plain["extra"] = {"key": 1}
    del plain["model"]["name"]
    with pytest.raises(RecipeError) as caught:
        from_dict(plain, source="checkpoint")
    texts = str(caught.value)
    assert "checkpoint: optim.lr=fast: must be a number" in texts
    assert "checkpoint: extra.key: no such key" in texts
    assert "model.name is missing" in texts


def test_a_stored_recipe_may_name_an_optimizer_of_an_older_version() -> None:
    plain = to_dict(BASE)
    plain["optim"]["name"] = "lookahead_adopt"
    assert from_dict(plain).optim.name == "lookahead_adopt"


def test_result_hash_changes_with_result_fields_and_not_with_run_fields(tmp_path: Path) -> None:
    base = result_hash(changed(folder=tmp_path))
    assert len(base) == 8 and int(base, 16) >= 0
    for override in (
        "tracker.name=wandb",
        "train.micro_batch=8",
        "run.dir=x",
        "data.threads=2",
        "data.dir=x",
        "resume.force=[seed]",
    ):
        assert result_hash(changed(override, folder=tmp_path)) == base
    results = ["seed=1", "optim.lr=0.5", "data.crop=0.5", "data.balance=resample", "eval.batch_size=65", "train.ema=0.9"]
    assert len({base, *(result_hash(changed(override, folder=tmp_path)) for override in results)}) == 1 + len(results)


def test_result_hash_is_equal_for_equal_numbers_in_any_spelling(tmp_path: Path) -> None:
    assert len({result_hash(changed(f"optim.lr={text}", folder=tmp_path)) for text in ("1", "1.0", "1e0", "10e-1")}) == 1
    assert result_hash(changed("optim.weight_decay=-0.0", folder=tmp_path)) == result_hash(
        changed("optim.weight_decay=0", folder=tmp_path)
    )


def test_run_name_contains_the_sha256_of_the_sorted_result_fields() -> None:
    fields = result_fields(BASE)
    assert set(fields).isdisjoint({"run.dir", "run.root", "tracker.name", "data.dir", "train.micro_batch"})
    assert (fields["optim.lr"], fields["data.manifest"], fields["name"]) == (1e-3, None, "base")
    values = {key: json.dumps(fields[key], separators=(",", ":")) for key in sorted(fields) if key not in later_defaults()}
    canonical = "{" + ",".join(f"{json.dumps(key)}:{value}" for key, value in values.items()) + "}"
    assert run_name(BASE) == f"base-{hashlib.sha256(canonical.encode()).hexdigest()[:8]}"


def test_every_recipe_field_has_a_description_and_sections_are_immutable() -> None:
    assert all(field.description for field in RECIPE.fields.values())
    with pytest.raises(Exception, match="frozen"):
        BASE.optim.lr = 1.0  # type: ignore[misc]


def test_data_root_and_data_paths_follow_argument_and_environment(tmp_path: Path) -> None:
    assert data_root(tmp_path, {"GALAXYDIST_DATA": "/elsewhere"}) == tmp_path
    assert data_root(None, {"GALAXYDIST_DATA": "/elsewhere"}) == Path("/elsewhere")
    assert data_root(None, {}).name == "galaxydist"
    assert hdf5_path(tmp_path, "galaxy10_decals") == tmp_path / "hdf5" / "Galaxy10_DECals.h5"
    assert hdf5_path(tmp_path, "simulated") == tmp_path / "hdf5" / "simulated.h5"
    expected = tmp_path / "shards" / "simulated" / "balanced-no_conflicting" / "manifest.json"
    assert manifest_path(tmp_path, "simulated", "balanced", conflicting="drop") == expected


def test_a_user_without_a_home_is_told_to_name_the_data_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)  # as in a container that runs as any user
    with pytest.raises(UserError, match="no home folder for the data root"):
        data_root(None, {})


GOLDEN_RUN_NAMES = {
    "custom_cnn": "custom_cnn-ccfe2628",
    "d4_cnn": "d4_cnn-1b5d6364",
    "demo": "demo-104b4e92",
    "reference/custom_cnn": "reference-custom_cnn-bbccea18",
    "reference/resnet18": "reference-resnet18-8ce39d67",
    "reference/resnet26": "reference-resnet26-c27b33fb",
    "reference/resnet50": "reference-resnet50-8389ac4e",
    "reference/vgg16": "reference-vgg16-f8911c9f",
    "reference/vgg19": "reference-vgg19-6e1f7243",
    "reference/vit": "reference-vit-644711cd",
    "resnet18": "resnet18-77fe901e",
    "resnet26": "resnet26-902f9c4e",
    "resnet50": "resnet50-9c370509",
    "simulated_start": "simulated_start-7c541f99",
    "small": "small-78ce5671",
    "vgg16": "vgg16-d9afdcd4",
    "vgg19": "vgg19-f9e984c8",
    "vit": "vit-74f1d518",
    "vit_scratch": "vit_scratch-03907593",
}


def test_shipped_recipes_keep_the_names_of_their_run_folders() -> None:
    """A new result key is made with ``later_field``; otherwise all runs that exist would lose their folders."""
    names = {name: run_name(load_recipe([f"recipe={name}"]).recipe) for name in GOLDEN_RUN_NAMES}
    assert names == GOLDEN_RUN_NAMES


def test_later_result_key_changes_the_hash_only_if_not_at_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    later = {"train.patience", *later_defaults()}
    old = {key: value for key, value in result_fields(BASE).items() if key not in later}
    canonical = json.dumps(old, sort_keys=True, separators=(",", ":"))
    before = hashlib.sha256(canonical.encode()).hexdigest()[:8]
    patience = RECIPE.fields["train.patience"]
    monkeypatch.setattr(patience.info, "json_schema_extra", {"later": True})
    assert patience.kind == "result" and later_defaults()["train.patience"] == 0
    assert result_hash(BASE) == before
    patient = BASE.model_copy(update={"train": BASE.train.model_copy(update={"patience": 3})})
    assert result_hash(patient) != before
