"""Live conversations: every turn equals generating from the whole conversation anew, and only new tokens are fed."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    MaxLengthCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from tests.live.chats import (
    FAMILIES,
    GREEDY,
    SAY,
    TEMPLATE,
    anew,
    model,
    opened,
    picture,
    pictures,
    processor,
    steps,
    token,
    unwritable,
    user,
)
from tests.model.watch import LiveMemory
from vpt_kernels import patch
from vpt_kernels.live import LiveConversation
from vpt_kernels.patch.swap import is_swapped

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_EXTENSION = """
from tests.live.test_live import GREEDY, converse, opened, replaced
from vpt_kernels.backends import EXTENSION_PROBLEM
print(EXTENSION_PROBLEM is None)
with opened() as chat:
    assert replaced(chat.model)
    converse(chat, GREEDY, turns=2)
print("equal")
"""
each_family = pytest.mark.parametrize("kind", FAMILIES)
each_qwen = pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
each_cache = pytest.mark.parametrize("cache", ["dynamic", "static"])


def converse(chat: LiveConversation, options: dict[str, Any], seed: int | None = None, turns: int = 4) -> None:
    """Turns with a picture each but for the fourth; every one is compared with generating anew, unpatched."""
    shown: list[Any] = []
    plain = deepcopy(chat.model)
    for turn, image in zip(range(turns), [*pictures(), None]):
        new = [] if image is None else [image]
        chat.add(user(f"question {turn}?", *new))
        shown += new
        ids, patches = list(chat.ids), chat.fed["patches"]
        found = []
        for generate in (chat.generate, partial(anew, plain, chat.processor, ids, shown)):
            if seed is not None:
                torch.manual_seed(seed + turn)
            found.append(generate(**options))
        ours, theirs = found
        assert torch.equal(ours.sequences, theirs.sequences), f"turn {turn}"
        assert (steps(ours) - steps(theirs)).abs().max() <= 1e-4
        assert chat.fed["tokens"] == chat.length == len(chat.ids) - 1
        seen = chat.processor.image_processor(images=new, return_tensors="pt").image_grid_thw if new else torch.zeros(1)
        assert chat.fed["patches"] - patches == int(seen.prod())


@each_family
@each_cache
def test_every_turn_equals_generating_anew(kind, cache):
    with opened(kind, cache=cache, capacity=600) as chat:
        converse(chat, GREEDY)


@pytest.mark.slow
@each_family
@each_cache
def test_long_turns_equal_generating_anew(kind, cache):
    with opened(kind, cache=cache, capacity=1200) as chat:
        converse(chat, GREEDY | {"max_new_tokens": 64, "min_new_tokens": 64})


@each_family
@each_cache
def test_sampled_turns_equal_generating_anew(kind, cache):
    with opened(kind, cache=cache, capacity=600) as chat:
        converse(chat, GREEDY | {"do_sample": True, "temperature": 1.5, "top_k": 20}, seed=5)


def test_without_the_kernels_the_models_own_code_runs():
    with opened(kernels=False) as chat:
        assert not replaced(chat.model)
        converse(chat, GREEDY, turns=2)


@pytest.mark.slow
@each_family
@each_cache
def test_long_sampled_turns_equal_generating_anew(kind, cache):
    long = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": True, "temperature": 1.5, "top_k": 20}
    with opened(kind, cache=cache, capacity=1200) as chat:
        converse(chat, GREEDY | long, seed=5)


def test_without_the_extension_every_turn_equals_generating_anew(tmp_path):
    """A copy of the package without its libraries, as it is installed where there is no compiler."""
    shutil.copytree(ROOT / "vpt_kernels", tmp_path / "vpt_kernels", ignore=shutil.ignore_patterns("*.so"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (tmp_path, ROOT)))}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTENSION], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.split() == ["False", "equal"], done.stdout + done.stderr


@each_family
def test_half_precision_stays_within_twice_the_error_of_generating_anew(kind):
    """Logits of one sequence of ids, fed in turns and at once in bfloat16, against float64 at once."""
    chat = LiveConversation(model(kind).bfloat16(), processor(FAMILIES[kind]))
    exact = deepcopy(chat.model).double()
    exact.set_experts_implementation("eager")  # grouped products have no float64
    own, shown, turns = [], [], []
    for turn, image in enumerate(pictures()):
        chat.add(user(f"question {turn}?", image))
        shown.append(image)
        turns.append((list(chat.ids), list(shown)))
        own.append(steps(chat.generate(**GREEDY)).float())
    sequence = list(chat.ids)
    chat.close()
    plain = deepcopy(chat.model)
    for logits, (ids, images) in zip(own, turns):
        behind = sequence[len(ids) : len(ids) + 12]
        there, true = (at_once(network, chat.processor, ids + behind, images, 12) for network in (plain, exact))
        # The first logits are those of one state of the cache; the others follow the same ids.
        ours, theirs = (logits - true).abs().max(), (there.float() - true).abs().max()
        assert ours <= 2 * theirs


def at_once(network: Any, chat: Any, ids: list[int], images: list[Any], count: int) -> Tensor:
    """Logits of the last `count` ids by one forward pass of everything."""
    tokens = torch.tensor([ids])
    given = dict(chat.image_processor(images=images, return_tensors="pt"))
    given["pixel_values"] = given["pixel_values"].to(network.dtype)
    kinds = (tokens == token("<|image_pad|>")).int()
    with torch.no_grad():
        return network(tokens, mm_token_type_ids=kinds, **given).logits[0, -count - 1 : -1].double()


def replaced(network: Any) -> bool:
    return any(map(is_swapped, network.modules()))


def test_the_model_is_patched_while_a_conversation_is_open():
    network = model("qwen2_vl")
    first, second = (LiveConversation(network, processor()) for _ in range(2))
    first.close()
    first.close()
    assert replaced(network)
    second.add(user("what?", picture(90, 120)))
    second.generate(**GREEDY)
    del second
    gc.collect()
    assert not replaced(network)


def test_a_patch_of_the_users_own_stays():
    network = model("qwen2_vl")
    with patch(network) as report, LiveConversation(network, processor()) as chat:
        chat.add(user("what?", picture(90, 120)))
        chat.generate(**GREEDY)
        chat.close()
        assert replaced(network) and sum(report.calls.values())
    assert not replaced(network)


@each_cache
def test_conversations_over_one_model_do_not_meet(cache):
    network, room = model("qwen2_vl"), {"capacity": 400} if cache == "static" else {}
    chats = [LiveConversation(network, processor(), cache=cache, **room) for _ in range(2)]
    alone = [LiveConversation(network, processor(), cache=cache, **room) for _ in range(2)]
    for turn in range(2):
        for number, chat in enumerate(chats):
            chat.add(user(f"{turn}", picture(60 + 40 * number, 100, number)))
            chat.generate(**GREEDY)
    for number, chat in enumerate(alone):
        for turn in range(2):
            chat.add(user(f"{turn}", picture(60 + 40 * number, 100, number)))
            chat.generate(**GREEDY)
        assert chat.ids == chats[number].ids


def doubled(_: nn.Module, __: Any, out: Tensor) -> Tensor:
    return 2 * out


CHANGES = {
    "in place": lambda embed: embed.proj.weight.mul_(2),
    "replaced": lambda embed: setattr(embed.proj, "weight", nn.Parameter(2 * embed.proj.weight)),
    "loaded": lambda embed: embed.load_state_dict({name: 2 * weight for name, weight in embed.state_dict().items()}),
    "hook": lambda embed: embed.proj.register_forward_hook(doubled),
}


@pytest.mark.parametrize("when", ("before the picture", "before the answer", "between pictures"))
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_pictures_are_seen_with_the_weights_of_the_call(change, when):
    """Embeddings of a picture hold the model's weights, whenever those change while a conversation is open."""
    shown = pictures(2)
    with opened() as chat:
        embed = chat.model.model.visual.patch_embed
        if when == "between pictures":
            chat.append("one", shown[0])
        if when != "before the answer":
            CHANGES[change](embed)
        for image in shown if when != "between pictures" else shown[1:]:
            chat.append("and", image)
        if when == "before the answer":
            CHANGES[change](embed)
        chat.append("what is there?")
        ids = list(chat.ids)
        ours = chat.generate(**GREEDY)
        theirs = anew(deepcopy(chat.model), chat.processor, ids, shown, **GREEDY)
        assert torch.equal(ours.sequences, theirs.sequences)
        assert (steps(ours) - steps(theirs)).abs().max() <= 1e-4


