"""The variables of launchers: trusted only as a whole, and never stronger than the recipe."""

import inspect
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import accelerate.accelerator
import accelerate.state
import pytest
import torch
from accelerate.utils import TorchDynamoPlugin

from galaxydist import job_environment
from galaxydist.cli.train import main
from galaxydist.distributed import World, init_distributed, keep_threads
from galaxydist.errors import EveryRankError
from galaxydist.job_environment import LauncherRank, check_settings, find_rank, master_port, slurm_cores
from tests.helpers.runs import quick_settings, read_losses, run_here

TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
STEP = {"SLURM_JOB_ID": "70123", "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "2,1", "SLURM_STEP_NODELIST": "n1,n2"}
SRUN = {**STEP, "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "1"}
FIRST_TASK = {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}


def without(variables: Mapping[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in names}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, LauncherRank(0, 1, 1)),
        (TORCHRUN, LauncherRank(3, 4, 2, 1)),
        (without(TORCHRUN, "LOCAL_WORLD_SIZE"), LauncherRank(3, 4, 4, 1)),
        ({**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}, LauncherRank(0, 1, 1)),
        (SRUN, LauncherRank(2, 3, 1)),
        (TORCHRUN | FIRST_TASK, LauncherRank(3, 4, 2, 1)),  # torchrun in a task of srun
        (TORCHRUN | {**SRUN, "SLURM_PROCID": "1"}, LauncherRank(3, 4, 2, 1)),
        (FIRST_TASK, LauncherRank(0, 1, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}, LauncherRank(0, 1, 1)),  # in a batch script
        ({"RANK": "0", "WORLD_SIZE": "1"}, LauncherRank(0, 1, 1)),
        ({"MASTER_ADDR": "a", "PMI_SIZE": "1"}, LauncherRank(0, 1, 1)),
    ],
)
def test_rank_and_world_size_come_from_a_consistent_set_of_launcher_variables(
    environ: Mapping[str, str], expected: LauncherRank
) -> None:
    given = dict(environ)
    assert find_rank(given) == expected
    assert find_rank(given) == expected  # also with what was added under srun
    if environ is SRUN:
        added = {"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "n1"}
        port = given.pop("MASTER_PORT")
        assert given == {**environ, **added} and port == "23284"  # the same on all ranks
    else:
        assert given == environ


def test_rendezvous_ports_of_srun_lie_below_the_ephemeral_ports() -> None:
    """Other programs' connections have ports from 32768 on; steps and restarts of one job have ports of their own."""
    ports = set()
    for variables in ({}, {"SLURM_STEP_ID": "0"}, {"SLURM_STEP_ID": "1"}, {"SLURM_STEP_ID": "1", "SLURM_RESTART_COUNT": "2"}):
        for rank in ("0", "2"):
            environ = {**SRUN, **variables, "SLURM_PROCID": rank}
            find_rank(environ)
            ports.add(int(environ["MASTER_PORT"]))
    assert len(ports) == 4 and min(ports) >= 1024
    assert max(master_port(str(number), 0) for number in range(20_000)) < 32_768


@pytest.mark.parametrize(
    ("environ", "told", "names"),
    [
        ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK=1 WORLD_SIZE=1: LOCAL_RANK, MASTER_ADDR, MASTER_PORT are missing", 2),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2: RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are missing", 1),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0: RANK, WORLD_SIZE", 1),
        (without(TORCHRUN, "MASTER_PORT"), "MASTER_PORT is missing", 5),
        ({**TORCHRUN, "MASTER_ADDR": ""}, "MASTER_ADDR is missing", 6),
        ({**TORCHRUN, "RANK": "4"}, "RANK must be less than WORLD_SIZE", 6),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, "LOCAL_RANK must be less than LOCAL_WORLD_SIZE", 6),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "5"}, "not more than WORLD_SIZE", 6),
        ({**TORCHRUN, "RANK": "three"}, "RANK=three: it is not a number", 1),
        ({**TORCHRUN, "WORLD_SIZE": "-1"}, "WORLD_SIZE=-1: it is not a number", 1),
        ({**TORCHRUN, "MASTER_PORT": "http"}, "MASTER_PORT=http: it is not a number", 1),
        ({**TORCHRUN, "MASTER_PORT": "99999"}, "MASTER_PORT=99999: it must be a port", 1),
        ({"SLURM_PROCID": "1"}, "SLURM_PROCID=1: this is not the first task", 1),
        ({**FIRST_TASK, "SLURM_PROCID": "1"}, "SLURM_PROCID=1 SLURM_STEP_NUM_TASKS=1: this is not the first task", 2),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "SLURM_STEP_NUM_TASKS=4: SLURM_PROCID, SLURM_LOCALID, SLURM_NODEID", 1),
        ({"SLURM_STEP_NUM_TASKS": "four"}, "SLURM_STEP_NUM_TASKS=four: it is not a number", 1),
        ({**SRUN, "SLURM_PROCID": "3"}, "SLURM_PROCID must be less than SLURM_STEP_NUM_TASKS", 7),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "2(xx"}, "does not tell the tasks of this node", 7),
        ({**SRUN, "RANK": "0"}, "RANK=0: LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT are missing", 1),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2: mpirun is not supported", 1),
    ],
)
def test_inconsistent_launcher_variables_are_refused_with_one_message(
    environ: dict[str, str], told: str, names: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recipe=demo", f"run.dir={tmp_path / 'run'}"], environ) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("galaxydist: error: The launcher's variables do not fit together: ")
    assert printed.err.count("\n") == 1 and told in printed.err
    assert printed.err.count(" -u ") == names  # `env -u NAME ...` takes all of them away
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("ACCELERATE_USE_FSDP", "true", "train.strategy=fsdp"),
        ("ACCELERATE_USE_DEEPSPEED", "True", "train.strategy=fsdp"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "train.strategy=fsdp"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "1", "train.strategy=fsdp"),
        ("ACCELERATE_TORCH_DEVICE", "cuda:1", "CUDA_VISIBLE_DEVICES"),
        ("ACCELERATE_FP8_BACKEND", "TE", "train.precision"),
        ("ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE", "DATA_PARALLEL", "start the processes with torchrun"),
    ],
)
def test_settings_that_make_another_trainer_are_refused_by_name_and_value(name: str, value: str, remedy: str) -> None:
    with pytest.raises(EveryRankError) as raised:
        check_settings({name: value, "ACCELERATE_MIXED_PRECISION": "fp16"})
    assert f"{name}={value} ({remedy}" in str(raised.value)
    for harmless in ("false", "NO") if name in job_environment._REFUSED_FLAGS else ("NO",):
        check_settings({name: harmless})


