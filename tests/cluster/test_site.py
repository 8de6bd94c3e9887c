"""What SLURM says of a cluster, read from records of real ones; profiles written from it; profiles held against it.

``tests/data/slurm_records/`` holds outputs of SLURM 22.05.8. ``typed``: types of GPUs, accounts and qos that are enforced,
preemption, a closed and a restricted partition. ``plain``: select/linear, GPUs without types, no accounting, no default
partition, a hidden partition.
"""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galaxydist.cluster.partition_check import check_partition, time_text
from galaxydist.cluster.profile import ClusterConfig, ResolvedCluster, load_cluster
from galaxydist.cluster.profile_init import profile_text
from galaxydist.cluster.site import (
    COMMANDS,
    Association,
    NodeGroup,
    Partition,
    Preemption,
    Qos,
    Site,
    find_preemption,
    parse_gpus,
    parse_site,
)
from galaxydist.cluster.slurm import parse_duration
from galaxydist.errors import UserError

RECORDS = Path(__file__).parents[1] / "data" / "slurm_records"
WORD = st.text(alphabet="abcXYZ019_-.", min_size=1, max_size=8) | st.sampled_from(
    ["null", "true", "012", "1e3", "~", ".inf", "-"]
)


def recorded(kind: str) -> Site:
    return parse_site({path.stem: path.read_text() for path in (RECORDS / kind).glob("*.txt")})


def loaded(text: str, folder: Path, *overrides: str) -> ResolvedCluster:
    (folder / "mine.yaml").write_text(text)
    return load_cluster(["cluster=mine", *overrides], folders=[folder])


def refusal(site: Site, **asked: object) -> str:
    with pytest.raises(UserError) as caught:
        check_partition(ClusterConfig.model_validate({"name": "mine", "time": 30, **asked}), site)
    return str(caught.value)


def takes(site: Site, **asked: object) -> None:
    """Raises where it does not."""
    check_partition(ClusterConfig.model_validate({"name": "mine", "time": 30, **asked}), site)


def test_parse_site_reads_gpu_types_accounts_qos_and_preemption() -> None:
    site = recorded("typed")
    assert (site.name, site.default_account, list(site.partitions)) == (
        "profbed",
        "root",
        ["cpu", "gpu", "debug", "closed", "private"],
    )
    gpu, debug, private = site.partitions["gpu"], site.partitions["debug"], site.partitions["private"]
    assert gpu.nodes == (
        NodeGroup(2, 128, 1_000_000, {"a100": 4}, ("rome", "ib")),
        NodeGroup(1, 32, 120_000, {"v100": 2, "t4": 1}, ("old",)),
    )
    assert (gpu.max_time_s, gpu.max_nodes, gpu.preempt_mode, gpu.grace_s, gpu.num_gpus) == (172_800, 2, "REQUEUE", 120, 11)
    assert (debug.max_time_s, debug.max_memory_mb, debug.preempt_mode, debug.default) == (1800, 64_000, "OFF", False)
    assert (private.allow_accounts, private.allow_qos, private.max_time_s) == (("astro",), ("long",), None)
    assert site.partitions["closed"].state == "INACTIVE" and site.default_partition is site.partitions["cpu"]
    assert site.associations == (
        Association("phys", None, ("short",), "short"),
        Association("astro", None, ("long", "normal", "short"), None),
        Association("root", None, ("normal",), None),
    )
    assert site.qos["long"] == Qos("long", 604_800, ("PartitionTimeLimit",), grace_s=0) and site.qos["normal"].max_time_s is None
    assert site.enforces("associations") and site.enforces("limits") and site.enforces("qos")


