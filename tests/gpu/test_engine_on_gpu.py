"""The engine on a GPU: its attention kernel, graphs against no graphs, and the tokens that the CPU chooses."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import assert_same_bits, assert_twice_as_good, each_dtype
from tests.model.attention_inputs import make, oracle
from tests.model.engine.scripts import Steps
from tests.model.inputs import random_image, tiny_config, tiny_state
from vpt_model.config import ENCODERS
from vpt_model.engine import Engine, Sampling
from vpt_model.engine.graphs import BUCKETS
from vpt_model.network import attention, attention_triton
from vpt_model.network.model import Model
from vpt_model.text.tokens import Tokenizer

pytestmark = pytest.mark.gpu

IMAGE = random_image(150, 230, seed=3)
QUESTION = "What is written on the sign?"
REGION = "region:x2,y1,x5,y4"


@each_dtype
@pytest.mark.parametrize("counts, past, bucket", [([1] * 3, [0, 63, 700], 1), ([270], [350], 320), ([5, 0], [9, 0], 8)])
@pytest.mark.parametrize("heads", [(12, 2), (28, 4)])
def test_attention(dtype, counts, past, bucket, heads):
    call = make(counts, past, bucket, heads=heads, dim=128, capacity=1024, dtype=dtype)
    out = attention_triton.attend(**vars(call.to("cuda"))).cpu()
    eager = oracle(call, torch.float32 if dtype == torch.float16 else dtype).to(dtype)
    assert_twice_as_good(call.real(out), eager, oracle(call))
    assert_same_bits(attention_triton.attend(**vars(call.to("cuda"))).cpu(), out, "run again")


@pytest.mark.skipif(attention._flash_attn() is None, reason="flash-attn is not installed")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flash_attn_agrees(dtype):
    call = make([5, 0, 8], [90, 0, 3], 8, heads=(12, 2), dim=128, capacity=256, dtype=dtype)
    out = attention.attend(**vars(call.to("cuda"))).cpu()
    eager = oracle(call, torch.float32 if dtype == torch.float16 else dtype).to(dtype)
    assert_twice_as_good(call.real(out), eager, oracle(call))


def engine_of(encoder: str, device: str, **options) -> Engine:
    kind = ENCODERS[encoder]
    state = {name: tensor.to(device) for name, tensor in tiny_state(kind).items()}
    return Engine(Model.from_state(tiny_config(kind), state), Tokenizer.byte_level(320, kind), **options)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("look", [REGION, "re-encode", None])
@pytest.mark.parametrize("speculate", [False, True])
def test_tokens_of_the_cpu(encoder, look, speculate):
    """Without graphs, then with them; the first use, and again."""
    looks = look and [encoder if look == "re-encode" else look]
    options = {"looks": looks, "max_new_tokens": 8, "keep_logits": True}
    expected = engine_of(encoder, "cpu").ask(IMAGE, QUESTION, **options)
    engine = engine_of(encoder, "cuda", speculate=speculate)
    answers = [engine.ask(IMAGE, QUESTION, **options)]
    seconds = engine.warm_up()
    assert len(seconds) > len(BUCKETS) and min(seconds.values()) > 0
    with Steps(engine) as fed:
        answers += [engine.ask(IMAGE, QUESTION, **options) for _ in range(2)]
    assert fed.eager == [] and fed.buckets == [], "everything was replayed"
    for answer in answers:
        assert answer.ids == expected.ids
        assert (answer.logits.cpu() - expected.logits).abs().max() <= 1e-3


@pytest.mark.parametrize("sampling", [Sampling(1.5, seed=5), Sampling(0.8, top_k=20, seed=6), Sampling(1.2, top_p=0.9)])
def test_sampled_tokens_of_the_cpu(sampling):
    """A seed means the same there, without graphs and with them, alone and in a batch."""
    options = {"max_new_tokens": 12, "sampling": sampling}
    expected = engine_of("clip", "cpu").ask(IMAGE, QUESTION, **options).ids
    engine = engine_of("clip", "cuda")
    assert engine.ask(IMAGE, QUESTION, **options).ids == expected
    engine.warm_up()
    assert [engine.ask(IMAGE, QUESTION, **options).ids for _ in range(2)] == 2 * [expected]
    batch = engine.ask_batch([IMAGE] * 3, [QUESTION] * 3, **options)
    assert [answer.ids for answer in batch] == 3 * [expected]


def test_batches_and_abandoned_streams():
    engine = engine_of("dino", "cuda", speculate=True)
    requests = [IMAGE] * 3, [QUESTION, "Why?", "Who?"]
    looks = [["dino"], [REGION], None]
    expected = [answer.ids for answer in engine.ask_batch(*requests, looks=looks, max_new_tokens=6)]
    engine.warm_up()
    for taken in range(6):
        stream = engine.stream(IMAGE, QUESTION, looks=["dino"], max_new_tokens=6)
        for _ in range(taken):
            next(stream)
        stream.close()
    assert [answer.ids for answer in engine.ask_batch(*requests, looks=looks, max_new_tokens=6)] == expected


def test_no_bucket_writes_a_row_of_another_cache():
    """Canaries in every row that is not appended, over all counts of a bucket."""
    engine = engine_of("clip", "cuda")
    engine.warm_up()
    (keys, values), caches = engine.executor.graphs.slab, engine.executor.graphs.caches
    keys.fill_(float("nan")), values.fill_(float("nan"))
    expected = engine_of("clip", "cpu").ask(IMAGE, QUESTION, looks=[REGION], max_new_tokens=6)
    answer = engine.ask(IMAGE, QUESTION, looks=[REGION], max_new_tokens=6)
    assert answer.ids == expected.ids
    used = sum(stage.work.get("tokens", 0) for stage in answer.timings)
    cache = engine.pool.idle[-1]
    written = (~keys.isnan().all(dim=(0, 2, 3))).cpu().nonzero().flatten().tolist()
    if len(written) > used:
        assert answer.finish_reason == "stop" and written.pop() == cache.first + used, "of one step too many"
    assert written == list(range(cache.first, cache.first + used))
    assert len(caches) * cache.capacity == keys.shape[1]


def test_nan_is_told_and_forgotten():
    state = {name: tensor.cuda() for name, tensor in tiny_state().items()}
    broken = tiny_config(), state | {"model.norm.weight": state["model.norm.weight"] * float("nan")}
    engine = Engine(Model.from_state(*broken), Tokenizer.byte_level(320, "clip"))
    engine.warm_up()
    assert engine.ask(IMAGE, QUESTION).finish_reason == "nan"