def test_every_environment_variable_that_accelerate_reads_is_known() -> None:
    """If this fails after an update of Accelerate, decide whether a new variable of its constructor is the recipe's to set."""
    sources = [inspect.getsource(part) for part in (accelerate.accelerator, accelerate.state, TorchDynamoPlugin)]
    found = set(re.findall(r"(?:environ\.get|from_env)\(\s*\[?\"(\w+)\"", "".join(sources)))
    refused = job_environment._REFUSED_FLAGS.keys() | job_environment._REFUSED_VALUES.keys()
    given = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_MIXED_PRECISION"}
    placing = {
        *job_environment._NUMBERS,
        *job_environment._MPI_VARIABLES,
        "MASTER_ADDR",
        "MASTER_PORT",
        "OMP_NUM_THREADS",
        "ACCELERATE_USE_CPU",
    }
    # They change no number: where a process runs, what is checked and said, other devices, parts of what is refused.
    harmless = {"ACCELERATE_CPU_AFFINITY", "ACCELERATE_DEBUG_MODE", "FORK_LAUNCHED", "ACCELERATE_BYPASS_DEVICE_MAP"}
    harmless |= {"ACCELERATE_USE_SAGEMAKER", "ACCELERATE_DOWNCAST_BF16", "ACCELERATE_ALLOW_CP_STANDALONE", "PT_HPU_LAZY_MODE"}
    harmless |= {"FSDP_OFFLOAD_PARAMS", "FSDP_STATE_DICT_TYPE"}
    assert found - refused - given - placing - harmless == set()
    assert {"ACCELERATE_USE_FSDP", *given} <= found


