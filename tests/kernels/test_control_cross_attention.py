"""out = f + (f·k)k: values against a float64 oracle, images kept apart, rows written where asked."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import (
    assert_same_bits,
    assert_twice_as_good,
    each_backend,
    each_dtype,
    each_model_dtype,
    normal,
    numbers,
    virtual_bytes,
)
from tests.kernels.control_checks import RAGGED, check
from tests.kernels.control_inputs import composition, fold, parameters
from vpt_kernels import control_cross_attention, control_cross_attention_into, fold_projector

FORMS = ("linear", "conv", "identity")
each_form = pytest.mark.parametrize("form", FORMS)


each_conditioning = pytest.mark.parametrize("conditioned", (True, False), ids=("conditioned", "plain"))
each_raggedness = pytest.mark.parametrize("lengths", RAGGED.values(), ids=RAGGED)


@each_backend
@each_model_dtype
@each_conditioning
@each_raggedness
@pytest.mark.parametrize("hidden", (1536, 3584))
def test_identity(backend, dtype, conditioned, lengths, hidden):
    rounds = 12 if len(lengths) == 1 or sum(lengths) < 9 else 4
    shape = (sum(lengths), hidden)
    check("identity", hidden, shape, lengths, dtype, backend, conditioned=conditioned, rounds=rounds)


@each_backend
@each_model_dtype
@each_conditioning
@pytest.mark.parametrize("images", (1, 3))
def test_linear_at_dinov2_size(backend, dtype, conditioned, images):
    rounds = 1 if conditioned and images == 3 else 2
    check("linear", 1536, (images, 256, 1024), None, dtype, backend, conditioned=conditioned, rounds=rounds)


@each_backend
@each_dtype
@each_conditioning
@each_raggedness
def test_linear_ragged(backend, dtype, conditioned, lengths):
    check("linear", 160, (sum(lengths), 96), lengths, dtype, backend, conditioned=conditioned, rounds=16)


@each_backend
@each_model_dtype
def test_linear_into_wider_model(backend, dtype):
    check("linear", 3584, (37, 1024), None, dtype, backend, rounds=3)


@each_backend
@each_model_dtype
def test_conv_at_sam_size(backend, dtype):
    check("conv", 1536, (1, 256, 64, 64), None, dtype, backend)


@each_backend
@each_dtype
@each_conditioning
@pytest.mark.parametrize("shape", ((3, 8, 8, 12), (2, 5, 4, 4), (16, 3, 4, 8), (1, 2, 12, 4)))
def test_conv_shapes(backend, dtype, conditioned, shape):
    check("conv", 24, shape, None, dtype, backend, conditioned=conditioned, rounds=16)


@each_backend
@each_dtype
@pytest.mark.parametrize("hidden, channels", ((7, 5), (1, 1), (31, 67), (17, 2)))
def test_odd_widths(backend, dtype, hidden, channels):
    check("linear", hidden, (11, channels), [4, 7], dtype, backend, rounds=16)
    check("identity", hidden, (11, hidden), [4, 7], dtype, backend, rounds=16)


@each_backend
@each_model_dtype
def test_large_scores(backend, dtype):
    """Scores in the thousands, beyond what 16 bits of mantissa could hold."""
    params = parameters("linear", 96, 64, dtype)
    params["condition"] = params["condition"][0] * 30, params["condition"][1]
    check("linear", 96, (40, 64), [13, 27], dtype, backend, rounds=4, params=params)


def test_scores_beyond_float16():
    """f·k = 98,304 does not fit float16, the projected token 2,048 + 98,304/2 does: the score is float32."""
    hidden = 96
    condition = torch.zeros(hidden, hidden), torch.full((hidden,), 0.5)
    given = {"condition_norm": (torch.ones(hidden), torch.zeros(hidden)), "condition": condition}
    projector = fold_projector("identity", **{name: tuple(t.half() for t in pair) for name, pair in given.items()})
    features, control = torch.full((3, hidden), 2048, dtype=torch.float16), torch.zeros(1, hidden, dtype=torch.float16)
    assert (control_cross_attention(features, control, projector, backend="cpp") == 51200).all()


@each_backend
@each_dtype
def test_means_far_from_zero(backend, dtype):
    """LayerNorm of features around 1000 with a spread of 1: the mean of squares would cancel."""
    params = parameters("linear", 96, 64, dtype)
    features = (normal(200, 64, key="shifted") + 1000).to(dtype)
    actual = control_cross_attention(features, None, fold_projector("linear", **params), backend=backend)
    eager, oracle = composition(params, features, None, None, dtype), composition(params, features, None)
    assert_twice_as_good(actual, eager, oracle)


@each_backend
def test_toy(backend):
    """f = (1, 2), k = (3, −1): a = 1, out = (4, 1)."""
    zero = torch.zeros(2, 2)
    projector = fold_projector(
        "identity", condition_norm=(torch.ones(2), torch.zeros(2)), condition=(zero, torch.tensor([3.0, -1.0]))
    )
    out = control_cross_attention(torch.tensor([[1.0, 2.0]]), torch.tensor([[5.0, -9.0]]), projector, backend=backend)
    assert out.tolist() == [[4.0, 1.0]]


@each_backend
@each_dtype
@each_form
def test_zero_key_and_no_control_return_f(backend, dtype, form):
    params = parameters(form, 40, 12, dtype)
    params["condition"] = tuple(torch.zeros_like(t) for t in params["condition"])
    features = normal(*{"linear": (9, 12), "conv": (1, 12, 12, 12), "identity": (9, 40)}[form], key=form, dtype=dtype)
    projector = fold_projector(form, **params)
    zero_key = control_cross_attention(features, normal(1, 40, key="c", dtype=dtype), projector, backend=backend)
    plain = control_cross_attention(features, None, projector, backend=backend)
    assert_same_bits(zero_key, plain)
    if form == "identity":
        assert_same_bits(plain, features)
        assert plain.data_ptr() != features.data_ptr()


@each_backend
@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last), ids=("NCHW", "channels_last"))
def test_conv_flattening_order(backend, layout):
    """One hot pixel reaches one token, row-major over the 4×4 cells, and the columns of its place in the cell."""
    channels, height, width = 3, 8, 12
    params = parameters("conv", channels * 16, channels)
    params["feature_norm"] = torch.ones(channels), torch.zeros(channels)
    params["feature"] = torch.eye(channels * 16).view(-1, channels, 4, 4), torch.zeros(channels * 16)
    projector = fold_projector("conv", **params)
    for image, y, x in ((0, 0, 0), (0, 5, 2), (1, 7, 11), (1, 3, 8), (0, 4, 3)):
        features = torch.zeros(2, channels, height, width)
        features[image, 1, y, x] = 1
        out = control_cross_attention(features.contiguous(memory_format=layout), None, projector, backend=backend)
        token = image * (height * width // 16) + y // 4 * (width // 4) + x // 4
        hot = {(token, channel * 16 + y % 4 * 4 + x % 4) for channel in range(channels)}
        assert set(map(tuple, out.nonzero().tolist())) == hot
        assert out[token, 16 + y % 4 * 4 + x % 4] > 0


CONV_LAYOUTS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed plane": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "window of a larger map": lambda t: torch.nn.functional.pad(t, (3, 2, 1, 4))[:, :, 1:-4, 3:-2],
    "CBHW": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
}


@each_backend
@each_dtype
@pytest.mark.parametrize("layout", CONV_LAYOUTS)
def test_conv_strides(backend, dtype, layout):
    features = normal(2, 6, 8, 12, key="strides", dtype=dtype)
    control = normal(2, 20, key="control", dtype=dtype)
    projector = fold("conv", 20, 6, dtype)
    view = CONV_LAYOUTS[layout](features)
    assert torch.equal(view, features)
    want = control_cross_attention(features, control, projector, backend=backend)
    assert_same_bits(control_cross_attention(view, control, projector, backend=backend), want)


@each_backend
@each_dtype
@pytest.mark.parametrize("form", ("linear", "identity"))
@pytest.mark.parametrize("index", (torch.int32, torch.int64))
def test_row_strides(backend, dtype, form, index):
    """Token, image and control rows of any distance; offsets that are themselves a strided view."""
    width = {"linear": 12, "identity": 20}[form]
    projector = fold(form, 20, 12, dtype)
    features, control = normal(15, width, key=form, dtype=dtype), normal(3, 20, key="control", dtype=dtype)
    cu = torch.tensor([0, 4, 4, 15], dtype=index)
    want = control_cross_attention(features, control, projector, cu, backend=backend)
    wide = normal(15, 3, width + 9, key="wide", dtype=dtype)
    wide[:, 1, 5 : 5 + width] = features
    states = normal(3, 7, 20, key="states", dtype=dtype)
    states[:, 6] = control
    spread = torch.stack([cu, cu * 100], 1)[:, 0]
    assert not spread.is_contiguous()
    actual = control_cross_attention(wide[:, 1, 5 : 5 + width], states[:, -1], projector, spread, backend=backend)
    assert_same_bits(actual, want)
    batched = features.view(3, 5, width)
    want = control_cross_attention(batched, control, projector, backend=backend)
    strided = batched.transpose(0, 1).contiguous().transpose(0, 1)
    assert_same_bits(control_cross_attention(strided, control, projector, backend=backend), want)
    cu = torch.tensor([0, 5, 10, 15], dtype=index)
    assert_same_bits(control_cross_attention(features, control, projector, cu, backend=backend), want)


@each_backend
@each_dtype
@each_form
def test_nan_stays_in_its_image(backend, dtype, form):
    projector = fold(form, 48, 16, dtype)
    shape = {"linear": (3, 6, 16), "conv": (3, 16, 8, 12), "identity": (3, 6, 48)}[form]
    features, control = normal(*shape, key=form, dtype=dtype), normal(3, 48, key="control", dtype=dtype)
    clean = control_cross_attention(features, control, projector, backend=backend).view(3, 6, 48)
    for value in (float("nan"), float("inf")):
        poisoned = control.clone()
        poisoned[1, 3] = value
        out = control_cross_attention(features, poisoned, projector, backend=backend).view(3, 6, 48)
        assert out[1].isnan().all()
        assert_same_bits(out[::2].contiguous(), clean[::2].contiguous(), "the other images")
        bad = features.clone()
        bad.view(3, -1)[1, -1] = value
        out = control_cross_attention(bad, control, projector, backend=backend).view(3, 6, 48)
        assert not out[1, -1].isfinite().any()
        out[1, -1] = clean[1, -1]
        assert_same_bits(out, clean, "the other tokens")


@each_backend
def test_nan_control_of_an_empty_image(backend):
    projector = fold("identity", 24)
    features, control = normal(5, 24, key="f"), normal(3, 24, key="control")
    cu = torch.tensor([0, 2, 2, 5])
    want = control_cross_attention(features, control, projector, cu, backend=backend)
    control[1] = float("nan")
    assert_same_bits(control_cross_attention(features, control, projector, cu, backend=backend), want)


@each_backend
@each_form
def test_nothing_to_project(backend, form):
    projector = fold(form, 20, 8)
    width = 20 if form == "identity" else 8
    shapes = [(0, 8, 8, 8), (2, 8, 0, 8)] if form == "conv" else [(0, 5, width), (2, 0, width)]
    for shape in shapes:
        for control in (normal(shape[0], 20, key="control"), None):
            out = control_cross_attention(torch.zeros(shape), control, projector, backend=backend)
            assert out.shape == (0, 20)
    if form != "conv":
        for cu in ([0], [0, 0, 0]):
            control = normal(len(cu) - 1, 20, key="control")
            out = control_cross_attention(torch.zeros(0, width), control, projector, torch.tensor(cu), backend=backend)
            assert out.shape == (0, 20)


def into_case(form: str, dtype: torch.dtype):
    width = {"linear": 12, "conv": 12, "identity": 20}[form]
    shape = (2, 12, 8, 12) if form == "conv" else (12, width)
    cu = None if form == "conv" else torch.tensor([0, 5, 12])
    return (
        normal(*shape, key=form, dtype=dtype),
        normal(2, 20, key="control", dtype=dtype),
        fold(form, 20, 12, dtype),
        cu,
    )


@each_backend
@each_dtype
@each_form
@pytest.mark.parametrize("index", (torch.int32, torch.int64))
@pytest.mark.parametrize("conditioned", (True, False))
def test_into_writes_its_rows_only(backend, dtype, form, index, conditioned):
    """Scattered rows, some skipped, of an embedding buffer whose own rows are apart."""
    features, control, projector, cu = into_case(form, dtype)
    control = control if conditioned else None
    want = control_cross_attention(features, control, projector, cu, backend=backend)
    rows = torch.tensor([9, 0, -1, 14, 3, 15, 7, -5, 1000, 1, 12, 2], dtype=index)
    buffer = torch.full((15, 30), float("nan"), dtype=dtype)
    expected = buffer.clone()
    out = buffer[:, 4:24]
    spread = torch.stack([rows, rows + 1], 1)[:, 0]
    assert control_cross_attention_into(features, control, projector, out, spread, cu, backend=backend) is None
    for token, row in enumerate(rows.tolist()):
        if 0 <= row < 15:
            expected[row, 4:24] = want[token]
    assert_same_bits(buffer, expected)


@each_backend
def test_into_skips_rows_beyond_32_bits(backend):
    """Rows that would be valid if they were cut to 32 bits."""
    features, control, projector, cu = into_case("identity", torch.float32)
    out = torch.full((15, 20), float("nan"))
    rows = torch.tensor([1 << 32, -(1 << 32), (1 << 32) + 3, 1 << 62, -(1 << 63), (1 << 63) - 1] * 2)
    control_cross_attention_into(features, control, projector, out, rows, cu, backend=backend)
    assert out.isnan().all()


@each_backend
def test_into_equal_rows_and_empty_buffer(backend):
    features, control, projector, cu = into_case("identity", torch.float32)
    want = control_cross_attention(features, control, projector, cu, backend=backend)
    out = torch.full((4, 20), float("nan"))
    control_cross_attention_into(features, control, projector, out, torch.full((12,), 2), cu, backend=backend)
    assert any(torch.equal(out[2], row) for row in want)
    assert out[[0, 1, 3]].isnan().all()
    control_cross_attention_into(features, control, projector, out[:0], torch.arange(12), cu, backend=backend)


@each_backend
@each_dtype
@pytest.mark.parametrize("shuffle", (False, True))
def test_into_the_buffer_that_holds_the_features(backend, dtype, shuffle):
    """Either it is refused, or the result is what separate buffers give."""
    features, control, projector, cu = into_case("identity", dtype)
    want = control_cross_attention(features, control, projector, cu, backend=backend)
    buffer = torch.full((20, 20), float("nan"), dtype=dtype)
    buffer[3:15] = features
    rows = torch.from_numpy(numbers("overlap").permutation(12)) + 3 if shuffle else torch.arange(3, 15)
    expected = buffer.clone()
    try:
        control_cross_attention_into(buffer[3:15], control, projector, buffer, rows, cu, backend=backend)
    except ValueError:
        assert_same_bits(buffer, expected, "buffer after a refusal")
    else:
        expected[rows] = want
        assert_same_bits(buffer, expected)


@each_backend
def test_offsets_beyond_32_bits(backend):
    features, control, projector, cu = into_case("identity", torch.float32)
    want = control_cross_attention(features, control, projector, cu, backend=backend)
    stride = (1 << 31) // 4
    storage = virtual_bytes(12 * stride * 4 // 8).view(torch.float32)
    far = storage.as_strided((12, 20), (stride // 8, 1))
    far.copy_(features)
    assert_same_bits(control_cross_attention(far, control, projector, cu, backend=backend), want)
    out = virtual_bytes(5 * stride * 4).view(torch.float32).as_strided((5, 20), (stride, 1))
    control_cross_attention_into(features, control, projector, out, torch.arange(12) % 5, cu, backend=backend)
    assert_same_bits(out[4].clone(), want[9] if torch.equal(out[4], want[9]) else want[4])


@each_backend
@each_dtype
@each_form
def test_runs_repeat_and_inputs_stay(backend, dtype, form):
    features, control, projector, cu = into_case(form, dtype)
    tensors = [features, control, *(t for t in projector.tensors() if t is not None)]
    kept = [t.clone() for t in tensors]
    first = control_cross_attention(features, control, projector, cu, backend=backend)
    assert_same_bits(first, control_cross_attention(features, control, projector, cu, backend=backend))
    for tensor, before in zip(tensors, kept, strict=True):
        assert_same_bits(tensor, before)


@pytest.mark.parametrize("form", ("linear", "conv"))
def test_fold_accepts_any_layout(form):
    params = parameters(form, 20, 12)
    moved = dict(params)
    weight = params["feature"][0]
    order = (2, 3, 1, 0) if form == "conv" else (1, 0)
    inverse = [order.index(i) for i in range(len(order))]
    moved["feature"] = weight.permute(order).contiguous().permute(inverse), params["feature"][1]
    moved["condition"] = params["condition"][0].T.contiguous().T, params["condition"][1]
    folded = (fold_projector(form, **given, score=True) for given in (moved, params))
    for a, b in zip(*(projector.tensors() for projector in folded), strict=True):
        assert_same_bits(a, b)


@each_dtype
@pytest.mark.parametrize("form", ("linear", "conv"))
def test_score_maps_give_the_score(dtype, form):
    """LN(x)·u + β with u, β from the folded maps is f·k, up to the float32 of what is stored."""
    params = parameters(form, 40, 12, dtype)
    assert fold_projector(form, **params, score=False).score_weight is None
    projector = fold_projector(form, **params, score=True)
    assert {projector.score_weight.dtype, projector.score_bias.dtype} == {torch.float32}
    weight, bias = projector.feature_weight.double(), projector.feature_bias.double()
    n = normal(40, key="n").double()
    k = projector.condition_weight.double() @ n + projector.condition_bias.double()
    x = normal(weight.shape[1], key="x").double()
    *u, beta = projector.score_weight.double() @ n + projector.score_bias.double()
    score = (torch.stack(u) * x).sum() + beta
    torch.testing.assert_close(score, (weight @ x + bias) @ k, rtol=1e-5, atol=1e-5)


def test_identity_has_no_score_maps():
    assert fold_projector("identity", **parameters("identity", 12), score=True).score_weight is None
