"""The re-encoders against transformers' own processors and models."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from tests.helpers import assert_same_bits, normal
from tests.model.inputs import random_image, tiny_config, tiny_model, tiny_state
from vpt_model.checkpoint.encoder_names import state_for
from vpt_model.config import ModelConfig
from vpt_model.network.encoders import build_encoder
from vpt_model.network.model import Model

KINDS = ["detection", "seg"]
SIZES = [(150, 230), (700, 380), (1300, 900), (40, 600), (300, 300)]


def whole(kind: str):
    """transformers' model, complete with its patch convolution, with the weights of the tiny one."""
    from transformers import Dinov2Config, Dinov2Model, SamVisionConfig
    from transformers.models.sam.modeling_sam import SamVisionEncoder

    config, prefix = tiny_config(kind), f"{kind}_model."
    if kind == "detection":
        model = Dinov2Model(Dinov2Config(**vars(config.dino), attn_implementation="eager"))
    else:
        model = SamVisionEncoder(SamVisionConfig(**vars(config.sam), attn_implementation="eager"))
    state = {k.removeprefix(prefix): v for k, v in tiny_state(kind).items() if k.startswith(prefix)}
    model.load_state_dict(state_for(model, state))
    return model.eval()


def processed(kind: str, image: torch.Tensor) -> torch.Tensor:
    """transformers' processor behind the NEAREST step of the authors' data pipeline: [1, 3, h, w]."""
    from PIL import Image
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

    picture, longest = Image.fromarray(image.numpy()), 512 if kind == "detection" else 1024
    if max(picture.size) > longest:
        factor = longest / max(picture.size)
        picture = picture.resize((int(picture.width * factor), int(picture.height * factor)), Image.Resampling.NEAREST)
    options = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    if kind == "detection":
        crop = {"height": 224, "width": 224}
        processor = BitImageProcessorPil(size={"shortest_edge": 256}, crop_size=crop, resample=3, **options)
    else:
        edge = tiny_config(kind).sam.image_size
        pad = {"height": edge, "width": edge}
        processor = SamImageProcessorPil(size={"longest_edge": edge}, pad_size=pad, **options)
    return torch.as_tensor(processor(picture, return_tensors="pt")["pixel_values"][0])[None]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_encoded_as_by_transformers(kind, size):
    image, encoder = random_image(*size), tiny_model(kind).encoder
    expected = whole(kind)(processed(kind, image)).last_hidden_state
    expected = expected if kind == "seg" else expected[:, 1:]
    with torch.inference_mode():
        patches = encoder.embed_regions([image], [(0, 0, 0, size[1], size[0])])
        found = encoder(patches)
    assert found.shape == expected.shape and expected.std() > 0.5
    assert (found - expected).abs().max() <= 1e-4
    assert (patches - encoder.embed_pixel_values(processed(kind, image))).abs().max() <= 1e-4
    tokens = expected.shape[1] if kind == "detection" else expected[0, 0].numel() // 16
    assert encoder.tokens == tokens and encoder.grid[0] * encoder.grid[1] == len(patches)


@pytest.mark.parametrize("kind", KINDS)
def test_several_images_at_once(kind):
    images, encoder = [random_image(150, 230), random_image(300, 90, seed=1)], tiny_model(kind).encoder
    with torch.inference_mode():
        both = encoder(encoder.embed_regions(images, [(0, 0, 0, 230, 150), (1, 10, 20, 90, 300)]))
        alone = encoder(encoder.embed_regions(images[1:], [(0, 10, 20, 90, 300)]))
    assert len(both) == 2 and (both[1:] - alone).abs().max() <= 1e-5
    assert (both[0] - both[1]).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_weights_stay_bfloat16(kind):
    encoder, exact, prefix = build_encoder(kind, tiny_config(kind)), tiny_model(kind).encoder, f"{kind}_model."
    state = {k.removeprefix(prefix): v.bfloat16() for k, v in tiny_state(kind).items() if k.startswith(prefix)}
    encoder.load(state)
    image, box = random_image(150, 230), (0, 0, 0, 230, 150)
    with torch.inference_mode():
        found, expected = (model(model.embed_regions([image], [box])) for model in (encoder, exact))
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().mean() < 0.05 * expected.std()


