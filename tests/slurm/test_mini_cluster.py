"""The real SLURM that tests of clusters run on: two nodes, GPUs, accounts, preemption, deaths; and that nothing of it is left."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from config_files import ConfigFiles
from mini_cluster import MiniCluster, MiniClusterError, find_daemons, find_job_processes

from tests.helpers.mini_cluster import job_state, num_restarts, processes_left, run_batch, submit, wait_for, wait_state

MINI_CLUSTER = Path(__file__).parents[2] / "slurm" / "mini_cluster" / "mini_cluster.py"
SLEEPER = re.compile("(/usr/bin/|/bin/)?sleep 60[0-2]")
# A job that tells of each of its starts.
LONG_JOB = 'echo "start ${SLURM_RESTART_COUNT:-0}"; sleep 600'


@pytest.fixture
def short_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A temporary folder for a mini cluster, shorter than ``tmp_path``: names of sockets have a limited length."""
    folder = tmp_path_factory.mktemp("mini")
    if re.search(r"[^\w./+-]", str(folder)) or len(str(folder)) > 60:
        pytest.skip(f"a mini cluster cannot lie in {folder}: set TMPDIR")
    return folder


def mini_cluster_command(*arguments: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(MINI_CLUSTER), *map(str, arguments)]
    return subprocess.run(command, env=os.environ | environ, capture_output=True, text=True, timeout=300, check=False)


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def test_mini_cluster_start_without_slurm_programs_names_the_package_to_install(tmp_path: Path) -> None:
    done = mini_cluster_command("start", tmp_path / "mini", PATH=str(tmp_path))
    assert done.returncode == 2 and done.stdout == ""
    assert "sbatch" in done.stderr and "apt-get install --no-install-recommends slurm-wlm" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_mini_cluster_refuses_used_folders_and_unsuitable_paths(short_path: Path) -> None:
    (short_path / "used").mkdir()
    (short_path / "used" / "thesis.tex").touch()
    for name, reason in (("used", "holds something else"), ("x" * 70, "at most 70"), ("a b", "letters")):
        with pytest.raises(MiniClusterError, match=reason):
            ConfigFiles(short_path / name, ("n1",), 1, 0, {}).claim()
    assert [path.name for path in short_path.rglob("*")] == ["used", "thesis.tex"]
    with pytest.raises(MiniClusterError, match="0 nodes"):
        MiniCluster(short_path / "mini", nodes=0)
    assert mini_cluster_command("stop", short_path / "mini").returncode == 2


