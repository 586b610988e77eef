"""The fused ops, one folder each: contract and gradient in `__init__`, the formula in `reference`, the story in README."""

from sib_fast.ops.foreground_mask import foreground_mask
from sib_fast.ops.hsic_objective import hsic_objective
from sib_fast.ops.region_statistics import region_statistics

__all__ = ["foreground_mask", "hsic_objective", "region_statistics"]
