"""What the estimators share: normalised and centred Gram matrices, in the dtype they come in (float64 from the op)."""

from __future__ import annotations

import torch
from torch import Tensor

from sib_fast import _checks

# The floor of a row's norm, as in torch.nn.functional.normalize.
NORM_FLOOR = 1e-12


def check_grams(op: str, gram_vjp: Tensor, gram_x: Tensor, minimum_batch: int) -> None:
    for name, gram in (("gram_vjp", gram_vjp), ("gram_x", gram_x)):
        _checks.require_tensor(op, name, gram)
        if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
            raise ValueError(f"{op}: {name} must have shape [N, N], got {list(gram.shape)}")
    _checks.require_same_shape(op, "gram_x", gram_x, "gram_vjp", gram_vjp.shape)
    if gram_vjp.shape[0] < minimum_batch:
        raise ValueError(f"{op}: the batch must hold N >= {minimum_batch} images, got {gram_vjp.shape[0]}")


def normalised(gram: Tensor) -> Tensor:
    """K = G/(n nᵀ), n = max(sqrt(diag G), 1e-12): the Gram of rows normalised as by F.normalize.

    A row at the floor has no gradient through its norm; sqrt is kept away from 0, where its own gradient is infinite. A NaN
    on the diagonal counts as a row at the floor and is NaN in K all the same.
    """
    diagonal = gram.diagonal()
    alive = diagonal > NORM_FLOOR * NORM_FLOOR
    norm = torch.where(alive, torch.where(alive, diagonal, 1.0).sqrt(), NORM_FLOOR)
    return gram / (norm[:, None] * norm[None, :])


def centred(kernel: Tensor) -> Tensor:
    """Z K Z with Z = I − 11ᵀ/N, without the matrix."""
    return kernel - kernel.mean(0, keepdim=True) - kernel.mean(1, keepdim=True) + kernel.mean()


def hsic_of_kernels(kernel_vjp: Tensor, kernel_x: Tensor) -> Tensor:
    """tr(K Z L Z)/(N−1)²: biased HSIC (Gretton et al. 2005)."""
    return (kernel_vjp * centred(kernel_x)).sum() / (kernel_vjp.shape[0] - 1) ** 2