def test_pictures_fold_the_weights_once(monkeypatch):
    with opened() as chat:
        chat.append("one", picture(80, 80))
        monkeypatch.setattr("vpt_kernels.processor.fold_patch_weight", None)
        chat.append("two", picture(90, 70))


def test_appended_crops_equal_generating_anew():
    image = picture(200, 260)
    with opened() as chat:
        chat.append("look: ", None)
        chat.append(image=image)
        chat.append("what is there?")
        chat.generate(**GREEDY)
        assert chat.crop((20, 30, 150.5, 120)) == (20, 30, 151, 120)
        assert chat.crop((0.5, 0, 1, 0.5), 0, "relative") == (130, 0, 260, 100)
        assert chat.crop((0, 500, 1000, 1000), 0, "thousandths") == (0, 100, 260, 200)
        height, width = chat._look.resized(chat._pictures[0].grid)
        assert chat.crop((0, 0, width / 2, height), image=0, coordinates="resized") == (0, 0, 130, 200)
        chat.append("and now?")
        ids = list(chat.ids)
        ours = chat.generate(**GREEDY)
        boxes = [(20, 30, 151, 120), (130, 0, 260, 100), (0, 100, 260, 200), (0, 0, 130, 200)]
        theirs = anew(deepcopy(chat.model), chat.processor, ids, [image, *map(image.crop, boxes)], **GREEDY)
        assert torch.equal(ours.sequences, theirs.sequences)
        assert (steps(ours) - steps(theirs)).abs().max() <= 1e-4


