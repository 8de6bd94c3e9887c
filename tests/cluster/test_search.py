"""Searches: their files, the values of trials, and the study that many processes share, also after one was killed."""

import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galaxydist.cluster.search.search_files import SearchRecord, read_trial, trial_dir, write_trial
from galaxydist.cluster.search.search_space import Choices, Interval, draw
from galaxydist.cluster.search.search_study import JOURNAL_NAME, STUDY_NAME, JournalLock, SearchStudy
from galaxydist.cluster.search.trial import _start, settle
from galaxydist.cluster.search.trial_runs import plan_search
from galaxydist.cluster.sweep import SweepError, SweepFile, expand, read_sweep, resolve
from galaxydist.errors import UserError
from galaxydist.recipe.resolve import ResolvedRecipe
from galaxydist.runs.folder import RunFolder

SPACE = {
    "optim.lr": Interval(1e-4, 1e-1, log=True),
    "model.width": Interval(8, 64, log=True, is_int=True),
    "train.sync_batchnorm": Choices((True, False)),
}
SEARCH = """root: {folder}/runs
set: {{recipe: custom_cnn}}
search:
  optim.lr: {{low: 1e-4, high: 1e-2, log: true}}
  model: {{width: [16, 32, 64]}}
  optim.weight_decay: {{low: 0, high: 1}}
method: random
trials: 3
seed: 5
"""


def make_record(method: str = "tpe", prune: str | None = "asha", metric: str = "accuracy") -> SearchRecord:
    return SearchRecord(SPACE, method, prune, 0, metric, {"train.epochs": 12})  # type: ignore[arg-type]


def read(folder: Path, text: str) -> SweepFile:
    path = folder / "tried.yaml"
    path.write_text(text)
    return read_sweep(path)


def test_search_file_gives_a_space_and_its_corners(tmp_path: Path) -> None:
    sweep = read(tmp_path, SEARCH.format(folder=tmp_path))
    search = sweep.search
    assert search is not None and (search.method, search.trials, search.prune, search.seed) == ("random", 3, None, 5)
    assert search.space == {
        "optim.lr": Interval(1e-4, 1e-2, log=True),
        "model.width": Choices((16, 32, 64)),
        "optim.weight_decay": Interval(0, 1),  # numbers, since the key takes them
    }
    corners = [point.label for point in expand(sweep)]
    assert corners[:2] == [
        "optim.lr=0.0001 model.width=16 optim.weight_decay=0",
        "optim.lr=0.01 model.width=64 optim.weight_decay=1",
    ]
    assert len(corners) == 6
    runs = plan_search(sweep, resolve(sweep)).runs
    assert [run.name for run in runs] == ["trial-000", "trial-001", "trial-002"]
    assert runs[2].arguments == ("recipe=custom_cnn", f"run.dir={tmp_path}/runs/trial-002")


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("search: {optim.lr: {low: 2, high: 1}}", 2, "optim.lr: low=2 must be less than high=1"),
        ("search: {optim.lr: {low: 0, high: 1, log: true}}", 2, "optim.lr: low=0 must be more than 0 with log: true"),
        ("search: {optim.lr: {low: 1e-4, hi: 1}}", 2, "optim.lr: an interval has low, high and log, not hi"),
        ("search: {optim.lr: {low: 1e-4}}", 2, "optim.lr: low=0.0001, high=null: both must be numbers"),
        ("search: {optim.lr: 1}", 2, "optim.lr=1: write a list of values, like [1], or {low: ..., high: ...}"),
        ("search: {seed: [0, 1, 0]}", 2, "seed: 0 is given twice; keep one"),
        ("search: {recipe: [vit, vgg16]}", 2, "recipe: all trials have the same recipe; write recipe: NAME under set"),
        ("search: {train.log_every: [1, 2]}", 2, "train.log_every: does not change a run's numbers; write it under set"),
        ("search: {train.epochs: [1, 2]}", 2, "train.epochs: is in set too (line 1); keep one"),
        ("search: 5", 2, "search=5: must be a mapping of keys to values"),
        ("search: {}", 2, "search: has no keys; write some like optim.lr: {low: 1e-4, high: 1e-2, log: true}"),
        ("search: {seed: [0, 1]}\ngrid: {model.width: [8]}", 2, "search: is in place of grid; keep one, or write two sweeps"),
        ("search: {seed: [0, 1]}\nmethod: best", 3, "method=best: must be random or tpe"),
        ("search: {seed: [0, 1]}\nprune: hyperband", 3, "prune=hyperband: must be median or asha"),
        ("search: {seed: [0, 1]}\ntrials: 0", 3, "trials=0: must be a whole number from 1 to 100000"),
        ("search: {seed: [0, 1]}\ntrials: 1000000000", 3, "trials=1000000000: must be a whole number from 1 to 100000"),
        ("grid: {seed: [0, 1]}\ntrials: 3", 3, "trials: belongs to a search; write search: with the keys and values to try"),
    ],
)
def test_wrong_search_is_refused_with_its_line(tmp_path: Path, text: str, line: int, said: str) -> None:
    lines = "set: {recipe: custom_cnn, train.epochs: 2}\n" + text + "\n"
    if "search:" in text:
        lines += "".join(extra for extra in ("method: tpe\n", "trials: 4\n") if extra[:6] not in text)
    with pytest.raises(SweepError) as caught:
        read(tmp_path, lines)
    ((origin, problem),) = caught.value.problems
    assert origin == f"{tmp_path}/tried.yaml:{line}" and problem.startswith(said)


