"""The results page in a real browser: nothing fetched, nothing complained of, everything there at a phone's width."""

from pathlib import Path

import pytest

from galaxydist.cli.main import main
from tests.helpers.browser import Browser
from tests.helpers.report_runs import write_gallery_of, write_sweep

pytestmark = pytest.mark.browser

SECTIONS = [
    "matrix",
    "claims",
    "ranking",
    "curves",
    "classes",
    "confusion",
    "calibration",
    "gallery",
    "pairs",
    "ensembles",
    "cost",
    "runs",
    "notes",
    "provenance",
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_sweep(folder / "real", dataset="galaxy10_decals", models=("resnet18", "vit"))
    write_gallery_of(write_sweep(folder / "simulated", models=("custom_cnn",))[0])
    path = folder / "report.html"
    assert main(["report", str(folder), "-o", str(path)]) == 0
    return path


def test_report_page_in_a_browser_fits_a_phone_and_prints_folded_parts(page: Path, tmp_path: Path) -> None:
    with Browser() as browser:

        def open_all() -> None:
            browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
            assert browser.fits_window(), "opened, it scrolls sideways"
            # What is wider than the window scrolls in its own box, and only there.
            tables = "[...document.querySelectorAll('table')].filter(t => !t.closest('.scroll') && t.scrollWidth > innerWidth)"
            assert browser.evaluate(f"{tables}.length") == 0

        browser.check_page(page, tmp_path, SECTIONS, open_all)
        assert browser.evaluate("document.images.length") == 2
        browser.open(page, width=800, media="print")
        heights = browser.evaluate("[...document.querySelectorAll('details.run table')].map(t => t.offsetHeight)")
        assert heights and min(heights) > 100, "what is folded on the screen is printed"
