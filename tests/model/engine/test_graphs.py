"""Buckets and padding, on the CPU: a padded step equals the unpadded one and touches nothing but its own rows."""

from __future__ import annotations

from collections.abc import Sequence
from unittest import mock

import pytest
import torch

from tests.model.engine.scripts import Steps
from tests.model.inputs import appended, random_image, tiny_model, tiny_state
from tests.model.watch import Reads
from vpt_model.config import ENCODERS, PRESETS
from vpt_model.engine import Engine
from vpt_model.engine.conversation import Conversation
from vpt_model.engine.events import Clock
from vpt_model.engine.executor import Eager
from vpt_model.engine.graphs import BUCKETS, Bucket, Graphs, Step, StepMetadata, smallest
from vpt_model.engine.requests import Append
from vpt_model.engine.sampling import greedy
from vpt_model.network import attention
from vpt_model.network.cache import KVCache
from vpt_model.network.language import LanguageModel
from vpt_model.network.state import State
from vpt_model.text.tokens import Tokenizer

IMAGE = random_image(150, 230, seed=3)
QUESTION = "What is written on the sign?"
REGION = "region:x2,y1,x5,y4"
CAPACITY = 64
NAN = float("nan")
SMALL = (
    Bucket(1, 1, False),
    Bucket(1, 1, True),
    Bucket(4, 1, True),
    Bucket(4, 1, True, draw=True),
    Bucket(1, 16, True),
    Bucket(1, 320, True),
)


def conversation(cache: KVCache) -> Conversation:
    return Conversation(cache, Clock(torch.device("cpu")), lambda cache: None)


def words(count: int, seed: int) -> list[int]:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def chunk(cache: KVCache, count: int, seed: int, own: bool = True, sample: bool = True) -> Append:
    """`count` tokens at positions that are no slots; `own`: with their own embeddings, else with random ones."""
    tokens, start = words(count, seed), cache.next_position + 3
    embeds = None if own else torch.randn(count, 128, generator=torch.Generator().manual_seed(seed))
    return append(cache, tokens, embeds, torch.arange(start, start + count).expand(3, -1), sample)


def append(
    cache: KVCache, tokens: list[int], embeds: torch.Tensor | None, positions: torch.Tensor, logits: bool = True
) -> Append:
    where = {"positions": positions, "next_position": int(positions.max()) + 1}
    return Append(conversation=conversation(cache), tokens=tokens, embeds=embeds, logits=logits, **where)


def feed(cache: KVCache, given: Append) -> torch.Tensor:
    """The hidden state of the last token, without a bucket."""
    language = tiny_model().language
    embeds = language.embed(torch.tensor(given.tokens)) if given.embeds is None else given.embeds
    return appended(language, embeds, given.positions, [cache], [len(given.tokens)])[-1:]


def same_past(count: int, cache: KVCache, other: KVCache) -> None:
    for one in (cache, other):
        if count:
            feed(one, chunk(one, count, 7))


class TestSmallest:
    @pytest.mark.parametrize("sample", [True, False])
    def test_it_is_the_smallest_that_fits(self, sample):
        for rows in range(1, 10):
            for tokens in range(1, 520):
                found = smallest(BUCKETS, rows, tokens, sample)
                fitting = [b for b in BUCKETS if b.rows >= rows and b.tokens >= tokens and b.sample is sample]
                assert (found is None) == (not fitting)
                assert found is None or found in fitting
                assert all(found.rows * found.tokens <= b.rows * b.tokens for b in fitting)

    def test_padding_is_less_than_sixty_four_tokens(self):
        assert all(smallest(BUCKETS, 1, tokens, True).tokens - tokens < 64 for tokens in range(1, 513))


def test_the_integers_of_a_step():
    caches = KVCache.side_by_side(3, PRESETS["tiny"], 10, torch.float32, "cpu")
    caches[2].advance(4, 9)
    metadata = StepMetadata(Bucket(2, 3, True), "cpu")
    metadata.block.fill_(77)
    first = append(caches[2], [5, 6], None, torch.tensor([[9, 9], [10, 9], [11, 10]]))
    second = append(caches[0], [8], torch.zeros(1, 128), torch.tensor([[1], [2], [3]]))
    assert metadata.fill([first, second]) == [slice(1, 3), slice(5, 6)]
    assert metadata.tokens.tolist() == [-1, 5, 6, -1, -1, -1]
    assert metadata.slots.tolist() == [-1, 24, 25, -1, -1, 0]
    assert metadata.positions.tolist() == [[0, 9, 9, 0, 0, 1], [0, 10, 9, 0, 0, 2], [0, 11, 10, 0, 0, 3]]
    assert [x.tolist() for x in (metadata.starts, metadata.past, metadata.counts)] == [[20, 0], [4, 0], [2, 1]]
    metadata.fill([second])
    assert metadata.slots.tolist() == [-1, -1, 0, -1, -1, -1] and metadata.counts.tolist() == [1, 0]


