"""The run folder: layout, what may change when a run goes on, metrics.jsonl, atomic files."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galaxydist.atomic_files import read_json, replace_bytes, whole_file, write_json
from galaxydist.errors import UserError
from galaxydist.runs.folder import RunFolder, compare_recipes
from galaxydist.runs.metrics_file import MetricsFile

RECIPE = {"name": "demo", "optim.lr": 1e-3, "model.pretrained": False, "tracker.tags": (), "train.log_every": 20}
RESULT_KEYS = {"name", "optim.lr", "model.pretrained"}


def test_the_first_command_writes_the_recipe_and_the_same_one_continues(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "demo-0")
    assert not folder.is_started
    assert folder.continue_recipe(RECIPE, {"name": "file"}, result_keys=RESULT_KEYS) == []
    assert folder.is_started
    assert not folder.is_finished
    stored = folder.read_recipe()
    assert stored.recipe["optim.lr"] == 1e-3
    assert stored.recipe["tracker.tags"] == []
    assert stored.origins == {"name": "file"}
    assert folder.continue_recipe(RECIPE, {"name": "file"}, result_keys=RESULT_KEYS) == []
    assert folder.continue_recipe({**RECIPE, "train.log_every": 5}, {}, result_keys=RESULT_KEYS) == []
    assert folder.read_recipe().recipe["train.log_every"] == 5


def test_changed_result_keys_are_refused_naming_all_without_writing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.continue_recipe(RECIPE, {}, result_keys=RESULT_KEYS)
    before = folder.recipe_path.read_bytes()
    with pytest.raises(UserError) as raised:
        folder.continue_recipe({**RECIPE, "optim.lr": 0.01, "model.pretrained": True}, {}, result_keys=RESULT_KEYS)
    text = str(raised.value)
    assert "optim.lr: 0.001 in the run folder, 0.01 now" in text
    assert "model.pretrained: false in the run folder, true now" in text
    assert "resume.force=[model.pretrained,optim.lr]" in text
    assert "run.dir" in text
    assert folder.recipe_path.read_bytes() == before


def test_forced_recipe_changes_are_recorded_with_step_and_values(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.continue_recipe(RECIPE, {}, result_keys=RESULT_KEYS)
    for step, lr in ((7, 0.01), (9, 0.02)):
        changes = folder.continue_recipe({**RECIPE, "optim.lr": lr}, {}, result_keys=RESULT_KEYS, force=["optim.lr"], step=step)
        assert [change.key for change in changes] == ["optim.lr"]
    assert folder.read_recipe().forced == (
        {"step": 7, "changes": [{"key": "optim.lr", "old": 0.001, "new": 0.01}]},
        {"step": 9, "changes": [{"key": "optim.lr", "old": 0.01, "new": 0.02}]},
    )
    with pytest.raises(UserError, match=r"model\.pretrained"):
        folder.continue_recipe(
            {**RECIPE, "optim.lr": 0.02, "model.pretrained": True}, {}, result_keys=RESULT_KEYS, force=["optim.lr"]
        )


def test_recipe_key_that_only_one_side_has_or_of_another_type_is_a_change() -> None:
    with pytest.raises(UserError, match=r"optim\.beta9: null in the run folder, 0\.5 now"):
        compare_recipes({}, {"optim.beta9": 0.5}, result_keys={"optim.beta9"})
    with pytest.raises(UserError, match=r"flag: 1 in the run folder, true now"):
        compare_recipes({"flag": 1}, {"flag": True}, result_keys={"flag"})
    assert compare_recipes({"dir": Path("a")}, {"dir": "a"}, result_keys={"dir"}) == []


def test_run_folder_without_a_readable_recipe_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(UserError, match="not a run folder"):
        folder.read_recipe()
    folder.recipe_path.write_text('{"format": 1, "rec')
    with pytest.raises(UserError, match=r"recipe\.json is not readable as JSON"):
        folder.read_recipe()
    folder.recipe_path.write_text('{"format": 99, "recipe": {}}')
    with pytest.raises(UserError, match="another version"):
        folder.read_recipe()


def test_run_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match=r"cannot be made: .* run\.dir"):
        RunFolder(tmp_path / "runs" / "demo").create()


def test_tracker_state_and_result_are_read_back_as_written(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.read_tracker() == {}
    folder.write_tracker(run_id="abc", stored_step=40, is_complete=False)
    assert folder.read_tracker() == {"run_id": "abc", "stored_step": 40, "is_complete": False}
    assert folder.read_result() is None
    folder.write_result({"accuracy": 0.5, "checkpoint": Path("x")})
    assert folder.is_finished
    assert folder.read_result() == {"accuracy": 0.5, "checkpoint": "x"}


def test_failed_json_write_keeps_the_old_file_and_leaves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="nan"):
        write_json(path, {"a": math.nan})
    assert read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


SMALL_DISK = """
import resource, signal, sys
from pathlib import Path
from galaxydist.errors import UserError
from galaxydist.atomic_files import replace_bytes
from galaxydist.runs.metrics_file import MetricsFile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
folder = Path(sys.argv[1])
log = MetricsFile(folder / "m.jsonl")
for write in (lambda: replace_bytes(folder / "state.json", b"x" * 2000), lambda: log.append(2, {"y" * 2000: 1.0})):
    try:
        write()
    except UserError as error:
        print(error)
