"""Result types of the ops."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RegionStatistics(NamedTuple):
    """All the sums over pixels that the S-IB loss needs (SPEC 4).

    Shapes:  Grams float64 [N, N]; variances float64 [N]; N images.
    Scale:   Grams are plain sums over the D = C·H·W elements of a row, not normalised; variances are unbiased, 1/(D-1).
    """

    gram_vjp: Tensor
    gram_x: Tensor
    background_variance: Tensor
    vjp_variance: Tensor
    background_gram_vjp: Tensor | None = None
    background_gram_x: Tensor | None = None
