"""The published procedure against the authors' recorded numbers, and the honesty of its work and cost."""

from __future__ import annotations

import ast
import copy
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from bench.transformers_model import transformers_model
from tests.model.inputs import (
    golden,
    golden_again,
    golden_config,
    golden_state,
    golden_token_ids,
    random_image,
    tiny_config,
    tiny_state,
)
from vpt_model.config import ENCODERS
from vpt_model.published import encoders as reference_encoders
from vpt_model.published import procedure as reference
from vpt_model.published.encoders import first_resize, process_dino, process_images, process_sam, smart_resize
from vpt_model.published.procedure import PublishedProcedure, region_box, rope_index
from vpt_model.text.tokens import Tokenizer

TOLERANCE = 1e-4


def published(name: str = "clip", state: dict[str, torch.Tensor] | None = None) -> PublishedProcedure:
    weights = "clip" if name == "region" else name
    return PublishedProcedure(golden_config(name), state or golden_state(weights), golden_token_ids(name))


def grids(grid_thw: torch.Tensor) -> list[tuple[int, int]]:
    return [(h, w) for _, h, w in grid_thw.tolist()]


def request(name: str, row: int = 0) -> tuple[list[int], tuple]:
    """Prompt ids and the image arguments of `fwd`, or of the second row of `gen_b2`, without its padding."""
    tensors, _ = golden(name)
    if row:
        ids = tensors["gen_b2.input_ids"][1][tensors["gen_b2.attention_mask"][1].bool()].tolist()
        first = len(tensors["fwd.image_grid_thw"])
        images = (tensors["gen_b2.pixel_values_row1"], grids(tensors["gen_b2.image_grid_thw"])[first:])
    else:
        ids = tensors["fwd.input_ids"][0].tolist()
        images = (tensors["fwd.pixel_values"], grids(tensors["fwd.image_grid_thw"]))
    return ids, images if name == "region" else images + golden_again(name, row)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(random_image(height, width, seed).numpy())


