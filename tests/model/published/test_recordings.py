"""The authors' model, run with tiny random weights, against the parts of ours; `vpt verify --recordings` repeats it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.model.inputs import GOLDEN, golden, recording
from vpt_kernels import control_cross_attention
from vpt_model.app.cli import app
from vpt_model.app.terminal import print_rows
from vpt_model.engine.executor import Eager
from vpt_model.engine.requests import Append
from vpt_model.published.recordings import Replay
from vpt_model.published.verify import TOLERANCE, VARIANTS, Row, _add, _compare, verify_recordings

GENERATED = ("gen", "gen_b2", "r1_forced", "r1_free", "r1_b2")
# Cases in scope, and how many recorded tensors each stands for.
CASES = {
    ("projectors", f"{form}.scale1.b{n}.cond"): 2 - (form == "Projector")
    for n in (1, 3)
    for form in ("Projector", "MinimalProjector", "MinimalSamProjector", "MinimalCLIPProjector")
}
CASES |= {(file, case.replace("cond", "none")): 1 for file, case in CASES}
CASES |= {(name, case): 2 for name in VARIANTS for case in GENERATED}
CASES |= {(name, "fwd"): 8 for name in VARIANTS} | {(name, "r1_forced"): 3 for name in VARIANTS}
CASES |= {(name, "gen_b2"): 4 for name in (*VARIANTS, "region")} | {("region", "fwd"): 3, ("region", "gen"): 2}
EXCLUDED = {"projectors": 22, "clip": 9, "dino": 9, "sam": 9}


def vpt(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def verified() -> tuple[list[Row], dict[str, torch.Tensor]]:
    return verify_recordings(GOLDEN)


@pytest.mark.parametrize(("file", "case"), CASES)
def test_case(verified, file, case):
    [row] = [row for row in verified[0] if (row.file, row.case) == (file, case)]
    assert row.in_scope and row.passed and len(row.names) == CASES[file, case], row
    assert (row.ids is True) == (case in GENERATED) and (row.logits is not None) == (file != "projectors")
    assert (row.control is not None) == (file in VARIANTS and case in ("fwd", "r1_forced"))


def test_nothing_else_is_claimed_or_passed_over(verified):
    rows, computed = verified
    assert {(row.file, row.case) for row in rows if row.in_scope} == CASES.keys()
    excluded = [row for row in rows if not row.in_scope]
    assert {f: sum(len(r.names) for r in excluded if r.file == f) for f in EXCLUDED} == EXCLUDED
    for row in excluded:
        assert row.reason.endswith(("training only", "no released model uses it"))
        assert all("mask" in name or "run1" in name or "scale2" in name for name in row.names)
    assert computed.keys() == {f"{row.file}.{name}" for row in rows if row.in_scope for name in row.names}


def test_computed_tensors_are_laid_out_as_recorded(verified, tmp_path):
    """What --dump writes can be compared by name, shape and type without knowing this program."""
    for name in ("clip", "region"):
        for suffix in ("safetensors", "json"):
            shutil.copy(GOLDEN / f"{name}.{suffix}", tmp_path)
    result = vpt("verify", "--recordings", tmp_path, "--dump", tmp_path / "dump.safetensors")
    assert result.exit_code == 0, result.output
    assert "9 of 9 cases agree within 1e-04" in result.stdout and "paragraph masks" in result.stdout
    dump = load_file(tmp_path / "dump.safetensors")
    assert dump.keys() == {name for name in verified[1] if name.startswith(("clip.", "region."))}
    for name in ("clip", "region"):
        stored = load_file(GOLDEN / f"{name}.safetensors")
        for key, tensor in dump.items():
            if key.startswith(f"{name}."):
                expected = stored[key.removeprefix(f"{name}.")]
                assert (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype), key
                if tensor.is_floating_point():
                    assert (tensor - expected).abs().max() <= TOLERANCE, key
                else:
                    assert torch.equal(tensor, expected), key


CHANGES = {
    "gen.step_logits": ("gen", "MISS"),
    "gen.new_ids": ("gen", "NO"),
    "fwd.control": ("fwd", "MISS"),
    "fwd.position_ids": ("fwd", "position_ids differs"),
    "fwd.special_embeds_uncond": ("fwd", "MISS"),
    "r1_b2.new_ids": ("r1_b2", "NO"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_one_changed_number_is_a_miss(verified, name, capsys):
    clip = recording("clip")
    changed = clip.tensors[name].clone()
    changed.view(-1)[-1] += 1 if not changed.is_floating_point() else 2e-4
    found = {key.removeprefix("clip."): value for key, value in verified[1].items() if key.startswith("clip.")}
    rows = _compare(replace(clip, tensors=clip.tensors | {name: changed}), found)
    case, sign = CHANGES[name]
    assert [row.case for row in rows if row.in_scope and not row.passed] == [case]
    print_rows(rows)
    printed = capsys.readouterr().out
    assert "5 of 6 cases agree" in printed
    assert [sign in line for line in printed.splitlines() if f"│ {case} " in line] == [True]


def test_not_a_number_is_a_miss():
    for first, second in ((float("nan"), 0.0), (0.0, float("nan"))):
        tensors = {"gen.step_logits": torch.tensor([first]), "gen.logits": torch.tensor([second])}
        row = Row("clip", "gen")
        for name, tensor in tensors.items():
            _add(row, name, tensor, torch.zeros(1))
        assert row.logits != row.logits and not row.passed


@pytest.mark.parametrize("broken", ["empty", "no sidecar", "cut", "no clip", "missing tensor"])
def test_unusable_folders(broken, tmp_path):
    if broken != "empty":
        shutil.copy(GOLDEN / "region.safetensors", tmp_path)
    if broken in ("cut", "no clip", "missing tensor"):
        shutil.copy(GOLDEN / "region.json", tmp_path)
    file = tmp_path / "region.safetensors"
    if broken == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    if broken == "missing tensor":
        shutil.copy(GOLDEN / "clip.safetensors", tmp_path)
        tensors = load_file(file)
        del tensors["fwd.pixel_values"]
        save_file(tensors, file)
        shutil.copy(GOLDEN / "clip.json", tmp_path)
    result = vpt("verify", "--recordings", tmp_path)
    assert result.exit_code == 2
    assert [line for line in result.stderr.splitlines() if line.startswith("error: ")]


def test_rows_on_different_paths_share_every_call():
    """Clip look, region look and first round side by side: each row still equals its own golden run."""
    clip, region = recording("clip"), recording("region")
    replay = Replay(clip)
    requests = [
        *replay.requests("fwd"),
        *Replay(region, clip.state).requests("fwd"),
        *replay.requests("r1_forced"),
    ]
    ids, logits = replay.generate(requests, 12)
    for row, (tensors, case) in enumerate(
        ((clip.tensors, "gen"), (region.tensors, "gen"), (clip.tensors, "r1_forced"))
    ):
        assert torch.equal(ids[row], tensors[f"{case}.new_ids"])
        assert (logits[row] - tensors[f"{case}.step_logits"]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("case", ["r1_forced", "r1_free"])
def test_action_tokens_are_forced_where_the_authors_force_them(verified, name, case):
    tensors, meta = golden(name)
    chosen = verified[1][f"{name}.{case}.step_logits"].argmax(-1)
    overridden = (chosen != verified[1][f"{name}.{case}.new_ids"]).nonzero().tolist()
    assert overridden == meta["stats"]["overridden_steps"][case] != []


class TestUnannouncedAction:
    """A model samples the action token without its start: its input, too, is the state of the token before it."""

    def replay(self, name: str) -> Replay:
        """Of a model whose second token, as a rule, is now the action token."""
        usual = Replay(recording(name))
        ids, _ = usual.generate(usual.requests("fwd"), 2)
        head = recording(name).state["lm_head.weight"].clone()
        head[usual.ids.action] = 3 * head[ids[0, 1]]
        return Replay(recording(name), recording(name).state | {"lm_head.weight": head})

    def expected(self, replay: Replay, chunks: list[Append], steps: int) -> tuple[list[int], torch.Tensor]:
        """Greedy decoding behind `chunks` by one prefill for each token."""
        language = replay.model.language
        embeds = torch.cat([chunk.embeds for chunk in chunks])
        positions = torch.cat([chunk.positions for chunk in chunks], 1)
        ids, logits, before = [], [], chunks[-1].tokens[-1]
        for _ in range(steps):
            cache = language.new_cache(len(embeds))
            hidden = language.forward(embeds, positions, [cache], [len(embeds)])[-1:]
            logits.append(language.logits(hidden)[0])
            sampled = int(logits[-1].argmax())
            before = replay.ids.action if before == replay.ids.action_start else sampled
            ids.append(before)
            own = language.embed(torch.tensor([before]))
            embeds = torch.cat([embeds, hidden if before == replay.ids.action else own])
            positions = torch.cat([positions, positions.max().add(1).expand(3, 1)], 1)
        return ids, torch.stack(logits)

    @pytest.mark.parametrize("name", VARIANTS)
    @pytest.mark.parametrize("case", ["fwd", "gen_b2"], ids=["alone", "in a batch"])
    def test_it_is_replayed_as_the_engine_feeds_it(self, name, case, monkeypatch):
        replay, steps, states, fed = self.replay(name), 6, Eager.states, {}

        def watched(executor, appends):
            for append in appends:
                fed.setdefault(append.conversation, []).append(append)
            return states(executor, appends)

        monkeypatch.setattr(Eager, "states", watched)
        ids, logits = replay.generate(replay.requests(case), steps)
        unannounced = 0
        for row, appends in enumerate(fed.values()):
            prompt = [append for append in appends if append.stage != "decode"]
            expected, expected_logits = self.expected(replay, prompt, steps)
            assert ids[row].tolist() == expected
            assert (logits[row] - expected_logits).abs().max() <= TOLERANCE
            before = [prompt[-1].tokens[-1], *expected]
            pairs = zip(before[: steps - 1], expected)
            unannounced += sum(b == replay.ids.action and a != replay.ids.action_start for a, b in pairs)
        assert unannounced and len(fed) == len(ids) == (1 if case == "fwd" else 2)


class Shifted(Replay):
    def begin_look(self, request, embeds, positions):
        super().begin_look(request, embeds, positions)
        positions += 1


class RawAction(Replay):
    def begin_look(self, request, embeds, positions):
        raw = embeds[0].clone()
        super().begin_look(request, embeds, positions)
        embeds[0] = raw


class GridPads(Replay):
    def begin_look(self, request, embeds, positions):
        super().begin_look(request, embeds, positions)
        pads = request.ids[-len(embeds) :] == self.ids.kind_pad
        rows, start = int(pads.sum()) // 4, positions[0, pads][0]
        positions[1, pads] = start + torch.arange(4 * rows) // rows
        positions[2, pads] = start + torch.arange(4 * rows) % rows


class PreNorm(Replay):
    def begin_look(self, request, embeds, positions):
        request.hidden[0][-1] /= self.model.language.norm
        super().begin_look(request, embeds, positions)


class Unconditioned(Replay):
    def begin_look(self, request, embeds, positions):
        super().begin_look(request, embeds, positions)
        plain = control_cross_attention(request.reencoded, None, self.model.projector)
        embeds[request.ids[-len(embeds) :] == self.ids.kind_pad] = plain


class OrdinaryImage(Replay):
    def begin_look(self, request, embeds, positions):
        if self.ids.kind == "clip":
            request.reencoded = request.images[0][: len(request.reencoded)]
        else:
            request.reencoded = request.reencoded.flip(1)
        super().begin_look(request, embeds, positions)


@pytest.mark.parametrize("fault", [Shifted, RawAction, GridPads, PreNorm, Unconditioned, OrdinaryImage])
@pytest.mark.parametrize("name", VARIANTS)
def test_faults_are_visible(name, fault):
    """The cases above can fail: a wrong position, embedding, condition or image moves the logits a thousandfold."""
    replay = fault(recording(name))
    requests = replay.requests("fwd")
    replay.prefill(requests)
    logits = replay.model.language.logits(requests[0].hidden[-1][-1:])
    assert (logits - golden(name)[0]["fwd.logits_run2_mask0"][0, -1:]).abs().max() > 0.1


def test_arguments_of_verify(tmp_path):
    for arguments, message in (
        ((), "nothing to verify"),
        (("--dump", tmp_path / "x", "--model", "random:tiny"), "--dump writes what --recordings computes"),
        (("--recordings", GOLDEN, "--dump", tmp_path / "no/x"), "there is no folder"),
        (("--recordings", GOLDEN, "--dump", "/dev/full"), "is a device"),
        (("--golden", tmp_path), "has none of projectors.safetensors"),
        (("--model", "random:9b"), "random weights have the shapes of one of"),
    ):
        result = vpt("verify", *arguments)
        assert result.exit_code == 2 and message in " ".join(result.stderr.split()), result.stderr


def test_sidecars_are_read_not_assumed(tmp_path):
    """Other token ids: the same recording under permuted names of its tokens is another conversation."""
    shutil.copy(GOLDEN / "clip.safetensors", tmp_path)
    meta = json.loads((GOLDEN / "clip.json").read_text())
    ids = meta["config"]["token_ids"]
    ids["clip_action"], ids["clip_action_end"] = ids["clip_action_end"], ids["clip_action"]
    (tmp_path / "clip.json").write_text(json.dumps(meta))
    assert vpt("verify", "--golden", tmp_path).exit_code == 1
