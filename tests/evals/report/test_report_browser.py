"""The page of a report in a real browser: it draws, needs no network, and has no fault that axe can find."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from synthetic_studies import study

from evals.report.files import write_report

pytestmark = pytest.mark.browser
playwright = pytest.importorskip("playwright.sync_api", reason="needs a browser: pip install 'gluprune-jax[browser]'")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe: 'gluprune-jax[browser]'")

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")


# Regions of plots and tables whose content is wider than they are, and texts that stick out of the page.
OVERFLOWING = """[...document.querySelectorAll(".plot, .scroll, p, li, figcaption, caption, dd, h1, h2")]
  .filter(one => one.scrollWidth > one.clientWidth + 1 || one.getBoundingClientRect().right > innerWidth + 1)"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report(study(), folder)
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt install chromium, or its path in CHROMIUM")
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_draws_and_is_accessible(report: Path, browser: object, scheme: str, width: int) -> None:
    page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 800})  # type: ignore[attr-defined]
    complaints: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report.as_uri())
    count = page.locator(".plot").count()
    page.wait_for_function(
        "count => document.querySelectorAll('.plot > svg, .plot svg.marks').length >= count", arg=count
    )
    assert complaints == []
    assert asked == [report.as_uri()]
    assert count == 6
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    page.wait_for_function(f"({OVERFLOWING}).length === 0 && document.documentElement.scrollWidth <= {width}")
    found = axe.Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    page.close()
