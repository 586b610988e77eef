"""layer_norm and group_norm: both derivatives by kernel against the reference, and what PyTorch's own gives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sib_fast.ops.layer_norm import group_norm, layer_norm, reference
from sib_fast.testing.assertions import assert_no_worse_than
from tests.derivatives import assert_written_and_threads_change_no_bit, second_order

# A problem: the shape of x, and normalized_shape or the number of groups. Rows shorter and longer than a vector, a tail, one
# row, one element a row, more than one chunk of rows, several normalised dimensions; groups of one channel and one group.
LAYERS = [
    ((4, 5, 24), (24,)),
    ((2, 3, 4, 5), (4, 5)),
    ((1, 7), (7,)),
    ((6, 1), (1,)),
    ((33,), (33,)),
    ((2000, 19), (19,)),
    ((3, 130), (130,)),
]
GROUPS = [((3, 6, 5, 7), 2), ((4, 6, 9), 3), ((2, 4), 2), ((2, 3, 2, 3, 4), 1), ((3, 4, 4, 4), 4), ((40, 8, 13, 9), 2)]
PROBLEMS = [*LAYERS, *GROUPS]


def ids(value) -> str:
    return str(value).replace(" ", "")


def by_kernel(kernel, rows, eps=1e-5):
    if isinstance(rows, tuple):
        return lambda x, w=None, b=None: layer_norm(x, rows, w, b, eps=eps, backend=kernel)
    return lambda x, w=None, b=None: group_norm(x, rows, w, b, eps=eps, backend=kernel)


def by_reference(rows, eps=1e-5):
    function = reference.layer_norm if isinstance(rows, tuple) else reference.group_norm
    return lambda x, w=None, b=None: function(x, rows, w, b, eps)


def own(rows, eps=1e-5):
    if isinstance(rows, tuple):
        return lambda x, w=None, b=None: F.layer_norm(x, rows, w, b, eps)
    return lambda x, w=None, b=None: F.group_norm(x, rows, w, b, eps)


def make(shape, rows, affine="both"):
    """x, weight, bias in float64; affine: "both", "weight", "bias" or "none"."""
    parameter = rows if isinstance(rows, tuple) else (shape[1],)
    weight, bias = (torch.randn(parameter, dtype=torch.float64) for _ in range(2))
    x = 2 * torch.randn(shape, dtype=torch.float64) + 3
    return x, weight if affine in ("both", "weight") else None, bias if affine in ("both", "bias") else None


@pytest.mark.parametrize("affine", ["both", "weight", "bias", "none"])
@pytest.mark.parametrize(("shape", "rows"), PROBLEMS, ids=ids)
def test_float64_agrees_with_the_reference(shape, rows, affine, kernel):
    problem = make(shape, rows, affine)
    got = second_order(by_kernel(kernel, rows), *problem, torch.float64)
    want = second_order(by_reference(rows), *problem, torch.float64)
    assert len(got) == len(want)
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape
        assert (a - b).norm() <= 1e-12 * max(b.norm(), 10), k


@pytest.mark.parametrize(("shape", "rows"), [p for p in PROBLEMS if p[0] != (6, 1)], ids=ids)
def test_float32_is_no_worse_than_pytorchs_own(shape, rows, kernel):
    problem = make(shape, rows)
    got, low = (second_order(f, *problem, torch.float32) for f in (by_kernel(kernel, rows), own(rows)))
    exact = second_order(by_reference(rows), *(t.float().double() for t in problem), torch.float64)
    for k, (a, b, c) in enumerate(zip(got, low, exact, strict=True)):
        assert_no_worse_than(a, b, c, what=str(k))


@pytest.mark.parametrize("rows", [(48,), 3], ids=ids)
@pytest.mark.parametrize(("mean", "deviation"), [(1e4, 1.0), (-3e2, 1e-3), (1e6, 4.0), (0.0, 1e-9)], ids=str)
def test_a_huge_mean_beside_a_small_deviation(mean, deviation, rows, kernel):
    """The row's mean is taken off without losing what it hides; eps is as small as not to hide it either."""
    x, weight, bias = make((6, 48) if isinstance(rows, tuple) else (6, 6, 8), rows)
    problem = mean + deviation * (x - 3), weight, bias
    eps = 1e-3 * deviation**2
    functions = by_kernel(kernel, rows, eps), own(rows, eps)
    got, low = (second_order(f, *problem, torch.float32) for f in functions)
    exact = second_order(by_reference(rows, eps), *(t.float().double() for t in problem), torch.float64)
    for k, (a, b, c) in enumerate(zip(got, low, exact, strict=True)):
        assert_no_worse_than(a, b, c, what=str(k))
        assert (a - c).norm() <= 2e-5 * c.norm(), k  # PyTorch's own is off by up to 1 here


