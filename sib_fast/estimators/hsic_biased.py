"""HSIC with a linear kernel, biased: the paper's and the authors' dependence estimator."""

from torch import Tensor

from sib_fast.estimators._gram import check_grams, hsic_of_kernels, normalised


def hsic_biased(gram_vjp: Tensor, gram_x: Tensor) -> Tensor:
    """tr(K_R Z K_x Z)/(N−1)² of the normalised Grams. (The authors' function name says unbiased; it is this one.)

    Shapes:  gram_vjp, gram_x [N, N], as from `region_statistics` -> []. N >= 2.
    Scale:   in [0, N/(N−1)²·N]; independent data gives about 1/(N−1), not 0.
    Source:  Gretton et al. 2005; SPEC 5.
    """
    check_grams("hsic_biased", gram_vjp, gram_x, hsic_biased.minimum_batch)
    return hsic_of_kernels(normalised(gram_vjp), normalised(gram_x))


hsic_biased.minimum_batch = 2
