"""What `vpt verify` does: recorded runs of the authors' model repeated and compared; a checkpoint checked and tried."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import Tensor

from vpt_kernels import control_cross_attention, fold_projector
from vpt_model.checkpoint.shapes import expected_shapes
from vpt_model.config import ModelConfig
from vpt_model.published.recordings import Recording, Replay, Request, left_padded, load_recording

TOLERANCE = 1e-4
"""Largest absolute difference of any float32 tensor. Rounding makes 3e-5, wrong variants make 0.18 and more."""

VARIANTS = ("clip", "dino", "sam")
FILES = ("projectors", *VARIANTS, "region")

# Why a recorded output is not repeated; the first pattern that matches its name says it.
_OUT_OF_SCOPE = {
    r".*\.scale(?!1\.)\d+\..*": "projector_scale 2: no released model uses it",
    r".*_?mask[12].*": "paragraph masks: training only",
    r".*_?run1.*": "a single forward pass: training only",
}
_INPUTS = re.compile(
    r"weights\..*|input\..*|.*\.(input_ids|attention_mask|image_grid_thw|clip_images_grid_thw|detection_images.*|"
    r"(clip_)?pixel_values.*|seg_tiles?_.*|lm_head_row_action_start)"
)
_CASE = re.compile(r"(?P<form>\w+)\.scale1\.b(?P<images>\d+)\.(?P<mode>cond|none)")
_FORMS = {"Projector": "linear", "MinimalProjector": "linear", "MinimalSamProjector": "conv"}
_FORMS |= {"MinimalCLIPProjector": "identity"}


@dataclass
class Row:
    """One recorded case, or what a recording holds out of scope for one reason.

    Differences are the largest absolute ones; None where the case has no such tensor. other: projector outputs,
    features, positions. reason: why it is out of scope, or what is wrong with it. names: its recorded tensors.
    """

    file: str
    case: str
    logits: float | None = None
    ids: bool | None = None
    control: float | None = None
    other: float | None = None
    in_scope: bool = True
    reason: str = ""
    names: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        differences = [value for value in (self.logits, self.control, self.other) if value is not None]
        return not self.reason and self.ids is not False and all(value <= TOLERANCE for value in differences)


def verify_recordings(
    folder: str | Path, progress: Callable[[str], None] = lambda activity: None
) -> tuple[list[Row], dict[str, Tensor]]:
    """Repeat every recorded run in `folder`; return a row for each case, and every tensor computed, as
    `<file>.<tensor>`.

    Computed tensors have the shape and dtype of the recorded ones. `progress` is told what begins. Raises ValueError if
    the folder has no recording or one that cannot be read.
    """
    folder = Path(folder)
    names = [name for name in FILES if (folder / f"{name}.safetensors").is_file()]
    if not names:
        raise ValueError(f"{folder} has none of {', '.join(f'{name}.safetensors' for name in FILES)}")
    rows, computed, clip = [], dict[str, torch.Tensor](), None
    for name in names:
        progress(name)
        recording = load_recording(folder, name)
        try:
            if name == "projectors":
                found = dict(_projectors(recording))
            elif name == "region":
                # Recorded with the weights of "clip", which it does not repeat.
                clip = clip or load_recording(folder, "clip")
                found = dict(_region(Replay(recording, recording.state or clip.state)))
            else:
                clip = recording if name == "clip" else clip
                found = dict(_variant(recording))
        except KeyError as error:
            raise ValueError(
                f"{folder / name}.safetensors or its sidecar has no {error}: record it completely"
            ) from error
        rows += _compare(recording, found)
        computed |= {f"{name}.{key}": value.to(recording.dtypes.get(key, value.dtype)) for key, value in found.items()}
    return rows, computed


def _variant(recording: Recording) -> Iterator[tuple[str, Tensor]]:
    replay, tensors = Replay(recording), recording.tensors
    [request] = replay.requests("fwd")
    replay.prefill([request])
    projector, reencoded, control, special = (
        replay.model.projector,
        request.reencoded,
        request.control,
        request.special,
    )
    assert projector is not None and reencoded is not None and control is not None and special is not None
    yield "fwd.image_embeds", torch.cat(request.images)
    yield "fwd.encoder_output", reencoded
    yield "fwd.control", control
    yield "fwd.special_embeds_cond", special
    yield "fwd.special_embeds_uncond", control_cross_attention(reencoded, None, projector)
    yield "fwd.logits_run2_mask0", replay.model.language.logits(torch.cat(request.hidden))[None]
    yield from _positions("fwd", [request], tensors)
    yield from _generation("gen", replay, replay.requests("fwd"))
    requests = replay.requests("gen_b2")
    yield from _generation("gen_b2", replay, requests)
    yield from _positions("gen_b2", requests, tensors)
    requests = replay.requests("r1_forced")
    yield from _generation("r1_forced", replay, requests)
    yield "r1_forced.control", requests[0].hidden[-1][-1:]
    yield from _generation("r1_b2", replay, replay.requests("r1_b2"))
    head = recording.state["lm_head.weight"].clone()
    head[replay.ids.action_start] = tensors["r1_free.lm_head_row_action_start"]
    replay = Replay(recording, recording.state | {"lm_head.weight": head})
    yield from _generation("r1_free", replay, replay.requests("r1_free"))


def _region(replay: Replay) -> Iterator[tuple[str, Tensor]]:
    [request] = replay.requests("fwd")
    replay.prefill([request])
    yield "fwd.logits_run2", replay.model.language.logits(torch.cat(request.hidden))[None]
    yield from _positions("fwd", [request], replay.tensors)
    yield from _generation("gen", replay, replay.requests("fwd"))
    requests = replay.requests("gen_b2")
    yield from _generation("gen_b2", replay, requests)
    yield from _positions("gen_b2", requests, replay.tensors)


def _generation(case: str, replay: Replay, requests: list[Request]) -> Iterator[tuple[str, Tensor]]:
    recorded = replay.tensors[f"{case}.new_ids"]
    ids, logits = replay.generate(requests, recorded.shape[-1])
    yield f"{case}.new_ids", ids.view(recorded.shape)
    yield f"{case}.step_logits", logits.view(*recorded.shape, -1)


def _positions(case: str, requests: list[Request], tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    length = tensors[f"{case}.input_ids"].shape[1]
    rows = [torch.cat(request.positions, 1) for request in requests]
    yield f"{case}.position_ids", left_padded(rows, length, value=1)
    yield f"{case}.rope_deltas", torch.tensor([[int(row.max()) + 1 - length] for row in rows], device="cpu")


def _projectors(recording: Recording) -> Iterator[tuple[str, Tensor]]:
    tensors = recording.tensors
    for case in dict.fromkeys(name.rpartition(".")[0] for name in tensors):
        if (match := _CASE.fullmatch(case)) is None:
            continue
        form, images = _FORMS[match["form"]], int(match["images"])
        prefix = f"weights.{match['form']}.scale1."
        weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        features, ends = _features(tensors, form, images, weights)
        names = {"condition_norm": "layernorm_condition", "condition": "linear_condition"}
        if form != "identity":
            names |= {"feature_norm": "layernorm_feature"}
            names |= {"feature": "linear_feature" if form == "linear" else "conv_feature"}
        affine: dict[str, Any] = {
            role: (weights[f"{name}.weight"], weights[f"{name}.bias"]) for role, name in names.items()
        }
        projector = fold_projector(form, **affine)
        plain = control_cross_attention(features, None, projector, ends)
        if match["mode"] == "none":
            yield f"{case}.output", plain
            continue
        control = tensors["input.conditions_scale1"][:images]
        out = control_cross_attention(features, control, projector, ends)
        key = F.linear(F.layer_norm(control, control.shape[1:], *affine["condition_norm"]), *affine["condition"])
        counts = [len(out) // images] * images if ends is None else ends.diff().tolist()
        key = key.repeat_interleave(torch.tensor(counts, device=key.device), 0)
        # The operator adds score·key and keeps the score to itself; what it added tells it.
        score = ((out - plain) * key).sum(1) / key.square().sum(1)
        if match["form"] == "Projector":
            yield f"{case}.output", score[:, None] * plain
        else:
            yield f"{case}.output", out
            yield f"{case}.attention", torch.nn.utils.rnn.pad_sequence(score.split(counts), batch_first=True)


def _features(
    tensors: Mapping[str, Tensor], form: str, images: int, weights: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Return the recorded input of the first `images` images, and its cu_seqlens where it is ragged."""
    if form == "identity":
        counts = tensors["input.clip_grid_thw"][:images].prod(1) // 4
        ends = F.pad(counts.cumsum(0), (1, 0))
        return tensors["input.clip_hidden_states"][: ends[-1]], ends
    if form == "linear":
        return tensors["input.hidden_states"][:images], None
    base = tensors["input.sam_base_i8"][:images].float()
    blocks = len(weights["layernorm_feature.weight"]) // base.shape[1]
    return torch.cat([base * (1 + 0.25 * block) / 32 for block in range(blocks)], 1), None


