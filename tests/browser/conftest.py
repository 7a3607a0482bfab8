"""One browser for all of these tests, and one page on this machine; both need what `make test-page` brings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

    from tests.browser.chromium import View

AXE = Path(__file__).resolve().parents[2] / "build" / "axe" / "package" / "axe.min.js"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def browser() -> Iterator[Chrome]:
    from tests.browser import chromium

    started = chromium.start()
    yield started
    started.quit()


@pytest.fixture(scope="session")
def axe() -> str:
    return AXE.read_text()


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    from tests.model.app.page_server import served

    with served() as (_, address):
        yield address


@pytest.fixture
def open_page(browser: Chrome, address: str) -> Iterator[Callable[..., View]]:
    """Opens the page in new tabs, which are closed afterwards; nothing may have been written to their consoles."""
    from tests.browser.chromium import View

    opened: list[View] = []
    browser.get_log("browser")

    def open_one(width: str = "desktop") -> View:
        opened.append(View(browser, address, width))
        return opened[-1]

    yield open_one
    for view in opened:
        view.close()
    # A refused request is told there too: the tests that provoke one look for its sentence on the page.
    logged = [entry for entry in browser.get_log("browser") if "Failed to load resource" not in entry["message"]]
    assert not logged


@pytest.fixture
def page(open_page: Callable[..., View]) -> View:
    return open_page()
