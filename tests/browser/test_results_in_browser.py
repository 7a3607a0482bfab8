"""The page of results in Chromium: it sorts, filters, fits, and the accessibility checker finds nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bench import __main__ as command
from bench import site
from tests.helpers import require

try:
    from tests.browser.chromium import View, problem

    PROBLEM = problem()
except ImportError:
    PROBLEM = "Selenium is not installed: make test-page"
require("chromium", PROBLEM)

if TYPE_CHECKING:
    from selenium.webdriver import Chrome


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "results.html"
    path.write_text(site.page(command.committed(), {}))
    return path.as_uri()


def ratios(page: View) -> list[str]:
    return page.run(
        "return [...document.querySelectorAll('.set[open] tbody tr')].filter(r => !r.hidden)"
        ".map(r => r.cells[6]?.textContent ?? '')"
    )


@pytest.mark.parametrize("width", ["phone", "desktop"])
def test_it_sorts_filters_and_fits(browser: Chrome, axe: str, file: str, width: str) -> None:
    page = View(browser, file, width, ready="table")
    first = ratios(page)
    page.one(".set[open] th:nth-child(7) button").click()
    numbers = [float(text[:-1]) for text in ratios(page) if text]
    assert numbers == sorted(numbers) and len(ratios(page)) == len(first)
    page.one(".set[open] th:nth-child(7) button").click()
    assert [float(text[:-1]) for text in ratios(page) if text] == numbers[::-1]
    page.one(".set[open] .filter input").send_keys("append bfloat16")
    assert 0 < len(ratios(page)) < len(first)
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")
    for theme in ("light", "dark"):
        media = [{"name": "prefers-color-scheme", "value": theme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
        assert not page.violations(axe)
        page.shoot(f"results-{width}-{theme}")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    page.close()
