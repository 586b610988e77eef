"""pooling: PyTorch's values and derivatives, without the zeros of its double backward."""

from __future__ import annotations

import pytest
import torch

from sib_fast.ops.pooling import avg_pool2d, max_pool2d, reference

MAX = {
    "resnet": ([3, 3], [2, 2], [1, 1], [1, 1], False),
    "vgg": ([2, 2], [2, 2], [0, 0], [1, 1], False),
    "ceil-dilated": ([2, 3], [2, 1], [1, 1], [2, 1], True),
}
AVERAGE = {
    "densenet": ([2, 2], [2, 2], [0, 0], False, True, None),
    "padded": ([3, 2], [2, 1], [1, 1], True, False, None),
    "divisor": ([3, 3], [1, 2], [1, 0], False, True, 5),
}
CASES = [
    *(pytest.param(max_pool2d, reference.max_pool2d, g, id=f"max-{name}") for name, g in MAX.items()),
    *(pytest.param(avg_pool2d, reference.avg_pool2d, g, id=f"average-{name}") for name, g in AVERAGE.items()),
]


def second_order(function, x):
    g = torch.Generator().manual_seed(1)
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = function(leaf)
    cotangent = torch.randn(y.shape, generator=g, dtype=x.dtype).requires_grad_()
    (first,) = torch.autograd.grad(y, leaf, cotangent, create_graph=True)
    weight = torch.randn(x.shape, generator=g, dtype=x.dtype)
    (second,) = torch.autograd.grad((first * weight).sum(), cotangent, create_graph=True)
    return [t.detach() for t in (y, first, second)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("ours", "theirs", "geometry"), CASES)
def test_values_and_both_derivatives_are_pytorchs(ours, theirs, geometry, layout):
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64).contiguous(memory_format=layout)
    for a, b in zip(*(second_order(lambda t, f=f: f(t, *geometry), x) for f in (ours, theirs)), strict=True):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    assert ours(x, *geometry).is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout_of_u", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_the_double_backward_of_the_maximum_keeps_channels_last(layout_of_u):
    """torch.gather's result is contiguous: every layer before the pooling would then have to convert."""
    x = torch.randn(2, 3, 9, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = max_pool2d(x, *MAX["resnet"])
    cotangent = torch.randn_like(y).requires_grad_()
    (first,) = torch.autograd.grad(y, x, cotangent, create_graph=True)
    (second,) = torch.autograd.grad(first, cotangent, torch.randn_like(x).contiguous(memory_format=layout_of_u))
    assert second.is_contiguous(memory_format=torch.channels_last)
    assert not second.is_contiguous()


@pytest.mark.parametrize(("ours", "theirs", "geometry"), CASES)
def test_gradgradcheck(ours, theirs, geometry):
    x = torch.randperm(2 * 2 * 5 * 6).double().view(2, 2, 5, 6).mul(0.1).requires_grad_()  # no two maxima near each other
    assert torch.autograd.gradcheck(lambda t: ours(t, *geometry), x)
    assert torch.autograd.gradgradcheck(lambda t: ours(t, *geometry), x)


@pytest.mark.parametrize(("ours", "theirs", "geometry"), CASES)
def test_the_double_backward_makes_no_zeros(ours, theirs, geometry):
    def zeros(function):
        x = torch.randn(2, 3, 8, 8, requires_grad=True)
        y = function(x, *geometry)
        cotangent = torch.ones_like(y).requires_grad_()
        (first,) = torch.autograd.grad(y, x, cotangent, create_graph=True)
        names = []

        class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                names.append(str(func))
                return func(*args, **(kwargs or {}))

        u = torch.ones_like(first)
        with Recorder():
            torch.autograd.grad(first, [cotangent, x], u, allow_unused=True)
        return sum("zeros" in name for name in names)

    assert zeros(theirs) > 0, "PyTorch no longer makes zeros: is this op still needed?"
    assert zeros(ours) == 0


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own doing
def test_opcheck():
    op, x = torch.ops.sib_fast_pooling, torch.randn(2, 3, 8, 8, requires_grad=True)
    y, indices = op.max(x.detach(), *MAX["resnet"])
    torch.library.opcheck(op.max.default, (x, *MAX["resnet"]))
    torch.library.opcheck(op.max_backward.default, (torch.randn_like(y), x.detach(), indices, *MAX["resnet"]))
    torch.library.opcheck(op.average.default, (x, *AVERAGE["padded"]))
    y = op.average(x.detach(), *AVERAGE["padded"])
    torch.library.opcheck(op.average_backward.default, (torch.randn_like(y), x.detach(), *AVERAGE["padded"]))
