"""The page on which pictures are labelled: one picture, many pictures, a place on the sky, and a text about the model."""

from collections.abc import Mapping
from contextlib import ExitStack
from html import escape
from pathlib import Path
from typing import Any, BinaryIO

import gradio as gr

from .answer_view import AnswerView, message_html, table_html
from .batch_table import label_many
from .cutout import CutoutError, CutoutForm, fetch_cutout
from .model import ServedModel
from .pictures import READABLE, Picture, PictureError, read_picture
from .published_model import PublishedFolderError, read_about, read_measured
from .reference_set import Example, Reference, read_examples
from .request_filter import FILE_INPUT, FILES_INPUT, STATE_INPUT, VALUE_INPUT

TITLE = "Galaxy morphology"
LEAD = (
    f"Give a picture with one galaxy in the middle ({READABLE}), and a network names its class. Pictures are deleted from this "
    "server within minutes."
)
EMPTY = '<p class="gd-empty">The answer appears here.</p>'
NO_PICTURE = "There is no picture: choose a file."
GONE = "The picture is no longer on the server: give it again."
NO_CUTOUT = "The pictures that this model was trained on are no cutouts of the Legacy Surveys with a known pixel scale."
NUM_NEIGHBOURS = 6
# Files of one upload that are open at the same time.
MAX_FILES = 300
# On a telephone the answer stands below the examples.
SHOW_ANSWER = """() => {
    const answer = document.querySelector("#gd-answer");
    if (answer.getBoundingClientRect().top > 0.7 * innerHeight) answer.scrollIntoView();
}"""
# Events take the values as the browser sends them: gradio itself would open the files.
EVENT = {"preprocess": False, "api_visibility": "undocumented"}


class Desk:
    """The models of the page, and what it knows of them.

    Args:
        models: by the names that users choose from; not empty.

    Raises:
        PublishedFolderError: the stored galaxies of a model are damaged.
    """

    def __init__(self, models: Mapping[str, ServedModel]) -> None:
        self._models = dict(models)
        self._references = {name: Reference.open(model.folder) for name, model in models.items()}
        self._examples = {name: read_examples(model.folder) for name, model in models.items()}
        self._measured = {name: read_measured(model.folder, len(model.config.classes)) for name, model in models.items()}
        for name, model in models.items():
            labels = [example.label for example in self._examples[name]]
            labels += [] if (reference := self._references[name]) is None else reference.labels.tolist()
            if not all(0 <= label < len(model.config.classes) for label in labels):
                raise PublishedFolderError(f"{model.folder} has stored galaxies of classes that its model has not: publish again")

    @property
    def names(self) -> list[str]:
        return list(self._models)

    def known(self, name: object) -> str:
        """Return the name of a model; the first one for a name that the page does not offer."""
        return name if isinstance(name, str) and name in self._models else self.names[0]

    def model(self, name: object) -> ServedModel:
        return self._models[self.known(name)]

    def examples(self, name: str) -> list[Example]:
        return self._examples[name]

    def look_at(self, name: object, picture: Picture, known_label: str | None = None, notes: tuple[str, ...] = ()) -> AnswerView:
        """Return what a model says about a picture, with the training galaxies that are similar."""
        model, reference = self.model(name), self._references[self.known(name)]
        (answer,) = model.predict([picture])
        neighbours = [] if reference is None else reference.nearest(answer.embedding, NUM_NEIGHBOURS)
        novelty = None if reference is None else reference.novelty(answer.seen)
        measured = self._measured[self.known(name)]
        return AnswerView(model.config, picture, answer, known_label, neighbours, novelty, notes, measured)

    def reference(self, name: object) -> Reference | None:
        return self._references[self.known(name)]

    def read_example(self, name: object, number: object) -> tuple[Picture, str]:
        """Return an example of a model and its label.

        Raises:
            PictureError: there is no such example.
        """
        found = self._examples[self.known(name)]
        if type(number) is not int or not 0 <= number < len(found):
            raise PictureError("There is no such example: choose another one.")
        example = found[number]
        return read_picture(example.path.read_bytes(), f"Example {example.id}"), self.model(name).config.classes[example.label]


