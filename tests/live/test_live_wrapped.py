"""Models that are wrapped, by torch.compile, adapters, autocast or their owner, and generate by what is inside."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from tests.live.chats import FAMILIES, GREEDY, anew, model, picture, processor, steps, user
from vpt_kernels.live import LiveConversation


class Wrapper(nn.Module):
    """Everything is the inner model's, whose class the cache's argument is read from."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str):
        return super().__getattr__(name) if name == "inner" else getattr(self.inner, name)

    def forward(self, past_key_values=None, **arguments):
        return self.inner(past_key_values=past_key_values, **arguments)


def adapted(inner: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(inner, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()


WRAPPERS = {"compiled": lambda inner: torch.compile(inner, backend="eager"), "own": Wrapper, "adapters": adapted}


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_pictures_of_later_turns_are_seen(wrap):
    network = WRAPPERS[wrap](model("qwen2_vl"))
    plain, shown = deepcopy(network), [picture(60, 120), picture(70, 110)]
    with LiveConversation(network, processor()) as chat:
        for number, image in enumerate(shown):
            chat.add(user("what is there?", image))
            ids = list(chat.ids)
            ours = chat.generate(**GREEDY)
            theirs = anew(plain, chat.processor, ids, shown[: number + 1], **GREEDY)
            assert torch.equal(ours.sequences, theirs.sequences)
            assert (steps(ours) - steps(theirs)).abs().max() <= 1e-4


def test_a_model_that_generates_without_its_parts_is_refused(monkeypatch):
    network = model("qwen2_vl")
    with LiveConversation(network, processor()) as chat:
        chat.add(user("what is there?", picture(60, 120)))
        chat.generate(**GREEDY)
        said, fed = list(chat.ids), chat.fed
        chat.add(user("and there?", picture(70, 110)))
        monkeypatch.setattr(network, "generate", lambda input_ids, **arguments: input_ids)
        with pytest.raises(ValueError, match="does not see pictures of later turns; open the"):
            chat.generate(**GREEDY)
        assert chat.fed == fed and chat.length == len(said) - 1


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("kind", FAMILIES)
def test_autocast_is_the_models_own(kind, kernels):
    """Alone, a first turn has the bits of the model's `generate` in autocast. Our patch embedding stays in float32, and
    a later turn multiplies other shapes: apart by autocast's rounding."""
    network, shown = model(kind), [picture(60, 120), picture(70, 110)]
    with LiveConversation(network, processor(FAMILIES[kind]), kernels=kernels) as chat:
        for number, image in enumerate(shown):
            chat.add(user("what is there?", image))
            ids = list(chat.ids)
            with torch.autocast("cpu", torch.bfloat16):
                ours = steps(chat.generate(**GREEDY))
                theirs = steps(anew(network, chat.processor, ids, shown[: number + 1], **GREEDY))
            exactly = steps(anew(network, chat.processor, ids, shown[: number + 1], **GREEDY))[0]
            if number or kernels:
                assert (ours[0] - exactly).abs().max() <= 2 * (theirs[0] - exactly).abs().max()
            else:
                assert torch.equal(ours, theirs)
