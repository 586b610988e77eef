"""activation: PyTorch's values and first derivatives, one pass for the second, against the formula in float64."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F

import sib_fast.ops.activation as activation_op
from sib_fast import _backends
from sib_fast.ops.activation import KINDS, activation, reference
from sib_fast.testing.assertions import assert_no_worse_than
from sib_fast.testing.counting import OpLog
from tests.derivatives import assert_written_and_threads_change_no_bit

KERNELS = ("cpu", "cuda", "emulated")

PARAMETERS = {"hardtanh": (-1.5, 2.0), "leaky_relu": (0.1,), "elu": (0.7,), "softplus": (1.5, 20.0)}
CASES = [(kind, PARAMETERS.get(kind, ())) for kind in KINDS]
ids = [kind for kind, _ in CASES]
OWN = {
    "relu": F.relu,
    "hardtanh": F.hardtanh,
    "leaky_relu": F.leaky_relu,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "mish": F.mish,
    "elu": F.elu,
    "softplus": F.softplus,
}
SMOOTH = [case for case in CASES if KINDS[case[0]].second is not None]
TWO_SLOPES = [case for case in CASES if KINDS[case[0]].bits is not None]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NAMESPACE = "sib_fast_emulated"
TILE = 256 * 16  # bytes of a tensor that one block of the CUDA kernel takes at a time
UNIT = 512  # elements whose bits lie in 64 bytes, csrc/common/activation_bits.h
two_slopes = pytest.mark.parametrize(("kind", "parameters"), TWO_SLOPES, ids=[kind for kind, _ in TWO_SLOPES])
smooth = pytest.mark.parametrize(("kind", "parameters"), SMOOTH, ids=[kind for kind, _ in SMOOTH])


@pytest.fixture
def kernel(kernel, monkeypatch) -> str:
    """Under "emulated" the CUDA kernel takes the CPU kernel's place: a double backward is not told a backend."""
    if kernel == "emulated":
        monkeypatch.setitem(activation_op._KERNEL_OF, "cpu", (NAMESPACE, True))
        monkeypatch.setattr(activation_op, "KERNELS", [*activation_op.KERNELS, "emulated"])
    return kernel


def double_backward(u, grad_y, saved, kind, parameters, need_grad_y=True, need_saved=True):
    op = torch.ops.sib_fast_activation.double_backward
    return op(u, grad_y, saved, kind, [float(p) for p in parameters], need_grad_y, need_saved)


def kernels(kernel):
    """The private ops that `kernel` runs."""
    return getattr(torch.ops, activation_op._KERNEL_OF["cuda" if kernel == "cuda" else "cpu"][0])


def second_order(function, x, dtype=torch.float64, seed=1):
    """y, grad_x, and the gradients of a function of those with respect to the cotangent and x."""
    g = torch.Generator("cpu").manual_seed(seed)
    leaf = x.detach().to(dtype).requires_grad_()
    draw = lambda: torch.empty_strided(x.shape, x.stride(), dtype=dtype).copy_(torch.randn(x.shape, generator=g, device="cpu"))  # noqa: E731
    cotangent, weight = draw().requires_grad_(), draw()
    y = function(leaf)
    (first,) = torch.autograd.grad(y, leaf, cotangent, create_graph=True)
    to_cotangent, to_x = torch.autograd.grad((first * weight).sum(), [cotangent, leaf], allow_unused=True)
    return [y.detach(), first.detach(), to_cotangent, torch.zeros_like(x, dtype=dtype) if to_x is None else to_x]


def inputs(shape=(4, 5, 6, 7)):
    """From -9 to 9, past every kink; never at one."""
    return 3 * torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("inplace", [False, True], ids=["out-of-place", "in-place"])
@pytest.mark.parametrize(("kind", "parameters"), CASES, ids=ids)
def test_float64_agrees_with_the_formula(kind, parameters, inplace, kernel):
    x = inputs()

    def ours(t):
        return activation(t * 1 if inplace else t, kind, *parameters, inplace=inplace, backend=kernel)

    got = second_order(ours, x)
    want = second_order(lambda t: activation(t, kind, *parameters, backend="reference"), x)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    if KINDS[kind].second is not None:
        assert want[3].abs().max() > 1e-10 * 1e3  # far outside the bound, were it left out
    assert want[2].abs().max() > 1e-10 * 1e3