def _compare(recording: Recording, found: Mapping[str, Tensor]) -> list[Row]:
    rows: dict[str, Row] = {}
    for name, expected in recording.tensors.items():
        if _INPUTS.fullmatch(name):
            continue
        case = name.rpartition(".")[0]
        if name in found:
            row = rows.setdefault(case, Row(recording.name, case))
            row.names.append(name)
            _add(row, name, found[name], expected)
        else:
            reasons = (reason for pattern, reason in _OUT_OF_SCOPE.items() if re.fullmatch(pattern, name))
            reason = next(reasons, "")
            reason = reason or "not an output that is known"
            row = rows.setdefault(reason, Row(recording.name, "", in_scope=False, reason=reason))
            row.names.append(name)
    for name in found.keys() - recording.tensors.keys():
        rows[name] = Row(recording.name, name, reason="missing from the recording")
    return sorted(rows.values(), key=lambda row: not row.in_scope)


def _add(row: Row, name: str, found: Tensor, expected: Tensor) -> None:
    if found.shape != expected.shape:
        row.reason = f"{name.rpartition('.')[2]} has shape {list(found.shape)}, recorded {list(expected.shape)}"
        return
    kind = name.rpartition(".")[2]
    if kind == "new_ids":
        row.ids = torch.equal(found, expected)
        return
    column = "logits" if "logits" in kind else "control" if kind == "control" else "other"
    difference = (found - expected).abs().max().item()
    if not found.is_floating_point() and difference:
        row.reason = f"{kind} differs"
    differences = torch.tensor([difference, getattr(row, column) or 0.0], dtype=torch.float64, device="cpu")
    setattr(row, column, differences.max().item())  # of a NaN and a number, NaN


