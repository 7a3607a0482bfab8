import torch


def run(q, k, v, cos_sin, positions, slots, k_cache, v_cache):
    """Rotate by M-RoPE in chunked sections (16, 24, 24), then write rotated keys and values to both caches."""
    sections = (16, 24, 24)
    axis = torch.arange(3, device=q.device).repeat_interleave(torch.tensor(sections, device=q.device))
    rows = cos_sin[positions]  # [3, tokens, 128]: cosines, then sines
    cos, sin = (half.gather(0, axis.expand(1, half.shape[1], -1))[0][:, None] for half in rows.chunk(2, -1))

    def rotate(x):
        low, high = x.float().chunk(2, -1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1).to(x.dtype)

    k_out, v_out = k_cache.clone(), v_cache.clone()
    stored = (slots >= 0) & (slots < k_cache.shape[0])
    k_out[slots[stored]] = rotate(k)[stored]
    v_out[slots[stored]] = v[stored]
    return rotate(q), k_out, v_out
