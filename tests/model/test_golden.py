"""The authors' model, run with tiny random weights, against ours: projectors, forward, generation, batches."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from tests.model.inputs import golden, golden_config, golden_model, golden_state
from vpt_kernels import control_cross_attention, fold_projector
from vpt_model.model import Model
from vpt_model.positions import mrope_positions

TOLERANCE = 1e-4
FORMS = {"MinimalProjector": "linear", "MinimalSamProjector": "conv", "MinimalCLIPProjector": "identity"}


@pytest.fixture(scope="module")
def model():
    return golden_model("clip")


def token(name):
    return golden("clip")[1]["config"]["token_ids"][name]


@dataclass
class Request:
    """One conversation: prompt, features of its ordinary images, features of its re-encoded image."""

    ids: torch.Tensor
    images: list[torch.Tensor]
    grids: list[tuple[int, int]]
    reencoded: torch.Tensor | None = None
    control: torch.Tensor | None = None
    special: torch.Tensor | None = None
    hidden: list[torch.Tensor] = field(default_factory=list)
    positions: list[torch.Tensor] = field(default_factory=list)

    def prompt(self, model):
        """Embeddings of the whole prompt, the re-encoded image still missing."""
        embeds = model.language.embed(self.ids)
        embeds[self.ids == token("image_pad")] = torch.cat(self.images)
        return embeds

    @property
    def action(self):
        """Index of the action token; the prompt's length where it has none."""
        found = (self.ids == token("clip_action")).nonzero().flatten().tolist()
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


def clip_request(model, case, row=0, images="fwd.pixel_values", grid=None):
    """A request of the clip file; its re-encoded image, if the prompt has one, is that of `fwd` or of row 1."""
    tensors, _ = golden("clip")
    ids = strip(tensors, case, row)
    grid = grids_of(tensors["fwd.image_grid_thw"] if grid is None else grid)
    request = Request(ids, see(model, tensors[images], grid), grid)
    if (ids == token("clip_image_pad")).any():
        pixels = tensors["fwd.clip_pixel_values" if row == 0 else "gen_b2.clip_pixel_values_row1"]
        sizes = tensors["fwd.clip_images_grid_thw" if row == 0 else "gen_b2.clip_images_grid_thw"]
        [request.reencoded] = see(model, pixels, grids_of(sizes)[row : row + 1])
    return request


def second_row(model, case):
    tensors, _ = golden("clip")
    return clip_request(model, case, 1, "gen_b2.pixel_values_row1", tensors["gen_b2.image_grid_thw"][1:])


def region_request(model, case, row=0):
    tensors, _ = golden("region")
    ids = strip(tensors, case, row)
    first = len(tensors["fwd.image_grid_thw"])
    grids = grids_of(tensors[f"{case}.image_grid_thw"])[first:] if row else grids_of(tensors["fwd.image_grid_thw"])
    return Request(ids, see(model, tensors["gen_b2.pixel_values_row1" if row else "fwd.pixel_values"], grids), grids)


def append(model, requests, caches, embeds, positions):
    """One ragged forward call; every request gets its hidden states."""
    lengths = [len(chunk) for chunk in embeds]
    hidden = model.language.forward(torch.cat(embeds), torch.cat(positions, 1), caches, lengths)
    for request, states, where in zip(requests, hidden.split(lengths), positions, strict=True):
        request.hidden.append(states)
        request.positions.append(where)


def prefill(model, requests, room=20, shift=0, raw_action=False):
    """Up to the action-start token, then the look itself: two forward calls for the whole batch.

    shift and raw_action are the faults that the sensitivity tests inject into the second call.
    """
    caches = [model.language.new_cache(len(request.ids) + room) for request in requests]
    prompts = [request.prompt(model) for request in requests]
    where = [mrope_positions(r.ids, r.grids, 0, token("image_pad"))[0] for r in requests]
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
        request.control = request.hidden[0][-1:]
        request.special = control_cross_attention(request.reencoded, request.control, model.projector)
        prompt[request.ids == token("clip_image_pad")] = request.special
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
    ids, logits = [], []
    for step in range(steps):
        logits.append(model.language.logits(last))
        forced = [token_id == token("clip_action_start") for token_id in previous]
        sampled = logits[-1].argmax(-1).tolist()
        previous = [token("clip_action") if force else best for force, best in zip(forced, sampled, strict=True)]
        ids.append(previous)
        if step + 1 < steps:
            embeds = model.language.embed(torch.tensor(previous))
            embeds = torch.where(torch.tensor(forced)[:, None], last, embeds)
            positions = torch.tensor([cache.next_position for cache in caches]).expand(3, -1)
            last = model.language.forward(embeds, positions, caches, [1] * len(caches))
    return torch.tensor(ids).T, torch.stack(logits, 1)


def check_generation(case, ids, logits, name="clip"):
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


