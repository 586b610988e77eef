"""The CUDA kernels of layer_norm beyond what every kernel must do: cuts, alignments, neighbours' values, far means, schedules."""

from __future__ import annotations

import itertools

import pytest
import torch

import sib_fast
from sib_fast import _backends
from sib_fast.ops.layer_norm import group_norm, layer_norm, reference
from tests.derivatives import at_offset

KERNELS = ["emulated", "cuda"]
# The shape of x and the number of groups, None for layer norm over the last dimension. Rows in registers of some lanes of a
# warp, of a warp, of several, the most that are held, and more; one part of the rows of a column and several; runs shorter
# than a pack, of several lanes, in pieces; so many channels that a block merges them.
CUTS = {
    "one element a row": ((70, 1), None),
    "a row in a lane": ((9, 8), None),
    "a row in some lanes": ((300, 19), None),
    "a warp a row": ((5, 250), None),
    "three packs a lane": ((3, 380), None),
    "a block a row": ((3, 1501), None),
    "the longest row in registers": ((2, 3072), None),
    "rows in pieces": ((2, 9001), None),
    "rows in pieces on boundaries": ((1, 9000), None),
    "columns in parts": ((600, 70), None),
    "two tiles of columns in parts": ((290, 133), None),
    "groups of columns": ((300, 12), 3),
    "runs": ((3, 6, 5, 7), 2),
    "runs on boundaries": ((2, 8, 8, 8), 4),
    "runs shorter than a pack": ((40, 4, 1, 2), 2),
    "runs in pieces": ((1, 4, 101, 103), 2),
    "a channel a row": ((3, 4, 9, 9), 4),
    "runs merged by a block": ((2, 150, 3, 3), 1),
    "runs merged by eight warps": ((1, 600, 2, 2), 1),
}
cuts = pytest.mark.parametrize(("shape", "groups"), CUTS.values(), ids=CUTS)
ACTIVATIONS = (0, 3, 6, 7)  # of `derivatives`


def draw(shape, seed, dtype=torch.float64):
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(dtype).to(torch.get_default_device())


def rows_of(shape, groups):
    """length, groups, spatial."""
    if groups is None:
        return shape[1], 1, 1
    spatial = shape[2] * shape[3] if len(shape) == 4 else 1
    return shape[1] // groups * spatial, groups, spatial


def problem(shape, groups, dtype, mean=3.0):
    """x, weight, bias, grad_y, u, u_weight, u_bias."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, grad_y, u = (2 * draw(shape, 0) + mean).to(dtype), draw(shape, 1, dtype), draw(shape, 2, dtype)
    channels = [draw(shape[1], seed, wide) for seed in range(3, 7)]
    return [x, *channels[:2], grad_y, u, *channels[2:]]


def derivatives(ops, rows, x, weight, bias, grad_y, u, u_weight, u_bias):
    """y, mean, invstd, the three gradients, and the gradients of grad_y, x and weight, by the registered ops."""
    y, mean, invstd = ops._layer_norm(x, weight, bias, *rows, 1e-5)
    first = ops._layer_norm_backward(grad_y, x, weight, mean, invstd, *rows, True, True, True)
    second = ops._layer_norm_double_backward(u, u_weight, u_bias, grad_y, x, weight, mean, invstd, *rows, True, True, True)
    return [y, mean, invstd, *first, *second]


def exact_derivatives(shape, groups, x, weight, bias, grad_y, u, u_weight, u_bias):
    """The same in plain autograd, in float64 throughout."""
    x, weight, bias, grad_y = leaves = [t.detach().double().requires_grad_() for t in (x, weight, bias, grad_y)]
    if groups is None:
        y = reference.layer_norm(x, shape[1:], weight, bias, 1e-5)
    else:
        y = reference.group_norm(x, groups, weight, bias, 1e-5)
    flat = x.detach().reshape(-1, rows_of(shape, groups)[0])
    statistics = flat.mean(1), (flat.var(1, correction=0) + 1e-5).rsqrt()
    first = torch.autograd.grad(y, leaves[:3], grad_y, create_graph=True)
    second = torch.autograd.grad(first, [grad_y, x, weight], [t.double() for t in (u, u_weight, u_bias)])
    return [t.detach() for t in (y, *statistics, *first, *second)]


def assert_close(got, want, dtype):
    """Activations to one rounding of their type, everything to float32's sums."""
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.isfinite(a).all(), k
        eps = torch.finfo(a.dtype if k in ACTIVATIONS else torch.promote_types(a.dtype, torch.float32)).eps
        # In float64 the reference's own sums are off by up to 6e-14 of the root mean square, against long double.
        accumulated = 128 * torch.finfo(torch.float64).eps if dtype == torch.float64 else 16 * torch.finfo(torch.float32).eps
        bound = 64 * torch.finfo(torch.float64).eps if dtype == torch.float64 else 0.51 * eps if k in ACTIVATIONS else 0.0
        error = (a.double() - b).abs()
        # Where everything cancels (a row of one element), roundings of numbers of order 1 / sqrt(eps) remain.
        scale = b.norm() / max(b.numel(), 1) ** 0.5 if b.norm() > 0 else 1e3
        assert (error <= bound * b.abs() + 4 * accumulated * scale).all(), (k, error.max())


