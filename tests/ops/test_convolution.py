"""convolution: PyTorch's values, and both derivatives against PyTorch's own double backward in float64."""

from __future__ import annotations

import pytest
import torch

from sib_fast.ops.convolution import convolution, reference

CASES = {
    "3x3": ((3, 4, 9, 8), (6, 4, 3, 3), ([1, 1], [1, 1], [1, 1], 1)),
    "strided": ((2, 3, 11, 10), (5, 3, 3, 3), ([2, 2], [1, 1], [1, 1], 1)),
    "1x1": ((2, 5, 6, 6), (4, 5, 1, 1), ([1, 1], [0, 0], [1, 1], 1)),
    "depthwise": ((2, 6, 7, 7), (6, 1, 3, 3), ([1, 1], [1, 1], [1, 1], 6)),
    "grouped-dilated": ((2, 4, 9, 9), (8, 2, 3, 3), ([1, 1], [2, 2], [2, 2], 2)),
    "asymmetric": ((2, 3, 8, 12), (4, 3, 1, 5), ([1, 2], [0, 2], [1, 1], 1)),
    "1d": ((2, 3, 12), (4, 3, 5), ([2], [2], [1], 1)),
}


def second_order(function, tensors):
    """y, its gradients, and the gradients of a function of those: every path of the double backward."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    g = torch.Generator().manual_seed(1)
    y = function(*leaves)
    cotangent = torch.randn(y.shape, generator=g, dtype=y.dtype).requires_grad_()
    first = torch.autograd.grad(y, leaves, cotangent, create_graph=True)
    scalar = sum((t * torch.randn(t.shape, generator=g, dtype=t.dtype)).sum() for t in first)
    second = torch.autograd.grad(scalar, [cotangent, *leaves[:2]])
    return [t.detach() for t in (y, *first, *second)]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("case", CASES)
def test_both_derivatives_are_pytorchs(case, bias):
    shape_x, shape_w, geometry = CASES[case]
    tensors = [torch.randn(shape_x, dtype=torch.float64), torch.randn(shape_w, dtype=torch.float64)]
    if bias:
        tensors.append(torch.randn(shape_w[0], dtype=torch.float64))

    def call(function):
        return lambda x, w, b=None: function(x, w, b, *geometry)

    got, want = second_order(call(convolution), tensors), second_order(call(reference.convolution), tensors)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_gradgradcheck():
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 2, 4, 3), (3, 2, 3, 3), (3,)))
    assert torch.autograd.gradgradcheck(lambda *t: convolution(*t, [1, 1], [1, 1], [1, 1], 1), (x, w, b))


def test_opcheck():
    op = torch.ops.sib_fast_convolution
    x, w, b = torch.randn(2, 2, 5, 5), torch.randn(4, 2, 3, 3), torch.randn(4)
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    torch.library.opcheck(op.forward.default, (x, w, b, *geometry))
    torch.library.opcheck(op.backward.default, (torch.randn(2, 4, 5, 5), x, w, *geometry, True, True, False))


def convolution_shapes(function):
    """Shapes of the weights of every convolution that a double backward runs."""
    shapes = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.convolution.default:
                shapes.append(tuple(args[1].shape))
            return func(*args, **(kwargs or {}))

    x, w = torch.randn(2, 6, 12, 12, requires_grad=True), torch.randn(6, 1, 3, 3, requires_grad=True)
    (first,) = torch.autograd.grad(function(x, w, None, [1, 1], [1, 1], [1, 1], 6).square().sum(), x, create_graph=True)
    with Recorder():
        first.square().sum().backward()
    return shapes


def test_no_convolution_with_a_map_sized_kernel():
    """PyTorch's has kernels of 12×12, one convolution a group; ours runs its own ops, and they the ordinary backward."""
    theirs = convolution_shapes(reference.convolution)
    assert (1, 2, 12, 12) in theirs, "PyTorch no longer does it: is this op still needed?"
    assert theirs.count((1, 2, 12, 12)) == 6
    assert [shape for shape in convolution_shapes(convolution) if shape[-1] > 3] == []
