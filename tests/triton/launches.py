"""Launches of few and large programs: a program costs the interpreter milliseconds whatever its size."""

from __future__ import annotations

import pytest

from vpt_kernels.append_visual_kv import triton as append_kernels
from vpt_kernels.control_cross_attention import triton as control_kernels
from vpt_kernels.control_cross_attention import triton_condition
from vpt_kernels.roi_patch_embed import triton as two_launches
from vpt_kernels.roi_patch_embed import triton_fused
from vpt_kernels.roi_patch_embed.triton import Product


def append(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(append_kernels, "LAUNCHES", dict.fromkeys(append_kernels.LAUNCHES, (64, 1)))


def control(monkeypatch: pytest.MonkeyPatch, gemm: tuple[int, ...] = (64, 64, 64, 4, 1), condition: int = 64) -> None:
    """gemm: a line of `GEMM_LAUNCHES`. condition: outputs of a program that projects the control state."""
    launches = {"one image": (1, condition, 512, 4), "images": (4, condition, 512, 4)}
    monkeypatch.setattr(control_kernels, "GEMM_LAUNCHES", dict.fromkeys(control_kernels.GEMM_LAUNCHES, gemm))
    monkeypatch.setattr(triton_condition, "CONDITION_LAUNCHES", launches)
    monkeypatch.setattr(control_kernels, "IDENTITY_LAUNCHES", {"narrow": (64, 4), "wide": (64, 8)})


def roi(monkeypatch: pytest.MonkeyPatch) -> None:
    product = Product(128, 128, 256, 4, 1)
    monkeypatch.setattr(two_launches, "PRODUCTS", dict.fromkeys(two_launches.PRODUCTS, product))
    monkeypatch.setattr(triton_fused, "STRIP", triton_fused.STRIP._replace(columns=128))
