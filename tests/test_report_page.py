"""The results page in a real browser: nothing fetched, nothing complained of, everything there at a phone's width."""

from pathlib import Path

import pytest
from PIL import Image

from galaxydist.cli.main import main
from tests.browser import Browser
from tests.report_runs import write_sweep

pytestmark = pytest.mark.browser

SECTIONS = [
    "matrix",
    "observations",
    "ranking",
    "curves",
    "classes",
    "confusion",
    "calibration",
    "pairs",
    "ensembles",
    "cost",
    "runs",
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_sweep(folder / "real", dataset="galaxy10_decals", models=("resnet18", "vit"))
    write_sweep(folder / "simulated", models=("custom_cnn",))
    path = folder / "report.html"
    assert main(["report", str(folder), "-o", str(path)]) == 0
    return path


def test_the_page_in_a_browser(page: Path, tmp_path: Path) -> None:
    with Browser() as browser:
        for width, dark in ((390, False), (1280, True)):
            browser.open(page, width=width, dark=dark)
            assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"scrolls sideways at {width}"
            found = browser.evaluate("[...document.querySelectorAll('section')].filter(s => s.offsetHeight > 60).map(s => s.id)")
            assert found == [*SECTIONS, "notes", "provenance"]
            # Figures take the page's colour: their text is as bright as the page's.
            colours = browser.evaluate(
                "[getComputedStyle(document.querySelector('figure svg text')).fill, getComputedStyle(document.body).color]"
            )
            assert colours[0] == colours[1]
            browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
            assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"opened, scrolls sideways at {width}"
            # What is wider than the window scrolls in its own box, and only there.
            loose = (
                "[...document.querySelectorAll('table')].filter(t => !t.closest('.scroll') && t.scrollWidth > innerWidth).length"
            )
            assert browser.evaluate(loose) == 0
            browser.screenshot(tmp_path / f"{width}.png")
        browser.open(page, width=800, media="print")
        heights = browser.evaluate("[...document.querySelectorAll('details.run table')].map(t => t.offsetHeight)")
        assert heights and min(heights) > 100, "what is folded on the screen is printed"
        browser.print_pdf(tmp_path / "page.pdf")
        assert browser.console == []
        assert set(browser.requests) == {page.as_uri()}
    with Image.open(tmp_path / "390.png") as phone, Image.open(tmp_path / "1280.png") as desktop:
        assert phone.width == 780 and phone.height > 4000  # two dots a pixel
        assert phone.convert("L").getpixel((4, 4)) > 240 and desktop.convert("L").getpixel((4, 4)) < 40
