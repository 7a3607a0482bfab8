"""One-line faults for `tests.mutate`: what is broken, where, and which test files must notice."""

from __future__ import annotations

from dataclasses import dataclass

from tests.faults_cuda import CUDA_ROWS
from tests.faults_patch import PATCH_ROWS
from tests.faults_triton import TRITON_ROWS


@dataclass(frozen=True)
class Fault:
    """`old`, which occurs once in `file`, becomes `new`.

    backend is "reference", "cpp", "cuda" or "triton", whose tests must then fail, or "both" for code that the first two
    share.
    """

    name: str
    backend: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


PATCHES, EMBED = "test_roi_patches", "test_roi_patch_embed"
ORDER, PLANS = "test_pass_order", "test_plan_regions"
CONTROL = "test_control_cross_attention"
APPEND, LAYOUTS, FORMATS = "test_append_visual_kv", "test_append_layouts", "test_append_formats"
NORM = "test_append_norm"
VARIANTS, APPEND_ERRORS, CHECKS = "test_append_variants", "test_append_bad_input", "test_check_mode"
SIMD, BYTES = "test_simd", "test_byte_products"

Row = tuple[str, str, str, str, str]

ROI: list[Row] = [
    # name, file, old, new, test files
    (
        "no rounding between the passes", "roi_patch_embed/reference.py",
        "pixels = _resample_rows(pixels.transpose(0, dim), size, name).transpose(0, dim)",
        "pixels = torch.nn.functional.interpolate(pixels.permute(2, 0, 1)[None].float(), (row[c.RESIZED_HEIGHT], "
        "row[c.RESIZED_WIDTH]), mode=name, antialias=True)[0].permute(1, 2, 0).round().clamp(0, 255)",
        PATCHES,
    ),
    (
        "passes truncate", "roi_patch_embed/reference.py",
        "1 << (PRECISION_BITS - 1)", "0", PATCHES,
    ),
    (
        "passes truncate", "cpu/simd_generic.cpp",
        "int32_t r = 1 << (kPrecisionBits - 1), g = r, b = r;", "int32_t r = 0, g = r, b = r;", SIMD,
    ),
    (
        "intermediate not clamped", "roi_patch_embed/reference.py",
        "(total >> PRECISION_BITS).clamp(0, 255).to(torch.uint8)", "(total >> PRECISION_BITS).to(torch.uint8)", PATCHES,
    ),
    (
        "intermediate not clamped", "cpu/simd_generic.cpp",
        "value < 0 ? 0 : value > 255 ? 255 : value", "value > 255 ? 255 : value", SIMD,
    ),
    ("a = -0.75", "roi_patch_embed/reference.py", "a, x = -0.5, x.abs()", "a, x = -0.75, x.abs()", PATCHES),
    ("a = -0.75", "math/resample.h", "double a = -0.5;", "double a = -0.75;", PATCHES),
    (
        "NEAREST in closed form", "roi_patch_embed/reference.py",
        "position += step", "position = step * (len(indices) + 0.5)", PATCHES,
    ),
    (
        "NEAREST in closed form", "math/resample.h",
        "in_size - 1;\n    position += step;", "in_size - 1;\n    position = step * (i + 1.5);", PATCHES,
    ),
    (
        "taps beyond the crop's edge", "roi_patch_embed/reference.py",
        "(center + support + 0.5).to(torch.int64).clamp(max=in_size) - first",
        "(center + support + 0.5).to(torch.int64) - first", PATCHES,
    ),
    ("taps beyond the crop's edge", "math/resample.h", "return i > in_size ? in_size : i;", "return i;", PATCHES),
    (
        "pass order ignored", "roi_patch_embed/reference.py",
        "reversed(passes) if row[c.VERTICAL_FIRST] else passes", "passes", ORDER,
    ),
    (
        "pass order ignored", "cpu/resampler.h",
        "across_first = !region_->vertical_first || down_.identity;", "across_first = true;", ORDER,
    ),
    (
        "full bias for padded patches", "roi_patch_embed/reference.py",
        "index = torch.where(by_row < patch, by_row, (patch + 1) + by_column)",
        "index = torch.full_like(by_row, patch)", EMBED,
    ),
    (
        "full bias for padded patches", "math/plan.h",
        "tall < p ? tall : wide < p ? p + 1 + wide : p", "p", EMBED,
    ),
    (
        "padding not centred", "roi_patch_embed/reference.py",
        "pixels.new_full((height, width, 3), PIXEL_ZERO)", "pixels.new_zeros((height, width, 3))", EMBED,
    ),
    (
        "padding not centred", "cpu/roi_patch_embed.cpp",
        "if constexpr (std::is_same_v<T, uint8_t>) zero = kPixelZero;",
        "if constexpr (std::is_same_v<T, uint8_t>) zero = kPixelZero; "
        "else std::fill_n(reinterpret_cast<char*>(&zero), sizeof(T), 1);", EMBED,
    ),
    (
        "outlying weights in three slices", "cpu/int8_product.h",
        "slices_ = outliers ? 4 : 3;", "slices_ = 3;", BYTES,
    ),
    (
        "NaN of a weight lost", "cpu/int8_product.h",
        "if (square != square) scales_[r] = square;", "", BYTES,
    ),
    (
        "bias rounded to bfloat16", "cpu/bias_columns.h",
        "kBiasParts = 3", "kBiasParts = 1", EMBED,
    ),
    (
        "merge blocks column by column", "roi_patch_embed/reference.py",
        "permute(0, 3, 1, 4, 2, 5, 6)", "permute(0, 3, 4, 1, 2, 5, 6)", PATCHES,
    ),
    (
        "merge blocks column by column", "math/plan.h",
        "return (block * m + y % m) * m + x % m;", "return (block * m + x % m) * m + y % m;", PATCHES,
    ),
    (
        "window's top ignored", "roi_patch_embed/reference.py",
        "pixels[row[c.WINDOW_TOP] :, row[c.WINDOW_LEFT] :]", "pixels[:, row[c.WINDOW_LEFT] :]", PATCHES,
    ),
    (
        "window's top ignored", "cpu/resampler.cpp",
        "Axis(steps[2].height, region.resized.height, region.filter), region.window_top,",
        "Axis(steps[2].height, region.resized.height, region.filter), 0,", PATCHES,
    ),
    (
        "patch bias dropped", "roi_patch_embed/reference.py",
        "(product + _bias_rows(plan, bias))", "product", EMBED,
    ),
    (
        "patch bias dropped", "cpu/roi_patch_embed.cpp",
        "const float* bias = biases + entry * embed;", "const float* bias = biases + 0 * entry;", EMBED,
    ),
    (
        "rounded before the bias", "roi_patch_embed/reference.py",
        "(product + _bias_rows(plan, bias))", "(product.to(weight.dtype) + _bias_rows(plan, bias))", EMBED,
    ),
    (
        "bias of the unrounded weight", "roi_patch_embed/api.py",
        "shift = folded.double() *", "shift = (wide.permute(0, 2, 3, 1) * (PIXEL_SCALE / (255 * std_t))) *", EMBED,
    ),
    ("one temporal slice", "roi_patch_embed/api.py", "wide = wide.sum(2)", "wide = wide[:, :, 0]", EMBED),
    (
        "longest edge rounded", "roi_patch_embed/geometry.py",
        "int(width * factor), int(height * factor)", "round(width * factor), round(height * factor)", PLANS,
    ),
    (
        "AVX-512: a limb dropped", "cpu/simd_avx512.cpp",
        "d0[i] = _mm512_dpbusd_epi32(d0[i], taps[i], _mm512_set1_epi32(words[0]));", "", SIMD,
    ),
    (
        "AVX2: a limb dropped", "cpu/simd_avx2.cpp",
        "low = _mm256_add_epi32(low, _mm256_madd_epi16(taps, lanes(packed[0], packed[1])));", "", SIMD,
    ),
]  # fmt: skip

