"""batch_norm: both derivatives by kernel against the reference, and what PyTorch's own gives."""

from __future__ import annotations

import pytest
import torch

from sib_fast.ops.batch_norm import batch_norm, reference
from sib_fast.testing.assertions import assert_no_worse_than
from tests.derivatives import assert_written_and_threads_change_no_bit, second_order

SHAPES = [(4, 3, 5, 6), (8, 5), (2, 7, 9), (3, 2, 2, 3, 4), (2, 1, 1, 1), (5, 33, 4, 4)]


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


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_inputs_are_read_as_they_are_and_rounded_once(dtype, layout, kernel):
    """Every result is the float64 one of the same numbers to one rounding of the half; parameters' gradients to float32's."""
    x, weight, bias = make((6, 5, 9, 7))
    x, weight, bias = x.to(dtype).contiguous(memory_format=layout), weight.float(), bias.float()
    draw = torch.Generator("cpu").manual_seed(1)
    drawn = (torch.randn(x.shape, generator=draw, device="cpu").to(x.device, dtype) for _ in range(2))
    grad_y, u = (t.contiguous(memory_format=layout) for t in drawn)

    def all_derivatives(wide):
        leaf, w, b = (t.detach().to(wide or t.dtype).requires_grad_() for t in (x, weight, bias))
        cotangent = grad_y.to(wide or dtype).requires_grad_()
        y = batch_norm(leaf, w, b, backend=kernel)[0]
        first = torch.autograd.grad(y, (leaf, w, b), cotangent, create_graph=True)
        second = torch.autograd.grad(first[0], (cotangent, leaf, w), u.to(wide or dtype))
        return [t.detach() for t in (y, *first, *second)]

    exact = all_derivatives(torch.float64)
    for k, (got, want) in enumerate(zip(all_derivatives(None), exact, strict=True)):
        assert got.dtype == (dtype if want.ndim == 4 else torch.float32)
        if want.ndim == 4:
            assert got.is_contiguous(memory_format=layout), k
        bound = torch.finfo(got.dtype).eps * (0.51 if want.ndim == 4 else 64)
        torch.testing.assert_close(got.double(), want, rtol=bound, atol=2e-5, msg=lambda m, k=k: f"{k}: {m}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_sums_do_not_overflow(dtype, kernel):
    """PyTorch's own double backward overflows float16 at n = 65,536: the sum of as many ones is Inf."""
    x = torch.randn(4, 2, 128, 128).to(dtype).requires_grad_()
    assert x.numel() // 2 == 65536
    y, _, _ = batch_norm(x, backend=kernel)
    assert y.dtype == dtype
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y) + y.detach(), create_graph=True)
    (second,) = torch.autograd.grad(grad.float().square().sum(), x)
    assert torch.isfinite(second).all()


def other_layouts(x):
    """Layouts read as they are, and layouts that are copied."""
    last = x.movedim(1, -1).contiguous().movedim(-1, 1)
    return {
        "channels_last": last,
        "strided": x.repeat_interleave(2, dim=-1)[..., ::2],
        "slice": torch.cat([last, last])[: len(x)],
    }


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (70, 3, 2, 2), (4, 6, 5), (2, 3, 2, 3, 4), (3, 4, 1, 1), (9, 1, 3, 3)], ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "strided", "slice"])
def test_layouts(shape, layout, kernel):
    """The same numbers; channels last stays channels last, whatever the layout of the cotangents."""
    x, weight, bias = make(shape)
    want = second_order(by_kernel(kernel), x, weight, bias, torch.float64)
    other = other_layouts(x)[layout]
    got = second_order(by_kernel(kernel), other, weight, bias, torch.float64)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    if layout == "channels_last" and 1 not in shape[1:]:
        y = batch_norm(other, weight, bias, backend=kernel)[0]
        assert y.stride() == other.stride()
        grad_x = got[1]
        assert grad_x.stride() == other.stride()


def test_layouts_that_need_no_copy_are_not_copied(kernel):
    """Neither forward, nor backward, nor double backward copies a channels last activation."""
    copies = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if any(word in str(func) for word in ("copy", "clone", "contiguous")):
                copies.append(str(func))
            return func(*args, **(kwargs or {}))

    x = torch.randn(3, 4, 5, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    with Recorder():
        y = batch_norm(x, backend=kernel)[0]
        (grad,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
        (second,) = torch.autograd.grad(grad, x, torch.ones_like(grad))
    assert copies == []
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (y, grad, second))


def test_the_result_is_no_view(kernel):
    """An in-place ReLU on a view costs a copy of the base, forward and backward."""
    y = batch_norm(torch.randn(3, 4, 5, 6, requires_grad=True), backend=kernel)[0]
    assert y._base is None
    torch.nn.functional.relu_(y)
    assert "CopySlices" not in y.grad_fn.name()


def test_broadcast_cotangents(kernel):
    leaf = make((3, 4, 5, 6))[0].requires_grad_()
    (grad,) = torch.autograd.grad(batch_norm(leaf, backend=kernel)[0].sum(), leaf)
    assert grad.abs().max() < 1e-12


@pytest.mark.parametrize("far", [1e6, 1e9], ids=str)
def test_one_pass_variance_about_a_far_pivot(far, kernel):
    """The pivot is the channel's first element; here it is the one outlier. Channels first and last."""
    x = torch.randn(4, 3, 20, 20, dtype=torch.float64)
    x[0, :, 0, 0] = far
    for tensor in (x, x.contiguous(memory_format=torch.channels_last)):
        _, mean, variance = batch_norm(tensor, backend=kernel)
        # (pivot − mean)² <= n·variance, so that what cancels is n roundings, a few of them a term.
        bound = 4 * (x.numel() // 3) * torch.finfo(torch.float64).eps
        torch.testing.assert_close(mean, x.mean((0, 2, 3)), rtol=bound, atol=0)
        torch.testing.assert_close(variance, x.var((0, 2, 3), correction=0), rtol=bound, atol=0)


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


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_every_element_is_written_and_threads_change_no_bit(layout, kernel, poisoned_memory):
    x, *affine = make((9, 5, 16, 17))  # several chunks of rows, of different lengths
    x = x if layout == torch.contiguous_format else x.contiguous(memory_format=layout)
    assert_written_and_threads_change_no_bit(lambda: second_order(by_kernel(kernel), x, *affine, torch.float32))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own doing
def test_opcheck(kernel, registered):
    op = registered
    for dtype in (torch.float64, torch.float32, torch.bfloat16) if kernel == "cpu" else (torch.bfloat16,):
        x = torch.randn(3, 4, 5, 6).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
        wide = torch.float32 if dtype == torch.bfloat16 else dtype
        weight, bias = (torch.randn(4, dtype=wide, requires_grad=True) for _ in range(2))
        torch.library.opcheck(op._batch_norm.default, (x, weight, bias, 1e-5))
        torch.library.opcheck(op._batch_norm.default, (x, None, None, 1e-5))
        _, mean, _, invstd = op._batch_norm(x.detach(), weight.detach(), bias.detach(), 1e-5)
        for addend in (None, torch.randn_like(x)):
            made = (torch.randn_like(x), x.detach(), weight.detach(), mean, invstd, addend, True)
            torch.library.opcheck(op._batch_norm_backward.default, made)
        torch.library.opcheck(
            op._batch_norm_double_backward.default,
            (torch.randn_like(x), None, None, torch.randn_like(x), x.detach(), weight.detach(), mean, invstd, True, True),
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