class _OnePicture:
    """Events of the tab for one picture. Each returns the answer as HTML, the upload that it is about, and plain values."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def take_upload(self, upload: object, name: object) -> tuple[Any, ...]:
        """Answer an uploaded picture, and make room for the next one."""
        return *self._answer(upload, name), None

    def take_example(self, number: object, name: object) -> tuple[Any, ...]:
        """Answer an example."""
        try:
            view = self._desk.look_at(name, *self._desk.read_example(name, number))
        except PictureError as error:
            return _problem(error)
        return view.to_html(), None, view.to_dict()

    def change_model(self, name: object, upload: object) -> tuple[Any, ...]:
        """Answer the same upload with another model; an example belongs to its model."""
        return self._answer(upload, name) if upload is not None else (EMPTY, None, None)

    def _answer(self, upload: object, name: object) -> tuple[Any, ...]:
        try:
            view = self._desk.look_at(name, read_picture(*read_upload(upload)))
        except PictureError as error:
            return _problem(error)
        return view.to_html(), upload, view.to_dict()


class _ManyPictures:
    """Events of the tab for many pictures."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def take_uploads(self, uploads: object, name: object, progress: Any = gr.Progress()) -> tuple[str, None]:  # noqa: B008
        """Answer uploaded pictures and archives, and make room for the next ones."""
        try:
            with ExitStack() as stack:
                table = label_many(
                    self._desk.model(name),
                    open_uploads(uploads, stack),
                    reference=self._desk.reference(name),
                    progress=lambda done, total: progress((done, total), desc="labelled", unit="pictures"),
                )
        except PictureError as error:
            return message_html(str(error)), None
        return table_html(table), None


