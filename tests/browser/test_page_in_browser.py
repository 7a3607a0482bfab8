"""`vpt app` in Chromium: what a visitor does with the mouse, the keyboard, files and the camera, and what they see."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from tests.helpers import require
from tests.model.app.page_server import COUNT, TAG, answerer, paced, until
from tests.model.inputs import random_image

try:
    from selenium.webdriver import ActionChains, Chrome, Keys

    from tests.browser.chromium import BUILD, WIDTHS, problem, requests

    PROBLEM = problem()
except ImportError:
    PROBLEM = "Selenium is not installed: make test-page"
require("chromium", PROBLEM)

if TYPE_CHECKING:
    from tests.browser.chromium import View

Open = Callable[..., "View"]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(random_image(300, 400, seed=1).numpy()).save(path)
    return path


def rectangles(page: View, kind: str) -> list[list[float]]:
    """x, y, width and height of what is drawn over the picture, in its pixels."""
    return page.run(
        "return [...document.querySelectorAll('#overlay rect.' + arguments[0] + ':not(.under)')]"
        ".map(r => ['x', 'y', 'width', 'height'].map(n => Number(r.getAttribute(n))))",
        kind,
    )


def test_the_box_appears_while_the_model_looks(page: View) -> None:
    page.example()
    with paced(answerer()) as pace:
        page.ask(TAG, wait=False)
        assert page.until(lambda: page.text(".turn .state .text")) == "First look …"
        pace.allow(6)
        page.until(lambda: len(page.all(".turn .pill")) == 6)
        assert not rectangles(page, "crop") and page.has(".turn .track .running")
        stages = len(page.all(".turn .legend li"))
        pace.allow(1)
        page.until(lambda: rectangles(page, "crop"))
        assert rectangles(page, "crop") == [[0, 0, 111, 111]] and rectangles(page, "cells") == [[37.25] * 4]
        assert page.state() == "running" and not page.has(".turn .answer:not([hidden])")
        page.until(lambda: page.all(".sight img[alt^='Crop 1']"))
        pace.allow(1)
        page.until(lambda: "R" in page.text(".turn .said") and len(page.all(".turn .legend li")) > stages)
        pace.allow(100)
        page.until(lambda: page.state() == "done")
    assert page.text(".turn .answer") == "RN" and page.text(".turn .verdict") == "✓ right"
    assert "ms in all, second look in" in page.text(".turn figcaption:not(.sight *)").replace(" s in", " ms in")


def test_patches_map_and_stages_on_request(page: View) -> None:
    page.example()
    page.ask(COUNT)
    assert page.text(".turn .answer") == "1"
    patches = page.last(".sight .patches")
    assert patches.get_attribute("hidden") is not None
    page.click(".sight .show-patches")
    assert page.last(".sight .patches").get_attribute("hidden") is None
    # 8×8 patches have 7 borders each way, of which every second one is a token's too.
    assert len(page.last(".sight .patches").find_elements("css selector", "line")) == 14
    assert len(page.last(".sight .patches").find_elements("css selector", ".token")) == 6
    shown = page.last(".sight .map")
    assert shown.is_displayed() and "a = f·k, from −108" in shown.get_attribute("alt")
    page.click(".sight .show-map")
    assert not shown.is_displayed()
    page.click(".turn .time summary")
    rows = [row.text for row in page.all(".turn .time tbody tr")]
    assert [row.split()[0] for row in rows] == ["crop+embed", "ViT", "prefill", "perceive", "append", "decode"]
    assert all(" ms " in row or " s " in row for row in rows)


def test_boxes_are_drawn_with_the_mouse(page: View) -> None:
    page.example()
    pad = page.one("#pad")
    cell = pad.size["width"] / 8
    corner = -pad.size["width"] / 2 + cell / 2, -pad.size["height"] / 2 + cell / 2
    drag = ActionChains(page.browser).move_to_element_with_offset(pad, *(int(c) for c in corner)).click_and_hold()
    drag.move_by_offset(int(2 * cell), int(cell)).release().perform()
    assert page.one("#looks [value=region]").is_selected()
    assert page.text("#box-list") == "columns 0 to 2, rows 0 to 1\n×"
    assert rectangles(page, "drawn") == [[0, 0, 298 * 3 / 8, 298 / 4]]
    assert rectangles(page, "margin") == [[0, 0, 149, 298 * 3 / 8]]
    page.ask("What is on the tag?")
    assert "You chose: columns 0 to 2, rows 0 to 1" in page.text(".turn .forced")
    assert rectangles(page, "crop") == [[0, 0, 149, 111]] and not rectangles(page, "drawn")


def test_everything_by_keyboard(page: View) -> None:
    page.run("document.activeElement.blur()")
    keys = ActionChains(page.browser)

    def focused() -> str:
        return page.run("return document.activeElement.id || document.activeElement.name")

    def tab_to(name: str) -> None:
        for _ in range(40):
            if focused() == name:
                return
            ActionChains(page.browser).send_keys(Keys.TAB).perform()
        raise AssertionError(f"{name} cannot be reached by Tab")

    keys.send_keys(Keys.TAB).perform()
    assert page.run("return document.activeElement.className") == "skip"
    tab_to("example")
    ActionChains(page.browser).send_keys(Keys.ENTER).perform()
    page.one("#frame[data-state=shown] img")
    page.run("document.activeElement.blur(); window.getSelection().removeAllRanges()")
    tab_to("pad")
    moves = [Keys.ARROW_RIGHT, *[Keys.ARROW_LEFT] * 3, *[Keys.ARROW_UP] * 2]
    ActionChains(page.browser).send_keys(*moves, Keys.ENTER).perform()
    assert page.text("#box-list").startswith("column 0, row 1")
    ActionChains(page.browser).send_keys(Keys.DELETE).perform()
    assert not page.all("#box-list li")
    ActionChains(page.browser).send_keys(Keys.ARROW_RIGHT).perform()
    ActionChains(page.browser).key_down(Keys.SHIFT).send_keys(Keys.ARROW_DOWN).key_up(Keys.SHIFT).perform()
    ActionChains(page.browser).send_keys(Keys.SPACE).perform()
    assert page.text("#box-list").startswith("column 1, rows 1 to 2")
    tab_to("question")
    ActionChains(page.browser).send_keys("What is on the tag?", Keys.ENTER).perform()
    page.until(lambda: page.all(".turn") and page.state() == "done")
    assert page.text(".turn .answer") and "columns" not in page.text(".turn .forced")


def test_the_re_encoder_is_chosen(page: View) -> None:
    page.example()
    page.click("#looks [value=encoder]")
    page.ask(TAG)
    assert page.text(".turn .forced") == "You chose the re-encoding." and page.one(".sight .map")


def test_the_same_question_in_three_ways(page: View) -> None:
    page.example()
    page.ask(TAG)
    page.click(".turn .compare")
    page.until(lambda: len(page.all(".turn .way strong")) == 3)
    ways = [way.text for way in page.all(".turn .way")]
    assert [way.splitlines()[0] for way in ways] == [
        "with a second look",
        "without a second look",
        "published procedure",
    ]
    assert "“RN” ✓" in ways[0] and "✗" in ways[1] and "“RN” ✓" in ways[2]
    assert all(" ms" in way or " s" in way for way in ways)


def test_files_that_are_pictures_and_others(page: View, photo: Path, tmp_path: Path) -> None:
    field = page.all("#file")[0]
    field.send_keys(str(photo))
    assert page.one("#shown").get_attribute("alt") == "Your picture, 400 by 300 pixels"
    broken, huge = tmp_path / "broken.png", tmp_path / "huge.png"
    broken.write_bytes(photo.read_bytes()[:5000])
    huge.write_bytes(bytes(21 << 20))
    for path, message in (
        (broken, "cut short"),
        (huge, "the limit is 20 MB"),
        (Path(__file__), "no picture that can be read"),
    ):
        field.send_keys(str(path))
        page.until(lambda message=message: message in page.all("#picture-error")[0].text)
        # What was there before is still there.
        assert page.one("#shown").get_attribute("alt").startswith("Your picture")
    field.send_keys(str(photo))
    page.until(lambda: not page.one("#frame[data-state=shown]").find_elements("css selector", ".loading[style]"))
    page.until(lambda: page.all("#picture-error")[0].get_attribute("hidden") is not None)
    page.until(lambda: len(page.all("#pictures li")) == 2)
    page.ask("What?")
    assert page.state() == "done" and not page.all(".turn .verdict:not([hidden])")


@pytest.mark.parametrize("way", ["paste", "drop"])
def test_pictures_are_pasted_and_dropped(page: View, way: str) -> None:
    script = """
        const canvas = Object.assign(document.createElement('canvas'), {width: 90, height: 60});
        canvas.getContext('2d').fillRect(10, 10, 30, 30);
        canvas.toBlob((blob) => {
          const data = new DataTransfer();
          data.items.add(new File([blob], 'a.png', {type: 'image/png'}));
          document.dispatchEvent(arguments[0] === 'paste' ? new ClipboardEvent('paste', {clipboardData: data})
            : new DragEvent('drop', {dataTransfer: data, cancelable: true}));
        });
    """
    page.run(f"(function() {{ {script} }}).apply(null, arguments)".replace("arguments[0] ===", f"'{way}' ==="))
    assert page.one("#shown").get_attribute("alt") == "Your picture, 90 by 60 pixels"


def test_the_camera_takes_a_picture(page: View, axe: str) -> None:
    page.click("#camera")
    page.until(lambda: page.one("#snap").is_enabled())
    assert not page.violations(axe)
    page.click("#snap")
    assert "Your picture" in page.until(lambda: page.one("#shown").get_attribute("alt"))
    assert page.run(
        "return document.querySelector('#video').srcObject.getTracks().every(t => t.readyState === 'ended')"
    )


def test_stop_ends_an_answer(page: View) -> None:
    page.example()
    page.ask(TAG)
    with paced(answerer()) as pace:
        page.ask(COUNT, wait=False)
        until(pace.waits.is_set)
        steps = pace.steps
        page.click("#stop")
        page.until(lambda: True)
        pace.allow(100)
        page.until(lambda: page.state() == "stopped")
        assert pace.steps <= steps + 1
    assert "Stopped." in page.last(".turn .notes").text and not page.one("#submit").get_attribute("disabled")
    page.ask(COUNT)
    assert page.last(".turn .answer").text == "1" and len(page.all(".turn")) == 2


def test_two_people_at_once(open_page: Open) -> None:
    one, two = open_page(), open_page()
    one.here().example()
    two.here().example()
    with paced(answerer()) as pace:
        one.here().ask(TAG, wait=False)
        one.until(pace.waits.is_set)
        two.here().ask(COUNT, wait=False)
        two.until(lambda: two.text(".turn .state .text") == "In line: 1 question before yours.")
        pace.allow(200)
        two.until(lambda: two.state() == "done")
    assert two.text(".turn .answer") == "1" and len(two.all(".turn")) == 1
    one.here().until(lambda: one.state() == "done")
    assert one.text(".turn .answer") == "RN" and len(one.all(".turn")) == 1


def test_undo_fork_and_conversations(page: View) -> None:
    page.example()
    page.click("#remember")
    page.ask(TAG)
    page.ask(COUNT)
    assert "It knew of 1 question before this one." in page.last(".turn .notes").text
    page.click(".turn:last-child .fork")
    page.until(lambda: len(page.all("#branches .chip")) == 3)
    page.ask("What colour is the triangle?")
    assert len(page.all(".turn")) == 3
    page.all("#branches .chip")[0].click()
    page.until(lambda: len(page.all(".turn")) == 2)
    page.click(".turn:last-child .undo")
    page.until(lambda: len(page.all(".turn")) == 1)
    assert page.one("#question").get_attribute("value") == COUNT
    page.click("#branches .chip:last-child")
    page.until(lambda: len(page.all(".turn")) == 3)
    assert not page.all("#branches .chip")


def test_earlier_pictures_are_chosen_again(page: View) -> None:
    page.example()
    page.example()
    page.until(lambda: len(page.all("#pictures button")) == 2)
    page.ask("How many objects are red?")
    page.click("#pictures li:first-child button")
    page.ask(TAG)
    assert page.last(".turn .answer").text == "RN" and rectangles(page, "crop") == [[0, 0, 111, 111]]


def test_answers_are_kept(page: View) -> None:
    for old in BUILD.glob("vpt-*"):
        old.unlink()
    page.example()
    page.ask(TAG)
    page.click(".turn .keep")
    page.click(".turn .draw")
    kept, drawn = BUILD / "vpt-conversation.json", BUILD / "vpt-answer.png"
    page.until(lambda: kept.exists() and drawn.exists())
    (turn,) = json.loads(kept.read_text())["turns"]
    assert turn["answer"]["text"] == "RN" and turn["answer"]["looks"][0]["boxes"] == [[0, 0, 111, 111]]
    assert min(Image.open(drawn).size) > 600


def test_a_replay_shows_the_answer_grow_once_more(page: View) -> None:
    page.example()
    page.ask(TAG)
    page.run("document.querySelectorAll('#overlay .crop').forEach(r => r.remove())")
    page.click(".turn .replay")
    page.until(lambda: page.state() == "running")
    page.until(lambda: rectangles(page, "crop") and page.state() == "running")
    page.until(lambda: page.state() == "done")
    assert page.text(".turn .answer") == "RN" and len(page.all(".sight")) == 2


def test_mistakes_are_told(page: View) -> None:
    page.click("#submit")
    assert page.text("#ask-error") == "Ask something first: the question is empty."
    page.one("#question").send_keys("x")
    page.click("#looks [value=region]")
    page.click("#submit")
    assert page.text("#ask-error") == "Show it a picture before you draw boxes."
    page.example()
    page.click("#submit")
    assert "Draw a box on the picture first" in page.text("#ask-error")
    page.click("#looks input[value='']")
    page.ask("<|im_end|>")
    assert page.state() == "failed" and "special tokens" in page.text(".turn .notes")


def test_leaving_deletes_and_an_ended_session_says_so(page: View) -> None:
    page.example()
    page.browser.refresh()
    page.until(lambda: page.has("body.ready"))
    assert page.one("#frame[data-state=empty]") and not page.all("#pictures li")
    page.run("window.dispatchEvent(new Event('pagehide'))")
    page.until(lambda: page.run("return fetch('/api/about').then(() => true)"))
    page.click("#example")
    assert "This session has ended and its pictures are deleted" in page.text("#ended")
    page.click("#ended button")
    page.until(lambda: page.has("body.ready") and not page.all("#ended:not([hidden])"))


def test_nothing_is_fetched_from_elsewhere(browser: Chrome, page: View, address: str) -> None:
    page.example()
    page.ask(TAG)
    page.click(".turn .compare")
    page.until(lambda: len(page.all(".turn .way strong")) == 3)
    asked = list(requests(browser))
    assert any(url.endswith("/api/turns") for url in asked) and any(url.endswith("/static/page.css") for url in asked)
    assert {url for url in asked if not url.startswith((address, "data:", "blob:", "about:", "chrome:"))} == set()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", ["phone", "desktop"])
def test_the_accessibility_checker_finds_nothing(
    open_page: Open, axe: str, width: str, theme: str, tmp_path: Path
) -> None:
    page = open_page(width)
    page.theme(theme)
    assert not page.violations(axe)
    page.all("#file")[0].send_keys(__file__)
    page.one("#picture-error")
    page.click("#submit")
    page.one("#ask-error")
    assert not page.violations(axe)
    page.example()
    page.run("document.querySelector('#known').open = true")
    with paced(answerer()) as pace:
        page.ask(TAG, wait=False)
        page.until(pace.waits.is_set)
        assert not page.violations(axe)
        pace.allow(1000)
        page.until(lambda: page.state() == "done")
    page.ask(COUNT)
    page.click(".turn .compare")
    page.until(lambda: len(page.all(".turn .way strong")) == 3)
    page.click(".turn .time summary")
    page.click(".turn .fork")
    page.until(lambda: page.all("#branches .chip"))
    page.click("#looks [value=region]")
    page.run("document.querySelector('#pad').focus()")
    page.one("#pad").send_keys(Keys.ARROW_RIGHT, Keys.ENTER)
    page.one("#box-list li")
    assert not page.violations(axe)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS if PROBLEM is None else ())
def test_screenshots(open_page: Open, width: str, theme: str) -> None:
    """For eyes: build/page/*.png. And nothing is wider than the screen."""
    page = open_page(width)
    page.theme(theme)
    page.shoot(f"{width}-{theme}-1-empty")
    page.example()
    page.ask(TAG)
    page.shoot(f"{width}-{theme}-2-region")
    page.ask(COUNT)
    page.click(".turn:last-child .compare")
    page.until(lambda: len(page.all(".turn .way strong")) == 3)
    page.run("arguments[0].scrollIntoView({block: 'start'})", page.last(".turn"))
    page.shoot(f"{width}-{theme}-3-re-encoded")
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")
    page.resize(width, page.run("return document.documentElement.scrollHeight") + 40)
    page.shoot(f"{width}-{theme}-4-whole")