def test_recipe_overrides_precision_accumulation_and_compile_of_the_launcher(
    blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def losses(name: str) -> dict[int, float]:
        settings = quick_settings(blobs, tmp_path / name, train__epochs=1, train__log_every=1, eval__every=2)
        assert run_here(settings) == 0
        return read_losses(tmp_path / name)

    plain = losses("plain")
    assert "has no effect" not in capsys.readouterr().err
    # As `accelerate launch` always sets them.
    for name, value in {"BACKEND": "NO", "MODE": "default", "USE_FULLGRAPH": "False", "USE_DYNAMIC": "False"}.items():
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", value)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert losses("launched") == plain
    assert "has no effect" not in capsys.readouterr().err
    for name, value in {"GRADIENT_ACCUMULATION_STEPS": "4", "MIXED_PRECISION": "bf16", "DYNAMO_BACKEND": "INDUCTOR"}.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_FULLGRAPH", "perhaps")
    assert losses("overruled") == plain
    said = capsys.readouterr().err
    assert "ACCELERATE_MIXED_PRECISION=bf16 has no effect: the precision is no by train.precision" in said
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 has no effect: train.batch_size" in said
    assert "ACCELERATE_DYNAMO_BACKEND=INDUCTOR has no effect: train.compile" in said


def test_environment_that_accelerate_rejects_is_refused_with_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_DEBUG_MODE", "perhaps")
    assert run_here(["recipe=demo", f"run.dir={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert "Accelerate does not start: invalid truth value perhaps" in error and "ACCELERATE_DEBUG_MODE=perhaps" in error
    assert error.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("environ", "cores"),
    [
        ({}, math.inf),
        ({"SLURM_JOB_ID": "7"}, math.inf),
        ({"SLURM_CPUS_PER_TASK": "8"}, 8),
        ({**SRUN, "SLURM_CPUS_PER_TASK": "8"}, 8),
        ({**SRUN, "SLURM_CPUS_PER_TASK": "8", "SLURM_NODEID": "0"}, 16),
        # In a batch script, where torchrun starts the processes that SLURM counts as tasks.
        ({"SLURM_CPUS_PER_TASK": "2", "SLURM_TASKS_PER_NODE": "4(x2)", "SLURM_NODEID": "0"}, 8),
        ({"SLURM_CPUS_PER_TASK": "2", "SLURM_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": "1"}, 8),
        ({"SLURM_CPUS_PER_TASK": "2", "SLURM_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": "2"}, 6),
        ({"SLURM_CPUS_PER_TASK": "2", "SLURM_TASKS_PER_NODE": "4", "SLURM_NODEID": "3"}, math.inf),
        ({"SLURM_CPUS_PER_TASK": "two"}, math.inf),
    ],
)
def test_slurm_cores_are_those_of_all_tasks_on_the_node(environ: Mapping[str, str], cores: float) -> None:
    assert slurm_cores(environ) == cores


@pytest.fixture
def many_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine of 64 cores without a limit."""
    from accelerate.state import AcceleratorState, PartialState

    before = torch.get_num_threads()
    monkeypatch.setattr("galaxydist.distributed.bound_cores", lambda: frozenset(range(64)))
    monkeypatch.setattr("galaxydist.distributed.cpu_quota", lambda: math.inf)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    yield
    torch.set_num_threads(before)
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def enter(environ: dict[str, str], threads: int = 0) -> World:
    world = init_distributed("no", environ, threads=threads)
    assert torch.get_num_threads() == world.threads
    return world


@pytest.mark.usefixtures("many_cores")
def test_threads_come_from_available_cores_slurm_or_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    assert enter({}).threads == 64
    assert enter({"SLURM_CPUS_PER_TASK": "3"}).threads == 3  # SLURM binds no cores here
    chosen = enter({"SLURM_CPUS_PER_TASK": "3"}, threads=2)
    assert (chosen.threads, chosen.cores) == (2, 2)
    monkeypatch.setattr("os.cpu_count", lambda: 128)
    assert enter({"SLURM_CPUS_PER_TASK": "3"}).threads == 64  # here it does


@pytest.mark.usefixtures("many_cores")
def test_threads_of_a_checkpoint_are_kept_for_the_same_world_size(capsys: pytest.CaptureFixture[str]) -> None:
    world = enter({})
    for stored in (None, {}, {"threads": 64, "world_size": 1}, {"threads": 2, "world_size": 8}):
        assert keep_threads(world, stored) is world
    assert capsys.readouterr().err == ""
    kept = keep_threads(world, {"threads": 2, "world_size": 1})
    assert (kept.threads, kept.cores, torch.get_num_threads()) == (2, 64, 2)  # images are decoded on all cores
    assert "computing with 2 threads, as before" in capsys.readouterr().err
