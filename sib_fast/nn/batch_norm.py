"""BatchNorm1d, 2d, 3d and SyncBatchNorm whose double backward is fused: drop-in for torch.nn's, same parameters, buffers and
state_dict."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sib_fast._backends import REFERENCE, automatic
from sib_fast.nn._torchs_own import Layer
from sib_fast.ops.batch_norm import KERNELS, batch_norm
from sib_fast.ops.batch_norm.running import running_batch_norm
from sib_fast.ops.batch_norm.synchronised import synchronised_batch_norm


def _recomputing() -> bool:
    """Whether this forward runs inside a backward pass: activation checkpointing, whose first forward has counted already."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class _FusedDoubleBackward(Layer):
    """forward of torch.nn's batch norms, by `sib_fast.ops.batch_norm`; in eval mode with running statistics by its `running`.

    PyTorch's it is where nothing is gained: in eval mode without gradients, or compiled, where the compiler fuses what PyTorch
    composes; for no images; and where `batch_norm` has no kernel, as its reference is composed of plain operations and slower.
    Running statistics move once a step: a forward that checkpointing repeats in backward leaves them alone.
    """

    def _fast(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if not self.training and self.running_mean is not None:
            if not torch.is_grad_enabled() or torch.compiler.is_compiling():
                return self._torchs_own(input)
            return self._behind(running_batch_norm(input, self.weight, self.bias, self.running_mean, self.running_var, self.eps))
        if not self._synchronises() and (input.numel() == 0 or automatic(input.device, KERNELS) == REFERENCE):
            return self._torchs_own(input)
        y, mean, variance, count = self._normalise(input)
        if self.training and self.track_running_stats and self.running_mean is not None and not _recomputing():
            self._track(mean.detach(), variance.detach(), count)
        return self._behind(y)

    def _behind(self, y: Tensor) -> Tensor:
        """What a layer does with its normalised input besides."""
        return y

    def _synchronises(self) -> bool:
        return False

    def _normalise(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | int]:
        y, mean, variance = batch_norm(input, self.weight, self.bias, eps=self.eps)
        return y, mean, variance, input.numel() // input.shape[1]

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor | int) -> None:
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


class SyncBatchNorm(_FusedDoubleBackward, nn.SyncBatchNorm):
    """torch.nn.SyncBatchNorm that can be differentiated twice, which PyTorch's cannot; on the CPU (gloo) too.

    Where there is one process, or no process group, it is BatchNorm. Shapes: [N, C, *], N of this process. Source: SPEC 10.
    """

    differentiable_twice = True  # read by network_checks, which refuses PyTorch's

    def _check_input_dim(self, input: Tensor) -> None:
        super()._check_input_dim(input)
        super()._check_non_zero_input_channels(input)

    def _group(self) -> torch.distributed.ProcessGroup:
        return self.process_group or torch.distributed.group.WORLD

    def _synchronises(self) -> bool:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        return self.training and distributed and self._group().size() > 1

    def _normalise(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | int]:
        if self._synchronises():
            return synchronised_batch_norm(input, self.weight, self.bias, self.eps, self._group())
        return super()._normalise(input)
