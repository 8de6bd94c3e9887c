"""Cluster profiles: the shipped ones, precedence and origins, and everything that can be wrong, in one message."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galaxydist.cluster.profile import (
    CLUSTERS,
    MAX_DAYS,
    ClusterConfig,
    ClusterError,
    ResolvedCluster,
    list_clusters,
    load_cluster,
    read_time_s,
    split_arguments,
)

SHIPPED = sorted((Path(__file__).parents[2] / "slurm" / "clusters").glob("*.yaml"))
FIELDS = CLUSTERS.schema.fields
MIDDLE = "time: 60\n"


def resolve(folder: Path, yaml: str, *overrides: str) -> ResolvedCluster:
    (folder / "mine.yaml").write_text(yaml)
    return load_cluster(["cluster=mine", *overrides], folders=[folder])


def problems(folder: Path, yaml: str, *overrides: str) -> list[tuple[str, str]]:
    with pytest.raises(ClusterError) as caught:
        resolve(folder, yaml, *overrides)
    return list(caught.value.problems)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_profile_loads_is_short_and_sets_only_non_default_values(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ") and len(lines) <= 20 and max(map(len, lines)) <= 130
    resolved = load_cluster([f"cluster={path}"])
    assert resolved.config.name == path.stem and resolved.path == path
    for key, origin in resolved.origins.items():
        if origin.startswith(str(path)) and key not in ("nodes", "qos"):  # which are there to be seen
            assert getattr(resolved.config, key) != FIELDS[key].default, key


def test_shipped_profiles_show_the_common_kinds_of_clusters() -> None:
    configs = [load_cluster([f"cluster={path}"]).config for path in SHIPPED]
    assert {config.scheduler for config in configs} == {"slurm", "local"}
    assert {config.gpu_request for config in configs if config.gpu_type} == {"gres", "gpus-per-node"}
    assert any(config.container and config.modules for config in configs)
    assert any(config.requeue == "resubmit" for config in configs)
    assert any(config.tasks_per_node and not config.gpus_per_node for config in configs)


def test_command_line_overrides_profile_and_every_key_has_an_origin(tmp_path: Path) -> None:
    yaml = "partition: gpu\ngpus_per_node: 4\nnodes: 3\ntime: 1-06\nmemory: 1.5\nenvironment: [A=b=c]\n"
    resolved = resolve(tmp_path, yaml, "cluster.nodes=2", "cluster.setup=[]", "cluster.time=00:05:30")
    config, origins = resolved.config, resolved.origins
    assert (config.name, config.nodes, config.num_tasks, config.tasks_on_node) == ("mine", 2, 8, 4)
    assert (config.time_s, config.time_min, config.memory_mb, config.environment) == (330, 6, 1536, ("A=b=c",))
    assert origins["nodes"] == origins["time"] == "command line"
    assert origins["partition"] == f"{tmp_path}/mine.yaml:1"
    assert (origins["account"], origins["name"]) == ("schema default", "file name")
    assert set(origins) == set(FIELDS)
    assert resolved.arguments == ("cluster=mine", "cluster.nodes=2", "cluster.setup=[]", "cluster.time=00:05:30")
    assert ClusterConfig.model_validate_json(json.dumps(config.model_dump(mode="json"))) == config


def test_all_profile_problems_come_in_one_message_with_keys_as_written(tmp_path: Path) -> None:
    yaml = "ndoes: 2\ngpus_per_node: four\npartition: a\npartition: b\ntasks_per_node: -1\n"
    here = f"{tmp_path}/mine.yaml"
    overrides = [
        "cluster.gpu_typ=a100",
        "nodes=2",
        "cluster.name=x",
        "--fast",
        "cluster.nodes=1",
        "cluster.nodes=2",
        "cluster.time=1",
    ]
    with pytest.raises(ClusterError, match="10 problems in the cluster profile:") as caught:
        resolve(tmp_path, yaml, *overrides)
    assert list(caught.value.problems) == [
        ("command line", "'--fast' is not key=value (like cluster=a100 or cluster.nodes=2)"),
        ("command line", "cluster.nodes is given twice, 1 and 2; keep one"),
        (f"{here}:4", "partition is set again here, first on line 3: keep one"),
        (f"{here}:1", "ndoes: no such key; did you mean nodes?"),
        (f"{here}:2", "gpus_per_node=four: must be a whole number"),
        (f"{here}:5", "tasks_per_node=-1: must be at least 0"),
        ("command line", "cluster.gpu_typ: no such key; did you mean cluster.gpu_type?"),
        ("command line", "nodes: no such key; did you mean cluster.nodes?"),
        ("command line", "cluster.name: a cluster profile is named by its file; copy the file under another name"),
        (
            "command line",
            "cluster.time=1: the signal to save would come 120 s before the end of a job of 60 s; raise the limit",
        ),
    ]


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (
            ["cluster.time=2", "cluster.signal_s=100"],
            "a start takes 30 s, .* 60 s earlier .*100 s before the limit of 120 s, .* 4 minutes or more, or signal_s=30 or",
        ),
        # Less than the least signal_s would be needed: the limit alone can help.
        (["cluster.time=1", "cluster.signal_s=10"], "before the limit of 60 s, .* set 2 minutes or more$"),
        (["cluster.time=00:02:00"], "signal to save would come 120 s before the end of a job of 120 s"),
        (["cluster.signal_s=9"], "must be at least 10"),
        (["cluster.scheduler=local", "cluster.nodes=2"], "one local machine"),
        (["cluster.scheduler=local", "cluster.partition=gpu"], "local runs do not use it"),
        (["cluster.scheduler=local", "cluster.extra=[exclusive]"], "local runs do not use it"),
        (["cluster.gpu_type=a100"], "set gpus_per_node too"),
        (["cluster.gpu_type=gpu:a100", "cluster.gpus_per_node=1"], "only the type"),
        (["cluster.gpu_type=a100_1g.5gb", "cluster.gpus_per_node=7"], "MIG slices, .* set gpus_per_node=1"),
        (["cluster.gpus_per_node=2", "cluster.tasks_per_node=3"], "cannot share a GPU"),
        (["cluster.gpus_per_node=4", "cluster.tasks_per_node=1"], "3 a node would stay idle; request 1"),
        (["cluster.cpus_per_task=0"], "at least 1"),
        (["cluster.memory=-1"], "at least 0"),
        (["cluster.environment=[A B=1]"], "'A B=1' is not NAME=VALUE"),
        (["cluster.environment=[=1]"], "is not NAME=VALUE"),
        (["cluster.environment=[A=1,A=2]"], "A is given twice"),
        (
            ["cluster.environment=[TORCH_HOME=$SCRATCH/x]"],
            r"expands its .; write a line of setup instead: export TORCH_HOME=\$SCRATCH/x",
        ),
        (["cluster.environment=[MASTER_ADDR=n1]"], "set for each process"),
        (["cluster.environment=[SLURM_CONF=x]"], "set for each process"),
        (["cluster.environment=[NCCL_SOCKET_IFNAME=ib0]", "cluster.interface=ib0"], "set the same"),
        (["cluster.extra=[--exclusive]"], "without dashes, exclusive"),
        (["cluster.extra=[time=3]"], "time has its own key: time"),
        (["cluster.extra=[ntasks=3]"], "ntasks has its own key: tasks_per_node"),
        (["cluster.extra=[output=x]"], "output is set by galaxydist"),
        (["cluster.extra=[Mail=x]"], "not an option of sbatch"),
        (["cluster.extra=[exclusive,exclusive]"], "given twice"),
        (["cluster.srun=[--mpi=pmix]"], "without dashes, mpi=pmix"),
        (["cluster.srun=[cpus-per-task=3]"], "cpus-per-task has its own key: cpus_per_task"),
        (["cluster.srun=[kill-on-bad-exit=0]"], "kill-on-bad-exit is set by galaxydist"),
        (["cluster.after=my-job"], "must be the id of a job"),
        (["cluster.extra=[gres=ssd:1]", "cluster.gpu_request=gres", "cluster.gpus_per_node=1"], "replace the gres of the GPUs"),
        (["cluster.comment=two\nlines"], "must be one line"),
        (["cluster.partition="], "must not be empty"),
        (["cluster.modules=[cuda 12]"], "is not one module"),
        (["cluster.container=apptainer exec 'x"], "a shell cannot read it"),
        (["cluster.scratch=tmp"], "must be an absolute path"),
        (["cluster.scheduler=pbs"], "one of slurm, local"),
        (["cluster.requeue=always"], "one of auto, resubmit, never"),
    ],
)
def test_invalid_profile_value_is_refused_with_exactly_one_problem(tmp_path: Path, overrides: list[str], text: str) -> None:
    with pytest.raises(ClusterError, match=text) as caught:
        resolve(tmp_path, MIDDLE, *overrides)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    "override",
    [
        "cluster.time=2",  # with signal_s=30, the least that leaves time for a step
        "cluster.srun=[cpu-bind=cores,container-image=a b.sqsh,overlap]",
        "cluster.after=123_4",
        "cluster.after=afterany:123:124",
        "cluster.extra=[mail-type=END,exclusive]",
        "cluster.extra=[gres=ssd:1]",
        "cluster.scratch=$TMPDIR",
        "cluster.environment=[EMPTY=,PATH=a:b]",
        "cluster.memory=0",
        "cluster.partition=a,b",
        "cluster.constraint=a100&ib",
    ],
)
def test_unusual_but_valid_profile_values_are_accepted(tmp_path: Path, override: str) -> None:
    key = override.partition("=")[0].removeprefix("cluster.")
    assert resolve(tmp_path, "signal_s: 30\n", override).origins[key] == "command line"


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        (90, 5400),
        ("90", 5400),
        ("04:00:00", 14_400),
        ("4:00:00", 14_400),
        ("100:30:05", 361_805),
        ("2-00", 172_800),
        ("2-3", 183_600),
        ("1-02:03", 93_780),
        ("0-00:01:00", 60),
        ("1-02:03:04", 93_784),
    ],
)
def test_time_limit_formats_are_parsed_as_slurm_does(time: int | str, seconds: int) -> None:
    assert read_time_s(time) == seconds


@pytest.mark.parametrize(
    "time", [0, -5, "4:00", "1:2:3", "00:00:00", "24h", "UNLIMITED", "1-24", "1-00:60", "00:61:00", "", "366-00", "٣"]
)
def test_ambiguous_or_invalid_time_limit_is_refused(tmp_path: Path, time: int | str) -> None:
    (problem,) = problems(tmp_path, f"time: {json.dumps(time)}\n")
    assert problem[0] == f"{tmp_path}/mine.yaml:1" and problem[1].startswith(f"time={time}: ")


@given(st.integers(1, MAX_DAYS * 86_400))
def test_time_limit_in_seconds_survives_formatting_and_parsing(seconds: int) -> None:
    hours, minutes, rest = seconds // 3600, seconds // 60 % 60, seconds % 60
    assert read_time_s(f"{hours:02}:{minutes:02}:{rest:02}") == seconds
    assert read_time_s(f"{hours // 24}-{hours % 24:02}:{minutes:02}:{rest:02}") == seconds
    assert ClusterConfig(name="x", time=f"{hours:02}:{minutes:02}:{rest:02}").time_min == (seconds + 59) // 60


def test_yaml_problems_of_a_profile_name_file_line_and_profile(tmp_path: Path) -> None:
    assert problems(tmp_path, "- nodes\n") == [
        (f"{tmp_path}/mine.yaml:1", "must be a mapping of keys to values, like 'nodes: 2'")
    ]
    ((_, text),) = problems(tmp_path, "partition: &p a\nqos: *p\n")
    assert "aliases (*name) are not used in cluster profiles" in text
    ((_, text),) = problems(tmp_path, "partition: !!python/name:os.system x\n")
    assert "is not used in cluster profiles" in text
    ((origin, text),) = problems(tmp_path, "name: other\n")
    assert (origin, text) == (f"{tmp_path}/mine.yaml:1", "name: a cluster profile is named by its file (mine); take the line out")


def test_unknown_or_missing_profile_is_refused_with_the_list_of_profiles(tmp_path: Path) -> None:
    for name in ("a100", "cpu"):
        (tmp_path / f"{name}.yaml").write_text(MIDDLE)
    listed = "cluster profiles: a100, cpu; or cluster=FILE.yaml"
    for arguments, text in (
        (["cluster=a10"], f"cluster=a10: no such cluster profile; did you mean a100? ({listed})"),
        (["cluster=here/a100.yaml"], f"cluster=here/a100.yaml: there is no such file; {listed}"),
        ([], f"cluster=NAME is missing; {listed}"),
    ):
        with pytest.raises(ClusterError) as caught:
            load_cluster(arguments, folders=[tmp_path])
        assert caught.value.problems == (("command line", text),)


def test_profile_of_the_working_directory_overrides_the_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_cluster(["cluster=a100"]).config.nodes == 1
    own = tmp_path / "slurm" / "clusters"
    own.mkdir(parents=True)
    (own / "a100.yaml").write_text("nodes: 7\n")
    assert load_cluster(["cluster=a100"]).config.nodes == 7
    found = list_clusters()
    assert found["a100"] == Path("slurm/clusters/a100.yaml") and set(found) == {path.stem for path in SHIPPED}


def test_split_arguments_separates_recipe_and_cluster_arguments() -> None:
    arguments = ["recipe=vit", "cluster.nodes=2", "optim.lr=1", "cluster=a100", "clusters=1", "cluster", "cluster.x"]
    assert split_arguments(arguments) == (
        ["recipe=vit", "optim.lr=1", "clusters=1"],
        ["cluster.nodes=2", "cluster=a100", "cluster", "cluster.x"],
    )


@given(st.lists(st.text(max_size=20) | st.sampled_from(["cluster=a", "cluster.nodes=1", "lr=1"]), max_size=5))
def test_split_arguments_keeps_every_argument_in_order(arguments: list[str]) -> None:
    recipe, cluster = split_arguments(arguments)
    assert sorted(recipe + cluster) == sorted(arguments)
    assert [argument for argument in arguments if argument in cluster] == cluster


@given(
    key=st.sampled_from(sorted(set(FIELDS) - {"name"})),
    text=st.text(max_size=20) | st.sampled_from(["1", "0.5", "1-00", "[a]", "[A=b]", "local"]),
)
def test_any_profile_value_is_accepted_or_refused_with_its_key(
    tmp_path_factory: pytest.TempPathFactory, key: str, text: str
) -> None:
    folder = tmp_path_factory.getbasetemp()
    try:
        resolved = resolve(folder, MIDDLE, f"cluster.{key}={text}")
    except ClusterError as error:
        assert key in str(error)
    else:
        assert resolved.origins[key] == "command line"
        config = resolved.config
        assert ClusterConfig.model_validate_json(json.dumps(config.model_dump(mode="json"))) == config
        assert config.num_tasks >= 1 and config.time_min >= 1