@pytest.mark.parametrize("name", [*ENCODERS, "region"])
def test_forward_equals_the_authors_model(name: str) -> None:
    tensors, _ = golden(name)
    procedure = published(name)
    ids, images = request(name)
    positions, delta = rope_index(ids, images[1], procedure.ids.image_pad, merge=2)
    assert torch.equal(positions, tensors["fwd.position_ids"][:, 0])
    assert delta == tensors["fwd.rope_deltas"].item()
    hidden, control, _ = procedure.forward(ids, positions, procedure.decoder.empty_cache(), *images)
    logits = tensors["fwd.logits_run2" if name == "region" else "fwd.logits_run2_mask0"][0]
    assert (F.linear(hidden, procedure.lm_head) - logits).abs().max() <= TOLERANCE
    if name != "region":
        assert (control - tensors["fwd.control"]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("name", [*ENCODERS, "region"])
def test_generate_equals_the_authors_model(name: str, row: int) -> None:
    tensors, _ = golden(name)
    ids, images = request(name, row)
    expected = tensors["gen_b2.new_ids"][row].tolist()
    out = published(name).generate(ids, *images, max_new_tokens=len(expected), keep_logits=True)
    assert out.ids == expected
    assert (torch.stack(out.logits) - tensors["gen_b2.step_logits"][row]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("case", ["r1_forced", "r1_free"])
def test_first_round_forces_the_action_as_the_authors_do(name: str, case: str) -> None:
    tensors, sidecar = golden(name)
    state = dict(golden_state(name))
    if case == "r1_free":
        head = state["lm_head.weight"].clone()
        head[golden_token_ids(name).action_start] = tensors["r1_free.lm_head_row_action_start"]
        state["lm_head.weight"] = head
    procedure = published(name, state)
    calls = record_passes(procedure)
    prompt, expected = tensors[f"{case}.input_ids"][0].tolist(), tensors[f"{case}.new_ids"].tolist()
    images = (tensors["fwd.pixel_values"], grids(tensors["fwd.image_grid_thw"]))
    out = procedure.generate(prompt, *images, max_new_tokens=len(expected), keep_logits=True)
    assert out.ids == expected
    assert (torch.stack(out.logits) - tensors[f"{case}.step_logits"]).abs().max() <= TOLERANCE
    # Not only the result: the same trunk calls over the same past, one token or two.
    assert calls == [(call["n"], call["past"]) for call in sidecar["stats"][case]["trunk_calls"]]


def record_passes(procedure: PublishedProcedure) -> list[tuple[int, int]]:
    """(new tokens, tokens in the cache) of every language-model pass from now on."""
    calls, decoder = [], procedure.decoder

    class Recorder:
        empty_cache = staticmethod(decoder.empty_cache)

        def __call__(self, x: torch.Tensor, positions: torch.Tensor, cache: reference.Cache) -> torch.Tensor:
            calls.append((x.shape[1], cache[0][0].shape[2]))
            return decoder(x, positions, cache)

    procedure.decoder = Recorder()
    return calls


def test_second_round_does_the_published_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A 600-token clip prompt and 32 new tokens: 64 passes over 1,262 tokens, 64 cache copies, two ViT calls."""
    procedure = published()
    passes, copies, looks = record_passes(procedure), [], []
    tower, deepcopy = procedure.visual.__call__, lambda cache: copies.append(len(cache)) or copy.deepcopy(cache)
    monkeypatch.setattr(reference, "copy", SimpleNamespace(deepcopy=deepcopy))
    monkeypatch.setattr(reference.VisionTower, "__call__", lambda self, x, grid: looks.append(len(x)) or tower(x, grid))
    ids, images = request("clip")
    filler = [64] * (600 - len(ids))
    cut = ids.index(procedure.ids.image_pad) - 1
    procedure.generate(ids[:cut] + filler + ids[cut:], *images, max_new_tokens=32, forced=[64] * 32)
    assert (len(passes), sum(new for new, _ in passes)) == (64, 1262)
    assert copies == [golden_config().num_hidden_layers] * 64
    assert looks == [96, 80]
    work = sum((stage.work for stage in procedure.timings), Counter())
    counted = {"lm_calls": 64, "token_forwards": 1262, "cache_copies": 64, "vit_calls": 2, "vit_patches": 176}
    assert work == counted


@pytest.mark.parametrize(("new", "past"), [(600, 0), (1, 600)], ids=["prefill", "decode"])
def test_one_token_forward_costs_no_more_than_transformers(new: int, past: int) -> None:
    procedure, special = published(), golden_token_ids()
    state = {name: tensor for name, tensor in golden_state().items() if not name.startswith("clip_projector.")}
    peer = transformers_model(golden_config(), state, special.image_pad, special.vision_start)
    ids = torch.randint(0, 250, (past + new,), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(past + new).expand(3, -1)
    cache, peer_cache = procedure.decoder.empty_cache(), None

    def ours(part: slice) -> torch.Tensor:
        hidden = procedure.decoder(F.embedding(ids[None, part], procedure.embedding), positions[:, part], cache)
        return F.linear(hidden[0, -1], procedure.lm_head).float()

    def theirs(part: slice) -> torch.Tensor:
        nonlocal peer_cache
        inputs = {"input_ids": ids[None, part], "position_ids": positions[:, None, part]}
        out = peer(**inputs, past_key_values=peer_cache, use_cache=True, logits_to_keep=1)
        peer_cache = out.past_key_values
        return out.logits[0, -1].float()

    flops = []
    with torch.inference_mode():
        if past:
            ours(slice(0, past)), theirs(slice(0, past))
        logits = []
        for forward in (ours, theirs):
            with FlopCounterMode(display=False) as counter:
                logits.append(forward(slice(past, past + new)))
            flops.append(counter.get_total_flops())
    assert (logits[0] - logits[1]).abs().max() <= TOLERANCE
    assert 0 < flops[0] <= 1.1 * flops[1]


@pytest.mark.parametrize("size", [(640, 480), (101, 77), (300, 1700), (28, 28), (27, 5000), (561, 200)])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_pixel_values_equal_transformers(size: tuple[int, int], mode: str) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    image = first_resize(picture(*size).convert(mode), 512)
    values, found = process_images([image], golden_config().vision)
    expected = Qwen2VLImageProcessorPil()(images=[image], return_tensors="pt", min_pixels=3136, max_pixels=12845056)
    assert found == grids(expected["image_grid_thw"])
    assert torch.equal(values, expected["pixel_values"])


@pytest.mark.parametrize("size", [(640, 480), (101, 77), (300, 1700), (28, 28), (27, 5000), (561, 200)])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_images_to_re_encode_equal_transformers(size: tuple[int, int], mode: str) -> None:
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    dino = BitImageProcessorPil(
        size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}, image_mean=mean, image_std=std, resample=3
    )
    sam = SamImageProcessorPil(image_mean=mean, image_std=std)
    for longest, processor, ours in ((512, dino, process_dino), (1024, sam, lambda image: process_sam(image, 1024))):
        image = first_resize(picture(*size).convert(mode), longest)
        expected = torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"][0])
        assert (ours(image) - expected).abs().max() <= 1e-6


def test_first_resize_truncates_as_the_authors_do() -> None:
    for longest in (561, 569, 644, 685, 691, 694, 725):
        assert first_resize(picture(longest, 60), 512).width == 511
    assert first_resize(picture(1024, 768), 512).size == (512, 384)
    assert first_resize(picture(400, 20), 512).size == (400, 28)


@pytest.mark.parametrize(
    ("size", "span", "box", "shrunk", "resized"),
    [
        ((1700, 2200), "x_1 y_2 x_4 y_2", (0, 275, 1275, 1100), (512, 331), (504, 336)),
        ((640, 480), "x_3 y_3 x_3 y_3", (160, 120, 400, 300), (240, 180), (252, 168)),
        ((640, 480), "x_0 y_3 x_6 y_4", (0, 120, 640, 360), (512, 192), (504, 196)),
        ((500, 375), "x_2 y_5 x_5 y_6", (62, 187, 437, 375), (375, 188), (364, 196)),
        ((1024, 768), "x_0 y_0 x_7 y_7", (0, 0, 1024, 768), (512, 384), (504, 392)),
        ((101, 77), "x_7 y_0 x_7 y_0", (75, 0, 101, 19), (28, 28), (56, 56)),
        ((640, 480), "y_4 x_6 y_3 x_0 x_0", (0, 120, 640, 360), (512, 192), (504, 196)),
    ],
)
def test_region_crop(size: tuple[int, int], span: str, box: tuple, shrunk: tuple, resized: tuple) -> None:
    assert region_box("".join(f"<|{cell}|>" for cell in span.split()), size) == box
    crop = first_resize(Image.new("RGB", size).crop(box), 512)
    assert crop.size == shrunk
    assert smart_resize(crop.height, crop.width, 28)[::-1] == resized


def test_region_without_rows_has_no_box() -> None:
    assert region_box("<|x_1|><|x_3|>", (640, 480)) is None


class TestAsk:
    """Both rounds, from a picture and a question."""

    def procedure(self, kind: str = "clip") -> PublishedProcedure:
        config = tiny_config(kind)
        tokenizer = Tokenizer.byte_level(config.vocab_size, config.kind)
        return PublishedProcedure(config, tiny_state(kind), tokenizer.ids, tokenizer)

    def test_region(self) -> None:
        procedure = self.procedure()
        options = {"looks": ["region:x2,y1,x5,y4+x0,y0,x1,y1"], "max_new_tokens": 4, "keep_logits": True}
        answer = procedure.ask(picture(320, 240), "What is it?", **options)
        ids = procedure.ids
        assert answer.rounds[0].ids == [*ids.region_span(2, 1, 5, 4), *ids.region_span(0, 0, 1, 1), ids.im_end]
        assert answer.boxes == [(40, 0, 280, 180), (0, 0, 120, 90)]
        assert len(answer.logits) == len(answer.ids) <= 4
        assert answer.second_look_ms > 0
        names = [stage.name for stage in answer.timings]
        assert names == ["crop+embed", "ViT", "prefill", "decode", "crop+embed", "ViT", "append", "decode"]
        assert answer.timings[4].work == {"images": 3} and answer.timings[5].work["vit_calls"] == 1

    def test_clip(self) -> None:
        procedure = self.procedure()
        answer = procedure.ask(picture(320, 240), "What is it?", looks=["clip"], max_new_tokens=4)
        ids = procedure.ids
        assert answer.rounds[0].ids == [*ids.action_span, ids.im_end]
        assert [stage.name for stage in answer.timings][4:] == [
            *["crop+embed", "ViT"] * 2,
            "perceive",
            "append",
            "decode",
        ]
        # Each of the two last prefill passes takes the whole conversation again.
        assert answer.timings[-3].work["token_forwards"] == answer.timings[-2].work["token_forwards"] > 2 * 99
        assert sum(stage.work["vit_calls"] for stage in answer.timings) == 3

    @pytest.mark.parametrize(("encoder", "patches", "pads"), [("dino", 256, 256), ("sam", 256, 16)])
    def test_re_encoders(self, encoder: str, patches: int, pads: int) -> None:
        procedure = self.procedure(ENCODERS[encoder])
        answer = procedure.ask(picture(320, 240), "What is it?", looks=[encoder], max_new_tokens=4)
        stages = answer.timings[4:]
        assert [stage.name for stage in stages][:4] == ["crop+embed", "ViT", "perceive", "append"]
        assert stages[0].work == {"images": 2} and stages[1].work["vit_calls"] == 2
        # The photo's patches again, and those of the re-encoder.
        assert stages[1].work["vit_patches"] == answer.timings[1].work["vit_patches"] + patches
        prompt = answer.timings[2].work["token_forwards"] // 2
        assert stages[2].work["token_forwards"] == stages[3].work["token_forwards"] == prompt + pads + 15

    def test_one_look_at_most(self) -> None:
        with pytest.raises(ValueError, match="at most one"):
            self.procedure().ask(picture(64, 64), "What is it?", looks=["clip", "clip"])


def test_one_image_for_each_action() -> None:
    ids, images = request("clip")
    twice = (*images[:2], images[2].repeat(2, 1), images[3] * 2)
    with pytest.raises(ValueError, match="2 images for 1 action"):
        published().generate(ids, *twice)


def test_it_shares_no_code_with_the_engine() -> None:
    allowed = {"vpt_model.config", "vpt_model.text.prompt", "vpt_model.text.tokens", "vpt_model.published.encoders"}
    allowed.add("vpt_model.checkpoint.encoder_names")  # which name a tensor has in which version, and nothing else
    for module in (reference, reference_encoders):
        tree = ast.parse(Path(module.__file__).read_text())
        modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert {name for name in modules if name.startswith(("vpt_", "."))} <= allowed
