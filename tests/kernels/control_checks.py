"""What every call of `control_cross_attention` must fulfil."""

from __future__ import annotations

from itertools import accumulate

import torch

from tests.helpers import (
    assert_twice_as_good,
    normal,
)
from tests.kernels.control_inputs import composition, parameters
from vpt_kernels import control_cross_attention, fold_projector

RAGGED = {
    "one": [324],
    "three": [4, 324, 64],
    "sixteen": [4, 324, 0, 1, 64, 91, 2, 7, 0, 54, 13, 4, 5, 3, 17, 0],
    "empty ends": [0, 0, 5, 0],
}


def check(form, hidden, shape, lengths, dtype, backend, *, conditioned=True, rounds=1, params=None):
    """Errors of `rounds` draws of features and control are judged together: one key vector alone is luck."""
    width = shape[1] if form == "conv" else shape[-1]
    params = params or parameters(form, hidden, width, dtype)
    projector = fold_projector(form, **params)
    cu = None if lengths is None else [0, *accumulate(lengths)]
    images = len(lengths) if lengths is not None else shape[0] if len(shape) > 2 else 1
    results = []
    for draw in range(rounds):
        features = normal(*shape, key=(form, draw), dtype=dtype)
        control = normal(images, hidden, key=("control", draw), dtype=dtype, scale=3) if conditioned else None
        results.append(
            (
                control_cross_attention(features, control, projector, cu and torch.tensor(cu), backend=backend),
                composition(params, features, control, cu, dtype),
                composition(params, features, control, cu),
            )
        )
    assert_twice_as_good(*map(torch.stack, zip(*results, strict=True)))
