"""Text of a model card in Markdown, from plain values: training data, recipe, results, limits, licences, works to cite.

A published folder's README.md holds it below its header (``serving/model_card.py``), and trackers get it with a
run's model. Texts of users (class names, titles, citations) are escaped.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from galaxydist.evaluation.text_table import escape_markdown, hours_text, interval_text, link, readable, taken_for, three_decimals
from galaxydist.prediction.citations import works_to_cite
from galaxydist.surveys.data_origin import is_galaxy10, is_non_commercial, is_simulated, model_licence

# Metrics of the table of results: label, name of the interval, keys of the value.
_METRICS = (
    ("accuracy", "accuracy", ("accuracy",)),
    ("balanced accuracy", "balanced_accuracy", ("balanced_accuracy",)),
    ("macro F1", "macro_f1", ("macro_f1",)),
    ("top-2 accuracy", "top2_accuracy", ("top2_accuracy",)),
    ("cross-entropy (nats)", "loss", ("loss",)),
    ("ROC area, mean over classes", "roc_auc", ("roc_auc", "macro")),
)
# Largest number of classes whose confusion matrix is shown as a table.
MAX_CONFUSION = 20
# A class with fewer test galaxies is named among the limits.
FEW_GALAXIES = 30
# Rows of the table of the training: label, dotted keys of the recipe.
_RECIPE_ROWS = (
    ("epochs", ("train.epochs",)),
    ("galaxies in a step", ("train.batch_size",)),
    ("optimizer", ("optim.name",)),
    ("learning rate, schedule", ("optim.lr", "optim.schedule")),
    ("weight decay", ("optim.weight_decay",)),
    ("augmentation: rotation, mirror images, zoom", ("data.augment.rotate", "data.augment.flip", "data.augment.zoom")),
    ("label smoothing", ("train.label_smoothing",)),
    ("moving average of the weights", ("train.ema",)),
    ("balance of the classes", ("data.balance",)),
    ("seed", ("seed",)),
)
Row = Sequence[str]


class CardFacts:
    """Plain values of a card by subject; what is missing is empty.

    Args:
        config: content of ``config.json``, or the part ``galaxydist`` of it alone.
        results: from ``collect_results``.
    """

    def __init__(self, config: Mapping[str, Any], results: Mapping[str, Any]) -> None:
        self.ours: Mapping[str, Any] = config["galaxydist"]
        self.app: Mapping[str, Any] = config.get("app") or {}
        self.recipe: Mapping[str, Any] = self.ours["recipe"]
        self.data: Mapping[str, Any] = self.ours.get("data") or {}
        self.stored: Mapping[str, Any] = self.data.get("stored") or {}
        self.origin: Mapping[str, Any] = self.stored.get("origin") or {}
        self.weights: Mapping[str, Any] = self.ours.get("model") or {}
        self.results = results
        self.test: Mapping[str, Any] = results.get("test") or {}
        self.training: Mapping[str, Any] = results.get("training") or {}
        self.architecture = config.get("architecture")

    @property
    def title(self) -> str:
        return " ".join(str(self.app.get("title") or f"{self.recipe.get('name', 'model')} on {self.dataset}").split())

    @property
    def dataset(self) -> str:
        return str(self.stored.get("dataset") or self.value("data.dataset") or "unknown data")

    @property
    def classes(self) -> list[str]:
        return [readable(str(name)) for name in self.app.get("classes") or self.data.get("class_names") or ()]

    @property
    def licences(self) -> list[str | None]:
        """Licences of the training data, and of the weights that the training started from, if there were any."""
        return [self.origin.get("licence"), *([self.weights.get("licence")] if self.weights.get("source") else [])]

    @property
    def licence(self) -> str | None:
        """The strictest of these licences; None if it is not known."""
        return model_licence(self.licences)

    @property
    def is_non_commercial(self) -> bool:
        return any(map(is_non_commercial, self.licences))

    @property
    def is_simulated(self) -> bool:
        return is_simulated(self.dataset)

    @property
    def temperature(self) -> float | None:
        """Temperature of the published folder, else that of the evaluation."""
        fitted = (self.test.get("calibration") or {}).get("temperature") or {}
        found: float | None = self.app["temperature"] if "temperature" in self.app else fitted.get("value")
        return found

    def value(self, key: str) -> Any:
        """Return a value of the recipe by its dotted key; None if it is not there."""
        found: Any = self.recipe
        for part in key.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        return found


def card_text(config: Mapping[str, Any], results: Mapping[str, Any], usage: str = "") -> str:
    """Return the card without its header.

    Args:
        config: content of ``config.json``; a tracker gives its part ``galaxydist`` alone, of which only ``recipe`` is needed.
        results: from ``collect_results``; what is missing is called not measured.
        usage: Markdown of the section on use; empty for none.
    """
    facts = CardFacts(config, results)
    parts = [
        *_summary(facts),
        *(["## How to use", usage] if usage else []),
        *_training_data(facts),
        *_training(facts),
        *_results(facts),
        *_classes(facts),
        *_calibration(facts),
        *_unlike(facts),
        *_limits(facts),
        *_licences(facts),
        *_how_to_cite(facts),
    ]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _summary(facts: CardFacts) -> Iterator[str]:
    yield f"# {escape_markdown(facts.title)}"
    classes = ", ".join(map(escape_markdown, facts.classes))
    network, size = escape_markdown(str(facts.value("model.name"))), facts.value("data.image_size")
    yield (
        f"Classifier of galaxy morphology: it sorts a picture of one galaxy into {len(facts.classes)} classes ({classes}). "
        f"Network: {network}{_parameters(facts)}, images of {size} x {size} pixels. Trained on "
        f"{escape_markdown(facts.dataset)} with galaxydist {facts.ours.get('version') or facts.training.get('galaxydist', '')}."
    )
    if facts.test:
        interval = interval_text(facts.test, "accuracy")
        yield (
            f"Accuracy on the {facts.test['count']:,} galaxies of the test split: {three_decimals(facts.test['accuracy'])}"
            f"{f' (95 % interval {interval})' if interval else ''}."
        )
    if facts.is_non_commercial:
        yield f"> **Non-commercial use only**: {_reason_of_non_commercial(facts)}."
    if facts.is_simulated:
        yield "> **No real galaxies**: this model was trained and measured on simulated galaxies only, for tests and teaching."
    for note in facts.results.get("notes") or ():
        yield f"> {escape_markdown(note)}"


def _parameters(facts: CardFacts) -> str:
    parameters = facts.training.get("parameters")
    return f" with {parameters:,} parameters" if isinstance(parameters, int) else ""


def _reason_of_non_commercial(facts: CardFacts) -> str:
    sources = {"the training data": facts.origin.get("licence"), "the weights that it started from": facts.weights.get("licence")}
    named = [f"{name} ({escape_markdown(str(licence))})" for name, licence in sources.items() if is_non_commercial(licence)]
    return f"by the licence of {' and of '.join(named)}"


def _training_data(facts: CardFacts) -> Iterator[str]:
    stored, scale, sides = facts.stored, facts.stored.get("pxscale"), facts.stored.get("source_sides")
    size = stored.get("image_size")
    resampled = f", resampled from {_width_text(stored)} pixels" if sides else ""
    splits = ", ".join(f"{count:,} {name}" for name, count in (facts.training.get("splits") or {}).items())
    variant = facts.test.get("variant") or facts.value("data.variant")
    rows = {
        "data set": f"{escape_markdown(facts.dataset)}, variant {escape_markdown(str(variant))}",
        "galaxies": splits or None,
        "stored images": f"{size} x {size} pixels{resampled}" if size else None,
        "pixel scale": _scale_text(scale) + (" before resampling" if sides and scale else "") if stored else None,
        "licence": escape_markdown(str(facts.origin["licence"])) if facts.origin.get("licence") else "not stated",
        "source": link(str(facts.origin.get("url") or "")),
        "revision": escape_markdown(str(facts.origin["revision"])) if facts.origin.get("revision") else None,
        "SHA-256 of the manifest": facts.data.get("manifest_hash"),
    }
    yield "## Training data"
    yield table(("", ""), [(name, str(value)) for name, value in rows.items() if value])
    if facts.data.get("manifest_hash"):
        yield "The hash of the manifest identifies every image, label and split."


def _width_text(stored: Mapping[str, Any]) -> str:
    """Return the width of the training images in pixels, before they were resampled."""
    low, high = stored.get("source_sides") or (stored.get("image_size"),) * 2
    return f"{low}" if low == high else f"{low} to {high}"


def _scale_text(scale: Sequence[float] | None) -> str:
    if scale is None:
        return "unknown"
    low, median, high = scale
    return f"{median:.4g} arcsec/pixel" + ("" if low == high else f" (median; {low:.4g} to {high:.4g})")


def _training(facts: CardFacts) -> Iterator[str]:
    rows = [("network", escape_markdown(str(facts.value("model.name"))))]
    source = facts.weights.get("source")
    if facts.recipe:
        own = facts.value("model.weights")
        rows.append(("started from", escape_markdown(str(source or (own and Path(own).name) or "random weights"))))
    for label, keys in _RECIPE_ROWS:
        values = [_plain(facts.value(key)) for key in keys if facts.value(key) is not None]
        rows += [(label, ", ".join(values))] if values else []
    if facts.ours.get("step") is not None:
        rows.append(("checkpoint", f"step {facts.ours['step']:,}"))
    rows += _machine_rows(facts.training)
    yield "## Training"
    yield table(("", ""), rows)
    yield "The whole recipe is in `config.json`, under `galaxydist`." if facts.app.get("form") else ""


def _machine_rows(training: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    devices = [f"{count} x {escape_markdown(str(kind))}" for kind, count in (training.get("devices") or {}).items()]
    if devices:
        yield "hardware", ", ".join(devices)
    if training.get("precision"):
        yield "precision", {"no": "float32"}.get(training["precision"], escape_markdown(str(training["precision"])))
    if training.get("hours") is not None:
        yield "time, all starts", hours_text(training["hours"])
    for kind, hours in (training.get("device_hours") or {}).items():
        lost = f", of which {hours_text(hours['lost'])} lost to restarts" if hours["lost"] > 0 else ""
        yield f"device time ({escape_markdown(kind)})", f"{hours_text(hours['used'])}{lost}"
    if training.get("commit"):
        changed = " with uncommitted changes" if training.get("uncommitted_changes") else ""
        yield "commit of galaxydist", f"{escape_markdown(str(training['commit']))}{changed}"


def _results(facts: CardFacts) -> Iterator[str]:
    yield "## Results"
    found = {"test": facts.test, "validation": facts.results.get("val") or {}}
    known = {name: values for name, values in found.items() if values}
    for sentence in facts.results.get("missing") or (() if facts.test else ("the test split was not measured",)):
        yield f"Not measured: {escape_markdown(sentence)}."
    if not known:
        return
    head = ["metric", *(cell for name, one in known.items() for cell in (f"{name} ({one['count']:,} galaxies)", "95 % interval"))]
    rows = []
    for label, name, keys in _METRICS:
        cells = [cell for one in known.values() for cell in (three_decimals(_inner(one, keys)), interval_text(one, name))]
        rows += [[label, *cells]] if any(cell not in ("-", "") for cell in cells) else []
    yield table(head, rows)
    yield _how_measured(facts)
    others = [*([facts.results["other_tta"]] if facts.results.get("other_tta") else []), *(facts.results.get("others") or ())]
    if others:
        yield "Other evaluations of the same checkpoint:"
        columns = ("data", "averaged over", "galaxies", "accuracy", "95 % interval", "macro F1")
        yield table(columns, [_other_row(one) for one in others])


def _inner(values: Mapping[str, Any], keys: Sequence[str]) -> float | None:
    found: Any = values
    for key in keys:
        found = (found or {}).get(key)
    return found if isinstance(found, int | float) else None


def _how_measured(facts: CardFacts) -> str:
    text = "Intervals are percentile bootstraps over galaxies; they leave out the difference between trainings with other seeds. "
    if (facts.test or facts.results["val"]).get("tta") == "d4":
        text += "Probabilities are means over the eight flips and quarter turns of a picture. "
    if facts.results.get("val") and facts.value("eval.checkpoint") == "best":
        text += "The checkpoint was chosen on the validation split, so that its numbers there are too good. "
    if (inner := facts.test.get("without_validation")) is not None:
        text += (
            f"{facts.test['count'] - inner['count']:,} of the test galaxies are in the run's validation split; without them the "
            f"accuracy is {three_decimals(inner['accuracy'])} (N = {inner['count']:,}). "
        )
    return text.strip()


def _other_row(one: Mapping[str, Any]) -> Row:
    averaged = "eight views (d4)" if one.get("tta") == "d4" else "one view"
    data = f"{one['dataset']} ({one['variant']}), {one['split']}"
    accuracy, macro_f1 = three_decimals(one["accuracy"]), three_decimals(one["macro_f1"])
    return escape_markdown(data), averaged, f"{one['count']:,}", accuracy, interval_text(one, "accuracy"), macro_f1


def _classes(facts: CardFacts) -> Iterator[str]:
    test = facts.test
    if not test:
        return
    names, per_class = [escape_markdown(readable(name)) for name in test["classes"]], test["per_class"]
    intervals = per_class.get("intervals") or {}

    def share(name: str, label: int) -> str:
        between = (intervals.get(name) or {label: None})[label]
        return three_decimals(per_class[name][label]) + (f" ({between[0]:.3f} to {between[1]:.3f})" if between else "")

    rows = [
        (
            name,
            f"{per_class['support'][label]:,}",
            share("recall", label),
            share("precision", label),
            three_decimals(per_class["f1"][label]),
            taken_for(test["confusion"][label], label, names),
        )
        for label, name in enumerate(names)
    ]
    yield "### Classes"
    yield table(("class", "test galaxies", "recall (95 %)", "precision (95 %)", "F1", "most often taken for"), rows)
    yield (
        "Recall: the share of a class's galaxies that are found; precision: the share of the galaxies called this class that are "
        "of it. Their intervals are Wilson's for a share."
    )
    if len(names) <= MAX_CONFUSION:
        yield "Confusion matrix of the test split; a row is a true class, a column a predicted one:"
        yield table(("", *names), [(name, *map(str, row)) for name, row in zip(names, test["confusion"], strict=True)])


def _calibration(facts: CardFacts) -> Iterator[str]:
    found = facts.test.get("calibration") or {}
    if not found:
        return
    rows = [("as the network gives them", three_decimals(found["ece"]), interval_text(facts.test, "ece"))]
    temperature = found.get("temperature")
    if temperature is not None:
        scaled = three_decimals(found["scaled"]["ece"]), interval_text(facts.test, "scaled_ece")
        rows.append((f"logits divided by T = {temperature['value']:.3f}", *scaled))
    yield "## Calibration"
    yield table(("probabilities", "expected calibration error", "95 % interval"), rows)
    if temperature is None:
        yield "There is no temperature: no predictions of the validation split are known. The probabilities are not calibrated."
        return
    bound = " It is at an end of the range of the search: the validation split does not determine it." * temperature["at_bound"]
    yield (
        f"The temperature was fitted on the {temperature['count']:,} galaxies of the validation split.{bound} The expected "
        "calibration error is the mean absolute difference between confidence and accuracy over 15 equal bins of confidence, "
        "weighted by their galaxies. Noise enlarges it, so that its interval tends to lie high."
    )


def _unlike(facts: CardFacts) -> Iterator[str]:
    found = facts.results.get("unlike") or {}
    if not found:
        return
    yield "## Pictures unlike the training galaxies"
    method = f" ({escape_markdown(str(found['method']))})" if found.get("method") else ""
    text = (
        f"A picture that is farther from the training galaxies than nearly all of {found['validation']:,} validation galaxies is "
        f"called unlike them{method}. At most {100 * found['expected_false_alarms']:.1f} % of galaxies are expected to be."
    )
    alarms = found.get("false_alarms")
    if alarms:
        split = escape_markdown(str(alarms.get("split", "test")))
        text += f" False alarms on the {split} split: {alarms['count']} of {alarms['of']:,}, {_share_text(alarms)}."
    if not found.get("detected"):
        text += " Not measured: pictures that are no galaxies, and false alarms; `galaxydist publish RUN FOLDER` measures both."
    yield text
    detected = (found.get("detected") or {}).items()
    rows = [(escape_markdown(readable(kind)), f"{one['of']:,}", _share_text(one)) for kind, one in detected]
    if rows:
        yield table(("kind of picture", "pictures", "called unlike (95 % interval)"), rows)


def _share_text(one: Mapping[str, Any]) -> str:
    low, high = (100 * end for end in one["interval"])
    return f"{100 * one['share']:.1f} % ({low:.1f} to {high:.1f} %)"


def _limits(facts: CardFacts) -> Iterator[str]:
    yield "## Limits"
    yield "\n".join(f"- {sentence}" for sentence in limits(facts))


def limits(facts: CardFacts) -> Iterator[str]:
    """Yield a sentence, in Markdown, for each limit that holds for this model."""
    scale = facts.stored.get("pxscale")
    if scale is not None:
        yield (
            f"The training images show {_width_text(facts.stored)} pixels at {_scale_text(scale)}. A picture at another scale is "
            "another picture to the network; how it answers was not measured."
        )
    elif facts.stored:
        yield (
            "The pixel scale of the training images is unknown. A galaxy should fill as much of a picture as in those of the "
            "training data."
        )
    others = {one["dataset"] for one in facts.results.get("others") or ()} - {facts.dataset}
    measured = f"only {', '.join(map(escape_markdown, sorted(others)))}, see above" if others else "none"
    yield (
        f"It has learnt the depth, seeing and colours of the data set {escape_markdown(facts.dataset)}. Pictures of other "
        f"surveys, depths or stretches differ from them; measured on other data: {measured}."
    )
    is_detected = (facts.results.get("unlike") or {}).get("detected")
    measured = " Pictures that are no galaxies are recognised in part, as measured above." if is_detected else ""
    yield f"Every picture gets one of the {len(facts.classes)} classes, stars, artefacts and photographs too.{measured}"
    if facts.is_simulated:
        yield "The labels are those with which the simulator drew the galaxies. Numbers on them say nothing about real galaxies."
    elif is_galaxy10(facts.dataset):
        yield (
            "The ten classes are those of Galaxy10 DECaLS, made by thresholds on the votes of Galaxy Zoo's volunteers. "
            "Labels are noisy: the official file lists 59 galaxies twice, with two labels. Galaxies without a clear vote are not "
            "in the data, so that numbers on all galaxies of a survey would be lower."
        )
    elif "galaxy zoo" in str(facts.origin.get("citation")).lower():
        yield "The labels come from votes of Galaxy Zoo's volunteers, who do not always agree."
    support = (facts.test.get("per_class") or {}).get("support") or ()
    few = [escape_markdown(name) for name, count in zip(facts.classes, support, strict=False) if count < FEW_GALAXIES]
    if few:
        yield f"Fewer than {FEW_GALAXIES} test galaxies: {', '.join(few)}. The numbers of these classes are rough."
    if facts.temperature is None:
        yield "The probabilities are not calibrated: a confidence of 0.9 does not mean that nine of ten such answers are right."
    else:
        yield "Calibrated probabilities hold for galaxies drawn as those of the validation split, and for no others."
    if (prepared := facts.results.get("timm")) and prepared["same_class"] < prepared["galaxies"]:
        yield (
            f"Its answers depend on how a picture is resampled: of {prepared['galaxies']} validation galaxies that timm's "
            f"transform prepared, {prepared['galaxies'] - prepared['same_class']} got another class."
        )
    yield "These are the numbers of one training with one seed."
    yield "It names the shape of a galaxy in a picture. It measures no position, brightness, size or redshift."


def _licences(facts: CardFacts) -> Iterator[str]:
    data, source = facts.origin.get("licence"), facts.weights.get("source")
    lines = [f"training data: {escape_markdown(data) if data else 'not stated'}"]
    if source:
        licence = escape_markdown(facts.weights.get("licence") or "not stated")
        lines.append(f"starting weights ({escape_markdown(str(source))}): {licence}")
    yield "## Licences"
    yield "\n".join(f"- {line}" for line in lines)
    if facts.licence is None:
        yield (
            "A licence is unknown, so that the header says `unknown`. Ask those who made the data or the weights before you pass "
            "this model on."
        )
    else:
        yield (
            f"The header names the strictest of these ({escape_markdown(facts.licence)}). Whoever publishes this model may "
            "choose another one that they allow."
        )
    if facts.is_non_commercial:
        yield f"Non-commercial use only, {_reason_of_non_commercial(facts)}."


def _how_to_cite(facts: CardFacts) -> Iterator[str]:
    yield "## How to cite"
    yield "Work with this model cites:"
    yield from works_to_cite(
        facts.dataset,
        str(facts.origin.get("citation") or ""),
        facts.weights.get("source"),
        uses_timm=bool(facts.weights.get("architecture")),
        version=str(facts.ours.get("version") or ""),
    )


# Markdown.


def table(head: Row, rows: Sequence[Row]) -> str:
    """Return a table; the first column is text, the others are numbers."""
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def _plain(value: Any) -> str:
    return escape_markdown({True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value))