def test_a_constant_row(kernel):
    """No deviation: y is the bias, and the derivatives are those of eps alone."""
    problem = torch.full((3, 24), 7.5, dtype=torch.float64), *make((3, 24), (24,))[1:]
    got, want = (second_order(f, *problem, torch.float64) for f in (by_kernel(kernel, (24,)), by_reference((24,))))
    assert torch.equal(got[0], problem[2].expand(3, 24))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("affine", ["both", "weight", "none"])
@pytest.mark.parametrize(("shape", "rows"), [((3, 7), (7,)), ((2, 4, 3), 2)], ids=ids)
def test_gradcheck_and_gradgradcheck(shape, rows, affine, kernel):
    inputs = [None if t is None else t.requires_grad_() for t in make(shape, rows, affine)]
    assert torch.autograd.gradcheck(by_kernel(kernel, rows), inputs)
    assert torch.autograd.gradgradcheck(by_kernel(kernel, rows), inputs)


@pytest.mark.parametrize("rows", [(45,), 5], ids=ids)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_inputs_are_read_as_they_are_and_rounded_once(dtype, rows, kernel):
    """Every result is the float64 one of the same numbers to one rounding of the half; parameters' gradients to float32's."""
    shape = (6, 9, 45) if isinstance(rows, tuple) else (6, 5, 9, 5)
    x, weight, bias = make(shape, rows)
    x, weight, bias = x.to(dtype), weight.float(), bias.float()
    grad_y, u = (torch.randn(shape).to(dtype) for _ in range(2))

    def all_derivatives(wide):
        leaf, w, b = (t.detach().to(wide or t.dtype).requires_grad_() for t in (x, weight, bias))
        cotangent = grad_y.to(wide or dtype).requires_grad_()
        y = by_kernel(kernel, rows)(leaf, w, b)
        first = torch.autograd.grad(y, (leaf, w, b), cotangent, create_graph=True)
        second = torch.autograd.grad(first[0], (cotangent, leaf, w), u.to(wide or dtype))
        return [t.detach() for t in (y, *first, *second)]

    for k, (got, want) in enumerate(zip(all_derivatives(None), all_derivatives(torch.float64), strict=True)):
        of_x = want.shape == x.shape
        assert got.dtype == (dtype if of_x else torch.float32)
        bound = torch.finfo(got.dtype).eps * (0.51 if of_x else 64)
        torch.testing.assert_close(got.double(), want, rtol=bound, atol=2e-5, msg=lambda m, k=k: f"{k}: {m}")


@pytest.mark.parametrize("layout", ["channels_last", "strided", "transposed", "slice"])
@pytest.mark.parametrize("rows", [(6,), (5, 6), 2], ids=ids)
def test_layouts(layout, rows, kernel):
    x, weight, bias = make((3, 4, 5, 6), rows)
    want = second_order(by_kernel(kernel, rows), x, weight, bias, torch.float64)
    other = {
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "strided": x.repeat_interleave(2, dim=-1)[..., ::2],
        "transposed": x.transpose(1, 3).contiguous().transpose(1, 3),
        "slice": torch.cat([x, x])[:3],
    }[layout]
    got = second_order(by_kernel(kernel, rows), other, weight, bias, torch.float64)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    if rows == 2 and layout == "channels_last":
        assert by_kernel(kernel, rows)(other).is_contiguous(memory_format=torch.channels_last)


def test_broadcast_cotangents(kernel):
    leaf = make((3, 24), (24,))[0].requires_grad_()
    (grad,) = torch.autograd.grad(layer_norm(leaf, (24,), backend=kernel).sum(), leaf)
    assert grad.abs().max() < 1e-12


def calls_of(function, name):
    """Arguments of every call of an op, seen where PyTorch dispatches it."""
    seen = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._overloadpacket._qualified_op_name.split("::")[1] == name:
                seen.append(args)
            return func(*args, **(kwargs or {}))

    with Recorder():
        function()
    return seen


