"""One valid call of every public callable of both packages; the tests of ambient states and of wrong arguments read it.

`CALLS[name]` makes the callable and fresh keyword arguments; `name` is that of `__all__`, with a method behind a dot.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer as Backend
from torch import Tensor

import vpt_kernels as kernels
import vpt_kernels.live as live
import vpt_model as model
import vpt_model.engine as engines
from tests import conversation_calls as conversations
from tests.conversation_calls import engine, image, png, question, tokenizer
from tests.helpers import CLIP_MEAN, CLIP_STD, normal
from tests.model.checkpoints import fields, write
from tests.model.inputs import tiny_config, tiny_model, tiny_state
from tests.patch import foreign
from vpt_model.checkpoint import load_checkpoint

Made = tuple[Callable[..., Any], dict[str, Any]]


def cpu(values: Any, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype, device="cpu")


def policy() -> kernels.RegionPolicy:
    return kernels.qwen2_vl_policy(max_pixels=56 * 56)


def plan() -> kernels.RegionPlan:
    return kernels.plan_regions([(40, 56)], [(0, 3, 2, 51, 38)], policy())


@lru_cache(maxsize=1)
def embed() -> kernels.FoldedPatchEmbed:
    return kernels.fold_patch_weight(normal(6, 3, 14, 14, key="w", scale=0.04), CLIP_MEAN, CLIP_STD)


def packed(dtype: str = "bfloat16") -> kernels.PackedWeight:
    return kernels.pack_weight(normal(12, 5, key="w"), dtype)


def projector_weights() -> dict[str, Any]:
    def pair(*shape: int) -> tuple[Tensor, Tensor]:
        return normal(*shape, key=("p", shape), scale=0.2), normal(shape[0], key=("b", shape))

    return {"condition_norm": pair(8), "condition": pair(8, 8), "feature_norm": pair(6), "feature": pair(8, 6)}


def projector() -> kernels.ControlProjector:
    return kernels.fold_projector("linear", **projector_weights())


def projection() -> dict[str, Any]:
    given = {"features": normal(5, 6, key="f"), "control": normal(2, 8, key="c"), "projector": projector()}
    return given | {"cu_seqlens": cpu([0, 2, 5], torch.int32)}


def append(layout: str = "NHD") -> dict[str, Any]:
    given = {name: normal(4, heads, 16, key=name) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    given |= {"cos_sin": kernels.rotary_table(32, 16), "positions": cpu([[0, 1, 2, 3]] * 3, torch.int64)}
    given |= {"slots": cpu([3, -1, 0, 5], torch.int64)}
    given |= {name: normal(6, 2, 16, key=name) for name in ("k_cache", "v_cache")}
    return given | {"sections": (2, 3, 3), "interleaved": False, "layout": layout}


def pages(name: str) -> dict[str, Any]:
    given = {name: value for name, value in append().items() if name not in ("slots", "k_cache", "v_cache", "layout")}
    if name == "vllm":
        given |= {"kv_cache": normal(2, 3, 4, 2, 16, key="pages"), "slot_mapping": cpu([3, -1, 0, 5], torch.int64)}
        return given
    return given | {"paged_kv_cache": normal(3, 2, 4, 2, 16, key="pages"), "kv_layout": "NHD"} | tables()


def tables() -> dict[str, Tensor]:
    named = {"append_indptr": [0, 1, 4], "kv_indices": [2, 0, 1], "kv_indptr": [0, 1, 3], "kv_last_page_len": [2, 3]}
    return {name: cpu(values, torch.int32) for name, values in named.items()}


def layer() -> dict[str, Any]:
    from transformers.cache_utils import DynamicLayer

    given = {name: value for name, value in append().items() if name in ("q", "k", "v")}
    given = {name: value[None] for name, value in given.items()}
    return given | {name: append()[name] for name in ("cos_sin", "positions", "sections")} | {"layer": DynamicLayer()}


def cache() -> Any:
    from transformers import DynamicCache

    held, given = DynamicCache(), layer()
    held.layers.append(given["layer"])
    kernels.append_to_layer_(**given)
    return held


@lru_cache(maxsize=1)
def qwen() -> torch.nn.Module:
    return foreign.qwen("qwen2_vl")


def processor() -> kernels.QwenVLImageProcessor:
    return kernels.QwenVLImageProcessor.of(qwen())


@lru_cache(maxsize=1)
def folder() -> Path:
    made = write(Path(tempfile.mkdtemp()), tiny_state(), fields())
    (made / "tokenizer.json").write_text(tokenizer().to_json(), encoding="utf-8")
    return made


def batch() -> dict[str, Any]:
    one = question()
    return one | {"images": [one.pop("image"), None], "questions": [one.pop("question")] * 2, "looks": [["clip"], None]}


def limits() -> dict[str, Any]:
    return {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 16}


CALLS: dict[str, Callable[[], Made]] = {
    "QwenVLImageProcessor": lambda: (
        kernels.QwenVLImageProcessor,
        {"weight": normal(6, 3, 2, 14, 14, key="w", scale=0.04), "bias": normal(6, key="b"), "mean": CLIP_MEAN}
        | {"std": CLIP_STD, "merge_size": 2, "pass_order": "hv"}
        | limits(),
    ),
    "QwenVLImageProcessor.of": lambda: (
        kernels.QwenVLImageProcessor.of,
        {"model": qwen(), "image_processor": None, "pass_order": "hv"},
    ),
    "QwenVLImageProcessor.__call__": lambda: (processor(), {"images": [image()], "boxes": [(0, 1, 2, 50, 40)]}),
    "QwenVLImageProcessor.patches": lambda: (processor().patches, {"images": png(), "boxes": [(0, 1, 2, 50, 40)]}),
    "RegionPolicy": lambda: (
        kernels.RegionPolicy,
        {"fit": policy().fit, "patch_size": 14, "merge_size": 2, "resample": "bicubic", "pass_order": "hv"}
        | {"regularize_edge": 512, "window": (28, 28), "anchor": "top_left"},
    ),
    "append_to_flashinfer_pages_": lambda: (kernels.append_to_flashinfer_pages_, pages("flashinfer")),
    "append_to_layer_": lambda: (kernels.append_to_layer_, layer()),
    "append_to_vllm_pages_": lambda: (kernels.append_to_vllm_pages_, pages("vllm")),
    "append_visual_kv": lambda: (kernels.append_visual_kv, append()),
    "append_visual_kv_": lambda: (kernels.append_visual_kv_, append()),
    "cache_spare_bytes": lambda: (kernels.cache_spare_bytes, {"cache": cache()}),
    "compact_cache_": lambda: (kernels.compact_cache_, {"cache": cache()}),
    "clip_boxes": lambda: (kernels.clip_boxes, {"boxes": [(0, -1, 0.5, 900, 700)], "sizes": [(40, 56)], "scale": 1000}),
    "control_cross_attention": lambda: (kernels.control_cross_attention, projection()),
    "control_cross_attention_into": lambda: (
        kernels.control_cross_attention_into,
        projection() | {"out": normal(7, 8, key="out"), "rows": cpu([6, 0, -1, 2, 3], torch.int64)},
    ),
    "decode_image": lambda: (
        kernels.decode_image,
        {"image": png(), "max_pixels": 10_000, "orient_files": True, "notices": None},
    ),
    "dinov2_policy": lambda: (
        kernels.dinov2_policy,
        {"shortest_edge": 256, "crop": 224, "longest_edge": 512, "pass_order": "hv"},
    ),
    "explain": lambda: (kernels.explain, {"operator": "roi_patches", "backend": "auto"}),
    "flashinfer_slots": lambda: (kernels.flashinfer_slots, tables() | {"page_size": 4, "tokens": 4}),
    "fold_patch_weight": lambda: (
        kernels.fold_patch_weight,
        {"weight": normal(6, 3, 2, 14, 14, key="w", scale=0.04), "mean": CLIP_MEAN, "std": CLIP_STD}
        | {"bias": normal(6, key="b"), "dtype": torch.bfloat16},
    ),
    "fold_projector": lambda: (kernels.fold_projector, {"form": "linear", "score": True} | projector_weights()),
    "PackedWeight.dequantize": lambda: (packed("int8").dequantize, {"dtype": torch.float32}),
    "PackedWeight.rows": lambda: (packed().rows, {"ids": cpu([[0, 3]], torch.int64), "dtype": torch.float32}),
    "PackedWeight.to": lambda: (packed("int8").to, {"device": "cpu"}),
    "pack_weight": lambda: (
        kernels.pack_weight,
        {"weight": [normal(6, 5, key="w"), normal(6, 5, key="v")], "dtype": "int8", "gated": True, "group_size": 32},
    ),
    "cached_attention": lambda: (
        kernels.cached_attention,
        {"q": normal(2, 4, 8, key="q"), "keys": normal(5, 2, 8, key="k"), "values": normal(5, 2, 8, key="v")}
        | {"causal": False},
    ),
    "packed_linear": lambda: (
        kernels.packed_linear,
        {"x": normal(2, 5, key="x"), "weight": packed(), "bias": normal(12, key="b"), "activation": "silu"}
        | {"residual": normal(2, 12, key="r"), "out": normal(2, 12, key="o")},
    ),
    "patch": lambda: (_patched, {"model": qwen(), "ops": ["roi_patch_embed"], "strict": True}),
    "plan_regions": lambda: (
        kernels.plan_regions,
        {"sizes": [(40, 56)], "boxes": [(0, 3, 2, 51, 38)], "policy": policy()},
    ),
    "qwen2_vl_policy": lambda: (
        kernels.qwen2_vl_policy,
        {"longest_edge": 512, "patch_size": 14, "merge_size": 2, "pass_order": "hv"} | limits(),
    ),
    "roi_patch_embed": lambda: (kernels.roi_patch_embed, {"images": [image()], "plan": plan(), "embed": embed()}),
    "roi_patch_embed_into": lambda: (
        kernels.roi_patch_embed_into,
        {"images": [image()], "plan": plan(), "embed": embed(), "out": normal(40, 6, key="out"), "row": 2},
    ),
    "roi_patches": lambda: (kernels.roi_patches, {"images": [image()], "plan": plan()}),
    "rotary_table": lambda: (
        kernels.rotary_table,
        {"max_positions": 9, "rotary_dim": 16, "theta": 1e4, "device": "cpu"},
    ),
    "sam_policy": lambda: (kernels.sam_policy, {"edge": 1024, "longest_edge": 512, "pass_order": "hv"}),
    "Engine": lambda: (
        model.Engine,
        {"model": tiny_model(), "tokenizer": tokenizer(), "max_looks": 1, "capacity": 600, "longest_edge": 200}
        | {"prompt": model.PromptFormat(), "keep_prefix": False, "speculate": False},
    ),
    "Engine.ask": lambda: (engine().ask, question()),
    "Engine.ask_batch": lambda: (engine().ask_batch, batch()),
    "Engine.stream": lambda: (conversations.streamed, question()),
    "Engine.chat": lambda: (conversations.chatted, {"image": image(), "capacity": 600, "keep_pixels": True}),
    "Engine.load_chat": lambda: (conversations.resumed, {"file": conversations.saved_chat()}),
    "Engine.ask_chats": lambda: (
        engine().ask_chats,
        {"chats": [engine().chat(image())], "questions": ["what?"], "samplings": [model.Sampling()]},
    ),
    "Chat.ask": lambda: (engine().chat().ask, question()),
    "Chat.stream": lambda: (conversations.streamed_turn, question()),
    "Chat.fork": lambda: (conversations.forked, {"n": 2}),
    "Chat.rewind": lambda: (conversations.rewound, {"turn": -1}),
    "Chat.save": lambda: (conversations.saved, {"file": Path(tempfile.mkdtemp()) / "chat.safetensors"}),
    "LiveConversation": lambda: (
        conversations.opened,
        conversations.parts() | {"cache": "static", "capacity": 400, "kernels": True},
    ),
    "LiveConversation.append": lambda: (conversations.appended, {"text": "what?", "image": image()}),
    "LiveConversation.crop": lambda: (
        conversations.live(png()).crop,
        {"box": (100, 200.5, 600, 800), "image": -1, "coordinates": "thousandths"},
    ),
    "LiveConversation.cut": lambda: (
        conversations.live(png()).cut,
        {"box": (3, 2, 51, 99), "image": 0, "coordinates": "pixels", "clip": True},
    ),
    "LiveConversation.add": lambda: (
        conversations.added,
        {"messages": [{"role": "user", "content": "and now?"}], "resync": True},
    ),
    "LiveConversation.generate": lambda: (conversations.generated, {}),
    "zoom": lambda: (
        conversations.zoomed,
        conversations.parts()
        | {"image": image(), "question": "what?", "coordinates": "pixels", "max_looks": 2, "role": "user"}
        | {"parser": live.parse_zoom_calls, "system": "s", "template": {}, "cache": "static", "capacity": 400},
    ),
    "parse_zoom_calls": lambda: (
        live.parse_zoom_calls,
        {"text": '<tool_call>{"arguments": {"bbox_2d": [1, 2, 3, 4]}}</tool_call>'},
    ),
    "Model.from_state": lambda: (model.Model.from_state, {"config": tiny_config(), "state": tiny_state()}),
    "ModelConfig": lambda: (model.ModelConfig, {name: getattr(tiny_config(), name) for name in vars(tiny_config())}),
    "PromptFormat": lambda: (
        model.PromptFormat,
        {"system": "s", "image_separator": "\n", "trigger_separator": "\n", "trigger": "look"},
    ),
    "PromptFormat.user_text": lambda: (model.PromptFormat().user_text, {"question": "what?", "image": True}),
    "Sampling": lambda: (model.Sampling, {"temperature": 0.5, "top_k": 4, "top_p": 0.5, "seed": 2}),
    "TokenIds.from_tokenizer": lambda: (
        model.TokenIds.from_tokenizer,
        {"tokenizer": Backend.from_str(tokenizer().to_json()), "kind": "clip"},
    ),
    "TokenIds.region_span": lambda: (tokenizer().ids.region_span, {"x_min": 2, "y_min": 1, "x_max": 5, "y_max": 4}),
    "Tokenizer": lambda: (model.Tokenizer, {"backend": Backend.from_str(tokenizer().to_json()), "kind": "clip"}),
    "Tokenizer.from_folder": lambda: (model.Tokenizer.from_folder, {"folder": folder(), "kind": "clip"}),
    "Tokenizer.byte_level": lambda: (
        model.Tokenizer.byte_level,
        {"vocab_size": 320, "kind": "clip", "words": ["You", " are"]},
    ),
    "Tokenizer.check_vocabulary": lambda: (
        tokenizer().check_vocabulary,
        {"rows": 320, "declared": {"image_token_id": tokenizer().ids.image_pad}},
    ),
    "Tokenizer.encode": lambda: (tokenizer().encode, {"text": "what? <|x_2|>"}),
    "Tokenizer.decode": lambda: (tokenizer().decode, {"tokens": [104, 105, 278]}),
    "load_checkpoint": lambda: (load_checkpoint, {"folder": folder(), "dtype": torch.bfloat16}),
}
"""Every public callable but `EXEMPT`."""

EXEMPT = {
    "BackendUnavailable": "an exception",
    **dict.fromkeys(
        (
            *("Answer", "Box", "ClippedBoxes", "Done", "Event", "Look", "PatchReport", "Reencode", "Region", "Stage"),
            *("Token", "Zoom", "ZoomAnswer"),
        ),
        "a result that others only read",
    ),
    **dict.fromkeys(
        ("Chat", "ControlProjector", "FoldedPatchEmbed", "PackedWeight", "RegionPlan", "TokenIds", "Model"),
        "made by a function of this table; what is put together by hand is checked where it is used",
    ),
    **dict.fromkeys(
        (
            *("Chat.close", "ControlProjector.tensors", "Engine.warm_up", "LiveConversation.close"),
            *("PatchReport.unpatch", "Tokenizer.to_json"),
        ),
        "takes no argument",
    ),
    **dict.fromkeys(
        ("Chat.row", "Engine.events", "Engine.picture", "Engine.question", "Engine.use"),
        "a step of `Engine.ask`, for those who extend the engine",
    ),
}


def made(name: str) -> Made:
    """`CALLS[name]()`, with the backend named where there is a choice."""
    function, given = CALLS[name]()
    choice = {"backend": "auto"} if "backend" in inspect.signature(function).parameters else {}
    return function, choice | given


def _patched(**given: Any) -> list[str]:
    with kernels.patch(**given) as report:
        return [replacement.name for replacement in report.replaced]


def public_callables() -> Iterator[str]:
    """Names in `__all__` of both packages and of their live conversations that can be called, and the public methods of
    their classes.
    """
    for package in (kernels, live, model, engines):
        for name in package.__all__:
            thing = getattr(package, name)
            if not callable(thing):
                continue
            yield name
            if isinstance(thing, type):
                owners = [owner for owner in thing.__mro__ if owner.__module__.startswith("vpt_")]
                for method, value in {k: v for owner in reversed(owners) for k, v in vars(owner).items()}.items():
                    function = callable(value) or isinstance(value, (classmethod, staticmethod))
                    if function and not method.startswith("_"):
                        yield f"{name}.{method}"


def values(thing: Any) -> Iterator[Any]:
    """Everything comparable in a result, tensors first resolved out of what holds them."""
    if isinstance(thing, (Tensor, str, bytes, int, float, type(None), Path, torch.dtype, torch.device)):
        yield thing
    elif isinstance(thing, np.ndarray):
        yield torch.from_numpy(thing)
    elif isinstance(thing, dict):
        for key in thing:
            yield from (key, *values(thing[key]))
    elif isinstance(thing, (list, tuple, frozenset)):
        for item in thing:
            yield from values(item)
    elif isinstance(thing, model.Stage):
        yield thing.name  # its time is the clock's
    elif hasattr(thing, "__dict__") and type(thing).__module__.startswith("vpt_"):
        for name, item in vars(thing).items():
            yield from (name, *values(item))
