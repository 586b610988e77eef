"""What autocast does to torch.nn's layers by PyTorch's op names, and so not to our ops: the same, in the layers."""

from __future__ import annotations

import torch
from torch import Tensor


def lowered(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """As its ops in half precision are treated: every tensor in autocast's dtype, but for float64. The first one is no None."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    low = torch.get_autocast_dtype(device)
    return tuple(t if getattr(t, "dtype", None) in (None, torch.float64) else t.to(low) for t in tensors)


def widened(input: Tensor) -> Tensor:
    """As its ops in float32 are treated, on every device type but the CPU, where none of our layers is among them."""
    half = input.dtype in (torch.bfloat16, torch.float16)
    return input.float() if half and input.device.type != "cpu" and torch.is_autocast_enabled(input.device.type) else input
