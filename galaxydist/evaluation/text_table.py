"""Result of an evaluation as text: title, headline numbers, notes and a table of classes. Formats of numbers and of Markdown."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

# Label, name in ``intervals``, keys of the value in an evaluation.
_HEADLINES = (
    ("accuracy", "accuracy", ("accuracy",)),
    ("balanced accuracy", "balanced_accuracy", ("balanced_accuracy",)),
    ("macro F1", "macro_f1", ("macro_f1",)),
    ("weighted F1", "weighted_f1", ("weighted_f1",)),
    ("top-2 accuracy", "top2_accuracy", ("top2_accuracy",)),
    ("loss", "loss", ("loss",)),
    ("ECE", "ece", ("calibration", "ece")),
    ("loss, scaled", "scaled_loss", ("calibration", "scaled", "loss")),
    ("ECE, scaled", "scaled_ece", ("calibration", "scaled", "ece")),
    ("ROC area, mean", "roc_auc", ("roc_auc", "macro")),
    ("PR area, mean", "average_precision", ("average_precision", "macro")),
)
NOTHING = "\N{EN DASH}"
# Characters that begin a link, emphasis, code, HTML, a formula, a table's cell or an escape in Markdown.
_MARKDOWN = re.compile(r"([\\`*<>|~$&]|\](?=[(\[:])|(?<![^\W_])_|_(?![^\W_]))")
URL = re.compile(r"https?://[^\s<>\"|`]+")
_COLUMNS = ("precision", "recall", "F1", "galaxies")


def title_of(evaluation: Mapping[str, Any]) -> str:
    """Return the title of an evaluation: data set, split, model and number of galaxies.

    Args:
        evaluation: ``dataset``, ``variant``, ``model`` and ``recipe``; if there is a ``count``, also ``split`` and ``tta``.
    """
    model, recipe = evaluation["model"], evaluation["recipe"]
    named = model if recipe == model else f"{model} (recipe {recipe})"
    data = f"{evaluation['dataset']} ({evaluation['variant']})"
    if "count" not in evaluation:
        return f"{data}, {named}"
    tta = evaluation.get("tta", "none")
    averaged = "" if tta == "none" else f", averaged over {tta.upper()}"
    return f"{data}, {evaluation['split']} split, {named}{averaged}, N = {evaluation['count']:,}"


def headline(metrics: Mapping[str, Any]) -> str:
    """Return accuracy (with its binomial standard error), balanced accuracy, macro F1 and loss in one line."""
    accuracy, count = metrics["accuracy"], metrics["count"]
    error = "" if accuracy is None else f" ± {(accuracy * (1 - accuracy) / count) ** 0.5:.3f}"
    return (
        f"accuracy {three_decimals(accuracy)}{error}   balanced accuracy {three_decimals(metrics['balanced_accuracy'])}   "
        f"macro F1 {three_decimals(metrics['macro_f1'])}   loss {three_decimals(metrics['loss'])}"
    )


def format_headline(metrics: Mapping[str, Any]) -> str:
    """Format the headline numbers, each with its 95 % interval; in one line if there are no intervals.

    Args:
        metrics: from ``summarise`` or ``metrics_from_counts``.
    """
    intervals = metrics.get("intervals")
    if intervals is None:
        return headline(metrics)
    width = max(len(label) for label, _, _ in _HEADLINES)
    lines = []
    for label, name, (*outer, key) in _HEADLINES:
        values: Mapping[str, Any] = functools.reduce(lambda values, key: values.get(key) or {}, outer, metrics)
        if key in values:
            between = interval_text(metrics, name)
            lines.append(f"{label:<{width}} {three_decimals(values[key]):>7}{'   ' if between else ''}{between}")
    lines[0] += f"   ({intervals['level']:.0%} intervals)" if intervals.get("accuracy") else ""
    return "\n".join(lines)


def format_notes(metrics: Mapping[str, Any]) -> list[str]:
    """Return lines about the temperature and about missing metrics; none for metrics from counts alone."""
    lines = []
    temperature = (metrics.get("calibration") or {}).get("temperature")
    if temperature is not None:
        same = " (the evaluated galaxies themselves)" if temperature["fitted_on"]["split"] == metrics.get("split") else ""
        lines.append(
            f"scaled: logits divided by T = {temperature['value']:.3f}, fitted on {temperature['count']:,} galaxies of the "
            f"validation split{same}" + (", at an end of the search range" if temperature["at_bound"] else "")
        )
    lines += [f"left out: {sentence}" for sentence in metrics.get("left_out", ())]
    return [*lines, ""] if lines else []


def format_table(metrics: Mapping[str, Any]) -> str:
    """Format a line per class: precision, recall, F1, number of galaxies, and its most frequent wrong prediction.

    Args:
        metrics: from ``metrics_from_counts``.

    Returns:
        Lines without a newline at the end; ``-`` for an undefined number.
    """
    names, confusion_KK = [readable(name) for name in metrics["classes"]], metrics["confusion"]
    per_class = metrics["per_class"]
    width = max(len("class"), *(len(name) for name in names))
    lines = [f"{'class':<{width}}" + "".join(f"{column:>11}" for column in _COLUMNS) + "   most often taken for"]
    for label, name in enumerate(names):
        numbers = "".join(f"{three_decimals(per_class[key][label]):>11}" for key in ("precision", "recall", "f1"))
        line = f"{name:<{width}}{numbers}{per_class['support'][label]:>11,}   {taken_for(confusion_KK[label], label, names)}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def readable(class_name: str) -> str:
    """Return a class's folder name as words."""
    words = class_name.replace("_", " ")
    for compound in ("edge on", "in between", "cigar shaped"):
        words = words.replace(compound, compound.replace(" ", "-"))
    return words


def three_decimals(value: float | None) -> str:
    """Return a number with three decimals, ``-`` for None."""
    return "-" if value is None else f"{value:.3f}"


def hours_text(hours: float | None) -> str:
    """Format a duration, as ``3.2 h``, ``12.1 min`` or ``8 s``; None becomes a dash."""
    if hours is None:
        return NOTHING
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{60 * hours:.1f} min" if hours >= 1 / 60 else f"{3600 * hours:.0f} s"


def interval_text(metrics: Mapping[str, Any], name: str) -> str:
    """Return the 95 % interval of a metric as ``0.812 to 0.861``; '' where it was not computed."""
    between = (metrics.get("intervals") or {}).get(name)
    return f"{between[0]:.3f} to {between[1]:.3f}" if between else ""


def taken_for(row_K: Sequence[int], label: int, names: Sequence[str]) -> str:
    """Return the most frequent wrong prediction of a class with its share; '' if there is none.

    Args:
        row_K: row of the class in a confusion matrix.
        label: of the class.
        names: of the classes.
    """
    others = [(count, -other) for other, count in enumerate(row_K) if other != label and count > 0]
    if not others:
        return ""
    count, other = max(others)
    share = 100 * count / sum(row_K)
    return f"{names[-other]} ({'<1' if share < 0.5 else f'{share:.0f}'} %)"


def escape_markdown(text: str) -> str:
    """Return text on one line that Markdown shows as it is, without links, emphasis, code, HTML, formulas and cells of tables."""
    return _MARKDOWN.sub(r"\\\1", " ".join(text.split()))


def fenced(text: str, language: str) -> str:
    """Return a block of code that the text cannot end."""
    longest = max((len(found) for found in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def link(address: str) -> str:
    """Return an address as a link; other text escaped."""
    return f"<{address}>" if URL.fullmatch(address) else escape_markdown(address)