@pytest.mark.parametrize(("kind", "parameters"), CASES, ids=ids)
def test_values_and_first_derivatives_are_pytorchs_bit_for_bit_at_kinks_too(kind, parameters, kernel):
    x = torch.tensor([-6.0, -3.0, -1.5, -0.0, 0.0, 2.0, 3.0, 6.0, -40.0, 40.0, 1e-30, -1e-30])
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        results = []
        for function in (OWN[kind], lambda t, *p: activation(t, kind, *p, backend=kernel)):
            leaf = x.to(dtype).requires_grad_()
            y = function(leaf, *parameters)
            results.append((y.detach(), *torch.autograd.grad(y.sum(), leaf)))
        for a, b in zip(*results, strict=True):
            if kind == "hardsigmoid" and dtype == torch.float64:
                torch.testing.assert_close(a, b, rtol=1e-7, atol=0)  # PyTorch's has a float32 sixth
            elif kind == "mish" and leaf.device.type == "meta":  # tests/pretend.py: there PyTorch composes mish's gradient
                torch.testing.assert_close(a, b, rtol=4 * torch.finfo(dtype).eps, atol=0)
            else:
                assert torch.equal(a, b)


@pytest.mark.parametrize(("kind", "parameters"), CASES, ids=ids)
def test_float32_is_no_worse_than_pytorchs_own(kind, parameters, kernel):
    x = inputs((8, 16, 9, 5)).float().double()
    got = second_order(lambda t: activation(t, kind, *parameters, backend=kernel), x, torch.float32)
    exact = second_order(lambda t: reference.activation(t, kind, *parameters), x)
    low = second_order(
        (lambda t: reference.activation(t, kind)) if kind == "hardsigmoid" else lambda t: OWN[kind](t, *parameters),
        x,
        torch.float32,
    )
    for name, a, b, c in zip(("y", "grad_x", "to_grad_y", "to_x"), got, low, exact, strict=True):
        assert_no_worse_than(a, b, c, what=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@smooth
def test_halves_are_rounded_once(kind, parameters, dtype, kernel):
    """The kernel's double backward of half tensors is the float32 one of the same numbers, rounded."""
    x = inputs((3, 4, 5, 5)).to(dtype)
    rule = KINDS[kind]
    saved = OWN[kind](x, *parameters) if rule.saves_result else x
    u, g = torch.randn_like(saved), torch.randn_like(saved)
    got = double_backward(u, g, saved, kind, parameters)
    wide = double_backward(u.float(), g.float(), saved.float(), kind, parameters)
    for a, b in zip(got, wide, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(got[1], wide[1].to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_to_half_is_to_nearest_even(dtype, kernel):
    """u·gy of 200,000 pairs, subnormal and overflowing ones and a hundred ties among them; and every half there is."""
    exponents = torch.exp2(torch.randint(-18, 10, (200_000,)).float())
    pairs = ((torch.randn(200_000) * exponents).to(dtype), torch.randn(200_000).to(dtype))
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for u, g in (pairs, (every, torch.ones_like(every))):
        got = torch.ops.sib_fast_activation.double_backward(u, g, torch.zeros_like(u), "sigmoid", [], False, True)[1]
        torch.testing.assert_close(got, (u.float() * g.float()).to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("kind", "parameters"), CASES, ids=ids)
def test_gradcheck_and_gradgradcheck(kind, parameters, kernel):
    x = inputs((3, 7)).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: activation(t, kind, *parameters, backend=kernel), x)
    assert torch.autograd.gradgradcheck(lambda t: activation(t, kind, *parameters, backend=kernel), x)


@smooth
def test_kernel_and_composed_agree_far_out(kind, parameters, kernel):
    """Where exp overflows and where 1 − tanh vanishes: finite and equal."""
    rule = KINDS[kind]
    x = torch.linspace(-120, 120, 2001, dtype=torch.float64)
    saved = OWN[kind](x, *parameters) if rule.saves_result else x
    from sib_fast.ops.activation import _double_backward_composed

    one = torch.ones_like(saved)
    for dtype, bound in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
        arguments = (one.to(dtype), one.to(dtype), saved.to(dtype), kind, list(parameters), True, True)
        got = torch.ops.sib_fast_activation.double_backward(*arguments)
        want = _double_backward_composed(one, one, saved.to(dtype).double(), kind, list(parameters), True, True)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=bound, atol=bound)


@smooth
def test_kinks_and_values_that_are_not_finite_are_pytorchs(kind, parameters, kernel):
    """Equal where PyTorch's is finite; not finite where PyTorch's is not."""
    inf, nan = float("inf"), float("nan")
    points = [-3.0, 3.0, 0.0, -0.0, 20.0 / 1.5, 20.0, 0.5, -0.5, inf, -inf]
    if kind not in ("hardswish", "elu"):  # there PyTorch's vector code and its tail disagree about NaN (CPU, torch 2.14)
        points.append(nan)
    cotangents = [(2.0, 3.0), (inf, 3.0), (2.0, inf), (nan, 3.0), (2.0, nan), (0.0, 3.0)]
    x = torch.tensor([p for p in points for _ in cotangents])
    u, g = (torch.tensor([pair[k] for _ in points for pair in cotangents]) for k in range(2))
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-13)):  # PyTorch's silu cancels at 20 in float32
        results = []
        for function in (OWN[kind], lambda t, *p: activation(t, kind, *p, backend=kernel)):
            leaf, cotangent = (t.to(dtype).requires_grad_() for t in (x, g))
            (first,) = torch.autograd.grad(function(leaf, *parameters), leaf, cotangent, create_graph=True)
            results.append(torch.autograd.grad(first, [cotangent, leaf], u.to(dtype)))
        for name, want, got in zip(("to_grad_y", "to_x"), *results, strict=True):
            finite = want.isfinite()
            assert finite.sum() > 10
            assert torch.equal(got.isfinite(), finite), (name, x[got.isfinite() != finite], u[got.isfinite() != finite])
            torch.testing.assert_close(got[finite], want[finite], rtol=bound, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_and_views_that_no_pack_divides(dtype, kernel, poisoned_memory):
    """Whole tiles, part of one, views that start between two packs: every element, the same bits as element by element."""
    tile, draw = TILE // dtype.itemsize, lambda n: (2 * torch.randn(n + 1)).to(dtype)
    for count in (1, 7, tile - 1, tile, tile + 1, 2 * tile + 77):
        u, g, x = (draw(count) for _ in range(3))
        exact = [
            t.double() for t in activation_op._double_backward_composed(*(t.double() for t in (u, g, x)), "silu", [], True, True)
        ]
        for first in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)):
            views = [t[k:][:count] if k else t[:count] for t, k in zip((u, g, x), first, strict=True)]
            moved = [t.clone() for t in views]
            got, want = double_backward(*views, "silu", ()), double_backward(*moved, "silu", ())
            for a, b in zip(got, want, strict=True):
                assert a.shape == (count,)
                assert torch.equal(a, b), (count, first)
        for a, b in zip(double_backward(u, g, x, "silu", ()), exact, strict=True):
            eps = torch.finfo(dtype).eps  # of the largest value, since f'' crosses zero
            torch.testing.assert_close(a.double(), b, rtol=4 * eps, atol=2 * eps * b.abs().max().item())


