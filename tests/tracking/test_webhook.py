"""Events of real runs, and their alerts at a server on loopback: each once, and at no cost to the training."""

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from galaxydist.errors import EXIT_HUNG
from galaxydist.recipe.resolve import RecipeError, load_recipe
from galaxydist.runs.events import Event, EventLog, read_events
from galaxydist.tracking.webhook import Webhook, find_webhook, post_event
from galaxydist.training.health.anomalies import DataWaits
from tests.helpers.alert_server import SECRET, alert_server, closed_address, silent_server
from tests.helpers.forked_runs import run_forked
from tests.helpers.runs import captured_log, quick_settings, run_here
from tests.helpers.scripts.poisoned_launch import train_poisoned

EVENT = Event(1.0, "hang", "the run hangs", 7)


def kinds(run_dir: Path) -> list[str]:
    return [event.kind for event in read_events(run_dir / "events.jsonl")]


def files_with(text: str, folder: Path) -> list[str]:
    """Names of the files that contain a text."""
    return [path.name for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


@pytest.mark.multiprocess
def test_each_alert_of_a_run_is_posted_once_and_its_address_is_in_no_file(blobs: Path, tmp_path: Path) -> None:
    """A step that is not finite, a loss spike (any loss above the median counts as one) and the end, of a tracked run."""
    run_dir = tmp_path / "run"
    options = {"train__on_nonfinite": "skip", "train__spike_threshold": 1e-6, "train__epochs": 20, "optim__lr": 1e-9}
    options |= {"tracker__name": "wandb", "tracker__mode": "offline"}
    with alert_server() as (address, received):
        settings = quick_settings(blobs, run_dir, tracker__webhook=address, **options)
        done = run_forked(train_poisoned, 0, {4}, settings, environ={"HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert Counter(alert["kind"] for alert in received) == {"nonfinite": 1, "loss_spike": 1, "finish": 1}
    (alert,) = [alert for alert in received if alert["kind"] == "nonfinite"]
    assert alert["run"] == "run" and alert["step"] == 5 and alert["text"] == alert["content"]
    assert alert["text"].startswith("run: nonfinite at step 5: The loss or its gradient is not a number")
    events = read_events(run_dir / "events.jsonl")
    assert [event.kind for event in events] == ["start", *(alert["kind"] for alert in received)]
    assert events[0].details["devices"] == {"CPU": 1} and events[0].details["cores"] >= 1
    assert len({event.details["began"] for event in events}) == 1 and events[0].details["began"] < events[0].time
    assert events[-1].step == 60 and "test accuracy" in events[-1].text
    assert files_with(SECRET, run_dir) == [] and SECRET not in done.stdout + done.stderr


@pytest.mark.multiprocess
@pytest.mark.parametrize("fault", ["hang", "nonfinite"])
def test_end_by_a_fault_is_posted_before_the_process_leaves(fault: str, blobs: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with alert_server() as (address, received):
        settings = quick_settings(blobs, run_dir, train__hang_timeout=2, tracker__webhook=address)
        steps, hang_at = (set[int](), 5) if fault == "hang" else ({5}, None)
        done = run_forked(train_poisoned, 0, steps, settings, hang_at)
    assert done.returncode == (EXIT_HUNG if fault == "hang" else 1), done.stderr
    (alert,) = received
    assert kinds(run_dir) == ["start", alert["kind"]]
    if fault == "hang":
        assert alert["kind"] == "hang" and "behind: rank 0" in alert["text"] and alert["step"] == 5
    else:
        assert alert["kind"] == "failure" and "not a number at step 5 (from 0)" in alert["text"]


def test_failure_before_the_first_step_is_posted_once(blobs: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with alert_server() as (address, received):
        environ: dict[str, str] = {"GALAXYDIST_WEBHOOK": address}
        assert run_here(quick_settings(tmp_path / "missing.json", run_dir), environ) == 2
        assert not run_dir.exists()
        (run_dir / "run.json").mkdir(parents=True)  # it is written after the model was built
        with pytest.raises(IsADirectoryError):
            run_here(quick_settings(blobs, run_dir), environ)
    early, later = received
    assert early["kind"] == "failure" and early["text"].startswith("run: failure: ") and "missing.json" in early["text"]
    assert later["kind"] == "failure" and kinds(run_dir) == ["failure"]


def test_stop_and_restart_are_told_with_the_steps_that_are_taken_again(blobs: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert run_here(quick_settings(blobs, run_dir, train__epochs=4)) == 0
    (run_dir / "result.json").unlink()
    newest = sorted((run_dir / "checkpoints").glob("step-*"))[-1]
    newest.rename(run_dir / "set-aside")
    assert run_here(quick_settings(blobs, run_dir, train__epochs=4)) == 0
    first, _, again, _ = read_events(run_dir / "events.jsonl")
    assert first.step == 0 and first.details["cut_steps"] == 0
    assert again.step == 9 and again.details["cut_steps"] == 3
    assert again.text.startswith("continues from step 9, 3 logged steps again: 1 process on ")
    assert run_here(quick_settings(blobs, run_dir, train__epochs=4)) == 0
    assert kinds(run_dir) == ["start", "finish"] * 2, "nothing happens to a finished run"


def test_dead_server_costs_a_run_one_warning(blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environ: dict[str, str] = {"GALAXYDIST_WEBHOOK": closed_address()}
    assert run_here(quick_settings(blobs, tmp_path / "run", train__epochs=1), environ) == 0
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "alert" in line]
    assert "Connection refused" in warning and "127.0.0.1" not in warning
    assert kinds(tmp_path / "run") == ["start", "finish"]


def test_nobody_waits_for_a_server_that_never_answers() -> None:
    with silent_server() as address, captured_log() as messages:
        hook = Webhook(address, "run")
        started = time.monotonic()
        for _ in range(100):
            hook.send(EVENT)
        sent = time.monotonic()
        hook.close(0.3)
        assert sent - started < 0.2 and 0.3 <= time.monotonic() - sent < 2
        assert [text for text in messages if "too many alerts" in text] == messages
        assert post_event(address, "run", EVENT, timeout_s=0.1) in ("timed out", "TimeoutError")


def test_refusal_is_told_without_the_address() -> None:
    with alert_server(status=404) as (address, received):
        assert post_event(address, "run", EVENT) == "the server answers 404"
    assert received[0]["text"] == "run: hang at step 7: the run hangs"
    assert SECRET not in post_event(f"{address}\n", "run", EVENT)


def test_wrong_address_is_refused_without_being_shown(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"model: {{name: custom_cnn}}\ntracker: {{webhook: 'ftp://example.org{SECRET}'}}\n")
    for arguments in ([f"recipe={recipe}"], ["recipe=custom_cnn", f"tracker.webhook=example.org{SECRET}"]):
        with pytest.raises(RecipeError, match=r"tracker\.webhook=\(hidden\): must be an address like https://") as caught:
            load_recipe(arguments)
        assert SECRET not in str(caught.value)
    sound = f"tracker.webhook=https://example.org{SECRET}"
    with pytest.raises(RecipeError, match="given twice") as caught:
        load_recipe(["recipe=custom_cnn", sound, sound])
    assert SECRET not in str(caught.value)
    recipe_of = load_recipe(["recipe=custom_cnn", sound]).recipe
    assert recipe_of.tracker.webhook == sound.partition("=")[2] and SECRET not in repr(recipe_of)
    # The recipe goes before the environment, in which a wrong address is left out.
    assert find_webhook(recipe_of.tracker.webhook, {"GALAXYDIST_WEBHOOK": "https://other.example.org"}) == sound.partition("=")[2]
    assert find_webhook(None, {"GALAXYDIST_WEBHOOK": f"example.org{SECRET}"}) is None


def test_event_that_cannot_be_written_is_told_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").mkdir()
    told: list[Event] = []
    with captured_log() as messages:
        events = EventLog(tmp_path / "events.jsonl", tell=told.append)
        events.write("hang", "first line\nsecond line", 3)
        events.write("stop", "", 3)
    assert [event.text for event in told] == ["first line"] and len(messages) == 1
    assert json.dumps(told[0].details) == "{}"


def test_alert_does_not_wait_for_a_file_system_that_hangs(tmp_path: Path) -> None:
    is_written: list[bool] = []
    events = EventLog(tmp_path / "events.jsonl", tell=lambda _: is_written.append((tmp_path / "events.jsonl").exists()))
    events.write("hang", "the run hangs")
    assert is_written == [False] and kinds(tmp_path) == ["hang"]


def test_waiting_for_data_is_told_once_after_a_minute() -> None:
    def told(shares: list[float], limit: float = 0.5, line_s: float = 25.0) -> list[int]:
        clock: Any = iter(range(10**6))
        waits = DataWaits(limit, lambda: line_s * next(clock))
        return [number for number, share in enumerate(shares) if waits.update(share)]

    assert told([0.9] * 10) == [3]
    assert told([0.9, 0.9, 0.9, 0.1, 0.9, 0.9, 0.9, 0.9]) == [7]
    assert told([0.5] * 10) == [] and told([1.0] * 10, limit=0.0) == []
    assert told([0.9] * 3, line_s=120.0) == [1]
