"""The default mask: where the VJP itself is dense."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from sib_fast.ops import foreground_mask


@dataclass(frozen=True)
class DensityMask:
    """`foreground_mask` with its settings: a mask maker, vjp [N, C, H, W] -> mask [N, 1, H, W]."""

    window_size: int = 31
    temperature: float = 0.1
    slope: float = 10.0
    quantiles: tuple[float, float, float, float] = (0.05, 0.95, 0.8, 0.8)
    backend: str = "auto"

    def scaled(self, image_size: Sequence[int], map_size: Sequence[int]) -> DensityMask:
        """The same mask for a feature map: the window covers the same share of it (nearest odd number, at least 1)."""
        factor = math.sqrt(math.prod(map_size) / math.prod(image_size))
        return replace(self, window_size=2 * max(0, round((self.window_size * factor - 1) / 2)) + 1)

    def with_settings(self, **settings: Any) -> DensityMask:
        return replace(self, **settings) if settings else self

    def __call__(self, vjp: Tensor) -> Tensor:
        return foreground_mask(
            vjp,
            window_size=self.window_size,
            temperature=self.temperature,
            slope=self.slope,
            quantiles=self.quantiles,
            backend=self.backend,
        )
