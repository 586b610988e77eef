"""Activations whose double backward makes no zeros and is one pass: drop-in for torch.nn's, `inplace` included."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sib_fast.ops.activation import activation


class ReLU(nn.ReLU):
    """torch.nn.ReLU with a double backward that reads and writes once. Shapes: any."""

    def forward(self, input: Tensor) -> Tensor:
        return activation(input, "relu", inplace=self.inplace)


class Hardtanh(nn.Hardtanh):
    """torch.nn.Hardtanh with a double backward that reads and writes once. Shapes: any."""

    def forward(self, input: Tensor) -> Tensor:
        return activation(input, "hardtanh", self.min_val, self.max_val, inplace=self.inplace)


class ReLU6(nn.ReLU6):
    """torch.nn.ReLU6 with a double backward that reads and writes once. Shapes: any."""

    def forward(self, input: Tensor) -> Tensor:
        return activation(input, "hardtanh", self.min_val, self.max_val, inplace=self.inplace)


class LeakyReLU(nn.LeakyReLU):
    """torch.nn.LeakyReLU with a double backward that reads and writes once; PyTorch's own for a negative slope. Shapes: any."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.negative_slope >= 0:
            return super().forward(input)
        return activation(input, "leaky_relu", self.negative_slope, inplace=self.inplace)


class Hardsigmoid(nn.Hardsigmoid):
    """torch.nn.Hardsigmoid that can be differentiated twice, which PyTorch's cannot. Shapes: any."""

    def forward(self, input: Tensor) -> Tensor:
        return activation(input, "hardsigmoid", inplace=self.inplace)


class Hardswish(nn.Hardswish):
    """torch.nn.Hardswish with a fused double backward. Shapes: any."""

    def forward(self, input: Tensor) -> Tensor:
        return activation(input, "hardswish", inplace=self.inplace)


class Sigmoid(nn.Sigmoid):
    """torch.nn.Sigmoid with a fused double backward. Shapes: any."""

    def forward(self, input: Tensor) -> Tensor:
        return activation(input, "sigmoid")


class Tanh(nn.Tanh):
    """torch.nn.Tanh with a fused double backward. Shapes: any."""

    def forward(self, input: Tensor) -> Tensor:
        return activation(input, "tanh")


class SiLU(nn.SiLU):
    """torch.nn.SiLU with a fused double backward. Shapes: any."""

    def forward(self, input: Tensor) -> Tensor:
        return activation(input, "silu", inplace=self.inplace)


class GELU(nn.GELU):
    """torch.nn.GELU, exact or tanh, with a fused double backward. Shapes: any."""

    def forward(self, input: Tensor) -> Tensor:
        return activation(input, "gelu_tanh" if self.approximate == "tanh" else "gelu")


class Mish(nn.Mish):
    """torch.nn.Mish with a fused double backward. Shapes: any."""

    def forward(self, input: Tensor) -> Tensor:
        return activation(input, "mish", inplace=self.inplace)


class ELU(nn.ELU):
    """torch.nn.ELU with a fused double backward. Shapes: any."""

    def forward(self, input: Tensor) -> Tensor:
        return activation(input, "elu", self.alpha, inplace=self.inplace)


class Softplus(nn.Softplus):
    """torch.nn.Softplus with a fused double backward; PyTorch's own under autocast, which may widen it. Shapes: any."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_autocast_enabled(input.device.type):
            return super().forward(input)
        return activation(input, "softplus", self.beta, self.threshold)
