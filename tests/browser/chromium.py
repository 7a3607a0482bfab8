"""Headless Chromium of the distribution, driven by Selenium, and what tests do on the page with it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

BUILD = Path(__file__).resolve().parents[2] / "build" / "page"
"""Screenshots and downloads."""
WIDTHS = {"phone": (390, 844), "tablet": (820, 1180), "desktop": (1366, 900)}


def problem() -> str | None:
    """Why there is no browser, if there is none."""
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"there is no {' and no '.join(missing)}: apt-get install chromium chromium-driver" if missing else None


def start() -> webdriver.Chrome:
    """A browser that finds this machine alone, has a camera that shows a test picture, and notes every request."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in (
        "--headless=new",
        "--no-sandbox",  # as root in a container there is none
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        "--disable-background-networking",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    BUILD.mkdir(parents=True, exist_ok=True)
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(BUILD)})
    return browser


class View:
    """The page in a tab of its own."""

    def __init__(
        self, browser: webdriver.Chrome, address: str, width: str = "desktop", ready: str = "body.ready"
    ) -> None:
        browser.switch_to.new_window("tab")
        self.browser, self.tab = browser, browser.current_window_handle
        self.resize(width)
        browser.get(address)
        self.until(lambda: self.has(ready))

    def resize(self, width: str, height: int | None = None) -> None:
        wide, high = WIDTHS[width]
        shape = {"width": wide, "height": height or high, "deviceScaleFactor": 1, "mobile": width == "phone"}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", shape)

    def here(self) -> View:
        """Go on in this tab, in front: for of others a browser may hold frames back, and what fades in is hidden."""
        self.browser.switch_to.window(self.tab)
        self.browser.execute_cdp_cmd("Page.bringToFront", {})
        return self

    def close(self) -> None:
        self.here().browser.close()
        self.browser.switch_to.window(self.browser.window_handles[0])

    def all(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def has(self, selector: str) -> bool:
        return bool(self.all(selector))

    def one(self, selector: str) -> WebElement:
        """The only element that matches and is shown, waited for."""
        return self.until(lambda: next((e for e in self.all(selector) if e.is_displayed()), None))

    def last(self, selector: str) -> WebElement:
        return self.until(lambda: self.all(selector))[-1]

    def click(self, selector: str) -> None:
        element = self.last(selector)
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def text(self, selector: str) -> str:
        return self.one(selector).text

    def run(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def until(self, condition: Callable[[], Any], seconds: float = 40) -> Any:
        """Wait for something to become true, and return it; a failure names the tab's last state."""
        end = time.monotonic() + seconds
        while not (found := condition()):
            if time.monotonic() > end:
                raise AssertionError(f"it did not become true; the page says: {self.all('body')[0].text[-600:]}")
            time.sleep(0.05)
        return found

    def example(self) -> None:
        before = len(self.all("#pictures li"))
        shown = self.run("return document.querySelector('#shown').src")
        self.click("#example")
        self.until(lambda: self.run("return document.querySelector('#shown').src") != shown)
        assert len(self.all("#pictures li")) >= before
        self.one("#frame[data-state=shown] img")

    def ask(self, question: str, wait: bool = True) -> None:
        """Ask and wait for the end, however it ends."""
        before = self.all(".turn")  # of which one that was stopped goes when the next one comes
        box = self.one("#question")
        box.clear()
        box.send_keys(question + "\n")
        self.until(lambda: [turn for turn in self.all(".turn") if turn not in before])
        if wait:
            self.until(lambda: self.state() in ("done", "stopped", "failed"))

    def state(self) -> str:
        return str(self.last(".turn").get_attribute("data-state"))

    def settle(self) -> None:
        """Wait until nothing moves but what moves for ever."""
        running = "a => a.playState === 'running' && a.effect.getComputedTiming().iterations < 9"
        self.until(lambda: not self.run(f"return document.getAnimations().filter({running}).length"))

    def shoot(self, name: str) -> None:
        self.settle()
        self.browser.save_screenshot(str(BUILD / f"{name}.png"))

    def theme(self, name: str) -> None:
        self.run(
            "const s = document.querySelector('#theme'); s.value = arguments[0]; s.dispatchEvent(new Event('change'))",
            name,
        )

    def violations(self, axe: str) -> list[str]:
        """What the accessibility checker objects to, by the rules of WCAG 2.2 A and AA and its best practices."""
        self.settle()
        self.run(axe)
        found = self.browser.execute_async_script(
            "const done = arguments[0]; const standards = ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa', "
            "'best-practice']; axe.run(document, {runOnly: standards}).then(r => done(r.violations), e => done([{id: "
            "String(e), nodes: []}]))"
        )
        return [f"{v['id']}: {node['html']} {node['failureSummary']}" for v in found for node in v["nodes"] or [{}]]


def requests(browser: webdriver.Chrome) -> Iterator[str]:
    """The addresses that the browser has asked for since this was last called."""
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            yield message["params"]["request"]["url"]
