"""running_batch_norm: batch norm in eval mode, both derivatives against its formula in float64 and against PyTorch's own."""

from __future__ import annotations

import pytest
import torch

from sib_fast.ops.batch_norm.running import running_batch_norm
from sib_fast.testing.assertions import assert_no_worse_than
from sib_fast.testing.counting import OpLog

SHAPES = [(4, 3, 5, 6), (8, 5), (2, 7, 9), (3, 2, 2, 3, 4), (2, 1, 1, 1), (5, 33, 4, 4), (1, 4, 1, 1)]
EPS = 1e-3


def formula(x, weight, bias, mean, variance, eps):
    shape = [1, -1, *[1] * (x.ndim - 2)]
    y = (x - mean.view(shape)) / (variance + eps).sqrt().view(shape)
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def own(x, weight, bias, mean, variance, eps):
    return torch.nn.functional.batch_norm(x, mean, variance, weight, bias, False, 0.1, eps)


def make(shape, affine=True, dtype=torch.float64):
    """x, weight, bias, mean, variance; channels' numbers in float32 at least."""
    x = 2 * torch.randn(shape, dtype=torch.float64) + 3
    channels = [torch.randn(shape[1], dtype=torch.float64) for _ in range(3)]
    channels.append(0.1 + torch.rand(shape[1], dtype=torch.float64))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias, mean, variance = (t.to(wide) for t in channels)
    return [x.to(dtype), weight if affine else None, bias if affine else None, mean, variance]


def widened(made):
    return [None if t is None else t.double() for t in made]


def second_order(function, made, cotangents=(1, 1, 1)):
    """y, its gradients, and the gradients of some of those by random cotangents."""
    draw = torch.Generator("cpu").manual_seed(1)
    x, weight, bias, mean, variance = made
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]

    def drawn(like):
        # The same numbers in every dtype, bfloat16's, in the layout of `like`: aten's sums depend on it.
        return torch.empty_like(like).copy_(torch.randn(like.shape, generator=draw, device="cpu").bfloat16())

    cotangent = drawn(x.detach()).requires_grad_()
    present = [t for t in leaves if t is not None]
    y = function(*leaves, mean, variance, EPS)
    first = torch.autograd.grad(y, present, cotangent, create_graph=True)
    scalar = sum((t * drawn(t.detach())).sum() for t, wanted in zip(first, cotangents, strict=False) if wanted)
    second = torch.autograd.grad(scalar, [cotangent, *present], allow_unused=True)
    return [y.detach(), *(t.detach() for t in first), *second]


def laid_out(made, layout):
    x = made[0]
    return [x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "last" else x, *made[1:]]


@pytest.mark.parametrize("cotangents", [(1, 0, 0), (1, 1, 1), (0, 1, 0), (0, 0, 1)], ids=str)
@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64_agrees_with_the_formula(shape, affine, layout, cotangents):
    if not affine and not cotangents[0]:
        pytest.skip("no weight and bias to differentiate")
    made = laid_out(make(shape, affine), layout)
    got, want = (second_order(f, made, cotangents) for f in (running_batch_norm, formula))
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        # What does not depend on a leaf is absent, or zeros.
        a, b = (torch.zeros(()) if t is None else t for t in (a, b))
        assert (a - b).norm() <= 1e-12 * max(b.norm(), 1e-3), k


@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (8, 5), (5, 33, 4, 4), (6, 4, 40, 40)], ids=str)
def test_no_worse_than_pytorchs_own(shape, dtype, layout):
    made = laid_out(make(shape, dtype=dtype), layout)
    exact = second_order(formula, widened(made))
    got, low = (second_order(f, made) for f in (running_batch_norm, own))
    for k, (a, b, c) in enumerate(zip(got, low, exact, strict=True)):
        if c is not None:
            assert a.dtype == b.dtype
            assert_no_worse_than(a, b, c, what=str(k))


def test_half_parameters_and_statistics_are_widened():
    """A model that was converted whole: PyTorch's takes it too."""
    made = [t.bfloat16() for t in make((4, 3, 5, 6))]
    exact = second_order(formula, widened(made))
    for a, c in zip(second_order(running_batch_norm, made), exact, strict=True):
        if c is not None:
            assert a.dtype == torch.bfloat16
            assert (a.double() - c).norm() <= 2**-8 * c.norm()


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_gradcheck_of_three_orders(affine):
    made = make((3, 2, 2, 3), affine)
    inputs = [t.requires_grad_() for t in made[:3] if t is not None]

    def function(*leaves):
        return running_batch_norm(*(leaves if affine else (*leaves, None, None)), *made[3:], EPS)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)

    def squares(*leaves):
        return torch.autograd.grad(function(*leaves).pow(3).sum(), leaves, create_graph=True)

    assert torch.autograd.gradgradcheck(squares, inputs)


