"""An answer as HTML: class, probabilities, agreement of the views, saliency, and similar galaxies of the training.

Texts of users and of models are escaped, and pictures stand in the page itself, so that nothing of them is left on the server.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .batch_table import FIRST_COLUMNS, LAST_COLUMNS, BatchTable
from .model import Answer
from .pictures import Picture
from .published_model import AppConfig, Measured, Share
from .reference_set import Neighbour, Novelty

# Width of the pictures in CSS pixels is at most 320; twice as many for sharp screens would make an answer of half a megabyte.
SHOWN_SIDE, JPEG_QUALITY = 448, 88
# Colours of a saliency map from 0 to 1 (viridis), and the opacity at 1, as in galleries of mistakes.
SALIENCY_COLOURS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], np.float32)
OPACITY = 0.6
# Classes with a bar of their own; a model of hundreds shows the most probable ones.
MAX_BARS = 12
# Rows of a table that the page shows.
MAX_ROWS = 200


@dataclass(frozen=True)
class AnswerView:
    """Everything that the page shows about one picture.

    Args:
        config: of the model.
        picture: as it was given.
        answer: of the model.
        known_label: class of an example; None for a user's picture.
        neighbours: most similar first.
        novelty: distance from the training galaxies; None: the model does not know them.
        notes: sentences before those of the answer.
        measured: how often the model was right on its test galaxies; None: not known.
    """

    config: AppConfig
    picture: Picture
    answer: Answer
    known_label: str | None = None
    neighbours: Sequence[Neighbour] = ()
    novelty: Novelty | None = None
    notes: tuple[str, ...] = ()
    measured: Measured | None = None

    @property
    def is_unlike(self) -> bool | None:
        """True if the picture is unlike the training galaxies; None if that is not known."""
        return None if self.novelty is None else self.novelty.is_unlike

    def to_dict(self) -> dict[str, Any]:
        """Return the answer in plain values, for programs."""
        answer = self.answer
        views = answer.views[:, answer.label]
        found = zip(self.config.classes, answer.probabilities, strict=True)
        return {
            "picture": self.picture.name,
            "class": answer.class_name,
            "probabilities": {name: round(float(value), 6) for name, value in found},
            "calibrated": self.config.temperature is not None,
            "views_that_agree": answer.agreement,
            "views_from_to": [round(float(views.min()), 6), round(float(views.max()), 6)],
            "unlike_training_galaxies": self.is_unlike,
            "notes": [*self.notes, *answer.notes],
        }

    def to_html(self) -> str:
        """Return the answer as an element of the page."""
        parts = [
            self._banner(),
            self._headline(),
            self._measured(),
            self._bars(),
            self._agreement(),
            self._pictures(),
            self._similar(),
        ]
        kind = "gd-answer gd-unlike" if self.is_unlike else "gd-answer"
        return f'<section class="{kind}" aria-live="polite">{"".join(parts)}</section>'

    def _banner(self) -> str:
        novelty = self.novelty
        if novelty is None:
            text = "This model has no stored training galaxies: it cannot tell pictures that are unlike them."
            return f'<p class="gd-note">{text}</p>'
        if not novelty.is_unlike:
            return ""
        farther = round(novelty.share * novelty.num_validation)
        verb = "is" if farther == 1 else "are"
        return (
            '<div class="gd-banner" role="alert"><strong>This picture is unlike the training galaxies:</strong> '
            f"{farther or 'none'} of {novelty.num_validation:,} validation galaxies {verb} as far from "
            "them. The classes below are what the network answers anyway: do not rely on them.</div>"
        )

    def _headline(self) -> str:
        value = percent(self.answer.confidence)
        kind = "calibrated" if self.config.temperature is not None else "not calibrated"
        text = (
            "Calibrated: of the validation galaxies with such a confidence, about this fraction was right."
            if self.config.temperature is not None
            else "Not calibrated: networks tend to be too confident."
        )
        if self.is_unlike:
            kind, text = "not calibrated for it", "A confidence is calibrated for galaxies like those of the training only."
        known = f'<p class="gd-known">Its label: {escape(self.known_label)}</p>' if self.known_label else ""
        notes = "".join(f'<p class="gd-note">{escape(note)}</p>' for note in (*self.notes, *self.answer.notes))
        return (
            f'<p class="gd-picture-name">{escape(self.picture.name)}</p><h2>{escape(self.answer.class_name)}</h2>'
            f'<p class="gd-confidence">{value}, {kind}</p><p class="gd-note">{escape(text)}</p>{known}{notes}'
        )

    def _measured(self) -> str:
        """Return how often the model was right on galaxies like those of the training."""
        measured, label = self.measured, self.answer.label
        if measured is None or self.is_unlike:
            return ""
        text = f"Measured: right for {share_text(measured.accuracy)} of its {measured.count:,} test galaxies"
        precision, name = measured.precision[label], self.answer.class_name
        if precision is None:
            text += f", none of which it called {name}."
        else:
            text += f", and for {share_text(precision)} of the {measured.called[label]:,} that it called {name}"
            text += " (a share that depends on how common the classes are)."
        return f'<p class="gd-note gd-measured">{escape(text)}</p>'

    def _bars(self) -> str:
        probabilities = self.answer.probabilities
        order = np.argsort(-probabilities, kind="stable")[:MAX_BARS]
        left = len(probabilities) - len(order)
        rows = "".join(
            f'<tr><th scope="row">{escape(self.config.classes[index])}</th><td class="gd-track"><div class="gd-bar" '
            f'style="width:{100 * float(probabilities[index]):.1f}%"></div></td>'
            f"<td>{percent(probabilities[index])}</td></tr>"
            for index in order
        )
        more = f'<p class="gd-note">{left} more classes are less probable.</p>' if left else ""
        return f'<table class="gd-bars"><caption>Probability of each class</caption>{rows}</table>{more}'

    def _agreement(self) -> str:
        values = self.answer.views[:, self.answer.label]
        agree = "agrees" if self.answer.agreement == 1 else "agree"
        return (
            f'<p class="gd-views">{self.answer.agreement} of {len(values)} views {agree}: over the flips and quarter turns, the '
            f"probability of {escape(self.answer.class_name)} is {percent(values.min())} to {percent(values.max())}.</p>"
        )

    def _pictures(self) -> str:
        figures = [_figure(self.picture.pixels, "The picture")]
        if self.answer.saliency is not None:
            method = self.config.saliency or "saliency"
            text = f"Where the network looked ({method}): yellow is most"
            if not self.answer.saliency.any():
                text = f"{method}: no part of the picture speaks for this class"
            figures.append(_figure(blend(self.picture.pixels, self.answer.saliency), text))
        return f'<div class="gd-figures">{"".join(figures)}</div>'

    def _similar(self) -> str:
        if not self.neighbours or self.is_unlike:  # of a cat, all galaxies are alike
            return ""
        figures = []
        for number, found in enumerate(self.neighbours, start=1):
            caption = f"{escape(self.config.classes[found.label])}<br><small>similarity {found.similarity:.2f}</small>"
            image = "" if found.thumbnail is None else f'<img src="{data_uri(found.thumbnail)}" alt="training galaxy {number}">'
            figures.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
        return f'<h3>Most similar training galaxies</h3><div class="gd-similar">{"".join(figures)}</div>'


def table_html(table: BatchTable) -> str:
    """Return the answers about many pictures as an element of the page: the first rows, and a link to the CSV of all."""
    link = f"data:text/csv;charset=utf-8;base64,{base64.b64encode(table.to_csv().encode()).decode()}"
    count = len(table.rows)
    # The probabilities of all classes are in the CSV only: the page shows what fits on it.
    shown = [number for number, name in enumerate(table.columns) if name in (*FIRST_COLUMNS, *LAST_COLUMNS)]
    num_failed = sum(bool(row.problem) for row in table.rows)
    lines = [f"{count} {'picture' if count == 1 else 'pictures'}, {num_failed} not labelled.", *table.notes]
    if count > MAX_ROWS:
        lines.append(f"The first {MAX_ROWS} are shown; the CSV has all of them.")
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in (table.columns[number] for number in shown))
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cells[number])}</td>' for number in shown)}</tr>" for cells in table.cells()[:MAX_ROWS]
    )
    return (
        f'<section class="gd-answer" aria-live="polite"><p>{" ".join(map(escape, lines))}</p>'
        f'<p><a class="gd-link" download="galaxies.csv" href="{link}">Download the table (CSV)</a></p>'
        f'<div class="gd-scroll" tabindex="0"><table class="gd-table"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></section>"
    )


def message_html(text: str) -> str:
    """Return a message about a picture that could not be used, as an element of the page."""
    return f'<section class="gd-answer" aria-live="assertive"><div class="gd-problem" role="alert">{escape(text)}</div></section>'


def percent(value: float) -> str:
    """Format a probability; only what is exactly 0 or 1 is called so."""
    shown = 100 * float(value)
    if 0 < shown < 0.1:
        return "< 0.1\xa0%"
    if 99.9 < shown < 100:
        return "> 99.9\xa0%"
    return f"{shown:.1f}\xa0%"


def share_text(share: Share) -> str:
    """Return a share and its interval in per cent."""
    if share.interval is None:
        return percent(share.value)
    low, high = share.interval
    return f"{percent(share.value)} (95\xa0% interval {100 * low:.1f} to {percent(high)})"


def blend(pixels: NDArray[np.uint8], saliency: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Lay a saliency map over a picture: transparent where the map is 0, ``OPACITY`` where it is 1.

    Args:
        pixels: H x W x 3.
        saliency: H x W, 0 to 1.

    Returns:
        At most ``SHOWN_SIDE`` pixels wide and high, x 3 uint8.
    """
    shown = shrink(pixels)
    height, width = shown.shape[:2]
    resized = Image.fromarray(np.ascontiguousarray(saliency, np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    values = np.asarray(resized, np.float32).clip(0, 1)
    steps = np.linspace(0, 1, len(SALIENCY_COLOURS))
    colours = np.stack([np.interp(values, steps, SALIENCY_COLOURS[:, channel]) for channel in range(3)], axis=-1)
    alpha = OPACITY * values[..., None]
    mixed: NDArray[np.uint8] = np.rint((1 - alpha) * shown + alpha * colours).astype(np.uint8)
    return mixed


def shrink(pixels: NDArray[np.uint8], side: int = SHOWN_SIDE) -> NDArray[np.uint8]:
    """Return a picture of at most ``side`` pixels in width and height."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    return np.asarray(image)


def data_uri(pixels: NDArray[np.uint8]) -> str:
    """Return a picture as an address that contains it."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _figure(pixels: NDArray[np.uint8], caption: str) -> str:
    text = escape(caption)
    return f'<figure><img src="{data_uri(shrink(pixels))}" alt="{text}"><figcaption>{text}</figcaption></figure>'