CONTROL_ROWS: list[Row] = [
    (
        "LayerNorm eps 1e-6", "control_cross_attention/reference.py",
        "LAYER_NORM_EPS = 1e-5", "LAYER_NORM_EPS = 1e-6", CONTROL,
    ),
    ("LayerNorm eps 1e-6", "cpu/simd_loops.h", "kLayerNormEps = 1e-5f", "kLayerNormEps = 1e-6f", CONTROL),
    (
        "variance over n - 1", "cpu/simd_loops.h",
        "squares / n + kLayerNormEps", "squares / (n - 1) + kLayerNormEps", CONTROL,
    ),
    (
        "feature bias dropped", "control_cross_attention/reference.py",
        "return linear(x.flatten(0, -2), weight, bias)", "return linear(x.flatten(0, -2), weight)", CONTROL,
    ),
    (
        "feature bias dropped", "cpu/control_cross_attention.cpp",
        "loops<float>(simd()).add_bias(f, bias, hidden, wide);", "std::copy(f, f + hidden, wide);", CONTROL,
    ),
    (
        "condition bias dropped", "control_cross_attention/reference.py",
        "k = linear(normed, condition_weight, condition_bias)", "k = linear(normed, condition_weight)", CONTROL,
    ),
    (
        "condition bias dropped", "cpu/control_cross_attention.cpp",
        "normed + i * hidden, hidden) + to_float(bias[o]);", "normed + i * hidden, hidden);", CONTROL,
    ),
    (
        "rank one without the residual", "control_cross_attention/reference.py",
        "return f + a[:, None] * k", "return a[:, None] * k", CONTROL,
    ),
    (
        "rank one without the residual", "cpu/simd_loops.h",
        "VPT_FMA(score, k[i], to_float(f[i]))", "score * k[i]", CONTROL,
    ),
    (
        "another image's condition", "control_cross_attention/reference.py",
        "k.repeat_interleave(cu_seqlens.diff(), 0", "k.roll(1, 0).repeat_interleave(cu_seqlens.diff(), 0", CONTROL,
    ),
    (
        "another image's condition", "cpu/control_cross_attention.cpp",
        "(image == nullptr ? token / per_image : image[token])", "(image == nullptr ? token / per_image : 0)", CONTROL,
    ),
    (
        "convolution columns (kx, ky, c)", "control_cross_attention/reference.py",
        "4, channels).transpose(2, 3)", "4, channels).permute(0, 1, 3, 4, 2, 5)", CONTROL,
    ),
    (
        "convolution columns (kx, ky, c)", "cpu/control_cross_attention.cpp",
        "(ky * kKernel + i % kKernel) * channels", "(i % kKernel * kKernel + ky) * channels", CONTROL,
    ),
    (
        "convolution columns (c, ky, kx)", "control_cross_attention/api.py",
        "weight.permute(0, 2, 3, 1).reshape(hidden, -1)", "weight.reshape(hidden, -1)", CONTROL,
    ),
    (
        "skipped rows shift the others", "control_cross_attention/reference.py",
        "result[valid]", "result[: int(valid.sum())]", CONTROL,
    ),
    (
        "row beyond the buffer written to its last", "cpu/control_cross_attention.cpp",
        "return r < 0 || r >= out.size(0) ? nullptr : mutable_data<T>(out) + r * out.stride(0);",
        "return r < 0 || out.size(0) == 0 ? nullptr : mutable_data<T>(out) + std::min(r, out.size(0) - 1) * "
        "out.stride(0);",
        CONTROL,
    ),
    (
        "negative row wraps", "control_cross_attention/reference.py",
        "valid = (rows >= 0) & (rows < out.shape[0])", "valid = rows < out.shape[0]", CONTROL,
    ),
    (
        "negative row wraps", "cpu/control_cross_attention.cpp",
        "const int64_t r = rows.base == nullptr ? token : rows[token];",
        "int64_t r = rows.base == nullptr ? token : rows[token]; r += r < 0 ? out.size(0) : 0;", CONTROL,
    ),
    (
        "row cut to 32 bits", "cpu/control_cross_attention.cpp",
        "const int64_t r = rows.base == nullptr", "const int32_t r = rows.base == nullptr", CONTROL,
    ),
]  # fmt: skip

