"""Dependence estimators: small functions on Gram matrices, called as `estimator(gram_vjp, gram_x)`.

A new one is a file with a function and a line here. An attribute `minimum_batch` on the function, where present, is
checked by the loss before anything is computed.
"""

from sib_fast.estimators import background
from sib_fast.estimators.cka import cka
from sib_fast.estimators.hsic_biased import hsic_biased
from sib_fast.estimators.hsic_gaussian import hsic_gaussian
from sib_fast.estimators.hsic_unbiased import hsic_unbiased

ESTIMATORS = {f.__name__: f for f in (hsic_biased, hsic_unbiased, cka, hsic_gaussian)}
BACKGROUNDS = {
    "variance": background.variance,
    "hsic": background.hsic,
    "relative_variance": background.relative_variance,
}

__all__ = ["BACKGROUNDS", "ESTIMATORS", "background", "cka", "hsic_biased", "hsic_gaussian", "hsic_unbiased"]
