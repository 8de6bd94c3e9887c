"""Rows of a run folder: read while it grows, after it was cut back, and from folders of earlier versions."""

import json
from pathlib import Path

import pytest

from galaxydist.errors import UserError
from galaxydist.runs.events import Event, append_event
from galaxydist.runs.folder import RunFolder
from galaxydist.tracking.run_reader import GrowingFile, RunReader
from galaxydist.tracking.sink import Row


def log(folder: RunFolder, step: int, seconds: float | None = None) -> None:
    folder.metrics.append(step, {"train/loss": 1 / step})
    folder.timing.append(step, {"time/img_s": 10.0} | ({"time/unix": seconds} if seconds is not None else {}))


def steps(rows: list[Row]) -> list[int]:
    return [row.step for row in rows]


def test_rows_come_once_each_when_they_are_complete_also_after_the_run_was_cut_back(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    reader = RunReader(folder)
    assert list(reader.read()) == []
    for step in (2, 4):
        log(folder, step)
    with folder.metrics_path.open("ab") as file:
        file.write(b'{"step": 6, "train/lo')  # being written
    assert steps(list(reader.read())) == [2]
    RunFolder(tmp_path).metrics.append(6, {"train/loss": 0.5})  # by a later start, which removes the half line
    assert [(row.step, dict(row.values)) for row in reader.read()] == [(4, {"train/loss": 0.25, "time/img_s": 10.0})]
    for step in (8, 10):
        log(folder, step)
    assert steps(list(reader.read())) == [6, 8]

    assert folder.cut_back(4) is None  # back to a checkpoint: the same steps are logged again
    assert steps(list(reader.read())) == []
    append_event(folder.events_path, Event(1.0, "start", "continues", step=4))
    for step in (6, 8, 10, 12):
        log(folder, step)
    (row,) = reader.read()
    assert row.step == 10 and [event.kind for event in row.events] == ["start"]
    assert steps(list(reader.read(has_ended=True))) == [12] and list(reader.read(has_ended=True)) == []
    assert steps(list(RunReader(folder).read(has_ended=True))) == [2, 4, 6, 8, 10, 12]

    with folder.metrics_path.open("ab") as file:
        file.write(b"no line\n")
    with pytest.raises(UserError, match="damaged line: b'no line'"):
        list(RunReader(folder).read(has_ended=True))


def test_the_last_row_of_a_run_is_complete_once_a_signal_has_stopped_it_there(tmp_path: Path) -> None:
    folder, reader = RunFolder(tmp_path), RunReader(RunFolder(tmp_path))
    append_event(folder.events_path, Event(1.0, "start", "begins", step=0))
    for step in (2, 4):
        log(folder, step)
    append_event(
        folder.events_path, Event(2.0, "stop", "the batch script's word after a kill", step=4, details={"decision": "stop"})
    )
    assert steps(list(reader.read())) == [2]
    append_event(folder.events_path, Event(3.0, "stop", "stopped by SIGTERM at step 5", step=5))
    append_event(folder.events_path, Event(4.0, "requeue", "again", details={"decision": "requeue"}))
    assert steps(list(reader.read())) == [4]
    log(folder, 6)  # the next start
    assert steps(list(reader.read())) == []
    append_event(folder.events_path, Event(5.0, "start", "continues", step=5))
    assert steps(list(reader.read())) == []
    log(folder, 8)
    assert steps(list(reader.read())) == [6]


def test_a_file_that_is_cut_back_between_two_looks_is_not_read_from_within_a_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    file = GrowingFile(folder.metrics_path, is_strict=True)
    for step in (2, 4):
        log(folder, step)
    assert not file.refresh() and file.peek() is not None and file.take()["step"] == 2 and file.take()["step"] == 4
    assert not file.refresh()
    folder.cut_back(2)  # a new file, which is soon longer than the old one
    for step in (3, 11_111):
        log(folder, step)
    assert file.peek() is None
    assert file.refresh()
    assert [line["step"] for line in iter(lambda: file.peek() and file.take(), None)] == [2, 3, 11_111]


def test_rows_have_the_events_validations_and_node_values_up_to_their_time(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step, seconds in ((2, 100.0), (4, 200.0), (6, 300.0)):
        log(folder, step, seconds)
    append_event(folder.events_path, Event(90.0, "start", "begins"))
    append_event(folder.events_path, Event(250.0, "requeue", "again", step=9))
    append_event(folder.events_path, Event(251.0, "start", "reads https://me:secret@host/a.tar?sig=token"))
    append_event(folder.events_path, Event(999.0, "finish", "the end"))
    with folder.events_path.open("a") as file:
        file.write('{"time": 1, "kind": "of a later version", "text": ""}\n')
    details = {"classes": ["round", "flat"], "confusion": [[3, 1], [0, 0]], "recall": [0.75, None], "galaxies": []}
    folder.validations.append(4, {**details, "calibration": []})
    folder.system_dir.mkdir()
    lines = [{"time": t, "step": 1, "system/n1/cpu": t} for t in (95.0, 150.0, 190.0, 400.0)]
    (folder.system_dir / "n1.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    reader = RunReader(folder)
    first, second, third = reader.read(has_ended=True)
    assert (first.time, first.values["system/n1/cpu"], first.values["events/start"]) == (100.0, 95.0, 1)
    assert (second.values["system/n1/cpu"], second.values["val/recall/round"]) == (190.0, 0.75)
    assert second.validation is not None and "val/recall/flat" not in second.values and second.events == ()
    assert [event.text for event in third.events] == ["again", "reads https://host/a.tar"] and third.values["events/start"] == 2
    assert "system/n1/cpu" not in third.values
    assert [event.kind for event in reader.read_events()] == ["start", "requeue", "start", "finish"]