class TestStep:
    def step(self, bucket: Bucket, rows: int = 3) -> tuple[Step, list[KVCache]]:
        """A step over caches that hold NaN; what is given as padding is NaN, too."""
        language = tiny_model().language
        caches = KVCache.side_by_side(rows, language.config, CAPACITY, torch.float32, "cpu")
        for buffer in caches[0].slab:
            buffer.fill_(NAN)
        step = Step(bucket, language, caches[0].slab, CAPACITY)
        step.given.fill_(NAN)
        return step, caches

    @pytest.mark.parametrize("own", [True, False], ids=["token ids", "embeddings"])
    @pytest.mark.parametrize("past", [0, 21, CAPACITY - 16])
    @torch.inference_mode()
    def test_every_count_in_a_bucket_equals_the_unpadded_run(self, past, own):
        language = tiny_model().language
        for count in range(1, 17):
            step, (_, cache, _) = self.step(Bucket(1, 16, True))
            other = language.new_cache(CAPACITY)
            same_past(past, cache, other)
            before = [buffer.clone() for buffer in cache.slab]
            new = chunk(cache, count, count, own)
            hidden, logits, argmax_token = step([new])
            expected = feed(other, new)
            torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(logits, language.logits(expected), rtol=1e-5, atol=1e-5)
            assert torch.equal(argmax_token, greedy(logits))
            begin = CAPACITY + past
            for buffer, old, own_buffer in zip(cache.slab, before, (other.keys, other.values)):
                written = buffer[:, begin : begin + count]
                torch.testing.assert_close(written, own_buffer[:, past : past + count], rtol=1e-5, atol=1e-5)
                old[:, begin : begin + count] = written
                assert torch.equal(buffer.view(torch.int32), old.view(torch.int32)), "another row was written"

    @torch.inference_mode()
    def test_rows_of_a_decode_bucket(self):
        """Three conversations of different lengths in a bucket of four."""
        step, caches = self.step(Bucket(4, 1, True), rows=5)
        chosen, expected = [caches[3], caches[0], caches[4]], []
        chunks = []
        for row, cache in enumerate(chosen):
            other = tiny_model().language.new_cache(CAPACITY)
            same_past(row * 9, cache, other)
            chunks.append(chunk(cache, 1, row, own=row != 1))
            expected.append(feed(other, chunks[-1]))
        hidden, logits, argmax_token = step(chunks)
        torch.testing.assert_close(hidden[:3], torch.cat(expected), rtol=1e-5, atol=1e-5)
        assert argmax_token[:3].tolist() == tiny_model().language.logits(torch.cat(expected)).argmax(1).tolist()

    @torch.inference_mode()
    def test_a_step_leaves_nothing_to_the_next(self):
        """The same short chunk after a long one, whose rows are padding now."""
        step, (cache, other, _) = self.step(Bucket(1, 16, True))
        short = chunk(other, 2, 5)
        (expected, *_) = [x.clone() for x in step([short])]
        other.truncate(0, 0)
        step([chunk(cache, 16, 1, own=False)])
        assert torch.equal(step([short])[0], expected)

    @torch.inference_mode()
    def test_logits_only_where_they_are_wanted(self):
        step, (cache, *_) = self.step(Bucket(1, 1, False))
        with mock.patch.object(step.language, "logits", side_effect=AssertionError):
            assert len(step([chunk(cache, 1, 1, sample=False)])) == 1

    @pytest.mark.parametrize("bucket", SMALL)
    @torch.inference_mode()
    def test_nothing_in_it_waits_for_the_device(self, bucket):
        step, _ = self.step(bucket, rows=4)
        step.upload(())
        with Reads() as reads:
            step.run()
        assert reads.names == []


@pytest.mark.parametrize("bucket", SMALL)
def test_a_step_needs_no_values(bucket, monkeypatch):
    """With tensors that have none: whatever waits for one raises."""
    config = tiny_model().config
    monkeypatch.setattr(attention, "attend", lambda *arguments: attention._composed(*arguments[:-1]))
    with torch.inference_mode():
        state = {name: torch.empty(x.shape, device="meta") for name, x in tiny_state().items()}
        language = LanguageModel(config, State(state, None))
        slab = KVCache.side_by_side(4, config, CAPACITY, torch.float32, "meta")[0].slab
        step = Step.__new__(Step)
        step.bucket, step.language, step.slab, step.capacity = bucket, language, slab, CAPACITY
        step.device, step.tickets = StepMetadata(bucket, "meta"), torch.zeros(1, device="meta")
        step.given = torch.empty(bucket.rows * bucket.tokens, config.hidden_size, device="meta")
        outputs = step.run()
    assert {output.device.type for output in outputs} == {"meta"}