@pytest.mark.slurm
@pytest.mark.usefixtures("mini_cluster")
def test_a_job_of_two_nodes_runs_on_both_and_their_names_resolve() -> None:
    found = subprocess.run(
        ["srun", "-N2", "-l", "sh", "-c", "echo $SLURMD_NODENAME $(hostname) $(getent hosts n1 n2 | cut -d' ' -f1)"],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert sorted(found.stdout.splitlines()) == ["0: n1 n1 127.0.0.1 127.0.0.1", "1: n2 n2 127.0.0.1 127.0.0.1"]
    assert "n2" not in Path("/etc/hosts").read_text().split() and os.uname().nodename != "n2"


@pytest.mark.slurm
def test_mini_cluster_daemons_listen_only_on_loopback(mini_cluster: MiniCluster) -> None:
    # /proc/net/tcp: address and port in hexadecimal digits, 0A for one who listens.
    for name in ("tcp", "tcp6"):
        rows = [line.split() for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
        places = {int(row[1].split(":")[1], 16): row[1].split(":")[0] for row in rows if row[3] == "0A"}
        ours = {port: places[port] for port in mini_cluster.files.ports.values() if port in places}
        assert set(ours.values()) == ({"0100007F"} if name == "tcp" else set())
        assert len(ours) == (4 if name == "tcp" else 0)


@pytest.mark.slurm
def test_jobs_on_one_node_see_their_own_gpus(mini_cluster: MiniCluster, tmp_path: Path) -> None:
    script = "echo $CUDA_VISIBLE_DEVICES; touch $1.here; while [ ! -e $2.here ]; do sleep 0.1; done"
    jobs = [
        submit(mini_cluster, f"set -- {own} {other}; {script}", "-w", "n1", *request, folder=tmp_path)
        for own, other, request in (("a", "b", ["--gpus-per-node=1"]), ("b", "a", ["--gres=gpu:1"]))
    ]
    for job_id in jobs:
        assert wait_state(mini_cluster, job_id, "COMPLETED", "FAILED") == "COMPLETED"
    assert sorted((tmp_path / f"{job_id}.out").read_text() for job_id in jobs) == ["0\n", "1\n"]
    both = run_batch(mini_cluster, "echo ${CUDA_VISIBLE_DEVICES-none}", "--gpus-per-node=2", folder=tmp_path)
    none = run_batch(mini_cluster, "echo ${CUDA_VISIBLE_DEVICES-none}", folder=tmp_path)
    assert (both.output, none.output) == ("0,1\n", "none\n")


@pytest.mark.slurm
def test_ended_job_is_listed_by_sacct_with_state_and_exit_code(mini_cluster: MiniCluster, tmp_path: Path) -> None:
    ended = run_batch(mini_cluster, "srun -N2 -n2 sh -c 'exit 3'", "-N2", "--job-name=three", folder=tmp_path)
    assert ended.state == "FAILED"
    account = ["sacct", "-nPX", "-j", ended.job_id, "-o", "jobname,state,exitcode,nnodes,partition"]
    wait_for(lambda: "three|FAILED|3:0|2|low" in mini_cluster.run(*account), what="sacct")


@pytest.mark.slurm
def test_a_preempted_job_is_requeued_exactly_once(mini_cluster: MiniCluster, tmp_path: Path) -> None:
    low = submit(mini_cluster, LONG_JOB, "-N2", "--exclusive", folder=tmp_path)
    log = tmp_path / f"{low}.out"
    wait_for(lambda: lines_of(log) == ["start 0"])
    high = run_batch(mini_cluster, "true", "-N2", "--exclusive", "-p", "high", folder=tmp_path)
    assert high.state == "COMPLETED"
    wait_for(lambda: "start 1" in lines_of(log))
    assert [line for line in lines_of(log) if line.startswith("start")] == ["start 0", "start 1"]
    assert job_state(mini_cluster, low) == "RUNNING" and num_restarts(mini_cluster, low) == 1
    records = ["sacct", "-D", "-nPX", "-j", low, "-o", "state"]
    wait_for(lambda: mini_cluster.run(*records).split() == ["PREEMPTED", "RUNNING"], what="both records")


@pytest.mark.slurm
def test_job_of_a_killed_node_restarts_once_after_the_node_returns(mini_cluster: MiniCluster, tmp_path: Path) -> None:
    # One process without any environment and one that has left its session: they die with the node too.
    script = f"env -i sleep 601 & setsid sleep 602 & {LONG_JOB}"
    job_id = submit(mini_cluster, script, "-w", "n2", folder=tmp_path)
    wait_for(lambda: len([line for line in mini_cluster.job_processes("n2").values() if SLEEPER.fullmatch(line)]) == 3)
    assert mini_cluster.job_processes("n1") == {}
    sleepers = set(processes_left(mini_cluster))
    mini_cluster.kill_node("n2", down=True)
    assert processes_left(mini_cluster) == {} and mini_cluster.processes("n2") == {}
    assert sleepers & set(all_processes()) == set()
    wait_state(mini_cluster, job_id, "PENDING")
    mini_cluster.start_node("n2")
    wait_for(lambda: lines_of(tmp_path / f"{job_id}.out")[-1] == "start 1")
    assert num_restarts(mini_cluster, job_id) == 1


@pytest.mark.slurm
def test_jobs_outlive_their_controller(mini_cluster: MiniCluster, tmp_path: Path) -> None:
    job_id = submit(mini_cluster, LONG_JOB, folder=tmp_path)
    wait_for(lambda: lines_of(tmp_path / f"{job_id}.out") == ["start 0"])
    before = processes_left(mini_cluster)
    mini_cluster.stop_controller()
    with pytest.raises(MiniClusterError, match="Unable to contact"):
        mini_cluster.run("squeue")
    mini_cluster.start_controller()
    assert job_state(mini_cluster, job_id) == "RUNNING" and processes_left(mini_cluster) == before


@pytest.mark.slurm
def test_reconfigure_changes_and_restores_the_slurm_configuration(mini_cluster: MiniCluster) -> None:
    mini_cluster.reconfigure({"MaxArraySize": 5, "JobRequeue": 0})
    with pytest.raises(MiniClusterError, match="Invalid job array"):
        mini_cluster.run("sbatch", "--array=0-5", "--wrap=true")
    mini_cluster.reconfigure({})
    assert "MaxArraySize            = 1001" in mini_cluster.run("scontrol", "show", "config")


@pytest.fixture
def other_cluster(short_path: Path) -> Iterator[MiniCluster]:
    """A second slurm, started from the command line."""
    folder = short_path / "other"
    started = mini_cluster_command("start", folder, "--nodes", "3", "--gpus", "0")
    try:
        assert started.returncode == 0 and started.stdout == f"export SLURM_CONF={folder}/slurm.conf\n", started.stderr
        yield MiniCluster.find(folder)
    finally:
        MiniCluster(folder).stop()


@pytest.mark.slurm
def test_stopped_mini_cluster_leaves_no_process_and_only_its_logs(
    mini_cluster: MiniCluster, other_cluster: MiniCluster, tmp_path: Path
) -> None:
    folder = other_cluster.files.folder
    assert mini_cluster_command("start", folder).returncode == 2
    count = ("sinfo", "-h", "-p", "low", "-o", "%D")
    assert (mini_cluster.run(*count), other_cluster.run(*count)) == ("2\n", "3\n")
    submit(other_cluster, "env -i sleep 601 & setsid sleep 602 & srun sleep 600", "-N2", folder=tmp_path)
    wait_for(lambda: len([line for line in processes_left(other_cluster).values() if SLEEPER.fullmatch(line)]) == 4)
    shown = mini_cluster_command("status", folder)
    assert shown.returncode == 0 and "n3" in shown.stdout and "n[1-2]" in shown.stdout
    ours, theirs = set(other_cluster.processes()) | set(processes_left(other_cluster)), set(mini_cluster.processes())
    assert mini_cluster_command("stop", folder).returncode == 0
    assert ours & set(all_processes()) == set() and find_daemons(folder) == find_job_processes(folder) == {}
    assert theirs == set(mini_cluster.processes())
    assert [path.name for path in folder.iterdir()] == ["logs"]
    assert mini_cluster_command("status", folder).returncode == 2


@pytest.mark.slurm
@pytest.mark.usefixtures("mini_cluster")
def test_failed_mini_cluster_start_reports_the_daemon_error_and_leaves_only_logs(short_path: Path) -> None:
    slurm = MiniCluster(short_path / "mini", settings={"SelectType": "select/nothing"})
    with pytest.raises(MiniClusterError, match=r"(?s)slurmctld has ended.*select/nothing"):
        slurm.start()
    assert slurm.processes() == {} and [path.name for path in (short_path / "mini").iterdir()] == ["logs"]


@pytest.mark.slurm
@pytest.mark.usefixtures("mini_cluster")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_mini_cluster_start_leaves_no_process_and_only_logs(short_path: Path, sent: signal.Signals) -> None:
    folder = short_path / "mini"
    start = subprocess.Popen([sys.executable, str(MINI_CLUSTER), "start", str(folder)])
    wait_for(lambda: find_daemons(folder, "mariadbd") or find_daemons(folder, "slurmdbd"))
    time.sleep(0.2)
    start.send_signal(sent)
    assert start.wait(300) == 128 + sent
    assert find_daemons(folder) == {} and [path.name for path in folder.iterdir()] == ["logs"]


def all_processes() -> dict[int, str]:
    """Command lines of all that live on this machine."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            continue
        if line:
            found[int(folder.name)] = line
    return found