"""


def test_file_size_limit_keeps_the_old_state_and_metrics(tmp_path: Path) -> None:
    replace_bytes(tmp_path / "state.json", b"old")
    MetricsFile(tmp_path / "m.jsonl").append(1, {"x": 1.0})
    done = subprocess.run([sys.executable, "-c", SMALL_DISK, tmp_path], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert "state.json could not be written: the file size limit is reached. Its earlier contents are unchanged." in lines[0]
    assert "m.jsonl could not be written" in lines[1]
    assert (tmp_path / "state.json").read_bytes() == b"old"
    assert MetricsFile(tmp_path / "m.jsonl").read() == [{"step": 1, "x": 1.0}]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.jsonl", "state.json"]


def test_metrics_log_reads_back_its_records_with_nonfinite_values_as_null(tmp_path: Path) -> None:
    log = MetricsFile(tmp_path / "metrics.jsonl")
    assert log.read() == []
    assert log.cut_back(3) == 0
    log.append(1, {"train/loss": 0.1 + 0.2, "train/lr": 1e-7})
    log.append(2, {"train/loss": math.inf, "val/accuracy": None})
    log.sync()
    assert log.read() == [
        {"step": 1, "train/loss": 0.1 + 0.2, "train/lr": 1e-7},
        {"step": 2, "train/loss": None, "val/accuracy": None},
    ]


@given(
    steps=st.lists(st.integers(0, 20), max_size=8).map(sorted),
    keep=st.integers(-1, 21),
    half=st.sampled_from([b"", b"{", b'{"step": 4, "a"', b'{"step": 4}', b"\xff\xfe"]),
)
def test_cutting_back_keeps_exactly_the_lines_up_to_a_step(
    steps: list[int], keep: int, half: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    for step in steps:
        MetricsFile(path).append(step, {"a": step / 3})
    with path.open("ab") as file:
        file.write(half)  # killed in the middle of a line
    kept = [step for step in steps if step <= keep]
    assert MetricsFile(path).cut_back(keep) == len(steps) - len(kept)
    assert MetricsFile(path).read() == [{"step": step, "a": step / 3} for step in kept]
    MetricsFile(path).append(99, {})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [*kept, 99]


def test_metrics_log_append_drops_a_half_written_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path).append(1, {"a": 1.0})
    with path.open("ab") as file:
        file.write(b'{"step": 2, "' + b"x" * 10_000)
    MetricsFile(path).append(3, {"a": 3.0})
    assert [line["step"] for line in MetricsFile(path).read()] == [1, 3]


def test_metrics_log_with_a_damaged_line_in_the_middle_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 2 is damaged"):
        MetricsFile(path).read()


def test_recipe_of_an_older_version_has_the_defaults_of_later_keys(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.continue_recipe(RECIPE, {}, result_keys=RESULT_KEYS)
    later = {"result_keys": {*RESULT_KEYS, "train.later"}, "defaults": {"train.later": 1}}
    assert folder.continue_recipe({**RECIPE, "train.later": 1}, {}, **later) == []
    with pytest.raises(UserError, match=r"train.later: 1 in the run folder, 2 now"):
        folder.continue_recipe({**RECIPE, "train.later": 2}, {}, **later)


def test_two_writers_of_a_file_each_write_it_whole(tmp_path: Path) -> None:
    with whole_file(tmp_path / "file") as first:
        first.write(b"one")
        with whole_file(tmp_path / "file") as second:
            second.write(b"another")
        first.write(b" writer")
    assert (tmp_path / "file").read_bytes() == b"one writer" and len([*tmp_path.iterdir()]) == 1


def test_a_write_removes_what_killed_writes_of_the_file_left_long_ago(tmp_path: Path) -> None:
    for name, age in ((".a[1].json.7.tmp", 2 * 86400), (".a[1].json.8.tmp", 60), (".b.json.7.tmp", 2 * 86400)):
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    write_json(tmp_path / "a[1].json", {})
    assert {path.name for path in tmp_path.iterdir()} == {"a[1].json", ".a[1].json.8.tmp", ".b.json.7.tmp"}