def test_parse_site_reads_a_cluster_without_gpu_types_or_accounting() -> None:
    site = recorded("plain")
    assert (site.name, site.default_account, site.associations, dict(site.qos)) == ("plain", None, (), {})
    assert site.default_partition is None and not site.enforces("associations")
    assert site.partitions["batch"].nodes == (NodeGroup(4, 24, 96_000, {"": 2}), NodeGroup(1, 48, 386_000))
    assert (site.partitions["short"].max_cpus_per_node, site.partitions["short"].state) == (12, "DRAIN")
    assert site.partitions["secret"].hidden and site.partitions["batch"].preempt_mode == "OFF"


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("(null)", {}),
        ("", {}),
        ("gpu:4", {"": 4}),
        ("gpu:a100:4(S:0-1)", {"a100": 4}),
        ("gpu:4(S:0,3)", {"": 4}),
        ("gpu:nvidia_a100-sxm4-80gb:8(S:0-7),nvme:1", {"nvidia_a100-sxm4-80gb": 8}),
        ("craynetwork:4,gpu:gh200:4", {"gh200": 4}),
        ("gpu:a100_1g.5gb:7,gpu:a100:1", {"a100_1g.5gb": 7, "a100": 1}),
        ("gpu:1080:2", {"1080": 2}),
        ("gpu:no_consume:tesla:2", {"tesla": 2}),
        ("gpu:tesla", {"tesla": 1}),
        ("gpu", {"": 1}),
        ("gpu:a100:2(S:0),gpu:a100:2(S:1)", {"a100": 4}),
        ("shard:16,mps:400", {}),
    ],
)
def test_parse_gpus_reads_all_spellings_of_gres(gres: str, gpus: dict[str, int]) -> None:
    assert parse_gpus(gres) == gpus


def test_parse_site_groups_equal_nodes_and_ignores_malformed_lines() -> None:
    nodes = "p|2|64|9000|gpu:2|a,b\np|1|64|9000|gpu:2(S:0)|a,b\np|1|64|9000|gpu:2|c\nq|1|8+|500+|(null)|(null)\nnonsense\n"
    site = parse_site({"partitions": "PartitionName=p MaxTime=30:00\nPartitionName=q\nNo partitions\n", "nodes": nodes})
    assert site.partitions["p"].nodes == (NodeGroup(3, 64, 9000, {"": 2}, ("a", "b")), NodeGroup(1, 64, 9000, {"": 2}, ("c",)))
    assert site.partitions["q"].nodes == (NodeGroup(1, 8, 500),) and site.partitions["p"].max_time_s == 1800


@given(st.integers(1, 400 * 86_400))
def test_slurm_time_survives_formatting_and_parsing(seconds: int) -> None:
    assert parse_duration(time_text(seconds)) == seconds


RECORDED_LINES = {name: (RECORDS / "typed" / f"{name}.txt").read_text().splitlines() for name in COMMANDS}


@given(
    st.fixed_dictionaries(
        {},
        optional={
            name: st.lists(st.sampled_from(lines) | st.text(max_size=40), max_size=5) for name, lines in RECORDED_LINES.items()
        },
    )
)
def test_parse_site_accepts_arbitrary_text_without_error(outputs: dict[str, list[str]]) -> None:
    """Recorded lines are understood among lines of any text."""
    site = parse_site({name: "\n".join(lines) for name, lines in outputs.items()})
    understood = {
        name: [line for line in lines if line in RECORDED_LINES[name] and line.strip()] for name, lines in outputs.items()
    }
    assert {line.split()[0].removeprefix("PartitionName=") for line in understood.get("partitions", [])} <= site.partitions.keys()
    for name, _, cpus, *_ in (line.split("|") for line in understood.get("nodes", [])):
        if name in site.partitions:
            assert int(cpus) in {group.cpus for group in site.partitions[name].nodes}
    assert {line.split("|")[0] for line in understood.get("qos", [])} <= site.qos.keys()
    if not site.partitions:
        takes(site, partition="any")


