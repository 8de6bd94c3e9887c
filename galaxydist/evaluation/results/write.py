"""The report as files: the page, and the tables beside it in Markdown and LaTeX."""

from collections.abc import Mapping
from pathlib import Path

from galaxydist.atomic_files import replace_bytes
from galaxydist.errors import UserError
from galaxydist.evaluation.results.gather import Results
from galaxydist.evaluation.results.latex import render_latex
from galaxydist.evaluation.results.markdown import render_markdown
from galaxydist.evaluation.results.page import render_page


def write_report(results: Results, page: Path, *, provenance: Mapping[str, str]) -> list[Path]:
    """Write a report.

    Everything is made before anything is written, and each file is written whole or not at all.

    Args:
        results: of the runs, from ``gather``.
        page: the HTML page; its folder is made if need be. The tables lie beside it, with ``.md`` and ``.tex``.
        provenance: ``command`` and ``version``.

    Returns:
        The files, the page last.

    Raises:
        UserError: the page cannot be there; the disk is full.
    """
    known = {**provenance, "versions": _versions()}
    texts = {
        page.with_suffix(".md"): render_markdown(results, known),
        page.with_suffix(".tex"): render_latex(results, known),
        page: render_page(results, known),
    }
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{page.parent} cannot be made: {error.strerror}. Give another place with -o FILE.") from error
    for path, text in texts.items():
        replace_bytes(path, text.encode())
    return list(texts)


def _versions() -> str:
    from importlib.metadata import version

    return ", ".join(f"{name} {version(name)}" for name in ("numpy", "scipy", "pyarrow", "matplotlib"))
