"""Conv2d whose double backward takes the ordinary weight-gradient kernel: drop-in for torch.nn's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sib_fast.ops.convolution import convolution

# Devices on which the re-routed double backward has been measured to win (benchmarks/results). Elsewhere PyTorch's own runs.
MEASURED_DEVICES = ("cpu",)


class Conv2d(nn.Conv2d):
    """torch.nn.Conv2d with a fast double backward. Shapes: [N, C, H, W] or [C, H, W]. Source: SPEC 10."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # Autocast knows PyTorch's convolution, not our op; padding may be the words "same" or "valid".
        autocast = torch.is_autocast_enabled(input.device.type)
        if autocast or input.ndim != 4 or input.device.type not in MEASURED_DEVICES or isinstance(self.padding, str):
            return super()._conv_forward(input, weight, bias)
        padding = list(self.padding)
        if self.padding_mode != "zeros":
            input, padding = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), [0, 0]
        return convolution(input, weight, bias, list(self.stride), padding, list(self.dilation), self.groups)
