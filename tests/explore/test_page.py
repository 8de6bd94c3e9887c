"""The exploration page in a real browser: nothing fetched, nothing complained of, everything there at a phone's width."""

import time
from pathlib import Path

import pytest

from galaxydist.cli.main import main
from tests.helpers.browser import Browser
from tests.helpers.survey_files import write_survey

pytestmark = pytest.mark.browser

SECTIONS = ("classes", "examples", "means", "pixels", "sizes", "sky", "duplicates", "odd", "map", "provenance")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explore")
    write_survey(folder / "survey.h5")
    path = folder / "explore.html"
    assert main(["data", "explore", str(folder / "survey.h5"), "-o", str(path), "--per-class", "4"]) == 0
    return path


def test_explore_page_in_a_browser_shows_all_sections_and_tooltips(page: Path, tmp_path: Path) -> None:
    with Browser() as browser:
        browser.check_page(page, tmp_path, SECTIONS)
        assert browser.evaluate("document.images.length") > 50
        tip = ["none"]
        for _ in range(50):  # a busy machine may be late with what the pointer brings about
            browser.point_at("h1")
            browser.point_at("#points circle")  # scrolls, and the event of that hides the tip, sometimes after the pointer
            time.sleep(0.1)
            browser.point_at("#points circle")
            tip = browser.evaluate(
                "(t => [t.style.display, t.textContent, t.firstElementChild.style.backgroundImage.slice(0, 10)])(tip)"
            )
            if tip[0] == "block":
                break
            time.sleep(0.1)
        assert tip[0] == "block" and "sim-" in tip[1] and tip[2] == 'url("data:'
        browser.evaluate("document.querySelector('.legend button').click()")
        assert browser.evaluate("document.querySelectorAll('#points.chosen circle.on').length") == 12
        assert browser.console == [] and set(browser.requests) == {page.as_uri()}
