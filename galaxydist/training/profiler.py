"""Trace of some training steps by torch's profiler, for ui.perfetto.dev or chrome://tracing."""

import gzip
import logging
import re
import shutil
from pathlib import Path
from typing import Any, Self

from galaxydist.atomic_files import rename
from galaxydist.errors import EveryRankError

logger = logging.getLogger(__name__)

# Larger traces are compressed; the viewers open both.
MAX_PLAIN_BYTES = 32_000_000


def parse_steps(text: str) -> range:
    """Return the steps of ``train.profile``, counted from 1: ``10-20`` is eleven steps, ``10`` is one.

    Raises:
        EveryRankError: the text is neither.
    """
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
    steps = range(int(found[1]), int(found[2] or found[1]) + 1) if found else range(0)
    if not steps or steps.start < 1:
        raise EveryRankError(f"train.profile={text}: give the first and the last step to trace, such as 10-20, counted from 1")
    return steps


class StepProfiler:
    """Context manager around the loop that traces some of its steps on rank 0; it does nothing on other ranks.

    Args:
        steps: ``train.profile``, or None.
        out_dir: the run folder; the trace is ``profile/steps-10-20.json`` in it (``.json.gz`` if large).
        rank: rank of this process.
        start_step: steps done before the loop begins.

    Raises:
        EveryRankError: ``steps`` cannot be read.
    """

    def __init__(self, steps: str | None, out_dir: Path, rank: int, *, start_step: int = 0) -> None:
        wanted = parse_steps(steps) if steps is not None else range(0)
        self._steps = wanted if rank == 0 else range(0)
        self._folder = out_dir / "profile"
        self._first = max(wanted.start, start_step + 1)
        self._done = start_step
        self._profiler: Any = None
        self._annotation: Any = None

    def __enter__(self) -> Self:
        self._begin_step()
        return self

    def step_done(self, step: int) -> None:
        """End the current step, the ``step``-th of the run, and begin the next one."""
        self._done = step
        if self._profiler is not None:
            self._annotation.__exit__(None, None, None)
            if step + 1 not in self._steps:
                self._write()
        self._begin_step()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._profiler is None:
            return
        self._annotation.__exit__(None, None, None)
        if kind is None and self._done >= self._first:
            self._write()
        else:
            self._profiler.stop()

    def _begin_step(self) -> None:
        step = self._done + 1
        if step not in self._steps:
            return
        import torch.profiler

        if self._profiler is None:
            self._profiler = torch.profiler.profile()
            self._profiler.start()
        self._annotation = torch.profiler.record_function(f"step {step}")
        self._annotation.__enter__()

    def _write(self) -> None:
        """Write the trace of the steps done, under another name until it is complete."""
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"steps-{self._first}-{self._done}.json"
        temporary = path.with_name(f".{path.name}")
        compressed = temporary.with_name(f"{temporary.name}.gz")
        try:
            profiler.export_chrome_trace(str(temporary))
            if temporary.stat().st_size > MAX_PLAIN_BYTES:
                with temporary.open("rb") as plain, gzip.open(compressed, "wb", compresslevel=6) as file:
                    shutil.copyfileobj(plain, file)
                path = path.with_name(f"{path.name}.gz")
                rename(compressed, path)
            else:
                rename(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
            compressed.unlink(missing_ok=True)
        logger.info("the trace of steps %d to %d: %s (open it in ui.perfetto.dev)", self._first, self._done, path)