class _SkyPosition:
    """Events of the tab for a position on the sky."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def take_position(self, ra: object, dec: object, name: object) -> str:
        """Answer the cutout at a position."""
        form = CutoutForm.of(self._desk.model(name).config)
        try:
            if form is None:
                raise CutoutError(NO_CUTOUT)
            cutout = fetch_cutout(_text(ra), _text(dec), form)
        except CutoutError as error:
            return message_html(str(error))
        notes = (cutout.caption, *cutout.notes)
        return self._desk.look_at(name, cutout.picture, notes=notes).to_html()

    def describe(self, name: object) -> str:
        """Return the cutouts that a model was trained on."""
        form = CutoutForm.of(self._desk.model(name).config)
        return f'<p class="gd-note">{escape(NO_CUTOUT if form is None else f"As in the training: {form}.")}</p>'


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _problem(error: PictureError) -> tuple[Any, ...]:
    return message_html(str(error)), None, {"problem": str(error)}


def read_upload(upload: object) -> tuple[bytes, str]:
    """Return the bytes and the name of an uploaded file; the request's filter has seen that it is one.

    Raises:
        PictureError: there is none, or it has been deleted meanwhile.
    """
    if not isinstance(upload, dict) or not isinstance(path := upload.get("path"), str):
        raise PictureError(NO_PICTURE)
    try:
        data = Path(path).read_bytes()
    except OSError:
        raise PictureError(GONE) from None
    name = upload.get("orig_name")
    return data, name if isinstance(name, str) else Path(path).name


def open_uploads(uploads: object, stack: ExitStack) -> list[tuple[str, BinaryIO]]:
    """Return names and open files of several uploads.

    Args:
        uploads: as the page sends them.
        stack: closes the files.

    Raises:
        PictureError: there is none, there are too many, or one has been deleted meanwhile.
    """
    if not isinstance(uploads, list) or not uploads:
        raise PictureError("There is no picture: choose files.")
    if len(uploads) > MAX_FILES:
        raise PictureError(
            f"{len(uploads)} files were given, of which at most {MAX_FILES} are taken: put them into one zip archive."
        )
    found: list[tuple[str, BinaryIO]] = []
    for upload in uploads:
        path, name = Path(upload["path"]), upload.get("orig_name")
        try:
            found.append((name if isinstance(name, str) else path.name, stack.enter_context(path.open("rb"))))
        except OSError:
            raise PictureError(GONE) from None
    return found


def notice(model: ServedModel) -> str:
    """Return a line about a model, and its licence if that limits the use."""
    config = model.config
    is_named = config.dataset and config.dataset not in config.title
    data = f", trained on {escape(config.dataset)}" if is_named else ""
    text = f'<p class="gd-model">{escape(config.title)}{data}: {len(config.classes)} classes.</p>'
    if config.is_non_commercial:
        licence = f" (licence {escape(config.licence)})" if config.licence else ""
        text += (
            '<p class="gd-licence">For non-commercial use only: the training data'
            f"{licence} or the weights that the training started from allow no other use.</p>"
        )
    return text


def about(model: ServedModel) -> str:
    """Return the text about a model: its card in Markdown, without the header for the Hub and the section on use."""
    return read_about(model.folder) or "This model was published without a card."


def build_page(models: Mapping[str, ServedModel]) -> gr.Blocks:
    """Build the page of some models.

    Args:
        models: by the names that users choose from; not empty.

    Raises:
        PublishedFolderError: the stored galaxies of a model are damaged.
    """
    desk = Desk(models)
    first = desk.names[0]
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.HTML(f'<div class="gd-head"><h1>{TITLE}</h1><p>{LEAD}</p></div>')
        model = gr.Dropdown(desk.names, value=first, label="Model", visible=len(desk.names) > 1, elem_id="gd-model")
        line = gr.HTML(notice(desk.model(first)), elem_id="gd-notice")
        model.change(lambda name: notice(desk.model(name)), model, line, api_name=False, **EVENT)
        with gr.Tabs():
            with gr.Tab("One picture"):
                _add_one_picture(desk, model)
            with gr.Tab("Many pictures"):
                _add_many_pictures(desk, model)
            if any(CutoutForm.of(desk.model(name).config) for name in desk.names):
                with gr.Tab("Sky position"):
                    _add_sky_position(desk, model)
            with gr.Tab("About the model"):
                text = gr.Markdown(about(desk.model(first)), elem_id="gd-about")
                model.change(lambda name: about(desk.model(name)), model, text, api_name=False, **EVENT)
    return page


def _add_one_picture(desk: Desk, model: gr.Dropdown) -> None:
    events, first = _OnePicture(desk), desk.names[0]
    upload, examples = gr.State(None), {}
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            drop = gr.File(label="Picture", height=170, elem_id="gd-drop")
            for name in desk.names:
                if found := desk.examples(name):
                    examples[name] = gr.Dataset(
                        components=[gr.Image(render=False)],
                        samples=[[str(example.path)] for example in found],
                        type="index",
                        label="Or one of these galaxies, which it was not trained on",
                        samples_per_page=20,
                        visible=name == first,
                        elem_classes="gd-examples",
                    )
        with gr.Column(scale=2, min_width=320):
            answer = gr.HTML(EMPTY, elem_id="gd-answer")
    shown = [answer, upload, gr.JSON(visible=False)]
    given = drop.upload(events.take_upload, [drop, model], [*shown, drop], api_name="predict", **EVENT)
    given.then(None, js=SHOW_ANSWER)
    model.change(events.change_model, [model, upload], shown, api_name="change_model", **EVENT)
    for dataset in examples.values():
        dataset.click(events.take_example, [dataset, model], shown, api_name=False, **EVENT).then(None, js=SHOW_ANSWER)
    if examples and len(desk.names) > 1:
        model.change(
            lambda name: {dataset: gr.update(visible=key == name) for key, dataset in examples.items()},
            model,
            [*examples.values()],
            api_name=False,
            **EVENT,
        )


def _add_many_pictures(desk: Desk, model: gr.Dropdown) -> None:
    gr.HTML('<p class="gd-note">Several files, or one zip archive of pictures: a table, and the same as CSV.</p>')
    drop = gr.File(label="Pictures or a zip", file_count="multiple", height=140, elem_id="gd-drop-many")
    answer = gr.HTML(elem_id="gd-table")
    # One table after the other: single pictures of others are answered in between.
    drop.upload(
        _ManyPictures(desk).take_uploads,
        [drop, model],
        [answer, drop],
        api_name="label_many",
        concurrency_limit=1,
        show_progress_on=drop,
        **EVENT,
    )


def _add_sky_position(desk: Desk, model: gr.Dropdown) -> None:
    events = _SkyPosition(desk)
    form = gr.HTML(events.describe(desk.names[0]))
    with gr.Row():
        ra = gr.Textbox(label="Right ascension (degrees, or 10:00:27.9)", elem_id="gd-ra")
        dec = gr.Textbox(label="Declination (degrees, or +02:12:21)", elem_id="gd-dec")
    button = gr.Button("Fetch and label", variant="primary", elem_id="gd-fetch")
    answer = gr.HTML(elem_id="gd-sky")
    gr.on(
        [button.click, ra.submit, dec.submit], events.take_position, [ra, dec, model], answer, api_name="label_position", **EVENT
    )
    model.change(events.describe, model, form, api_name=False, **EVENT)


def input_kinds(page: gr.Blocks) -> dict[int, list[str]]:
    """Return the kinds of the inputs of each event by its number, for the filter of requests.

    Events that the browser handles by itself are left out.
    """
    return {number: [_input_kind(block) for block in event.inputs] for number, event in page.fns.items() if event.fn is not None}


def _input_kind(block: Any) -> str:
    if isinstance(block, gr.State):
        return STATE_INPUT
    if isinstance(block, gr.File):
        return FILES_INPUT if block.file_count == "multiple" else FILE_INPUT
    return VALUE_INPUT


def build_theme() -> Any:
    """Return the looks of the page, with the fonts of the user's own system."""
    sans, mono = ("system-ui", "Segoe UI", "Roboto", "Arial", "sans-serif"), ("ui-monospace", "Menlo", "Consolas", "monospace")
    return gr.themes.Base(primary_hue="sky", neutral_hue="slate", font=sans, font_mono=mono)
