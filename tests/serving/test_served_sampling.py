"""Sampling, limits, several images and turns: against one prefill of the same embeddings by our network."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from PIL import Image

from tests.helpers import noise
from tests.model.replay import Replay
from tests.serving.engines import (
    TOLERANCE,
    WARM,
    Case,
    noise_cases,
    our_engine,
    parameters,
    prompt,
    reference,
    vllm_engine,
    warm,
)
from tests.serving.folders import folder_of
from vpt_model.checkpoint import Checkpoint
from vpt_model.engine.sampling import Sampler
from vpt_model.text.prompt import first_round, next_round
from vpt_model.text.tokens import crop_box, parse_region_ids

pytestmark = pytest.mark.unpoisoned


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def served(root):
    """Our engine and vLLM's, of the tiny model that re-encodes with its own tower."""
    folder = folder_of("clip", root)
    with vllm_engine(folder) as llm:
        yield our_engine(folder), llm, Checkpoint.open(folder).load(torch.float32)


def test_a_seed_means_the_same_tokens_alone_and_in_batches(served):
    engine, llm, _ = served
    cases = [replace(case, max_tokens=24) for case in noise_cases("clip", 3)]
    together = [list(output.outputs[0].token_ids) for output in warm(llm, engine, cases)]
    assert len({tuple(tokens) for tokens in together}) > len(cases) // 2
    for number in range(0, len(cases), 4):
        params = parameters(cases[number], **WARM, seed=number)
        (alone,) = llm.generate([prompt(engine, cases[number])], [params], use_tqdm=False)
        assert list(alone.outputs[0].token_ids) == together[number]


def test_sampled_tokens_have_our_engines_log_probabilities(served):
    engine, llm, _ = served
    cases = [replace(case, max_tokens=24) for case in noise_cases("clip", 2)]
    compared = 0
    for case, output in zip(cases, warm(llm, engine, cases)):
        tokens, scores = list(output.outputs[0].token_ids), output.outputs[0].logprobs
        rest = iter(tokens)
        with mock.patch.object(Sampler, "__call__", lambda self, *logits, rest=rest: next(rest, engine.ids.im_end)):
            expected, answer = reference(engine, replace(case, max_tokens=200))
        if engine.ids.action_start in answer.ids or engine.ids.action in answer.ids:
            continue  # behind such a token our script and vLLM's captured step are one token apart
        assert expected[: len(tokens)] == tokens
        ours, first = answer.logits.log_softmax(-1), len(expected) - len(answer.ids)
        for place in range(first, len(tokens)):
            token = tokens[place]
            assert abs(scores[place][token].logprob - ours[place - first, token].item()) < TOLERANCE
            compared += 1
    assert compared > 50


@pytest.mark.parametrize("look", ["clip", "region:x1,y2,x4,y5", None])
def test_answers_of_one_request_are_those_of_as_many_requests(served, look):
    """Also where the engine core shares a process, and lists, with the client: `n` answers begin with one prompt."""
    engine, llm, _ = served
    case = Case(noise(170, 310, "answers", look).numpy(), "what is it?", [look] if look else [], max_tokens=24)
    (together,) = llm.generate([prompt(engine, case)], [parameters(case, **WARM, seed=5, n=3)], use_tqdm=False)
    asked = [parameters(case, **WARM, seed=5 + number) for number in range(3)]
    alone = llm.generate([prompt(engine, case)] * 3, asked, use_tqdm=False)
    tokens = [list(answer.token_ids) for answer in together.outputs]
    assert tokens == [list(output.outputs[0].token_ids) for output in alone]
    assert len(set(map(tuple, tokens))) > 1
    shown = together.prompt_token_ids
    assert shown[-5:] == prompt(engine, case)["prompt_token_ids"][-5:] and shown == alone[0].prompt_token_ids


def test_a_forced_look_without_an_image_is_refused_where_it_enters(served):
    from vllm.exceptions import VLLMValidationError

    engine, llm, _ = served
    case = Case(None, "what is it?", ["clip"])
    with pytest.raises(VLLMValidationError, match=r"\['clip'\], but the request has 0 images and a look needs 1: add"):
        llm.generate([prompt(engine, case)], [parameters(case)], use_tqdm=False)
    (output,) = llm.generate([prompt(engine, case)], [parameters(replace(case, looks=()))], use_tqdm=False)
    assert output.outputs[0].token_ids


def greedy(replay, tokens, forbidden=()):
    """Whether each token is the argmax behind what the replay holds; forbidden: ids before each that may not be."""
    begin = len(replay.tokens) - 1
    replay.add(tokens[:-1])
    logits = replay.model.language.logits(replay.hidden()[begin:])
    for row, banned in zip(logits, forbidden):
        row[list(banned)] = float("-inf")
    return logits.argmax(-1).tolist() == tokens


def test_min_tokens_counts_all_rounds(served):
    """Masked are what vLLM knows to end a turn; so a forced look, whose round then has its own least length."""
    engine, llm, state = served
    case = Case(noise(200, 300, "least").numpy(), "what is it?", ["clip"])
    (output,) = llm.generate([prompt(engine, case)], [parameters(case, min_tokens=20, max_tokens=24)], use_tqdm=False)
    tokens = list(output.outputs[0].token_ids)
    assert 20 <= len(tokens) <= 24
    replay = Replay(engine, case.text, torch.from_numpy(case.pixels), state)
    replay.action()
    if engine.ids.action not in tokens and engine.ids.action_start not in tokens:
        stops = {engine.ids.im_end, engine.ids.endoftext}
        assert greedy(replay, tokens, [stops if place < 20 else () for place in range(len(tokens))])


@pytest.mark.parametrize("look", ["clip", "region:x1,y2,x4,y5", None])
def test_a_second_turn_about_a_second_image(served, look):
    """A look goes to the last image; all of it equals one prefill."""
    engine, llm, state = served
    ids, encode = engine.ids, engine.tokenizer.encode
    first, second = noise(150, 250, "first"), noise(333, 222, "second")
    said, question = "it is a cat", "\nand this one?"
    case = Case(first.numpy(), "what is it?", [look] if look else [])
    system, user = encode(engine.prompt.system), encode(engine.prompt.user_text(case.text, True))
    tokens = [*first_round(ids, system, user, 1), *encode(said), *next_round(ids, encode(question), 1)]
    images = [Image.fromarray(picture.numpy()) for picture in (first, second)]
    asked = {"prompt_token_ids": tokens, "multi_modal_data": {"image": images}}
    (output,) = llm.generate([asked], [parameters(case, max_tokens=12)], use_tqdm=False)

    replay = Replay(engine, case.text, first, state)
    replay.add(encode(said))
    replay.image, replay.whole = second, (0, 0, second.shape[1], second.shape[0])
    replay.first = replay.look(replay.whole)
    replay.add(next_round(ids, encode(question), len(replay.first)), replay.first)
    if look == "clip":
        replay.action()
    elif look:
        span = list(ids.region_span(1, 2, 4, 5))
        replay.add(span)
        replay.region([crop_box(each, second.shape[1], second.shape[0]) for each in parse_region_ids(span, ids)])
    found = list(output.outputs[0].token_ids)
    until = next((i for i, token in enumerate(found) if token in (ids.action_start, ids.action)), len(found) - 1)
    assert greedy(replay, found[: until + 1])
