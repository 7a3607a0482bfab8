"""The three operators against plain PyTorch, without the rest of this benchmark: `python bench/minimal.py`.

All that a call returns or writes is compared before it is timed; both calls then take turns, and the median of the
rounds' ratios is printed.
"""

import statistics
import time

import torch
import torch.nn.functional as F

import vpt_kernels as vpt

# A crop of a photo, resized, normalised and embedded. PyTorch's resize takes another grey level here and there.
smooth = F.interpolate(torch.rand(1, 3, 12, 16), (768, 1024), mode="bilinear")[0]
image, conv = (smooth * 255).byte().permute(1, 2, 0).contiguous(), torch.randn(1280, 3, 2, 14, 14) / 34
plan = vpt.plan_regions([(768, 1024)], [(0, 100, 80, 900, 700)], vpt.qwen2_vl_policy(longest_edge=2048))
embed, flat = vpt.fold_patch_weight(conv, (0.5,) * 3, (0.25,) * 3), conv.sum(2).flatten(1)


def eager_embed():
    (rows, columns), crop = plan.grids[0], image[80:700, 100:900].permute(2, 0, 1)[None]
    pixels = F.interpolate(crop, (rows * 14, columns * 14), mode="bicubic", antialias=True)[0]
    blocks = ((pixels / 255 - 0.5) / 0.25).view(3, rows // 2, 2, 14, columns // 2, 2, 14)
    return (F.linear(blocks.permute(1, 4, 2, 5, 0, 3, 6).reshape(rows * columns, -1), flat),)


# CLIP features under the hidden state h of a control token: f + (f · k) k with k = W LayerNorm(h) + b.
features, h = torch.randn(252, 1536), torch.randn(1, 1536)
norm, linear = (torch.rand(1536), torch.randn(1536)), (torch.randn(1536, 1536) / 39, torch.randn(1536))
projector = vpt.fold_projector("identity", condition_norm=norm, condition=linear)


def eager_project():
    k = F.linear(F.layer_norm(h, (1536,), *norm), *linear)
    return (features + (features @ k.T) * k,)


# Rotation by three position rows, 16, 24 and 24 pairs of channels each, and the write into caches of 8192 rows.
q, k, v = (torch.randn(270, heads, 128) for heads in (12, 2, 2))
table, positions, slots = vpt.rotary_table(8192, 128), torch.randint(0, 8192, (3, 270)), torch.arange(350, 620)
caches = torch.zeros(8192, 2, 128), torch.zeros(8192, 2, 128)
halves = (half.split([16, 24, 24], -1) for half in table[positions].chunk(2, -1))
cos, sin = (torch.cat([part[axis] for axis, part in enumerate(parts)] * 2, -1)[:, None] for parts in halves)


def eager_append():
    rotated = [x * cos + torch.cat([-x[..., 64:], x[..., :64]], -1) * sin for x in (q, k)]
    caches[0].index_copy_(0, slots, rotated[1])
    caches[1].index_copy_(0, slots, v)
    return rotated[0], *caches


CALLS = (
    (lambda: (vpt.roi_patch_embed([image], plan, embed),), eager_embed, 3e-2),
    (lambda: (vpt.control_cross_attention(features, h, projector),), eager_project, 1e-5),
    (lambda: (vpt.append_visual_kv(q, k, v, table, positions, slots, *caches), *caches), eager_append, 1e-5),
)


def seconds(call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def main(rounds: int = 41) -> None:
    for ours, eager, tolerance in CALLS:
        results = zip([x.clone() for x in ours()], eager(), strict=True)
        error = max(((mine - theirs).norm() / theirs.norm()).item() for mine, theirs in results)
        assert error < tolerance, f"{eager.__name__}: the results differ by {error:.0e}"
        pairs = [(seconds(ours), seconds(eager)) for _ in range(rounds)]
        ratio, own = statistics.median(b / a for a, b in pairs), statistics.median(a for a, _ in pairs)
        print(f"{eager.__name__:14} {ratio:5.2f} times its speed, ours {own * 1e3:.3f} ms, differing by {error:.0e}")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
