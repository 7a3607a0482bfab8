"""A conversation by itself: what it answers to a turn, without a scheduler."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace

import pytest
import torch

from tests.serving.folders import folder_of
from vpt_model.text.tokens import Tokenizer
from vpt_model.vllm.conversation import Append, Conversation, End, State
from vpt_model.vllm.perception import Perception, checkpoint_config


@pytest.fixture(scope="module")
def perception(tmp_path_factory):
    folder = folder_of("clip", tmp_path_factory.mktemp("checkpoints"))
    config = checkpoint_config(str(folder))
    return Perception(config, Tokenizer.from_folder(folder, config.kind))


def conversation(perception: Perception) -> Conversation:
    picture = ("picture", torch.zeros(200, 300, 3, dtype=torch.uint8))
    return Conversation(perception, SimpleNamespace(max_tokens=99), picture, 1, deque(), 5, 4096, [0, 1])


def split(tokenizer: Tokenizer) -> list[int]:
    """Ids that are not those of their own text: half a letter is read as the sign for what cannot be read."""
    ids = tokenizer.encode("é")[:1]
    assert tokenizer.encode(tokenizer.decode(ids)) != ids
    return ids


@pytest.mark.parametrize("acts", [False, True])
@pytest.mark.parametrize("reread", [False, True])
def test_a_region_whose_answer_is_read_again_needs_every_embedding(perception, reread, acts):
    """An action token without its start has the state before it as its embedding, which the text does not have."""
    ids, tokenizer = perception.tokenizer.ids, perception.tokenizer
    words = split(tokenizer) if reread else tokenizer.encode("yes")
    turn = [*words, *([ids.action] if acts else []), *ids.region_span(1, 1, 5, 5), ids.im_end]
    one = conversation(perception)
    one.turn = turn[:-1]
    refused = reread and acts
    assert one.ends_for_good(turn[-1:]) == refused and one.notices == []
    found = one.take(turn[-1:], [0] * one.round_start + turn)
    if refused:
        assert found is End.FOUND and one.looks == []
        assert "an action token, whose embedding is the state before it" in one.notices[0]
    else:
        assert isinstance(found, Append) and len(one.looks) == 1 and one.notices == []
        assert found.keep == (5 if reread else 5 + len(turn) - 1)


@pytest.mark.parametrize("most", [2, 3])
def test_an_action_may_be_the_last_token_that_is_allowed(perception, most):
    """The client sees it instead of what was sampled behind its start; where there is room, its state is next."""
    ids, one = perception.tokenizer.ids, conversation(perception)
    one.max_looks, one.params.max_tokens = 0, most
    start = one.take([ids.action_start], [0] * one.round_start + [ids.action_start])
    assert isinstance(start, Append) and one.state is State.ANNOUNCED
    one.streamed += len(start.streamed)
    sampled = [65]
    found = one.take(sampled, [0] * one.round_start + [ids.action_start, *sampled])
    if most == 2:
        assert found is End.FULL and sampled == [ids.action]
    else:
        assert isinstance(found, Append) and found.streamed == [ids.action]
