"""launch.py under torch's profiler: torch's allocator reports each allocation and each release of the CPU's memory."""

import json
import os
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from galaxydist.cli.train import main
from galaxydist.training.step import TrainStep

STEP = "measured step"


def measure(arguments: list[str]) -> None:
    """Train, and print the most bytes that were alive within each step."""
    take_step = TrainStep.__call__

    def marked(self: TrainStep, *given: Any, **named: Any) -> Any:
        with record_function(STEP):
            return take_step(self, *given, **named)

    TrainStep.__call__ = marked  # type: ignore[method-assign]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        code = main(arguments, os.environ)
    kineto: Any = profiler.profiler
    events = kineto.kineto_results.events()
    steps = [(event.start_ns(), event.end_ns()) for event in events if event.name() == STEP]
    alive, peaks = 0, [0] * len(steps)
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        alive += event.nbytes()
        for number, (start, stop) in enumerate(steps):
            if start <= event.start_ns() <= stop:
                peaks[number] = max(peaks[number], alive)
    print(json.dumps({"code": code, "peaks": peaks}))
