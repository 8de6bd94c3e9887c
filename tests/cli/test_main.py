"""The command line: help at once, one message for each error, exit codes, and closed pipes."""

import argparse
import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from galaxydist.cli import main as cli
from galaxydist.version import __version__

PROGRAM = [sys.executable, "-m", "galaxydist"]
HEAVY = [
    *(
        "torch",
        "torchvision",
        "timm",
        "wandb",
        "accelerate",
        "matplotlib",
        "sklearn",
        "scipy",
        "h5py",
        "numpy",
        "pydantic",
        "yaml",
    ),
    *("PIL", "webdataset", "tqdm"),
]


def find_commands(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> list[str]:
    """All commands, such as ``data fetch``."""
    inside = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not inside:
        return [" ".join(words)]
    return [found for name, one in inside[0].choices.items() for found in find_commands(one, (*words, name))]


COMMANDS = find_commands(cli.build_parser())


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True, check=False, cwd=cwd, timeout=120)


def test_help_imports_no_heavy_library_and_takes_under_half_a_second_of_cpu() -> None:
    code = f"""
import sys
from galaxydist.cli.main import main
try:
    main(["--help"])
except SystemExit as end:
    assert end.code == 0
heavy = [name for name in {HEAVY!r} if name in sys.modules]
assert not heavy, heavy
"""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        assert "usage: galaxydist" in done.stdout
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5, "of a processor, of three tries, since other programs may slow one down"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_prints_its_usage_with_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([*command.split(), "--help"])
    assert end.value.code == 0
    assert f"usage: galaxydist {command}" in capsys.readouterr().out


def test_version_option_prints_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"galaxydist {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["fly"], "invalid choice: 'fly'"),
        (["trian"], "did you mean train?"),
        (["shard"], "did you mean data shard?"),
        (["data", "chekc"], "did you mean check?"),
        (["submit", "recipe=demo", "--dry-rnu", "cluster=local"], "unrecognized arguments: --dry-rnu; did you mean --dry-run?"),
        (["data", "check", "--data-dirr=x"], "did you mean --data-dir?"),
        (["data", "shard", "--fold", "4/3"], "not K/N"),
        (["predict", "runs/a", "", "-o", "a.csv"], "an argument is empty: is a variable of the shell not set?"),
        (["data", "shard", "--quality", "101"], "more than 100"),
        (["data", "shard", "--workers", "0"], "less than 1"),
        (["data", "shard", "--enc", "png"], "unrecognized arguments: --enc; did you mean --encoding?"),
        (["data", "simulate", "--num-galaxies", "many"], "not a whole number"),
        (["data", "simulate", "--num-galaxies", "9" * 17], "more than 100000000"),
        (["data", "shard", "--image-size", "99999"], "more than 4096"),
        (["data", "simulate", "--seed", "-1"], "less than 0"),
    ],
)
def test_bad_usage_exits_with_2_and_a_message(arguments: Sequence[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("command", ["", "data", "cluster"])
def test_a_command_without_its_subcommand_shows_its_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command.split()) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: galaxydist {command}".rstrip()) and "COMMAND" in out


@pytest.mark.parametrize(
    ("words", "name", "expected"),
    [
        ("submit recipe=demo --dry-run cluster=c2", "arguments", ["recipe=demo", "cluster=c2"]),
        ("plan --nodes 2 vit --json optim.lr=1 --shards 3", "recipe", ["vit", "optim.lr=1"]),
        ("evaluate --split val runs/a --tta d4 data.variant=balanced", "target", ["runs/a", "data.variant=balanced"]),
        ("sweep --dry-run FILE --yes cluster=c2", "arguments", ["cluster=c2"]),
    ],
)
def test_options_are_accepted_between_positional_arguments(words: str, name: str, expected: list[str]) -> None:
    assert getattr(cli.build_parser().parse_args(words.split()), name) == expected


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("galaxydist dat", "data"),
        ("galaxydist submit recipe=demo --dr", "--dry-run"),
        ("galaxydist train recipe=vit_s", "vit_scratch"),
        ("galaxydist train vit train.prec", "train.precision="),
        ("galaxydist submit vit cluster=lo", "local"),
        ("galaxydist train vit train.precision=b", "bf16"),
    ],
)
def test_shell_completion_completes_commands_options_recipes_and_keys(line: str, word: str, tmp_path: Path) -> None:
    """As bash asks: argcomplete's variables in the environment, the answers in a file."""
    answers = tmp_path / "answers"
    environ = {
        "_ARGCOMPLETE": "1",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "_ARGCOMPLETE_COMP_WORDBREAKS": " \t\"'><=;|&(:",
    }
    environ |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(answers), "_ARGCOMPLETE_SUPPRESS_SPACE": "1"}
    subprocess.run(PROGRAM, env={**os.environ, **environ}, check=True, timeout=120)
    assert answers.read_text().split("\v") == [word]
    assert "galaxydist" in run("completion", "bash").stdout


