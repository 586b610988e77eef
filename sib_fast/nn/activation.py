"""Activations whose double backward makes no zeros and is one pass: drop-in for torch.nn's, `inplace` included."""

from __future__ import annotations

from torch import Tensor, nn

from sib_fast.nn._autocast import widened
from sib_fast.nn._torchs_own import Layer
from sib_fast.ops.activation import activation


class ReLU(Layer, nn.ReLU):
    """torch.nn.ReLU with a double backward that reads and writes once. Shapes: any."""

    def _fast(self, input: Tensor) -> Tensor:
        return activation(input, "relu", inplace=self.inplace)


class Hardtanh(Layer, nn.Hardtanh):
    """torch.nn.Hardtanh with a double backward that reads and writes once. Shapes: any."""

    def _fast(self, input: Tensor) -> Tensor:
        return activation(input, "hardtanh", self.min_val, self.max_val, inplace=self.inplace)


class ReLU6(Layer, nn.ReLU6):
    """torch.nn.ReLU6 with a double backward that reads and writes once. Shapes: any."""

    def _fast(self, input: Tensor) -> Tensor:
        return activation(input, "hardtanh", self.min_val, self.max_val, inplace=self.inplace)


class LeakyReLU(Layer, nn.LeakyReLU):
    """torch.nn.LeakyReLU with a double backward that reads and writes once; PyTorch's own for a negative slope. Shapes: any."""

    def _fast(self, input: Tensor) -> Tensor:
        if not self.negative_slope >= 0:
            return self._torchs_own(input)
        return activation(input, "leaky_relu", self.negative_slope, inplace=self.inplace)


class Hardsigmoid(Layer, nn.Hardsigmoid):
    """torch.nn.Hardsigmoid that can be differentiated twice, which PyTorch's cannot. Shapes: any."""

    def _fast(self, input: Tensor) -> Tensor:
        return activation(input, "hardsigmoid", inplace=self.inplace)


class Hardswish(Layer, nn.Hardswish):
    """torch.nn.Hardswish with a fused double backward. Shapes: any."""

    def _fast(self, input: Tensor) -> Tensor:
        return activation(input, "hardswish", inplace=self.inplace)


class Sigmoid(Layer, nn.Sigmoid):
    """torch.nn.Sigmoid with a fused double backward. Shapes: any."""

    def _fast(self, input: Tensor) -> Tensor:
        return activation(input, "sigmoid")


class Tanh(Layer, nn.Tanh):
    """torch.nn.Tanh with a fused double backward. Shapes: any."""

    def _fast(self, input: Tensor) -> Tensor:
        return activation(input, "tanh")


class SiLU(Layer, nn.SiLU):
    """torch.nn.SiLU with a fused double backward. Shapes: any."""

    def _fast(self, input: Tensor) -> Tensor:
        return activation(input, "silu", inplace=self.inplace)


class GELU(Layer, nn.GELU):
    """torch.nn.GELU, exact or tanh, with a fused double backward. Shapes: any."""

    def _fast(self, input: Tensor) -> Tensor:
        return activation(input, "gelu_tanh" if self.approximate == "tanh" else "gelu")


class Mish(Layer, nn.Mish):
    """torch.nn.Mish with a fused double backward. Shapes: any."""

    def _fast(self, input: Tensor) -> Tensor:
        return activation(input, "mish", inplace=self.inplace)


class ELU(Layer, nn.ELU):
    """torch.nn.ELU with a fused double backward. Shapes: any."""

    def _fast(self, input: Tensor) -> Tensor:
        return activation(input, "elu", self.alpha, inplace=self.inplace)


class Softplus(Layer, nn.Softplus):
    """torch.nn.Softplus with a fused double backward. Shapes: any."""

    def _fast(self, input: Tensor) -> Tensor:
        return activation(widened(input), "softplus", self.beta, self.threshold)
