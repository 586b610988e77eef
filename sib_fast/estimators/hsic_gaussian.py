"""HSIC with a Gaussian kernel, biased: every dependence, not only the linear one."""

from __future__ import annotations

import torch
from torch import Tensor

from sib_fast.estimators._gram import check_grams, hsic_of_kernels, normalised

# A batch of identical rows has a median distance of 0; the kernel is then 1 everywhere and HSIC 0.
VARIANCE_FLOOR = 1e-12


def gaussian_kernel(kernel: Tensor, sigma: float | None = None) -> Tensor:
    """exp(−max(K_ii + K_jj − 2K_ij, 0)/(2σ²)); σ² the median squared distance of distinct rows unless given.

    Shapes:  kernel [N, N] -> [N, N]. σ² is not differentiated.
    """
    diagonal = kernel.diagonal()
    squared = (diagonal[:, None] + diagonal[None, :] - 2 * kernel).clamp_min(0.0)
    if sigma is not None:
        return torch.exp(squared / (-2.0 * sigma * sigma))
    upper = torch.triu_indices(*squared.shape, offset=1, device=squared.device)
    variance = squared.detach()[upper[0], upper[1]].median().clamp_min(VARIANCE_FLOOR)
    return torch.exp(squared / (-2.0 * variance))


def hsic_gaussian(gram_vjp: Tensor, gram_x: Tensor, sigma: float | None = None) -> Tensor:
    """Biased HSIC of Gaussian kernels on the normalised rows, each with its own median bandwidth (or `sigma` for both).

    Shapes:  gram_vjp, gram_x [N, N] -> []. N >= 2.
    Scale:   1/(N−1)²; in [0, N²/(N−1)²].
    Errors:  ValueError for a sigma that is not positive.
    Source:  Gretton et al. 2005; SPEC 5.
    """
    check_grams("hsic_gaussian", gram_vjp, gram_x, hsic_gaussian.minimum_batch)
    if sigma is not None and not sigma > 0:
        raise ValueError(f"hsic_gaussian: sigma must be positive or None, got {sigma!r}")
    kernels = (gaussian_kernel(normalised(gram), sigma) for gram in (gram_vjp, gram_x))
    return hsic_of_kernels(*kernels)


hsic_gaussian.minimum_batch = 2
