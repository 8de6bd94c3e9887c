"""Sending runs: the batch script, what is refused before anything is sent, and the local executor from end to end."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from submitit.core.utils import FailedJobError

from galaxydist.cli.main import main
from galaxydist.cluster.batch_script import explain_refusal
from galaxydist.cluster.preflight import check_shared
from galaxydist.cluster.profile import ResolvedCluster, load_cluster
from galaxydist.cluster.records import JobFiles
from galaxydist.cluster.submit import JobRequest, RequestFile, script_of
from galaxydist.cluster.worker import find_interface
from galaxydist.errors import UserError
from galaxydist.paths import data_root
from tests.helpers.mini_cluster import wait_for
from tests.helpers.runs import quick_settings

REQUEST = JobRequest(("recipe=vit",), Path("/runs/vit"), Path("/recipes/vit.yaml"), "vit")


@pytest.fixture
def srun_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """submitit looks for srun before it writes a batch script; no other program of SLURM is there."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin" / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def cluster(tmp_path: Path, *lines: str) -> ResolvedCluster:
    path = tmp_path / "mine.yaml"
    path.write_text("\n".join(lines) + "\n")
    return load_cluster([f"cluster={path}"])


@pytest.mark.usefixtures("srun_alone")
def test_batch_script_requests_the_resources_and_setup_of_the_profile(tmp_path: Path) -> None:
    profile = cluster(
        tmp_path,
        "partition: gpu",
        "account: astro",
        "nodes: 2",
        "gpus_per_node: 4",
        "gpu_type: a100",
        "cpus_per_task: 8",
        "memory: 200",
        "time: 1-00:00:00",
        "signal_s: 300",
        "modules: [cuda/12.4]",
        "setup: ['ulimit -n 65536']",
        "environment: ['NCCL_DEBUG=WARN', 'MESSAGE=two words']",
        "interface: ib0",
        "extra: [mail-type=END, contiguous]",
        "srun: [cpu-bind=cores, 'container-image=my image.sqsh']",
    )
    lines = script_of([REQUEST], profile, folder=tmp_path / "run", name="vit").splitlines()
    asked = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    assert {
        "partition=gpu", "account=astro", "nodes=2", "ntasks-per-node=4", "gpus-per-node=a100:4", "cpus-per-task=8",
        "mem=204800M", "time=1440", "signal=USR2@300", "requeue", "open-mode=append", "mail-type=END", "contiguous",
        "job-name=vit",
    } <= asked  # fmt: skip
    assert not any(option.startswith(("array", "gres", "exclude", "dependency", "wckey")) for option in asked)
    order = [
        "module load cuda/12.4", "export NCCL_DEBUG=WARN", "export MESSAGE='two words'", "export GLOO_SOCKET_IFNAME=ib0",
        "export NCCL_SOCKET_IFNAME=ib0", "ulimit -n 65536", "export PYTHONPATH=", "set +e",
        "trap told_to_end TERM", "srun --unbuffered", 'wait "$srun_pid"; exit_code=$?',
    ]  # fmt: skip
    places = [next(number for number, line in enumerate(lines) if line.startswith(start)) for start in order]
    assert places == sorted(places)
    (srun,) = [line for line in lines if line.startswith("srun ")]
    assert f"export GALAXYDIST_DATA={data_root(None, os.environ).absolute()}" in lines
    assert (
        "--kill-on-bad-exit=1" in srun
        and "--export=ALL" in srun
        and "--cpus-per-task=8" in srun
        and " --cpu-bind=cores '--container-image=my image.sqsh' " in srun
        and " -P -u -m galaxydist.cluster.task " in srun
        and srun.endswith(" &")
    )
    assert lines[-1] == "exit $?" and "galaxydist.cluster.requeue" in lines[-2]


