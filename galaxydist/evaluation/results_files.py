"""Files of an evaluation (one JSON file and its figures), and its result as text for the terminal."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from galaxydist.atomic_files import read_json, write_json
from galaxydist.errors import UserError
from galaxydist.evaluation import plots
from galaxydist.evaluation.metrics import ClassCurves, summarise, wilson_interval
from galaxydist.evaluation.predictions import PredictionsFile, predictions_path, read_predictions
from galaxydist.evaluation.text_table import format_headline, format_notes, format_table, headline, title_of
from galaxydist.runs.metrics_file import MetricsFile
from galaxydist.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT_VERSION = 2
CONTEXT_KEYS = ("dataset", "variant", "split", "model", "recipe")
# File names of the figures, after the evaluation's stem.
FIGURES = ("classes", "confusion", "reliability", "areas", "dependence")
LEARNING_CURVES = "learning-curves"


def write_evaluation(
    evaluation_dir: Path,
    metrics: Mapping[str, Any],
    context: Mapping[str, Any],
    *,
    metrics_log: Path | None = None,
    curves: Sequence[ClassCurves | None] = (),
    figures: bool = True,
) -> dict[str, Any]:
    """Write ``<split>.json`` and the figures of an evaluation.

    Figures, each only if the metrics have it: confusion matrix, classes, reliability, ROC and precision-recall curves, accuracy
    by property; and the learning curves of the run.

    With test-time augmentation the files are named ``<split>-<tta>``, so that both evaluations can be kept. The JSON file is
    written last and atomically: if it exists, so do the requested figures.

    Args:
        evaluation_dir: the run folder's ``evaluation``; created if it is missing.
        metrics: from ``metrics_from_counts`` or ``summarise``.
        context: plain values about the evaluated run and data: ``dataset``, ``variant``, ``split``, ``model``, ``recipe`` and
            more; ``tta`` unless it is ``none``.
        metrics_log: the run's metrics.jsonl, for the learning curves.
        curves: from ``summarise``.
        figures: draw the figures; otherwise those of an earlier evaluation are removed.

    Returns:
        Contents of the JSON file: context and metrics side by side.

    Raises:
        UserError: the disk is full.
        KeyError: the context lacks a key.
    """
    content = {"format": FORMAT_VERSION, "galaxydist": __version__, **context, **metrics}
    stem, title = stem_of(context["split"], context.get("tta", "none")), title_of(content)
    evaluation_dir.mkdir(parents=True, exist_ok=True)
    if metrics_log is not None:
        lines = MetricsFile(metrics_log).read() if figures else []
        drawn_curves = plots.draw_learning_curves(lines, title_of(context)) if lines else None
        _replace_figure(evaluation_dir / LEARNING_CURVES, drawn_curves)
    drawn = dict(_draw(metrics, curves, title)) if figures else {}
    for name in reversed(FIGURES):  # the first one last: ``has_figures`` looks for it
        _replace_figure(evaluation_dir / f"{stem}-{name}", drawn.get(name))
    write_json(evaluation_dir / f"{stem}.json", content)
    return content


def _draw(metrics: Mapping[str, Any], curves: Sequence[ClassCurves | None], title: str) -> "Iterator[tuple[str, Figure]]":
    yield "confusion", plots.draw_confusion(metrics, title)
    yield "classes", plots.draw_per_class(metrics, title)
    if metrics.get("calibration") and metrics["count"]:
        yield "reliability", plots.draw_reliability(metrics, title)
    if any(curve is not None for curve in curves):
        yield "areas", plots.draw_roc_and_pr(metrics, curves, title)
    if metrics.get("against"):
        yield "dependence", plots.draw_accuracy_by_property(metrics, title)


def _replace_figure(path: Path, figure: "Figure | None") -> None:
    """Write a figure, or delete that of an earlier evaluation."""
    if figure is not None:
        plots.save_figure(figure, path)
        return
    for suffix in (".png", ".pdf"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def has_figures(evaluation_dir: Path, stem: str) -> bool:
    """Return True if the figures of an evaluation exist; ``stem`` as from ``stem_of``."""
    return (evaluation_dir / f"{stem}-{FIGURES[0]}.pdf").is_file()


def stem_of(split: str, tta: str) -> str:
    """Return the stem of an evaluation's file names: ``test``, or with test-time augmentation ``test-d4``."""
    return split if tta == "none" else f"{split}-{tta}"


