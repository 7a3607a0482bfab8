"""`zoom`: a random model is made to write tool calls, and is shown what it asks for."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from tests.live.chats import anew, model, picture, processor, steps, token, tokenizer
from vpt_kernels.live import Zoom, parse_zoom_calls, zoom


def call(box: Any, **more: Any) -> str:
    written = {"name": "image_zoom_in_tool", "arguments": {"bbox_2d": box, **more}}
    return f"<tool_call>{json.dumps(written)}</tool_call>"


class Script(LogitsProcessor):
    """Writes one text after the other, each ended by <|im_end|>, whatever the model thinks."""

    def __init__(self, *texts: str) -> None:
        ids = [tokenizer()(text)["input_ids"] + [token("<|im_end|>")] for text in texts]
        self.left = [number for text in ids for number in text]

    def __call__(self, _: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.left.pop(0)] = 0
        return forced


def zoomed(*texts: str, **options: Any) -> Any:
    given = {"max_new_tokens": 300, "do_sample": False, "logits_processor": LogitsProcessorList([Script(*texts)])}
    return zoom(model("qwen2_vl"), processor(), picture(200, 260), "what?", **options, **given)


def test_what_the_model_asks_for_is_shown_until_it_answers():
    answer = zoomed(
        "I look. " + call([20, 30, 150, 120], label="sign"),
        call([0, 0, 20, 20], img_idx=1) + call([200, 150, 250, 190]),
        "It says 7.",
    )
    assert answer.text == "It says 7." and len(answer.turns) == 3
    assert answer.boxes == [(0, 20, 30, 150, 120), (1, 0, 0, 20, 20), (0, 200, 150, 250, 190)]
    image, chat = picture(200, 260), answer.conversation
    sign = image.crop((20, 30, 150, 120))
    shown = [image, sign, sign.crop((0, 0, 20, 20)), image.crop((200, 150, 250, 190))]
    assert [tuple(pixels.shape) for pixels in chat.images] == [(one.height, one.width, 3) for one in shown]
    chat.add([{"role": "user", "content": "sure?"}])
    options = {"do_sample": False, "max_new_tokens": 8, "return_dict_in_generate": True, "output_logits": True}
    ids = list(chat.ids)
    ours = chat.generate(**options)
    theirs = anew(deepcopy(chat.model), chat.processor, ids, shown, **options)
    assert (steps(ours) - steps(theirs)).abs().max() <= 1e-4
    assert chat.fed["tokens"] == chat.length


def test_boxes_that_models_write_are_cut_to_the_image_and_hopeless_ones_answered_in_words():
    answer = zoomed(call([150, 120, -20, 400]), call([300, 0, 400, 50]), call([0, 0, 9, 9], img_idx=8), "done")
    assert answer.boxes == [(0, 0, 120, 150, 200)]
    text = tokenizer().decode(answer.conversation.ids)
    assert "No crop: box (300.0, 0.0, 400.0, 50.0) in pixels of a picture of 260×200 pixels: it holds no pixel" in text
    assert "No crop: image is 8; the conversation has 2 images" in text


def test_the_coordinates_of_the_model_are_those_of_the_call():
    assert zoomed(call([0, 0, 500, 1000]), "done", coordinates="thousandths").boxes == [(0, 0, 0, 130, 200)]


def test_after_the_last_look_the_answer_is_final():
    asking = call([20, 30, 150, 120])
    answer = zoomed(asking, asking, asking, max_looks=2)
    assert len(answer.boxes) == 2 and answer.text == asking
    assert zoomed(asking, max_looks=0).boxes == []
    with pytest.raises(ValueError, match="max_looks is -1"):
        zoomed("", max_looks=-1)


def test_a_parser_of_ones_own_is_a_function():
    answer = zoomed("look at 10 10 60 70", "done", parser=lambda t: [Zoom((10, 10, 60, 70))] if "look" in t else [])
    assert answer.boxes == [(0, 10, 10, 60, 70)]


CALLS = {
    call([1, 2, 3, 4]): [Zoom((1, 2, 3, 4))],
    call([1, 2, 3, 4], label="a", img_idx=2): [Zoom((1, 2, 3, 4), 2, "a")],
    "x <tool_call>\n" + call([1, 2, 3, 4])[11:]: [Zoom((1, 2, 3, 4))],
    '<tool_call>{"name": "zoom", "arguments": "{\\"bbox\\": [1, 2, 3, 4]}"}</tool_call>': [Zoom((1, 2, 3, 4))],
    '<tool_call>{"bbox_2d": [1, 2, 3, 4]}</tool_call>': [Zoom((1, 2, 3, 4))],
    call([1, 2, 3]): [],
    call("all of it"): [],
    call([1, 2, 3, None]): [],
    "<tool_call>{not json</tool_call>": [],
    "<tool_call>[1, 2]</tool_call>": [],
    '<tool_call>{"name": "search", "arguments": {"query": "x"}}</tool_call>': [],
    '<tool_call>{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [1, 2, 3, 4]}}': [Zoom((1, 2, 3, 4))],
    "an answer": [],
    "": [],
}


@pytest.mark.parametrize("text", CALLS)
def test_calls_are_read_in_every_form_they_are_written_and_nothing_else_is(text):
    assert parse_zoom_calls(text) == CALLS[text]


def test_an_error_closes_the_conversation():
    network = model("qwen2_vl")
    with pytest.raises(ValueError, match="follow from the conversation"):
        zoom(network, processor(), picture(90, 120), "what?", input_ids=torch.ones(1, 2))
    assert not any("forward" in vars(module) for module in network.modules())
