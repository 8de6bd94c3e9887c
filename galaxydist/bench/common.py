"""Output, times and processes of the benchmarks. Import-light: no torch."""

import json
import math
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from galaxydist.errors import UserError
from galaxydist.log import results

POLL_S, GRACE_S = 0.05, 20.0


@dataclass(frozen=True)
class Lap:
    """Seconds of wall-clock time, and of CPU time of the process, which other work on the machine changes less."""

    wall_s: float
    cpu_s: float

    def __sub__(self, other: "Lap") -> "Lap":
        return Lap(self.wall_s - other.wall_s, self.cpu_s - other.cpu_s)


def show(text: str) -> None:
    """Print a line of a benchmark's result at once."""
    results.info(text)


def show_json(*found: Mapping[str, Any]) -> None:
    """Print a line of JSON for each result, with floats rounded to the four digits that a measurement has."""
    for one in found:
        show(json.dumps(_rounded(one)))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Format measured values, as ``median (least ... greatest)``."""
    middle, least, greatest = (f"{value:,.{digits}f}" for value in (median(values), min(values), max(values)))
    return f"{middle} ({least} ... {greatest})"


def run_together(commands: Sequence[Sequence[str]], environs: Sequence[Mapping[str, str]]) -> list[Any]:
    """Run several processes at the same time; return the JSON of the last line that each prints, None without output.

    If one fails, the others have ``GRACE_S`` seconds to end before they are killed.

    Args:
        commands: one per process.
        environs: the environment variables of each.

    Raises:
        UserError: a process failed; it has printed the reason.
    """
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(environ))
        for command, environ in zip(commands, environs, strict=True)
    ]
    deadline = math.inf
    try:
        while None in (codes := [process.poll() for process in processes]) and time.monotonic() < deadline:
            if any(codes):
                deadline = min(deadline, time.monotonic() + GRACE_S)
            time.sleep(POLL_S)
        if codes != [0] * len(processes):
            raise UserError(f"one of {len(processes)} measuring processes failed: see above")
        outputs = [process.communicate()[0].splitlines() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [json.loads(lines[-1]) if lines else None for lines in outputs]
