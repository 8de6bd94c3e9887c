"""The ``sh`` blocks of Markdown pages: found, parsed, and run in a shell whose ``galaxydist`` starts at once on tiny settings."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.forked_runs import run_forked, train

NOT_RUN = re.compile(r"<!-- not run: (.+) -->\n$")
# Appended to the recipe of each command that trains, unless it gives the key itself.
TINY = {
    "data.image_size": "32",
    "data.num_streams": "8",
    "model.width": "4",
    "train.epochs": "1",
    "train.batch_size": "12",
    "eval.figures": "false",
}
NUM_GALAXIES = "100"
# A client that sends its arguments to the test and prints the answer: a new interpreter with torch would need five seconds.
CLIENT = """
import json, os, socket, sys
with socket.create_connection(("127.0.0.1", {port})) as connection, connection.makefile("rw") as file:
    print(json.dumps([{name!r}, sys.argv[1:], os.getcwd(), dict(os.environ)]), file=file, flush=True)
    code, out, err = json.loads(file.readline())
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
"""


@dataclass(frozen=True)
class Block:
    """A ``sh`` block.

    Args:
        text: its lines.
        not_run: the reason of the comment before it; None if it is run.
    """

    text: str
    not_run: str | None


def read_blocks(page: Path) -> list[Block]:
    """Return the ``sh`` blocks of a page."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in re.finditer(r"^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        reason = NOT_RUN.search(text[: match.start()])
        found.append(Block(match[1], reason[1] if reason else None))
    return found


def commands(block: Block) -> Iterator[list[str]]:
    """Yield the words of each ``galaxydist`` and ``launch.py`` command of a block, without what stands before and after it."""
    text = re.sub(r" +#.*", "", block.text.replace("\\\n", " ").replace("$r;", "vit ;"))
    words = shlex.shlex(text, posix=True, punctuation_chars="();<>|&\n")
    words.whitespace, words.whitespace_split, words.commenters = " \t\r", True, ""
    command: list[str] = []
    for word in (*words, "\n"):
        if not set(word) <= set("();<>|&\n"):
            command.append(word)
            continue
        start = next((at for at, word in enumerate(command) if word in ("galaxydist", "launch.py")), None)
        if start is not None:
            yield command[start:]
        command = []


def run_pages(pages: list[Path], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the blocks of pages one after the other in one shell, in a folder; the first command that fails ends it."""
    blocks = [block.text for page in pages for block in read_blocks(page) if block.not_run is None]
    with socket.create_server(("127.0.0.1", 0)) as server, (folder / "printed.txt").open("w+", encoding="utf-8") as printed:
        server.settimeout(0.1)
        clients = folder / "clients"
        clients.mkdir()
        for name in ("galaxydist", "accelerate"):
            client = clients / f"{name}.py"
            client.write_text(CLIENT.format(port=server.getsockname()[1], name=name), encoding="utf-8")
            command = shlex.join([sys.executable, "-IS", str(client)])  # a path in a #! line may have no space
            (clients / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
            (clients / name).chmod(0o755)
        path = os.pathsep.join([str(clients), str(Path(sys.executable).parent), os.environ["PATH"]])
        script = "set -euxo pipefail\n" + "\n".join(blocks)
        process = subprocess.Popen(
            ["bash", "-c", script], cwd=folder, env=os.environ | {"PATH": path}, stdout=printed, stderr=subprocess.STDOUT
        )
        try:
            while process.poll() is None:
                with suppress(TimeoutError):
                    _answer(server.accept()[0])
        finally:
            process.kill()
            process.wait()
        printed.seek(0)
        return subprocess.CompletedProcess(process.args, process.returncode, printed.read())


def _answer(connection: socket.socket) -> None:
    with connection, connection.makefile("rw") as file:
        name, words, folder, environ = json.loads(file.readline())
        done = _run(name, words, folder, environ)
        print(json.dumps([done.returncode, done.stdout, done.stderr]), file=file, flush=True)


def _run(name: str, words: list[str], folder: str, environ: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    if name == "accelerate":
        assert words[:2] == ["launch", "launch.py"], words
        words = ["train", *words[2:]]
    size = 1
    if "--processes" in words:
        at = words.index("--processes")
        size = int(words[at + 1])
        del words[at : at + 2]
    if "--num-galaxies" in words:
        words[words.index("--num-galaxies") + 1] = NUM_GALAXIES
    if words[0] == "train":
        words = [
            *words[1:],
            *(f"{key}={value}" for key, value in TINY.items() if not any(w.startswith(f"{key}=") for w in words)),
        ]
        return run_forked(train_in, folder, words, size=size, environ=environ)
    return run_forked(call_in, folder, words, environ=environ)


def train_in(folder: str, settings: list[str]) -> int:
    """Train as ``launch.py`` does, in a folder."""
    os.chdir(folder)
    return train(settings)


def call_in(folder: str, words: list[str]) -> int:
    """Run ``galaxydist`` in a folder."""
    from galaxydist.cli.main import main

    os.chdir(folder)
    return main(words)