@each_cache
def test_an_interrupted_answer_leaves_the_conversation_as_it_was(cache):
    class Stop:
        def __init__(self, after: int) -> None:
            self.left = after

        def put(self, _: Any) -> None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt

        def end(self) -> None: ...

    with opened(cache=cache, capacity=600) as chat, opened() as other:
        for one in (chat, other):
            one.add(user("first", picture(90, 120)))
            one.generate(**GREEDY)
            one.add(user("second", picture(120, 90)))
        before = list(chat.ids), chat.length, chat.next_position, dict(chat.fed)
        with pytest.raises(KeyboardInterrupt):
            chat.generate(**GREEDY, streamer=Stop(5))
        assert (chat.ids, chat.length, chat.next_position, chat.fed) == before
        assert chat.generate(**GREEDY).sequences.tolist() == other.generate(**GREEDY).sequences.tolist()


def test_streamers_and_stopping_criteria_work_as_usual():
    with opened() as chat:
        chat.add(user("what?", picture(90, 120)))
        streamer = TextIteratorStreamer(chat.processor.tokenizer, skip_prompt=True)
        stop = StoppingCriteriaList([MaxLengthCriteria(len(chat.ids) + 5)])
        before = len(chat.ids)
        chat.generate(suppress_tokens=unwritable(), do_sample=False, streamer=streamer, stopping_criteria=stop)
        assert len(chat.ids) == before + 5
        assert "".join(streamer) == chat.processor.tokenizer.decode(chat.ids[before:])


STRIPS = TEMPLATE.replace("{% for c in m.content %}", "{% for c in m.content if m.role == 'user' or loop.index == 9 %}")
"""A template that forgets what the assistant said, as those of thinking models forget the thoughts."""


def test_a_template_that_rewrites_history_is_named():
    with opened(template=STRIPS) as chat:
        chat.add(user("first", picture(90, 120)))
        begin = len(chat.ids)
        chat.generate(**GREEDY)
        before = list(chat.ids), chat.length, len(chat.images)
        with pytest.raises(ValueError, match=rf"differently from token {begin} on: .* pass resync=True"):
            chat.add(user("second", picture(120, 90)))
        assert (chat.ids, chat.length, len(chat.images)) == before
        chat.add(user("second", picture(120, 90)), resync=True)
        assert chat.length == begin
        ids, shown = list(chat.ids), [picture(90, 120), picture(120, 90)]
        ours, theirs = chat.generate(**GREEDY), anew(deepcopy(chat.model), chat.processor, ids, shown, **GREEDY)
        assert torch.equal(ours.sequences, theirs.sequences)
        assert (steps(ours) - steps(theirs)).abs().max() <= 1e-4


@each_cache
def test_resynchronising_inside_an_image_feeds_it_again(cache):
    """The first message changes its text, so that even the first picture is fed again."""
    moody = "{{ messages | length }}" + TEMPLATE
    with opened(template=moody, cache=cache, capacity=600) as chat:
        shown = [picture(90, 120, 0)]
        chat.add(user("first", *shown))
        chat.generate(**GREEDY)
        shown.append(picture(70, 140, 1))
        chat.add(user("second", shown[1]), resync=True)
        assert chat.length == 0
        ids = list(chat.ids)
        ours, theirs = chat.generate(**GREEDY), anew(deepcopy(chat.model), chat.processor, ids, shown, **GREEDY)
        assert (steps(ours) - steps(theirs)).abs().max() <= 1e-4


