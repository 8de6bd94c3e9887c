"""The model card: a header that the Hub reads, results with intervals, code that runs, and texts of users that change nothing."""

import contextlib
import io
import json
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

import galaxydist
from galaxydist.evaluation.text_table import escape_markdown
from galaxydist.galaxy import EncodedImage
from galaxydist.loading.augment import Normalise
from galaxydist.loading.training_data import StoredImages
from galaxydist.prediction.card_sections import card_text
from galaxydist.prediction.citations import works_to_cite
from galaxydist.prediction.image_form import ImageForm
from galaxydist.prediction.predictor import probabilities_of
from galaxydist.prediction.trained_model import ModelChoice, open_trained_model
from galaxydist.runs.folder import RunFolder
from galaxydist.serving.app.published_model import read_about
from galaxydist.serving.card_usage import onnx_code
from galaxydist.serving.model_card import collect_results, model_card
from galaxydist.serving.publish import PublishOptions, publish
from galaxydist.surveys.data_origin import known_origin
from tests.helpers.published import PublishedRun, publish_blobs

HUB_KEYS = {"library_name", "license", "pipeline_tag", "tags", "metrics", "model-index"}


@pytest.fixture(scope="module")
def config(published_run: PublishedRun) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((published_run.folder / "config.json").read_text())
    return found


@pytest.fixture(scope="module")
def results(published_run: PublishedRun) -> dict[str, Any]:
    trained = open_trained_model(published_run.run_dir, {})
    found: dict[str, Any] = json.loads(json.dumps(collect_results(RunFolder(published_run.run_dir), trained)))
    return found


def with_origin(config: dict[str, Any], dataset: str, **weights: str | None) -> dict[str, Any]:
    """The config of a model that was trained on another data set, and started from published weights."""
    changed = json.loads(json.dumps(config))
    origin = known_origin(dataset)
    changed["galaxydist"]["data"]["stored"] |= {"dataset": dataset, "origin": origin.to_dict() if origin else None}
    changed["galaxydist"]["model"] |= weights
    changed["app"]["title"] = f"resnet18 on {dataset}"
    return dict(changed)


def header(text: str) -> dict[str, Any]:
    return dict(ModelCard(text, ignore_metadata_errors=False).data.to_dict())


def test_the_hub_reads_the_header_and_the_results_are_those_of_the_evaluation(
    published_run: PublishedRun, config: dict[str, Any], results: dict[str, Any]
) -> None:
    text = (published_run.folder / "README.md").read_text()
    evaluation = json.loads((published_run.run_dir / "evaluation" / "test.json").read_text())
    card = ModelCard(text, ignore_metadata_errors=False)
    assert set(card.data.to_dict()) == HUB_KEYS
    assert (card.data.license, card.data.library_name) == ("unknown", "galaxydist")
    found = {result.metric_type: result for result in card.data.eval_results}
    assert found["accuracy"].metric_value == round(evaluation["accuracy"], 4)
    assert found["f1"].metric_value == round(evaluation["macro_f1"], 4) and found["f1"].dataset_split == "test"
    low, high = evaluation["intervals"]["accuracy"]
    assert found["accuracy"].metric_name == f"accuracy (95 % interval {low:.3f} to {high:.3f})"
    assert results["test"]["confusion"] == evaluation["confusion"] and results["val"]["count"] == 24  # from stored predictions
    assert results["training"]["splits"] == {"train": 72, "val": 24, "test": 24} and results["training"]["hours"] > 0
    assert f"| accuracy | {evaluation['accuracy']:.3f} | {low:.3f} to {high:.3f} |" in text
    assert f"{evaluation['calibration']['ece']:.3f}" in text and config["galaxydist"]["data"]["manifest_hash"] in text
    assert "licence is unknown" in text and "hosts" not in json.dumps(results)
    assert str(published_run.run_dir.parent) not in text + json.dumps(results)


def test_a_run_without_an_evaluation_says_that_nothing_was_measured_and_how_to_measure_it(
    published_run: PublishedRun, config: dict[str, Any], tmp_path: Path
) -> None:
    run_dir = shutil.copytree(published_run.run_dir, tmp_path / "run")
    shutil.rmtree(run_dir / "evaluation")
    (run_dir / "result.json").unlink()
    results = collect_results(RunFolder(run_dir), open_trained_model(run_dir, {}))
    text = model_card(config, results)
    assert results["test"] is results["val"] is None and header(text).keys() == HUB_KEYS - {"metrics", "model-index"}
    assert "Not measured: the test split; \\`galaxydist evaluate RUN\\` measures it." in text
    assert "The run has not finished" in text and "### Classes" not in text


