"""``galaxydist cluster``: list, show, init (on a machine without SLURM, and with the programs of a recorded one)."""

import sys
from pathlib import Path

import pytest

from galaxydist.cli.main import main
from galaxydist.cluster.partition_check import check_partition
from galaxydist.cluster.profile import CLUSTERS, ClusterConfig, load_cluster
from galaxydist.cluster.site import COMMANDS, read_site
from galaxydist.cluster.slurm import SlurmUnavailableError

RECORDS = Path(__file__).parents[1] / "data" / "slurm_records"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with one profile of its own."""
    (tmp_path / "slurm" / "clusters").mkdir(parents=True)
    (tmp_path / "slurm" / "clusters" / "mine.yaml").write_text(
        "# My own cluster.\npartition: gpu\ngpus_per_node: 4\ntime: 02:00:00\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def play(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *, without: str = "", failing: str = "") -> None:
    """Programs on the PATH that print what those of a recorded cluster printed, to the same words of the command line."""
    programs = folder / "programs"
    programs.mkdir(exist_ok=True)
    for program, *_ in COMMANDS.values():
        path = programs / program
        if program == without or path.exists():
            continue
        answers = {
            " ".join(command[1:]).split(" {user}")[0]: str(RECORDS / kind / f"{name}.txt")
            for name, command in COMMANDS.items()
            if command[0] == program
        }
        path.write_text(
            # As pip does it: a first line cannot name an interpreter whose path has a space.
            f"#!/bin/sh\n'''exec' \"{sys.executable}\" \"$0\" \"$@\"\n' '''\nimport pathlib, sys\n"
            f"if {program == failing}: sys.exit('slurm_load_partitions: Unable to contact slurm controller (connect failure)')\n"
            f"line = ' '.join(sys.argv[1:])\n"
            f"found = [path for words, path in {answers!r}.items() if line.startswith(words)]\n"
            "sys.stdout.write(pathlib.Path(found[0]).read_text())\n"
        )
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))


@pytest.mark.usefixtures("folder")
def test_cluster_list_shows_own_and_shipped_profiles_sorted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cluster", "list"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]  # not what is wrapped
    names = [line.split()[0] for line in lines]
    assert {"mine", "a100", "local"} <= set(names) and names == sorted(names)
    assert any(line.split(maxsplit=1) == ["mine", "My own cluster."] for line in lines)


@pytest.mark.usefixtures("folder")
def test_cluster_show_prints_every_key_with_value_and_origin(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cluster", "show", "mine", "cluster.nodes=2"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head == (
        "# slurm/clusters/mine.yaml; 2 x 4 processes for 120 minutes; on the command line: cluster=mine cluster.key=value"
    )
    by_key = {row[2:].split(" ", 1)[0]: row for row in rows if row[2:3].strip()}  # not what is wrapped
    assert list(by_key) == list(CLUSTERS.schema.fields)
    assert by_key["gpus_per_node"].startswith("* ") and "# (slurm/clusters/mine.yaml:3)" in by_key["gpus_per_node"]
    assert "= 2 " in by_key["nodes"] and "# (command line) nodes of a job" in by_key["nodes"]
    assert by_key["account"].startswith("  ") and "= null " in by_key["account"]
    assert main(["cluster", "show", "cluster=local"]) == 0
    assert "; one process on this machine; " in capsys.readouterr().out.splitlines()[0]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["show", "mine", "cluster.ndoes=2"], "cluster.ndoes: no such key; did you mean cluster.nodes?"),
        (["show", "min"], "no such cluster profile; did you mean mine?"),
        (["init", "a/b"], "is not a valid name of a profile"),
        (["init", "new.yaml"], "is not a valid name of a profile"),
        (["init", "mine"], "slurm/clusters/mine.yaml exists; choose another name, or --overwrite"),
    ],
)
def test_cluster_show_and_init_refuse_bad_keys_and_names_with_exit_code_2(
    arguments: list[str], text: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cluster", *arguments]) == 2
    assert text in capsys.readouterr().err
    assert [path.name for path in (folder / "slurm" / "clusters").iterdir()] == ["mine.yaml"]


def test_cluster_init_writes_a_profile_that_loads_and_fits_its_partition(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    play("typed", folder, monkeypatch)
    assert main(["cluster", "init", "new"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "slurm/clusters/new.yaml: partition gpu, 1 x 4 processes for 1440 minutes."
    config = load_cluster(["cluster=new"]).config
    assert (config.partition, config.gpus_per_node, config.gpu_type, config.cpus_per_task) == ("gpu", 4, "a100", 32)
    check_partition(config)
    assert main(["cluster", "init", "mine", "--partition", "cpu", "--overwrite"]) == 0
    assert load_cluster(["cluster=mine"]).config.partition == "cpu"
    assert sorted(path.name for path in (folder / "slurm" / "clusters").iterdir()) == ["mine.yaml", "new.yaml"]


def test_cluster_init_creates_the_folder_and_works_without_accounting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    play("plain", tmp_path, monkeypatch, failing="sacctmgr")
    assert main(["cluster", "init", "plain"]) == 0
    assert load_cluster(["cluster=plain"]).config.gpu_request == "gres"
    assert read_site().associations == ()


@pytest.mark.parametrize(
    ("lack", "text"),
    [
        (
            {"without": "scontrol"},
            "There is no SLURM on this machine (scontrol is not on the PATH). Use a login node",
        ),
        ({"failing": "sinfo"}, "`sinfo` failed: slurm_load_partitions: Unable to contact slurm controller"),
    ],
)
def test_cluster_init_without_slurm_exits_with_2_and_writes_no_profile(
    lack: dict[str, str], text: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    play("typed", folder, monkeypatch, **lack)
    assert main(["cluster", "init", "new"]) == 2
    assert text in capsys.readouterr().err
    assert [path.name for path in (folder / "slurm" / "clusters").iterdir()] == ["mine.yaml"]
    with pytest.raises(SlurmUnavailableError):
        read_site()
    check_partition(ClusterConfig(name="x", partition="any"))  # sbatch will say what is the matter