APPEND_ROWS: list[Row] = [
    (
        "height and width sections swapped", "append_visual_kv/reference.py",
        "return [axis for axis, count in enumerate(sections) for _ in range(count)]",
        "return [axis for axis, count in zip((0, 2, 1), sections) for _ in range(count)]", APPEND,
    ),
    (
        "height and width sections swapped", "cpu/append_visual_kv.cpp",
        "table + positions_[1][t] * stride, table + positions_[2][t] * stride};",
        "table + positions_[2][t] * stride, table + positions_[1][t] * stride};", APPEND,
    ),
    (
        "interleaved taken as chunked", "append_visual_kv/reference.py",
        "if not interleaved:", "if sections:", f"{FORMATS} {VARIANTS}",
    ),
    (
        "interleaved taken as chunked", "cpu/append_visual_kv.cpp",
        "if (s.interleaved) {", "if (false) {", f"{FORMATS} {VARIANTS}",
    ),
    (
        "rotation backwards", "append_visual_kv/reference.py",
        "first * cos - second * sin, second * cos + first * sin",
        "first * cos + second * sin, second * cos - first * sin", APPEND,
    ),
    (
        "rotation backwards", "cpu/simd_loops.h",
        "a * cos[i] - b * sin[i], second = b * cos[i] + a * sin[i]",
        "a * cos[i] + b * sin[i], second = b * cos[i] - a * sin[i]", APPEND,
    ),
    (
        "stored at its position", "append_visual_kv/reference.py",
        "_store(k_cache, slots,", "_store(k_cache, positions[0],", APPEND,
    ),
    (
        "stored at its position", "cpu/append_visual_kv.cpp",
        "slot = slots_[t]", "slot = positions_[0][t]", APPEND,
    ),
    (
        "slot of capacity stored", "append_visual_kv/reference.py",
        "(slots < capacity)", "(slots <= capacity)", FORMATS,
    ),
    ("slot of capacity stored", "math/slots.h", "slot < capacity();", "slot <= capacity();", FORMATS),
    (
        "negative slot wraps", "append_visual_kv/reference.py",
        "valid = (slots >= 0) & (slots < capacity)", "valid = slots < capacity", FORMATS,
    ),
    (
        "negative slot wraps", "math/slots.h",
        "slot >= 0 && slot < capacity()", "slot >= -1 && slot < capacity()", FORMATS,
    ),
    (
        "slot cut to 32 bits", "append_visual_kv/reference.py",
        "    page_size = cache.shape[-3]", "    page_size, slots = cache.shape[-3], slots.int()", APPEND,
    ),
    (
        "slot cut to 32 bits", "cpu/append_visual_kv.cpp",
        "slot = slots_[t]", "slot = static_cast<int32_t>(slots_[t])", APPEND,
    ),
    (
        "cache offset cut to 32 bits", "math/slots.h",
        "return (slot / page_size) * page_stride + (slot % page_size) * row_stride + head * head_stride;",
        "return static_cast<int32_t>((slot / page_size) * page_stride + (slot % page_size) * row_stride + "
        "head * head_stride);", FORMATS,
    ),
    (
        "input offset cut to 32 bits", "cpu/append_visual_kv.cpp",
        "v += c_.v.stride(1)", "v += static_cast<int32_t>(c_.v.stride(1))", FORMATS,
    ),
    (
        "input offset of a float8 row cut to 32 bits", "cpu/append_visual_kv.cpp",
        "v + h * c_.v.stride(1)", "v + static_cast<int32_t>(h * c_.v.stride(1))", FORMATS,
    ),
    (
        "K's stride used for V", "cpu/append_visual_kv.cpp",
        "data<T>(c_.v) + t * c_.v.stride(0)", "data<T>(c_.v) + t * c_.k.stride(0)", FORMATS,
    ),
    (
        "K's cache layout used for V", "cpu/append_visual_kv.cpp",
        "layout(cache_layout(c, cache))", "layout(cache_layout(c, c.k_cache))", f"{FORMATS} {LAYOUTS}",
    ),
    (
        "heads and rows of HND mixed", "append_visual_kv/reference.py",
        "cache = cache.transpose(-2, -3)", "cache = cache.transpose(0, 1)", f"{FORMATS} {VARIANTS}",
    ),
    (
        "heads and rows of HND mixed", "calls/append_visual_kv.h",
        "return c.k_cache.dim() - (c.heads_first ? 3 : 2);", "return c.k_cache.dim() - 2;", f"{FORMATS} {VARIANTS}",
    ),
    (
        "bfloat16 truncated", "append_visual_kv/reference.py",
        "rotated.to(dtype)", "(rotated.view(torch.int32) & -0x10000).view(torch.float32).to(dtype)", APPEND,
    ),
    (
        "bfloat16 truncated", "math/rounding.h",
        "(u + 0x7FFFu + ((u >> 16) & 1u)) >> 16", "u >> 16", f"{FORMATS} {APPEND}",
    ),
    (
        "bfloat16 ties away from zero", "math/rounding.h",
        "(u + 0x7FFFu + ((u >> 16) & 1u)) >> 16", "(u + 0x8000u) >> 16", FORMATS,
    ),
    (
        "float8 without the scale", "append_visual_kv/reference.py",
        "(rows.float() / scale.reshape(-1, 1))", "rows.float()", f"{VARIANTS} {FORMATS}",
    ),
    ("float8 without the scale", "cpu/simd_loops.h", "(x[i] / scale)", "(x[i])", f"{VARIANTS} {FORMATS}"),
    (
        "float8 scaled by the reciprocal", "append_visual_kv/reference.py",
        "(rows.float() / scale.reshape(-1, 1))", "(rows.float() * (1 / scale.reshape(-1, 1)))", FORMATS,
    ),
    ("float8 scaled by the reciprocal", "cpu/simd_loops.h", "(x[i] / scale)", "(x[i] * (1.f / scale))", FORMATS),
    (
        "float8 scale of the first head", "append_visual_kv/reference.py",
        "scale.reshape(-1, 1)", "scale.reshape(-1, 1)[:1]", f"{VARIANTS} {FORMATS}",
    ),
    (
        "float8 scale of the first head", "cpu/append_visual_kv.cpp",
        "scales[head * scale_stride]", "scales[0]", f"{VARIANTS} {FORMATS}",
    ),
    (
        "float8 saturated before the scale", "append_visual_kv/reference.py",
        "(rows.float() / scale.reshape(-1, 1)).clamp(-FLOAT8_MAX, FLOAT8_MAX)",
        "(rows.float().clamp(-FLOAT8_MAX, FLOAT8_MAX) / scale.reshape(-1, 1))", f"{VARIANTS} {FORMATS}",
    ),
    (
        "float8 saturated before the scale", "cpu/simd_loops.h",
        "(x[i] / scale)", "((x[i] > 448.f ? 448.f : x[i]) / scale)", f"{VARIANTS} {FORMATS}",
    ),
    (
        "float8 not saturated", "math/rounding.h",
        "magnitude = magnitude > largest ? largest : magnitude;", "static_cast<void>(largest);",
        f"{VARIANTS} {FORMATS}",
    ),
    (
        "float8 keys rounded twice", "append_visual_kv/reference.py",
        "rounded = k.dtype if k_scale is None else torch.float32", "rounded = k.dtype", FORMATS,
    ),
    (
        "unrotated part dropped", "append_visual_kv/reference.py",
        "x[..., 2 * half :].to(dtype)", "torch.zeros_like(x[..., 2 * half :], dtype=dtype)", APPEND,
    ),
    (
        "unrotated part dropped", "cpu/append_visual_kv.cpp",
        "if (x == out || dim_ == 2 * half_) return;", "return;", APPEND,
    ),
    (
        "norm's eps outside the root", "append_visual_kv/reference.py",
        "torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)", "wide.square().mean(-1, keepdim=True).rsqrt()", NORM,
    ),
    (
        "norm of the rotated channels alone", "cpu/append_visual_kv.cpp",
        "data<T>(weight), dim_,", "data<T>(weight), 2 * half_,", NORM,
    ),
    (
        "norm's quotient not rounded", "cpu/simd_loops.h",
        "to_float(weight[i]) * to_float(from_float<T>(to_float(x[i]) * scale))",
        "to_float(weight[i]) * (to_float(x[i]) * scale)", NORM,
    ),
    (
        "k's norm left out before float8", "cpu/append_visual_kv.cpp",
        "if (c_.k_norm.has_value()) k = normalise(k, *c_.k_norm, scratch);", "", NORM,
    ),
    (
        "position at the table's end", "append_visual_kv/reference.py",
        "high >= table.shape[0]", "high > table.shape[0]", APPEND_ERRORS,
    ),
    (
        "position at the table's end", "cpu/append_visual_kv.cpp",
        "high < c.cos_sin.size(0)", "high <= c.cos_sin.size(0)", APPEND_ERRORS,
    ),
    ("checked: slot of capacity", "checks.py", "int(used.max()) >= capacity", "int(used.max()) > capacity", CHECKS),
    (
        "checked: equal slots", "checks.py",
        "used.unique().numel() != used.numel()", "slots.unique().numel() != slots.numel()", CHECKS,
    ),
]  # fmt: skip