def test_an_answer_can_be_replaced_by_what_is_its_text():
    with opened() as chat:
        chat.add(user("first", picture(90, 120)))
        begin = len(chat.ids)
        chat.generate(**GREEDY)
        said = chat.processor.tokenizer.decode(chat.ids[begin:], skip_special_tokens=True)
        chat.add([{"role": "assistant", "content": said}, *user("second")])
        assert chat.length == begin + 11
        chat.generate(**GREEDY)
        with pytest.raises(ValueError, match="differently"):
            chat.add([{"role": "assistant", "content": "no"}, *user("third")])


def test_messages_may_come_one_by_one():
    with opened() as chat, opened() as other:
        chat.add(user("first", picture(90, 120)))
        chat.add(user("second"))
        other.add([*user("first", picture(90, 120)), *user("second")])
        assert chat.ids == other.ids
        assert chat.generate(**GREEDY).sequences.tolist() == other.generate(**GREEDY).sequences.tolist()


def test_a_cache_that_somebody_changed_is_not_continued():
    with opened() as chat:
        chat.add(user("first", picture(90, 120)))
        chat.generate(**GREEDY)
        chat.add(user("second"))
        chat._fed._cache.crop(-3)
        with pytest.raises(ValueError, match="something else changed it"):
            chat.generate(**GREEDY)


def test_two_hundred_turns_keep_the_work_of_one():
    """Tokens fed per turn do not grow with the history, and ids equal generating anew at every tenth turn."""
    short = SAY | {"do_sample": False, "max_new_tokens": 2, "min_new_tokens": 2}
    with opened() as chat:
        chat.add(user("see", picture(60, 60)))
        chat.generate(**short)
        counts, plain = set(), deepcopy(chat.model)
        for turn in range(200):
            fed = chat.fed["tokens"]
            chat.append("<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n")
            ids = list(chat.ids)
            out = chat.generate(**short)
            counts.add(chat.fed["tokens"] - fed)
            if turn % 10 == 9:
                theirs = anew(plain, chat.processor, ids, [picture(60, 60)], **short)
                assert torch.equal(out.sequences, theirs.sequences)
        assert len(counts) == 1


@each_cache
def test_a_turn_is_one_pass_of_the_model(cache):
    """With a picture, too, and the first one."""
    one = SAY | {"do_sample": False, "max_new_tokens": 1}
    with opened(cache=cache, capacity=1200) as chat:
        passes: list[object] = []
        chat.model.lm_head.register_forward_pre_hook(lambda head, states: passes.append(states))
        for message in (user("see", picture(60, 60)), user("more"), user("and", picture(90, 60), picture(60, 90))):
            passes.clear()
            chat.add(message)
            chat.generate(**one)
            assert len(passes) == 1


def test_a_call_of_somebody_else_takes_no_pictures():
    """The model may be called, by a hook or in another thread, before `generate` comes to call it."""
    with opened() as chat:
        chat.add(user("see", picture(60, 60)))
        chat.generate(**GREEDY)
        chat.add(user("and", picture(90, 60)))
        plain, ids = deepcopy(chat.model), list(chat.ids)

        def call(model, arguments):
            handle.remove()
            model(torch.tensor([[65, 66, 67]]), position_ids=torch.arange(3).expand(3, 1, 3))

        handle = chat.model.register_forward_pre_hook(call)
        ours = chat.generate(**GREEDY)
        theirs = anew(plain, chat.processor, ids, [picture(60, 60), picture(90, 60)], **GREEDY)
        assert torch.equal(ours.sequences, theirs.sequences)
        assert (steps(ours) - steps(theirs)).abs().max() <= 1e-4


@each_cache
def test_two_hundred_turns_leave_nothing_beside_the_cache(cache):
    short = SAY | {"do_sample": False, "max_new_tokens": 2, "min_new_tokens": 2}
    with opened(cache=cache, capacity=8192) as chat, LiveMemory() as memory:
        chat.add(user("see", picture(60, 60)))
        chat.generate(**short)
        beside = []
        for turn in range(200):
            chat.append("<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n")
            chat.generate(**short)
            if turn % 20 == 19:
                gc.collect()
                kept = [rows for layer in chat._fed._cache.layers for rows in (layer.keys, layer.values)]
                beside.append(memory.now - sum(rows.untyped_storage().nbytes() for rows in kept))
    assert set(beside) == {beside[0]}


def test_a_cache_of_the_users_own_is_taken_if_it_is_empty():
    network = model("qwen2_vl")
    text = network.config.get_text_config()
    with LiveConversation(network, processor(), cache=DynamicCache(config=text)) as chat:
        converse(chat, GREEDY, turns=1)
        with pytest.raises(ValueError, match="begins with an empty one"):
            LiveConversation(network, processor(), cache=chat._fed._cache)
