"""Seeds, images, oracles and comparison rules shared by the tests of vpt_kernels."""

from __future__ import annotations

import hashlib
import mmap
import os

import numpy as np
import pytest
import torch
from torch import Tensor

SEED = int(os.environ.get("VPT_TEST_SEED", "20250224"))
"""Every random test derives its generators from this number, which pytest prints in its header."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""In a process with Triton's interpreter, the tests of `tests/kernels` that `tests/triton` imports run on it."""

BACKENDS = ("triton",) if INTERPRETED else tuple(os.environ.get("VPT_TEST_BACKENDS", "reference cpp").split())
"""What the tests of the operators run on; `tests/cuda` points them at the CUDA sources, compiled for the CPU."""
each_backend = pytest.mark.parametrize("backend", BACKENDS)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
each_dtype = pytest.mark.parametrize("dtype", _DTYPES.values(), ids=_DTYPES)
each_model_dtype = pytest.mark.parametrize("dtype", list(_DTYPES.values())[:2], ids=list(_DTYPES)[:2])
"""For full-size work: without units for it, a float16 product takes seconds on a CPU."""

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


REQUIRED = tuple(filter(None, os.environ.get("VPT_REQUIRE", "").split(",")))
"""Tools without which tests must fail, not skip: names separated by commas, e.g. VPT_REQUIRE=triton,nvcc,ninja."""


def require(tool: str, problem: str | None) -> None:
    """Skip the module or test that needs `tool`, saying why; fail where VPT_REQUIRE names it. None: it is there."""
    if problem is not None and tool in REQUIRED:
        raise RuntimeError(f"VPT_REQUIRE names {tool}, but {problem}")
    if problem is not None:
        pytest.skip(f"{tool}: {problem}", allow_module_level=True)


def numbers(*key: object) -> np.random.Generator:
    """A numpy generator for the test that names `key`."""
    digest = hashlib.sha256(repr((SEED, *key)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def random_seed(*key: object) -> torch.Generator:
    """A torch generator for the test that names `key`."""
    return torch.Generator().manual_seed(int(numbers(*key).integers(1 << 62)))


def normal(*shape: int, key: object, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=random_seed(key, shape)) * scale).to(dtype)


def noise(height: int, width: int, *key: object) -> Tensor:
    """uint8 [height, width, 3]: the hardest pixels for a resampler, every rounding and clamp is met."""
    return torch.from_numpy(numbers("noise", height, width, *key).integers(0, 256, (height, width, 3), dtype=np.uint8))


def photo(name: str = "astronaut", longest: int = 512) -> Tensor:
    """uint8 [h, w, 3] natural image that scikit-image ships, thinned to at most `longest` pixels a side."""
    import skimage.data

    image = getattr(skimage.data, name)()
    step = -(-max(image.shape[:2]) // longest)
    return torch.from_numpy(np.ascontiguousarray(image[::step, ::step]))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear in x's dtype; float16 with float32 sums, rounded once, as processors with float16 units do it."""
    wide = torch.float32 if x.dtype == torch.float16 else x.dtype
    bias = None if bias is None else bias.to(wide)
    return torch.nn.functional.linear(x.to(wide), weight.to(wide), bias).to(x.dtype)


def patchify(canvas: Tensor, patch: int, merge: int = 1) -> Tensor:
    """[H, W, C] → [patches, patch·patch·C], rows in (h/m, w/m, m, m) order, columns in (y, x, channel) order."""
    height, width, channels = canvas.shape
    blocks = canvas.reshape(height // patch // merge, merge, patch, width // patch // merge, merge, patch, channels)
    return blocks.permute(0, 3, 1, 4, 2, 5, 6).reshape(-1, patch * patch * channels)


def unpatchify(rows: Tensor, grid: tuple[int, int], patch: int, merge: int = 1) -> Tensor:
    """The inverse of `patchify`; grid is (patches down, patches across)."""
    channels = rows.shape[1] // (patch * patch)
    blocks = rows.reshape(grid[0] // merge, grid[1] // merge, merge, merge, patch, patch, channels)
    return blocks.permute(0, 2, 4, 1, 3, 5, 6).reshape(grid[0] * patch, grid[1] * patch, channels)


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, so that NaN equals NaN and −0 differs from 0."""
    return tensor.detach().flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8)


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "result") -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, (
        f"{what}: {actual.dtype} {tuple(actual.shape)} against {expected.dtype} {tuple(expected.shape)}"
    )
    differs = bits(actual) != bits(expected)
    assert not differs.any(), f"{what}: {int(differs.sum())} of {differs.numel()} bytes differ"


def assert_twice_as_good(actual: Tensor, eager: Tensor, oracle: Tensor, what: str = "result") -> None:
    """The error against the float64 oracle is at most twice that of the same-dtype PyTorch composition.

    16-bit results: the largest error. Where PyTorch happens to be exact, the rounding of the stored result itself
    (half a unit in the last place of the largest value) is still allowed: nothing that returns this dtype can
    promise less. float32 results: the root mean square, because the largest is a matter of the order of summation
    (PyTorch's own differs threefold between two orders of one sum); no single error may stand out tenfold.
    """
    assert actual.dtype == eager.dtype and actual.shape == eager.shape == oracle.shape, what
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    if not oracle.numel():
        return
    ours, theirs = (actual.double() - oracle).abs(), (eager.double() - oracle).abs()
    rounding = half_ulp(oracle, actual.dtype).max().item()
    largest, allowed = ours.max().item(), (2 if actual.itemsize == 2 else 10) * max(theirs.max().item(), rounding)
    assert largest <= allowed, f"{what}: largest error {largest:.3e} exceeds {allowed:.3e} (seed {SEED})"
    if actual.itemsize > 2:
        mean, allowed = (float(2**i * e.square().mean().sqrt()) for i, e in enumerate((ours, theirs)))
        allowed = max(allowed, rounding)
        assert mean <= allowed, f"{what}: rms error {mean:.3e} exceeds {allowed:.3e}, twice PyTorch's (seed {SEED})"


def half_ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Largest rounding error of storing `values` (float64) in `dtype`, elementwise."""
    finfo = torch.finfo(dtype)
    exponent = torch.frexp(values.abs().clamp_min(finfo.tiny))[1]
    return torch.ldexp(torch.full_like(values, finfo.eps / 4), exponent)


def virtual_bytes(size: int) -> Tensor:
    """uint8 [size] of lazily committed memory: only the pages that are touched cost anything."""
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's value; Python before 3.13 does not name it
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=torch.uint8)
