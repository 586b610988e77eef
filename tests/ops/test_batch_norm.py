"""batch_norm: both derivatives by kernel against the reference, and what PyTorch's own gives."""

from __future__ import annotations

import pytest
import torch

from sib_fast.ops.batch_norm import batch_norm, reference
from sib_fast.testing.assertions import assert_no_worse_than

SHAPES = [(4, 3, 5, 6), (8, 5), (2, 7, 9), (3, 2, 2, 3, 4), (2, 1, 1, 1), (5, 33, 4, 4)]

KERNELS = ("cpu",)


def second_order(function, x, weight, bias, dtype, backend_seed=1):
    """y, its gradients, and the gradients of a function of those: every path of the double backward."""
    g = torch.Generator().manual_seed(backend_seed)
    leaves = [None if t is None else t.to(dtype).requires_grad_() for t in (x, weight, bias)]
    cotangent = torch.randn(x.shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    present = [t for t in leaves if t is not None]
    y = function(*leaves)
    first = torch.autograd.grad(y, present, cotangent, create_graph=True)
    weights = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(dtype) for t in first]
    scalar = sum((t * w).sum() for t, w in zip(first, weights, strict=True))
    # grad_bias does not depend on the bias, nor anything on it: its second derivative is absent, as in plain autograd.
    second = torch.autograd.grad(scalar, [cotangent, *present[:2]], allow_unused=True)
    return [y.detach(), *(t.detach() for t in first), *(t.detach() for t in second if t is not None)]


def make(shape, affine=True):
    x = 2 * torch.randn(shape, dtype=torch.float64) + 3
    return (
        (x, torch.randn(shape[1], dtype=torch.float64), torch.randn(shape[1], dtype=torch.float64)) if affine else (x, None, None)
    )


def by_kernel(kernel):
    return lambda x, w, b: batch_norm(x, w, b, backend=kernel)[0]


def by_reference(x, w, b):
    return reference.batch_norm(x, w, b, 1e-5)[0]


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64_agrees_with_the_reference(shape, affine, kernel):
    problem = make(shape, affine)
    got = second_order(by_kernel(kernel), *problem, torch.float64)
    want = second_order(by_reference, *problem, torch.float64)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= 1e-10 * max(b.norm(), 1e-3)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s != (2, 1, 1, 1)], ids=str)
def test_float32_is_no_worse_than_pytorchs_own(shape, kernel):
    problem = make(shape)

    def own(x, w, b):
        return torch.nn.functional.batch_norm(x, None, None, w, b, training=True)

    got = second_order(by_kernel(kernel), *problem, torch.float32)
    low = second_order(own, *problem, torch.float32)
    exact = second_order(by_reference, *(t.float().double() for t in problem), torch.float64)
    for k, (a, b, c) in enumerate(zip(got, low, exact, strict=True)):
        assert_no_worse_than(a, b, c, what=str(k))


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_gradcheck_and_gradgradcheck(affine, kernel):
    inputs = [None if t is None else t.requires_grad_() for t in make((3, 2, 2, 3), affine)]
    assert torch.autograd.gradcheck(by_kernel(kernel), inputs)
    assert torch.autograd.gradgradcheck(by_kernel(kernel), inputs)


def test_statistics(kernel):
    x = 1e4 + torch.randn(6, 4, 5, 5, dtype=torch.float64)
    _, mean, variance = batch_norm(x, backend=kernel)
    torch.testing.assert_close(mean, x.mean((0, 2, 3)), rtol=1e-13, atol=0)
    torch.testing.assert_close(variance, x.var((0, 2, 3), correction=0), rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_inputs_accumulate_in_float32(dtype, kernel):
    """PyTorch's own double backward overflows float16 at n = 65,536; 40,000 ones already sum past it."""
    x = torch.randn(4, 2, 100, 100).to(dtype).requires_grad_()
    y, _, _ = batch_norm(x, backend=kernel)
    assert y.dtype == dtype
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y) + y.detach(), create_graph=True)
    (second,) = torch.autograd.grad(grad.float().square().sum(), x)
    assert torch.isfinite(second).all()


def test_layouts_and_broadcast_cotangents(kernel):
    x, weight, bias = make((3, 4, 5, 6))
    want = second_order(by_kernel(kernel), x, weight, bias, torch.float64)
    for layout in (x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        got = second_order(by_kernel(kernel), layout, weight, bias, torch.float64)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    leaf = x.requires_grad_()
    (grad,) = torch.autograd.grad(batch_norm(leaf, backend=kernel)[0].sum(), leaf)
    assert grad.abs().max() < 1e-12


def test_only_the_gradients_asked_for(kernel):
    x, weight, bias = make((3, 4, 5, 6))
    weight.requires_grad_()
    y = batch_norm(x, weight, bias, backend=kernel)[0]
    (grad,) = torch.autograd.grad(y.square().sum(), weight)
    x64 = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    want = (2 * y.detach() * x64).sum((0, 2, 3))
    torch.testing.assert_close(grad, want, rtol=1e-10, atol=1e-10)


def test_third_derivative_is_refused_in_words(kernel):
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(batch_norm(x, backend=kernel)[0].pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivative exists only with backend='reference'"):
        second.sum().backward()


def test_every_element_is_written_and_threads_change_no_bit(kernel, poisoned_memory):
    problem = make((4, 5, 6, 7))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(second_order(by_kernel(kernel), *problem, torch.float32))
    finally:
        torch.set_num_threads(before)
    for result in results:
        for a, b in zip(result, results[0], strict=True):
            assert torch.isfinite(a).all()
            assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own doing
def test_opcheck(kernel):
    op = torch.ops.sib_fast
    for dtype in (torch.float64, torch.float32):
        x, weight, bias = (torch.randn(s, dtype=dtype, requires_grad=True) for s in ((3, 4, 5), (4,), (4,)))
        torch.library.opcheck(op._batch_norm.default, (x, weight, bias, 1e-5))
        torch.library.opcheck(op._batch_norm.default, (x, None, None, 1e-5))
        _, mean, _, invstd = op._batch_norm(x.detach(), weight.detach(), bias.detach(), 1e-5)
        torch.library.opcheck(
            op._batch_norm_backward.default, (torch.randn_like(x), x.detach(), weight.detach(), mean, invstd, True)
        )


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((torch.ones(3),), ValueError, r"x must have shape \[N, C, ...\], got \[3\]"),
        ((torch.ones(1, 3),), ValueError, r"x must have more than one value per channel, got \[1, 3\]"),
        ((torch.ones(2, 3, dtype=torch.int64),), TypeError, "x must be float64, float32"),
        ((torch.ones(2, 3), torch.ones(2)), ValueError, r"weight must have shape \[3\] to go with x, got \[2\]"),
    ],
)
def test_bad_input(arguments, error, match):
    with pytest.raises(error, match=match):
        batch_norm(*arguments)
