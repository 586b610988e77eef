"""Activations as on paper, in plain autograd: any order of derivative."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def _gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def _gelu_tanh(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _elu(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x > 0, x, alpha * torch.exp(x.clamp(max=0)) - alpha)


def _softplus(x: Tensor, beta: float, threshold: float) -> Tensor:
    linear = x * beta > threshold
    return torch.where(linear, x, torch.log1p(torch.exp(torch.where(linear, 0.0, x) * beta)) / beta)


def _where_inside(x: Tensor, low: float, high: float, below: float | Tensor, inside: Tensor, above: float | Tensor) -> Tensor:
    return torch.where(x <= low, below, torch.where(x >= high, above, inside))


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "relu": lambda x: torch.where(x > 0, x, 0.0),
    "hardtanh": lambda x, low, high: _where_inside(x, low, high, low, x, high),
    "leaky_relu": lambda x, slope: torch.where(x > 0, x, slope * x),
    "hardsigmoid": lambda x: _where_inside(x, -3, 3, 0.0, (x + 3) / 6, 1.0),
    "hardswish": lambda x: _where_inside(x, -3, 3, 0.0, x * (x + 3) / 6, x),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "tanh": torch.tanh,
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "mish": lambda x: x * torch.tanh(torch.log1p(torch.exp(x))),
    "elu": _elu,
    "softplus": _softplus,
}


def activation(x: Tensor, kind: str, *parameters: float) -> Tensor:
    """f(x), element by element, where x is of moderate size (exp(x) must not overflow). Shapes: any -> the same."""
    return FUNCTIONS[kind](x, *parameters)
