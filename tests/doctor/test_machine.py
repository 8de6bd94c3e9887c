"""The doctor's checks of folders: data root, shards, scratch space, file system of the run folders."""

from pathlib import Path

from galaxydist.doctor.check import has_failed, ok
from galaxydist.doctor.machine import check_data_root, check_run_folders, check_scratch, check_shards
from tests.helpers.scripts.doctor_places import UNWRITABLE, layered_disk, levels, linux, small_disk


@linux
def test_check_data_root_warns_of_little_space_and_of_a_small_home(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with small_disk(home, "40g"):
        large = check_data_root(home / "data", home)
        assert (large.level, large.text) == ("ok", f"{home}/data (does not exist yet): 42.9 GB free, in HOME")
        assert not (home / "data").exists()
    with small_disk(tmp_path / "project", "6g") as elsewhere:
        assert check_data_root(elsewhere / "data", home).level == "ok"
        in_home = check_data_root(elsewhere / "data", elsewhere)
        assert in_home.level == "warning" and "GALAXYDIST_DATA" in in_home.remedy
    with small_disk(tmp_path / "small", "64m") as folder:
        assert check_data_root(folder / "data", home).level == "warning"


@linux
def test_check_data_root_fails_where_no_folder_can_be_created(tmp_path: Path) -> None:
    assert check_data_root(UNWRITABLE / "data", tmp_path).level == "failure"
    (tmp_path / "file").write_text("")
    assert check_data_root(tmp_path / "file" / "data", tmp_path).level == "failure"


def test_check_shards_without_galaxy10_warns_and_names_the_commands(tmp_path: Path) -> None:
    none = check_shards(tmp_path)
    assert none.level == "warning" and "galaxydist data fetch" in none.remedy and "galaxydist data shard" in none.remedy
    for name in ("simulated", "galaxy10_decals"):
        manifest = tmp_path / "shards" / name / "original" / "manifest.json"
        manifest.parent.mkdir(parents=True)
        manifest.write_text("{}")
        check = check_shards(tmp_path)
        assert (check.level, name in check.text) == ("ok" if name == "galaxy10_decals" else "warning", True)


@linux
def test_check_scratch_warns_of_little_space_and_of_tmpfs(tmp_path: Path) -> None:
    with layered_disk(tmp_path / "large", "6g") as folder:
        assert check_scratch(folder, {}) == ok("scratch", f"{folder}: 6.4 GB free")
        assert list(folder.iterdir()) == []
    with layered_disk(tmp_path / "small", "4g") as folder:
        check = check_scratch(folder, {})
        assert (check.level, check.text) == ("warning", f"{folder}: 4.3 GB free") and "remove old files" in check.remedy
    with small_disk(tmp_path / "memory", "6g") as folder:
        in_memory = check_scratch(folder, {})
        assert in_memory.level == "warning" and "in memory" in in_memory.text and list(folder.iterdir()) == []


@linux
def test_check_scratch_expands_job_variables_and_fails_for_unset_ones(tmp_path: Path) -> None:
    folder = tmp_path / "ada" / "job"
    folder.mkdir(parents=True)
    environ = {"TMPDIR": str(folder), "USER": "ada", "EMPTY": ""}
    for given in ("$TMPDIR", "${TMPDIR}", f"{tmp_path}/$USER/job"):
        check = check_scratch(Path(given), environ)
        assert check.level != "failure" and check.text.startswith(f"{folder}: "), check
    for given, why in (
        ("$SCRATCH/x", "$SCRATCH is not set there"),
        ("$EMPTY", "not an absolute path"),
        ("/a/$(id)", "cannot be read"),
    ):
        check = check_scratch(Path(given), environ)
        assert check.level == "failure" and given in check.text and why in check.text and "cluster.scratch" in check.remedy
    for folder in (tmp_path / "none", UNWRITABLE):
        assert check_scratch(folder, environ).level == "failure"


@linux
def test_check_run_folders_tests_fsync_rename_link_and_flock(tmp_path: Path) -> None:
    good = check_run_folders(tmp_path / "runs")
    assert levels(good) == dict.fromkeys(("run folders", "rename there", "link there", "flock there"), "ok")
    assert list((tmp_path / "runs").iterdir()) == []
    bad = check_run_folders(UNWRITABLE / "runs")
    assert levels(bad) == {"run folders": "failure"} and "run.root" in bad[0].remedy
    with small_disk(tmp_path / "full", "64k") as folder:
        (folder / "all").write_bytes(bytes(64 << 10))
        assert has_failed(check_run_folders(folder))
