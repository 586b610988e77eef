"""HSIC with a linear kernel, unbiased."""

from torch import Tensor

from sib_fast.estimators._gram import check_grams, normalised


def hsic_unbiased(gram_vjp: Tensor, gram_x: Tensor) -> Tensor:
    """[tr(K̃L̃) + 1ᵀK̃1·1ᵀL̃1/((N−1)(N−2)) − 2·1ᵀK̃L̃1/(N−2)]/(N(N−3)), K̃ = K without its diagonal.

    Shapes:  gram_vjp, gram_x [N, N] -> []. N >= 4.
    Scale:   0 in expectation for independent data; may be negative.
    Source:  Song et al. 2012; SPEC 5.
    """
    check_grams("hsic_unbiased", gram_vjp, gram_x, hsic_unbiased.minimum_batch)
    count = gram_vjp.shape[0]
    k, el = normalised(gram_vjp), normalised(gram_x)
    k, el = k - k.diagonal().diag(), el - el.diagonal().diag()
    rows_k, rows_l = k.sum(1), el.sum(1)
    together = (k * el).sum() + rows_k.sum() * rows_l.sum() / ((count - 1) * (count - 2))
    return (together - 2 * (rows_k * rows_l).sum() / (count - 2)) / (count * (count - 3))


hsic_unbiased.minimum_batch = 4