def test_search_with_an_invalid_corner_is_refused_with_the_line_of_its_key(tmp_path: Path) -> None:
    text = SEARCH.format(folder=tmp_path).replace("[16, 32, 64]", "[16, 1024]").replace("optim.weight_decay", "optim.beta2")
    with pytest.raises(SweepError) as caught:
        resolve(read(tmp_path, text))
    shown = {origin.rpartition(":")[2]: said for origin, said in caught.value.problems}
    assert shown["5"].startswith("model.width=1024: must be at most 512") and shown["6"].startswith("optim.beta2=1: must be less")


def test_search_continues_with_more_trials_but_not_with_another_space(tmp_path: Path) -> None:
    text = SEARCH.format(folder=tmp_path)
    first = read(tmp_path, text)
    search = plan_search(first, resolve(first))
    search.open_study()
    write_trial(trial_dir(search.root, 1), {"optim.lr": 0.005, "model.width": 64, "optim.weight_decay": 0.25})
    more = read(tmp_path, text.replace("trials: 3", "trials: 5"))
    runs = plan_search(more, resolve(more)).runs
    assert [run.label for run in runs] == ["", "optim.lr=0.005 model.width=64 optim.weight_decay=0.25", "", "", ""]
    assert runs[1].resolved.recipe.model.width == 64
    assert runs[1].resolved.recipe.run.dir == trial_dir(search.root, 1)
    for old, new in (
        ("high: 1e-2", "high: 1e-1"),
        ("recipe: custom_cnn", "recipe: custom_cnn, train.epochs: 3"),
        ("d: 5", "d: 6"),
    ):
        other = read(tmp_path, text.replace(old, new))
        with pytest.raises(SweepError, match=r"was started with other values of (optim\.lr|train\.epochs|seed):"):
            plan_search(other, resolve(other))


def test_trial_with_values_that_are_not_valid_does_not_keep_the_others_from_running(tmp_path: Path) -> None:
    text = SEARCH.format(folder=tmp_path).replace("set: {recipe: custom_cnn}", "set: {recipe: vit_scratch}")
    text = text.replace("model: {width: [16, 32, 64]}", "data.image_size: {low: 32, high: 64}")
    sweep = read(tmp_path, text)
    root = plan_search(sweep, resolve(sweep)).root
    for number, size in enumerate((40, 48)):
        write_trial(trial_dir(root, number), {"optim.lr": 0.005, "data.image_size": size, "optim.weight_decay": 0.25})
    wrong, right, new = plan_search(sweep, resolve(sweep)).runs
    assert "data.image_size=40" in wrong.label and wrong.resolved.recipe.run.dir == trial_dir(root, 0)
    assert right.resolved.recipe.data.image_size == 48 and new.label == ""

    def check(resolved: ResolvedRecipe) -> None:
        if resolved.recipe.run.dir == right.run_dir:
            raise UserError("other shards")

    with pytest.raises(SweepError, match=r"trial-001: other shards"):
        plan_search(sweep, resolve(sweep), check=check)
    RunFolder(right.run_dir).write_failure("bad_input", None, "too many pixels")
    assert len(plan_search(sweep, resolve(sweep), check=check).runs) == 3


