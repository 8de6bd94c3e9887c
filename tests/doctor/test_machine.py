"""The doctor's checks of folders: the data root in HOME, quotas, shards, scratch space, file systems of runs."""

import math
from pathlib import Path

import pytest

from galaxydist.doctor.check import has_failed, ok
from galaxydist.doctor.machine import (
    Mount,
    check_data_root,
    check_run_folders,
    check_scratch,
    check_shards,
    quota_left,
    read_quota,
)
from tests.helpers.scripts.doctor_places import UNWRITABLE, layered_disk, levels, linux, program, small_disk

INFINITY = math.inf


@linux
def test_the_data_root_in_and_out_of_a_small_home(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with small_disk(home, "40g"):
        large = check_data_root(home / "data", home, quota_left=1e12)
        assert (large.level, large.text) == ("ok", f"{home}/data (not there yet): 42.9 GB free, in HOME")
        small = check_data_root(home / "data", home, quota_left=3e9)
        assert small.level == "warning" and "3.0 GB free, in HOME" in small.text and "GALAXYDIST_DATA" in small.remedy
        unknown = check_data_root(home / "data", home, quota_left=None)
        assert unknown.level == "warning" and unknown.text == f"{large.text}, and its quota is not known here"
        assert "GALAXYDIST_DATA" in unknown.remedy and "20 GB" in unknown.remedy
        assert not (home / "data").exists()
    with small_disk(tmp_path / "project", "40g") as elsewhere:
        # The quota of HOME says nothing of other places.
        for left in (3e9, None):
            assert check_data_root(elsewhere / "data", home, left) == ok(
                "data root", f"{elsewhere}/data (not there yet): 42.9 GB free"
            )
    with small_disk(tmp_path / "small", "64m") as folder:
        assert check_data_root(folder / "data", home, INFINITY).level == "warning"


@linux
def test_a_data_root_that_cannot_be_made(tmp_path: Path) -> None:
    assert check_data_root(UNWRITABLE / "data", tmp_path, INFINITY).level == "failure"
    (tmp_path / "file").write_text("")
    assert check_data_root(tmp_path / "file" / "data", tmp_path, INFINITY).level == "failure"


# quota(1), as it prints for a limit on NFS and for a user who is over the soft one.
QUOTA_TABLE = """Disk quotas for user ada (uid 1000):
     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace
server:/home 8000000* 20000000 22000000       0   10000       0       0       0
   /dev/sda1   5000000       0       0       0       1       0       0       0
"""
NO_QUOTA = "Disk quotas for user ada (uid 1000): none"


def test_quotas_are_read() -> None:
    assert read_quota(QUOTA_TABLE) == 12_000_000 * 1024
    assert read_quota(f"{NO_QUOTA}\n") == INFINITY


@pytest.mark.parametrize(
    ("mount", "prints", "left"),
    [
        (Mount("nfs4", "rw,vers=4.2"), f"cat <<'X'\n{QUOTA_TABLE}X\nexit 1", 12_000_000 * 1024),
        (Mount("nfs4"), f"echo '{NO_QUOTA}'", INFINITY),
        # The server does not tell.
        (Mount("nfs4"), f"echo 'quota: error while getting quota from server:/home' >&2; echo '{NO_QUOTA}'", None),
        (Mount("nfs4"), "exit 1", None),
        (Mount("nfs4"), None, None),
        # quota(1) knows nothing of these.
        (Mount("lustre", "rw,flock"), f"echo '{NO_QUOTA}'", None),
        (Mount("gpfs"), f"echo '{NO_QUOTA}'", None),
        # A disk of this machine: its mount options say whether there are any.
        (Mount("ext4", "rw,relatime"), None, INFINITY),
        (Mount("xfs", "rw,attr2,noquota"), None, INFINITY),
        (Mount("xfs", "rw,usrquota"), None, None),
        (Mount("ext4", "rw,quota,usrquota"), f"cat <<'X'\n{QUOTA_TABLE}X", 12_000_000 * 1024),
    ],
)
def test_a_quota_that_nobody_can_tell_is_not_taken_for_none(
    tmp_path: Path, mount: Mount, prints: str | None, left: float | None
) -> None:
    asked = str(tmp_path / "none") if prints is None else program(tmp_path, "quota", prints)
    assert quota_left(tmp_path, asked, mount) == left


def test_shards_that_are_there_and_the_command_that_makes_them(tmp_path: Path) -> None:
    none = check_shards(tmp_path)
    assert none.level == "warning" and "galaxydist data fetch" in none.remedy and "galaxydist data shard" in none.remedy
    for name in ("simulated", "galaxy10_decals"):
        manifest = tmp_path / "shards" / name / "original" / "manifest.json"
        manifest.parent.mkdir(parents=True)
        manifest.write_text("{}")
        check = check_shards(tmp_path)
        assert (check.level, name in check.text) == ("ok" if name == "galaxy10_decals" else "warning", True)


@linux
def test_scratch_space_on_a_disk_in_memory_and_nowhere(tmp_path: Path) -> None:
    with layered_disk(tmp_path / "large", "6g") as folder:
        assert check_scratch(folder, {}) == ok("scratch", f"{folder}: 6.4 GB free")
        assert list(folder.iterdir()) == []
    with layered_disk(tmp_path / "small", "4g") as folder:
        check = check_scratch(folder, {})
        assert (check.level, check.text) == ("warning", f"{folder}: 4.3 GB free") and "remove what is old" in check.remedy
    with small_disk(tmp_path / "memory", "6g") as folder:
        in_memory = check_scratch(folder, {})
        assert in_memory.level == "warning" and "in memory" in in_memory.text and list(folder.iterdir()) == []


@linux
def test_scratch_is_named_by_variables_of_the_job(tmp_path: Path) -> None:
    folder = tmp_path / "ada" / "job"
    folder.mkdir(parents=True)
    environ = {"TMPDIR": str(folder), "USER": "ada", "EMPTY": ""}
    for told in ("$TMPDIR", "${TMPDIR}", f"{tmp_path}/$USER/job"):
        check = check_scratch(Path(told), environ)
        assert check.level != "failure" and check.text.startswith(f"{folder}: "), check
    for told, why in (("$SCRATCH/x", "$SCRATCH is not set there"), ("$EMPTY", "no whole path"), ("/a/$(id)", "cannot be read")):
        check = check_scratch(Path(told), environ)
        assert check.level == "failure" and told in check.text and why in check.text and "cluster.scratch" in check.remedy
    for told in (tmp_path / "none", UNWRITABLE):
        assert check_scratch(told, environ).level == "failure"


@linux
def test_what_run_folders_need_of_a_file_system(tmp_path: Path) -> None:
    good = check_run_folders(tmp_path / "runs")
    assert levels(good) == dict.fromkeys(("run folders", "fsync there", "rename there", "link there", "flock there"), "ok")
    assert list((tmp_path / "runs").iterdir()) == []
    bad = check_run_folders(UNWRITABLE / "runs")
    assert levels(bad) == {"run folders": "failure"} and "run.root" in bad[0].remedy
    with small_disk(tmp_path / "full", "64k") as folder:
        (folder / "all").write_bytes(bytes(64 << 10))
        assert has_failed(check_run_folders(folder))
