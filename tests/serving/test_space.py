"""A Space: a folder that runs as it is, in an environment without torch and without galaxydist."""

import ast
import shutil
import subprocess
import sys
import venv
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import RepoCard
from packaging.requirements import Requirement
from PIL import Image

import galaxydist
from galaxydist.cli.main import main
from galaxydist.errors import UserError
from galaxydist.serving.app.standalone import find_folders, listening_options, names_of
from galaxydist.serving.publish import PublishOptions, publish
from galaxydist.serving.space import build_header, is_space, name_folders, write_space
from tests.helpers.blobs import BlobSurvey
from tests.helpers.page_client import PageClient
from tests.helpers.published import PublishedRun
from tests.helpers.spaces import linked_environment, plain_environment, running_space

# https://huggingface.co/docs/hub/spaces-config-reference
DOCUMENTED = {
    "title", "colorFrom", "colorTo", "sdk", "python_version", "sdk_version", "suggested_hardware", "app_file", "tags", "pinned",
}  # fmt: skip
COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
ALLOWED = {"numpy", "PIL", "onnxruntime", "gradio"}


@pytest.fixture(scope="module")
def space(published_run: PublishedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Space with the run, published for it, and with a published folder of the same title."""
    folder = tmp_path_factory.mktemp("spaces") / "space"
    arguments = ["publish", str(published_run.run_dir), str(published_run.folder), "--space", str(folder)]
    assert main([*arguments, "--name", "Galaxies: *blobs*"]) == 0
    return folder


@pytest.mark.slow
def test_a_space_has_a_header_that_the_hub_reads_and_only_files_that_it_needs(space: Path) -> None:
    assert {path.name for path in space.iterdir()} == {
        "README.md", "app.py", "requirements.txt", ".gitattributes", "galaxy_app", "models",
    }  # fmt: skip
    card = RepoCard.load(space / "README.md")
    header = card.data.to_dict()
    assert set(header) == DOCUMENTED | {"license"} and {header["colorFrom"], header["colorTo"]} <= COLOURS
    assert (header["title"], header["sdk"], header["app_file"]) == ("Galaxies: *blobs*", "gradio", "app.py")
    assert header["sdk_version"] == distribution("gradio").version
    assert header["python_version"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert card.text.lstrip().startswith(r"# Galaxies: \*blobs\*")
    attributes = (space / ".gitattributes").read_text(encoding="utf-8")
    models = sorted(path for path in (space / "models").iterdir())
    assert [path.name for path in models] == ["published", "run"]
    for model in models:
        names = {path.name for path in model.iterdir()}
        assert {"config.json", "model.onnx"} <= names and not names & {"model.safetensors", "model.pt2"}
    assert all(f"*{suffix} filter=lfs" in attributes for suffix in (".onnx", ".npz", ".jpg"))
    binary = {path.suffix for path in space.rglob("*") if path.is_file() and b"\0" in path.read_bytes()}
    assert all(f"*{suffix} filter=lfs" in attributes for suffix in binary)


@pytest.mark.slow
def test_requirements_are_what_the_modules_import(space: Path) -> None:
    imported = set()
    for path in (space / "galaxy_app").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(str(node.module).split(".")[0])
    assert imported - sys.stdlib_module_names <= ALLOWED
    required = {Requirement(line) for line in (space / "requirements.txt").read_text(encoding="utf-8").splitlines()}
    assert {requirement.name for requirement in required} == {"numpy", "onnxruntime", "pillow"}
    for requirement in required:
        assert str(requirement.specifier) == f"=={distribution(requirement.name).version.partition('+')[0]}"


@pytest.mark.slow
def test_a_space_answers_without_torch_as_the_run_does(space: Path, published_run: PublishedRun, tmp_path: Path) -> None:
    python = linked_environment(tmp_path / "environment")
    check_space(space, published_run, python, tmp_path)


@pytest.mark.nightly
def test_a_space_runs_in_an_environment_that_pip_makes_of_its_requirements(
    space: Path, published_run: PublishedRun, tmp_path: Path
) -> None:
    venv.create(tmp_path / "environment", with_pip=True)
    python = tmp_path / "environment" / "bin" / "python"
    version = RepoCard.load(space / "README.md").data.to_dict()["sdk_version"]
    command = [str(python), "-m", "pip", "install", "--quiet", f"gradio=={version}", "-r", str(space / "requirements.txt")]
    subprocess.run(command, check=True)
    check_space(space, published_run, python, tmp_path)


def check_space(space: Path, published_run: PublishedRun, python: Path, folder: Path) -> None:
    """Start a copy of a Space, ask it about test galaxies, end it: the run's answers, and nothing written."""
    copy, temporary = folder / "copy", folder / "temporary"
    shutil.copytree(space, copy)
    temporary.mkdir()
    absent = "import importlib.util as u; assert not any(map(u.find_spec, ('torch', 'timm', 'galaxydist', 'scipy')))"
    subprocess.run([str(python), "-P", "-c", absent], check=True, env=plain_environment(temporary))
    predictor = galaxydist.load_predictor(published_run.run_dir)
    images = [galaxy.image for galaxy in BlobSurvey().read(18, 21)]
    # Of the stored size, and larger ones, which are resampled.
    pictures = [Image.fromarray(image) for image in images] + [Image.fromarray(images[0]).resize((90, 70))]
    expected = predictor(pictures, resize=True)
    models = names_of(find_folders([copy / "models"]))
    assert len(set(models)) == 2
    before = tree(copy)
    with running_space(python, copy, temporary) as address:
        client = PageClient(address)
        for number, picture in enumerate(pictures):
            path = folder / f"{number}.png"
            picture.save(path)
            for model in models:
                answer = client.predict(path, model)
                assert answer["class"] == expected.predicted[number].replace("_", " ")
                found = list(answer["probabilities"].values())
                tolerance = 1e-4 if picture.size == (32, 32) else 1e-3
                np.testing.assert_allclose(found, expected.probabilities[number], atol=tolerance)
    assert tree(copy) == before and not list(temporary.iterdir())


def tree(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.slow
def test_a_space_is_not_written_over_other_files_or_of_a_folder_without_onnx(
    published_run: PublishedRun, space: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="--overwrite"):
        write_space([published_run.folder], space)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"not written by this command.*thesis\.tex"):
        write_space([published_run.folder], other, overwrite=True)
    publish(published_run.run_dir, tmp_path / "bare", {}, PublishOptions(onnx=False, program=False, reference=0))
    with pytest.raises(UserError, match=r"has no model\.onnx"):
        write_space([tmp_path / "bare"], tmp_path / "space")
    assert {path.name for path in tmp_path.iterdir()} == {"other", "bare"}
    assert main(["publish", str(published_run.run_dir)]) == 2 and "RUN DIR" in capsys.readouterr().err
    write_space([published_run.folder], tmp_path / "space")
    write_space([published_run.folder], tmp_path / "space", title="Again", overwrite=True)
    assert is_space(tmp_path / "space")
    assert RepoCard.load(tmp_path / "space" / "README.md").data.to_dict()["title"] == "Again"


def test_folders_have_unique_names_and_that_in_a_run_has_the_runs(published_run: PublishedRun, tmp_path: Path) -> None:
    run = Path(shutil.copytree(published_run.run_dir, tmp_path / "my run"))
    inside, same, other = run / "published", tmp_path / "x" / "my-run", tmp_path / "published"
    for folder in (inside, same, other):
        folder.mkdir(parents=True)
    assert name_folders([inside, same, other]) == {"my-run": inside, "my-run-2": same, "published": other}


def test_licences_of_several_models_and_addresses_of_the_page() -> None:
    licences = {"one": ["mit", "mit"], "several": ["mit", "cc-by-4.0"]}
    assert [build_header("t", "6", found)["license"] for found in licences.values()] == ["mit", "other"]
    assert yaml.safe_load(yaml.safe_dump(build_header("a: b # c", "6.0", ["mit"])))["title"] == "a: b # c"
    assert listening_options({}).host == "127.0.0.1" and listening_options({"SPACE_ID": "me/galaxies"}).host == "0.0.0.0"
    chosen = listening_options({"SPACE_ID": "me/galaxies", "GRADIO_SERVER_NAME": "::1", "GRADIO_SERVER_PORT": "80"})
    assert (chosen.host, chosen.port) == ("::1", 80)