@given(st.integers(0, 2**40), st.integers(0, 10_000))
def test_random_values_lie_in_the_space_and_depend_on_seed_and_number_alone(seed: int, number: int) -> None:
    values = draw(SPACE, seed, number)
    assert 1e-4 <= values["optim.lr"] <= 1e-1
    assert values["model.width"] in range(8, 65) and isinstance(values["train.sync_batchnorm"], bool)
    assert draw({"optim.lr": SPACE["optim.lr"]}, seed, number) == {"optim.lr": values["optim.lr"]}


def test_search_of_an_earlier_version_lacks_keys_that_were_added_later(tmp_path: Path) -> None:
    sweep = read(tmp_path, SEARCH.format(folder=tmp_path))
    search = plan_search(sweep, resolve(sweep))
    base = {key: value for key, value in search.record.base.items() if key != "train.deterministic"}
    replace(search.record, base=base).write(search.root)
    assert len(plan_search(sweep, resolve(sweep)).runs) == 3


def test_search_without_optuna_is_refused_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = read(tmp_path, SEARCH.format(folder=tmp_path))
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"pip install 'galaxydist\[track\]'"):
        plan_search(sweep, resolve(sweep))
    assert not (tmp_path / "runs").exists()


def test_searched_key_on_the_command_line_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match=r"command line: optim\.lr=0\.1: optim\.lr is searched"):
        resolve(read(tmp_path, SEARCH.format(folder=tmp_path)), ["optim.lr=0.1"])


def test_random_values_stay_the_same_in_later_versions() -> None:
    assert [draw(SPACE, 0, number)["optim.lr"] for number in range(3)] == GOLDEN_RATES
    widths = [draw(SPACE, 1, number)["model.width"] for number in range(2000)]
    assert {*widths} == {*range(8, 65)} and 800 < sum(width < 23 for width in widths) < 1200  # evenly on a logarithmic scale


GOLDEN_RATES = [0.000893042, 0.00301964, 0.0332146]


def test_trial_keeps_its_values_and_reports_an_epoch_once(tmp_path: Path) -> None:
    record = make_record()
    values = SearchStudy(tmp_path, record, 7).start(7, None)
    again = SearchStudy(tmp_path, record, 7)  # after a kill before the values were written
    assert again.start(7, None) == values and again.running() == [7]
    assert not again.should_prune(7, 1, 0.5)
    length = (tmp_path / JOURNAL_NAME).stat().st_size
    assert not SearchStudy(tmp_path, record, 7).should_prune(7, 1, 0.5)
    assert (tmp_path / JOURNAL_NAME).stat().st_size == length
    other = SearchStudy(tmp_path, record, 8)
    other.start(8, None)
    assert other.should_prune(8, 1, 0.25)
    assert SearchStudy(tmp_path, record, 8).should_prune(8, 2, 0.9)  # it was killed before it could end


def test_trial_that_was_taken_for_failed_is_compared_as_before(tmp_path: Path) -> None:
    record = make_record()
    study = SearchStudy(tmp_path, record)
    values = [study.start(number, None) for number in range(2)]
    assert not any(study.should_prune(number, 1, 0.5) for number in range(2))
    study.end(1, "failed")
    assert study.start(1, None) == values[1]
    assert not study.should_prune(1, 2, 0.1)  # it has passed the first comparison, and the next is after 4 epochs
    assert not study.should_prune(0, 4, 0.5) and study.should_prune(1, 4, 0.1)


