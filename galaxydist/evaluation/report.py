"""The files of an evaluation (one JSON and its figures), and what is said about it on the terminal."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from galaxydist import __version__
from galaxydist.errors import UserError
from galaxydist.evaluation.text import format_table, headline, title_of
from galaxydist.files import read_json, write_json
from galaxydist.runs.metrics_log import MetricsLog

FORMAT_VERSION = 1
CONTEXT_KEYS = ("dataset", "variant", "split", "model", "recipe")


def write_evaluation(
    evaluation_dir: Path,
    metrics: Mapping[str, Any],
    context: Mapping[str, Any],
    *,
    metrics_log: Path | None = None,
    figures: bool = True,
) -> dict[str, Any]:
    """Write ``<split>.json`` and the figures of the confusion matrix, the classes and the learning curves.

    With test-time augmentation the files are named ``<split>-<tta>``, so that they lie beside those without.

    The JSON comes last and all at once: where it is, the figures are.

    Args:
        evaluation_dir: the run folder's ``evaluation``; made where it is missing.
        metrics: from ``metrics_from_counts``.
        context: what was judged on what: ``dataset``, ``variant``, ``split``, ``model``, ``recipe`` and more plain values;
            ``tta`` where it is not ``none``.
        metrics_log: the run's metrics.jsonl, for the learning curves.
        figures: also draw.

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
        from galaxydist.evaluation.figures import draw_confusion, draw_learning_curves, draw_per_class, save_figure

        save_figure(draw_confusion(metrics, title), evaluation_dir / f"{stem}-confusion")
        save_figure(draw_per_class(metrics, title), evaluation_dir / f"{stem}-classes")
        lines = MetricsLog(metrics_log).read() if metrics_log is not None else []
        if lines:
            save_figure(draw_learning_curves(lines, title_of(context)), evaluation_dir / "learning-curves")
    write_json(evaluation_dir / f"{stem}.json", content)
    return content


def stem_of(split: str, tta: str) -> str:
    """What the files of an evaluation are called by: ``test``, or with test-time augmentation ``test-d4``."""
    return split if tta == "none" else f"{split}-{tta}"


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
    names = ("learning-curves", f"{stem}-classes", f"{stem}-confusion")
    drawn = [path for name in names if (path := evaluation_dir / f"{name}.png").is_file()]
    figures = "".join(f"\n  {path}" for path in drawn)
    lines = [title_of(evaluation), "", headline(evaluation), "", format_table(evaluation), ""]
    if (others := evaluation.get("without_validation")) is not None:
        num_seen = evaluation["count"] - others["count"]
        lines += [f"without the {num_seen:,} galaxies of its validation set (N = {others['count']:,}): {headline(others)}", ""]
    lines.append(f"numbers: {evaluation_dir / f'{stem}.json'}")
    lines += [f"figures (also as PDF):{figures}"] if figures else []
    return "\n".join(lines)
