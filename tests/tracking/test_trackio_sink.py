"""trackio's own files, read back: each step once with its time, however often a push was killed or repeated."""

import os
import random
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from galaxydist.runs.events import Event, append_event
from galaxydist.runs.folder import RunFolder
from tests.helpers.forked_runs import command, forked, run_forked
from tests.helpers.runs import read_losses
from tests.helpers.trackio_files import read_table, read_trackio, write_long_run

NUM_ROWS = 1300


def push(run: RunFolder, *more: str) -> str:
    done = run_forked(command, ["track", "push", str(run.path), "--to", "trackio", *more])
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def push_twice_as_another_user(run: Path, folder: Path) -> int:
    """Push a run that this process may only read."""
    if os.getuid() == 0:
        os.setreuid(65534, 0)  # access(2) asks for the real user; Python's own files may be root's alone
    words = ["track", "push", str(run), "--to", "trackio", "--dir", str(folder)]
    return command(words) or command(words)


def losses(rows: Sequence[tuple[int, dict[str, float]]]) -> dict[int, float]:
    """Training loss by step, each step once."""
    assert len({step for step, _ in rows}) == len(rows)
    return {step: values["train/loss"] for step, values in rows}


@pytest.mark.multiprocess
@pytest.mark.slow
def test_trackio_holds_each_step_once_after_killed_and_repeated_pushes(tmp_path: Path) -> None:
    run = write_long_run(tmp_path / "runs" / "long", NUM_ROWS)
    folder, chance = tmp_path / "runs" / "trackio", random.Random(1)
    arguments = ["track", "push", str(run.path), "--to", "trackio"]
    # Right before a connection to the file, or before a picture gets its name; then at any moment, also in a transaction.
    kills = [("sqlite3.connect", 3), ("galaxydist.rename", 3), ("sqlite3.connect", 8)]
    for number, kill in enumerate([*kills, None, None]):
        with forked(command, arguments, *(kill or ()), folder=tmp_path / f"log-{number}") as process:
            if kill is None:
                deadline = time.monotonic() + 60
                while not (folder / "galaxydist.db").exists() and process.exit_codes == [None]:
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
                time.sleep(chance.uniform(0, 0.1))
                process.kill()
            else:
                assert process.wait() == [-9], process.text("err")
        if (folder / "galaxydist.db").exists() and (stored := read_trackio(folder).get("long")):
            assert losses(stored).items() <= read_losses(run.path).items()

    push(run)
    assert losses(read_trackio(folder)["long"]) == read_losses(run.path)
    before = [read_table(folder, table) for table in ("metrics", "alerts")]
    assert "0 rows sent" in push(run)
    assert [read_table(folder, table) for table in ("metrics", "alerts")] == before

    # A person deletes a part of the run on the page, or trackio's folder was copied: the next push heals it.
    with sqlite3.connect(folder / "galaxydist.db") as connection:
        connection.execute("DELETE FROM metrics WHERE step BETWEEN 100 AND 200")
    push(run)
    assert losses(read_trackio(folder)["long"]) == read_losses(run.path)


@pytest.mark.multiprocess
@pytest.mark.slow
def test_trackio_shows_validations_events_and_results_and_later_ones_too(tmp_path: Path) -> None:
    run = write_long_run(tmp_path / "runs" / "small", 6, finished=False)
    folder = tmp_path / "elsewhere"
    assert f"dashboard local {tmp_path}/runs --dir {folder}" in push(run, "--dir", str(folder))
    rows = read_trackio(folder)["small"]
    assert [step for step, _ in rows] == [1, 2, 3, 4, 5]  # of step 6 more may come
    assert rows[2][1]["val/recall/round"] == 0.75 and "val/recall/spiral" not in rows[2][1]
    galaxy = rows[2][1]["val/galaxies"]["_value"][1]
    assert galaxy["true class"] == "round" and galaxy["predicted"] == "spiral"
    assert (folder / "media" / galaxy["galaxy"]["file_path"]).read_bytes() == run.galaxy_image(1).read_bytes()
    assert rows[2][1]["val/confusion"]["_value"][0] == {"true class": "round", "round": 3, "spiral": 1}
    assert read_table(folder, "metrics")[0]["timestamp"].startswith("2023-11-14T22:13:21")  # when it was logged

    # The run ends; the figures of its evaluation come later still.
    append_event(run.events_path, Event(1.7e9 + 9, "finish", "done", 6))
    run.write_result({"step": 6, "test/accuracy": 0.5})
    push(run, "--dir", str(folder))
    (run.evaluation_dir / "test-confusion.png").write_bytes(run.galaxy_image(0).read_bytes())
    run.write_result({"step": 6, "test/accuracy": 0.625})
    push(run, "--dir", str(folder))
    rows = read_trackio(folder)["small"]
    assert [step for step, _ in rows] == [1, 2, 3, 4, 5, 6]
    last = rows[-1][1]
    assert last["test/accuracy"] == 0.625 and last["train/loss"] == 1 / 6
    assert (folder / "media" / last["test/confusion"]["file_path"]).is_file()
    assert [line["title"] for line in read_table(folder, "alerts")] == ["requeue", "finish"]
    (config,) = read_table(folder, "configs")
    assert b'"optim.lr":' in config["config"] and b'"result/test/accuracy":0.625' in config["config"]
    assert not list((tmp_path / "runs").glob("trackio"))

    # Of a run that may only be read, all is in trackio's folder.
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    run.path.chmod(0o555)
    done = run_forked(push_twice_as_another_user, run.path, tmp_path / "mine")
    run.path.chmod(0o755)
    assert "small: 6 rows sent" in done.stdout and "small: 0 rows sent" in done.stdout, done.stderr
    assert losses(read_trackio(tmp_path / "mine")["small"]) == losses(rows)
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before
