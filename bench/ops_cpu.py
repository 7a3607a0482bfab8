"""The operators on this CPU against their strongest alternatives: `python -m bench.ops_cpu [--out FILE]`.

Ours and every alternative are timed in turn, round by round, and compared by the median of the rounds' ratios with a
95 % interval of that median. A row is timed only after its result was checked. Every call crops a box never seen.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vpt_kernels import (
    append_visual_kv,
    append_visual_kv_,
    control_cross_attention,
    fold_patch_weight,
    fold_projector,
    plan_regions,
    qwen2_vl_policy,
    roi_patch_embed,
    roi_patches,
    rotary_table,
)

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass
class Row:
    """Median milliseconds, and per alternative the median ratio alternative / ours with its 95 % interval."""

    name: str
    ours_ms: float
    alternatives: dict[str, dict[str, float]] = field(default_factory=dict)


def compare(name: str, ours: Callable[[], object], others: dict[str, Callable[[], object]], rounds: int) -> Row:
    functions = {"ours": ours, **others}
    times: dict[str, list[float]] = {key: [] for key in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for key, function in functions.items():
            begin = time.perf_counter()
            function()
            times[key].append((time.perf_counter() - begin) * 1e3)
    row = Row(name, statistics.median(times["ours"]))
    for key in others:
        ratios = sorted(theirs / own for theirs, own in zip(times[key], times["ours"]))
        # Distribution-free interval of a median: order statistics n/2 ± 0.98·√n.
        half = 0.98 * math.sqrt(rounds)
        low, high = max(0, math.floor(rounds / 2 - half)), min(rounds - 1, math.ceil(rounds / 2 + half))
        row.alternatives[key] = {
            "ms": statistics.median(times[key]),
            "ratio": statistics.median(ratios),
            "low": ratios[low],
            "high": ratios[high],
        }
    return row


def _require_close(name: str, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    error = ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()
    if not error <= tolerance:
        raise SystemExit(f"{name}: relative difference {error:.2e} exceeds {tolerance:.0e}; a wrong row is not timed")


def roi_rows(width: int, height: int, max_pixels: int, dtype: torch.dtype, rounds: int) -> list[Row]:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image, picture = torch.from_numpy(pixels), Image.fromarray(pixels)
    convolution = torch.randn(1280, 3, 2, 14, 14) / 34
    embed = fold_patch_weight(convolution, MEAN, STD, dtype=dtype)
    flat = convolution.reshape(1280, -1).to(dtype)
    policy = qwen2_vl_policy(max_pixels=max_pixels)
    processor = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=max_pixels)
    fresh = count()

    def box() -> tuple[int, int, int, int, int]:
        i = next(fresh)
        return (0, i % 7, i % 3, width - i % 5, height - i % 11)

    def ours(at=None) -> Tensor:
        return roi_patch_embed([image], plan_regions([(height, width)], [at or box()], policy), embed)

    def transformers(at=None) -> Tensor:
        crop = picture.crop((at or box())[1:])
        return F.linear(processor(images=[crop], return_tensors="pt")["pixel_values"].to(dtype), flat)

    def resized(at=None) -> tuple[Tensor, int, int]:
        _, left, top, right, bottom = at = at or box()
        ((rows, columns),) = plan_regions([(height, width)], [at], policy).grids
        crop = image[top:bottom, left:right].permute(2, 0, 1)[None]
        return F.interpolate(crop, (rows * 14, columns * 14), mode="bicubic", antialias=True)[0], rows, columns

    def interpolate(at=None, linear: Callable[..., Tensor] = F.linear) -> Tensor:
        pixels, rows, columns = resized(at)
        blocks = pixels.reshape(3, rows // 2, 2, 14, columns // 2, 2, 14).permute(1, 4, 2, 5, 3, 6, 0)
        centred = (blocks.reshape(rows * columns, -1).to(dtype) - 128) / 256
        return linear(centred, embed.weight).add_(embed.bias[0, -1].to(dtype))

    def onednn(x: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    at = box()
    _require_close("roi_patch_embed", ours(at), transformers(at), 1e-4 if dtype == torch.float32 else 2e-2)
    _require_close("F.interpolate", interpolate(at), transformers(at), 2e-2)
    operand = torch.randn(plan_regions([(height, width)], [at], policy).rows, 588).to(dtype)
    name = f"{width}x{height} {str(dtype).removeprefix('torch.')}"
    others = {"transformers + F.linear": transformers, "F.interpolate + F.linear": interpolate}
    others["GEMM alone (ceiling)"] = lambda: F.linear(operand, embed.weight)
    if dtype == torch.float32 and torch.backends.mkldnn.is_available():
        # F.linear takes MKL for float32; oneDNN is faster on some processors, and less exact.
        others["F.interpolate + oneDNN"] = lambda: interpolate(linear=onednn)
        others["GEMM alone, oneDNN"] = lambda: onednn(operand, embed.weight)
    rows = [compare(f"roi_patch_embed {name}", ours, others, rounds)]
    if dtype == torch.float32:
        patches = lambda: roi_patches([image], plan_regions([(height, width)], [box()], policy))  # noqa: E731
        rows.append(compare(f"roi_patches {name}", patches, {"F.interpolate(uint8)": resized}, rounds))
    return rows


def control_rows(rounds: int) -> list[Row]:
    rows = []
    hidden, width = 1536, 1024
    norm, linear = (torch.rand(hidden), torch.randn(hidden)), (torch.randn(hidden, hidden) / 39, torch.randn(hidden))
    feature_norm = (torch.rand(width), torch.randn(width))
    feature = (torch.randn(hidden, width) / 32, torch.randn(hidden))
    control = torch.randn(1, hidden)
    for form, features in (("identity", torch.randn(1, 252, hidden)), ("linear", torch.randn(1, 256, width))):
        extra = {} if form == "identity" else {"feature_norm": feature_norm, "feature": feature}
        projector = fold_projector(form, condition_norm=norm, condition=linear, **extra)

        def eager(form=form, features=features) -> Tensor:
            f = features
            if form == "linear":
                f = F.linear(F.layer_norm(f, (width,), *feature_norm, 1e-5), *feature)
            k = F.linear(F.layer_norm(control, (hidden,), *norm, 1e-5), *linear)
            return (f + torch.einsum("bso,bo->bs", f, k)[..., None] * k[:, None]).flatten(0, 1)

        def ours(features=features, projector=projector) -> Tensor:
            return control_cross_attention(features, control, projector)

        _require_close(form, ours(), eager(), 1e-5)
        others = {"eager": eager, "torch.compile": torch.compile(eager, fullgraph=True)}
        rows.append(compare(f"control_cross_attention {form} {features.shape[1]}x{hidden}", ours, others, rounds))
    return rows


def append_rows(rounds: int) -> list[Row]:
    from transformers import Qwen2Config, StaticCache
    from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb

    rows = []
    heads, kv_heads, dim, capacity = 12, 2, 128, 8192
    table = rotary_table(capacity, dim)
    config = Qwen2Config(
        num_hidden_layers=1, num_attention_heads=heads, num_key_value_heads=kv_heads, hidden_size=heads * dim
    )
    for tokens in (270, 4096):
        packed = torch.randn(tokens, (heads + 2 * kv_heads) * dim)
        q, k, v = (
            part.unflatten(1, (-1, dim)) for part in packed.split([heads * dim, kv_heads * dim, kv_heads * dim], 1)
        )
        positions = torch.arange(tokens).expand(3, -1) + torch.tensor([[0], [3], [7]])
        slots = torch.arange(tokens) + 100
        caches = [torch.zeros(capacity, kv_heads, dim) for _ in range(2)]
        static = StaticCache(config=config, max_cache_len=capacity)
        # transformers mixes the three position rows once per forward call, not per layer: not counted here.
        halves = (half.split([16, 24, 24], -1) for half in table[positions].chunk(2, -1))
        rows_of = [torch.cat([part[axis] for axis, part in enumerate(parts)], -1) for parts in halves]
        cos, sin = (torch.cat([half, half], -1)[None] for half in rows_of)
        copies = [torch.empty_like(t) for t in (q, k, v)]

        def transformers(q=q, k=k, v=v, cos=cos, sin=sin, static=static) -> Tensor:
            turned = [t.transpose(0, 1)[None] for t in (q, k, v)]
            rotated, keys = apply_rotary_pos_emb(turned[0], turned[1], cos, sin)
            static.update(keys, turned[2], 0)
            static.layers[0].cumulative_length.zero_()
            return rotated[0].transpose(0, 1)

        def ours(q=q, k=k, v=v, positions=positions, slots=slots, caches=caches) -> Tensor:
            return append_visual_kv(q, k, v, table, positions, slots, *caches)

        def in_place(q=q, k=k, v=v, positions=positions, slots=slots, caches=caches) -> None:
            append_visual_kv_(q, k, v, table, positions, slots, *caches)

        def copy(q=q, k=k, v=v, copies=copies) -> None:
            for target, source in zip(copies, (q, k, v)):
                target.copy_(source)

        _require_close("append_visual_kv", ours(), transformers(), 1e-5)
        others = {"transformers rotary + StaticCache": transformers, "copy of the same bytes": copy}
        rows.append(compare(f"append_visual_kv {tokens} tokens", ours, others, rounds))
        rows.append(compare(f"append_visual_kv_ {tokens} tokens", in_place, {"copy of the same bytes": copy}, rounds))
    return rows


def overhead() -> dict[str, float]:
    """Host microseconds per call: planning a region never seen, and the smallest call of each operator."""
    policy = qwen2_vl_policy(longest_edge=512)
    fresh = count()

    def plan() -> object:
        i = next(fresh)
        return plan_regions([(3000, 4000)], [(0, i % 50, 10, 2000 + i % 70, 1500)], policy)

    small = [torch.randn(1, n, 128) for n in (12, 2, 2)]
    caches = [torch.zeros(16, 2, 128) for _ in range(2)]
    table, positions, slots = (
        rotary_table(16, 128),
        torch.zeros(3, 1, dtype=torch.int64),
        torch.zeros(1, dtype=torch.int64),
    )
    norm, linear = (torch.rand(8), torch.randn(8)), (torch.randn(8, 8), torch.randn(8))
    projector = fold_projector("identity", condition_norm=norm, condition=linear)
    features, control = torch.randn(1, 8), torch.randn(1, 8)
    image = torch.zeros(28, 28, 3, dtype=torch.uint8)
    tiny = plan_regions([(28, 28)], [(0, 0, 0, 28, 28)], qwen2_vl_policy(min_pixels=28 * 28))
    calls: dict[str, Callable[[], object]] = {
        "plan_regions": plan,
        "roi_patches (4 patches)": lambda: roi_patches([image], tiny),
        "control_cross_attention (1 token of 8)": lambda: control_cross_attention(features, control, projector),
        "append_visual_kv_ (1 token)": lambda: append_visual_kv_(*small, table, positions, slots, *caches),
    }
    result = {}
    for name, call in calls.items():
        samples = []
        for _ in range(30):
            begin = time.perf_counter()
            for _ in range(100):
                call()
            samples.append((time.perf_counter() - begin) * 1e4)
        result[name] = statistics.median(samples)
    return result


def environment() -> dict[str, object]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    cpu = [
        line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "cpu": cpu[0] if cpu else platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load": os.getloadavg()[0],
        "malloc": os.environ.get("MALLOC_MMAP_THRESHOLD_", "default"),
        "commit": commit.stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the rows as JSON to this file")
    parser.add_argument("--rounds", type=int, default=41)
    arguments = parser.parse_args()
    console, rows = Console(width=140), []
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            rows += roi_rows(512, 384, 12_845_056, dtype, arguments.rounds)
            rows += roi_rows(4000, 3000, 14 * 14 * 4 * 1280, dtype, max(11, arguments.rounds // 3))
        rows += control_rows(arguments.rounds * 3)
        rows += append_rows(arguments.rounds * 3)
        host = overhead()
    settings = environment()
    table = Table("row", "ours ms", "alternative", "ms", "ratio", "95 % interval", title=json.dumps(settings))
    for row in rows:
        for i, (name, other) in enumerate(row.alternatives.items()):
            head = (row.name, f"{row.ours_ms:.3f}") if i == 0 else ("", "")
            interval = f"{other['low']:.2f} … {other['high']:.2f}"
            table.add_row(*head, name, f"{other['ms']:.3f}", f"{other['ratio']:.2f}", interval)
    console.print(table)
    for name, microseconds in host.items():
        console.print(f"{name:<42}{microseconds:8.1f} µs per call")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        result = {"environment": settings, "rows": [asdict(row) for row in rows], "host_us": host}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
