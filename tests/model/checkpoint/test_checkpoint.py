"""Checkpoints: published shapes, both formats and spellings, and every way in which a folder can be wrong."""

from __future__ import annotations

import json
import math
import pickle
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from tests.model.checkpoints import EMBEDDING, HEAD, PUBLISHED_2B, fields, write
from tests.model.inputs import tiny_config, tiny_model, tiny_state
from vpt_model.checkpoint import load_checkpoint, random_state
from vpt_model.checkpoint.load import check_state
from vpt_model.checkpoint.shapes import expected_shapes
from vpt_model.config import PRESETS, parse_config
from vpt_model.network.model import Model


def equal(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def total(config, prefix=""):
    return sum(torch.Size(shape).numel() for name, shape in expected_shapes(config).items() if name.startswith(prefix))


def test_published_parameter_counts():
    small, large = PRESETS["2b"], PRESETS["7b"]
    assert total(small) == 2_447_087_104
    assert total(small, "model.") - total(small, EMBEDDING) == 1_310_340_608
    assert total(small, HEAD) == total(small, EMBEDDING) == 233_373_696
    assert total(small, "visual.") == 665_271_296
    assert total(small, "clip_projector.") == 4_727_808
    assert total(large) == 8_317_087_232
    assert total(large, "visual.") == 675_759_104
    assert total(large, "clip_projector.") == 25_711_616


def test_published_config():
    assert parse_config(PUBLISHED_2B) == PRESETS["2b"]


@pytest.mark.parametrize("spelling", ["qwen2_vl_vpt", "vrt_qwen2_vl"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("pickled", [False, True])
def test_round_trip(tmp_path, spelling, shards, pickled):
    state = tiny_state()
    config, found = load_checkpoint(write(tmp_path, state, fields(model_type=spelling), shards, pickled))
    assert config == tiny_config()
    assert equal(found, state)


def test_old_pickle_format(tmp_path):
    write(tmp_path, tiny_state(), pickled=True)
    torch.save(tiny_state(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert equal(load_checkpoint(tmp_path)[1], tiny_state())


def test_loaded_weights_run(tmp_path):
    config, state = load_checkpoint(write(tmp_path, tiny_state()))
    model, ids = Model.from_state(config, state), torch.arange(5)
    found, expected = (
        m.language.forward(m.language.embed(ids), ids.expand(3, -1), [m.language.new_cache(5)], [5])
        for m in (model, tiny_model())
    )
    assert torch.equal(found, expected)


def test_old_projector_name(tmp_path):
    old = {name.replace("clip_projector.", "depth_projector."): tensor for name, tensor in tiny_state().items()}
    assert equal(load_checkpoint(write(tmp_path, old, pickled=True))[1], tiny_state())
    both = old | {"clip_projector.linear_condition.bias": old["depth_projector.linear_condition.bias"]}
    with pytest.raises(ValueError, match="two names of one tensor"):
        load_checkpoint(write(tmp_path, both, pickled=True))


def test_kind_from_the_tensors_where_the_config_is_silent(tmp_path):
    assert load_checkpoint(write(tmp_path, tiny_state()))[0].kind == "clip"
    without = {name: tensor for name, tensor in tiny_state().items() if "projector" not in name}
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot tell the re-encoder"):
        load_checkpoint(write(tmp_path, without))
    with pytest.raises(ValueError, match="missing clip_projector.linear_condition.weight"):
        load_checkpoint(write(tmp_path, without, fields(vision_encoder_ls=["clip"])))


def test_plain_model(tmp_path):
    config, state = load_checkpoint(write(tmp_path, tiny_state(None), fields(tiny_config(None))))
    assert config == tiny_config(None)
    assert Model.from_state(config, state).projector is None


def test_wrong_reencoder_is_listed(tmp_path):
    with pytest.raises(ValueError, match="missing detection_model.embeddings.cls_token .1, 1, 64.") as error:
        load_checkpoint(write(tmp_path, tiny_state(), fields(vision_encoder_ls=["dino"])))
    assert "unexpected clip_projector.linear_condition.weight [128, 128]" in str(error.value)


def test_all_problems_in_one_error():
    state = dict(tiny_state())
    del state["visual.merger.ln_q.bias"], state["model.layers.2.self_attn.q_proj.weight"]
    state["model.norm.weight"] = torch.ones(127)
    state["rotary.inv_freq"] = torch.ones(3)
    with pytest.raises(ValueError, match="4 problems") as error:
        check_state(tiny_config(), state)
    for line in (
        "missing visual.merger.ln_q.bias [64]",
        "missing model.layers.2.self_attn.q_proj.weight [128, 128]",
        "unexpected rotary.inv_freq [3]",
        "misshapen model.norm.weight [127], expected [128]",
    ):
        assert line in str(error.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64])
def test_one_floating_dtype(dtype):
    state = tiny_state() | {"model.norm.weight": torch.ones(128, dtype=dtype)}
    with pytest.raises(ValueError, match="share one floating dtype"):
        Model.from_state(tiny_config(), state)
    with pytest.raises(ValueError, match="share one floating dtype"):
        Model.from_state(tiny_config(), {name: tensor.to(torch.int32) for name, tensor in tiny_state().items()})


def test_tied_head_may_be_absent_or_differ(tmp_path):
    config = replace(tiny_config(), tie_word_embeddings=True)
    state = random_state(config, 3)
    assert state[HEAD] is state[EMBEDDING]
    absent = {name: tensor for name, tensor in state.items() if name != HEAD}
    _, found = load_checkpoint(write(tmp_path, absent, fields(config)))
    assert equal(found, state)
    assert found[HEAD].data_ptr() == found[EMBEDDING].data_ptr()
    _, found = load_checkpoint(tmp_path, dtype=torch.bfloat16)
    assert found[HEAD].data_ptr() == found[EMBEDDING].data_ptr()
    head = state[HEAD] + 1
    with pytest.warns(UserWarning, match="lm_head.weight is used for both"):
        _, found = load_checkpoint(write(tmp_path, state | {HEAD: head}, fields(config)))
    assert torch.equal(found[EMBEDDING], head)
    assert torch.equal(found[HEAD], head)


def test_untied_head_must_be_there(tmp_path):
    state = {name: tensor for name, tensor in tiny_state().items() if name != HEAD}
    with pytest.raises(ValueError, match="missing lm_head.weight"):
        load_checkpoint(write(tmp_path, state))


def test_dtype_is_kept_unless_asked(tmp_path):
    state = {name: tensor.bfloat16() for name, tensor in tiny_state().items()}
    write(tmp_path, state)
    assert equal(load_checkpoint(tmp_path)[1], state)
    assert equal(load_checkpoint(tmp_path, torch.float32)[1], {name: t.float() for name, t in state.items()})


@pytest.mark.parametrize("pickled", [False, True])
def test_index_names_a_missing_shard(tmp_path, pickled):
    write(tmp_path, tiny_state(), shards=3, pickled=pickled)
    next(tmp_path.glob("*-00002-of-*")).unlink()
    with pytest.raises(ValueError, match="00002-of-00003.*download"):
        load_checkpoint(tmp_path)


def test_index_reaches_out_of_the_folder(tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    write(tmp_path, tiny_state())
    (inner / "config.json").write_text(json.dumps(fields()))
    index = inner / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tiny_state(), "../model.safetensors")}))
    with pytest.raises(ValueError, match="outside its folder"):
        load_checkpoint(inner)
    index.write_text(json.dumps({"weight_map": ["model.safetensors"]}))
    with pytest.raises(ValueError, match="no weight_map"):
        load_checkpoint(inner)


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("keep", [0, 5, 1000, -1000])
def test_truncated_file(tmp_path, pickled, keep):
    write(tmp_path, tiny_state(), pickled=pickled)
    file = tmp_path / ("pytorch_model.bin" if pickled else "model.safetensors")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"{file.name} cannot be read as weights.*corrupt"):
        load_checkpoint(tmp_path)


