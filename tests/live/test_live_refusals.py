"""Live conversations: what is refused, in words, and leaves everything as it was."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from tests.live.chats import GREEDY, model, opened, picture, processor, user
from vpt_kernels.live import LiveConversation

BAD_CALLS = {
    "nothing appended": (lambda c: c.append(), "neither text nor image"),
    "a number as text": (lambda c: c.append(7), "text is a int"),
    "an image token in a text": (lambda c: c.append("<|image_pad|>"), "pass pictures as image="),
    "a video token in a text": (lambda c: c.append("<|video_pad|>"), "pass pictures as image="),
    "a box outside": (lambda c: c.crop((0, 0, 500, 20)), "a part lies outside"),
    "an empty box": (lambda c: c.crop((5, 5, 5, 20)), "holds no pixel"),
    "a box of three": (lambda c: c.crop((5, 5, 5)), "four numbers"),
    "a box of NaN": (lambda c: c.crop((5, 5, float("nan"), 8)), "must be finite"),
    "a box of words": (lambda c: c.crop("left"), "four numbers"),
    "unknown coordinates": (lambda c: c.crop((0, 0, 1, 1), 0, "miles"), "give one of"),
    "an unknown image": (lambda c: c.crop((0, 0, 9, 9), image=3), "the conversation has 1 images"),
    "a half image": (lambda c: c.crop((0, 0, 9, 9), image=0.5), "the conversation has 1 images"),
    "no messages": (lambda c: c.add([]), "give a list of dictionaries"),
    "a message alone": (lambda c: c.add({"role": "user", "content": "x"}), "give a list of dictionaries"),
    "a message without role": (lambda c: c.add([{"content": "x"}]), "a role and a content"),
    "a video": (lambda c: c.add([{"role": "user", "content": [{"type": "video"}]}]), "a part of the content"),
    "no content": (lambda c: c.add([{"role": "user", "content": None}]), "must be a text or a list"),
    "a flag as image": (lambda c: c.crop((0, 0, 9, 9), image=True), "the conversation has 1 images"),
    "tokenize": (lambda c: c.add(user("x"), tokenize=True), "leave them out"),
    "ids of one's own": (lambda c: c.generate(input_ids=torch.ones(1, 3)), "leave them out"),
    "beams": (lambda c: c.generate(num_beams=3), "one sequence"),
    "several sequences": (lambda c: c.generate(num_return_sequences=2, do_sample=True), "one sequence"),
    "a draft model": (lambda c: c.generate(assistant_model=c.model), "leave it out"),
    "prefilling in chunks": (lambda c: c.generate(prefill_chunk_size=8), "feeds a conversation from its beginning"),
    "too many tokens": (lambda c: c.generate(max_new_tokens=999), "static cache holds 300"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_say_what_is_wrong_and_change_nothing(case):
    call, message = BAD_CALLS[case]
    with opened(cache="static", capacity=300) as chat:
        chat.add(user("what?", picture(90, 120)))
        before = list(chat.ids), chat.length, len(chat.images)
        with pytest.raises((ValueError, TypeError), match=message):
            call(chat)
        assert (chat.ids, chat.length, len(chat.images)) == before
        chat.generate(**GREEDY)
        with pytest.raises(ValueError, match="differently|images and the conversation"):
            chat.append("more")
            chat.crop((0, 0, 30, 30))
            chat.append("what?")
            chat.add(user("a message behind raw tokens"))


def test_a_conversation_that_ends_inside_an_image_or_is_answered_cannot_be_answered():
    with opened() as chat:
        with pytest.raises(ValueError, match="nothing to answer"):
            chat.generate(**GREEDY)
        chat.append(image=picture(90, 120))
        chat.ids.pop()
        with pytest.raises(ValueError, match="ends inside an image"):
            chat.generate(**GREEDY)


def test_a_closed_conversation_and_one_in_another_thread_refuse():
    chat = opened()
    chat.add(user("what?", picture(90, 120)))
    inside, errors = threading.Event(), []

    class Wait:
        def put(self, _: Any) -> None:
            inside.set()
            time.sleep(0.01)

        def end(self) -> None: ...

    worker = threading.Thread(target=lambda: chat.generate(**GREEDY, streamer=Wait()))
    worker.start()
    inside.wait(30)
    for call in (chat.generate, lambda: chat.append("x"), lambda: chat.crop((0, 0, 9, 9)), lambda: chat.add(user("x"))):
        with pytest.raises(ValueError, match="busy in another call"):
            call()
        errors.append(call)
    worker.join()
    assert len(errors) == 4
    chat.close()
    for call in errors:
        with pytest.raises(ValueError, match="closed"):
            call()


def test_threads_over_one_model_wait_for_each_other():
    network = model("qwen2_vl")
    chats = [LiveConversation(network, processor()) for _ in range(4)]
    alone = [LiveConversation(network, processor()) for _ in range(4)]
    for group in (chats, alone):
        for number, chat in enumerate(group):
            chat.add(user("what?", picture(60 + 20 * number, 100, number)))
    threads = [threading.Thread(target=chat.generate, kwargs=GREEDY) for chat in chats]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, other in zip(chats, alone):
        other.generate(**GREEDY)
        assert ours.ids == other.ids


def test_what_cannot_be_continued_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="layers of linear_attention"):
        LiveConversation(model("qwen3_5", num_hidden_layers=4), processor(16))
    text = LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(ValueError, match="no get_rope_index"):
        LiveConversation(text, processor())
    with pytest.raises(TypeError, match="a generating model"):
        LiveConversation(torch.nn.Linear(2, 2), processor())
    with pytest.raises(TypeError, match="without tokenizer"):
        LiveConversation(model("qwen2_vl"), object())
    with pytest.raises(ValueError, match="on the meta device"):
        LiveConversation(model("qwen2_vl").to("meta"), processor())
    with pytest.raises(ValueError, match="only a static cache has one"):
        LiveConversation(model("qwen2_vl"), processor(), capacity=90)
    for options, message in (
        ({"cache": "static"}, "needs a number of tokens"),
        ({"cache": "paged"}, "give 'dynamic', 'static' or a cache"),
        ({"cache": {}}, "give 'dynamic', 'static' or a cache"),
    ):
        with pytest.raises(ValueError, match=message):
            opened(**options)


REFUSED = {"use_cache": False, "prompt_lookup_num_tokens": 3, "num_beams": 2, "prefill_chunk_size": 4}


@pytest.mark.parametrize("where", ("the call's", "the model's", "the model's, where the call's leaves it open"))
@pytest.mark.parametrize("name", REFUSED)
def test_what_a_generation_config_asks_for(name, where):
    """What is refused as an argument is refused there, and nothing is fed."""
    with opened() as chat:
        chat.add(user("see", picture(60, 120)))
        own = GenerationConfig(**{name: None}) if "call's" in where else None
        holder = own if where == "the call's" else chat.model.generation_config
        setattr(holder, name, REFUSED[name])
        with pytest.raises(ValueError, match=name):
            chat.generate(**GREEDY, **({} if own is None else {"generation_config": own}))
        assert chat.length == 0


@pytest.mark.parametrize(
    "arguments", ({"max_new_tokens": float("inf")}, {"max_new_tokens": "3"}, {"generation_config": 3}), ids=str
)
def test_arguments_of_a_wrong_kind(arguments):
    with opened() as chat:
        chat.add(user("see"))
        with pytest.raises((TypeError, ValueError), match=next(iter(arguments))):
            chat.generate(**arguments)
        assert chat.length == 0
