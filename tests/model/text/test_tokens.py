from __future__ import annotations

from dataclasses import replace

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from vpt_model.text.prompt import PromptFormat, first_round
from vpt_model.text.tokens import RegionSpan, TokenIds, Tokenizer, crop_box, parse_look, parse_region_ids, parse_regions

SMALL = Tokenizer.byte_level(320, "clip")
LARGE = Tokenizer.byte_level(151_936, "clip")
START, END = "<|region_token_start|>", "<|region_token_end|>"

cells = st.tuples(st.sampled_from("xy"), st.integers(0, 7))


def written(*tokens: str) -> str:
    return START + "".join(f"<|{axis}_{cell}|>" for axis, cell in tokens) + END


def test_ids_of_the_released_vocabulary():
    ids = LARGE.ids
    assert (ids.endoftext, ids.im_start, ids.im_end, ids.vision_start, ids.vision_end, ids.image_pad) == (
        151643,
        151644,
        151645,
        151652,
        151653,
        151655,
    )
    assert (ids.system, ids.user, ids.assistant, ids.newline) == (8948, 872, 77091, 198)
    assert ids.kind_pad == 151657
    assert (ids.region_start, ids.region_end) == (151658, 151659)
    assert ids.x == tuple(range(151660, 151668))
    assert ids.y == tuple(range(151668, 151676))
    assert ids.action_span == (151676, 151677, 151678)
    assert ids.stop == frozenset(range(151643, 151658))


def test_ids_of_the_small_vocabulary():
    ids = SMALL.ids
    assert (ids.im_start, ids.im_end, ids.vision_start, ids.vision_end, ids.image_pad, ids.endoftext) == (
        256,
        257,
        258,
        259,
        261,
        263,
    )
    assert ids.action_span == (268, 269, 270)
    assert (ids.kind_pad, ids.region_start, ids.region_end) == (271, 276, 277)
    assert (ids.x, ids.y) == (tuple(range(278, 286)), tuple(range(286, 294)))
    assert ids.stop == frozenset(range(256, 264)) | {271}
    assert ids.newline == 10


@pytest.mark.parametrize("vocab_size", [320, 151_936])
@pytest.mark.parametrize("kind", ["clip", "detection", "seg", None])
def test_every_kind_has_a_byte_level_tokenizer(vocab_size, kind):
    ids = Tokenizer.byte_level(vocab_size, kind).ids
    assert ids.kind == kind
    assert (ids.action_start is None) == (kind is None)
    assert ids.kind_pad is None if kind is None else ids.kind_pad in ids.stop
    assert ids.region_start not in ids.stop and ids.action_start not in ids.stop


def test_ids_are_looked_up_not_computed():
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={"Ċ": 3, "user": 9, "system": 5, "assistant": 7}, merges=[], ignore_merges=True)
    )
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    names = [
        "im_end",
        "vision_end",
        "endoftext",
        "im_start",
        "image_pad",
        "vision_start",
        "seg_image_pad",
        "seg_action",
    ]
    backend.add_special_tokens([AddedToken(f"<|{name}|>", special=True) for name in names])
    ids = TokenIds.from_tokenizer(backend, "seg")
    found = {name: backend.token_to_id(f"<|{name}|>") for name in names}
    assert (ids.im_end, ids.vision_end, ids.endoftext) == (found["im_end"], found["vision_end"], found["endoftext"])
    assert (ids.newline, ids.user, ids.system, ids.assistant) == (3, 9, 5, 7)
    assert ids.kind_pad == found["seg_image_pad"] and ids.action == found["seg_action"]
    assert ids.stop == {found[name] for name in names} - {found["seg_action"]}
    with pytest.raises(ValueError, match="action tokens"):
        _ = ids.action_span
    with pytest.raises(ValueError, match="region tokens"):
        parse_look("region:x0,y0,x0,y0", ids)


def test_a_tokenizer_of_another_model_is_refused():
    with pytest.raises(ValueError, match="im_start"):
        TokenIds.from_tokenizer(tokenizers.Tokenizer(models.BPE(vocab={"<|endoftext|>": 0}, merges=[])), "clip")
    with pytest.raises(ValueError, match="297"):
        Tokenizer.byte_level(296, "clip")


@pytest.mark.parametrize("tokenizer", [SMALL, LARGE], ids=["320", "151936"])
class TestTokenizer:
    @given(text=st.text(st.characters(codec="utf-8", exclude_characters="|")))
    def test_text_survives(self, tokenizer, text):
        assert tokenizer.decode(tokenizer.encode(text)) == tokenizer._backend.normalizer.normalize_str(text)

    def test_bytes_come_first(self, tokenizer):
        assert sorted(tokenizer._backend.id_to_token(i) for i in range(256)) == sorted(
            pre_tokenizers.ByteLevel.alphabet()
        )

    def test_special_tokens_are_stripped_and_perception_tokens_stay(self, tokenizer):
        ids = tokenizer.ids
        span = ids.region_span(2, 1, 5, 4)
        generated = [*tokenizer.encode("héllo"), ids.kind_pad, *span, *ids.action_span, ids.im_end, ids.endoftext]
        assert tokenizer.decode(generated) == (
            "héllo"
            + written(("x", 2), ("y", 1), ("x", 5), ("y", 4))
            + "<|clip_action_start|><|clip_action|><|clip_action_end|>"
        )
        assert tokenizer.encode(tokenizer.decode(span)) == list(span)

    def test_ids_without_a_token_are_visible(self, tokenizer):
        assert tokenizer.decode([tokenizer.ids.y[7], 151_900, tokenizer.ids.im_end]) == "<|y_7|>⟨151900⟩"


