"""The authors' model, run with tiny random weights, against ours: projectors, forward, generation, batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import pytest
import torch

from tests.model.inputs import golden, golden_again, golden_config, golden_model, golden_state, golden_token_ids
from vpt_kernels import control_cross_attention, fold_projector
from vpt_model.model import Model
from vpt_model.positions import mrope_positions

TOLERANCE = 1e-4
FORMS = {"MinimalProjector": "linear", "MinimalSamProjector": "conv", "MinimalCLIPProjector": "identity"}


VARIANTS = ["clip", "dino", "sam"]


@lru_cache(maxsize=4)
def model_of(name):
    return golden_model("clip" if name == "region" else name)


@dataclass
class Request:
    """One conversation: prompt, features of its ordinary images, what its projector reads of the re-encoded image."""

    name: str
    ids: torch.Tensor
    images: list[torch.Tensor]
    grids: list[tuple[int, int]]
    reencoded: torch.Tensor | None = None
    control: torch.Tensor | None = None
    special: torch.Tensor | None = None
    hidden: list[torch.Tensor] = field(default_factory=list)
    positions: list[torch.Tensor] = field(default_factory=list)

    @property
    def special_ids(self):
        return golden_token_ids(self.name)

    def prompt(self, model):
        """Embeddings of the whole prompt, the re-encoded image still missing."""
        embeds = model.language.embed(self.ids)
        embeds[self.ids == self.special_ids.image_pad] = torch.cat(self.images)
        return embeds

    @property
    def action(self):
        """Index of the action token; the prompt's length where it has none."""
        found = (self.ids == self.special_ids.action).nonzero().flatten().tolist()
        return found[0] if found else len(self.ids)


