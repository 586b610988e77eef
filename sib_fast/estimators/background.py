"""What the loss lowers in the background: finalisers on RegionStatistics."""

from __future__ import annotations

import torch
from torch import Tensor

from sib_fast.estimators.hsic_biased import hsic_biased
from sib_fast.types import RegionStatistics


def variance(statistics: RegionStatistics) -> Tensor:
    """mean_i Var(v_i), v = R·(1−M): the paper's and the authors' background term. Scales with R², so with input size."""
    return statistics.background_variance.mean()


def relative_variance(statistics: RegionStatistics) -> Tensor:
    """mean_i Var(v_i)/Var(R_i): scale-free, so that a weight carries over between input sizes. In about [0, 1].

    An image whose VJP is constant has no variance to share out and counts as 0.
    """
    whole = statistics.vjp_variance
    alive = whole != 0  # NaN stays NaN
    return torch.where(alive, statistics.background_variance / torch.where(alive, whole, 1.0), 0.0).mean()


def hsic(statistics: RegionStatistics) -> Tensor:
    """Biased HSIC of (v, c), the background parts of VJP and input: the abstract's own wording."""
    return hsic_biased(statistics.background_gram_vjp, statistics.background_gram_x)


hsic.needs_background_grams = True
hsic.minimum_batch = hsic_biased.minimum_batch