def test_parse_site_ignores_associations_of_other_clusters() -> None:
    text = "ours|a|a||normal|\ntheirs|b|b||normal|\nours|a|c|gpu|long|long\nours|a||||\n"
    site = parse_site({"config": "ClusterName = ours\nAccountingStorageEnforce = safe\n", "associations": text})
    assert site.default_account == "a" and site.accounts() == ("a", "c") and site.accounts("cpu") == ("a",)
    assert site.association("c", "gpu") is not None and site.association("c", "cpu") is None
    assert site.enforces("associations") and site.enforces("limits") and not site.enforces("qos")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"gpus_per_node": 5}, "gpus_per_node=5: its nodes have at most 4"),
        ({"gpus_per_node": 3, "gpu_type": "v100"}, "gpus_per_node=3: its nodes have at most 2 of type v100"),
        ({"gpus_per_node": 1, "gpu_type": "h100"}, "gpu_type=h100: its nodes have a100, t4, v100"),
        ({"gpus_per_node": 4, "gpu_type": "a100", "nodes": 3}, "nodes=3: a job may have at most 2 there"),
        ({"gpus_per_node": 2, "gpu_type": "v100", "nodes": 2}, "nodes=2: it has 1 that meet all other requests"),
        (
            {"gpus_per_node": 4, "cpus_per_task": 33},
            "cpus_per_task=33: 4 processes need 132 CPUs of a node, and a job can have at most 128",
        ),
        ({"memory": 977.0}, "memory=977: a job can have at most 976.6 GB of a node there"),
        ({"gpus_per_node": 1, "constraint": "fast"}, "constraint=fast: its nodes have ib, old, rome"),
        ({"time": 2881}, "time=2881: its limit is 2-00:00:00"),
        ({"account": "none"}, "account=none: it is not one of your accounts there; you have phys, astro, root"),
        ({"account": "astro", "qos": "other"}, "qos=other: there is no such qos; there are normal, long, short"),
        ({"qos": "long"}, "qos=long: account root has normal"),
        ({"account": "phys", "time": 61}, "time=61: the limit of qos short is 01:00:00"),
        ({"partition": "closed"}, "it accepts no jobs now (INACTIVE)"),
        ({"partition": "private"}, "account=root: this partition is for astro"),
        ({"partition": "private", "account": "astro"}, "qos=null, which means normal for you: this partition accepts long"),
        ({"partition": "debug", "memory": 0.0}, "memory=0: a job can have at most 62.5 GB"),
        ({"partition": "cpu", "gpus_per_node": 1}, "gpus_per_node=1: its nodes have none"),
        ({"partition": "nope"}, "profbed has no partition nope; it has cpu, gpu, debug, closed, private"),
    ],
)
def test_check_partition_refuses_requests_beyond_the_partition_and_lists_limits(asked: dict[str, object], said: str) -> None:
    """Each was refused by the recorded cluster's own sbatch, or waited for ever (time beyond the qos)."""
    text = refusal(recorded("typed"), **{"partition": "gpu"} | asked)
    assert said in text
    if "has no partition" not in text:
        assert len(text.splitlines()) == (4 if "account=root" in said else 3) and text.splitlines()[-1].startswith("It has ")


@pytest.mark.parametrize(
    ("asked", "beyond"),
    [
        (
            {"partition": "gpu", "gpus_per_node": 4, "nodes": 2, "cpus_per_task": 32, "memory": 976.0, "time": 2880},
            {"memory": 977.0},
        ),
        ({"partition": "gpu", "gpus_per_node": 2, "gpu_type": "v100"}, {"gpus_per_node": 3}),
        ({"partition": "gpu", "gpus_per_node": 3, "nodes": 2}, {"nodes": 3}),
        ({"partition": "gpu", "account": "astro", "qos": "long", "time": 7 * 1440}, {"time": 7 * 1440 + 1}),
        ({"partition": "private", "account": "astro", "qos": "long"}, {"qos": "normal"}),
        ({"partition": "gpu", "constraint": "rome&ib"}, {"constraint": "fast"}),
        ({"partition": "cpu,gpu", "gpus_per_node": 4}, {"gpus_per_node": 5}),
        ({"memory": 0.0}, {"memory": 1000.0}),
        ({}, {"gpus_per_node": 1}),
        ({"scheduler": "local", "gpus_per_node": 99}, {"scheduler": "slurm"}),
    ],
)
def test_check_partition_accepts_requests_within_the_partition(asked: dict[str, object], beyond: dict[str, object]) -> None:
    """A request is accepted up to its limits, and refused with one change beyond them."""
    site = recorded("typed")
    takes(site, **asked)
    assert refusal(site, **asked | beyond).startswith("Partition ")


