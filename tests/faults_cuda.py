"""One-line faults in the CUDA sources: name, file, old text, new text, suites of `tests/cuda/test_executed.py`."""

from __future__ import annotations

PIXELS, TOKENS, CONTROL, APPEND, OWN = "pixels", "tokens", "control", "append", "own"

CUDA_ROWS: list[tuple[str, str, str, str, str]] = [
    (
        "passes truncate", "cuda/resample.cuh",
        "      const int32_t* weights = taps_b.weights + b * layout.taps_b;\n"
        "      int32_t sums[3] = {1 << (kPrecisionBits - 1), 1 << (kPrecisionBits - 1), 1 << (kPrecisionBits - 1)};",
        "      const int32_t* weights = taps_b.weights + b * layout.taps_b;\n      int32_t sums[3] = {0, 0, 0};",
        PIXELS,
    ),
    (
        "intermediate not clamped", "cuda/resample.cuh",
        "value < 0 ? 0 : value > 255 ? 255 : value", "value > 255 ? 255 : value", PIXELS,
    ),
    (
        "no barrier between the passes", "cuda/resample.cuh",
        "      for (int c = 0; c < 3; ++c) out[c] = clip8(sums[c]);\n    }\n    __syncthreads();\n\n",
        "      for (int c = 0; c < 3; ++c) out[c] = clip8(sums[c]);\n    }\n\n", PIXELS,
    ),
    (
        "no barrier after the weights", "cuda/resample.cuh",
        "    __syncthreads();\n\n    const int64_t stride_a", "\n    const int64_t stride_a", PIXELS,
    ),
    (
        "pass order ignored", "cuda/resample.cuh",
        "const bool down_first = r.vertical_first != 0;\n  const WindowAxis axis_a",
        "const bool down_first = false;\n  const WindowAxis axis_a", PIXELS,
    ),
    ("window's top ignored", "cuda/resample.cuh", "vertical ? r.window_top : r.window_left", "0", PIXELS),
    (
        "NEAREST steps left out", "cuda/resample.cuh",
        "if (sizes[step] != sizes[step - 1]) i =", "if (sizes[step] < 0) i =", PIXELS,
    ),
    (
        "crop's offset left out", "cuda/resample.cuh",
        "work.image.base + r.top * work.image.row_stride + r.left", "work.image.base + r.left", PIXELS,
    ),
    (
        "image offset cut to 32 bits", "cuda/resample.cuh",
        "crop + (layout.nearest ? source_b[line] : low_b + line) * stride_b",
        "crop + static_cast<int32_t>((layout.nearest ? source_b[line] : low_b + line) * stride_b)", PIXELS,
    ),
    (
        "channel offset cut to 32 bits", "cuda/resample.cuh",
        "weights[t] * pixel[c * channel]", "weights[t] * pixel[static_cast<int32_t>(c * channel)]", PIXELS,
    ),
    (
        "tile larger than shared memory", "cuda/resample.cuh",
        "3 * static_cast<int64_t>(tile) * span_b;", "2 * static_cast<int64_t>(tile) * span_b;", PIXELS,
    ),
    ("padding not centred", "cuda/resample.cuh", "padding[3] = {kPixelZero, kPixelZero, kPixelZero}",
     "padding[3] = {0, 0, 0}", TOKENS),
    (
        "patch bias dropped", "cuda/resample.cuh",
        "part < kBiasParts ? 1.f : 0.f", "part < kBiasParts ? 0.f : 0.f", TOKENS,
    ),
    (
        "bias of one part", "cuda/resample.cuh",
        "rest = value - value == 0.f ? rest - value : 0.f;", "rest = 0.f;", TOKENS,
    ),
    ("bias beyond float16 becomes NaN", "cuda/resample.cuh", "value - value == 0.f ? rest - value : 0.f",
     "rest - value", OWN),
    (
        "full bias for padded patches", "cuda/resample.cuh",
        "const int32_t entry = bias_entry(r, patch_y, patch_x);", "const int32_t entry = p;", TOKENS,
    ),
    (
        "chunks of taps repeat the first", "cuda/resample.cuh",
        "weights[t] = axis.weight(i, begin + t, total);", "weights[t] = axis.weight(i, t, total);", OWN,
    ),
    (
        "lines of the second pass not counted from the first", "cuda/resample.cuh",
        "first + begin + t - p.in_begin", "first + begin + t", OWN,
    ),
    (
        "wrong strides between the passes", "cuda/roi_patch_embed.cu",
        "down_first ? 3 : line_stride, down_first ? line_stride : 3", "line_stride, 3", OWN,
    ),
    (
        "launch forgets the last regions", "cuda/roi_patch_embed.cu",
        "if (p.works == kRegionsPerLaunch ||", "if (p.works > kRegionsPerLaunch ||", OWN,
    ),
    (
        "every launch begins with the first region's blocks", "cuda/roi_patch_embed.cu",
        "p.work[p.works++].first_block = p.blocks;", "p.work[p.works++].first_block = 0;", PIXELS,
    ),
    ("row of the output ignored", "cuda/roi_patch_embed.cu", "row + target.first_row", "target.first_row", TOKENS),
    (
        "LayerNorm eps 1e-6", "cuda/control_cross_attention.cuh",
        "kLayerNormEps = 1e-5f", "kLayerNormEps = 1e-6f", OWN,
    ),
    (
        "condition bias dropped", "cuda/control_cross_attention.cuh",
        "dot + to_float(static_cast<const T*>(p.bias)[output])", "dot", CONTROL,
    ),
    (
        "rank one without the residual", "cuda/control_cross_attention.cuh",
        "fmaf(score, y.at[j], to_float(x.at[j]))", "score * y.at[j]", CONTROL,
    ),
    (
        "another image's condition", "cuda/control_cross_attention.cuh",
        "if (token < p.ends[middle + 1])", "if (token <= p.ends[middle + 1])", CONTROL,
    ),
    (
        "segments without a bound", "cuda/control_cross_attention.cuh", "high = p.images - 1;", "high = p.images;", OWN,
    ),
    (
        "row beyond the buffer stored", "cuda/control_cross_attention.cuh",
        "if (row < 0 || row >= p.out_rows) return;", "if (row < 0 || row > p.out_rows) return;", CONTROL,
    ),
    (
        "negative row stored", "cuda/control_cross_attention.cuh",
        "if (row < 0 || row >= p.out_rows) return;", "if (row < -1 || row >= p.out_rows) return;", CONTROL,
    ),
    (
        "no barrier between two sums", "cuda/control_cross_attention.cuh",
        "total += partial[w];\n  __syncthreads();\n", "total += partial[w];\n", CONTROL,
    ),
    (
        "scalar path sums in its own order", "cuda/control_cross_attention.cuh",
        "  constexpr int V = 16 / sizeof(T);\n  wait_for_kernel_before();",
        "  constexpr int V = kWide ? 16 / sizeof(T) : 1;\n  wait_for_kernel_before();", CONTROL,
    ),
    (
        "height and width positions swapped", "cuda/append_visual_kv.cuh",
        "p.positions[p.sections.axis(i)][token]", "p.positions[(3 - p.sections.axis(i)) % 3][token]", APPEND,
    ),
    (
        "rotation backwards", "cuda/append_visual_kv.cuh",
        "to_float(a.at[i]) * c - to_float(b.at[i]) * s", "to_float(a.at[i]) * c + to_float(b.at[i]) * s", APPEND,
    ),
    (
        "position not clamped from below", "cuda/append_visual_kv.cuh",
        "row = row < 0 ? 0 : row < p.table_rows", "row = row < 0 ? 1 : row < p.table_rows", OWN,
    ),
    (
        "position not clamped from above", "cuda/append_visual_kv.cuh",
        "row < p.table_rows ? row : p.table_rows - 1", "row < p.table_rows ? row : 0", OWN,
    ),
    ("slot not checked", "cuda/append_visual_kv.cuh", "p.k_layout.holds(slot) ? p.kv_heads : 0",
     "slot >= 0 ? p.kv_heads : 0", APPEND),
    (
        "slot cut to 32 bits", "cuda/append_visual_kv.cuh",
        "const int64_t slot = p.slots[token];", "const int64_t slot = static_cast<int32_t>(p.slots[token]);", OWN,
    ),
    (
        "K's cache layout used for V", "cuda/append_visual_kv.cuh",
        "v_cache + p.v_layout.offset(slot, h) + at", "v_cache + p.k_layout.offset(slot, h) + at", APPEND,
    ),
    (
        "no barrier after the gather", "cuda/append_visual_kv.cuh",
        "  __syncthreads();\n  const int64_t slot", "  const int64_t slot", APPEND,
    ),
    (
        "unrotated part dropped", "cuda/append_visual_kv.cuh",
        "rest = (p.dim - 2 * p.half) / V", "rest = 0", APPEND,
    ),
    (
        "float8 scale of the first head", "cuda/append_visual_kv.cuh",
        "p.v_scale[h * p.v_scale_stride]", "p.v_scale[0]", APPEND,
    ),
    (
        "float8 scaled by the reciprocal", "cuda/append_visual_kv.cuh",
        "from_float<Stored>(to_float(x.at[i]) / scale)", "from_float<Stored>(to_float(x.at[i]) * (1.f / scale))",
        APPEND,
    ),
    (
        "norm of half a head", "cuda/append_visual_kv.cuh",
        "for (int i = lane; i < p.dim; i += kWarp) squares", "for (int i = lane; i < p.half; i += kWarp) squares",
        APPEND,
    ),
    (
        "k normalised by q's roots", "cuda/append_visual_kv.cuh",
        "k_norm{static_cast<const T*>(p.k_norm), inverses + p.q_heads}",
        "k_norm{static_cast<const T*>(p.k_norm), inverses}", APPEND,
    ),
    ("V's stride taken from K", "cuda/append_visual_kv.cu", "p.v = heads(c.v,", "p.v = heads(c.k,", APPEND),
]  # fmt: skip
