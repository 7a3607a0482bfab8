"""`vpt app` among strangers: broken and huge uploads, other people's pictures, other sites' pages, and no network."""

from __future__ import annotations

import gc
import re
import socket
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from typer.testing import CliRunner

from tests.model.app.page_server import TAG, Visitor, png, served, until
from tests.model.inputs import random_image
from vpt_model.app import cli
from vpt_model.app.page.pictures import drawn
from vpt_model.app.page.server import STATIC, Page
from vpt_model.app.page.sessions import Limits

LIMITS = Limits(upload=300_000, pixels=50_000, held=1_500_000, pictures=4)


@pytest.fixture(scope="module")
def served_page() -> Iterator[tuple[Page, str]]:
    with served(LIMITS) as page_and_address:
        yield page_and_address


@pytest.fixture
def address(served_page: tuple[Page, str]) -> str:
    return served_page[1]


@pytest.fixture
def visitor(address: str) -> Iterator[Visitor]:
    visitor = Visitor(address)
    yield visitor
    visitor.client.delete("/api/session")


def photo(height: int = 120, width: int = 160) -> np.ndarray:
    return random_image(height, width).numpy()


@pytest.mark.parametrize(
    "data, status, message",
    [
        (b"", 422, "empty"),
        (b"<svg/>", 422, "no picture that can be read"),
        (png(photo())[:3000], 422, "cut short"),
        (png(photo(), "JPEG")[:2000], 422, "cut short"),
        (png(photo())[:20], 422, "no picture that can be read"),
        (png(np.zeros((300, 300, 3), np.uint8)), 422, "300×300 = 0.1 million pixels, the limit is"),
        (b"x" * 300_001, 413, "larger than"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 422, "no picture that can be read"),
    ],
)
def test_a_bad_picture_gets_a_sentence(visitor: Visitor, data: bytes, status: int, message: str) -> None:
    response = visitor.upload(data)
    assert response.status_code == status and message in response.json()["error"]
    assert visitor.upload(photo()).status_code == 201


def test_an_upload_without_a_length_is_refused_at_the_limit(visitor: Visitor) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(1000):
            yield b"x" * 10_000

    try:
        status = visitor.client.post("/api/pictures", content=chunks()).status_code
    except httpx.WriteError:  # the server has answered and hung up while we were still sending
        status = 413
    assert status == 413


def test_a_slow_upload_is_given_up() -> None:
    with served(Limits(upload_seconds=0.3)) as (_, address):
        visitor = Visitor(address)

        def chunks() -> Iterator[bytes]:
            yield b"x"
            time.sleep(1)
            yield b"x"

        try:
            response = visitor.client.post("/api/pictures", content=chunks())
            assert response.status_code == 408 and "too long" in response.json()["error"]
        except httpx.WriteError:
            pass
        assert Visitor(address).example()["id"]


def test_a_picture_is_turned_upright(visitor: Visitor) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    shown = visitor.upload(photo(60, 100), form="JPEG", exif=exif).json()
    assert (shown["width"], shown["height"]) == (60, 100)


def test_pictures_are_limited_per_person_and_in_all(visitor: Visitor, address: str) -> None:
    pictures = []
    for _ in range(6):  # those that no answer shows make room
        shown = visitor.upload(photo(40, 50)).json()
        pictures.append(shown)
    assert visitor.turn("What?", pictures[-1], tokens=1)
    gone = visitor.client.post("/api/turns", json=visitor.asked("What?", pictures[0]))
    assert gone.status_code == 404 and "show it again" in gone.json()["error"]
    people = [Visitor(address) for _ in range(12)]
    replies = [person.upload(photo(200, 240)) for person in people]
    assert 201 in {r.status_code for r in replies} and 503 in {r.status_code for r in replies}
    for person in people:
        person.client.delete("/api/session")
    assert visitor.upload(photo(200, 240)).status_code == 201