class _Hostile:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (self.target, "w")


@pytest.mark.parametrize("protocol", ["torch", "pickle"])
def test_hostile_pickle_is_not_executed(tmp_path, protocol):
    write(tmp_path, tiny_state(), pickled=True)
    content = {"model.norm.weight": _Hostile(str(tmp_path / "executed"))}
    file = tmp_path / "pytorch_model.bin"
    torch.save(content, file) if protocol == "torch" else file.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ValueError, match="pytorch_model.bin cannot be read as weights"):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [[torch.zeros(2)], {"model.norm.weight": 3}, {7: torch.zeros(2)}])
def test_pickle_that_is_no_state_dict(tmp_path, content):
    write(tmp_path, tiny_state(), pickled=True)
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="not a state dict"):
        load_checkpoint(tmp_path)


def test_tensor_in_two_files(tmp_path):
    write(tmp_path, tiny_state())
    save_file({"model.norm.weight": torch.ones(128)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="repeats tensors of another file \\(model.norm.weight\\)"):
        load_checkpoint(tmp_path)


def test_a_whole_file_goes_before_an_index(tmp_path):
    """As transformers reads a folder into which both were written."""
    state = tiny_state()
    write(tmp_path, state)
    shard = "model-00001-of-00001.safetensors"
    save_file({name: tensor + 1 for name, tensor in tiny_state().items()}, tmp_path / shard)
    index = {"weight_map": dict.fromkeys(state, shard)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert equal(load_checkpoint(tmp_path)[1], state)
    (tmp_path / "model.safetensors").unlink()
    assert equal(load_checkpoint(tmp_path)[1], {name: tensor + 1 for name, tensor in state.items()})


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; it must be true or false"),
        ({"tie_word_embeddings": math.nan}, "tie_word_embeddings is nan"),
        ({"rope_scaling": {"mrope_section": [4, 12]}}, r"mrope_section is \(4, 12\); it must be three integers"),
        ({"rope_scaling": {"mrope_section": "4612"}}, "mrope_section is .'4', '6', '1', '2'.; it must be three"),
    ],
)
def test_a_field_of_a_wrong_kind_is_named_with_its_folder(tmp_path, changed, message):
    write(tmp_path, tiny_state(), fields() | changed)
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))}: .*{message}"):
        load_checkpoint(tmp_path)