@pytest.mark.usefixtures("srun_alone")
@pytest.mark.parametrize(("policy", "option"), [("auto", "requeue"), ("resubmit", "requeue"), ("never", "no-requeue")])
def test_batch_script_allows_requeue_unless_the_policy_is_never(tmp_path: Path, policy: str, option: str) -> None:
    script = script_of([REQUEST], cluster(tmp_path, f"requeue: {policy}"), folder=tmp_path / "run", name="vit")
    assert f"\n#SBATCH --{option}\n" in script and script.count("requeue\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("srun_alone")
def test_batch_script_spells_gpus_arrays_and_containers_as_the_profile_sets(tmp_path: Path) -> None:
    for spelling, kind, option in (("gres", "v100", "gres=gpu:v100:2"), ("gres", "null", "gres=gpu:2")):
        profile = cluster(tmp_path, "gpus_per_node: 2", f"gpu_request: {spelling}", f"gpu_type: {kind}")
        assert f"#SBATCH --{option}\n" in script_of([REQUEST], profile, folder=tmp_path, name="n")
    array = script_of([REQUEST] * 5, cluster(tmp_path, "parallel: 2", "after: 7"), folder=tmp_path, name="n")
    assert "#SBATCH --dependency=afterok:7\n" in array
    # What submitit hands on to the executor that it makes for an array.
    assert array.count("galaxydist.cluster.requeue") == 2 and "trap told_to_end TERM" in array
    assert "#SBATCH --array=0-4%2\n" in array and "gres" not in array and "--gpus" not in array
    container = cluster(tmp_path, "container: apptainer exec --nv image.sif", "python: /opt/python")
    script = script_of([REQUEST], container, folder=tmp_path, name="n")
    assert " apptainer exec --nv image.sif /opt/python -P -u -m galaxydist.cluster.task" in script
    assert "\n/opt/python" not in script  # outside of the container SLURM's programs are at hand


def test_request_file_is_read_back_as_written(tmp_path: Path) -> None:
    profile = cluster(tmp_path, "time: 04:00:00", "scratch: /local", "environment: ['A=b']")
    written = RequestFile(tmp_path / "r.json", (REQUEST,), profile.config, ("cluster=mine",), tmp_path, tmp_path, "vit")
    written.write()
    assert RequestFile.read(written.path) == written
    with pytest.raises(UserError, match="file system that all nodes share"):
        RequestFile.read(tmp_path / "other.json")


def test_refused_submission_quotes_the_message_of_sbatch() -> None:
    said = "sbatch: error: invalid partition specified: gpuu\nsbatch: error: Batch job submission failed: Invalid partition name"
    with (
        pytest.raises(
            UserError, match=r"invalid partition specified: gpuu.*Invalid partition name(.|\n)*galaxydist cluster show a100"
        ),
        explain_refusal("a100"),
    ):
        raise FailedJobError(said)


@pytest.mark.usefixtures("srun_alone")
def test_run_folders_on_node_local_file_systems_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_refused(place: Path) -> bool:
        try:
            check_shared(place, "run folder", "run.root=FOLDER")
        except UserError as error:
            return "file system that all of them share" in str(error) and "run.root=FOLDER" in str(error)
        return False

    assert is_refused(Path("/tmp/runs/vit")) and is_refused(Path("/dev/shm/vit"))
    # Places and mounts of the test's own: where this clone and its temporary folders lie says nothing.
    mounts = {"/": "nfs4", str(tmp_path / "memory"): "tmpfs"}
    parts = [SimpleNamespace(mountpoint=place, fstype=kind) for place, kind in mounts.items()]
    monkeypatch.setattr("psutil.disk_partitions", lambda **_: parts)
    monkeypatch.setattr("galaxydist.cluster.preflight.LOCAL_FOLDERS", (tmp_path / "own",))
    assert is_refused(tmp_path / "own" / "run") and is_refused(tmp_path / "memory" / "run")
    assert not is_refused(tmp_path / "home" / "run")


def test_find_interface_returns_the_interface_that_reaches_another_node() -> None:
    assert find_interface(["n1"], "n1") is None
    assert find_interface(["n1", "127.0.0.1"], "n1") == "lo"
    assert find_interface(["n1", "no-such-host.invalid"], "n1") is None


@pytest.mark.usefixtures("srun_alone")
def test_submit_refuses_bad_input_before_writing_any_file(
    blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("galaxydist.cluster.preflight.LOCAL_FOLDERS", (tmp_path,))
    good = quick_settings(blobs, tmp_path / "run")
    for words, text in (
        (good, "cluster=NAME is missing"),
        ([*good, "cluster=a1000"], "did you mean a100"),
        ([*good, "cluster=cpu", "cluster.nodes=64"], "128 processes (64 nodes x 2) are more than the global batch holds"),
        ([*good, "cluster=cpu", "model.weights=nowhere.safetensors"], "model.weights=nowhere.safetensors: there is no such file"),
        ([*good, "cluster=cpu", "data.manifest=nowhere/manifest.json"], "nowhere/manifest.json"),
        ([*good, "cluster=cpu", "eval.variants=[balanced]"], "eval.variants=balanced"),
        ([*good, "cluster=cpu", "optim.rl=1"], "optim.rl: no such key"),
        ([*good, "cluster=cpu"], "run.root=FOLDER"),
    ):
        assert main(["submit", *words]) == 2, words
        assert text in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"bin"}


@pytest.mark.usefixtures("srun_alone")
@pytest.mark.parametrize("command", [["submit"], ["sweep"]])
def test_submit_and_sweep_check_runs_without_importing_heavy_libraries(command: list[str], blobs: Path, tmp_path: Path) -> None:
    nowhere = Path("/dev/shm") / tmp_path.name  # wherever temporary folders lie, it is the machine's own
    settings = quick_settings(blobs, nowhere / "run")
    if command == ["sweep"]:
        (tmp_path / "s.yaml").write_text("grid: {seed: [0, 1]}\n")
        command = [*command, str(tmp_path / "s.yaml")]
        settings = [setting for setting in settings if not setting.startswith("run.dir=")] + [f"run.root={nowhere}/runs"]
    words = [*command, *settings, "cluster=cpu", "--dry-run"]
    code = (
        f"import sys; from galaxydist.cli.main import main; main({words}); "
        "print(sorted(set(sys.modules) & {'torch', 'timm', 'accelerate', 'wandb', 'matplotlib', 'scipy', 'h5py'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # The last of all checks.
    assert "run.root=FOLDER" in done.stderr and done.stdout == "[]\n", done.stdout + done.stderr
    assert not nowhere.exists()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_submit_to_local_runs_2_processes_and_a_second_submit_reports_the_result(
    blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two processes of this machine, sent like a job; the command ends at once, and again it shows the result."""
    for name in os.environ:
        if name.startswith(("SLURM", "PYTEST")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "run"
    words = ["submit", *quick_settings(blobs, run_dir), "cluster=local", "cluster.tasks_per_node=2"]
    assert main(words) == 0
    files = JobFiles(run_dir)
    (job,) = files.jobs()
    assert f"submitted job {job.job_id} to local: 2 processes" in capsys.readouterr().out
    wait_for((run_dir / "result.json").exists, "the end of the run")
    assert json.loads((run_dir / "result.json").read_text())["step"] == 36
    for rank, log in enumerate(files.rank_logs()):
        assert f"rank {rank} of 2" in log.read_text()
    assert len(files.rank_logs()) == 2
    assert main(words) == 0
    assert "is finished" in capsys.readouterr().out and len(files.jobs()) == 1
    wait_for(lambda: not Path(f"/proc/{job.job_id}/cmdline").exists() or not Path(f"/proc/{job.job_id}/cmdline").read_bytes())
