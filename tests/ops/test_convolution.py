"""convolution: PyTorch's values, and both derivatives against PyTorch's own double backward in float64."""

from __future__ import annotations

import pytest
import torch

import sib_fast
import sib_fast.ops.convolution as convolution_op
from sib_fast.ops.convolution import choice, convolution, reference

CASES = {
    "3x3": ((3, 4, 9, 8), (6, 4, 3, 3), ([1, 1], [1, 1], [1, 1], 1)),
    "strided": ((2, 3, 11, 10), (5, 3, 3, 3), ([2, 2], [1, 1], [1, 1], 1)),
    "1x1": ((2, 5, 6, 6), (4, 5, 1, 1), ([1, 1], [0, 0], [1, 1], 1)),
    "depthwise": ((2, 6, 7, 7), (6, 1, 3, 3), ([1, 1], [1, 1], [1, 1], 6)),
    "grouped-dilated": ((2, 4, 9, 9), (8, 2, 3, 3), ([1, 1], [2, 2], [2, 2], 2)),
    "asymmetric": ((2, 3, 8, 12), (4, 3, 1, 5), ([1, 2], [0, 2], [1, 1], 1)),
    "stem": ((2, 3, 21, 20), (6, 3, 7, 7), ([2, 2], [3, 3], [1, 1], 1)),
    "dilated-strided": ((2, 3, 15, 14), (4, 3, 3, 3), ([2, 2], [2, 2], [2, 2], 1)),
    "patches": ((2, 3, 14, 13), (5, 3, 4, 4), ([4, 4], [0, 0], [1, 1], 1)),
    "3d": ((2, 2, 4, 5, 6), (4, 2, 3, 3, 3), ([1, 2, 1], [1, 1, 1], [1, 1, 1], 1)),
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


def test_input_gradient_by_phases_is_the_input_gradient():
    """Kernels smaller and larger than the stride, padding beyond the kernel, pixels that no window sees."""
    count = 0
    draw = torch.Generator().manual_seed(0)
    for _ in range(400):
        kernel, stride, padding, size = (
            torch.randint(low, high, (2,), generator=draw).tolist() for low, high in ((1, 9), (1, 6), (0, 10), (1, 26))
        )
        if any(s + 2 * p < k for s, p, k in zip(size, padding, kernel, strict=True)):
            continue
        x, weight = torch.randn(2, 3, *size, dtype=torch.float64), torch.randn(4, 3, *kernel, dtype=torch.float64)
        grad_y = torch.randn_like(reference.convolution(x, weight, None, stride, padding, [1, 1], 1))
        want = torch.ops.aten.convolution_backward(
            grad_y, x, weight, None, stride, padding, [1, 1], False, [0, 0], 1, [True, False, False]
        )[0]
        got = convolution_op._input_gradient_by_phases(grad_y, x, weight, stride, padding)
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
        count += 1
    assert count > 300


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_large_depthwise_weight_gradient_in_channels_last(layout, monkeypatch):
    """The same number from either layout, in float64 to rounding, in the weight's own layout; taken by the rule."""
    x = torch.randn(2, 6, 15, 14, dtype=torch.float64).contiguous(memory_format=layout)
    weight, geometry = torch.randn(6, 1, 5, 5, dtype=torch.float64), ([1, 1], [2, 2], [1, 1], 6)
    grad_y = torch.randn_like(x)
    calls, way = [], convolution_op._weight_gradient_in_channels_last
    monkeypatch.setattr(convolution_op, "_weight_gradient_in_channels_last", lambda *a: calls.append(1) or way(*a))
    got = torch.ops.sib_fast_convolution.backward(grad_y, x, weight, *geometry, False, True, True, True)
    want = torch.ops.aten.convolution_backward(grad_y, x, weight, [6], *geometry[:3], False, [0, 0], 6, [True, True, True])
    assert calls == [1]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    assert got[1].is_contiguous()


def test_weight_gradient_by_the_map_is_the_weight_gradient():
    """Kernels, strides, dilations, paddings and maps that do not fit each other."""
    count, draw = 0, torch.Generator().manual_seed(0)
    for _ in range(200):
        kernel, stride, dilation, padding, size = (
            torch.randint(low, high, (2,), generator=draw).tolist() for low, high in ((1, 5), (1, 4), (1, 4), (0, 4), (1, 14))
        )
        if any(s + 2 * p < d * (k - 1) + 1 for s, p, d, k in zip(size, padding, dilation, kernel, strict=True)):
            continue
        x, weight = torch.randn(2, 3, *size, dtype=torch.float64), torch.randn(4, 3, *kernel, dtype=torch.float64)
        grad_y = torch.randn_like(reference.convolution(x, weight, None, stride, padding, dilation, 1))
        want = torch.ops.aten.convolution_backward(
            grad_y, x, weight, None, stride, padding, dilation, False, [0, 0], 1, [False, True, False]
        )[1]
        got = convolution_op._weight_gradient_by_map(grad_y, x, weight, stride, padding, dilation)
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
        count += 1
    assert count > 100


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_many_channels_on_a_small_map_go_by_the_map(layout, monkeypatch):
    x, weight = (torch.randn(s, dtype=torch.float64).contiguous(memory_format=layout) for s in ((2, 384, 5, 4), (384, 384, 3, 3)))
    grad_y, geometry = torch.randn_like(x), ([1, 1], [1, 1], [1, 1], 1)
    calls, way = [], convolution_op._weight_gradient_by_map
    monkeypatch.setattr(convolution_op, "_weight_gradient_by_map", lambda *a: calls.append(1) or way(*a))
    got = torch.ops.sib_fast_convolution.backward(grad_y, x, weight, *geometry, False, False, True, True)
    want = torch.ops.aten.convolution_backward(grad_y, x, weight, [384], *geometry[:3], False, [0, 0], 1, [False, True, True])
    assert calls == [1]
    for a, b in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    assert got[1].stride() == weight.stride()


@pytest.mark.parametrize("case", ["stem", "patches"])
def test_phases_serve_the_first_layer_in_float32_and_in_its_layout(case, monkeypatch):
    shape_x, shape_w, geometry = CASES[case]
    x, weight = torch.randn(shape_x).contiguous(memory_format=torch.channels_last), torch.randn(shape_w)
    grad_y = torch.randn_like(convolution(x, weight, None, *geometry))
    calls, phases = [], convolution_op._input_gradient_by_phases
    monkeypatch.setattr(convolution_op, "_input_gradient_by_phases", lambda *a: calls.append(1) or phases(*a))
    op = torch.ops.sib_fast_convolution.backward
    got = op(grad_y, x, weight, *geometry, False, True, True, False)
    assert calls == [1]
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    exact = op(grad_y.double(), x.double(), weight.double(), *geometry, False, True, True, False)
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_opcheck():
    op = torch.ops.sib_fast_convolution
    x, w, b = torch.randn(2, 2, 5, 5), torch.randn(4, 2, 3, 3), torch.randn(4)
    geometry = ([1, 1], [1, 1], [1, 1], 1, False)
    torch.library.opcheck(op.forward.default, (x, w, b, *geometry))
    torch.library.opcheck(op.backward.default, (torch.randn(2, 4, 5, 5), x, w, *geometry, True, True, False))
    wide, kernel = torch.randn(2, 4, 14, 14), torch.randn(4, 1, 5, 5)
    torch.library.opcheck(
        op.backward.default, (torch.randn_like(wide), wide, kernel, [1, 1], [2, 2], [1, 1], 4, False, True, True, False)
    )
    stem, weight, geometry = torch.randn(2, 3, 9, 9), torch.randn(4, 3, 5, 5), ([2, 2], [2, 2], [1, 1], 1, True)
    torch.library.opcheck(op.backward.default, (torch.randn(2, 4, 5, 5), stem, weight, *geometry, True, False, False))
    small, many = torch.randn(2, 384, 3, 3), torch.randn(384, 384, 3, 3)
    torch.library.opcheck(
        op.backward.default, (torch.randn_like(small), small, many, [1, 1], [1, 1], [1, 1], 1, False, False, True, False)
    )


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


@pytest.mark.parametrize("groups", [1, 4])
def test_a_layer_takes_the_way_that_its_devices_rules_say(groups, monkeypatch):
    layer, x = sib_fast.nn.Conv2d(4, 4, 3, groups=groups), torch.randn(2, 4, 6, 6)
    assert "sib_fast_convolution" in layer(x).grad_fn.name()
    monkeypatch.setitem(choice.RULES, "cpu", choice.RULES["cpu"]._replace(second=lambda x, weight, groups: groups == 1))
    assert ("sib_fast_convolution" in layer(x).grad_fn.name()) == (groups == 1)


def test_a_device_without_rules_runs_pytorchs_own():
    """CUDA has the safe row, taken without a measurement: no map-sized kernels, no loop over groups, the library's kernels."""
    depthwise = torch.empty(8, 96, 56, 56, device="meta"), torch.empty(96, 1, 7, 7, device="meta")
    stem, patch = torch.empty(8, 3, 224, 224, device="meta"), torch.empty(64, 3, 7, 7, device="meta")
    small, many = torch.empty(8, 512, 7, 7, device="meta"), torch.empty(512, 512, 3, 3, device="meta")
    assert choice.rules_of(torch.device("cpu")).weight_by_map(small, small, many, 1)
    for device, second in (("cuda", True), ("mps", False)):
        rules = choice.rules_of(torch.device(device))
        assert rules.second(*depthwise, 96) == rules.second(stem, patch, 1) == second
        assert not rules.input_by_phases(stem, patch, [2, 2], [1, 1], 1)
        assert not rules.weight_in_channels_last(depthwise[0], *depthwise, 96)
        assert not rules.weight_by_map(small, small, many, 1)
    assert choice.rules_of(torch.device("cpu")).input_by_phases(stem, patch, [2, 2], [1, 1], 1)
    assert "unverified" in choice.RULES["cuda"].evidence