def test_two_people_never_see_each_others_pictures(visitor: Visitor, address: str) -> None:
    mine = visitor.example()
    turn = visitor.turn(TAG, mine)
    other = Visitor(address)
    assert other.client.post("/api/turns", json=other.asked(TAG, mine)).status_code == 404
    assert other.client.get(f"/api/turns/{turn['id']}/picture.png").status_code == 404
    assert other.client.post(f"/api/turns/{turn['id']}/compare").status_code == 404
    assert other.client.get("/api/branches/1/answers.json").json()["turns"] == []
    assert len({visitor.secret, other.secret, mine["id"], turn["id"]}) == 4
    assert min(len(visitor.secret), len(other.secret)) >= 43 and len(mine["id"]) >= 16  # 256 and 96 bits
    other.client.delete("/api/session")


@pytest.mark.parametrize("secret", [None, "", "guess"])
def test_without_the_secret_there_is_nothing(address: str, visitor: Visitor, secret: str | None) -> None:
    headers = {} if secret is None else {"X-VPT-Session": secret}
    for method, path in (
        ("POST", "/api/pictures"),
        ("POST", "/api/examples"),
        ("POST", "/api/turns"),
        ("POST", "/api/stop"),
        ("DELETE", "/api/session"),
        ("GET", "/api/branches/1/answers.json"),
        ("POST", "/api/branches/1/undo"),
    ):
        response = httpx.request(method, address + path, headers=headers)
        assert response.status_code == 410 and "begin anew" in response.json()["error"], path


@pytest.mark.parametrize(
    "headers, allowed",
    [
        ({"Host": "localhost:{port}"}, True),
        ({"Host": "[::1]:{port}"}, True),
        ({"Host": "LOCALHOST"}, True),
        ({"Host": "evil.example"}, False),
        ({"Host": "127.0.0.1.evil.example:{port}"}, False),
        ({"Host": "localhost.evil.example"}, False),
        ({"Host": ""}, False),
        ({"Origin": "http://127.0.0.1:{port}"}, True),
        ({"Origin": "http://127.0.0.1:1"}, False),
        ({"Origin": "https://evil.example"}, False),
        ({"Origin": "null"}, False),
        ({"Sec-Fetch-Site": "same-origin"}, True),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}, False),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}, True),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"}, False),
    ],
)
def test_other_sites_and_forged_names_are_turned_away(address: str, headers: dict[str, str], allowed: bool) -> None:
    port = address.rpartition(":")[2]
    sent = {name: value.format(port=port) for name, value in headers.items()}
    for path in ("/", "/api/about"):
        response = httpx.get(address + path, headers=sent)
        assert response.status_code == (200 if allowed else 403)
        assert allowed or "error" in response.json()


def test_beyond_this_machine_any_name_will_do_but_no_other_site() -> None:
    with served(local=False) as (_, address):
        assert httpx.get(address, headers={"Host": "vpt.lan"}).status_code == 200
        assert httpx.get(address, headers={"Host": "vpt.lan", "Origin": "http://evil.example"}).status_code == 403
        assert httpx.get(address, headers={"Host": "vpt.lan", "Origin": "http://vpt.lan"}).status_code == 200


def test_every_response_forbids_what_the_page_does_not_need(address: str) -> None:
    for path, status in (
        ("/", 200),
        ("/static/page.js", 200),
        ("/api/about", 200),
        ("/nothing", 404),
        ("/static/x", 404),
    ):
        response = httpx.get(address + path)
        policy = response.headers["content-security-policy"]
        assert response.status_code == status and "default-src 'none'" in policy and "unsafe" not in policy
        assert (
            response.headers["x-content-type-options"] == "nosniff" and response.headers["cache-control"] == "no-store"
        )
        assert "server" not in response.headers or response.headers["server"] == "uvicorn"
    for path in ("/static/../server.py", "/static/%2e%2e/server.py", "/static/..%2f..%2fcli.py"):
        assert httpx.get(address + path).status_code == 404


def test_nothing_on_the_page_comes_from_elsewhere() -> None:
    names = {path.name for path in STATIC.iterdir()}
    assert {"index.html", "page.css", "page.js"} <= names
    for path in STATIC.iterdir():
        found = re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"']*", path.read_text())
        assert set(found) <= {"http://www.w3.org/2000/svg"}, path.name
        assert "@import" not in path.read_text() and "@font-face" not in path.read_text()


