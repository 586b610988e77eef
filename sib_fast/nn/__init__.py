"""Layers whose double backward is fast, and `prepare`, which swaps them into a model."""

from sib_fast.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from sib_fast.nn.convolution import Conv2d
from sib_fast.nn.inspect import Report, inspect
from sib_fast.nn.prepare import prepare, restore

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "Conv2d", "Report", "inspect", "prepare", "restore"]
