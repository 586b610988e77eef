"""Softmax along the last dimension, as on paper, in plain autograd: any order of derivative."""

from __future__ import annotations

import torch
from torch import Tensor


def softmax(x: Tensor) -> Tensor:
    """exp(x)/Σ exp(x), the largest x taken off first. Shapes: x [*, L] -> as x."""
    e = torch.exp(x - x.amax(dim=-1, keepdim=True).detach())
    return e / e.sum(dim=-1, keepdim=True)