def test_it_works_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way to another machine is closed; the page answers, compares and draws."""
    reached: list[Any] = []
    connect, resolve = socket.socket.connect, socket.getaddrinfo

    def local_connect(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] != "127.0.0.1":
            reached.append(address)
            raise OSError("the network is closed")
        connect(self, address)

    def local_resolve(host: Any, *others: Any, **options: Any) -> Any:
        if host not in ("127.0.0.1", "localhost", None):
            reached.append(host)
            raise socket.gaierror("the network is closed")
        return resolve(host, *others, **options)

    monkeypatch.setattr(socket.socket, "connect", local_connect)
    monkeypatch.setattr(socket, "getaddrinfo", local_resolve)
    with pytest.raises(OSError, match="closed"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    reached.clear()
    with served() as (_, address):
        visitor = Visitor(address)
        turn = visitor.turn(TAG, visitor.example())
        assert turn["right"] and list(visitor.stream(f"/api/turns/{turn['id']}/compare"))[-1]["event"] == "compared"
        assert visitor.client.get(f"/api/turns/{turn['id']}/picture.png").status_code == 200
    assert reached == []


_WRITTEN: list[str] = []
_LISTENING = threading.Event()


def _note_writes(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _LISTENING.is_set() and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        _WRITTEN.append(str(arguments[0]))


def test_no_picture_is_written_anywhere(visitor: Visitor) -> None:
    sys.addaudithook(_note_writes)  # it can never be taken out again, and looks away afterwards
    _LISTENING.set()
    try:
        visitor.turn("What?", visitor.upload(photo()).json(), tokens=1)
        open("/dev/null", "w").close()
    finally:
        _LISTENING.clear()
    assert _WRITTEN == ["/dev/null"]


@pytest.mark.parametrize("end", ["leaves", "is away for long"])
def test_what_a_visitor_brought_is_deleted(end: str) -> None:
    with served(Limits(idle=0.5) if end == "is away for long" else None) as (page, address):
        visitor = Visitor(address)
        visitor.turn(TAG, visitor.example())
        (session,) = page.sessions
        pixels = weakref.ref(next(iter(session.pictures.values())).pixels)
        chat = weakref.ref(session.branches[1].chat)
        del session
        if end == "leaves":
            assert visitor.client.delete("/api/session").status_code == 204
        until(lambda: not len(page.sessions))
        assert visitor.client.post("/api/stop").status_code == 410

        def forgotten() -> bool:
            gc.collect()
            return pixels() is None and chat() is None

        assert until(forgotten)


def test_an_example_is_refused_without_its_photographs(visitor: Visitor, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: Any) -> None:
        raise ValueError("the photographs come with scikit-image: pip install 'vpt-kernels[demo]'")

    monkeypatch.setattr("vpt_model.app.page.pictures.make_scene", missing)
    refused = visitor.client.post("/api/examples", json={})
    assert refused.status_code == 422 and "scikit-image" in refused.json()["error"]
    assert visitor.client.post("/api/examples", json={"seed": -1}).status_code == 422


def test_examples_are_drawn_anew() -> None:
    assert len({drawn(None).scene["seed"] for _ in range(20)}) > 15


def vpt(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, ["app", *map(str, arguments)])


def test_a_port_in_use_ends_with_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = vpt("--port", taken.getsockname()[1])
    assert result.exit_code == 2 and "give another --host or --port" in result.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--host", "nowhere.invalid"], "cannot be used"),
        (["/no/such/folder"], "/no/such/folder"),
        (["--device", "tpu"], "tpu"),
    ],
)
def test_bad_arguments_end_with_one_line(arguments: list[str], message: str) -> None:
    result = vpt(*arguments, "--port", 0)
    assert result.exit_code == 2 and message in result.stderr and "Traceback" not in result.output


def test_without_its_packages_the_page_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import vpt_model.app.page

    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    for name in ("command", "server"):
        monkeypatch.delitem(sys.modules, f"vpt_model.app.page.{name}", raising=False)
        monkeypatch.delattr(vpt_model.app.page, name, raising=False)
    result = vpt("--port", 0)
    assert result.exit_code == 2 and "pip install 'vpt-kernels[app]'" in result.stderr
