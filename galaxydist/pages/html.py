"""Self-contained HTML pages from the package's templates, with embedded images and figures."""

import base64
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from galaxydist.evaluation.plots import STYLE

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

TEMPLATES = Path(__file__).parent / "templates"
# matplotlib gives the parts of every figure the same numbered ids, which would be duplicates on one page. (Other ids are hashes
# that the figure refers to.)
_NUMBERED_ID = re.compile(r' id="[A-Za-z]\w*?(?:\.\w+)?_\d+"')

# Figure colours that are hard to see on a dark background -> variable of page.css that replaces them.
_DARK_COLOURS = {"#0072b2": "--blue", "#d55e00": "--vermillion", "#009e73": "--green", "#555555": "--grey"}


def render(template: str, context: Mapping[str, Any]) -> str:
    """Render a template of ``galaxydist/pages/templates``; a name missing from the context is an error."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["thousands"] = lambda number: f"{number:,}"
    return environment.get_template(template).render(context)


def image_uri(image: NDArray[np.uint8] | Image.Image, *, width: int | None = None, quality: int = 85) -> str:
    """Return an image as the data URI of a JPEG.

    Args:
        image: H x W x 3 uint8, or a Pillow image.
        width: width of the square that the image is resized to; None to keep its size.
    """
    sized = image if isinstance(image, Image.Image) else Image.fromarray(image)
    if width is not None and sized.size != (width, width):
        sized = sized.resize((width, width), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    sized.save(stream, "JPEG", quality=quality, optimize=True)
    return jpeg_uri(stream.getvalue())


def jpeg_uri(data: bytes) -> str:
    """Return a JPEG file as a data URI."""
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def figure_svg(figure: "Figure", description: str) -> "Markup":
    """Return a figure as inline SVG, with a transparent background, text as text, and black drawn in the page's text colour.

    The page's style sheet may replace the figure's dark colours by name (``--blue``).

    Args:
        figure: its black lines and text take the page's text colour.
        description: text alternative for screen readers.
    """
    import matplotlib
    from markupsafe import Markup, escape

    stream = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.fonttype": "none", "svg.hashsalt": description}):
        figure.savefig(stream, format="svg", transparent=True, dpi=200, metadata={"Date": None, "Creator": None})
    drawn = stream.getvalue()
    _, body = drawn[drawn.index("<svg") :].split(">", 1)
    width, height = figure.get_size_inches()  # 72 units of the drawing or 96 pixels each
    body = _NUMBERED_ID.sub("", re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL))
    # SVG's default colour is black. The attributes of <svg> give the page's text colour to parts without a colour of their own.
    body = body.replace("#000000", "currentColor").replace("stroke: black", "stroke: currentColor")
    for colour, name in _DARK_COLOURS.items():
        body = body.replace(f": {colour}", f": var({name}, {colour})")
    opening = (
        f'<svg viewBox="0 0 {72 * width:g} {72 * height:g}" style="max-width: {96 * width:.0f}px" fill="currentColor" role="img" '
        f'aria-label="{escape(description)}" xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return Markup(opening + body)