def test_check_partition_lists_all_problems_for_each_partition() -> None:
    text = refusal(recorded("typed"), partition="cpu,gpu", gpus_per_node=8, time=20_000)
    assert text.splitlines() == [
        "Partition cpu cannot run what cluster=mine requests:",
        "  cluster.time=20000: its limit is 7-00:00:00",
        "  cluster.gpus_per_node=8: its nodes have none",
        "It has 3 nodes with no GPUs, 64 CPUs and 244 GB.",
        "Partition gpu cannot run what cluster=mine requests:",
        "  cluster.time=20000: its limit is 2-00:00:00",
        "  cluster.gpus_per_node=8: its nodes have at most 4",
        "It has 2 nodes with 4 a100, 128 CPUs and 976 GB; 1 node with 2 v100 and 1 t4, 32 CPUs and 117 GB.",
    ]


def test_check_partition_skips_gpu_types_and_accounts_that_slurm_does_not_list() -> None:
    site = recorded("plain")
    takes(site, partition="batch", account="any", qos="any", gpus_per_node=2, gpu_type="a100", constraint="any")
    takes(site, partition="secret")
    assert "plain has no default partition; set cluster.partition, one of batch, short" in refusal(site)
    assert "need 13 CPUs of a node, and a job can have at most 12 there" in refusal(site, partition="short", cpus_per_task=13)
    takes(Site({}, {}), partition="any")
    takes(Site({}, {"p": Partition("p")}), partition="p", gpus_per_node=8)


@pytest.mark.parametrize(
    ("partition", "first", "rest"),
    [
        (None, "partition: gpu", "gpus_per_node: 4|gpu_type: a100|cpus_per_task: 32|memory: 927|time: 1-00:00:00"),
        ("cpu", "partition: cpu", "tasks_per_node: 1|cpus_per_task: 64|memory: 231|time: 1-00:00:00"),
        (
            "private",
            "partition: private|account: astro|qos: long",
            "gpus_per_node: 4|cpus_per_task: 32|memory: 927|time: 1-00:00:00",
        ),
        ("debug", "partition: debug", "gpus_per_node: 4|gpu_type: a100|cpus_per_task: 32|memory: 59|time: 00:30:00"),
    ],
)
def test_profile_text_of_a_typed_partition_has_its_values_and_passes_the_check(
    tmp_path: Path, partition: str | None, first: str, rest: str
) -> None:
    site = recorded("typed")
    text = profile_text(site, "mine", partition)
    assert [line.partition("#")[0].strip() for line in text.splitlines() if not line.startswith("#")] == [
        *first.split("|"),
        "nodes: 1",
        *rest.split("|"),
    ]
    check_partition(loaded(text, tmp_path).config, site)
    assert "# gpu        1      2 v100 and 1 t4  32    117 GB  2-00:00:00" in text.splitlines()


def test_profile_text_comments_list_accounts_limits_gpus_and_preemption() -> None:
    text = profile_text(recorded("typed"), "mine")
    for said in (
        "# Partition gpu of profbed, as SLURM 22.05.8 describes it.",
        "# account: root                 # your default; yours: phys, astro, root",
        "# a job can have up to 2",
        "# there are a100, t4, v100",
        "# features of its nodes: ib, old, rome",
        "# Jobs of this partition are not preempted.",  # none has a higher tier
    ):
        assert said in text
    cpu = profile_text(recorded("typed"), "mine", "cpu")
    assert "# Preemption (partition_prio): REQUEUE, with 0 s between the signal and the end." in cpu
    assert "too short for a save" not in text and "too short for a save" in profile_text(recorded("typed"), "mine", "cpu")
    assert "it accepts no jobs now (INACTIVE)" in profile_text(recorded("typed"), "mine", "closed")
    assert "# qos: normal                   # yours: normal\n" in text


def test_profile_text_of_a_cluster_without_accounting_loads_and_passes_the_check(tmp_path: Path) -> None:
    site = recorded("plain")
    text = profile_text(site, "mine")
    config = loaded(text, tmp_path).config
    assert (config.partition, config.gpus_per_node, config.gpu_request, config.gpu_type) == ("batch", 2, "gres", None)
    check_partition(config, site)
    assert "secret" not in text and "account" not in text and "Jobs of this partition are not preempted." in text
    with pytest.raises(UserError, match="the partition allows 00:01:00: too short for training"):
        profile_text(site, "mine", "short")


