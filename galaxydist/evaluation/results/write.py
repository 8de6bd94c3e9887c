"""The report as files: the page, and the tables beside it in Markdown and LaTeX."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from galaxydist.errors import UserError
from galaxydist.evaluation.results.gather import Results, gather
from galaxydist.evaluation.results.latex import render_latex
from galaxydist.evaluation.results.markdown import render_markdown
from galaxydist.evaluation.results.page import Picture, render_page
from galaxydist.evaluation.trial import Note
from galaxydist.files import replace_bytes


def write_report(
    run_dirs: Iterable[Path],
    page: Path,
    *,
    provenance: Mapping[str, str],
    notes: Sequence[Note] = (),
    gallery: Sequence[Picture] = (),
) -> tuple[Results, list[Path]]:
    """Report runs.

    Everything is made before anything is written, and each file is written whole or not at all.

    Args:
        run_dirs: run folders; what cannot be used becomes a note.
        page: the HTML page; its folder is made if need be. The tables lie beside it, with ``.md`` and ``.tex``.
        provenance: ``command`` and ``version``.
        notes: what is known to be missing already.
        gallery: pictures for the page.

    Returns:
        What was reported, and the files.

    Raises:
        UserError: not one run can be reported; the page cannot be there; the disk is full.
    """
    results = gather(run_dirs, notes)
    known = {**provenance, "versions": _versions()}
    texts = {
        page.with_suffix(".md"): render_markdown(results, known),
        page.with_suffix(".tex"): render_latex(results, known),
        page: render_page(results, known, gallery),
    }
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{page.parent} cannot be made: {error.strerror}. Give another place with -o FILE.") from error
    for path, text in texts.items():
        replace_bytes(path, text.encode())
    return results, list(texts)


def _versions() -> str:
    from importlib.metadata import version

    return ", ".join(f"{name} {version(name)}" for name in ("numpy", "scipy", "pyarrow", "matplotlib"))
