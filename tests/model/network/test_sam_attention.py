"""SAM's relative positions as channels of query and key, against transformers' bias."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionSdpaAttention

from tests.model.watch import tensors
from vpt_model.network.sam_attention import SamAttention


def pair(window: int, dim: int, dtype: torch.dtype, augments: bool) -> tuple[SamVisionSdpaAttention, SamAttention]:
    config = SamVisionConfig(hidden_size=2 * dim, num_attention_heads=2, image_size=16 * 12, patch_size=16)
    theirs = SamVisionSdpaAttention(config, window)
    generator = torch.Generator().manual_seed(window + dim)
    for parameter in theirs.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).mul_(0.3)
    theirs = theirs.to(dtype).eval().requires_grad_(False)
    ours = SamAttention(theirs)
    ours.prepare()
    ours._augments = augments
    return theirs, ours


@pytest.mark.parametrize("augments", [True, False])
@pytest.mark.parametrize("window, dim", [(0, 64), (7, 64), (7, 5)])
def test_it_is_exact(window, dim, augments):
    theirs, ours = pair(window, dim, torch.float64, augments)
    side = window or 12
    x = torch.randn(3, side, side, 2 * dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = theirs(x)[0]
    assert (ours(x)[0] - expected).abs().max() <= 1e-12 * expected.abs().max()
    theirs.rel_pos_w[0, 0] += 1.0
    assert (theirs(x)[0] - expected).abs().max() > 1e-3 * expected.abs().max(), "the positions matter"


def test_the_parameters_have_their_names():
    theirs, ours = pair(7, 64, torch.float32, True)
    assert {name: x.shape for name, x in ours.state_dict().items()} == {
        name: x.shape for name, x in theirs.state_dict().items()
    }


class Largest(TorchDispatchMode):
    """Elements of the largest tensor made."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.size = max([self.size, *(x.numel() for x in tensors(result))])
        return result


def test_no_matrix_of_every_query_and_key_exists():
    _, ours = pair(0, 64, torch.float32, True)
    x = torch.randn(1, 12, 12, 128)
    with torch.inference_mode(), Largest() as largest:
        ours(x)
    assert largest.size == 144 * 3 * 128, "query, key and value; a bias would have 2 · 144 · 144 more than their sum"
    assert ours._places.shape == (144, 24)