def test_tokenizer_of_a_folder(tmp_path):
    LARGE._backend.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.from_folder(tmp_path, "clip")
    assert loaded.ids == LARGE.ids
    assert loaded.encode("You are <|x_3|>") == LARGE.encode("You are <|x_3|>")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="not a tokenizer"):
        Tokenizer.from_folder(tmp_path, "clip")
    with pytest.raises(ValueError, match="does not exist"):
        Tokenizer.from_folder(tmp_path / "missing", "clip")


def test_system_header_of_the_released_vocabulary():
    system = LARGE.encode(PromptFormat().system)
    header = first_round(LARGE.ids, system, [], None)[:11]
    assert header == [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198]


CROPS = [
    (1700, 2200, (1, 2, 4, 2), (0, 275, 1275, 1100)),
    (640, 480, (3, 3, 3, 3), (160, 120, 400, 300)),
    (640, 480, (0, 3, 6, 4), (0, 120, 640, 360)),
    (500, 375, (2, 5, 5, 6), (62, 187, 437, 375)),
    (1024, 768, (0, 0, 7, 7), (0, 0, 1024, 768)),
    (101, 77, (7, 0, 7, 0), (75, 0, 101, 19)),
]


@pytest.mark.parametrize("width, height, corners, box", CROPS)
def test_crop_boxes(width, height, corners, box):
    (region,) = parse_region_ids(SMALL.ids.region_span(*corners), SMALL.ids)
    assert crop_box(region, width, height) == box


@given(
    st.integers(8, 5000),
    st.integers(8, 5000),
    st.sets(st.integers(0, 7), min_size=1),
    st.sets(st.integers(0, 7), min_size=1),
)
def test_crop_boxes_hold_the_named_cells_and_lie_inside(width, height, columns, rows):
    left, top, right, bottom = crop_box(RegionSpan(frozenset(columns), frozenset(rows)), width, height)
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    assert left <= min(columns) * width / 8 and max(columns) * width / 8 < right
    assert top <= min(rows) * height / 8 and max(rows) * height / 8 < bottom


def test_crop_without_a_pixel_or_an_axis_is_refused():
    with pytest.raises(ValueError, match="at least 8x8"):
        crop_box(RegionSpan(frozenset({3}), frozenset({3})), 1, 1)
    with pytest.raises(ValueError, match="at least one of each"):
        crop_box(RegionSpan(frozenset({3}), frozenset()), 100, 100)


PARSED = [
    ("no region", []),
    (written(("x", 2), ("y", 1), ("x", 5), ("y", 4)), [({2, 5}, {1, 4})]),
    (written(("y", 4), ("x", 5), ("y", 4), ("x", 5)), [({5}, {4})]),
    (
        written(("x", 7), ("y", 7), ("x", 0), ("y", 0)) + "and" + written(("x", 1), ("y", 2)),
        [({0, 7}, {0, 7}), ({1}, {2})],
    ),
    (written(("x", 1), ("x", 2)), [({1, 2}, set())]),
    (written(), []),
    (START + "<|x_1|><|y_1|>", []),
    (START + "<|x_1|>,<|y_1|>" + END, []),
    (START + START + "<|x_1|><|y_1|>" + END, [({1}, {1})]),
    (START + "<|x_1|><|y_1|>" + written(("x", 2), ("y", 3)) + END, [({2}, {3})]),
    (START + "<|x_8|><|y_1|>" + END, []),
]


@pytest.mark.parametrize("text, regions", PARSED)
def test_regions_of_a_text_and_of_its_ids(text, regions):
    expected = [RegionSpan(frozenset(columns), frozenset(rows)) for columns, rows in regions]
    assert parse_regions(text) == expected
    assert parse_region_ids(SMALL.encode(text), SMALL.ids) == expected


@given(st.lists(st.one_of(st.sampled_from([START, END, "a"]), cells.map(lambda cell: f"<|{cell[0]}_{cell[1]}|>"))))
def test_text_and_ids_name_the_same_regions(pieces):
    text = "".join(pieces)
    assert parse_region_ids(SMALL.encode(text), SMALL.ids) == parse_regions(text)


def test_forced_looks():
    ids = SMALL.ids
    assert parse_look("clip", ids) == [ids.action_start]
    assert parse_look("region:x2,y1,x5,y4", ids) == [276, 280, 287, 283, 290, 277, 257]
    two = parse_look("region:x2,y1,x5,y4+x0,y0,x7,y7", ids)
    assert two == [276, 280, 287, 283, 290, 277, 276, 278, 286, 285, 293, 277, 257]


@pytest.mark.parametrize(
    "spec, message",
    [
        ("", "must be"),
        ("dino", "'clip'"),
        ("region", "x2,y1,x5,y4"),
        ("region:", "x2,y1,x5,y4"),
        ("region:x2,y1,x5", "x2,y1,x5,y4"),
        ("region:x2,y1,x5,y8", "0..7"),
        ("region:y1,x2,y4,x5", "first column"),
        ("region:x2,y1,x5,y4+", "joined?|join"),
        ("region:2,1,5,4", "x2,y1,x5,y4"),
    ],
)
def test_forced_looks_that_mean_nothing(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_look(spec, SMALL.ids)


def test_plain_models_have_no_re_encoder():
    with pytest.raises(ValueError, match="look is 'clip'"):
        parse_look("clip", replace(SMALL.ids, kind=None))