@pytest.mark.parametrize(
    ("gres", "lines"),
    [
        ("gpu:1g.10gb:7", ["gpus_per_node: 1", "cpus_per_task: 9", "memory: 8"]),
        ("gpu:a100_1g.5gb:7,gpu:a100:1", ["gpus_per_node: 1", "gpu_type: a100", "cpus_per_task: 8", "memory: 7"]),
    ],
)
def test_profile_text_of_a_mig_partition_requests_one_gpu(tmp_path: Path, gres: str, lines: list[str]) -> None:
    site = parse_site(
        {
            "config": "SelectType = select/cons_tres\n",
            "partitions": "PartitionName=mig MaxTime=1:00:00 State=UP\n",
            "nodes": f"mig|2|64|64000|{gres}|\n",
        }
    )
    text = profile_text(site, "mine")
    assert [line for line in lines if f"\n{line} " in text] == lines
    assert ("MIG slices, of which CUDA shows a process only one" in text) == ("gpu:a100:1" not in gres)
    check_partition(loaded(text, tmp_path).config, site)


def test_profile_text_prefers_whole_gpus_to_mig_slices() -> None:
    nodes = "p|9|64|64000|gpu:1g.10gb:7|\np|1|32|64000|gpu:a100:4|\n"
    site = parse_site({"partitions": "PartitionName=p State=UP\n", "nodes": nodes})
    text = profile_text(site, "mine")
    assert "\ngpus_per_node: 4 " in text and "\ngpu_type: a100 " in text


def test_profile_text_of_an_unusable_partition_is_refused_or_carries_a_warning() -> None:
    site = recorded("typed")
    with pytest.raises(UserError, match="--partition nope: profbed has no such partition; it has cpu, gpu"):
        profile_text(site, "mine", "nope")
    with pytest.raises(UserError, match="has no partition that you could use"):
        profile_text(Site(site.settings, {}), "mine")
    with pytest.raises(UserError, match="has no nodes; choose another"):
        profile_text(Site(site.settings, {"p": Partition("p")}), "mine", "p")
    stranger = Site(site.settings, site.partitions, "root", site.associations[2:])
    assert "no account of yours may use this partition; it is for astro" in profile_text(stranger, "mine", "private")


def test_partitions_closed_to_the_user_are_not_chosen_and_are_refused() -> None:
    line = "PartitionName={} MaxTime=UNLIMITED State=UP AllowGroups={} RootOnly={}"
    partitions = [("mine", "ada,physics", "NO"), ("lab", "astro,staff", "NO"), ("portal", "ALL", "YES")]
    record = {
        "config": "ClusterName = c\nSlurmUser = slurm(64030)\n",
        "partitions": "\n".join(line.format(*partition) for partition in partitions),
        "nodes": "mine|1|8|64000|gpu:1|\nlab|1|8|64000|gpu:8|\nportal|1|8|64000|gpu:4|\n",
    }
    known = parse_site(record)
    ada = replace(known, user="ada", groups=("physics", "users"))
    assert "\npartition: mine\n" in profile_text(ada, "x")
    takes(ada, partition="mine", gpus_per_node=1)
    said = refusal(ada, partition="lab", gpus_per_node=1)
    assert "partition=lab: it is for the groups astro, staff, and you are in physics, users" in said
    assert "partition=portal: only root may submit there (RootOnly=YES)" in refusal(ada, partition="portal")
    assert "# it is for the groups astro, staff, and you are" in profile_text(ada, "x", "lab")
    # SLURM keeps neither root nor its own user out; what is not known is left to sbatch.
    for user, groups in (("root", ("root",)), ("slurm", ("slurm",)), ("", None)):
        other = replace(known, user=user, groups=groups)
        takes(other, partition="lab")
        takes(other, partition="portal")
        assert "\npartition: lab\n" in profile_text(other, "x")
    takes(replace(known, user="1234", groups=None), partition="lab")


