import torch
import torch.nn.functional as F


def run(image, box, size, cells, weight, bias):
    """Crop, Pillow's two-pass uint8 BICUBIC resize, then (bytes − 128)/256 · weightᵀ + bias of the patches at `cells`.

    `image` holds bytes: the schema knows no uint8, so they are viewed as int8.
    """
    left, top, right, bottom = box.tolist()
    pixels = image.view(torch.uint8)[top:bottom, left:right].int()
    height, width = size.tolist()
    pixels = _resized(pixels.transpose(0, 1), width).transpose(0, 1)
    pixels = _resized(pixels, height)
    patch = round((weight.shape[1] // 3) ** 0.5)
    blocks = pixels.reshape(height // patch, patch, width // patch, patch, 3).transpose(1, 2)
    rows = blocks[cells[:, 0], cells[:, 1]].flatten(1)
    return (F.linear((rows.float() - 128) / 256, weight.float()) + bias).to(weight.dtype)


def _resized(pixels, out):
    """Return integers [n, m, 3] resampled along dimension 0 to `out`, rounded and clamped to bytes again."""
    length = pixels.shape[0]
    if length == out:
        return pixels
    scale = length / out
    stretch = max(scale, 1.0)
    centre = (torch.arange(out, dtype=torch.float64, device=pixels.device) + 0.5) * scale
    first = (centre - 2 * stretch + 0.5).long().clamp(min=0)
    last = (centre + 2 * stretch + 0.5).long().clamp(max=length)
    taps = torch.arange(int((last - first).max()), device=pixels.device)
    x = ((taps + first[:, None] - centre[:, None] + 0.5) / stretch).abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = -0.5 * (((x - 5) * x + 8) * x - 4)
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    weights = torch.where(first[:, None] + taps < last[:, None], weights, 0.0)
    fixed = weights / weights.sum(1, keepdim=True) * (1 << 22)
    fixed = torch.where(fixed < 0, fixed - 0.5, fixed + 0.5).long()  # towards zero: half away from it
    total = torch.full((out, *pixels.shape[1:]), 1 << 21, dtype=torch.int64, device=pixels.device)
    for tap in range(len(taps)):
        total += fixed[:, tap, None, None] * pixels[(first + tap).clamp(max=length - 1)]
    return (total >> 22).clamp(0, 255).int()