def test_the_vjp_and_its_gradient_are_one_op_each():
    """The VJP reads no x and sums nothing; the last pass is its gradient, with the weight's, and the ordinary backward."""
    x, weight, bias, mean, variance = make((4, 3, 5, 6))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    with OpLog() as log:
        y = running_batch_norm(*leaves, mean, variance, EPS)
        (vjp,) = torch.autograd.grad(y, x, torch.ones_like(y, requires_grad=True), create_graph=True)
        torch.autograd.backward([vjp, y], [torch.ones_like(y), torch.ones_like(y)])
    ops = [name.split(".")[1] for name, _ in log.ops if name.startswith("sib_fast_running_batch_norm")]
    assert ops == ["forward", "forward", "backward", "backward"]


@pytest.mark.parametrize("needed", [0, 1, 2])
def test_only_what_the_pass_needs(needed):
    x, weight, bias, mean, variance = make((4, 3, 5, 6))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = running_batch_norm(*leaves, mean, variance, EPS)
    with OpLog() as log:
        torch.autograd.grad(y, leaves[needed], torch.ones_like(y))
    calls = [arguments[-3:] for name, arguments in log.calls if name == "sib_fast_running_batch_norm.backward.default"]
    assert calls == ([] if needed == 0 else [tuple(k == needed for k in range(3))])


def test_channels_last_stays_and_nothing_is_copied():
    x, weight, bias, mean, variance = laid_out(make((3, 4, 5, 6)), "last")
    x = x.float().requires_grad_()
    channels = [t.float().requires_grad_(k < 2) for k, t in enumerate((weight, bias, mean, variance))]
    with OpLog() as log:
        y = running_batch_norm(x, *channels, EPS)
        ones = torch.ones_like(y, requires_grad=True)
        (vjp,) = torch.autograd.grad(y, x, ones, create_graph=True)
        to_ones, to_weight = torch.autograd.grad(vjp, [ones, channels[0]], torch.ones_like(vjp), retain_graph=True)
    assert to_weight.shape == (4,)
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (y, vjp, to_ones))
    assert [name for name, _ in log.ops if "copy" in name or "clone" in name] == []


@pytest.mark.parametrize("layout", ["strided", "expanded"])
def test_any_layout(layout):
    made = make((4, 3, 5, 6))
    x = made[0].repeat_interleave(2, dim=-1)[..., ::2] if layout == "strided" else made[0][:1].expand(4, 3, 5, 6)
    got = second_order(running_batch_norm, [x, *made[1:]])
    for a, b in zip(got, second_order(formula, [x.contiguous(), *made[1:]]), strict=True):
        assert b is None or (a - b).norm() <= 1e-12 * b.norm()


def test_an_empty_batch():
    x, weight, bias, mean, variance = make((0, 3, 5, 6))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = running_batch_norm(*leaves, mean, variance, EPS)
    grads = torch.autograd.grad(y.sum(), leaves)
    assert [tuple(g.shape) for g in (y, *grads)] == [(0, 3, 5, 6), (0, 3, 5, 6), (3,), (3,)]
    assert not grads[1].any()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own doing
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    op = torch.ops.sib_fast_running_batch_norm
    x, weight, bias, mean, variance = laid_out(make((3, 4, 5, 6), dtype=dtype), "last")
    x, weight, bias = (t.requires_grad_() for t in (x, weight, bias))
    torch.library.opcheck(op.forward.default, (x, weight, bias, mean, variance, EPS))
    torch.library.opcheck(op.forward.default, (x, None, None, None, variance, EPS))
    for needs in ((True, True, True), (False, True, False)):
        torch.library.opcheck(
            op.backward.default, (torch.randn_like(x), x.detach(), weight.detach(), mean, variance, EPS, *needs)
        )


def test_compiled_in_one_graph():
    made = make((4, 3, 5, 6))
    x, weight, bias = (t.requires_grad_() for t in made[:3])

    def loss(x, weight, bias):
        y = running_batch_norm(x, weight, bias, *made[3:], EPS)
        (vjp,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        return vjp.sin().sum() + y.sin().sum()

    want = torch.autograd.grad(loss(x, weight, bias), [x, weight, bias])
    torch._dynamo.reset()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x, weight, bias), [x, weight, bias])
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= 1e-12 * b.norm()
