"""Conv1d, 2d, 3d whose double backward takes the ordinary weight-gradient kernel: drop-in for torch.nn's."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from sib_fast.nn._autocast import lowered
from sib_fast.nn._torchs_own import Layer
from sib_fast.ops.convolution import convolution
from sib_fast.ops.convolution.choice import rules_of


class _RoutedDoubleBackward(Layer):
    """forward of torch.nn's convolutions, by `sib_fast.ops.convolution` where its rules say so (choice.py).

    recompute: as of that op; `prepare(model, recompute=True)` sets it.
    """

    recompute = False

    def _fast(self, input: Tensor) -> Tensor:
        if input.ndim != len(self.kernel_size) + 2 or input.is_complex():
            return self._torchs_own(input)
        weight, bias = self.weight, self.bias  # once: a parametrisation calculates it, and may count
        if not rules_of(input.device).second(input, weight, self.groups):
            return self._conv_forward(input, weight, bias)
        input, padding = self._padded(input)
        tensors = lowered(input, weight, bias)  # autocast knows PyTorch's convolution, not our op
        return convolution(*tensors, list(self.stride), padding, list(self.dilation), self.groups, self.recompute)

    def _padded(self, input: Tensor) -> tuple[Tensor, list[int]]:
        """The input, padded here where the convolution cannot do it, and what is left for the convolution."""
        around = self._reversed_padding_repeated_twice  # (left, right) of the last dimension first, as F.pad takes it
        if self.padding_mode != "zeros":
            return F.pad(input, around, mode=self.padding_mode), [0] * len(self.stride)
        if not isinstance(self.padding, str):
            return input, list(self.padding)
        if around[::2] == around[1::2]:
            return input, list(around[::-2])
        return F.pad(input, around), [0] * len(self.stride)


class Conv1d(_RoutedDoubleBackward, nn.Conv1d):
    """torch.nn.Conv1d with a fast double backward. Shapes: [N, C, L]; [C, L] runs PyTorch's own. Source: SPEC 10."""


class Conv2d(_RoutedDoubleBackward, nn.Conv2d):
    """torch.nn.Conv2d with a fast double backward. Shapes: [N, C, H, W]; [C, H, W] runs PyTorch's own. Source: SPEC 10."""


class Conv3d(_RoutedDoubleBackward, nn.Conv3d):
    """torch.nn.Conv3d with a fast double backward. Shapes: [N, C, D, H, W]; [C, D, H, W] runs PyTorch's own. Source: SPEC 10."""
