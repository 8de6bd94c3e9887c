"""Checks of training on an NVIDIA GPU, in under ten minutes: ``python -m tests.gpu.check``.

``--device cpu`` rehearses them with small sizes. The results are written to summary.json after each check, and to summary.md, a
table for docs/benchmarks.md.
"""

import argparse
import dataclasses
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.gpu.correctness import check_numbers, check_resume, check_synchronisation, check_unit_tests
from tests.gpu.rig import Device, Rig, Row, TimeUpError
from tests.gpu.several_ranks import check_failures, check_ranks
from tests.gpu.speed import check_loader, check_memory, check_throughput


@dataclass(frozen=True)
class Check:
    """One check.

    Args:
        name: for ``--only``.
        title: of its rows in the table.
        seconds: deadline.
        run: yields its rows.
    """

    name: str
    title: str
    seconds: float
    run: Callable[[Rig], Iterator[Row]]


# Most seconds for the first process, which imports torch and looks for the card.
START_S = 120.0
# A rehearsal may take this many times as long as a check on a GPU: the cores may be busy.
BUSY = 5
# In order of worth. Each of the two commands of docs/gpu.md ends within nine minutes, even if all its checks need all their time.
CHECKS = (
    Check("tests", "Tests marked gpu", 80, check_unit_tests),
    Check("sync", "Waits of the host", 40, check_synchronisation),
    Check("numbers", "Numbers", 90, check_numbers),
    Check("throughput", "Training speed", 240, check_throughput),
    Check("ranks", "Several ranks", 110, check_ranks),
    Check("resume", "Resumed runs", 70, check_resume),
    Check("failures", "Failing ranks", 110, check_failures),
    Check("memory", "Memory", 80, check_memory),
    Check("loader", "Loader", 50, check_loader),
)


