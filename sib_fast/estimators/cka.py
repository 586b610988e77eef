"""Centred kernel alignment: HSIC, normalised to [0, 1]."""

from torch import Tensor

from sib_fast.estimators._gram import centred, check_grams, normalised

# Under the root of HSIC(R,R)·HSIC(x,x): a batch of identical rows has both 0, and an alignment of 0.
FLOOR = 1e-24


def cka(gram_vjp: Tensor, gram_x: Tensor) -> Tensor:
    """HSIC(R,x)/sqrt(HSIC(R,R)·HSIC(x,x)), linear kernel, biased HSIC (the factors 1/(N−1)² cancel).

    Shapes:  gram_vjp, gram_x [N, N] -> []. N >= 2.
    Scale:   in [0, 1]; 1 if the centred Grams are proportional; 0 where one of them vanishes.
    Source:  Kornblith et al. 2019; SPEC 5.
    """
    check_grams("cka", gram_vjp, gram_x, cka.minimum_batch)
    k, el = centred(normalised(gram_vjp)), centred(normalised(gram_x))
    return (k * el).sum() / ((k * k).sum() * (el * el).sum()).clamp_min(FLOOR).sqrt()


cka.minimum_batch = 2