def test_clip_forward(model):
    tensors, _ = golden("clip")
    request = clip_request(model, "fwd")
    caches = prefill(model, [request])
    close = {
        "image_embeds": torch.cat(request.images),
        "encoder_output": request.reencoded,
        "control": request.control,
        "special_embeds_cond": request.special,
    }
    for name, value in close.items():
        assert (value - tensors[f"fwd.{name}"]).abs().max() <= TOLERANCE, name
    assert torch.equal(torch.cat(request.positions, 1), tensors["fwd.position_ids"][:, 0])
    assert caches[0].next_position == len(request.ids) + tensors["fwd.rope_deltas"].item()
    logits = model.language.logits(torch.cat(request.hidden))
    assert (logits - tensors["fwd.logits_run2_mask0"][0]).abs().max() <= TOLERANCE


def test_clip_unconditioned(model):
    tensors, _ = golden("clip")
    features = clip_request(model, "fwd").reencoded
    plain = control_cross_attention(features, None, model.projector)
    assert (plain - tensors["fwd.special_embeds_uncond"]).abs().max() <= TOLERANCE


def test_clip_generation(model):
    check_generation("gen", *generate(model, [clip_request(model, "fwd")], 12))


def test_clip_batch(model):
    requests = [clip_request(model, "gen_b2"), second_row(model, "gen_b2")]
    assert len(requests[0].ids) != len(requests[1].ids)
    check_generation("gen_b2", *generate(model, requests, 12))


def test_round_one_forced(model):
    tensors, _ = golden("clip")
    request = clip_request(model, "r1_forced")
    ids, logits = generate(model, [request], 12)
    check_generation("r1_forced", ids, logits)
    assert logits[0, 0].argmax() != ids[0, 0] == token("clip_action")
    assert (request.hidden[-1][-1] - tensors["r1_forced.control"][0]).abs().max() <= TOLERANCE


def test_round_one_free():
    tensors, meta = golden("clip")
    state = golden_state("clip")
    state["lm_head.weight"] = state["lm_head.weight"].clone()
    state["lm_head.weight"][token("clip_action_start")] = tensors["r1_free.lm_head_row_action_start"]
    model = Model.from_state(golden_config("clip"), state)
    ids, logits = generate(model, [clip_request(model, "r1_free")], 16)
    check_generation("r1_free", ids, logits)
    overridden = (logits[0].argmax(-1) != ids[0]).nonzero().tolist()
    assert overridden == meta["stats"]["overridden_steps"]["r1_free"]


def test_round_one_batch(model):
    check_generation("r1_b2", *generate(model, [clip_request(model, "r1_b2"), second_row(model, "r1_b2")], 12))


def test_region_forward(model):
    tensors, _ = golden("region")
    request = region_request(model, "fwd")
    prefill(model, [request])
    assert torch.equal(request.positions[0], tensors["fwd.position_ids"][:, 0])
    logits = model.language.logits(request.hidden[0])
    assert (logits - tensors["fwd.logits_run2"][0]).abs().max() <= TOLERANCE


def test_region_generation(model):
    check_generation("gen", *generate(model, [region_request(model, "fwd")], 12), name="region")


def test_region_batch(model):
    requests = [region_request(model, "gen_b2"), region_request(model, "gen_b2", 1)]
    check_generation("gen_b2", *generate(model, requests, 12), name="region")


def test_rows_on_different_paths_share_every_call(model):
    """Clip look, region look and first round side by side: each row still equals its own golden run."""
    requests = [clip_request(model, "fwd"), region_request(model, "fwd"), clip_request(model, "r1_forced")]
    ids, logits = generate(model, requests, 12)
    for row, (name, case) in enumerate((("clip", "gen"), ("region", "gen"), ("clip", "r1_forced"))):
        check_generation(case, ids[row : row + 1], logits[row : row + 1], name)


@pytest.mark.parametrize("fault", [{"shift": 1}, {"raw_action": True}])
def test_faults_are_visible(model, fault):
    """The tests above can fail: one wrong position or the raw action embedding moves the logits a thousandfold."""
    tensors, _ = golden("clip")
    request = clip_request(model, "fwd")
    prefill(model, [request], **fault)
    logits = model.language.logits(request.hidden[-1][-1:])
    assert (logits - tensors["fwd.logits_run2_mask0"][0, -1:]).abs().max() > 0.1


def test_reusing_the_wrong_image_is_visible(model):
    """The golden re-encoded image differs from the ordinary one; mixing them up must show."""
    tensors, _ = golden("clip")
    request = clip_request(model, "fwd")
    request.reencoded = request.images[0][: len(request.reencoded)]
    prefill(model, [request])
    logits = model.language.logits(request.hidden[-1][-1:])
    assert (logits - tensors["fwd.logits_run2_mask0"][0, -1:]).abs().max() > 0.1
