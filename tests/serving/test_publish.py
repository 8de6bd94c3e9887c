"""``galaxydist publish``: a whole folder whose model predicts what its run predicts."""

import json
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import galaxydist
from galaxydist.checkpoints import store
from galaxydist.cli.main import main
from galaxydist.errors import UserError
from galaxydist.models.hub_weights import CONFIG_FILE, HUB_FILE
from galaxydist.prediction.published_folder import FORMAT as FORMAT_READ
from galaxydist.serving.app.published_model import CONFIG, FORMAT, REFERENCE, WEIGHTS, read_config
from galaxydist.serving.publish import PublishOptions, PublishReport, publish
from galaxydist.serving.run_app import find_publication
from tests.helpers.blobs import BlobSurvey
from tests.helpers.forked_runs import command, run_forked
from tests.helpers.published import PublishedRun, train_blobs

# What takes no time: weights and config.
QUICK = ("--no-onnx", "--no-program", "--reference", "0")
BARE = PublishOptions(onnx=False, program=False, reference=0)


def blob_images(count: int = 24) -> NDArray[np.uint8]:
    return np.stack([np.asarray(galaxy.image) for galaxy in BlobSurvey().read(0, count)])


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def folder(published_run: PublishedRun, tmp_path: Path) -> Path:
    """A copy of the published folder."""
    return Path(shutil.copytree(published_run.folder, tmp_path / "copy"))


def test_a_published_folder_predicts_the_same_as_its_run_bit_for_bit(published_run: PublishedRun, folder: Path) -> None:
    images = blob_images()
    known = galaxydist.load_predictor(published_run.run_dir, device="cpu")
    found = galaxydist.load_predictor(folder, device="cpu")
    np.testing.assert_array_equal(found(images).logits, known(images).logits)
    assert found.trained.temperature == known.trained.temperature is not None
    assert found.class_names == known.class_names and found.trained.step == known.trained.step
    turned = galaxydist.load_predictor(folder, device="cpu", tta="d4")
    np.testing.assert_array_equal(
        turned(images).logits, galaxydist.load_predictor(published_run.run_dir, device="cpu", tta="d4")(images).logits
    )
    assert turned.trained.temperature is None and "eval.tta=none" in turned.trained.notes[0]
    with pytest.raises(UserError, match="one checkpoint"):
        galaxydist.load_predictor(folder, checkpoint="last")


def test_predict_takes_the_folder_in_place_of_a_run(published_run: PublishedRun, folder: Path, tmp_path: Path) -> None:
    shards = str(published_run.manifest)
    assert main(["predict", str(published_run.run_dir), shards, "--split", "test", "-o", str(tmp_path / "run.csv")]) == 0
    shutil.rmtree(folder / "examples", ignore_errors=True)  # what the app needs is not needed here
    assert main(["predict", str(folder), shards, "--split", "test", "-o", str(tmp_path / "folder.csv")]) == 0
    assert (tmp_path / "folder.csv").read_bytes() == (tmp_path / "run.csv").read_bytes()
    assert read_json(tmp_path / "folder.csv.json")["run"] == str(folder)


