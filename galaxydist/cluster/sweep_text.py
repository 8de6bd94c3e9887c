"""A sweep as a table for people."""

from collections import Counter
from collections.abc import Sequence

from galaxydist.cluster.sweep import Trial
from galaxydist.cluster.sweep_state import Decision


def render_trials(trials: Sequence[Trial], decisions: Sequence[Decision]) -> str:
    """A line a trial: its run, what tells it from the others, where it stands, what would happen to it."""
    head = ("run", "trial", "state", "action", "why")
    rows = [
        (trial.name, trial.label, decision.standing, "submit" if decision.is_due else "leave", decision.reason)
        for trial, decision in zip(trials, decisions, strict=True)
    ]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head) - 1)]
    return "\n".join(
        "  ".join([*(f"{text:{width}}" for text, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in (head, *rows)
    )


def summarise(decisions: Sequence[Decision]) -> str:
    """``42 trials: 30 finished, 8 running, 4 to submit (2 failed, 2 new)``."""
    left = Counter(decision.standing for decision in decisions if not decision.is_due)
    due = Counter(decision.standing for decision in decisions if decision.is_due)
    parts = [f"{left[standing]} {standing}" for standing in ("finished", "running", "queued", "failed") if left[standing]]
    parts += [f"{due.total()} to submit ({', '.join(f'{count} {standing}' for standing, count in due.items())})"] if due else []
    return f"{len(decisions)} trial{'s' if len(decisions) != 1 else ''}: {', '.join(parts)}"