def test_best_trial_is_the_smallest_loss_and_a_trial_taken_for_failed_still_counts(tmp_path: Path) -> None:
    study = SearchStudy(tmp_path, make_record("random", None, "loss"))
    values = [study.start(number, None) for number in range(3)]
    assert values == [draw(SPACE, 0, number) for number in range(3)]
    study.end(0, "complete", 0.5)
    study.end(1, "failed")
    assert study.best() == (0, 0.5, values[0]) and study.running() == [2]
    study.end(1, "complete", 0.25)  # its job was requeued
    study.end(1, "failed")
    journal = (tmp_path / JOURNAL_NAME).read_bytes()
    assert study.start(1, values[1]) == values[1]  # by a job that makes a missing evaluation
    assert (tmp_path / JOURNAL_NAME).read_bytes() == journal
    assert study.best() == (1, 0.25, values[1])


def test_settling_tells_the_ends_that_trials_could_not_tell(tmp_path: Path) -> None:
    study = SearchStudy(tmp_path, make_record())
    for number in range(3):
        study.start(number, None)
    folder = RunFolder(trial_dir(tmp_path, 0))
    folder.create()
    folder.write_pruned(step=3, epoch=1, metric="accuracy", value=0.5)
    settle(study, tmp_path, lambda _: {}, leave_out=2)
    assert study.running() == [2] and study.best() is None
    assert read_trial(folder.path) is None

    values = study.start(0, None)
    write_trial(folder.path, values)
    (tmp_path / JOURNAL_NAME).unlink()  # as if its disk had failed: ended trials are read from their folders
    study = SearchStudy(tmp_path, make_record())
    settle(study, tmp_path, lambda _: {})
    assert study.known() == {0} and study.running() == [] and study.start(0, None) == values


def test_two_jobs_that_start_a_trial_at_the_same_time_start_it_once(tmp_path: Path) -> None:
    import optuna

    record, both = make_record("random"), threading.Barrier(2)
    study = SearchStudy(tmp_path, record)

    def start(number: int) -> None:
        both.wait(60)
        _start(trial_dir(tmp_path, number), record)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(start, (0, 0, 1, 1, 2, 2)))
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / JOURNAL_NAME)))
    assert len(optuna.load_study(study_name=STUDY_NAME, storage=storage).trials) == 3 == len(study.running())


def hold_lock(path: Path, ready: int) -> None:
    JournalLock(path).acquire()
    os.write(ready, b"1")
    signal.pause()


def start_trial(root: Path, record: SearchRecord, number: int, sender: "multiprocessing.connection.Connection") -> None:
    sender.send(SearchStudy(root, record, number, grace_s=3).start(number, None))


@pytest.mark.multiprocess
@pytest.mark.slow
def test_trials_that_start_together_go_on_after_a_holder_of_the_lock_was_killed(tmp_path: Path) -> None:
    record = make_record()
    SearchStudy(tmp_path, record).start(0, None)
    journal = tmp_path / JOURNAL_NAME
    context = multiprocessing.get_context("fork")
    read_end, write_end = os.pipe()
    holder = context.Process(target=hold_lock, args=(journal, write_end))
    holder.start()
    assert os.read(read_end, 1) == b"1"
    with journal.open("ab") as file:  # what it had written so far
        file.write(b'{"op_code":5,"worker_id":"')
    holder.kill()
    holder.join()
    pipes = [context.Pipe(duplex=False) for _ in range(3)]
    trials = [
        context.Process(target=start_trial, args=(tmp_path, record, number, pipe[1])) for number, pipe in enumerate(pipes, 1)
    ]
    for trial in trials:
        trial.start()
    for trial in trials:
        trial.join(120)
    os.close(read_end)
    os.close(write_end)
    assert [trial.exitcode for trial in trials] == [0, 0, 0]
    study = SearchStudy(tmp_path, record)
    assert sorted(study.running()) == [0, 1, 2, 3]
    assert [study.start(number, None) for number in (1, 2, 3)] == [pipe[0].recv() for pipe in pipes]
