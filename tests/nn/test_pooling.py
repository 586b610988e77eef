"""Pooling layers: each setting of PyTorch's reaches the op."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sib_fast


@pytest.mark.parametrize(
    "layer",
    [
        nn.MaxPool2d(3, 2, 1),
        nn.MaxPool2d((2, 3), ceil_mode=True),
        nn.MaxPool2d(2, (1, 2), 1, dilation=2),
        nn.AvgPool2d(2),
        nn.AvgPool2d((3, 2), 2, (1, 0)),
        nn.AvgPool2d(2, ceil_mode=True),
        nn.AvgPool2d(3, (1, 2), 1, count_include_pad=False),
        nn.AvgPool2d(2, divisor_override=3),
    ],
    ids=str,
)
def test_a_layer_hands_on_each_of_its_settings(layer):
    x = torch.randn(2, 3, 9, 8)
    want, unbatched = layer(x), layer(x[0])
    fast = sib_fast.prepare(layer)
    assert type(fast).__module__ == "sib_fast.nn.pooling"
    assert torch.equal(fast(x), want)
    assert torch.equal(fast(x[0]), unbatched)
    assert type(sib_fast.restore(fast)).__module__ == "torch.nn.modules.pooling"


def test_return_indices_is_pytorchs():
    fast = sib_fast.prepare(nn.MaxPool2d(2, return_indices=True))
    assert len(fast(torch.randn(1, 2, 4, 4))) == 2
