"""``galaxydist sweep`` as a command: what it prints and asks, what it refuses, and a real sweep on this machine."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from galaxydist.cli.main import main
from galaxydist.cluster.records import JobFiles
from galaxydist.runs.folder import RunFolder

SLURM_FREE = [name for name in os.environ if name.startswith("SLURM_")]


@pytest.fixture
def sweep(blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Two runs of a few steps on the blobs."""
    for name in SLURM_FREE:
        monkeypatch.delenv(name)
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"""cluster: local
root: {tmp_path}/runs
parallel: 1
set:
  recipe: custom_cnn
  data: {{manifest: {blobs}, image_size: 32, num_streams: 8}}
  train: {{batch_size: 24, epochs: 1}}
  model.width: 4
grid:
  seed: [0, 1]
"""
    )
    yield path


def test_sweep_dry_run_lists_the_runs_and_writes_no_files(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", str(sweep), "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert [line.split()[1:] for line in shown.out.splitlines()[1:3]] == [
        ["seed=0", "new", "submit"],
        ["seed=1", "new", "submit"],
    ]
    assert "2 runs: 2 to submit (2 new)" in shown.out
    assert "no batch script: 1 at the same time" in shown.out
    assert not (tmp_path / "runs").exists()


@pytest.mark.slurm
@pytest.mark.usefixtures("mini_cluster")
def test_sweep_dry_run_on_slurm_prints_the_array_and_refuses_an_unknown_partition(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ("partition=low", "nodes=1", "tasks_per_node=1", "cpus_per_task=1", "memory=1", "parallel=1")
    assert main(["sweep", str(sweep), "cluster=cpu", *(f"cluster.{word}" for word in small), "--dry-run"]) == 0
    assert "#SBATCH --array=0-1%1" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
    assert main(["sweep", str(sweep), "cluster=cpu", "cluster.partition=nowhere", "--dry-run"]) == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "2 runs would go to local, and stdin is no terminal: add --yes, or --dry-run"),
        (["optim.lrr=1"], "optim.lrr: no such key; did you mean optim.lr? (all 2 runs)"),
        (["data.manifest=/nowhere/manifest.json"], "(all 2 runs)"),
        (["train.batch_size=100000"], "(all 2 runs)"),
        (["cluster=none_such"], "cluster=none_such: no such cluster profile"),
    ],
)
def test_sweep_refuses_bad_arguments_with_one_message_and_writes_no_files(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(["sweep", str(sweep), *arguments]) == 2
    shown = capsys.readouterr()
    assert said in shown.err and shown.err.count("galaxydist: error") == 1
    assert not (tmp_path / "runs").exists()


def test_sweep_without_a_file_lists_the_sweeps(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep"]) == 0
    assert "galaxy10.yaml" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.multiprocess
def test_local_sweep_runs_runs_once_and_reruns_only_interrupted_ones(
    sweep: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def command(*arguments: str) -> tuple[int, str]:
        try:
            code = main(["sweep", str(sweep), *arguments, "--yes"])
        except SystemExit as error:
            code = int(error.code or 0)
        shown = capfd.readouterr()
        return code, shown.out + shown.err

    # The second of the two learns at a rate that gives no number.
    text = sweep.read_text().replace("seed: [0, 1]", "optim.lr: [0.01, 1e30]").replace("epochs: 1}", "epochs: 2, clip_norm: 0}")
    sweep.write_text(text)
    code, shown = command()
    runs = [RunFolder(path) for path in sorted((tmp_path / "runs").glob("custom_cnn-*"))]
    assert code == 1 and len(runs) == 2 and "1 of 2 runs did not finish; their logs:" in shown
    (good,) = [run for run in runs if run.is_finished]
    assert shown.count("started ") == 2 and shown.count(f"finished {good.path.name}") == 1 == shown.count("finished custom_cnn-")
    assert {run.path.name for run in runs} == {line.split()[1] for line in shown.splitlines() if line.startswith("started")}
    assert json.loads((good.evaluation_dir / "test.json").read_text())["count"] == 24

    code, shown = command()  # what failed would be the same again
    assert code == 0 and "2 runs: 1 finished, 1 failed\n" in shown and "started" not in shown

    good.result_path.unlink()  # as if it had been killed before its end
    code, shown = command("train.log_every=1")
    assert code == 0 and "2 runs: 1 failed, 1 to submit (1 ended)" in shown and shown.count("started ") == 1
    assert good.is_finished and len(JobFiles(good.path).jobs()) == 2
    assert [len(JobFiles(run.path).jobs()) for run in runs if run.path != good.path] == [1]
