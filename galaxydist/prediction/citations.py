"""Works and acknowledgements that the makers of data, weights and software ask for, beside the citation of the data set itself.

Sources: the acknowledgements on the pages of astroNN's Galaxy10 (also in henrysky/Galaxy10), of the Legacy Surveys, of Galaxy
Zoo's data and of the SDSS; timm's CITATION.cff. Their wording may change, so that a card gives their addresses.
"""

import re
from collections.abc import Iterator

from galaxydist.evaluation.text_table import URL, escape_markdown, fenced, link

# Pattern in the name or citation of a data set; who asks for what; address.
_ACKNOWLEDGEMENTS = (
    (
        r"galaxy10|gz10",
        "Galaxy10 DECaLS of astroNN, acknowledgements to copy",
        "https://astronn.readthedocs.io/en/latest/galaxy10.html#acknowledgments",
    ),
    (
        r"legacy (imaging )?survey|decals|galaxy10",
        "DESI Legacy Imaging Surveys, acknowledgement to copy",
        "https://www.legacysurvey.org/acknowledgment",
    ),
    (r"galaxy ?zoo|galaxy10|\bgz[_ -]?\w+|\bgz\d", "Galaxy Zoo, publications by data release", "https://data.galaxyzoo.org"),
    (
        r"sloan digital sky survey|\bsdss\b",
        "Sloan Digital Sky Survey, acknowledgement to copy",
        "https://www.sdss.org/collaboration/citing-sdss",
    ),
)
_TIMM = "timm, PyTorch Image Models (Wightman, doi:10.5281/zenodo.4414861)"
_HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(@[\w.-]+)?")
SHIPPED = "galaxydist/models/shipped/"


def works_to_cite(dataset: str, citation: str, source: str | None, *, uses_timm: bool, version: str) -> Iterator[str]:
    """Yield Markdown: a list of works and acknowledgements, then the citation of the data set as a block if it is BibTeX.

    Args:
        dataset: name of the training data.
        citation: of the training data, as text or BibTeX; may be empty.
        source: of the weights that the training started from; None: random weights.
        uses_timm: the architecture is one of timm's.
        version: of galaxydist.
    """
    citation = citation.strip()
    is_bibtex = re.match(r"@\w+\s*\{", citation) is not None
    lines = [f"- {_linked(' '.join(work.split()))}" for work in citation.split("; ") if work and not is_bibtex]
    if not citation:
        lines.append(f"- {escape_markdown(dataset)}: no works to cite are stated")
    pages = _pages(dataset, citation, source, uses_timm=uses_timm, version=version)
    lines += [f"- {escape_markdown(name)}{f': {link(address)}' if address else ''}" for name, address in pages]
    yield "\n".join(lines)
    if is_bibtex:
        yield fenced(citation, "bibtex")


def _pages(dataset: str, citation: str, source: str | None, *, uses_timm: bool, version: str) -> Iterator[tuple[str, str | None]]:
    """Yield what is asked for, with the address of its wording, or None."""
    text = f"{dataset} {citation}"
    if not re.search("simulator", citation):
        yield from ((name, address) for pattern, name, address in _ACKNOWLEDGEMENTS if re.search(pattern, text, re.IGNORECASE))
    if source is not None and source.startswith(SHIPPED):
        yield "starting weights shipped with galaxydist", None
    elif source is not None:
        repo = hub_repository(source)
        yield f"starting weights {repo or 'as their source asks'}", f"https://huggingface.co/{repo}" if repo else None
    if uses_timm or (source or "").startswith("timm/"):
        yield _TIMM, "https://github.com/huggingface/pytorch-image-models"
    yield f"galaxydist {version}".strip() + ", as CITATION.cff in its repository says", None


def hub_repository(source: str | None) -> str | None:
    """Return ``OWNER/NAME`` of weights from a repository on the Hub; None for others.

    Args:
        source: as ``ModelRecord.source`` names it: ``timm/resnet18.a1_in1k@REVISION``, a model's name, or a file.
    """
    name = (source or "").removeprefix("hf-hub:")
    found = _HUB_NAME.fullmatch(name)
    return found[1] if found is not None and not name.startswith(SHIPPED) and not name.endswith(".safetensors") else None


def _linked(text: str) -> str:
    """Return text with its addresses as links."""
    words = []
    for word in text.split():
        found = URL.search(word)
        address = found[0].rstrip(").,;") if found is not None else ""
        before, _, after = word.partition(address) if address else (word, "", "")
        words.append(escape_markdown(before) + (f"<{address}>{escape_markdown(after)}" if address else ""))
    return " ".join(words)