@pytest.mark.parametrize("affine", ["both", "bias"])
def test_only_the_gradients_that_a_pass_needs_are_computed(affine, kernel):
    x, weight, bias = (None if t is None else t.requires_grad_() for t in make((4, 24), (24,), affine))
    y = layer_norm(x, (24,), weight, bias, backend=kernel)
    run = {
        (True, False, False): lambda: torch.autograd.grad(y.sum(), x, retain_graph=True),
        (False, False, True): lambda: torch.autograd.grad(y.sum(), bias, retain_graph=True),
        (True, affine == "both", True): lambda: y.sum().backward(),
    }
    for needs, function in run.items():
        ((*_, need_x, need_weight, need_bias),) = calls_of(function, "_layer_norm_backward")
        assert (need_x, need_weight, need_bias) == needs


def test_third_derivative_is_refused_in_words(kernel):
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(layer_norm(x, (8,), backend=kernel).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivative exists only with backend='reference'"):
        second.sum().backward()


@pytest.mark.parametrize(("shape", "rows"), [((700, 70), (70,)), ((20, 6, 17, 16), 3)], ids=ids)
def test_every_element_is_written_and_threads_change_no_bit(shape, rows, kernel, poisoned_memory):
    problem = make(shape, rows)  # several chunks of rows, of different lengths
    assert_written_and_threads_change_no_bit(lambda: second_order(by_kernel(kernel, rows), *problem, torch.float32))


def test_empty(kernel):
    for shape, rows in (((0, 5), (5,)), ((2, 0, 5), (5,)), ((0, 4, 3), 2)):
        x, weight, bias = make(shape, rows)
        y, *rest = second_order(by_kernel(kernel, rows), x, weight, bias, torch.float64)
        assert y.shape == shape
        for got, like in zip(rest, (x, weight, bias, x, x, weight), strict=True):
            assert got.shape == like.shape
            assert (got == 0).all()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own doing
def test_opcheck(kernel, registered):
    op = registered
    for dtype in (torch.float64, torch.float32, torch.bfloat16) if kernel == "cpu" else (torch.bfloat16,):
        for rows in ((20, 1, 1), (40, 2, 10)):
            x = torch.randn(3, 8, 10).to(dtype).requires_grad_()
            channels = rows[0] // rows[2] * rows[1]
            wide = torch.float32 if dtype == torch.bfloat16 else dtype
            weight, bias = (torch.randn(channels, dtype=wide, requires_grad=True) for _ in range(2))
            torch.library.opcheck(op._layer_norm.default, (x, weight, bias, *rows, 1e-5))
            torch.library.opcheck(op._layer_norm.default, (x, None, None, *rows, 1e-5))
            leaf, given = x.detach(), weight.detach()
            _, mean, invstd = op._layer_norm(leaf, given, None, *rows, 1e-5)
            statistics = (leaf, given, mean, invstd, *rows)
            torch.library.opcheck(op._layer_norm_backward.default, (torch.randn_like(leaf), *statistics, True, True, False))
            torch.library.opcheck(
                op._layer_norm_double_backward.default,
                (torch.randn_like(leaf), None, None, torch.randn_like(leaf), *statistics, True, False, True),
            )


@pytest.mark.parametrize(
    ("function", "arguments", "error", "match"),
    [
        (
            layer_norm,
            (torch.ones(2, 3), (4,)),
            ValueError,
            r"x must have shape \[\*, \*normalized_shape\], got \[2, 3\] for \(4,\)",
        ),
        (layer_norm, (torch.ones(2, 3), ()), ValueError, r"x must have shape \[\*, \*normalized_shape\]"),
        (layer_norm, (torch.ones(2, 3, dtype=torch.int64), (3,)), TypeError, "x must be float64, float32"),
        (
            layer_norm,
            (torch.ones(2, 3), (3,), torch.ones(2)),
            ValueError,
            r"weight must have shape \[3\] to go with x, got \[2\]",
        ),
        (group_norm, (torch.ones(3), 1), ValueError, r"x must have shape \[N, C, ...\], got \[3\]"),
        (group_norm, (torch.ones(2, 6), 4), ValueError, "num_groups must divide the 6 channels of x, got 4"),
        (group_norm, (torch.ones(2, 6), 2, None, torch.ones(2)), ValueError, r"bias must have shape \[6\] to go with x"),
    ],
)
def test_bad_input(function, arguments, error, match):
    with pytest.raises(error, match=match):
        function(*arguments)