@pytest.mark.parametrize(
    ("settings", "options", "qos", "found"),
    [
        ("PreemptType = preempt/none", "GraceTime=60 PreemptMode=OFF", "", None),
        ("", "GraceTime=60 PreemptMode=OFF", "", None),
        ("", "GraceTime=60 PreemptMode=REQUEUE", "", Preemption("partition_prio", "REQUEUE", 60, "SIGTERM")),
        (
            "SlurmctldParameters = preempt_send_user_signal,x",
            "PreemptMode=GANG,SUSPEND",
            "",
            Preemption("partition_prio", "SUSPEND", 0, "SIGUSR2"),
        ),
        # None is before the others.
        ("", "GraceTime=60 PreemptMode=REQUEUE PriorityTier=10", "", None),
        # As sacctmgr 22.05.8 prints them: a qos that may be preempted by another, and that other one.
        (
            "PreemptType = preempt/qos",
            "GraceTime=60 PreemptMode=REQUEUE",
            "normal|||00:01:15|cancel|\nurgent|||00:00:00|cluster|normal\n",
            Preemption("qos", "CANCEL", 75, "SIGTERM"),
        ),
        (
            "PreemptType = preempt/qos\nPreemptMode = REQUEUE",
            "",
            "normal|||00:00:00|cluster|\nurgent|||00:00:00|cluster|normal\n",
            Preemption("qos", "REQUEUE", 0, "SIGTERM"),
        ),
        ("PreemptType = preempt/qos\nPreemptMode = REQUEUE", "", "normal|||00:00:00|cluster|\n", None),
        ("PreemptType = preempt/qos\nPreemptMode = REQUEUE", "", "", Preemption("qos", "REQUEUE", None, "SIGTERM")),
    ],
)
def test_find_preemption_reads_mode_grace_time_and_signal(
    settings: str, options: str, qos: str, found: Preemption | None
) -> None:
    tiers = "" if "PriorityTier" in options else "PriorityTier=1"
    site = parse_site(
        {
            "config": settings if "PreemptType" in settings else f"PreemptType = preempt/partition_prio\n{settings}",
            "partitions": f"PartitionName=low {options} {tiers}\nPartitionName=high PriorityTier=10\n",
            "qos": qos,
        }
    )
    assert find_preemption(site, site.partitions["low"], site.qos.get("normal")) == found


groups = st.builds(
    NodeGroup,
    count=st.integers(1, 5),
    cpus=st.integers(1, 256),
    memory_mb=st.integers(1, 4_000_000),
    gpus=st.dictionaries(WORD.filter(lambda word: word[0] not in "-.~") | st.just(""), st.integers(1, 16), max_size=3),
    features=st.lists(WORD, max_size=3).map(tuple),
)
optional = st.none() | st.integers(1, 500)
partitions = st.builds(
    Partition,
    name=WORD,
    nodes=st.lists(groups, min_size=1, max_size=3).map(tuple),
    default=st.booleans(),
    max_time_s=st.none() | st.integers(60, 10**7),
    min_nodes=st.just(0),
    max_nodes=optional,
    max_cpus_per_node=optional,
    max_memory_mb=st.none() | st.integers(1, 10**6),
    allow_accounts=st.none() | st.lists(WORD, min_size=1, max_size=2).map(tuple),
    preempt_mode=st.sampled_from(["OFF", "CANCEL", "REQUEUE", "GANG,SUSPEND"]),
    grace_s=st.integers(0, 600),
)


@given(
    partition=partitions,
    accounts=st.lists(WORD, max_size=2),
    settings=st.fixed_dictionaries(
        {
            "ClusterName": st.text(max_size=10),
            "SelectType": st.sampled_from(["select/linear", "select/cons_tres"]),
            "AccountingStorageEnforce": st.sampled_from(["none", "associations", "safe,qos"]),
            "PreemptType": st.sampled_from(["preempt/none", "preempt/qos"]),
        }
    ),
)
def test_profile_text_of_any_site_loads_and_passes_the_check(
    tmp_path_factory: pytest.TempPathFactory, partition: Partition, accounts: list[str], settings: dict[str, str]
) -> None:
    associations = tuple(Association(account, None, ("normal",), None) for account in accounts)
    site = Site(
        settings,
        {partition.name: partition},
        accounts[0] if accounts else None,
        associations,
        {"normal": Qos("normal", None, ())},
    )
    if partition.max_time_s is not None and partition.max_time_s < 100:
        with pytest.raises(UserError, match="too short for training"):
            profile_text(site, "mine", partition.name)
        return
    text = profile_text(site, "mine", partition.name)
    config = loaded(text, tmp_path_factory.getbasetemp()).config
    assert config.partition == partition.name
    if "no account of yours may use" not in text:
        check_partition(config, site)