def evaluate_predictions(path: Path, validation: Path | None, out_dir: Path) -> dict[str, Any]:
    """Evaluate stored predictions, without the model.

    Args:
        path: a file of predictions.
        validation: predictions of the validation split, for the temperature; None for those of the same checkpoint in the folder
            of ``path`` or the one above, if there are any.
        out_dir: folder for JSON and figures, as in ``write_evaluation``.

    Returns:
        The evaluation.

    Raises:
        UserError: predictions are missing, damaged, or of another model.
    """
    predictions = read_predictions(path)
    context = predictions.info.context
    if missing := [key for key in (*CONTEXT_KEYS, "checkpoint", "step") if key not in context]:
        raise UserError(f"the metadata of {path} have no {missing[0]}; make it again with `galaxydist evaluate RUN`")
    if validation is not None:
        of_validation: PredictionsFile | None = read_predictions(validation)
    else:
        name = predictions_path(path.parent, stem_of("val", context.get("tta", "none"))).name
        files = [folder / name for folder in (path.parent, path.parent.parent) if (folder / name).is_file()]
        of_validation = next(
            (found for found in map(read_predictions, files) if _model_of(found) == _model_of(predictions)), None
        )
    if of_validation is not None and _model_of(of_validation) != _model_of(predictions):
        raise UserError(
            f"{of_validation.path} is of {_model_of(of_validation)}, {path} of {_model_of(predictions)}: a temperature is fitted "
            "on the same model"
        )
    if of_validation is not None and of_validation.info.context["split"] != "val":
        raise UserError(f"{of_validation.path} is of the {of_validation.info.context['split']} split: give one of val")
    summary = summarise(predictions, of_validation)
    return write_evaluation(out_dir, summary.metrics, context, curves=summary.curves)


def _model_of(predictions: PredictionsFile) -> str:
    """Describe the model that made the predictions."""
    info = predictions.info
    named = [f"{name} {info.context.get(name)}" for name in ("recipe", "model", "seed", "checkpoint", "step", "tta")]
    return ", ".join([*named, f"{info.num_classes} classes ({', '.join(info.class_names)})"])


def read_evaluation(evaluation_dir: Path, split: str, tta: str = "none") -> dict[str, Any] | None:
    """Read the evaluation of a split; return None if it is missing, damaged or of another format version."""
    try:
        content = read_json(evaluation_dir / f"{stem_of(split, tta)}.json")
    except (FileNotFoundError, UserError):
        return None
    if not isinstance(content, dict) or content.get("format") != FORMAT_VERSION or "confusion" not in content:
        return None
    return content


# Values of an evaluation that are published with a model.
_PUBLISHED = (
    *("dataset", "variant", "split", "tta", "manifest_hash", "checkpoint", "step", "count", "accuracy", "balanced_accuracy"),
    *("macro_f1", "weighted_f1", "loss", "top2_accuracy", "roc_auc", "average_precision", "classes", "per_class", "confusion"),
    *("calibration", "intervals", "without_validation"),
)


def published_values(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of an evaluation that are published with a model, with intervals of each class's recall and precision.

    Args:
        evaluation: from ``write_evaluation`` or ``read_evaluation``.
    """
    found = {name: evaluation[name] for name in _PUBLISHED if name in evaluation}
    per_class, confusion_KK = found["per_class"], found["confusion"]
    intervals = {
        name: [wilson_interval(confusion_KK[label][label], count) if count else None for label, count in enumerate(counts)]
        for name, counts in (("recall", per_class["support"]), ("precision", per_class["predicted"]))
    }
    found["per_class"] = {**per_class, "intervals": intervals}
    return found


def render_evaluation(evaluation: Mapping[str, Any], evaluation_dir: Path) -> str:
    """Return the result for the terminal: title, headline numbers, a line per class, paths of the files.

    Args:
        evaluation: from ``write_evaluation`` or ``read_evaluation``.
        evaluation_dir: its folder.
    """
    stem = stem_of(evaluation["split"], evaluation.get("tta", "none"))
    names = (LEARNING_CURVES, *(f"{stem}-{name}" for name in FIGURES))
    drawn = [path for name in names if (path := evaluation_dir / f"{name}.png").is_file()]
    figures = "".join(f"\n  {path}" for path in drawn)
    lines = [title_of(evaluation), "", format_headline(evaluation), "", format_table(evaluation), ""]
    if (others := evaluation.get("without_validation")) is not None:
        left_out = evaluation["count"] - others["count"]
        lines += [f"without the {left_out:,} galaxies of its validation set (N = {others['count']:,}): {headline(others)}", ""]
    lines += format_notes(evaluation)
    lines.append(f"numbers: {evaluation_dir / f'{stem}.json'}")
    predictions = predictions_path(evaluation_dir, stem)
    lines += [f"predictions of every galaxy: {predictions}"] if predictions.is_file() else []
    lines += [f"figures (also as PDF):{figures}"] if figures else []
    return "\n".join(lines)
