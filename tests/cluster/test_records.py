"""What a run folder keeps about its jobs."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galaxydist.cluster.records import JobFiles, RestartRecord
from galaxydist.errors import UserError
from galaxydist.runs.folder import plain
from galaxydist.runs.record_file import from_plain
from tests.helpers.status_runs import FULL_RECORD

RESTART = RestartRecord("12_3", 1, 75, None, None, "requeue", "saved at step 20", 1_700_000_100.0)

WRITER = """
import dataclasses, sys
from pathlib import Path
from tests.helpers.status_runs import FULL_RECORD
from galaxydist.cluster.records import JobFiles
for number in range(200):
    record = dataclasses.replace(FULL_RECORD, job_id=f"{sys.argv[2]}_{number}", cluster=sys.argv[2] * 700)
    JobFiles(Path(sys.argv[1])).append_job(record)
"""


def test_job_files_of_a_new_run_are_empty_and_create_no_folder(tmp_path: Path) -> None:
    files = JobFiles(tmp_path / "run")
    assert (files.jobs(), files.restarts(), files.rank_logs()) == ([], [], [])
    assert list(tmp_path.iterdir()) == []


def test_job_and_restart_records_are_read_back_in_order(tmp_path: Path) -> None:
    files = JobFiles(tmp_path / "run")
    other = dataclasses.replace(FULL_RECORD, job_id="13", scheduler="local", arguments=())
    files.append_job(FULL_RECORD)
    files.append_job(other)
    files.append_restart(RESTART)
    assert files.jobs() == [FULL_RECORD, other]
    assert files.restarts() == [RESTART]


text = st.text(max_size=20)


@given(
    st.builds(
        RestartRecord,
        job_id=text,
        restart=st.integers(0, 99),
        exit_code=st.integers(-15, 255),
        step=st.none() | st.integers(0, 10**9),
        error=st.none() | text,
        decision=st.sampled_from(["finished", "requeue", "resubmit", "stop"]),
        reason=text,
        time=st.floats(0, 1e12),
    )
)
def test_restart_record_is_one_json_line_that_reads_back_equal(record: RestartRecord) -> None:
    line = json.dumps(plain(dataclasses.asdict(record)), ensure_ascii=False)
    assert "\n" not in line
    assert from_plain(RestartRecord, json.loads(line)) == record


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_half_written_last_record_is_ignored_and_later_records_are_read(tmp_path: Path, cut: int) -> None:
    files = JobFiles(tmp_path)
    files.append_restart(RESTART)
    files.append_restart(RESTART)
    whole = files.restarts_path.read_bytes()
    files.restarts_path.write_bytes(whole[:-cut])
    assert files.restarts() == [RESTART]
    later = dataclasses.replace(RESTART, restart=2)
    files.append_restart(later)
    assert files.restarts() == [RESTART, later]


@pytest.mark.multiprocess
def test_two_writers_never_mix_their_lines(tmp_path: Path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), name]) for name in "ab"]
    assert [writer.wait(300) for writer in writers] == [0, 0]
    found = [job.job_id for job in JobFiles(tmp_path).jobs()]
    for name in "ab":
        assert [job_id for job_id in found if job_id.startswith(name)] == [f"{name}_{number}" for number in range(200)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"nodes": "2"}, "nodes='2' is not int"),
        ({"nodes": True}, "nodes=True is not int"),
        ({"scheduler": "pbs"}, "scheduler='pbs'"),
        ({"arguments": "recipe=vit"}, "arguments='recipe=vit'"),
        ({"job_id": None}, "job_id=None is not str"),
    ],
)
def test_damaged_job_record_raises_an_error_naming_line_and_field(tmp_path: Path, change: dict[str, object], words: str) -> None:
    files = JobFiles(tmp_path)
    files.append_job(FULL_RECORD)
    line = json.dumps({**plain(dataclasses.asdict(FULL_RECORD)), **change})
    files.jobs_path.write_text(f"{files.jobs_path.read_text()}{line}\n")
    with pytest.raises(UserError, match="line 2 is damaged") as caught:
        files.jobs()
    assert words in str(caught.value)


@pytest.mark.parametrize("line", ["{", "[1]", '{"job_id": "1"}', "\x00\x00", ""])
def test_line_that_is_no_restart_record_raises_an_error_naming_the_line(tmp_path: Path, line: str) -> None:
    files = JobFiles(tmp_path)
    files.restarts_path.write_text(f"{line}\n")
    with pytest.raises(UserError, match=r"restarts\.jsonl, line 1 is damaged"):
        files.restarts()


def test_rank_logs_are_in_the_order_of_ranks(tmp_path: Path) -> None:
    files = JobFiles(tmp_path)
    files.logs_dir.mkdir()
    for name in ("rank-10.log", "rank-2.log", "rank-x.log", "slurm"):
        (files.logs_dir / name).touch()
    assert files.rank_logs() == [files.rank_log(2), files.rank_log(10)]