def test_a_user_s_error_is_one_message_without_traceback(tmp_path: Path) -> None:
    done = run("recipes", "vitt", "optim.lrr=1", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("galaxydist: error: 2 problems in the recipe:\n")
    assert done.stderr.count("galaxydist: error") == 1 and "Traceback" not in done.stderr
    assert "did you mean vit?" in done.stderr and "did you mean optim.lr?" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "shard.tar"), 2, "no space left: No space left on device (shard.tar)"),
        (PermissionError(errno.EACCES, "Permission denied", "/data"), 2, "not allowed: Permission denied (/data)"),
        (FileExistsError(errno.EEXIST, "File exists", "a.csv"), 2, "a.csv is in the way (File exists)"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "aaa"), 2, "aaa: File name too long; give another name"),
        # Nothing can be created in /proc, and mkdir and open say that it does not exist.
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "/proc/x"),
            2,
            "not allowed: No such file or directory (/pr",
        ),
    ],
)
def test_interrupt_full_disk_and_permission_errors_have_exit_codes_and_messages(
    error: BaseException, code: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr("galaxydist.cli.recipes.print_files", fail)
    assert cli.main(["recipes"]) == code
    assert text in capsys.readouterr().err


def test_unexpected_os_error_is_raised_with_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for error in (OSError(errno.EIO, "a disk that fails"), FileNotFoundError(errno.ENOENT, "gone", str(tmp_path / "gone"))):

        def fail(_: object, error: OSError = error) -> None:
            raise error

        monkeypatch.setattr("galaxydist.cli.recipes.print_files", fail)
        with pytest.raises(OSError, match=error.strerror):
            cli.main(["recipes"])


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("weights save runs/a mine.csv", "mine.csv: weights are a safetensors file; name it like mine.safetensors"),
        ("data shard --unlabelled --classes a,b", "--unlabelled and --classes a,b: galaxies without labels have no classes"),
        ("bench folds --real images --recipe small --minutes 3", "--minutes 3 and --recipe small: a recipe has its own length"),
    ],
)
def test_options_that_would_be_ignored_or_destroy_something_are_refused(
    words: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words.split()) == 2
    assert text in capsys.readouterr().err


def test_full_disk_behind_stdout_exits_with_2_without_traceback() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run([*PROGRAM, "recipes"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert "no space left" in done.stderr and "Traceback" not in done.stderr


def test_closed_stdout_pipe_exits_without_error_message() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*PROGRAM, "recipes"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.returncode == cli.EXIT_BROKEN_PIPE
    assert done.stderr == ""


def test_closed_standard_streams_do_not_change_the_exit_code() -> None:
    command = 'exec "$0" "$@" <&- >&- 2>&-'
    assert subprocess.run(["bash", "-c", command, *PROGRAM, "recipes"], check=False).returncode == 0


def test_ctrl_c_ends_with_130_and_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "hdf5" / "simulated.h5"
    process = subprocess.Popen(
        [*PROGRAM, "data", "simulate", "--num-galaxies", "5000", "--data-dir", str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while not _bytes_begun(target.parent) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    time.sleep(0.5)  # into the drawing
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    assert process.stderr is not None and process.stderr.readline() == "galaxydist: interrupted\n"
    os.killpg(process.pid, signal.SIGINT)  # once more, while Python ends
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 130 and stderr == ""
    assert list(target.parent.iterdir()) == []


def _bytes_begun(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob(".*.partial"))