def test_the_command_prints_what_it_wrote_and_how_to_use_it(
    published_run: PublishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "folder"
    words = ["publish", str(published_run.run_dir), str(out), *QUICK]
    assert main([*words, "--repo", "me/blobs", "--name", "Blobs, <small>"]) == 0
    text = capsys.readouterr().out
    assert f"hf upload me/blobs {out} ." in text and f'galaxydist.load_predictor("{out}")' in text
    assert "model.safetensors" in text and " kB\n" in text and "timm" not in text
    config = read_json(out / CONFIG)
    assert read_config(out).title == "Blobs, <small>" and config["galaxydist"]["repo"] == "me/blobs"
    assert "architecture" not in config, "timm does not know our network"
    assert not (out / "model.onnx").exists() and [*out.parent.iterdir()] == [out]

    assert main(words) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    assert read_config(out).title == "custom_cnn on blobs"
    (out / "notes.txt").write_text("mine")
    assert main([*words, "--overwrite"]) == 2
    assert "notes.txt" in capsys.readouterr().err and (out / "notes.txt").read_text() == "mine"


def test_wrong_inputs_are_refused_before_anything_is_written(
    published_run: PublishedRun, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(published_run.run_dir)
    foreign, file = tmp_path / "foreign", tmp_path / "file"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years")
    file.write_text("text")
    before = sorted(path.name for path in tmp_path.iterdir())
    for words, said in (
        ([run, str(foreign)], "thesis.tex"),
        ([run, str(foreign), "--overwrite"], "thesis.tex"),
        ([run, str(file)], "is no folder"),
        ([run, run, "--overwrite"], "was not written by this command"),
        ([str(tmp_path / "none"), str(tmp_path / "out")], "no such folder"),
        ([str(foreign), str(tmp_path / "out")], "not a run folder"),
        ([str(folder), str(tmp_path / "out")], "not a run folder"),
        ([run, "hf://me/model"], "URL"),
        ([run, str(tmp_path / "out"), "--repo", "https://huggingface.co/me/x"], "OWNER/NAME"),
        ([run, str(tmp_path / "out"), "--name", " "], "--name"),
        ([run, str(tmp_path / "out"), "--trained-on", str(file)], "not a manifest"),
        ([run, str(tmp_path / "out"), "--reference", "-1"], "less than 0"),
    ):
        try:
            code = main(["publish", *words, *(() if "--reference" in words else QUICK)])
        except SystemExit as exit:  # of argparse
            code = int(exit.code or 0)
        assert code == 2 and said in capsys.readouterr().err, words
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (foreign / "thesis.tex").read_text() == "years" and file.read_text() == "text"


def test_missing_packages_for_onnx_are_named_before_the_model_is_read(
    published_run: PublishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("galaxydist.serving.publish.EXPORT_PACKAGES", ("onnx", "onnx_of_a_later_age"))
    with pytest.raises(
        UserError, match=r"onnx_of_a_later_age, which is not installed: pip install 'galaxydist\[export\]'.*--no-onnx"
    ):
        publish(published_run.run_dir, tmp_path / "out", {})
    assert not [*tmp_path.iterdir()]


def test_a_damaged_missing_or_later_file_is_named(folder: Path) -> None:
    config = (folder / CONFIG).read_text()
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-100] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged: its SHA-256"):
        galaxydist.load_predictor(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        galaxydist.load_predictor(folder)
    for old, new, said in (
        ('"format": 1', '"format": 2', "format 2"),
        ('"class_names"', '"classes"', "damaged or was edited"),
        ('"galaxydist"', '"other"', "not written by `galaxydist publish`"),
        ("{", "", "not readable as JSON"),
        ('"custom_cnn"', '"no_such_cnn"', "no such model"),
    ):
        (folder / CONFIG).write_text(config.replace(old, new))
        with pytest.raises(UserError, match=said):
            galaxydist.load_predictor(folder)


def test_weights_of_another_model_do_not_load(folder: Path) -> None:
    config = read_json(folder / CONFIG)
    config["galaxydist"]["recipe"]["model"]["width"] = 8
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError, match="does not fit the model custom_cnn"):
        galaxydist.load_predictor(folder)


def test_a_publication_for_the_app_is_current_until_its_sources_change(published_run: PublishedRun, tmp_path: Path) -> None:
    run = Path(shutil.copytree(published_run.run_dir, tmp_path / "run"))
    out = run / "published"

    def is_current() -> bool:
        return find_publication(run, tmp_path).is_current

    def write() -> PublishReport:
        options = replace(BARE, made_from=find_publication(run, tmp_path).made_from, overwrite=True)
        report = publish(run, out, {}, options)
        assert is_current()
        return report

    assert not is_current()
    write()
    shutil.rmtree(run / "evaluation")
    assert not is_current()
    assert "not calibrated" in write().notes[0] and read_config(out).temperature is None
    (run / "result.json").unlink()
    assert not is_current()
    assert "has not finished" in write().notes[0]
    store.mark_best(store.list_checkpoints(run / "checkpoints")[-1])
    assert not is_current()
    write()
    config = (out / CONFIG).read_text()
    for old, new in (('"format": 1', '"format": 0'), (f'"torch": "{version("torch")}"', '"torch": "2.0.0"'), ("{", "")):
        (out / CONFIG).write_text(config.replace(old, new))
        assert not is_current(), old
    (out / CONFIG).write_text(config)
    assert is_current()
    (out / REFERENCE).write_bytes(b"of another version")
    assert not is_current()
    write()
    (out / WEIGHTS).unlink()
    assert not is_current()
    write()
    assert not [path for path in run.iterdir() if path.name.startswith(".published")]


def test_a_published_folder_holds_no_path_and_no_secret(published_run: PublishedRun, tmp_path: Path) -> None:
    run = Path(shutil.copytree(published_run.run_dir, tmp_path / "run"))
    stored = read_json(run / "recipe.json")
    stored["recipe"] |= {
        "data.manifest": "https://me:secret@example.org/shards/manifest.json?token=secret",
        "model.weights": str(tmp_path / "private.safetensors"),
        "tracker.entity": "secret-team",
    }
    (run / "recipe.json").write_text(json.dumps(stored))
    publish(run, tmp_path / "out", {}, BARE)
    text = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert (
        b"secret" not in text and str(tmp_path).encode() not in text and str(published_run.manifest.parent).encode() not in text
    )
    recipe = read_json(tmp_path / "out" / CONFIG)["galaxydist"]["recipe"]
    assert recipe["data"]["manifest"] == "https://example.org/shards/manifest.json"
    assert recipe["model"]["weights"] == "private.safetensors"
    assert galaxydist.load_predictor(tmp_path / "out")(blob_images(1)).predicted


def test_the_app_and_the_predictor_name_the_same_files() -> None:
    assert (CONFIG, WEIGHTS, FORMAT) == (CONFIG_FILE, HUB_FILE, FORMAT_READ)


@pytest.mark.slow
def test_a_kill_at_any_file_leaves_the_old_folder_or_none(published_run: PublishedRun, tmp_path: Path) -> None:
    out = tmp_path / "out"
    publish(published_run.run_dir, out, {}, BARE)
    (tmp_path / ".out.other.1.old").mkdir()  # of a folder out.other
    states = []
    for event in ("galaxydist.write", "galaxydist.rename"):
        number = 1
        while run_forked(
            command, ["publish", str(published_run.run_dir), str(out), *QUICK, "--overwrite"], event, number
        ).returncode:
            number += 1
            states.append((out.exists(), len([*tmp_path.glob(".out.*.old")])))
            assert not out.exists() or galaxydist.load_predictor(out)(blob_images(1)).predicted
    assert states == [(True, 1)] * 5 + [(False, 2)], "the last one between the two renames"
    assert galaxydist.load_predictor(out)(blob_images(1)).predicted
    assert [path.name for path in tmp_path.glob("*.old")] == [".out.other.1.old"]


@pytest.mark.slow
def test_a_model_of_an_own_function_is_published_and_opened_if_its_code_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_network.py").write_text(
        "from torch import nn\n\n\ndef build(num_classes, image_size):\n"
        "    module = nn.Conv2d(3, 8, 3, padding=1)\n"
        "    return nn.Sequential(module, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GALAXYDIST_TRUST_CODE", "1")
    run, _ = train_blobs(tmp_path, model__name="own_network:build", model__width=None, model__drop_rate=0, train__epochs=1)
    monkeypatch.delenv("GALAXYDIST_TRUST_CODE")
    words = ["publish", str(run), str(tmp_path / "out"), *QUICK]
    assert main(words) == 2 and "--trust-code" in capsys.readouterr().err
    assert main([*words, "--trust-code"]) == 0
    assert "trust_code=True" in capsys.readouterr().out
    with pytest.raises(UserError, match="--trust-code"):
        galaxydist.load_predictor(tmp_path / "out")
    found = galaxydist.load_predictor(tmp_path / "out", trust_code=True)(blob_images())
    np.testing.assert_array_equal(found.logits, galaxydist.load_predictor(run, trust_code=True)(blob_images()).logits)