def test_a_path_that_cannot_be_opened(tmp_path):
    (tmp_path / "config.json").mkdir()
    for folder in (tmp_path, "a\0b"):
        with pytest.raises(ValueError, match=r"config.json' cannot be read .*: give a checkpoint folder"):
            load_checkpoint(folder)


def test_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="config.json' does not exist"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(fields()))
    with pytest.raises(ValueError, match="has no weights"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", "\udcff"])
def test_broken_config_file(tmp_path, text):
    write(tmp_path, tiny_state())
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match="config.json"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama'; supported are qwen2_vl_vpt, vrt_qwen2_vl, qwen2_vl"),
        ({"projector_scale": 2}, "projector_scale"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "yarn", "mrope_section": [4, 6, 6]}}, "yarn"),
        ({"vision_config": {"hidden_act": "gelu"}}, "quick_gelu"),
        ({"vision_encoder_ls": ["clip", "dino"]}, "vision_encoder_ls"),
        ({"vision_encoder_ls": [["clip"]]}, "vision_encoder_ls"),
        ({"rope_scaling": {"rope_type": None, "type": "yarn", "mrope_section": [4, 6, 6]}}, "yarn"),
        ({"rms_norm_eps": None, "vocab_size": None}, "lacks vocab_size, rms_norm_eps"),
        ({"num_attention_heads": 0}, "positive integers"),
        ({"hidden_size": "128"}, "positive integers"),
        ({"rope_theta": -1.0}, "positive numbers"),
        ({"num_key_value_heads": 3}, "not a multiple"),
    ],
)
def test_unsupported_config(changes, message):
    with pytest.raises(ValueError, match=message):
        parse_config(fields(**changes), ["clip_projector.linear_condition.weight"])
