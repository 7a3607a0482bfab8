"""Attention by device-side lengths against SDPA on views, and our calls of flash-attn against its signatures."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers import normal
from tests.model.inputs import random_image, tiny_model
from vpt_model.engine import Engine
from vpt_model.network import attention
from vpt_model.network.cache import KVCache
from vpt_model.network.tower_graphs import PatchStep
from vpt_model.text.tokens import Tokenizer

NAN = float("nan")

SIGNATURES = {
    "flash_attn_with_kvcache": (
        "q k_cache v_cache k=None v=None rotary_cos=None rotary_sin=None cache_seqlens=None cache_batch_idx=None "
        "cache_leftpad=None block_table=None softmax_scale=None causal=False window_size=(-1,-1) softcap=0.0 "
        "rotary_interleaved=True alibi_slopes=None num_splits=0 return_softmax_lse=False"
    ),
    "flash_attn_varlen_func": (
        "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p=0.0 softmax_scale=None causal=False "
        "window_size=(-1,-1) softcap=0.0 alibi_slopes=None deterministic=False return_attn_probs=False block_table=None"
    ),
}
"""Of flash-attn v2.8.3.post1, flash_attn/flash_attn_interface.py, read from its syntax tree."""


def bind(name: str, arguments: tuple, options: dict) -> SimpleNamespace:
    """The arguments by name, as the function of this name takes them; TypeError where it would not."""
    parameters = []
    for part in SIGNATURES[name].split():
        parameter, _, default = part.partition("=")
        empty = inspect.Parameter.empty
        parameters.append(
            inspect.Parameter(
                parameter, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=eval(default) if default else empty
            )
        )
    bound = inspect.Signature(parameters).bind(*arguments, **options)
    bound.apply_defaults()
    return SimpleNamespace(**bound.arguments)


class Peer:
    """flash-attn as its documentation says, for the arguments that we give."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def flash_attn_with_kvcache(self, *arguments, **options) -> Tensor:
        a = bind("flash_attn_with_kvcache", arguments, options)
        self.calls.append("with cache")
        assert a.causal and a.k is a.v is None and a.q.stride(-1) == a.k_cache.stride(-1) == a.v_cache.stride(-1) == 1
        batch, tokens, heads, _ = a.q.shape
        lengths, rows = a.cache_seqlens, a.cache_batch_idx
        if isinstance(lengths, int):
            lengths = torch.full((batch,), lengths, dtype=torch.int32)
        rows = torch.arange(batch, dtype=torch.int32) if rows is None else rows
        assert lengths.dtype == rows.dtype == torch.int32 and lengths.shape == rows.shape == (batch,)
        out = []
        for i, (length, row) in enumerate(zip(lengths.tolist(), rows.tolist())):
            assert length <= a.k_cache.shape[1] and row < len(a.k_cache)
            k, v = (x[row, :length].repeat_interleave(heads // x.shape[2], 1) for x in (a.k_cache, a.v_cache))
            mask = torch.ones(tokens, length, dtype=torch.bool).tril(length - tokens)
            # "If the row of the mask is all zero, the output will be zero."
            out.append(torch.where(mask.any(1)[:, None, None], sdpa(a.q[i], k, v, mask), 0))
        return torch.stack(out)

    def flash_attn_varlen_func(self, *arguments, **options) -> Tensor:
        a = bind("flash_attn_varlen_func", arguments, options)
        self.calls.append("varlen")
        assert not a.causal and a.cu_seqlens_q.dtype == a.cu_seqlens_k.dtype == torch.int32
        ends = a.cu_seqlens_q.tolist()
        assert ends == a.cu_seqlens_k.tolist() and a.max_seqlen_q == a.max_seqlen_k
        sizes = [end - begin for begin, end in zip(ends, ends[1:])]
        assert max(sizes) == a.max_seqlen_q and sum(sizes) == len(a.q)
        return torch.cat([sdpa(*parts) for parts in zip(*(x.split(sizes) for x in (a.q, a.k, a.v)))])


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1)


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Peer:
    peer = Peer()
    monkeypatch.setattr(attention, "use_flash", lambda x: True)
    monkeypatch.setattr(attention, "takes_ragged", lambda x, head_dim: True)
    monkeypatch.setattr(attention, "_flash_attn", lambda: peer)
    return peer


@pytest.mark.parametrize("looks", [["clip"], ["region:x2,y1,x5,y4+x0,y0,x0,y0"], None])
def test_the_engine_on_flash_attn(request, looks):
    image, tokenizer = random_image(150, 230, seed=3), Tokenizer.byte_level(320, "clip")
    options = {"looks": looks, "max_new_tokens": 6, "keep_logits": True}
    expected = Engine(tiny_model(), tokenizer).ask(image, "What?", **options)
    peer = request.getfixturevalue("peer")
    answer = Engine(tiny_model(), tokenizer).ask(image, "What?", **options)
    assert answer.ids == expected.ids and (answer.logits - expected.logits).abs().max() <= 1e-4
    assert set(peer.calls) == {"with cache", "varlen"}


def test_flash_attn_is_not_used_for_what_it_cannot_take():
    assert not attention.use_flash(torch.zeros(1, dtype=torch.bfloat16)), "a tensor of the CPU"
    assert not attention.takes_ragged(torch.zeros(1, dtype=torch.bfloat16), 80), "a tensor of the CPU"


@pytest.mark.parametrize("padded", [False, True])
@torch.inference_mode()
def test_images_of_ragged_lengths_take_torchs_own_kernel(monkeypatch, padded):
    """Where flash-attn is not installed; here a stand-in that attends sequence by sequence."""
    expected, calls = None, []

    def varlen_attn(q, k, v, ends, key_ends, longest, longest_key):
        assert ends.dtype == torch.int32 and ends is key_ends and longest == longest_key
        sizes = ends.diff().tolist()
        assert sum(sizes) == len(q) and max(sizes) <= longest
        calls.append([size for size in sizes if size])
        return torch.cat([sdpa(*parts) for parts in zip(*(x.split(sizes) for x in (q, k, v)))])

    tower, grids = tiny_model().vision, [(4, 4), (2, 6)] if padded else [(4, 6), (2, 4), (8, 8)]
    count = sum(height * width for height, width in grids)
    patches = normal(count, tower.config.embed_dim, key="patches")
    expected = tower.forward(patches, grids)
    monkeypatch.setattr(attention, "takes_ragged", lambda x, head_dim: True)
    monkeypatch.setattr(attention, "_flash_attn", lambda: None)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    found = PatchStep(tower, 64)(patches, grids) if padded else tower.forward(patches, grids)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert calls == [[16, 12, 36] if padded else [24, 8, 64]] * len(tower.blocks)


def caches(count: int, capacity: int) -> tuple[Tensor, Tensor]:
    """Keys and values [count · capacity, 2, 32], NaN where nothing was stored."""
    return torch.full((count * capacity, 2, 32), NAN), torch.full((count * capacity, 2, 32), NAN)


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("bucket", [7, 8, 12])
def test_padded_queries_equal_views_of_the_cache(request, bucket, flash):
    """Rows of several lengths in one padded call; NaN behind every row's last key, and in the rows of padding."""
    generator, capacity = torch.Generator().manual_seed(5), 40
    keys, values = caches(4, capacity)
    starts, past, counts = ([2, 0, 3], [20, 0, 28], [7, 3, 1])
    q = torch.full((3, bucket, 4, 32), NAN)
    expected = []
    for row, (start, before, count) in enumerate(zip(starts, past, counts)):
        begin = start * capacity
        for cache in (keys, values):
            cache[begin : begin + before + count] = torch.randn(before + count, 2, 32, generator=generator)
        q[row, bucket - count :] = torch.randn(count, 4, 32, generator=generator)
        stored = [x[begin : begin + before + count] for x in (keys, values)]
        mask = attention.causal_mask(count, before, q.dtype, q.device)
        expected.append(attention._sdpa(q[row, bucket - count :], *stored, mask))
    if flash:
        request.getfixturevalue("peer")
    lengths = [torch.tensor(x, dtype=torch.int32) for x in ([start * capacity for start in starts], past, counts)]
    out = attention.attend(q, keys, values, *lengths, capacity)
    for row, count in enumerate(counts):
        torch.testing.assert_close(out[row, bucket - count :], expected[row], rtol=1e-5, atol=1e-6)
        assert flash or not out[row, : bucket - count].any()


def test_nothing_is_written_unless_every_cache_has_room():
    config = tiny_model().config
    roomy, full = KVCache(config, 9), KVCache(config, 2)
    rotary = tiny_model().language.rotary
    with pytest.raises(ValueError, match="capacity is 2"):
        attention.Ragged([roomy, full], [3, 3], torch.zeros(3, 6, dtype=torch.int64), rotary, torch.float32)
    assert not roomy.keys.any() and not full.keys.any()


def test_without_a_gpu_nothing_of_triton_is_imported():
    """The model runs where Triton does not exist."""
    import subprocess
    import sys

    code = "import sys, vpt_model.network.attention; sys.exit('vpt_model.network.attention_triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