SHARED = ("api.py", "geometry.py", "checks.py")


def _fault(name: str, file: str, old: str, new: str, tests: str) -> Fault:
    if file.startswith("cuda/"):
        cases = (f"tests/cuda/test_executed.py::test_suite[{case}]" for case in tests.split(", "))
        return Fault(name, "cuda", f"csrc/{file}", old, new, tuple(cases))
    if file.split("/")[-1].startswith("triton"):
        paths = (f"tests/{test}.py" for test in tests.split())
        return Fault(name, "triton", f"vpt_kernels/{file}", old, new, tuple(paths))
    if tests.startswith("patch/"):
        return Fault(name, "both", f"vpt_kernels/{file}", old, new, (f"tests/{tests}.py",))
    is_python = file.endswith(".py")
    backend = "both" if file.endswith(SHARED) else "reference" if is_python else "cpp"
    paths = (f"tests/{'native' if test == SIMD else 'kernels'}/{test}.py" for test in tests.split())
    return Fault(name, backend, f"{'vpt_kernels' if is_python else 'csrc'}/{file}", old, new, tuple(paths))


FAULTS = tuple(_fault(*row) for row in ROI + CONTROL_ROWS + APPEND_ROWS + CUDA_ROWS + TRITON_ROWS + PATCH_ROWS)
