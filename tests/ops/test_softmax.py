"""softmax: both derivatives by kernel and composed, against the reference, and what PyTorch's own gives."""

from __future__ import annotations

import pytest
import torch

import sib_fast.ops.softmax as softmax_op
from sib_fast.ops.softmax import _double_backward_composed, reference, softmax
from sib_fast.testing.assertions import assert_no_worse_than
from sib_fast.testing.counting import OpLog
from tests.derivatives import assert_written_and_threads_change_no_bit

KERNELS = ("cpu", "cuda", "emulated")
SHAPES = [(3, 4, 17), (5, 1), (7,), (2, 300), (1000, 37)]


@pytest.fixture
def kernel(kernel, monkeypatch) -> str:
    """Under "emulated" the CUDA kernel takes the CPU kernel's place: a double backward is not told a backend."""
    if kernel == "emulated":
        monkeypatch.setitem(softmax_op._KERNEL_OF, "cpu", "sib_fast_emulated")
        monkeypatch.setattr(softmax_op, "KERNELS", [*softmax_op.KERNELS, "emulated"])
    return kernel


def second_order(function, x, dtype):
    """y, its gradient, and the gradients of both parts of the double backward."""
    g = torch.Generator("cpu").manual_seed(1)
    leaf = x.to(dtype).requires_grad_()
    drawn = (torch.randn(x.shape, generator=g, dtype=torch.float64, device="cpu") for _ in range(2))
    cotangent, u = (t.to(x.device, dtype) for t in drawn)
    y = function(leaf)
    (first,) = torch.autograd.grad(y, leaf, cotangent.requires_grad_(), create_graph=True)
    return [t.detach() for t in (y, first, *torch.autograd.grad(first, (cotangent, leaf), u))]


def by_kernel(kernel):
    return lambda x: softmax(x, backend=kernel)


def make(shape, scale=3.0):
    return scale * torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64_agrees_with_the_reference(shape, kernel):
    x = make(shape)
    got, want = (second_order(f, x, torch.float64) for f in (by_kernel(kernel), reference.softmax))
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= 1e-12 * max(b.norm(), 1e-3)


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_is_no_worse_than_pytorchs_own(shape, scale, kernel):
    x = make(shape, scale)
    got, low = (second_order(f, x, torch.float32) for f in (by_kernel(kernel), lambda t: torch.softmax(t, -1)))
    exact = second_order(reference.softmax, x.float().double(), torch.float64)
    for k, (a, b, c) in enumerate(zip(got, low, exact, strict=True)):
        assert_no_worse_than(a, b, c, what=str(k))


def test_gradcheck_and_gradgradcheck(kernel):
    x = make((3, 5)).requires_grad_()
    assert torch.autograd.gradcheck(by_kernel(kernel), x)
    assert torch.autograd.gradgradcheck(by_kernel(kernel), x)


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_kernel_is_the_composed_one_rounded_once(dtype, needs, kernel):
    y = torch.softmax(make((6, 45)), -1).to(dtype)
    u, grad_y = (torch.randn(6, 45).to(dtype) for _ in range(2))
    got = torch.ops.sib_fast_softmax.double_backward(u, grad_y, y, *needs)
    want = _double_backward_composed(u.double(), grad_y.double(), y.double(), *needs)
    for a, b, need in zip(got, want, needs, strict=True):
        assert a.dtype == dtype
        assert a.shape == ((6, 45) if need else (0,))
        half = dtype in (torch.float16, torch.bfloat16)
        # One rounding of a half; and what the calculation's own precision leaves of terms of order 1 that cancel.
        wide = 8 * torch.finfo(torch.float32 if half else dtype).eps
        torch.testing.assert_close(a.double(), b, rtol=0.51 * torch.finfo(dtype).eps if half else wide, atol=wide)
    composed = _double_backward_composed(u, grad_y, y, *needs)
    assert [t.dtype for t in composed] == [dtype, dtype]


@pytest.mark.parametrize("layout", ["strided", "transposed", "expanded"])
def test_layouts(layout, kernel):
    x = make((3, 4, 6))
    other = {
        "strided": x.repeat_interleave(2, dim=-1)[..., ::2],
        "transposed": x.transpose(0, 2).contiguous().transpose(0, 2),
        "expanded": x[:1].expand(3, 4, 6),
    }[layout]
    want = second_order(by_kernel(kernel), other.contiguous(), torch.float64)
    for a, b in zip(second_order(by_kernel(kernel), other, torch.float64), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_the_double_backward_is_one_op(kernel):
    """The op, and PyTorch's kernel on the way from y to x: nothing else."""
    x = make((3, 5)).requires_grad_()
    u = torch.randn(3, 5).double()
    (first,) = torch.autograd.grad(softmax(x, backend=kernel), x, torch.ones_like(x), create_graph=True)
    with OpLog() as log:
        torch.autograd.grad(first, x, u)
    names = [name for name, _ in log.ops if "detach" not in name]
    assert names == ["sib_fast_softmax.double_backward.default", "sib_fast_softmax.backward.default"]


def test_the_kernel_runs_and_not_the_composition(kernel, monkeypatch):
    for device in softmax_op._KERNEL_OF:
        monkeypatch.setitem(softmax_op._KERNEL_OF, device, "sib_fast_of_nobody")
    with pytest.raises(AttributeError, match="sib_fast_of_nobody"):
        torch.ops.sib_fast_softmax.double_backward(*torch.randn(3, 2, 5).unbind(), True, True)


def test_every_element_is_written_and_threads_change_no_bit(kernel, poisoned_memory):
    y = torch.softmax(torch.randn(1100, 37), -1)  # several blocks of rows, and a rest
    u, g = torch.randn(1100, 37), torch.randn(1100, 37)
    assert_written_and_threads_change_no_bit(lambda: torch.ops.sib_fast_softmax.double_backward(u, g, y, True, True))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4)], ids=str)
def test_empty(shape, kernel):
    assert all(t.shape == shape for t in second_order(by_kernel(kernel), make(shape), torch.float32))


def test_third_derivative_is_refused_in_words(kernel):
    x = make((3, 4)).requires_grad_()
    (first,) = torch.autograd.grad(softmax(x, backend=kernel).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivative exists only with backend='reference'"):
        second.sum().backward()
    (first,) = torch.autograd.grad(softmax(x, backend="reference").pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)
    assert torch.isfinite(torch.autograd.grad(second.sum(), x)[0]).all()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own doing
def test_opcheck(kernel, registered):
    op, x = torch.ops.sib_fast_softmax, torch.randn(3, 4, 5, requires_grad=True)
    y, u = torch.softmax(x.detach(), -1), torch.randn(3, 4, 5)
    torch.library.opcheck(op.forward.default, (x,))
    torch.library.opcheck(op.backward.default, (u, y))
    torch.library.opcheck(op.double_backward.default, (u, u + 1, y, True, True))
    torch.library.opcheck(registered._softmax_double_backward.default, (u, u + 1, y, True, False))


@pytest.mark.parametrize(
    ("x", "error", "match"),
    [
        (torch.tensor(1.0), ValueError, r"x must have shape \[\*, L\], got \[\]"),
        (torch.ones(3, dtype=torch.int64), TypeError, "x must be float64, float32"),
        ("x", TypeError, "x must be a tensor, got str"),
    ],
)
def test_bad_input(x, error, match):
    with pytest.raises(error, match=match):
        softmax(x)