def layer_by_layer(kind: str, encoder, patches: torch.Tensor) -> torch.Tensor:
    """What the encoder returns where transformers' layers are called one after the other."""
    if kind == "detection":
        x = patches.unflatten(0, (-1, encoder.tokens)) + encoder._positions
        x = torch.cat([encoder._first.expand(len(x), -1, -1), x], dim=1)
        for layer in encoder.encoder.layer:
            x = layer(x)
        return encoder.layernorm(x)[:, 1:]
    x = patches.unflatten(0, (-1, *encoder.grid)) + encoder.pos_embed
    for layer in encoder.layers:
        x = layer(x)
    return encoder.neck(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_sums_that_wait_for_the_next_norm_are_the_same(kind, dtype):
    """To the bit."""
    encoder, prefix = build_encoder(kind, tiny_config(kind)), f"{kind}_model."
    encoder.load({k.removeprefix(prefix): v.to(dtype) for k, v in tiny_state(kind).items() if k.startswith(prefix)})
    patches = normal(2 * encoder.grid[0] * encoder.grid[1], encoder.width, key=kind, dtype=dtype)
    with torch.inference_mode():
        assert_same_bits(encoder(patches), layer_by_layer(kind, encoder, patches))


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_and_replaced_forwards_meet_their_call(kind):
    """On a layer, on norms and on all modules, whose calls are otherwise not made; and parts that were exchanged."""
    encoder, prefix = build_encoder(kind, tiny_config(kind)), f"{kind}_model."
    encoder.load({k.removeprefix(prefix): v for k, v in tiny_state(kind).items() if k.startswith(prefix)})
    layers, norm = (encoder.encoder.layer, "norm2") if kind == "detection" else (encoder.layers, "layer_norm2")
    patches, seen = normal(encoder.grid[0] * encoder.grid[1], encoder.width, key=kind), []
    with torch.inference_mode():
        expected = encoder(patches)
        handles = [
            layers[0].register_forward_hook(lambda layer, given, x: seen.append(x.shape)),
            getattr(layers[1], norm).register_forward_pre_hook(lambda norm, given: seen.append(given[0].shape)),
        ]
        if kind == "detection":
            handles.append(encoder.layernorm.register_forward_hook(lambda norm, given, x: seen.append(x.shape)))
        assert_same_bits(encoder(patches), expected)
        assert len(seen) == len(handles) and len(set(seen)) == 1
        for handle in handles:
            handle.remove()
        assert_same_bits(encoder(patches), expected)
        assert len(seen) == len(handles)
        seen.clear()
        handle = register_module_forward_hook(lambda module, given, x: seen.append(module))
        assert_same_bits(encoder(patches), expected)
        handle.remove()
        assert all(layer in seen and getattr(layer, norm) in seen for layer in layers)
        setattr(layers[0], norm, torch.nn.Sequential(getattr(layers[0], norm), torch.nn.Identity()))
        assert_same_bits(encoder(patches), expected)
        layers[1].forward = lambda x: torch.zeros_like(x)
        assert (encoder(patches) - expected).abs().max() > 0.1


@pytest.mark.parametrize(
    ("kind", "parameters", "first"),
    [("detection", 304_368_640, "embeddings.cls_token"), ("seg", 308_278_272, "pos_embed")],
)
def test_the_published_encoders(kind, parameters, first):
    """Their tensors under transformers' names; nothing is allocated for them before `load`."""
    encoder = build_encoder(kind, ModelConfig(kind=kind))
    state = encoder.state_dict()
    assert sum(tensor.numel() for tensor in state.values()) == parameters and first in state
    assert {tensor.device.type for tensor in state.values()} == {"meta"}
    loaded = Model.from_state(tiny_config(kind), tiny_state(kind), weights=None).encoder
    assert list(loaded.state_dict()) == list(build_encoder(kind, tiny_config(kind)).state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_shared_with_the_state(kind):
    state = tiny_state(kind)
    found = Model.from_state(tiny_config(kind), state, weights=None).encoder.state_dict().values()
    stored = [tensor for name, tensor in state.items() if name.startswith(f"{kind}_model.")]
    assert sorted(t.data_ptr() for t in found) == sorted(t.data_ptr() for t in stored)


def test_what_does_not_fit():
    encoder = build_encoder("seg", tiny_config("seg"))
    state = {k.removeprefix("seg_model."): v for k, v in tiny_state("seg").items() if k.startswith("seg_model.")}
    with pytest.raises(ValueError, match="pos_embed"):
        encoder.load({name: tensor for name, tensor in state.items() if name != "pos_embed"})
    with pytest.raises(ValueError, match="surplus"):
        encoder.load(state | {"surplus": torch.zeros(1)})
    with pytest.raises(ValueError, match="pos_embed"):
        encoder.load(state | {"pos_embed": torch.zeros(1, 2, 2, 32)})
    for kind in ("clip", "dino", None):
        with pytest.raises(ValueError, match=repr(kind)):
            build_encoder(kind, tiny_config())


def test_transformers_is_named_when_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'vpt-kernels\[encoders\]'"):
        build_encoder("seg", tiny_config("seg"))