def test_the_evaluation_of_another_checkpoint_is_not_taken(published_run: PublishedRun, tmp_path: Path) -> None:
    run_dir = shutil.copytree(published_run.run_dir, tmp_path / "run")
    path = run_dir / "evaluation" / "test.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"checkpoint": "step-00000001-0001", "step": 1}))
    (run_dir / "evaluation" / "test-predictions.parquet").unlink()
    assert collect_results(RunFolder(run_dir), open_trained_model(run_dir, {}))["test"] is None


def test_only_a_checkpoint_chosen_on_the_validation_split_is_said_to_be(
    published_run: PublishedRun, config: dict[str, Any], results: dict[str, Any]
) -> None:
    last = open_trained_model(published_run.run_dir, {}, ModelChoice(checkpoint="last"))
    changed = {**config, "galaxydist": config["galaxydist"] | {"recipe": last.recipe.model_dump(mode="json")}}
    sentence = "The checkpoint was chosen on the validation split"
    assert results["val"] and sentence in model_card(config, results) and sentence not in model_card(changed, results)


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def stored_picture(published_run: PublishedRun, folder: Path) -> None:
    """Write the first test galaxy as ``galaxy.jpg``: without losses, whatever its name says."""
    shard = min(published_run.manifest.parent.glob("test-*.tar"))
    with tarfile.open(shard) as tar:
        name = next(name for name in sorted(tar.getnames()) if name.endswith(".png"))
        content = tar.extractfile(name)
        assert content is not None
        (folder / "galaxy.jpg").write_bytes(content.read())


def run_code(code: str) -> tuple[str, dict[str, Any]]:
    """Run a program; what it prints, and its variables."""
    output, names = io.StringIO(), dict[str, Any]()
    with contextlib.redirect_stdout(output):
        exec(code, names)
    return output.getvalue(), names


