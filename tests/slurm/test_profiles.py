"""On the real SLURM: a profile written from what it says, and whether our refusals are its own."""

import itertools
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from galaxydist.cli.main import main
from galaxydist.cluster.partition_check import check_partition
from galaxydist.cluster.profile import ClusterConfig, load_cluster
from galaxydist.cluster.records import JobFiles
from galaxydist.cluster.site import read_site
from galaxydist.errors import UserError
from tests.helpers.runs import quick_settings

if TYPE_CHECKING:
    from mini_cluster import MiniCluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def sbatch_takes(config: ClusterConfig) -> tuple[bool, str]:
    """Whether sbatch would take such a job, and its words."""
    options = [f"--nodes={config.nodes}", f"--ntasks-per-node={config.tasks_on_node}", f"--time={config.time_min}"]
    options += [f"--{key}={value}" for key in ("partition", "constraint") if (value := getattr(config, key))]
    if config.cpus_per_task is not None:
        options.append(f"--cpus-per-task={config.cpus_per_task}")
    if config.memory_mb is not None:
        options.append(f"--mem={config.memory_mb}M")
    if config.gpus_per_node:
        asked = f"{config.gpu_type}:{config.gpus_per_node}" if config.gpu_type else str(config.gpus_per_node)
        options.append(f"--gres=gpu:{asked}" if config.gpu_request == "gres" else f"--gpus-per-node={asked}")
    done = subprocess.run(["sbatch", "--test-only", *options, "--wrap", "true"], capture_output=True, text=True, check=False)
    return done.returncode == 0, done.stderr.strip()


@pytest.mark.usefixtures("mini_cluster")
@pytest.mark.parametrize("partition", [None, "high"])
def test_cluster_init_writes_a_profile_that_sbatch_accepts(
    partition: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["cluster", "init", "mini", *(["--partition", partition] if partition else [])]) == 0
    config = load_cluster(["cluster=mini"]).config
    assert (config.partition, config.nodes, config.gpus_per_node, config.cpus_per_task) == (partition or "low", 1, 2, 1)
    assert (config.memory, config.num_tasks, config.gpu_request) == (9.0, 2, "gpus-per-node")
    check_partition(config)
    taken, said = sbatch_takes(config)
    assert taken, said
    both = config.model_copy(update={"nodes": 2})
    assert sbatch_takes(both)[0]
    check_partition(both)


@pytest.mark.usefixtures("mini_cluster")
def test_check_partition_refuses_exactly_the_requests_that_sbatch_refuses() -> None:
    site = read_site()
    asked = [
        dict(zip(("partition", "nodes", "gpus_per_node", "gpu_request"), values, strict=True))
        for values in itertools.product(("low", "high", "nope"), (1, 2, 3), (0, 1, 2, 3), ("gres", "gpus-per-node"))
    ]
    asked += [{"cpus_per_task": cpus, "tasks_per_node": tasks} for cpus in (1, 2, 3) for tasks in (1, 2, 3)]
    asked += [{"memory": memory, "nodes": nodes} for memory in (0.0, 1.0, 9.7, 9.8, 100.0) for nodes in (1, 2)]
    answers = set()
    for values in asked:
        config = ClusterConfig.model_validate({"name": "mini", "time": 5, **values})
        taken, said = sbatch_takes(config)
        answers.add(taken)
        try:
            check_partition(config, site)
        except UserError as error:
            assert not taken, f"{values}: sbatch takes it, and we say: {error}"
        else:
            assert taken, f"{values}: sbatch says: {said}"
    assert answers == {True, False}


def test_cluster_init_without_slurmctld_exits_with_2_and_writes_no_files(
    mini_cluster: "MiniCluster", tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    mini_cluster.stop_controller()
    assert main(["cluster", "init", "mini"]) == 2
    assert "SLURM does not answer: `scontrol` failed: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_submit_with_an_unavailable_account_is_refused_before_or_by_sbatch(
    mini_cluster: "MiniCluster", blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mini_cluster.reconfigure({"AccountingStorageEnforce": "associations"})
    cluster = ["cluster=cpu", "cluster.tasks_per_node=1", "cluster.cpus_per_task=1", "cluster.memory=1"]
    words = ["submit", *quick_settings(blobs, tmp_path / "run"), *cluster, "cluster.account=nosuch"]
    assert main(words) == 2
    assert "cluster.account=nosuch: it is not one of your accounts there; you have root" in capsys.readouterr().err
    # A site that keeps its accounts to itself: sbatch has the word.
    (tmp_path / "sacctmgr").write_text("#!/bin/sh\necho 'Access/permission denied' >&2\nexit 1\n")
    (tmp_path / "sacctmgr").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified" in said
    assert "cluster.account" in said.splitlines()[-1] and "`galaxydist cluster show cpu`" in said
    assert mini_cluster.run("squeue", "--noheader") == "" and JobFiles(tmp_path / "run").jobs() == []
    mini_cluster.reconfigure({})
    assert "AccountingStorageEnforce = none" in mini_cluster.run("scontrol", "show", "config")
