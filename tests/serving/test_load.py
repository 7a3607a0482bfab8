"""What the benchmark of serving asks, and how random weights are made to say it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import tests.serving.engines  # noqa: F401  (settings that vLLM reads when it is imported)
from bench.scripted import NAME, PLAYED, SCRIPT, Scripted
from bench.serve import CLIENTS, mini_asks, planned, slice_asks, take
from vpt_model.vllm.options import MAX_LOOKS, SLOT

pytestmark = pytest.mark.unpoisoned


@pytest.mark.parametrize("asks", [mini_asks, slice_asks])
def test_no_question_is_asked_by_two_loads(asks):
    """The features of a picture that was seen before would be cached."""
    drawn, asked = asks(), []

    def noted():
        for each in drawn:
            asked.append(each)
            yield each

    loads = planned(noted(), 8)
    assert list(loads) == [
        *(f"closed, {clients} clients" for clients in CLIENTS),
        "open",
        *(f"regions, {clients} clients" for clients in (1, 16)),
    ]
    cells = [dict(zip(load.__code__.co_freevars, load.__closure__)) for load in loads.values()]
    found = [each for cell in cells for each in cell["asked" if "asked" in cell else "arriving"].cell_contents]
    assert len({id(each) for each in found}) == len(found) == 8 + 8 + 16 + 64 + 8 + 8 + 64
    assert len({(each.pixels.tobytes(), each.text) for each in found}) == len(found)
    assert all(each.is_about_region for each in found[-72:])


def params(max_looks=1, slot=None):
    extra = {SCRIPT: [7, 8, 9], NAME: "one", MAX_LOOKS: max_looks} | ({} if slot is None else {SLOT: slot})
    return SimpleNamespace(extra_args=extra)


def test_a_script_goes_on_where_the_request_was():
    """Steps that read a part of a prompt sample, too, and nothing comes of it; rounds begin with no token sampled."""
    PLAYED.clear()
    prompt, output = [1, 2], []
    played = Scripted._played(params(), prompt, output)
    assert [played.next(), played.next()] == [7, 7]
    output.append(7)
    assert played.next() == 8
    # Preempted and back, before the second token was kept.
    assert Scripted._played(params(), prompt, list(output)).next() == 8
    # The state behind a token is captured; then the next round.
    assert Scripted._played(params(slot=3), [1, 2, 7, 8], []) is None
    later = Scripted._played(params(), [1, 2, 7, 8, 5, 5], [])
    assert [later.next(), later.next()] == [9, 9]
    later.output.append(9)
    assert later.next() is None


def test_a_state_without_a_look_is_followed_by_the_script():
    PLAYED.clear()
    output: list[int] = []
    assert Scripted._played(params(0), [1, 2], output).next() == 7
    assert Scripted._played(params(0, slot=3), [1, 2, 7], []).next() == 8
    assert Scripted._played(params(0), [1, 2, 7, 8], []).next() == 9


def test_the_model_is_made_to_ask_for_each_kind_of_look():
    region, action, none = take(slice_asks(), 3)
    assert [len(each.turns) for each in (region, action, none)] == [2, 2, 1]
    assert (region.look, action.look, none.look) == ("region:x2,y2,x4,y4", "clip", None)
    said = [each.options()["vllm_xargs"][SCRIPT] for each in (region, action, none)]
    assert said[0] == [*region.turns[0], *region.turns[1]] and said[2] == none.turns[0]
    assert region.options(slice(1), vpt_max_looks=0)["vllm_xargs"][SCRIPT] == region.turns[0]
