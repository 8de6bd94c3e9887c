"""The files of an evaluation (one JSON and its figures), and what is said about it on the terminal."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from galaxydist.atomic_files import read_json, write_json
from galaxydist.errors import UserError
from galaxydist.evaluation.metrics import ClassCurves, summarise
from galaxydist.evaluation.predictions import PredictionsFile, predictions_path, read_predictions
from galaxydist.evaluation.text_table import format_headline, format_notes, format_table, headline, title_of
from galaxydist.runs.metrics_log import MetricsLog
from galaxydist.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT_VERSION = 2
CONTEXT_KEYS = ("dataset", "variant", "split", "model", "recipe")
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
    """Write ``<split>.json`` and the figures of what the metrics hold: confusion matrix, classes, reliability, ROC and
    precision-recall curves, accuracy against properties; and the learning curves.

    With test-time augmentation the files are named ``<split>-<tta>``, so that they lie beside those without.

    The JSON comes last and all at once: where it is, the figures are that were asked for.

    Args:
        evaluation_dir: the run folder's ``evaluation``; made where it is missing.
        metrics: from ``metrics_from_counts``, or with all that ``summarise`` adds.
        context: what was judged on what: ``dataset``, ``variant``, ``split``, ``model``, ``recipe`` and more plain values;
            ``tta`` where it is not ``none``.
        metrics_log: the run's metrics.jsonl, for the learning curves.
        curves: from ``summarise``.
        figures: also draw; else those of an earlier evaluation are removed.

    Returns:
        What the JSON holds: context and metrics side by side.

    Raises:
        UserError: the disk is full.
        KeyError: the context lacks a key.
    """
    content = {"format": FORMAT_VERSION, "galaxydist": __version__, **context, **metrics}
    stem, title = stem_of(context["split"], context.get("tta", "none")), title_of(content)
    evaluation_dir.mkdir(parents=True, exist_ok=True)
    if figures:
        lines = MetricsLog(metrics_log).read() if metrics_log is not None else []
        if lines:
            from galaxydist.evaluation.plots import draw_learning_curves, save_figure

            save_figure(draw_learning_curves(lines, title_of(context)), evaluation_dir / LEARNING_CURVES)
        _write_figures(evaluation_dir, stem, dict(_draw(metrics, curves, title)))
    else:
        _write_figures(evaluation_dir, stem, {})
        if metrics_log is not None:
            _remove_figure(evaluation_dir / LEARNING_CURVES)
    write_json(evaluation_dir / f"{stem}.json", content)
    return content


def _draw(metrics: Mapping[str, Any], curves: Sequence[ClassCurves | None], title: str) -> "Iterator[tuple[str, Figure]]":
    from galaxydist.evaluation.plots import draw_areas, draw_confusion, draw_dependence, draw_per_class, draw_reliability

    yield "confusion", draw_confusion(metrics, title)
    yield "classes", draw_per_class(metrics, title)
    if metrics.get("calibration") and metrics["count"]:
        yield "reliability", draw_reliability(metrics, title)
    if any(curve is not None for curve in curves):
        yield "areas", draw_areas(metrics, curves, title)
    if metrics.get("against"):
        yield "dependence", draw_dependence(metrics, title)


def _write_figures(evaluation_dir: Path, stem: str, drawn: "Mapping[str, Figure]") -> None:
    """The first comes last: where it is, all are. Also removes those that an earlier evaluation had, and this one has not."""
    from galaxydist.evaluation.plots import save_figure

    for name in reversed(FIGURES):
        path = evaluation_dir / f"{stem}-{name}"
        if name in drawn:
            save_figure(drawn[name], path)
        else:
            _remove_figure(path)


def _remove_figure(path: Path) -> None:
    for suffix in (".png", ".pdf"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def has_figures(evaluation_dir: Path, stem: str) -> bool:
    """Whether the figures of an evaluation were drawn; ``stem`` as in ``stem_of``."""
    return (evaluation_dir / f"{stem}-{FIGURES[0]}.pdf").is_file()


def stem_of(split: str, tta: str) -> str:
    """What the files of an evaluation are called by: ``test``, or with test-time augmentation ``test-d4``."""
    return split if tta == "none" else f"{split}-{tta}"


def judge_predictions(path: Path, validation: Path | None, out_dir: Path) -> dict[str, Any]:
    """Evaluate stored predictions, without the model that made them.

    Args:
        path: a file of predictions.
        validation: those of the validation split, for the temperature; None: the ones of the same checkpoint that lie beside
            ``path`` or in the folder above, where there are any.
        out_dir: where JSON and figures are written, as by ``write_evaluation``.

    Returns:
        The evaluation.

    Raises:
        UserError: no predictions, damaged ones, ones of another model.
    """
    predictions = read_predictions(path)
    context = predictions.info.context
    if missing := [key for key in (*CONTEXT_KEYS, "checkpoint", "step") if key not in context]:
        raise UserError(f"{path} does not say its {missing[0]}; make it anew with `galaxydist evaluate RUN`")
    if validation is not None:
        of_validation: PredictionsFile | None = read_predictions(validation)
    else:
        name = predictions_path(path.parent, stem_of("val", context.get("tta", "none"))).name
        places = [folder / name for folder in (path.parent, path.parent.parent) if (folder / name).is_file()]
        of_validation = next((found for found in map(read_predictions, places) if _is_same_model(found, predictions)), None)
    if of_validation is not None and not _is_same_model(of_validation, predictions):
        raise UserError(
            f"{of_validation.path} is of {_model_of(of_validation)}, {path} of {_model_of(predictions)}: a temperature is fitted "
            "on the same model"
        )
    if of_validation is not None and of_validation.info.context["split"] != "val":
        raise UserError(f"{of_validation.path} is of the {of_validation.info.context['split']} split: give one of val")
    summary = summarise(predictions, of_validation)
    return write_evaluation(out_dir, summary.metrics, context, curves=summary.curves)


def _is_same_model(one: PredictionsFile, other: PredictionsFile) -> bool:
    return _model_of(one) == _model_of(other) and one.info.class_names == other.info.class_names


def _model_of(predictions: PredictionsFile) -> str:
    context = predictions.info.context
    named = [f"{name} {context.get(name)}" for name in ("recipe", "model", "seed", "checkpoint", "step", "tta")]
    return ", ".join([*named, f"{predictions.info.num_classes} classes"])


def read_evaluation(evaluation_dir: Path, split: str, tta: str = "none") -> dict[str, Any] | None:
    """The evaluation of a split as it was written; None where there is none, or one that this version cannot use."""
    path = evaluation_dir / f"{stem_of(split, tta)}.json"
    if not path.is_file():
        return None
    try:
        content = read_json(path)
    except UserError:
        return None  # damaged: it is made again
    if not isinstance(content, dict) or content.get("format") != FORMAT_VERSION or "confusion" not in content:
        return None
    return content


def render_evaluation(evaluation: Mapping[str, Any], evaluation_dir: Path) -> str:
    """The result for the terminal: what was judged, headline numbers, a line a class, where the files lie.

    Args:
        evaluation: from ``write_evaluation`` or ``read_evaluation``.
        evaluation_dir: where it was written.
    """
    stem = stem_of(evaluation["split"], evaluation.get("tta", "none"))
    names = (LEARNING_CURVES, *(f"{stem}-{name}" for name in FIGURES))
    drawn = [path for name in names if (path := evaluation_dir / f"{name}.png").is_file()]
    figures = "".join(f"\n  {path}" for path in drawn)
    lines = [title_of(evaluation), "", format_headline(evaluation), "", format_table(evaluation), ""]
    if (others := evaluation.get("without_validation")) is not None:
        num_seen = evaluation["count"] - others["count"]
        lines += [f"without the {num_seen:,} galaxies of its validation set (N = {others['count']:,}): {headline(others)}", ""]
    lines += format_notes(evaluation)
    lines.append(f"numbers: {evaluation_dir / f'{stem}.json'}")
    predictions = predictions_path(evaluation_dir, stem)
    lines += [f"predictions of every galaxy: {predictions}"] if predictions.is_file() else []
    lines += [f"figures (also as PDF):{figures}"] if figures else []
    return "\n".join(lines)
