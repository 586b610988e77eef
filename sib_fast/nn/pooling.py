"""MaxPool2d and AvgPool2d whose double backward makes no zeros: drop-in for torch.nn's."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from sib_fast.nn._torchs_own import Layer
from sib_fast.ops.pooling import avg_pool2d, max_pool2d


class MaxPool2d(Layer, nn.MaxPool2d):
    """torch.nn.MaxPool2d without zeros in its double backward. Shapes: [N, C, H, W]; otherwise, and with return_indices,
    PyTorch's own."""

    def _fast(self, input: Tensor) -> Tensor:
        if input.ndim != 4 or self.return_indices:
            return self._torchs_own(input)
        geometry = (list(_pair(v)) for v in (self.kernel_size, self.stride, self.padding, self.dilation))
        return max_pool2d(input, *geometry, self.ceil_mode)


class AvgPool2d(Layer, nn.AvgPool2d):
    """torch.nn.AvgPool2d without zeros in its double backward. Shapes: [N, C, H, W]; otherwise PyTorch's own."""

    def _fast(self, input: Tensor) -> Tensor:
        if input.ndim != 4:
            return self._torchs_own(input)
        geometry = (list(_pair(v)) for v in (self.kernel_size, self.stride, self.padding))
        return avg_pool2d(input, *geometry, self.ceil_mode, self.count_include_pad, self.divisor_override)
