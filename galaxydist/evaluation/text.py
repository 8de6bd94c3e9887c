"""The result of an evaluation as text."""

from collections.abc import Mapping, Sequence
from typing import Any

_COLUMNS = ("precision", "recall", "F1", "galaxies")


def title_of(evaluation: Mapping[str, Any]) -> str:
    """One line that says what was judged on what, for figures and tables.

    Args:
        evaluation: ``dataset``, ``variant``, ``model`` and ``recipe``; ``split``, ``tta`` and ``count`` are named where there
            is a count.
    """
    model, recipe = evaluation["model"], evaluation["recipe"]
    named = model if recipe == model else f"{model} (recipe {recipe})"
    data = f"{evaluation['dataset']} ({evaluation['variant']})"
    if "count" not in evaluation:
        return f"{data}, {named}"
    tta = evaluation.get("tta", "none")
    seen = "" if tta == "none" else f", {tta.upper()} views averaged"
    return f"{data}, {evaluation['split']} split, {named}{seen}, N = {evaluation['count']:,}"


def headline(metrics: Mapping[str, Any]) -> str:
    """Accuracy (with its binomial standard error), balanced accuracy, macro F1 and loss in one line."""
    accuracy, count = metrics["accuracy"], metrics["count"]
    error = "" if accuracy is None else f" ± {(accuracy * (1 - accuracy) / count) ** 0.5:.3f}"
    return (
        f"accuracy {_number(accuracy)}{error}   balanced accuracy {_number(metrics['balanced_accuracy'])}   "
        f"macro F1 {_number(metrics['macro_f1'])}   loss {_number(metrics['loss'])}"
    )


def format_table(metrics: Mapping[str, Any]) -> str:
    """A line a class: precision, recall, F1, number of galaxies, and the class it is most often taken for.

    Args:
        metrics: from ``metrics_from_counts``.

    Returns:
        Lines without a newline at the end; ``-`` where a number does not exist.
    """
    names, confusion_KK = [readable(name) for name in metrics["classes"]], metrics["confusion"]
    per_class = metrics["per_class"]
    width = max(len("class"), *(len(name) for name in names))
    lines = [f"{'class':<{width}}" + "".join(f"{column:>11}" for column in _COLUMNS) + "   most often taken for"]
    for label, name in enumerate(names):
        numbers = "".join(f"{_number(per_class[key][label]):>11}" for key in ("precision", "recall", "f1"))
        line = f"{name:<{width}}{numbers}{per_class['support'][label]:>11,}   {_taken_for(confusion_KK[label], label, names)}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def readable(class_name: str) -> str:
    """A class's folder name as words."""
    words = class_name.replace("_", " ")
    for compound in ("edge on", "in between", "cigar shaped"):
        words = words.replace(compound, compound.replace(" ", "-"))
    return words


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _taken_for(row_K: Sequence[int], label: int, names: Sequence[str]) -> str:
    others = [(count, -other) for other, count in enumerate(row_K) if other != label and count > 0]
    if not others:
        return ""
    count, other = max(others)
    share = 100 * count / sum(row_K)
    return f"{names[-other]} ({'<1' if share < 0.5 else f'{share:.0f}'} %)"
