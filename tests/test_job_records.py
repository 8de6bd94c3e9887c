"""The scheduler's part of a run folder: lines that never mix, and a torn one that is left out."""

import dataclasses
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galaxydist.cluster.records import JobFiles, JobRecord, RestartRecord
from galaxydist.errors import UserError

JOB = JobRecord("12_3", "slurm", "a100", 1.5, 2, 8, 60, "/code", "/folder", ("recipe=vit",), ("cluster=a100",))
RESTART = RestartRecord("12_3", 1, 137, 40, "a rank was ended by signal 9", "requeue", "why", 2.5)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    files = JobFiles(tmp_path / "run")
    assert files.jobs() == files.restarts() == files.rank_logs() == []
    again = dataclasses.replace(JOB, job_id="13", resubmits="12_3")
    files.append_job(JOB)
    files.append_job(again)
    files.append_restart(RESTART)
    assert files.jobs() == [JOB, again]
    assert files.restarts() == [RESTART]


@given(st.integers(0, 400))
def test_a_torn_line_is_left_out_and_spoils_no_other(length: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        files = JobFiles(Path(folder))
        files.append_restart(RESTART)
        whole = files.restarts_path.stat().st_size
        files.append_restart(RESTART)
        kept = min(whole + length, 2 * whole)
        os.truncate(files.restarts_path, kept)
        files.append_restart(dataclasses.replace(RESTART, restart=2))
        found = files.restarts()
        assert found[0] == RESTART and found[-1].restart == 2
        assert len(found) == (3 if kept >= 2 * whole - 1 else 2)  # without the line's end alone nothing is lost


def test_a_foreign_line_is_named(tmp_path: Path) -> None:
    files = JobFiles(tmp_path)
    files.jobs_path.write_text('{"job": 1}\n')
    with pytest.raises(UserError, match=r"jobs\.jsonl, line 1"):
        files.jobs()


def test_two_writers_do_not_mix_their_lines(tmp_path: Path) -> None:
    files = JobFiles(tmp_path)
    long = dataclasses.replace(RESTART, reason="r" * 3000)

    def write() -> None:
        for _ in range(50):
            files.append_restart(long)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert files.restarts() == [long] * 200


def test_logs_stand_in_the_order_of_the_ranks(tmp_path: Path) -> None:
    files = JobFiles(tmp_path)
    files.logs_dir.mkdir()
    for rank in (10, 2, 0):
        files.rank_log(rank).touch()
    assert [path.name for path in files.rank_logs()] == ["rank-0.log", "rank-2.log", "rank-10.log"]