PARTS = {
    "language model": ("model.",),
    "embedding": ("model.embed_tokens.",),
    "head": ("lm_head.",),
    "vision tower": ("visual.",),
    "projector": ("clip_projector.", "detection_projector.", "seg_projector."),
    "re-encoder": ("detection_model.", "seg_model."),
}


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Return parameters of each part and in total; the language model's are without its embedding, a tied head counts
    once.
    """
    shapes = {name: torch.Size(shape).numel() for name, shape in expected_shapes(config).items()}
    counts = {part: sum(n for name, n in shapes.items() if name.startswith(prefix)) for part, prefix in PARTS.items()}
    counts["language model"] -= counts["embedding"]
    if config.tie_word_embeddings:
        counts["head"] = 0
    return {part: count for part, count in counts.items() if count} | {"total": sum(counts.values())}


SAMPLE_QUESTION = "What is in the picture?"


def sample_picture() -> Image.Image:
    """Return a red disc on white, 224x224: what a model says about it shows whether it sees."""
    picture = Image.new("RGB", (224, 224), "white")
    ImageDraw.Draw(picture).ellipse((56, 56, 168, 168), fill="red")
    return picture


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, which appears under its name when it is complete."""
    partial = path.with_name(f"{path.name}.incomplete")
    try:
        save_file(
            {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}, partial
        )
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