def on_steps(engine: Engine, rows: int = 4, buckets: Sequence[Bucket] = SMALL) -> Graphs:
    """Make the engine use its graphs' steps, which are eager here."""
    engine.use(engine.model, Graphs(engine.model, engine.capacity, rows, buckets))
    return engine.executor.graphs


@pytest.mark.parametrize("encoder", ENCODERS)
class TestEngine:
    def engine(self, encoder: str, **options) -> Engine:
        kind = ENCODERS[encoder]
        return Engine(tiny_model(kind), Tokenizer.byte_level(320, kind), capacity=512, **options)

    @pytest.mark.parametrize("look", [REGION, "re-encode", None])
    def test_steps_choose_the_same_tokens(self, encoder, look):
        looks = look and [encoder if look == "re-encode" else look]
        options = {"looks": looks, "max_new_tokens": 6, "keep_logits": True}
        expected = self.engine(encoder).ask(IMAGE, QUESTION, **options)
        engine = self.engine(encoder)
        on_steps(engine)
        with Steps(engine) as fed:
            answer = engine.ask(IMAGE, QUESTION, **options)
        assert answer.ids == expected.ids and (answer.logits - expected.logits).abs().max() <= 1e-4
        assert fed.eager == [] and {bucket.tokens for bucket in fed.buckets} == {1, 320}
        assert (Bucket(1, 1, False) in fed.buckets) == (look == "re-encode")

    def test_what_fits_no_bucket_runs_without(self, encoder):
        options = {"looks": [REGION], "max_new_tokens": 12}
        expected = self.engine(encoder).ask(IMAGE, QUESTION, **options)
        engine = self.engine(encoder)
        on_steps(engine, buckets=[Bucket(1, 1, True)])
        with Steps(engine) as fed:
            assert engine.ask(IMAGE, QUESTION, **options).ids == expected.ids
        assert len(fed.eager) == 2 and min(map(sum, fed.eager)) > 1 and len(fed.buckets) > 6
        engine.pool.idle = [engine.model.language.new_cache(engine.capacity)]
        with Steps(engine) as fed:
            assert engine.ask(IMAGE, QUESTION, **options).ids == expected.ids
        assert fed.buckets == [], "a cache that does not lie beside the others"

    def test_batches(self, encoder):
        looks, images = [[REGION], None, [encoder], None, [REGION]], [IMAGE, IMAGE, IMAGE, None, IMAGE]
        for rows in (4, 5):
            requests = images[:rows], [QUESTION, "Why?", QUESTION, "How?", "Who?"][:rows]
            options = {"looks": looks[:rows], "max_new_tokens": 6}
            expected = self.engine(encoder).ask_batch(*requests, **options)
            engine = self.engine(encoder)
            on_steps(engine)
            with Steps(engine) as fed:
                answers = engine.ask_batch(*requests, **options)
            assert [answer.ids for answer in answers] == [answer.ids for answer in expected]
            assert Bucket(4, 1, True) in fed.buckets and fed.buckets.count(Bucket(1, 320, True)) >= 4
            assert all(len(lengths) == 1 for lengths in fed.eager), "only the fifth row, whose cache lies elsewhere"
            assert bool(fed.eager) == (rows == 5)

    def test_full_caches_and_abandoned_streams(self, encoder):
        engine = self.engine(encoder)
        expected = engine.ask(IMAGE, QUESTION, looks=[encoder], max_new_tokens=4).ids
        graphs = on_steps(engine, rows=2)
        for taken in range(6):
            stream = engine.stream(IMAGE, QUESTION, looks=[encoder], max_new_tokens=4)
            for _ in range(taken):
                next(stream)
            stream.close()
        assert engine.ask(IMAGE, QUESTION, looks=[encoder], max_new_tokens=4).ids == expected
        cache = graphs.caches[0]  # behind its last slot begins another conversation's
        cache.advance(cache.capacity - 1, 5)
        engine.executor.run([chunk(cache, 1, 1)])
        assert cache.length == cache.capacity
        before = graphs.slab[0].clone()
        for requests in ([chunk(cache, 1, 1)], [chunk(graphs.caches[1], 1, 1), chunk(cache, 1, 1)]):
            with pytest.raises(ValueError, match="capacity is 512"):
                engine.executor.run(requests)
        assert torch.equal(graphs.slab[0], before)


def test_warming_up_a_cpu_is_nothing():
    engine = Engine(tiny_model(), Tokenizer.byte_level(320, "clip"))
    assert engine.warm_up() == {} and type(engine.executor) is Eager