@dataclass
class Summary:
    """The results so far, written after each check.

    Args:
        folder: of summary.json and summary.md.
        device: of the checks.
        machine: the card, the cores and the versions.
    """

    folder: Path
    device: Device
    machine: dict[str, Any]
    checks: list[dict[str, Any]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def named(self, status: str) -> list[str]:
        """Return the names of the checks with a status: ``pass``, ``fail`` or ``not run``."""
        return [check["name"] for check in self.checks if check["status"] == status]

    def add(self, check: Check, rows: Sequence[Row], seconds: float, problem: str, *, was_run: bool = True) -> None:
        """Add the rows of a check, and write the files."""
        failed = problem or any(row.verdict == "fail" for row in rows)
        self.checks.append(
            {
                "name": check.name,
                "title": check.title,
                "status": "not run" if not was_run else "fail" if failed else "pass",
                "seconds": round(seconds, 1),
                "problem": problem,
                "rows": [dataclasses.asdict(row) for row in rows],
            }
        )
        self.write()

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        seconds = round(time.monotonic() - self.started, 1)
        found = {"device": self.device, "machine": self.machine, "seconds": seconds, "checks": self.checks}
        (self.folder / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
        (self.folder / "summary.md").write_text(render(found))


def render(summary: dict[str, Any]) -> str:
    """Return a summary as Markdown, with one line for each row."""
    machine = ", ".join(f"{name} {value}" for name, value in summary["machine"].items())
    lines = [f"{machine}; {summary['seconds']:.0f} s.", "", "| check | result | found | pass mark | |", "|---|---|---|---|---|"]
    for check in summary["checks"]:
        lines += [
            f"| {check['title']} | {row['name']} | {_shown(row['value'])} | {row['wanted']} | {row['verdict']} |"
            for row in check["rows"]
        ]
        if check["problem"]:
            verdict = "not run" if check["status"] == "not run" else "fail"
            lines.append(f"| {check['title']} | {check['problem'].splitlines()[-1].replace('|', '/')} | | | {verdict} |")
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


INTERRUPTED = "interrupted"


def run_check(check: Check, rig: Rig) -> tuple[list[Row], str]:
    """Run one check to its end, its deadline or a signal; return its rows and what went wrong."""
    rows: list[Row] = []
    try:
        rig.left()
        for row in check.run(rig):
            rows.append(row)
            print(f"  {row.verdict:>10}  {row.name}: {_shown(row.value)} {f'({row.wanted})' if row.wanted else ''}", flush=True)
    except TimeUpError as error:
        return rows, f"time is up: {error}".rstrip(": ")
    except KeyboardInterrupt:
        return rows, INTERRUPTED
    except Exception:
        return rows, traceback.format_exc().strip()
    return rows, ""


def run_checks(checks: Sequence[Check], device: Device, out: Path, data_dir: Path, seconds: float) -> Summary:
    """Run the checks in their order, each up to its deadline and all up to ``seconds`` from now, or to Ctrl-C.

    Checks that are not begun by then are in the summary as such.

    Raises:
        SystemExit: there is no GPU for ``device="cuda"``.
    """
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
        rig = Rig(device, Path(scratch) / "start", data_dir, time.monotonic() + START_S)
        summary = Summary(out, device, rig.call(describe_machine))
        if device == "cuda" and summary.machine["card"] == "none":
            sys.exit("torch finds no GPU that it can use (see nvidia-smi); --device cpu rehearses the checks")
        reason = ""
        for check in checks:
            started = time.monotonic()
            reason = reason or ("the time of all checks is over" if started >= end else "")
            if reason:
                print(f"{check.title} ({check.name}): not run, {reason}", flush=True)
                summary.add(check, (), 0.0, reason, was_run=False)
                continue
            print(f"{check.title} ({check.name})", flush=True)
            allowed = check.seconds if device == "cuda" else BUSY * check.seconds
            rig = Rig(device, Path(scratch) / check.name, data_dir, min(started + allowed, end))
            rows, problem = run_check(check, rig)
            if problem:
                print(f"        fail  {problem}", flush=True)
            summary.add(check, rows, time.monotonic() - started, problem)
            if summary.checks[-1]["status"] == "fail":
                keep_errors(rig.folder, out / "errors" / check.name)
            reason = INTERRUPTED if problem == INTERRUPTED else ""
    return summary


def keep_errors(folder: Path, target: Path) -> None:
    """Copy what the processes of a check printed to stderr, before its folder is removed."""
    shutil.rmtree(target, ignore_errors=True)
    for path in folder.rglob("*.err"):
        kept = target / path.relative_to(folder)
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, kept)


def describe_machine() -> dict[str, Any]:
    """Return the card, the cores and the versions, for the head of the table."""
    import torch

    found: dict[str, Any] = {"card": torch.cuda.get_device_name() if torch.cuda.is_available() else "none"}
    found |= {"cores": len(os.sched_getaffinity(0)), "Python": platform.python_version(), "torch": torch.__version__}
    if torch.cuda.is_available():
        found |= {"CUDA": torch.version.cuda, "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}
    return found | {name: version(name) for name in ("timm", "accelerate")}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.check", description="Check training on an NVIDIA GPU.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal with small sizes")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="folder of summary.json and summary.md")
    parser.add_argument("--data-dir", type=Path, help="folder of the data, which is made where it is missing")
    parser.add_argument("--minutes", type=float, default=9.0, help="time of all checks together")
    names = [check.name for check in CHECKS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="CHECK", help=", ".join(names))
    options = parser.parse_args(arguments)
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # torch.cuda.is_available() leaves CUDA alone before a fork
    if options.device == "cuda":  # one card, the first visible one, as a task sees its only card
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    checks = [check for check in CHECKS if check.name in options.only]
    data_dir = options.data_dir or options.out / "data"
    # A machine that is lent ends a command by SIGTERM.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        summary = run_checks(checks, options.device, options.out.absolute(), data_dir.absolute(), 60 * options.minutes)
    finally:
        signal.signal(signal.SIGTERM, before)
    failed, missing = summary.named("fail"), summary.named("not run")
    texts = [f"failed: {', '.join(failed)}"] if failed else []
    texts += [f"not run: {', '.join(missing)} (run them with --only {' '.join(missing)})"] if missing else []
    print("; ".join(texts) or "all checks passed", f"(see {options.out}/summary.md)")
    return 1 if texts else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
