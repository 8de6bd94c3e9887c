"""The interface of a tracker's program, and what a run folder says to it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from galaxydist.runs.events import Event, EventKind
from galaxydist.runs.folder import RunFolder


@dataclass(frozen=True)
class RunInfo:
    """Description of a run, given to a tracker when it is opened.

    Args:
        run_id: the tracker's id of the run, with which a later start continues the same curves.
        name: on the dashboard: what differs between the runs of a group, else the name of the run folder.
        group: the sweep or folder that the run shares with others; None for a single run, and for runs of the default folder.
        job_type: the recipe's name.
        project: the tracker's project.
        entity: team or user; None for the tracker's own.
        tags: of the run.
        config: the resolved recipe as nested values, without secrets, and ``run`` (parameter count, world size, job ids,
            commit) beside it.
        dataset: name, variant, manifest hash, sizes of the splits, licence and citation; empty if they are not known.
        folder: the run folder.
    """

    run_id: str
    name: str
    group: str | None
    job_type: str
    project: str
    entity: str | None
    tags: tuple[str, ...]
    config: Mapping[str, Any]
    dataset: Mapping[str, Any]
    folder: Path


@dataclass(frozen=True)
class TrackedGalaxy:
    """One galaxy of a validation's table.

    Args:
        sample: its number in the split.
        galaxy_id: its name in the survey.
        label, predicted: class numbers.
        probability: of the predicted class, in 0..1.
        image: a small JPEG; it may be missing.
    """

    sample: int
    galaxy_id: str
    label: int
    predicted: int
    probability: float
    image: Path


@dataclass(frozen=True)
class Validation:
    """The details of one validation.

    Args:
        step: optimizer steps done.
        class_names: of length K.
        confusion_KK: numbers of galaxies, true class x predicted class.
        recall_K: recall of each class; None for a class without galaxies.
        galaxies: a few galaxies, the same in each validation.
        calibration: bins of confidence, each with ``low``, ``high``, ``count``, and the means ``confidence`` and ``accuracy``,
            which are None in a bin without galaxies; no bins if a loss is not finite.
    """

    step: int
    class_names: Sequence[str]
    confusion_KK: Sequence[Sequence[int]]
    recall_K: Sequence[float | None]
    galaxies: Sequence[TrackedGalaxy] = ()
    calibration: Sequence[Mapping[str, Any]] = ()


def validation_of(line: Mapping[str, Any], folder: RunFolder) -> Validation:
    """Return the validation that a line of validation.jsonl holds."""
    galaxies = [
        TrackedGalaxy(
            sample=galaxy["sample"],
            galaxy_id=galaxy["id"],
            label=galaxy["label"],
            predicted=galaxy["predicted"],
            probability=galaxy["probability"],
            image=folder.galaxy_image(galaxy["sample"]),
        )
        for galaxy in line["galaxies"]
    ]
    return Validation(line["step"], line["classes"], line["confusion"], line["recall"], galaxies, line["calibration"])


def alert_level(kind: EventKind) -> Literal["info", "warn", "error"]:
    """Return how serious an alert is."""
    if kind == "finish":
        return "info"
    return "error" if kind in ("failure", "hang", "nonfinite") else "warn"


@dataclass(frozen=True)
class Row:
    """All that a run folder says of one step.

    Args:
        step: optimizer steps done, 1 or more.
        values: metric -> finite value, such as ``train/loss``.
        time: when the step was logged, in seconds since 1970; None in run folders of earlier versions.
        validation: details of the validation after this step, if there was one.
        events: that happened since the row before.
    """

    step: int
    values: Mapping[str, Any]
    time: float | None = None
    validation: Validation | None = None
    events: Sequence[Event] = ()


@dataclass(frozen=True)
class RunEnd:
    """End of a run, or of a start of it, as a tracker is told.

    Args:
        exit_code: 0 if the run has its result, else 1.
        summary: final results, such as ``test/accuracy``.
        figures: name -> PNG, such as ``test/confusion``.
        pages: name -> HTML page, such as ``gallery``.
        model: folder of the evaluated checkpoint; None if there is none.
        model_card: Markdown that describes the model; empty if there is no model.
        events: all events of the run, oldest first.
        facts: what is known of the run beside its recipe, such as parameters, world size, jobs and restarts.
    """

    exit_code: int
    summary: Mapping[str, float]
    figures: Mapping[str, Path] = field(default_factory=dict)
    pages: Mapping[str, Path] = field(default_factory=dict)
    model: Path | None = None
    model_card: str = ""
    events: Sequence[Event] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


class Sink(Protocol):
    """Program of a tracker, which is sent complete rows in the order of their steps. Any method may raise any error.

    Attributes:
        stored_step: the highest step that it had stored when it was opened; 0 if there was none.
    """

    stored_step: int

    def send(self, row: Row) -> None: ...

    def flush(self) -> None:
        """Store the rows sent so far, so that they are seen; called when there is no further row for now."""
        ...

    def alert(self, event: Event) -> None:
        """Tell a person of an event, if the program can do that."""
        ...

    def close(self, end: RunEnd) -> str:
        """Store everything, and return a line that says where."""
        ...

    def abandon(self) -> None:
        """Close a program that has failed, without a message."""
        ...