def test_the_code_in_the_card_gives_the_probabilities_of_the_run(
    published_run: PublishedRun, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(published_run.folder, tmp_path / "folder")
    stored_picture(published_run, folder)
    monkeypatch.chdir(folder)
    expected = galaxydist.load_predictor(published_run.run_dir, device="cpu")(["galaxy.jpg"])
    code = blocks((folder / "README.md").read_text())
    assert len(code) == 2 and code[1].strip() == onnx_code(config["app"]) and expected.predicted[0] in run_code(code[0])[0]
    for app in (config["app"], config["app"] | {"tta": "d4"}):
        changed = json.dumps(config | {"app": app})
        (folder / "config.json").write_text(changed)
        shown, names = run_code(onnx_code(app))
        assert expected.predicted[0] in shown and names["probabilities"].sum() == pytest.approx(1)
        averaged = galaxydist.load_predictor(published_run.run_dir, device="cpu", tta=app["tta"])(["galaxy.jpg"])
        scaled = probabilities_of(averaged.logits, app["temperature"])[0]
        np.testing.assert_allclose(names["probabilities"], scaled, atol=1e-4)


@pytest.mark.slow
def test_the_code_for_timm_gives_the_class_and_the_confidence_of_the_run_or_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = PublishOptions(onnx=False, program=False, reference=0)
    run = publish_blobs(tmp_path, options, model__name="resnet18", model__width=None, train__epochs=1)
    stored_picture(run, run.folder)
    monkeypatch.chdir(run.folder)
    expected = galaxydist.load_predictor(run.run_dir, device="cpu")(["galaxy.jpg"])
    text = (run.folder / "README.md").read_text()
    shown, names = run_code(blocks(text)[0])
    assert header(text)["library_name"] == "timm" and "timm.create_model" in blocks(text)[0]
    assert expected.predicted[0] in shown
    np.testing.assert_allclose(names["probabilities"], expected.probabilities[0], atol=0.01)  # timm resamples before it crops
    measured = json.loads((run.folder / "results.json").read_text())["timm"]
    assert measured["galaxies"] == 24 and f"{measured['same_class']} of 24 validation galaxies that it prepared" in text
    monkeypatch.setattr("galaxydist.serving.publish.LEAST_AGREEMENT", 1.1)
    report = publish(run.run_dir, tmp_path / "other", {}, options)
    text = (tmp_path / "other" / "README.md").read_text()
    assert not report.loads_in_timm and "left out" in report.notes[-1] and "timm.create_model" not in text
    assert header(text)["library_name"] == "galaxydist"


def test_the_code_prepares_pictures_of_any_size_as_the_run_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mean, std = (0.2, 0.18, 0.16), (0.12, 0.11, 0.1)
    form = {"image_size": 40, "stored_size": 128, "factor": 2, "crop": 0.75, "mean": mean, "std": std}
    preparation = onnx_code({"form": form}).partition("session =")[0]
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(json.dumps({"app": {"form": form}}))
    known = ImageForm(StoredImages("blobs", 128, "jpeg"), 2, resize=True)
    normalise = Normalise(mean, std, 40, 0.75)
    draw = np.random.default_rng(0)
    for height, width, kind in ((128, 128, "JPEG"), (128, 128, "PNG"), (301, 200, "PNG")):
        pixels = draw.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
        picture = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        picture.save("galaxy.jpg", kind)
        data = Path("galaxy.jpg").read_bytes()
        image = EncodedImage(data, "jpg") if kind == "JPEG" else np.asarray(picture)
        expected = normalise(torch.from_numpy(known.prepare(image, "galaxy")[None])).numpy()
        levels = np.abs(run_code(preparation)[1]["images"] - expected) * np.reshape(std, (1, 3, 1, 1)) * 255
        assert levels.max() <= 1.01, (height, width, kind)


def test_a_card_states_licences_sources_and_limits_of_its_own_data(config: dict[str, Any], results: dict[str, Any]) -> None:
    simulated = model_card(with_origin(config, "simulated"), results)
    assert "**No real galaxies**" in simulated and header(simulated)["license"] == "mit" and "Galaxy Zoo" not in simulated
    source = "timm/resnet18.a1_in1k@0123abc"
    real = model_card(with_origin(config, "galaxy10_decals", source=source, licence="apache-2.0"), results)
    assert header(real)["license"] == "cc-by-4.0" and header(real)["base_model"] == "timm/resnet18.a1_in1k"
    pages = ("legacysurvey.org/acknowledgment", "astronn.readthedocs.io", "data.galaxyzoo.org", "doi:10.5281/zenodo.4414861")
    assert all(page in real for page in pages) and "59 galaxies twice" in real and "No real galaxies" not in real
    desi = model_card(with_origin(config, "gz_desi"), results)
    assert "**Non-commercial use only**" in desi and header(desi)["license"] == "cc-by-nc-sa-4.0"
    assert header(desi)["datasets"] == ["mwalmsley/gz_desi"]
    weights = model_card(with_origin(config, "simulated", source="me/encoder@1", licence="cc-by-nc-4.0"), results)
    assert "by the licence of the weights that it started from (cc-by-nc-4.0)" in weights
    assert header(weights)["license"] == "cc-by-nc-4.0"
    resampled = with_origin(config, "simulated")
    resampled["galaxydist"]["data"]["stored"] |= {"pxscale": [0.262] * 3, "source_sides": [256, 256]}
    text = model_card(resampled, results)
    assert "0.262 arcsec/pixel before resampling" in text and "show 256 pixels at 0.262 arcsec/pixel." in text


HOSTILE = ("<script>alert(1)</script>", "a|b", "[x](http://e.org)", "*bold*\n# head", "`code`", "$x$")


def test_texts_of_users_are_shown_as_they_are(config: dict[str, Any], results: dict[str, Any]) -> None:
    changed = with_origin(config, "---\nlicense: mit\n# x")
    origin = {"licence": "<b>free</b>", "citation": "@misc{x, note={```\n# out}}", "url": "javascript:alert(1)"}
    changed["galaxydist"]["data"]["stored"]["origin"] = origin
    changed["app"] |= {"title": "a: [b](c)\n# d", "classes": list(HOSTILE[:3])}
    measured = json.loads(json.dumps(results))
    measured["test"]["classes"] = list(HOSTILE[3:])
    text = model_card(changed, measured)
    assert ModelCard(text, ignore_metadata_errors=False).data.model_name == "a: [b](c) # d" and header(text)["license"] == "other"
    body = ModelCard(text).text
    outside = re.sub(r"`{4}.*?`{4}", "", body, flags=re.DOTALL)
    assert not re.search(r"(?<!\\)<(script|b)>|(?<!\\)\[x\]\(|^# (x|head|out|d)|(?<!\\)\*bold", outside, re.MULTILINE)
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows if "0." in row and "to" in row} <= {4, 6, 7}
    works = "\n".join(works_to_cite("x", "A & B, (https://e.org/a_b).; <i>C</i>", None, uses_timm=False, version="1"))
    assert works.startswith("- A \\& B, (<https://e.org/a_b>).\n- \\<i\\>C\\</i\\>\n- galaxydist 1")
    assert escape_markdown("in_between <b> |") == "in_between \\<b\\> \\|"


def test_the_app_shows_the_card_without_its_header_and_its_code(published_run: PublishedRun, tmp_path: Path) -> None:
    text = read_about(published_run.folder)
    assert text.startswith("# ") and "```" not in text and "## Results" in text and "## How to cite" in text
    assert read_about(tmp_path) == ""


def test_a_card_of_the_recipe_alone_names_what_is_known() -> None:
    text = card_text({"galaxydist": {"recipe": {"name": "old", "model": {"name": "vit"}}}}, {})
    assert "# old on unknown data" in text and "Not measured: the test split was not measured." in text
