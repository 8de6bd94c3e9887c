"""The record of one finished run: what it was trained on, what chose its checkpoint, and how it did on each test set."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from galaxydist.evaluation.published import Setting
from galaxydist.galaxy import Variant

REFERENCE = "reference"


@dataclass(frozen=True, slots=True)
class Note:
    """Why something of a run was left out, or what should be known of it.

    Args:
        run_dir: the run.
        text: a sentence for the reader of a report.
    """

    run_dir: Path
    text: str

    def __str__(self) -> str:
        return f"{self.run_dir}: {self.text}"


@dataclass(frozen=True, slots=True)
class Validation:
    """The validation metric that chose the checkpoint, at that checkpoint; ``loss`` is better when smaller."""

    metric: str
    value: float
    step: int


@dataclass(frozen=True, slots=True)
class Unseen:
    """Galaxies of a test set that the run was not validated on: number, accuracy, mean cross-entropy in nats (None of none)."""

    count: int
    accuracy: float | None
    loss: float | None


@dataclass(frozen=True, slots=True)
class Score:
    """A number of an evaluation, None where there is none, and its 95 % interval, None where it was not computed."""

    value: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Judgement:
    """One evaluation on a test set.

    Args:
        dataset, variant, manifest_hash: whose test set.
        count: galaxies.
        correct: those classified correctly.
        loss: mean cross-entropy in nats; None where it was not finite.
        recall: by class; None for a class without galaxies.
        confusion: K x K counts; row: true class, column: predicted class.
        predictions_path: the single galaxies' predictions, where they were kept.
        without_validation: without the galaxies that the run was validated on; None where there are none.
        scores: by the name that the evaluation's file has for them.
    """

    dataset: str
    variant: Variant
    manifest_hash: str
    count: int
    correct: int
    loss: float | None
    recall: tuple[float | None, ...]
    confusion: tuple[tuple[int, ...], ...]
    predictions_path: Path | None
    without_validation: Unseen | None = None
    scores: Mapping[str, Score] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        return self.correct / self.count

    @property
    def support(self) -> tuple[int, ...]:
        """Galaxies of each true class."""
        return tuple(sum(row) for row in self.confusion)


@dataclass(frozen=True)
class Trial:
    """One finished run.

    Args:
        run_dir: its folder.
        recipe: the recipe's name.
        regime: ``reference`` for a recipe that follows the published work, else ``own``.
        model: ``model.name``.
        dataset: of the galaxies it was trained on.
        variant: likewise.
        class_names: by label.
        seed: ``seed``.
        settings: 8 hex digits, equal for runs that differ in seed and variant alone.
        validation: what chose its checkpoint; None where that is not known.
        judgements: by the variant of its data set on whose test set it was judged.
    """

    run_dir: Path
    recipe: str
    regime: str
    model: str
    dataset: str
    variant: Variant
    class_names: tuple[str, ...]
    seed: int
    settings: str
    validation: Validation | None
    judgements: Mapping[Variant, Judgement]

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.run_dir.name or str(self.run_dir)

    def judged(self, setting: Setting) -> Judgement | None:
        """Its evaluation in a setting, where it has that."""
        return self.judgements.get(setting.test) if self.variant == setting.train else None