def test_more_tiles_than_blocks(kernel):
    """Every block of the CUDA kernel takes a second tile: as if a part alone had been asked for."""
    count = 16 * 132 * TILE // 8 + 700
    u, g, x = (torch.randn(count, dtype=torch.float64) for _ in range(3))
    got = double_backward(u, g, x, "tanh", ())
    torch.testing.assert_close(got[0], u * (1 - x * x), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(got[1], -2 * u * g * x, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@smooth
def test_each_part_alone_is_the_same_part(kind, parameters, dtype, kernel):
    u, g, saved = (torch.randn(3, 700).to(dtype) for _ in range(3))
    both = double_backward(u, g, saved, kind, parameters)
    first = double_backward(u, g, saved, kind, parameters, True, False)
    second = double_backward(u, g, saved, kind, parameters, False, True)
    assert first[1].numel() == second[0].numel() == 0
    torch.testing.assert_close(first[0], both[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(second[1], both[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("saved_layout", ["contiguous", "channels_last", "permuted", "strided"])
def test_mixed_layouts(saved_layout, kernel, poisoned_memory):
    """The result lies as the saved tensor does, if that is contiguous or channels last, whatever the cotangents' layouts."""
    base = inputs((2, 5, 6, 4))
    layouts = {
        "contiguous": lambda t: t,
        "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
        "permuted": lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    }
    saved, u, g = layouts[saved_layout](base), torch.randn_like(base), torch.randn_like(base)
    want = activation_op._double_backward_composed(u, g, base, "silu", [], True, True)
    for of_u in layouts.values():
        for of_g in layouts.values():
            got = double_backward(of_u(u), of_g(g), saved, "silu", ())
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
                assert a.is_contiguous(memory_format=torch.channels_last) == (saved_layout == "channels_last")
                assert a.is_contiguous() == (saved_layout != "channels_last")


def test_the_kernel_refuses_what_it_cannot_read(kernel):
    """Reached through the private op only; a wrong pointer would read another tensor."""
    op = kernels(kernel)._activation_double_backward
    x = torch.randn(2, 3, 4, 5)
    for bad, match in (
        (x[:1], "must have the shape of x"),
        (x.double(), "must have the dtype of x"),
        (x.contiguous(memory_format=torch.channels_last), "must have the layout of x"),
    ):
        with pytest.raises(RuntimeError, match="u " + match):
            op(bad, x, x, 1, 0.0, 0.0, True, True)
        with pytest.raises(RuntimeError, match="grad_y " + match):
            op(x, bad, x, 1, 0.0, 0.0, True, True)
    with pytest.raises(RuntimeError, match="x must have the layout of x"):
        op(x[..., ::2], x[..., ::2], x[..., ::2], 1, 0.0, 0.0, True, True)
    for number in (-1, 9):
        with pytest.raises(RuntimeError, match="kind must be a number"):
            op(x, x, x, number, 0.0, 0.0, True, True)
    with pytest.raises(RuntimeError, match="x must be float64, float32"):
        op(x.int(), x.int(), x.int(), 1, 0.0, 0.0, True, True)


def test_the_kernel_runs_and_not_the_composition(kernel, monkeypatch):
    for device in activation_op._KERNEL_OF:
        monkeypatch.setitem(activation_op._KERNEL_OF, device, ("sib_fast_of_nobody", True))
    with pytest.raises(AttributeError, match="sib_fast_of_nobody"):
        double_backward(*torch.randn(3, 5).unbind(), "silu", ())


def filled(step):
    """How many activation-sized tensors of zeros, and how many ops, a call makes."""
    with OpLog() as log:
        step()  # allocates nothing itself
    zeros = [name for name, _ in log.ops if "zeros" in name or "fill" in name or "zero_" in name]
    return len(zeros), len(log.ops)


@pytest.mark.parametrize("kind", ["relu", "leaky_relu"])
def test_the_double_backward_makes_no_zeros(kind):
    def double_backward(function):
        x, parameters = torch.randn(4, 5, requires_grad=True), PARAMETERS.get(kind, ())
        cotangent = torch.ones(4, 5, requires_grad=True)
        (first,) = torch.autograd.grad(function(x, *parameters), x, cotangent, create_graph=True)
        u = torch.ones(4, 5)
        return lambda: torch.autograd.grad(first, [cotangent, x], u, allow_unused=True)

    assert filled(double_backward(OWN[kind]))[0] > 0, "PyTorch no longer makes zeros: is this op still needed?"
    zeros, ops = filled(double_backward(lambda x, *p: activation(x, kind, *p)))
    assert zeros == 0
    assert ops == 1, "one pass for the cotangent, nothing for x"


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh", "hardswish", "sigmoid"])
def test_the_double_backward_is_one_kernel(kind, kernel):
    x = torch.randn(4, 5, requires_grad=True)
    (first,) = torch.autograd.grad(activation(x, kind, backend=kernel).sum(), x, create_graph=True)
    u = torch.ones(4, 5)
    ops = filled(lambda: torch.autograd.grad(first, [x], u))[1]
    assert ops <= 3, "the kernel, and for kinds that save y the way from y to x"


@pytest.mark.parametrize("layout", ["channels_last", "strided", "transposed"])
@pytest.mark.parametrize("kind", ["relu", "silu"])
def test_layouts(kind, layout, kernel):
    x = inputs((3, 4, 5, 6))
    want = second_order(lambda t: activation(t, kind, backend=kernel), x)
    other = {
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "strided": x.repeat_interleave(2, dim=3)[..., ::2],
        "transposed": x.transpose(1, 3).contiguous().transpose(1, 3),
    }[layout]
    g = torch.Generator("cpu").manual_seed(1)
    leaf = other.detach().requires_grad_()
    cotangent, weight = (torch.randn(x.shape, generator=g, device="cpu").double().to(x.device) for _ in range(2))
    cotangent.requires_grad_()
    y = activation(leaf, kind, backend=kernel)
    (first,) = torch.autograd.grad(y, leaf, cotangent, create_graph=True)
    second = torch.autograd.grad((first * weight).sum(), [cotangent, leaf], allow_unused=True)
    for a, b in zip((y, first, *second), want, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    if layout == "channels_last":
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", ["relu", "hardtanh", "silu"])
def test_in_place_is_torchs_in_place(kind):
    """The caller's tensor changes, an alias sees it, a leaf refuses, a tensor that autograd kept says so."""
    parameters = PARAMETERS.get(kind, ())
    x = torch.randn(3, 4)
    want, alias = OWN[kind](x, *parameters), x.view(12)
    assert activation(x, kind, *parameters, inplace=True) is x
    assert torch.equal(x, want)
    assert torch.equal(alias, want.view(12))
    leaf = torch.randn(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        activation(leaf, kind, *parameters, inplace=True)
    y = leaf.exp()  # exp keeps its result
    activation(y, kind, *parameters, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_in_place_on_a_view_and_on_the_result_of_another_op():
    """ResNet's `out += identity; relu(out)`, and a slice: the base sees the change and its gradient."""
    results = []
    for function in (lambda t: F.relu(t, inplace=True), lambda t: activation(t, "relu", inplace=True)):
        x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
        out = x * 2
        out += x
        function(out[:, :3])
        out = out + function((out - 1)[1])
        (first,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
        results.append((out.detach(), first.detach(), *torch.autograd.grad(first.pow(2).sum(), x)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("inplace", [False, True], ids=["out-of-place", "in-place"])
@two_slopes
def test_a_bit_an_element_is_kept_and_neither_x_nor_y(kind, parameters, inplace, kernel):
    """Counted by what autograd packs, in forward, backward and double backward; and y goes when its last reader goes."""
    packed = []
    x = torch.randn(3, 2048, requires_grad=True)
    hidden = x * 1
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        y = activation(hidden, kind, *parameters, inplace=inplace, backend=kernel)
        graph = y.view_as(y)  # keeps the node, not y
        (first,) = torch.autograd.grad(graph, x, torch.randn_like(y, requires_grad=True), create_graph=True)
        first.sum().backward()
    bits = [t for t in packed if t.dtype == torch.uint8]
    assert len(bits) >= 2
    assert all(t.numel() == x.numel() // 8 for t in bits)
    assert len({t.data_ptr() for t in bits}) == 1
    assert [t for t in packed if t.dtype != torch.uint8 and t.numel() >= x.numel()] == []
    held, maps = weakref.ref(y.untyped_storage()), (graph.grad_fn, first.grad_fn)
    packed.clear()
    del y, hidden, graph
    assert held() is None
    assert all(node is not None for node in maps)


@pytest.mark.parametrize("inplace", [False, True], ids=["out-of-place", "in-place"])
@two_slopes
def test_without_a_backward_no_bits_are_made(kind, parameters, inplace, kernel):
    """PyTorch's kernel, which writes y alone: without grad, in inference mode, and where x needs no gradient."""
    x = torch.randn(4, 600)

    def ops(x):
        with OpLog() as log:
            y = activation(x.clone(), kind, *parameters, inplace=inplace)
        assert torch.equal(y, OWN[kind](x, *parameters))
        return [name.split(".")[1] for name, _ in log.ops if "sib_fast" in name]

    plain = ["forward_" if inplace else "forward"]
    leaf = x.clone().requires_grad_()
    assert ops(x) == plain
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert ops(leaf) == plain
    assert ops(leaf) == ["forward_bits_" if inplace else "forward_bits"]


def test_where_there_is_no_kernel_y_is_kept(monkeypatch):
    """The values and both derivatives are the same."""
    x = inputs()
    want = [second_order(lambda t, kind=kind, p=p: activation(t, kind, *p), x) for kind, p in TWO_SLOPES]
    for name in activation_op.KERNELS:
        monkeypatch.setitem(_backends.MISSING, name, "it was not built")
    with OpLog() as log:
        got = [second_order(lambda t, kind=kind, p=p: activation(t, kind, *p), x) for kind, p in TWO_SLOPES]
    assert not [name for name, _ in log.ops if "bits" in name]
    for a, b in zip(got, want, strict=True):
        assert all(torch.equal(c, d) for c, d in zip(a, b, strict=True))


def by_pytorch(kind, parameters, x, grad):
    leaf = x.clone().requires_grad_()
    y = OWN[kind](leaf, *parameters)
    return y.detach(), torch.autograd.grad(y, leaf, grad)[0]


def by_bits(kind, parameters, x, grad):
    given = [float(p) for p in parameters]
    y, bits = torch.ops.sib_fast_activation.forward_bits(x, kind, given)
    order = activation_op._memory_order(y)
    return y, torch.ops.sib_fast_activation.backward(grad, bits, kind, given, order), bits


def assert_same_bits(a, b):
    """The same to the bit, but for NaN's payload and the sign of zero."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@two_slopes
def test_bits_give_pytorchs_values_and_gradients_to_the_bit(kind, parameters, dtype, kernel, poisoned_memory):
    """Every special value with every other as its gradient, 64 times each (PyTorch's vector code); bounds that the dtype rounds.

    On CUDA PyTorch's rules at NaN and at -0 are others: csrc/common/activation_bits.h. The emulated kernel follows those.
    """
    inf, nan = float("inf"), float("nan")
    points = [-inf, -2.0, -1.5, -0.7, -0.3, -0.0, 0.0, 1e-7, 0.3, 0.7, 2.0, 3.0, inf, nan]
    x, g = (t.reshape(-1, 1).expand(-1, 64).reshape(-1) for t in torch.cartesian_prod(*[torch.tensor(points)] * 2).unbind(1))
    x, g = x.to(dtype).contiguous(), g.to(dtype).contiguous()
    bounds = [parameters] if kind != "hardtanh" else [parameters, (0.0, 6.0), (-0.7, 0.3), (-1.0, 0.0)]
    for given in bounds:
        y, grad, _ = by_bits(kind, given, x, g)
        want_y, want_grad = by_pytorch(kind, given, x, g)
        assert_same_bits(y, want_y)
        if kernel == "emulated" and kind == "hardtanh":  # passes there, as in PyTorch's CUDA kernel
            assert_same_bits(grad[x.isnan()], g[x.isnan()])
            grad, want_grad = grad[~x.isnan()], want_grad[~x.isnan()]
        assert_same_bits(grad, want_grad)
        if kernel != "emulated":
            assert torch.equal(y[~x.isnan()].signbit(), want_y[~x.isnan()].signbit())
        elif kind == "relu":
            assert not y[y == 0].signbit().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@two_slopes
def test_bits_of_every_count_and_of_views_between_two_packs(kind, parameters, dtype, kernel, poisoned_memory):
    """Units cut short anywhere, views that start between two packs with NaN around them, in place too. Nothing is written
    outside, and no bit past the end is set."""
    given = [float(p) for p in parameters]
    nan = float("nan")
    for count in (1, 63, 65, 511, 512, 513, 16384 + 5 * UNIT + 77):
        for shift in (0, 1):
            x, g, room = (torch.full((count + 8,), around, dtype=dtype) for around in (nan, nan, -7.0))
            x, g = (t[shift : shift + count].copy_(3 * torch.randn(count)) for t in (x, g))
            y, grad, bits = by_bits(kind, given, x, g)
            want = by_pytorch(kind, given, x.clone(), g.clone())
            assert_same_bits(y, want[0])
            assert_same_bits(grad, want[1])
            assert bits.numel() == -(-count // UNIT) * UNIT // 8
            inside = room[shift : shift + count].copy_(x)
            again = torch.ops.sib_fast_activation.forward_bits_(inside, kind, given)
            assert_same_bits(inside, y)
            assert (torch.cat([room[:shift], room[shift + count :]]) == -7).all()
            assert torch.equal(again, bits)
            passes = by_pytorch(kind, given, x.clone(), torch.ones_like(x))[1] == 1
            assert sum(int((bits & 2**k).count_nonzero()) for k in range(8)) == int(passes.sum())


def test_the_order_of_the_bits_is_the_documented_one(kernel):
    """Bit k of byte i of a unit's 64 bytes is element 64·k + i's; past the end there are zeros."""
    x = torch.randn(3 * UNIT + 300)
    bits = torch.ops.sib_fast_activation.forward_bits(x, "hardtanh", [-9.0, 9.0])[1]
    assert bits.sum() == 255 * 64 * 3 + sum(2 ** -(-(300 - i) // 64) - 1 for i in range(64))
    bits = torch.ops.sib_fast_activation.forward_bits(x, "relu", [])[1]
    passes = torch.zeros(4 * UNIT, dtype=torch.bool)
    passes[: x.numel()] = x > 0
    powers = (2 ** torch.arange(8)).to(torch.uint8).view(1, 8, 1)
    assert torch.equal(bits.view(-1, 64), (passes.view(-1, 8, 64) * powers).sum(1).to(torch.uint8))


def test_more_units_than_the_blocks_take_at_once(kernel):
    count = 16 * 132 * 4 * UNIT + 3 * UNIT + 9
    x, g = torch.randn(count, dtype=torch.float64), torch.randn(count, dtype=torch.float64)
    y, grad, _ = by_bits("relu", (), x, g)
    assert torch.equal(y, x.relu())
    assert torch.equal(grad, torch.where(x > 0, g, 0.0))


LAYOUTS = {
    "contiguous": lambda t: t.clone(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "permuted": lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "channels_last with gaps": lambda t: torch.cat([t, t], 1).contiguous(memory_format=torch.channels_last)[:, : t.shape[1]],
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("inplace", [False, True], ids=["out-of-place", "in-place"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_lie_as_their_tensor_whatever_the_gradients_layout(layout, inplace, kernel, poisoned_memory):
    """Values, both derivatives and y's layout are PyTorch's, for every pair of layouts; the gradient lies as y does."""
    if layout == "expanded" and inplace:
        pytest.skip("PyTorch refuses to write into one place twice")
    base, g, u = (LAYOUTS[layout](inputs((3, 5, 6, 4))) if i == 0 else inputs((3, 5, 6, 4)) for i in range(3))
    for of_g in LAYOUTS.values():
        for of_u in (LAYOUTS["contiguous"], LAYOUTS["channels_last"], LAYOUTS["strided"]):
            results = []
            for function in (F.relu, lambda t, inplace: activation(t, "relu", inplace=inplace, backend=kernel)):
                leaf = base.detach().requires_grad_()
                cotangent = of_g(g).detach().requires_grad_()
                # A tensor that is no leaf and lies as the leaf does.
                written = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype).copy_(leaf) if inplace else leaf
                y = function(written, inplace=inplace)
                (first,) = torch.autograd.grad(y, leaf, cotangent, create_graph=True)
                results.append((y, first, torch.autograd.grad(first, cotangent, of_u(u))[0]))
            for a, b in zip(*results, strict=True):
                assert torch.equal(a, b)
            assert results[0][0].stride() == results[1][0].stride()
            if layout in ("contiguous", "channels_last", "permuted"):
                grad = torch.autograd.grad(activation(leaf, "relu", backend=kernel), leaf, of_g(g))[0]
                assert grad.stride() == leaf.stride()


def test_in_place_on_a_view_with_gaps_keeps_the_view(kernel):
    """Its bits would have no memory's order to lie in."""
    x = inputs((4, 6)).requires_grad_()
    out = x * 2
    with OpLog() as log:
        activation(out[1], "relu", inplace=True, backend=kernel)
        activation(out[:, :3], "relu", inplace=True, backend=kernel)
    assert [name.split(".")[1] for name, _ in log.ops if "sib_fast" in name] == ["forward_bits_", "forward_"]
    want = x.detach() * 2
    want[1].relu_()
    want[:, :3].relu_()
    assert torch.equal(out, want)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(grad, 2.0 * (want == 2 * x))


def test_every_order_of_derivative_by_bits(kernel):
    """relu of a square, differentiated four times."""
    results = []
    for function in (torch.relu, lambda t: activation(t, "relu", backend=kernel)):
        x = torch.linspace(-2, 3, 600, dtype=torch.float64).requires_grad_()
        y = function(x**3 - x).pow(2)
        for _ in range(4):
            (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
            results.append(y.detach())
    for a, b in zip(results[:4], results[4:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-11)
    assert results[3].abs().max() > 1


def test_a_tensor_of_no_dimensions_and_subnormal_numbers(kernel):
    for value in (2.0, -2.0, 5e-324, -5e-324):
        results = []
        for function in (F.relu, lambda t: activation(t, "relu", backend=kernel)):
            x = torch.tensor(value, dtype=torch.float64, requires_grad=True)
            y = function(x)
            results.append((y.detach(), *torch.autograd.grad(y, x)))
        assert results[0] == results[1]


def test_halves_on_the_cpu_keep_bits_where_that_is_no_slower(kernel):
    def kept(kind, dtype):
        y = activation(torch.randn(9, requires_grad=True).to(dtype), kind, *PARAMETERS.get(kind, ()))
        return any(t.dtype == torch.uint8 for t in y.grad_fn.saved_tensors)  # held: up to torch 2.12 the node alone has none

    found = {(kind, dtype) for kind, _ in TWO_SLOPES for dtype in DTYPES if kept(kind, dtype)}
    not_kept = {
        ("relu", torch.float16),
        ("hardtanh", torch.float16),
        ("leaky_relu", torch.float16),
        ("leaky_relu", torch.bfloat16),
    }
    assert {(kind, dtype) for kind, _ in TWO_SLOPES for dtype in DTYPES} - found == (set() if kernel == "cuda" else not_kept)


def test_the_bits_kernels_refuse_what_they_cannot_read(kernel):
    """Reached through the private ops only; a wrong length would read past the bits."""
    forward, backward = kernels(kernel)._activation_bits, kernels(kernel)._activation_bits_backward
    x = torch.randn(2, 3, 4, 5)
    bits = forward(x, torch.empty_like(x), 0, 0.0, 0.0)
    for bad, match in (
        (x[:1], "y must have the shape and layout of x"),
        (x.double(), "y must have the dtype of x"),
        (x.contiguous(memory_format=torch.channels_last), "y must have the shape and layout of x"),
    ):
        with pytest.raises(RuntimeError, match=match):
            forward(x, bad, 0, 0.0, 0.0)
    for gaps in (x[..., ::2], x[:1].expand(2, 3, 4, 5), x.as_strided((3, 3), (2, 2)), x.as_strided((2, 2), (1, 1))):
        with pytest.raises(RuntimeError, match="x must lie in memory without gaps"):
            forward(gaps, gaps, 0, 0.0, 0.0)
        with pytest.raises(RuntimeError, match="grad_y must lie in memory without gaps"):
            backward(gaps, bits, 0, 0.0)
    for number in (-1, 3):
        with pytest.raises(RuntimeError, match="kind must be a number"):
            forward(x, x, number, 0.0, 0.0)
        with pytest.raises(RuntimeError, match="kind must be a number"):
            backward(x, bits, number, 0.0)
    with pytest.raises(RuntimeError, match="x must be float64, float32"):
        forward(x.int(), x.int(), 0, 0.0, 0.0)
    with pytest.raises(RuntimeError, match="bits must have 128 elements, got 64"):
        backward(torch.randn(513), bits, 0, 0.0)
    with pytest.raises(RuntimeError, match="bits has an unexpected dtype"):
        backward(x, bits.char(), 0, 0.0)


def test_third_derivative(kernel):
    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    for kind, exists in (("relu", True), ("silu", False)):
        (first,) = torch.autograd.grad(activation(x, kind, backend=kernel).pow(4).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)
        if exists:
            (third,) = torch.autograd.grad(second.sum(), x)
            assert torch.isfinite(third).all()
        else:
            with pytest.raises(NotImplementedError, match="third derivative exists only with backend='reference'"):
                second.sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own doing
@pytest.mark.sampled(3, always="relu")
@pytest.mark.parametrize(("kind", "parameters"), CASES, ids=ids)
def test_opcheck(kind, parameters, kernel):
    op, given = torch.ops.sib_fast_activation, [float(p) for p in parameters]
    x = torch.randn(3, 4, 5, requires_grad=True)
    g = torch.randn(3, 4, 5)
    if kernel != "emulated":  # PyTorch's in any case
        torch.library.opcheck(op.forward.default, (x, kind, given))
        torch.library.opcheck(op.forward_.default, (x.detach().clone(), kind, given))
        torch.library.opcheck(op.backward.default, (g, x.detach(), kind, given))
    if KINDS[kind].bits is not None:
        torch.library.opcheck(op.forward_bits.default, (x, kind, given))
        torch.library.opcheck(op.forward_bits.default, (x.detach().transpose(0, 2).requires_grad_(), kind, given))
        torch.library.opcheck(op.forward_bits_.default, (x.detach().clone(), kind, given))
        bits = op.forward_bits(x.detach(), kind, given)[1]
        for order in ([0, 1, 2], [2, 0, 1]):
            torch.library.opcheck(op.backward.default, (g.requires_grad_(), bits, kind, given, order))
    if KINDS[kind].second is not None:
        torch.library.opcheck(op.double_backward.default, (g, g + 1, x.detach(), kind, given, True, True))


def test_every_element_is_written_and_threads_change_no_bit(kernel, poisoned_memory):
    x, u, g = (inputs((3, 70000)).float() for _ in range(3))  # more than one block a thread, and a rest

    def run():
        return *torch.ops.sib_fast_activation.double_backward(u, g, x, "silu", [], True, True), *by_bits("relu", (), x, g)

    assert_written_and_threads_change_no_bit(run)


@pytest.mark.parametrize("shape", [(0,), (0, 3, 4, 4), (2, 0, 3)], ids=str)
def test_empty(shape, kernel):
    for kind in ("relu", "silu"):
        results = second_order(lambda t, kind=kind: activation(t, kind, backend=kernel), torch.empty(shape))
        assert all(r.shape == shape for r in results)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((torch.ones(3), "swoosh"), ValueError, "kind must be one of 'relu', .*, got 'swoosh'"),
        ((torch.ones(3), "elu"), ValueError, "parameters must be 1 numbers for 'elu', got 0"),
        ((torch.ones(3), "leaky_relu", -0.1), ValueError, r"the slope must be at least 0, .* got -0\.1"),
        ((torch.ones(3, dtype=torch.int64), "relu"), TypeError, "x must be float64, float32"),
        (("x", "relu"), TypeError, "x must be a tensor, got str"),
    ],
)
def test_bad_input(arguments, error, match):
    with pytest.raises(error, match=match):
        activation(*arguments)
