"""Layers whose double backward is fast, and `prepare`, which swaps them into a model."""

from sib_fast.nn.activation import (
    ELU,
    GELU,
    Hardsigmoid,
    Hardswish,
    Hardtanh,
    LeakyReLU,
    Mish,
    ReLU,
    ReLU6,
    Sigmoid,
    SiLU,
    Softplus,
    Tanh,
)
from sib_fast.nn.attention import MultiheadAttention
from sib_fast.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm
from sib_fast.nn.convolution import Conv1d, Conv2d, Conv3d
from sib_fast.nn.inspect import Report, inspect
from sib_fast.nn.layer_norm import GroupNorm, LayerNorm
from sib_fast.nn.pooling import AvgPool2d, MaxPool2d
from sib_fast.nn.prepare import prepare, restore

__all__ = [
    "ELU",
    "GELU",
    "AvgPool2d",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "GroupNorm",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "LayerNorm",
    "LeakyReLU",
    "MaxPool2d",
    "Mish",
    "MultiheadAttention",
    "ReLU",
    "ReLU6",
    "Report",
    "SiLU",
    "Sigmoid",
    "Softplus",
    "SyncBatchNorm",
    "Tanh",
    "inspect",
    "prepare",
    "restore",
]