def see(model, pixel_values, grids):
    features = model.vision.forward(model.vision.embed_pixel_values(pixel_values), grids)
    return list(features.split([height * width // 4 for height, width in grids]))


def grids_of(tensor):
    return [tuple(grid) for grid in tensor[:, 1:].tolist()]


def strip(tensors, case, row=0):
    ids = tensors[f"{case}.input_ids"][row]
    mask = tensors.get(f"{case}.attention_mask")
    return ids if mask is None else ids[mask[row].bool()]


def request(name, case, row=0):
    """The prompt of one row with its images; row 0 sees those of `fwd`, row 1 those of `gen_b2`."""
    model, (tensors, _) = model_of(name), golden(name)
    first = len(tensors["fwd.image_grid_thw"])
    grids = grids_of(tensors["gen_b2.image_grid_thw"][first:] if row else tensors["fwd.image_grid_thw"])
    ids = strip(tensors, case, row)
    pixels = tensors["gen_b2.pixel_values_row1" if row else "fwd.pixel_values"]
    made = Request(name, ids, see(model, pixels, grids), grids)
    if (ids == made.special_ids.kind_pad).any():
        pixels, sizes = golden_again(name, row)
        if model.encoder is None:
            [made.reencoded] = see(model, pixels, sizes)
        else:
            made.reencoded = model.encoder(model.encoder.embed_pixel_values(pixels))
    return made


def append(model, requests, caches, embeds, positions):
    """One ragged forward call; every request gets its hidden states."""
    lengths = [len(chunk) for chunk in embeds]
    hidden = model.language.forward(torch.cat(embeds), torch.cat(positions, 1), caches, lengths)
    for request, states, where in zip(requests, hidden.split(lengths), positions, strict=True):
        request.hidden.append(states)
        request.positions.append(where)


def prefill(model, requests, room=20, shift=0, raw_action=False, grid_pads=False, pre_norm=False, unconditioned=False):
    """Up to the action-start token, then the look itself: two forward calls for the whole batch.

    Everything behind `room` is a fault that the sensitivity test injects into the second call.
    """
    caches = [model.language.new_cache(len(request.ids) + room) for request in requests]
    prompts = [request.prompt(model) for request in requests]
    where = [mrope_positions(r.ids, r.grids, 0, r.special_ids.image_pad)[0] for r in requests]
    heads = [r.action for r in requests]
    append(
        model,
        requests,
        caches,
        [prompt[:head] for prompt, head in zip(prompts, heads, strict=True)],
        [position[:, :head] for position, head in zip(where, heads, strict=True)],
    )
    looks = [i for i, request in enumerate(requests) if request.reencoded is not None]
    for i in looks:
        request, prompt = requests[i], prompts[i]
        request.control = request.hidden[0][-1:] / (model.language.norm if pre_norm else 1)
        condition = None if unconditioned else request.control
        request.special = control_cross_attention(request.reencoded, condition, model.projector)
        pads = request.ids == request.special_ids.kind_pad
        prompt[pads] = request.special
        if grid_pads:
            rows = int(pads.sum()) // 4
            start = where[i][0, pads][0]
            where[i][1, pads] = start + torch.arange(4 * rows) // rows
            where[i][2, pads] = start + torch.arange(4 * rows) % rows
        if not raw_action:
            prompt[heads[i]] = request.control[0]
    if looks:
        append(
            model,
            [requests[i] for i in looks],
            [caches[i] for i in looks],
            [prompts[i][heads[i] :] for i in looks],
            [where[i][:, heads[i] :] + shift for i in looks],
        )
    return caches


def generate(model, requests, steps, **faults):
    """Greedy decoding of the whole batch: ids [rows, steps] and logits [rows, steps, vocab].

    After an action-start token the next one is always the action token, and its embedding is the hidden state of the
    action-start token.
    """
    caches = prefill(model, requests, room=steps, **faults)
    last = torch.stack([request.hidden[-1][-1] for request in requests])
    previous = [int(request.ids[-1]) for request in requests]
    special = requests[0].special_ids
    ids, logits = [], []
    for step in range(steps):
        logits.append(model.language.logits(last))
        forced = [token_id == special.action_start for token_id in previous]
        sampled = logits[-1].argmax(-1).tolist()
        previous = [special.action if force else best for force, best in zip(forced, sampled, strict=True)]
        ids.append(previous)
        if step + 1 < steps:
            embeds = model.language.embed(torch.tensor(previous))
            embeds = torch.where(torch.tensor(forced)[:, None], last, embeds)
            positions = torch.tensor([cache.next_position for cache in caches]).expand(3, -1)
            last = model.language.forward(embeds, positions, caches, [1] * len(caches))
    return torch.tensor(ids).T, torch.stack(logits, 1)


def steps_of(name, case):
    tensors, _ = golden(name)
    return tensors[f"{case}.new_ids"].shape[-1]


def check_generation(name, case, ids, logits):
    tensors, _ = golden(name)
    expected = tensors[f"{case}.new_ids"].view(len(ids), -1)
    assert ids.tolist() == expected.tolist()
    assert (logits - tensors[f"{case}.step_logits"].view_as(logits)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("projector", FORMS)
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("mode", ["cond", "none"])
def test_projectors(projector, images, mode):
    tensors, _ = golden("projectors")
    weights = {
        key.removeprefix(f"weights.{projector}.scale1."): value
        for key, value in tensors.items()
        if key.startswith(f"weights.{projector}.scale1.")
    }
    form, cu_seqlens = FORMS[projector], None
    parameters = {"condition_norm": "layernorm_condition", "condition": "linear_condition"}
    if form == "identity":
        grids = tensors["input.clip_grid_thw"][:images]
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), (grids.prod(1) // 4).cumsum(0)])
        features, cu_seqlens = tensors["input.clip_hidden_states"][: ends[-1]], ends
    elif form == "linear":
        parameters |= {"feature_norm": "layernorm_feature", "feature": "linear_feature"}
        features = tensors["input.hidden_states"][:images]
    else:
        parameters |= {"feature_norm": "layernorm_feature", "feature": "conv_feature"}
        base = tensors["input.sam_base_i8"][:images].float()
        features = torch.cat([base * (1 + 0.25 * block) / 32 for block in range(4)], 1)
        assert torch.equal(features[0, 255, 0, :4], tensors["input.sam_check"][0])
    folded = fold_projector(
        form, **{role: (weights[f"{name}.weight"], weights[f"{name}.bias"]) for role, name in parameters.items()}
    )
    control = tensors["input.conditions_scale1"][:images] if mode == "cond" else None
    out = control_cross_attention(features, control, folded, cu_seqlens)
    expected = tensors[f"{projector}.scale1.b{images}.{mode}.output"]
    assert out.shape == expected.shape
    assert (out - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", VARIANTS)
def test_forward(name):
    tensors, model, made = golden(name)[0], model_of(name), request(name, "fwd")
    caches = prefill(model, [made])
    close = {
        "image_embeds": torch.cat(made.images),
        "encoder_output": made.reencoded,
        "control": made.control,
        "special_embeds_cond": made.special,
        "special_embeds_uncond": control_cross_attention(made.reencoded, None, model.projector),
    }
    for key, value in close.items():
        assert (value - tensors[f"fwd.{key}"].view_as(value)).abs().max() <= TOLERANCE, key
    assert torch.equal(torch.cat(made.positions, 1), tensors["fwd.position_ids"][:, 0])
    assert caches[0].next_position == len(made.ids) + tensors["fwd.rope_deltas"].item()
    logits = model.language.logits(torch.cat(made.hidden))
    assert (logits - tensors["fwd.logits_run2_mask0"][0]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", [*VARIANTS, "region"])
def test_generation(name):
    check_generation(name, "gen", *generate(model_of(name), [request(name, "fwd")], steps_of(name, "gen")))


@pytest.mark.parametrize("name", [*VARIANTS, "region"])
def test_batch(name):
    requests = [request(name, "gen_b2", row) for row in range(2)]
    assert len(requests[0].ids) != len(requests[1].ids)
    check_generation(name, "gen_b2", *generate(model_of(name), requests, steps_of(name, "gen_b2")))


@pytest.mark.parametrize("name", VARIANTS)
def test_round_one_forced(name):
    made = request(name, "r1_forced")
    ids, logits = generate(model_of(name), [made], steps_of(name, "r1_forced"))
    check_generation(name, "r1_forced", ids, logits)
    assert ids[0, 0] == made.special_ids.action
    assert [0] in golden(name)[1]["stats"]["overridden_steps"]["r1_forced"]
    assert (made.hidden[-1][-1] - golden(name)[0]["r1_forced.control"][0]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", VARIANTS)
def test_round_one_free(name):
    tensors, meta = golden(name)
    state = dict(golden_state(name))
    state["lm_head.weight"] = state["lm_head.weight"].clone()
    state["lm_head.weight"][golden_token_ids(name).action_start] = tensors["r1_free.lm_head_row_action_start"]
    model = Model.from_state(golden_config(name), state)
    ids, logits = generate(model, [request(name, "r1_free")], steps_of(name, "r1_free"))
    check_generation(name, "r1_free", ids, logits)
    overridden = (logits[0].argmax(-1) != ids[0]).nonzero().tolist()
    assert overridden == meta["stats"]["overridden_steps"]["r1_free"]


@pytest.mark.parametrize("name", VARIANTS)
def test_round_one_batch(name):
    requests = [request(name, "r1_b2", row) for row in range(2)]
    check_generation(name, "r1_b2", *generate(model_of(name), requests, steps_of(name, "r1_b2")))


def test_region_forward():
    tensors, made = golden("region")[0], request("region", "fwd")
    prefill(model_of("region"), [made])
    assert torch.equal(made.positions[0], tensors["fwd.position_ids"][:, 0])
    logits = model_of("region").language.logits(made.hidden[0])
    assert (logits - tensors["fwd.logits_run2"][0]).abs().max() <= TOLERANCE


def test_rows_on_different_paths_share_every_call():
    """Clip look, region look and first round side by side: each row still equals its own golden run."""
    cases = (("clip", "fwd", "gen"), ("region", "fwd", "gen"), ("clip", "r1_forced", "r1_forced"))
    ids, logits = generate(model_of("clip"), [request(name, prompt) for name, prompt, _ in cases], 12)
    for row, (name, _, case) in enumerate(cases):
        check_generation(name, case, ids[row : row + 1], logits[row : row + 1])


FAULTS = ["shift", "raw_action", "grid_pads", "pre_norm", "unconditioned"]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", VARIANTS)
def test_faults_are_visible(name, fault):
    """The tests above can fail: a wrong position, embedding or condition moves the logits a thousandfold."""
    made = request(name, "fwd")
    prefill(model_of(name), [made], **{fault: 1})
    logits = model_of(name).language.logits(made.hidden[-1][-1:])
    assert (logits - golden(name)[0]["fwd.logits_run2_mask0"][0, -1:]).abs().max() > 0.1


def test_reusing_the_wrong_image_is_visible():
    """The golden re-encoded image differs from the ordinary one; mixing them up must show."""
    made = request("clip", "fwd")
    made.reencoded = made.images[0][: len(made.reencoded)]
    prefill(model_of("clip"), [made])
    logits = model_of("clip").language.logits(made.hidden[-1][-1:])
    assert (logits - golden("clip")[0]["fwd.logits_run2_mask0"][0, -1:]).abs().max() > 0.1
