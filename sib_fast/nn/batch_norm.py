"""BatchNorm1d, 2d, 3d whose double backward is one fused op: drop-in for torch.nn's, same parameters, buffers and state_dict."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sib_fast.ops.batch_norm import batch_norm


class _FusedDoubleBackward:
    """forward of torch.nn's batch norms, with batch statistics by `sib_fast.ops.batch_norm`.

    In eval mode with running statistics the layer is linear in x, has a cheap double backward already, and is PyTorch's.
    """

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if not self.training and self.running_mean is not None:
            return super().forward(input)
        y, mean, variance = batch_norm(input, self.weight, self.bias, eps=self.eps)
        if self.training and self.track_running_stats and self.running_mean is not None:
            self._track(mean.detach(), variance.detach(), input.numel() // input.shape[1])
        return y

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        self.num_batches_tracked.add_(1)
        # momentum None is a cumulative average. As a tensor: reading the counter would synchronise with the device.
        factor = self.num_batches_tracked.to(mean.dtype).reciprocal() if self.momentum is None else self.momentum
        for running, value in ((self.running_mean, mean), (self.running_var, variance * (count / (count - 1)))):
            running.copy_(torch.lerp(running.to(value.dtype), value, factor))


class BatchNorm1d(_FusedDoubleBackward, nn.BatchNorm1d):
    """torch.nn.BatchNorm1d with a fused double backward. Shapes: [N, C] or [N, C, L]. Source: SPEC 10."""


class BatchNorm2d(_FusedDoubleBackward, nn.BatchNorm2d):
    """torch.nn.BatchNorm2d with a fused double backward. Shapes: [N, C, H, W]. Source: SPEC 10."""


class BatchNorm3d(_FusedDoubleBackward, nn.BatchNorm3d):
    """torch.nn.BatchNorm3d with a fused double backward. Shapes: [N, C, D, H, W]. Source: SPEC 10."""
