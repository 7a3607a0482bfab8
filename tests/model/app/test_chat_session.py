"""`vpt chat`: what its lines do, and that no mistake ends it."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from tests.model.inputs import random_image, tiny_model
from vpt_model.app.chat import HELP, Session
from vpt_model.app.cli import app
from vpt_model.engine import Engine
from vpt_model.text.tokens import Tokenizer


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a picture.png"
    Image.fromarray(random_image(150, 230, seed=3).numpy()).save(path)
    return path


def converse(*lines: str, image: str | None = None) -> tuple[Session, str, list[str]]:
    """The session after these lines, what it printed, and the prompts."""
    engine = Engine(tiny_model(), Tokenizer.byte_level(320, "clip"))
    out, prompts, left = io.StringIO(), [], iter(lines)
    session = Session(engine, Console(file=out, width=200), image, max_new_tokens=4)
    close = [chat.close for chat in session.chats]

    def read(prompt: str) -> str:
        prompts.append(prompt)
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    session.run(read)
    assert close and all(chat.conversation.closed for chat in session.chats)
    return session, out.getvalue(), prompts


def lengths(prompts: list[str]) -> Iterator[int]:
    return (int(prompt.split()[-2]) for prompt in prompts)


def test_questions_pictures_and_looks(picture):
    session, printed, prompts = converse(
        "Hello?",
        f"/image '{picture}'",
        "/look region x2,y1,x5,y4",
        "What is this?",
        "/look clip",
        "And?",
        "/image 0",
        "?",
    )
    assert "looks at (28, 0, 201, 112)" in printed and "looks again by clip" in printed
    assert printed.count("visual tokens") == 2 and "error" not in printed
    assert [len(exchange.answer.looks) for exchange in session.chat.exchanges] == [0, 1, 1, 0]
    assert list(lengths(prompts))[0] == 0 and sorted(lengths(prompts)) == list(lengths(prompts))


def test_undo_fork_and_back():
    session, printed, prompts = converse(
        "One", "Two", "/undo", "/fork", "Three", "/fork", "/back", "/back", "/quit", "never"
    )
    assert [exchange.question for exchange in session.chat.exchanges] == ["One"] and len(session.chats) == 1
    found = list(lengths(prompts))
    assert found[1] == found[3] == found[4] == found[8] < found[2] and prompts[6].startswith("fork fork ")
    assert "error" not in printed


def test_save_and_load(tmp_path):
    session, printed, prompts = converse(
        "One", f"/save {tmp_path}/kept", "Two", f"/load {tmp_path}/kept", "Two", "/back"
    )
    found = list(lengths(prompts))
    assert found[1] == found[4] and found[3] == found[5] == found[6] and "1 questions from" in printed


@pytest.mark.parametrize(
    "line, message",
    [
        ("/zoom", "is no command"),
        ("/image", "is no command"),
        ("/undo now", "is no command"),
        ("/undo", "the chat has 0"),
        ("/back", "this is no fork"),
        ("/load /nowhere", "cannot be read"),
        ("/save /nowhere/at/all", "nowhere"),
        ("/image 'open", "No closing quotation"),
        ("<|im_end|>", "special tokens"),
    ],
)
def test_a_mistake_is_told_and_the_session_goes_on(line, message):
    session, printed, _ = converse(line, "Hello?")
    assert "error: " in printed and message in printed and len(session.chat) == 1


def test_a_look_or_picture_that_is_wrong_is_told_when_it_is_used(picture):
    session, printed, _ = converse("/image /nowhere.png", "Hello?", f"/image '{picture}'", "/look zoom", "Hello?")
    assert printed.count("error: ") == 2 and len(session.chat) == 0


def test_an_answer_can_be_stopped(monkeypatch):
    engine = Engine(tiny_model(), Tokenizer.byte_level(320, "clip"))
    out = io.StringIO()
    session = Session(engine, Console(file=out))
    logits, lines = engine.model.language.logits, iter(["One", "Two"])

    def interrupted(hidden):
        monkeypatch.setattr(engine.model.language, "logits", logits)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.model.language, "logits", interrupted)
    session.run(lambda prompt: next(lines, "/quit"))
    assert "stopped" in out.getvalue() and [e.question for e in session.chat.exchanges] == ["Two"]


def test_help_names_every_command():
    _, printed, _ = converse("/help")
    assert all(name in printed for name in HELP)


def test_the_command(picture):
    result = CliRunner().invoke(
        app, ["chat", "--model", "random:tiny", "--image", str(picture)], input="Hello?\n/quit\n"
    )
    assert result.exit_code == 0, result.output
    assert "0 > " in result.stdout
    result = CliRunner().invoke(app, ["chat", "--model", "random:tiny", "--image", "/nowhere.png"], input="")
    assert result.exit_code == 2 and "nowhere" in result.stderr
