"""The files in ``containers/``: read by the parsers of their formats, and true to the tree, to the options and to each other."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dockerfile
import jsonschema
import pytest
import yaml
from docker.utils import exclude_paths
from packaging.requirements import Requirement

from galaxydist.cli.main import build_parser
from galaxydist.cluster.profile import load_cluster
from galaxydist.job_environment import job_of, restart_of
from galaxydist.recipe.resolve import load_recipe
from galaxydist.version import __version__

ROOT = Path(__file__).parents[1]
CONTAINERS = ROOT / "containers"
DEFINITIONS = ("train.def", "app.def")
# https://apptainer.org/docs/user/latest/definition_files.html
SECTIONS = {"labels", "files", "post", "environment", "runscript", "test", "help"}
# Parts of a folder that must not reach an image: large, private, or of another machine.
OUTSIDE = (
    ".git/config",
    ".env",
    ".venv/bin/python",
    "data/hdf5/x.h5",
    "runs/vit/recipe.json",
    "wandb/settings",
    "tests/x.py",
    "shared/x",
)


def stages() -> dict[str, list[Any]]:
    """Instructions of the Dockerfile by stage, without the FROM."""
    found: dict[str, list[Any]] = {"": []}
    for command in dockerfile.parse_file(str(CONTAINERS / "Dockerfile")):
        if command.cmd == "FROM":
            found[command.value[-1]] = []
        else:
            found[list(found)[-1]].append(command)
    return found


def sections(name: str) -> dict[str, str]:
    """Header (under an empty name) and sections of an Apptainer definition."""
    parts = re.split(r"^%(\w+)\n", (CONTAINERS / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
    names = parts[1::2]
    assert len(names) == len(set(names)) and set(names) <= SECTIONS
    return {"": parts[0], **dict(zip(names, parts[2::2], strict=True))}


def values(stage: list[Any], command: str) -> list[tuple[str, ...]]:
    return [instruction.value for instruction in stage if instruction.cmd == command]


def scripts(commands: list[str]) -> Iterator[list[str]]:
    """Words of each command of some shell lines."""
    for text in commands:
        for line in re.split(r"&&|\n", text.replace("\\\n", " ")):
            if words := shlex.split(line, comments=True):
                yield words


def test_the_images_of_the_dockerfile_run_as_a_user_on_what_the_builder_is_sent(tmp_path: Path) -> None:
    built = stages()
    assert list(built) == ["", "base", "train", "app"]
    for name in ("train", "app"):
        assert values(built[name], "USER") == [("1000",)] and "useradd --uid 1000" in values(built["base"], "RUN")[0][0]
    sources = {source for stage in built.values() for value in values(stage, "COPY") for source in value[:-1]} - {"."}
    for path in (*sources, "recipes/vit.yaml", "galaxydist/models/shipped/x", "slurm/clusters/a100.yaml", *OUTSIDE):
        target = tmp_path / path
        target.mkdir(parents=True, exist_ok=True) if (ROOT / path).is_dir() else target.parent.mkdir(parents=True, exist_ok=True)
        (target / "x.py" if (ROOT / path).is_dir() else target).touch()
    (tmp_path / "galaxydist" / "__pycache__").mkdir()
    (tmp_path / "galaxydist" / "__pycache__" / "x.pyc").touch()
    patterns = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    sent = exclude_paths(str(tmp_path), patterns)
    assert all((ROOT / source).exists() and source in sent for source in sources)
    assert not sent & {*OUTSIDE, "galaxydist/__pycache__/x.pyc"}
    assert {"recipes/vit.yaml", "slurm/clusters/a100.yaml"} <= sent
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    kept = {line.removeprefix("!") for line in patterns if line.startswith("!")}
    assert {*included, project["project"]["readme"], "galaxydist", "LICENSE"} <= kept, "the wheel is built from these"


def test_the_app_is_alone_with_its_port_and_says_that_it_is_well() -> None:
    app = stages()["app"]
    environment = dict(pair for value in values(app, "ENV") for pair in zip(value[::2], value[1::2], strict=True))
    assert environment["GRADIO_SERVER_NAME"] == "0.0.0.0" and environment["GRADIO_SERVER_PORT"] == "7860"
    assert values(app, "EXPOSE") == [("7860",)] and "127.0.0.1:7860" in values(app, "HEALTHCHECK")[0][-1]
    (entry,) = values(app, "ENTRYPOINT")
    assert entry[:2] == ("python", "-m") and (ROOT / "galaxydist/serving/app" / f"{entry[2].split('.')[1]}.py").is_file()
    assert ("galaxydist/serving/app", "galaxy_app") in values(app, "COPY")


@pytest.mark.parametrize("name", DEFINITIONS)
def test_apptainer_definitions_name_what_there_is(name: str) -> None:
    found = sections(name)
    header = dict(re.findall(r"^(\w+): (\S+)$", found[""], re.MULTILINE))
    (tag,) = values(stages()[""], "ARG")
    assert header == {"Bootstrap": "docker", "From": f"python:{tag[0].split('=')[1]}"}
    for line in found["files"].splitlines():
        if line.strip():
            source, target = line.split()
            assert (ROOT / source).exists() and target.startswith("/opt/galaxydist/")
    for script in ("post", "environment", "runscript", "test"):
        subprocess.run(["sh", "-n"], input=found[script], text=True, check=True)
    stage = stages()["train" if name == "train.def" else "app"]
    ours = {tuple(words) for words in scripts([found["post"].replace(" --no-cache-dir", "").replace("/opt/galaxydist/", "")])}
    theirs = {tuple(words) for words in scripts([value[0] for value in values(stage, "RUN")])}
    assert {words for words in theirs if words[0] == "pip"} == {words for words in ours if words[0] == "pip"}
    (entry,) = values(stage, "ENTRYPOINT")
    assert shlex.split(found["runscript"]) == ["exec", *entry, "$@"]


def test_requirements_of_the_images_are_pinned() -> None:
    pinned = {
        Requirement(line).name.lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    }
    installed = [words for stage in ("train", "app") for words in scripts([value[0] for value in values(stages()[stage], "RUN")])]
    (listing,) = (words for words in installed if "list_requirements.py" in words)
    command = [sys.executable, "-I", str(CONTAINERS / "list_requirements.py"), *listing[2 : listing.index(">")]]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    names = {Requirement(line).name for line in listed if line}
    assert {"torch", "onnxscript", "s3fs"} <= names
    (app,) = (words[4:] for words in installed if words[:2] == ["pip", "install"] and "gradio" in words)
    assert not {*names, *app} - pinned


def test_the_jobset_fits_its_schema_and_starts_as_many_processes_as_it_says() -> None:
    import torch.distributed.run

    *claims, jobset = yaml.safe_load_all((CONTAINERS / "jobset.yaml").read_text(encoding="utf-8"))
    schema = json.loads((ROOT / "tests/data/kubernetes/jobset_v1alpha2.json").read_text(encoding="utf-8"))
    for content in (*claims, jobset):
        jsonschema.validate(content, strict(schema[content["kind"]]))
        assert content["apiVersion"] == ("v1" if content["kind"] == "PersistentVolumeClaim" else "jobset.x-k8s.io/v1alpha2")
    (group,) = jobset["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["restartPolicy"] == "Never" and job["backoffLimit"] == 0  # the JobSet restarts all pods together

    assert container["command"] == ["torchrun"] and container["image"].endswith(f":{__version__}")
    words = [word.replace("$(JOB_COMPLETION_INDEX)", "1") for word in container["args"]]
    launcher = torch.distributed.run.get_args_parser().parse_args(words)
    assert launcher.module and launcher.training_script == "galaxydist"
    assert int(launcher.nnodes) == job["completions"] == job["parallelism"]
    assert int(launcher.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert launcher.shutdown_timeout < pod["terminationGracePeriodSeconds"]
    first = f"{jobset['metadata']['name']}-{group['name']}-0-0.{jobset['spec']['network']['subdomain']}"
    assert launcher.master_addr == first
    arguments = build_parser().parse_args(launcher.training_script_args)
    assert load_recipe(arguments.recipe).recipe.train.batch_size % (int(launcher.nnodes) * int(launcher.nproc_per_node)) == 0

    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    train = stages()["train"]
    (places,) = values(train, "VOLUME")
    claimed = {mounts[place]["persistentVolumeClaim"]["claimName"] for place in places}
    assert claimed == {claim["metadata"]["name"] for claim in claims}


def test_a_restarted_jobset_is_a_later_start_of_the_same_job() -> None:
    *_, jobset = yaml.safe_load_all((CONTAINERS / "jobset.yaml").read_text(encoding="utf-8"))
    (container,) = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    labels = {"jobset.sigs.k8s.io/jobset-uid": "0b1c", "jobset.sigs.k8s.io/restart-attempt": "2"}
    environ = {
        entry["name"]: labels[entry["valueFrom"]["fieldRef"]["fieldPath"].removeprefix("metadata.labels['").removesuffix("']")]
        for entry in container["env"]
    }
    assert (job_of(environ), restart_of(environ)) == ("0b1c", 2)


def test_the_cluster_profile_with_a_container_names_the_python_of_the_image() -> None:
    profile = load_cluster(["cluster=container"]).config
    assert profile.container is not None and profile.container.endswith("galaxydist.sif") and profile.python == "python3"
    assert "galaxydist.sif" in (CONTAINERS / "train.def").read_text(encoding="utf-8")


def strict(schema: Any) -> Any:
    """The schema with unknown keys refused, as `kubectl apply` does."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    found = {key: strict(part) for key, part in schema.items()}
    if isinstance(schema.get("properties"), Mapping) and "additionalProperties" not in schema:
        found["additionalProperties"] = False
    return found
