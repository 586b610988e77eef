"""The estimators' gradients: gradcheck, the hand-written form of SPEC 6, zero rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sib_fast.estimators import ESTIMATORS, hsic_biased, hsic_unbiased

ALL = pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)


def rows(images: int = 5, width: int = 7, seed: int = 0) -> Tensor:
    return torch.randn(images, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@ALL
def test_gradcheck_through_the_rows(estimator):
    def value(a: Tensor, b: Tensor) -> Tensor:
        return estimator(a @ a.T, b @ b.T)

    inputs = rows().requires_grad_(), rows(seed=1).requires_grad_()
    if estimator.__name__ == "hsic_gaussian":  # its bandwidth is not differentiated, so it must be held
        assert torch.autograd.gradcheck(lambda a, b: estimator(a @ a.T, b @ b.T, 0.8), inputs)
    else:
        assert torch.autograd.gradcheck(value, inputs)
        assert torch.autograd.gradgradcheck(value, inputs)


def gradient_by_hand(upstream: float, a: Tensor, b: Tensor) -> Tensor:
    """grad_a = S_R a of SPEC 6 for hsic_biased, from the centring matrix. Shapes: [N, D], [N, E] -> [N, D]."""
    images = len(a)
    centring = torch.eye(images, dtype=a.dtype) - 1 / images
    gram_a, gram_b = a @ a.T, b @ b.T
    n_a, n_b = (g.diagonal().sqrt().clamp_min(1e-12) for g in (gram_a, gram_b))
    k_a, k_b = gram_a / torch.outer(n_a, n_a), gram_b / torch.outer(n_b, n_b)
    grad_k = upstream / (images - 1) ** 2 * centring @ k_b @ centring
    diagonal = (2 * grad_k * k_a).sum(1) / n_a**2
    diagonal[gram_a.diagonal().sqrt() < 1e-12] = 0
    return (2 * grad_k / torch.outer(n_a, n_a) - torch.diag(diagonal)) @ a


@pytest.mark.parametrize("case", ["random", "zero row", "clamped row", "two images"])
def test_hsic_biased_has_the_gradient_of_spec_6(case):
    a, b = rows(2 if case == "two images" else 5), rows(2 if case == "two images" else 5, seed=1)
    if case == "zero row":
        a[1] = 0
    if case == "clamped row":
        a[1] *= 1e-14
    a.requires_grad_()
    b.requires_grad_()
    grad_a, grad_b = torch.autograd.grad(-3.0 * hsic_biased(a @ a.T, b @ b.T), (a, b))
    a, b = a.detach(), b.detach()
    for got, exact in ((grad_a, gradient_by_hand(-3.0, a, b)), (grad_b, gradient_by_hand(-3.0, b, a))):
        assert got.abs().max() > 1e-3
        for got_row, exact_row in zip(got, exact, strict=True):  # a clamped row's gradient is 1e12 of the others'
            assert torch.allclose(got_row, exact_row, rtol=1e-9, atol=1e-12 * float(exact_row.abs().max()))
    if case == "clamped row":
        assert grad_a[1].abs().max() > 1e9


def test_rows_at_the_floor_follow_f_normalize():
    a, b = rows(), rows(seed=1)
    a[0], a[1] = 0.0, a[1] * 1e-13
    a.requires_grad_()
    unit_a, unit_b = (torch.nn.functional.normalize(t, dim=1) for t in (a, b))
    centring = torch.eye(5, dtype=a.dtype) - 1 / 5
    plain = torch.trace(unit_a @ unit_a.T @ centring @ unit_b @ unit_b.T @ centring) / 16
    ours = hsic_biased(a @ a.T, b @ b.T)
    assert torch.allclose(ours, plain, rtol=1e-10)


def test_upstream_gradient_of_unbiased_is_symmetric_through_the_gram():
    # Raw autograd's gradient of the Gram is not symmetric; the row gradient (G + Gᵀ)a is what counts.
    a, b = rows(), rows(seed=1)
    gram_a = (a @ a.T).requires_grad_()
    (raw,) = torch.autograd.grad(hsic_unbiased(gram_a, b @ b.T), gram_a)
    a.requires_grad_()
    (exact,) = torch.autograd.grad(hsic_unbiased(a @ a.T, b @ b.T), a)
    assert torch.allclose((raw + raw.T) @ a, exact, rtol=1e-10, atol=1e-14)


@ALL
@pytest.mark.parametrize("case", ["one zero row", "all zero rows", "identical rows", "clamped rows"])
def test_degenerate_rows_have_finite_values_and_gradients(estimator, case):
    a, b = rows(), rows(seed=1)
    if case == "one zero row":
        a[2] = 0
    elif case == "all zero rows":
        a = torch.zeros_like(a)
    elif case == "identical rows":
        a = a[:1].repeat(5, 1)
    else:
        a = a * 1e-15
    for first, second in ((a, b), (b, a), (a, a)):
        first, second = first.clone().requires_grad_(), second.clone().requires_grad_()
        value = estimator(first @ first.T, second @ second.T)
        assert value.isfinite()
        assert all(g.isfinite().all() for g in torch.autograd.grad(value, (first, second)))