@cuts
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_cut(shape, groups, dtype, registered, poisoned_memory):
    made = problem(shape, groups, dtype)
    got = derivatives(registered, rows_of(shape, groups), *made)
    assert_close(got, exact_derivatives(shape, groups, *made), dtype)


@pytest.mark.parametrize("offsets", [(1, 0, 0), (1, 1, 1), (3, 11, 3), (0, 4, 0), (2, 1, 0)], ids=str)
@pytest.mark.parametrize(
    ("shape", "groups"), [((5, 32), None), ((5, 37), None), ((1, 9001), None), ((3, 4, 4, 8), 2), ((3, 4, 5, 5), 2)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_every_alignment(shape, groups, offsets, dtype, registered):
    """Activations and parameters that start anywhere, each elsewhere: the same numbers, and nothing read from beside them."""
    x, weight, bias, grad_y, u, *rest = made = problem(shape, groups, dtype)
    x, grad_y, u = (at_offset(t, k) for t, k in zip((x, grad_y, u), offsets, strict=True))
    for moved in (0, 1):
        weight, bias, *rest = (at_offset(t, moved) for t in (weight, bias, *rest))
        got = derivatives(registered, rows_of(shape, groups), x, weight, bias, grad_y, u, *rest)
        assert_close(got, exact_derivatives(shape, groups, *made), dtype)


@pytest.mark.parametrize(("shape", "groups"), [((5, 37), None), ((3, 9001), None), ((3, 6, 5, 7), 2), ((3, 6), 2)], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 6e4])
def test_a_rows_values_stay_its_own(shape, groups, value, registered):
    """A row of NaN, Inf or huge numbers changes no bit of the others, which share packs with it."""
    rows = rows_of(shape, groups)
    made = problem(shape, groups, torch.float16)
    want = derivatives(registered, rows, *made)
    for t in (made[0], made[3], made[4]):
        t.view(-1, rows[0])[1] = value
    got = derivatives(registered, rows, *made)
    rest = [r for r in range(want[1].numel()) if r != 1]
    for k in (0, 1, 2, 3, 6, 7):
        a, b = (t[k].reshape(want[1].numel(), -1)[rest] for t in (got, want))
        assert torch.equal(a, b), k
    if groups is not None:  # row 1 is the second group of the first image: the first group's channels do not know
        for k in (4, 5, 8):
            assert torch.equal(got[k][: shape[1] // groups], want[k][: shape[1] // groups]), k


@pytest.mark.parametrize(("shape", "groups"), [((40, 50), None), ((2, 9001), None), ((6, 4, 9, 9), 2)], ids=str)
def test_a_mean_far_above_the_spread_costs_no_digits(shape, groups, registered):
    """Mean 5,000 times the spread: float32 holds the mean to 1e-4 of the spread only; the second part holds the rest."""
    made = problem(shape, groups, torch.float32, mean=1e4)
    got, want = derivatives(registered, rows_of(shape, groups), *made), exact_derivatives(shape, groups, *made)
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        assert (a.double() - b).norm() <= 1e-6 * b.norm(), (k, (a.double() - b).norm() / b.norm())


@pytest.mark.parametrize(("shape", "groups"), [((4, 1500), None), ((2, 9001), None), ((2, 4, 20, 20), 2)], ids=str)
@pytest.mark.parametrize("far", [1e3, 1e6])
def test_float32_variance_about_a_far_pivot(shape, groups, far, registered):
    """The pivot, the row's first element, is its one outlier; every other number is near 0."""
    rows = rows_of(shape, groups)
    x = draw(shape, 0, torch.float32)
    flat = x.view(-1, rows[0])
    flat[:, 0] = far
    _, mean, invstd = registered._layer_norm(x, None, None, *rows, 1e-5)
    wide = flat.double()
    torch.testing.assert_close(invstd, (wide.var(1, correction=0) + 1e-5).rsqrt(), rtol=1e-6, atol=0)
    bound = 1e-7 * (wide.mean(1).abs() + 1 / invstd).max().item()
    torch.testing.assert_close(mean, wide.mean(1), rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "groups"), [((65536, 3), None), ((1, 65536), None), ((4, 2, 128, 128), 2)], ids=str)
def test_65536_halves(shape, groups, dtype, registered):
    """Sums of 65,536 numbers of one sign, over a column, a row, a channel: float16 ends at 65,504."""
    x, weight, bias, grad_y, u, *rest = problem(shape, groups, dtype)
    made = [x, weight, bias, grad_y + 2, u + 3, *rest]
    got = derivatives(registered, rows_of(shape, groups), *made)
    if shape[0] > 1:
        assert got[5].abs().max() > 65504
    assert_close(got, exact_derivatives(shape, groups, *made), dtype)


@cuts
def test_equal_bits_twice_and_in_any_schedule(shape, groups, registered, monkeypatch):
    """Under the emulation threads and blocks take turns at random: a missing barrier shows as other bits, or as NaN."""
    made, rows = problem(shape, groups, torch.float32), rows_of(shape, groups)
    want = derivatives(registered, rows, *made)
    for seed in (1, 2):
        monkeypatch.setenv("SIB_FAST_EMULATION_SEED", str(seed))
        for k, (a, b) in enumerate(zip(derivatives(registered, rows, *made), want, strict=True)):
            assert torch.equal(a, b), k


@pytest.mark.parametrize(
    ("shape", "groups"), [((300, 19), None), ((2, 9001), None), ((40, 12), 3), ((3, 6, 5, 7), 2), ((2, 150, 3, 3), 1)], ids=str
)
def test_only_what_is_asked_for(shape, groups, registered, poisoned_memory):
    """The same bits whatever else is asked for; nothing where nothing is."""
    x, weight, bias, grad_y, u, u_weight, u_bias = made = problem(shape, groups, torch.float32)
    rows = rows_of(shape, groups)
    want = derivatives(registered, rows, *made)
    _, mean, invstd = registered._layer_norm(x, weight, bias, *rows, 1e-5)
    for needs in itertools.product((True, False), repeat=3):
        first = registered._layer_norm_backward(grad_y, x, weight, mean, invstd, *rows, *needs)
        second = registered._layer_norm_double_backward(u, u_weight, u_bias, grad_y, x, weight, mean, invstd, *rows, *needs)
        for need, a, b in zip(2 * needs, (*first, *second), want[3:], strict=True):
            assert torch.equal(a, b) if need else a.shape == (0,)
    # Absent: weight 1, bias and cotangents 0.
    ones, zeros = torch.ones_like(weight), torch.zeros_like(weight)
    plain = derivatives(registered, rows, x, None, None, grad_y, u, None, None)
    filled = derivatives(registered, rows, x, ones, zeros, grad_y, u, zeros, zeros)
    for a, b in zip(plain, filled, strict=True):
        assert torch.equal(a, b)
    for parts in ((u_weight, None), (None, u_bias)):
        whole = (zeros if part is None else part for part in parts)
        a, b = (derivatives(registered, rows, x, weight, bias, grad_y, u, *given) for given in (parts, whole))
        assert all(torch.equal(*pair) for pair in zip(a, b, strict=True))


def test_what_protects_memory_is_checked(registered):
    x, rows = torch.randn(3, 4, 5), (5, 1, 1)
    row = torch.zeros(12, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="x must be contiguous"):
        registered._layer_norm(x.mT, None, None, *rows, 1e-5)
    for bad in ((0, 1, 1), (5, 0, 1), (5, 1, 0), (5, 1, 2), (7, 1, 1), (5, 7, 1)):
        with pytest.raises(RuntimeError, match="x must consist of rows of"):
            registered._layer_norm(x, None, None, *bad, 1e-5)
    with pytest.raises(RuntimeError, match="weight must have 5 elements, got 4"):
        registered._layer_norm(x, torch.ones(4), None, *rows, 1e-5)
    with pytest.raises(RuntimeError, match="bias has an unexpected dtype"):
        registered._layer_norm(x, None, torch.ones(5).double(), *rows, 1e-5)
    with pytest.raises(RuntimeError, match="x must be float64"):
        registered._layer_norm(x.int(), None, None, *rows, 1e-5)
    needs = (True, True, True)
    with pytest.raises(RuntimeError, match="grad_y must be contiguous, in the shape of x"):
        registered._layer_norm_backward(x[:2], x, None, row, row, *rows, *needs)
    with pytest.raises(RuntimeError, match="grad_y must have the dtype of x"):
        registered._layer_norm_backward(x.double(), x, None, row, row, *rows, *needs)
    with pytest.raises(RuntimeError, match="mean has an unexpected dtype"):
        registered._layer_norm_backward(x, x, None, row.float(), row, *rows, *needs)
    with pytest.raises(RuntimeError, match="invstd must have 12 elements, got 11"):
        registered._layer_norm_backward(x, x, None, row, row[1:], *rows, *needs)
    with pytest.raises(RuntimeError, match="u must be contiguous, in the shape of x"):
        registered._layer_norm_double_backward(x[:2], None, None, x, x, None, row, row, *rows, *needs)
    with pytest.raises(RuntimeError, match="u_bias must have 5 elements, got 6"):
        registered._layer_norm_double_backward(x, None, torch.ones(6), x, x, None, row, row, *rows, *needs)


@pytest.mark.parametrize("groups", [None, 2], ids=str)
def test_through_the_front_to_the_second_derivative(groups, kernel):
    """The derivatives registered for this family of kernels."""
    shape = (3, 10) if groups is None else (3, 4, 5, 5)
    x, weight, bias = (t.requires_grad_() for t in problem(shape, groups, torch.float64)[:3])
    if groups is None:
        values = layer_norm(x, (10,), weight, bias, backend=kernel), reference.layer_norm(x, (10,), weight, bias, 1e-5)
    else:
        values = group_norm(x, groups, weight, bias, backend=kernel), reference.group_norm(x, groups, weight, bias, 1e-5)
    results = []
    for value in values:
        first = torch.autograd.grad(value.pow(3).sum(), [x, weight, bias], create_graph=True)
        results.append(torch.autograd.grad(sum(t.square().sum() for t in first), [x, weight, bias]))
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 1e-10 * b.norm()


@pytest.mark.parametrize("kind", ["LayerNorm", "GroupNorm"])
def test_the_layer_takes_this_kernel(kind, kernel, monkeypatch):
    """ "auto" where the CPU's kernels are missing: the layer's gradients are PyTorch's, by these kernels' ops."""
    if kernel == "emulated":
        monkeypatch.setitem(_backends.MISSING, "cpu", "it was not built")
    arguments = (6,) if kind == "LayerNorm" else (2, 4)
    results = []
    for module in (torch.nn, sib_fast.nn):
        layer = getattr(module, kind)(*arguments).double()
        x = draw((5, 4, 3, 6), 0).requires_grad_()
        y = layer(x)
        (vjp,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        results.append([y.detach(), vjp.detach(), *torch.autograd.grad(vjp.square().sum(), [x, layer.weight])])
    for k, (a, b) in enumerate(zip(*results, strict=True)):
        assert (a - b).abs().max() <= 1e-10 * b.abs().max(), k
    assert ("emulated" if kernel == "emulated" else "sib_fast") in y.grad_fn.name()
