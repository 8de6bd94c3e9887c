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
from huggingface_hub import ModelCard

import galaxydist
from galaxydist.evaluation.text_table import escape_markdown
from galaxydist.prediction.card_sections import card_text
from galaxydist.prediction.trained_model import open_trained_model
from galaxydist.runs.folder import RunFolder
from galaxydist.serving.app.published_model import read_about
from galaxydist.serving.card_usage import onnx_code
from galaxydist.serving.model_card import collect_results, model_card
from galaxydist.surveys.data_origin import known_origin
from tests.helpers.published import PublishedRun

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


def test_the_code_in_the_card_gives_the_probabilities_of_the_run(
    published_run: PublishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(published_run.folder, tmp_path / "folder")
    stored_picture(published_run, folder)
    monkeypatch.chdir(folder)
    expected = galaxydist.load_predictor(published_run.run_dir, device="cpu")(["galaxy.jpg"])
    code = blocks((folder / "README.md").read_text())
    shown = []
    for block in code:
        output, names = io.StringIO(), dict[str, Any]()
        with contextlib.redirect_stdout(output):
            exec(block, names)
        shown.append((output.getvalue(), names.get("probabilities")))
    assert len(code) == 2 and expected.predicted[0] in shown[0][0] and expected.predicted[0] in shown[1][0]
    np.testing.assert_allclose(shown[1][1], expected.probabilities[0], atol=1e-4)


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
    assert escape_markdown("in_between <b> |") == "in_between \\<b\\> \\|"


def test_the_app_shows_the_card_without_its_header_and_its_code(published_run: PublishedRun, tmp_path: Path) -> None:
    text = read_about(published_run.folder)
    assert text.startswith("# ") and "```" not in text and "## Results" in text and "## How to cite" in text
    assert read_about(tmp_path) == ""


def test_onnx_code_has_the_steps_that_the_model_has() -> None:
    form = {"image_size": 40, "stored_size": 128, "factor": 2, "crop": 0.75, "mean": [0.0] * 3, "std": [1.0] * 3}
    code = onnx_code({"form": form, "tta": "d4", "temperature": None})
    assert 'image.draft("RGB", (64, 64))' in code and ".reduce(2)" in code and "crop((8, 8, 56, 56)).resize((40, 40)" in code
    assert "np.rot90" in code and "temperature" not in code


def test_a_card_of_the_recipe_alone_names_what_is_known() -> None:
    text = card_text({"galaxydist": {"recipe": {"name": "old", "model": {"name": "vit"}}}}, {})
    assert "# old on unknown data" in text and "Not measured: the test split was not measured." in text
