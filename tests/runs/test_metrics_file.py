"""Reading little of long files of lines."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galaxydist.runs.metrics_file import read_step_records, read_tail, read_tail_records


def write_steps(path: Path, steps: list[int], width: int = 0) -> None:
    path.write_text("".join(json.dumps({"step": step, "pad": "x" * width}) + "\n" for step in steps))


@given(
    st.lists(st.binary(max_size=20).map(lambda line: line.replace(b"\n", b"")), max_size=30), st.integers(1, 200), st.booleans()
)
def test_read_tail_returns_the_last_whole_lines_that_fit(lines: list[bytes], num_bytes: int, is_torn: bool) -> None:
    data = b"".join(line + b"\n" for line in lines)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "log"
        path.write_bytes(data + (b"half" if is_torn else b""))
        found = read_tail(path, num_bytes)
        size = path.stat().st_size
    assert found == lines[len(lines) - len(found) :]
    start = size - len(data[len(data) - sum(len(line) + 1 for line in found) :]) - (4 if is_torn else 0)
    if len(found) < len(lines):  # one more would not have fitted
        assert size - (start - len(lines[-len(found) - 1]) - 1) > num_bytes
    assert size - start <= num_bytes or not found


def test_read_tail_stops_at_the_given_end(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"one\ntwo\nthree\n")
    assert read_tail(tmp_path / "log", end=8) == [b"one", b"two"]
    assert read_tail(tmp_path / "log", end=10, whole=False) == [b"one", b"two", b"th"]


def test_read_tail_and_read_step_records_of_a_missing_file_are_empty(tmp_path: Path) -> None:
    assert read_tail(tmp_path / "none") == []
    assert read_tail_records(tmp_path / "none") == []
    assert read_step_records(tmp_path / "none", 3) == []


def test_read_tail_records_skips_lines_that_are_no_records(tmp_path: Path) -> None:
    (tmp_path / "log").write_text('{"step": 1}\n[1]\nnonsense\n{"step": 2}\n{"step"')
    assert read_tail_records(tmp_path / "log") == [{"step": 1}, {"step": 2}]


@given(st.lists(st.integers(0, 60), max_size=60), st.integers(0, 61), st.sampled_from([0, 50, 900]))
def test_read_step_records_finds_every_line_of_a_step(steps: list[int], wanted: int, width: int) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        write_steps(path, sorted(steps), width)
        assert len(read_step_records(path, wanted)) == steps.count(wanted)


def test_read_step_records_finds_all_lines_for_any_search_position(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for first in range(0, 60, 7):
        write_steps(path, [1] * first + [2] * 50 + [3] * (60 - first), 900)
        assert len(read_step_records(path, 2)) == 50


def test_read_step_records_parses_few_lines_of_a_long_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [*range(20_000)], 80)
    parsed = []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda line: parsed.append(line) or loads(line))
    for wanted in (0, 1, 9_999, 19_998):
        assert [record["step"] for record in read_step_records(path, wanted)] == [wanted]
    assert len(parsed) < 800
