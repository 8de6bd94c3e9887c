"""A trace of a few steps by torch's profiler, for chrome://tracing or ui.perfetto.dev."""

import contextlib
import gzip
import logging
import re
import shutil
from pathlib import Path
from typing import Any

from galaxydist.atomic_files import rename
from galaxydist.errors import EveryRankError

logger = logging.getLogger(__name__)

# Larger traces are packed; the viewers open both.
LARGEST_PLAIN = 32_000_000


def parse_steps(text: str) -> range:
    """The steps of ``train.profile``: ``10-20`` is the eleven updates from number 10 to number 20, ``10`` is one; the first is 1.

    Raises:
        EveryRankError: it is neither.
    """
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
    steps = range(int(found[1]), int(found[2] or found[1]) + 1) if found else range(0)
    if not steps or steps.start < 1:
        raise EveryRankError(f"train.profile={text}: give the first and the last step to trace, such as 10-20, counted from 1")
    return steps


class StepProfiler:
    """A context around the loop, which traces some of its steps on rank 0 and does nothing at all otherwise.

    Args:
        steps: ``train.profile``, or None.
        out_dir: the run folder; the trace is ``profile/steps-10-20.json`` in it (``.json.gz`` if large).
        rank: of this process.
        start_step: steps done before the loop begins.

    Raises:
        EveryRankError: ``steps`` cannot be read.
    """

    def __init__(self, steps: str | None, out_dir: Path, rank: int, *, start_step: int = 0) -> None:
        wanted = parse_steps(steps) if steps is not None else range(0)
        self._steps = wanted if rank == 0 else range(0)
        self._folder = out_dir / "profile"
        self._done = start_step
        self._profiler: Any = None
        self._mark: Any = None
        self._traced: list[int] = []

    def __enter__(self) -> "StepProfiler":
        self._begin_step()
        return self

    def step_done(self, step: int) -> None:
        """An update is done: ``step`` of them by now."""
        if not self._steps:
            return
        self._done = step
        if self._profiler is not None:
            self._mark.__exit__(None, None, None)
            self._traced.append(step)
            if step + 1 not in self._steps:
                self._write()
        self._begin_step()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._profiler is None:
            return
        self._mark.__exit__(None, None, None)
        if kind is None and self._traced:
            self._write()
        else:
            self._profiler.stop()
            self._profiler = None

    def _begin_step(self) -> None:
        step = self._done + 1
        if step not in self._steps:
            return
        import torch.profiler

        if self._profiler is None:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=activities)
            self._profiler.start()
        self._mark = torch.profiler.record_function(f"step {step}")
        self._mark.__enter__()

    def _write(self) -> None:
        """Write the trace of what was traced; until it is whole it has another name."""
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"steps-{self._traced[0]}-{self._traced[-1]}.json"
        temporary = path.with_name(f".{path.name}")
        packed = temporary.with_name(f"{temporary.name}.gz")
        try:
            profiler.export_chrome_trace(str(temporary))
            if temporary.stat().st_size > LARGEST_PLAIN:
                with temporary.open("rb") as plain, gzip.open(packed, "wb", compresslevel=6) as file:
                    shutil.copyfileobj(plain, file)
                path = path.with_name(f"{path.name}.gz")
                rename(packed, path)
            else:
                rename(temporary, path)
        finally:
            for left in (temporary, packed):
                with contextlib.suppress(FileNotFoundError):
                    left.unlink()
        logger.info("the trace of steps %d to %d: %s (open it in ui.perfetto.dev)", self._traced[0], self._traced[-1], path)
