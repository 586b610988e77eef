"""The CUDA kernels of batch_norm beyond what every kernel must do: cuts, alignments, neighbours' values, far means, schedules."""

from __future__ import annotations

import pytest
import torch

import sib_fast
from sib_fast import _backends
from sib_fast.ops.batch_norm import batch_norm, reference
from tests.derivatives import at_offset

KERNELS = ["emulated", "cuda"]
FIRST, LAST = "channels first", "channels last"
# One part and several: of the images, of a run, of both, of rows; more channels than a tile has, and than no tile divides;
# runs that begin off a 16-byte boundary, and that are shorter than a pack.
CUTS = {
    "images in parts": ((5, 2, 45, 47), FIRST),
    "a run in parts": ((1, 2, 101, 103), FIRST),
    "images and runs in parts": ((2, 2, 91, 93), FIRST),
    "one channel": ((3, 1, 61, 64), FIRST),
    "whole channels": ((2, 5, 7, 7), FIRST),
    "short runs": ((40, 3, 2, 1), FIRST),
    "rows in parts": ((6, 40, 9, 7), LAST),
    "two tiles in parts": ((6, 130, 9, 7), LAST),
    "two tiles": ((3, 131, 2, 2), LAST),
    "odd channels in parts": ((40, 3, 14, 16), LAST),
    "plain rows": ((300, 37), FIRST),
}
cuts = pytest.mark.parametrize(("shape", "layout"), CUTS.values(), ids=CUTS)


def draw(shape, seed, dtype=torch.float64):
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(dtype).to(torch.get_default_device())


def laid_out(t, layout):
    return t if layout == FIRST or t.ndim == 2 else t.movedim(1, -1).contiguous().movedim(-1, 1)


def problem(shape, layout, dtype, mean=3.0):
    """x, weight, bias, grad_y, u, u_weight, u_bias."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    maps = [laid_out(t, layout) for t in ((2 * draw(shape, 0) + mean).to(dtype), draw(shape, 1, dtype), draw(shape, 2, dtype))]
    channels = [draw(shape[1], seed, wide) for seed in range(3, 7)]
    return [maps[0], *channels[:2], *maps[1:], *channels[2:]]


def derivatives(ops, x, weight, bias, grad_y, u, u_weight, u_bias, addend=None):
    """y, mean, variance, the three gradients, and the gradients of grad_y, x and weight, by the registered ops."""
    y, mean, variance, invstd = ops._batch_norm(x, weight, bias, 1e-5)
    first = ops._batch_norm_backward(grad_y, x, weight, mean, invstd, addend, True)
    second = ops._batch_norm_double_backward(u, u_weight, u_bias, grad_y, x, weight, mean, invstd, True, True)
    return [y, mean, variance, *first, *second]


def exact_derivatives(x, weight, bias, grad_y, u, u_weight, u_bias):
    """The same in plain autograd, in float64 throughout."""
    x, weight, bias, grad_y = leaves = [t.detach().double().requires_grad_() for t in (x, weight, bias, grad_y)]
    y, mean, variance = reference.batch_norm(x, weight, bias, 1e-5)
    first = torch.autograd.grad(y, leaves[:3], grad_y, create_graph=True)
    second = torch.autograd.grad(first, [grad_y, x, weight], [t.double() for t in (u, u_weight, u_bias)])
    return [t.detach() for t in (y, mean, variance, *first, *second)]


def assert_close(got, want, dtype):
    """Activations to one rounding of their type, everything to float32's sums."""
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.isfinite(a).all(), k
        eps = torch.finfo(a.dtype if a.ndim > 1 else torch.promote_types(a.dtype, torch.float32)).eps
        accumulated = 16 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        bound = 64 * torch.finfo(torch.float64).eps if dtype == torch.float64 else 0.51 * eps if a.ndim > 1 else 0.0
        error = (a.double() - b).abs()
        assert (error <= bound * b.abs() + 4 * accumulated * b.norm() / max(b.numel(), 1) ** 0.5).all(), (k, error.max())


@cuts
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_cut(shape, layout, dtype, registered, poisoned_memory):
    made = problem(shape, layout, dtype)
    got = derivatives(registered, *made)
    assert_close(got, exact_derivatives(*made), dtype)
    for k in (0, 3, 6, 7):
        assert got[k].stride() == made[0].stride()


def assert_added(got, plain, exact, addend, dtype):
    """Every sum has the bits that it has without an addend; grad_x has it added, and is rounded once."""
    assert all(torch.equal(a, b) for k, (a, b) in enumerate(zip(got, plain, strict=True)) if k != 3)
    wanted = exact[3] + addend.double()
    assert_close([got[3]], [wanted], dtype)
    assert (got[3].double() - wanted).norm() < 0.1 * addend.double().norm()
    assert got[3].stride() == plain[3].stride()


@cuts
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_addend_at_every_cut(shape, layout, dtype, registered, poisoned_memory):
    made, addend = problem(shape, layout, dtype), laid_out(draw(shape, 9, dtype), layout)
    got = derivatives(registered, *made, addend)
    assert_added(got, derivatives(registered, *made), exact_derivatives(*made), addend, dtype)


@pytest.mark.parametrize("offsets", [(1, 0, 0), (1, 1, 1), (3, 11, 3), (0, 4, 0), (2, 1, 0)], ids=str)
@pytest.mark.parametrize(("shape", "layout"), [((3, 4, 4, 8), FIRST), ((3, 3, 5, 5), FIRST), ((5, 8, 3, 3), LAST)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_every_alignment(shape, layout, offsets, dtype, registered):
    """Activations that start anywhere, each elsewhere: the same numbers, and nothing read from beside them."""
    x, weight, bias, grad_y, u, *rest = made = problem(shape, layout, dtype)
    moved = [at_offset(t, k) for t, k in zip((x, grad_y, u), offsets, strict=True)]
    exact = exact_derivatives(*made)
    got = derivatives(registered, moved[0], weight, bias, *moved[1:], *rest)
    assert_close(got, exact, dtype)
    addend = laid_out(draw(shape, 9, dtype), layout)
    added = derivatives(registered, moved[0], weight, bias, *moved[1:], *rest, at_offset(addend, offsets[2]))
    assert_added(added, got, exact, addend, dtype)


@pytest.mark.parametrize("layout", [FIRST, LAST])
@pytest.mark.parametrize("shape", [(3, 5, 1, 7), (5, 3, 45, 47)], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 6e4])
def test_a_channels_values_stay_its_own(shape, layout, value, registered):
    """A channel of NaN, Inf or huge numbers changes no bit of the others, which share packs and tiles with it."""
    made = [*problem(shape, layout, torch.float16), laid_out(draw(shape, 9, torch.float16), layout)]
    want = derivatives(registered, *made)
    for t in (made[0], made[3], made[4], made[7]):
        t[:, 1] = value
    rest = [c for c in range(shape[1]) if c != 1]
    for k, (a, b) in enumerate(zip(derivatives(registered, *made), want, strict=True)):
        a, b = (t[:, rest] if t.ndim > 1 else t[rest] for t in (a, b))
        assert torch.equal(a, b), k


@pytest.mark.parametrize("layout", [FIRST, LAST])
@pytest.mark.parametrize("shape", [(6, 4, 7, 7), (6, 4, 40, 40)], ids=str)
def test_a_mean_far_above_the_spread_costs_no_digits(shape, layout, registered):
    """Mean 5,000 times the spread: float32 holds the mean to 1e-4 of the spread only; what is lost is put right in double."""
    made = problem(shape, layout, torch.float32, mean=1e4)
    got, want = derivatives(registered, *made), exact_derivatives(*made)
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        assert (a.double() - b).norm() <= 1e-6 * b.norm(), (k, (a.double() - b).norm() / b.norm())


@pytest.mark.parametrize("layout", [FIRST, LAST])
@pytest.mark.parametrize("far", [1e3, 1e6])
def test_float32_variance_about_a_far_pivot(layout, far, registered):
    """The pivot, the channel's first element, is its one outlier; every other number is near 0."""
    x = draw((8, 4, 40, 40), 0, torch.float32)
    x[0, :, 0, 0] = far
    _, mean, variance, _ = registered._batch_norm(laid_out(x, layout), None, None, 1e-5)
    wide = x.double()
    torch.testing.assert_close(variance, wide.var((0, 2, 3), correction=0), rtol=1e-6, atol=0)
    bound = 1e-7 * (wide.mean((0, 2, 3)).abs() + variance.sqrt()).max().item()
    torch.testing.assert_close(mean, wide.mean((0, 2, 3)), rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [FIRST, LAST])
def test_65536_halves_of_a_channel(dtype, layout, registered):
    """Sums of 65,536 numbers of one sign: float16 ends at 65,504, and PyTorch's own double backward with it."""
    x, weight, bias, grad_y, u, *rest = problem((4, 2, 128, 128), layout, dtype)
    assert x.numel() // 2 == 65536
    made = [x, weight, bias, grad_y + 2, u + 3, *rest]
    got = derivatives(registered, *made)
    assert got[4][0].abs() > 65504 or got[5][0].abs() > 65504
    assert_close(got, exact_derivatives(*made), dtype)


@cuts
def test_equal_bits_twice_and_in_any_schedule(shape, layout, registered, monkeypatch):
    """Under the emulation threads and blocks take turns at random: a missing barrier shows as other bits, or as NaN."""
    made = [*problem(shape, layout, torch.float32), laid_out(draw(shape, 9, torch.float32), layout)]
    want = derivatives(registered, *made)
    for seed in (1, 2):
        monkeypatch.setenv("SIB_FAST_EMULATION_SEED", str(seed))
        for k, (a, b) in enumerate(zip(derivatives(registered, *made), want, strict=True)):
            assert torch.equal(a, b), k


@pytest.mark.parametrize(("shape", "layout"), [((3, 4, 5, 5), FIRST), ((5, 2, 45, 47), FIRST), ((6, 40, 9, 7), LAST)], ids=str)
def test_only_what_is_asked_for(shape, layout, registered, poisoned_memory):
    x, weight, bias, grad_y, u, u_weight, u_bias = made = problem(shape, layout, torch.float32)
    want = derivatives(registered, *made)
    _, mean, _, invstd = registered._batch_norm(x, weight, bias, 1e-5)
    none, *parameters = registered._batch_norm_backward(grad_y, x, weight, mean, invstd, None, False)
    assert none.shape == (0,)
    assert all(torch.equal(a, b) for a, b in zip(parameters, want[4:6], strict=True))
    for needs in ((True, False), (False, True), (False, False)):
        got = registered._batch_norm_double_backward(u, u_weight, u_bias, grad_y, x, weight, mean, invstd, *needs)
        for need, a, b in zip((*needs, True), got, want[6:], strict=True):
            assert torch.equal(a, b) if need else a.shape == (0,)
    # Absent: weight 1, bias and cotangents 0.
    plain = [x, None, None, grad_y, u, None, None]
    ones, zeros = torch.ones_like(weight), torch.zeros_like(weight)
    for a, b in zip(
        derivatives(registered, *plain), derivatives(registered, x, ones, zeros, grad_y, u, zeros, zeros), strict=True
    ):
        assert torch.equal(a, b)


def test_what_protects_memory_is_checked(registered):
    x = torch.randn(3, 4, 5, 6)
    mean = torch.zeros(4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="x must be contiguous or channels last"):
        registered._batch_norm(x.mT, None, None, 1e-5)
    with pytest.raises(RuntimeError, match="weight must have 4 elements, got 5"):
        registered._batch_norm(x, torch.ones(5), None, 1e-5)
    with pytest.raises(RuntimeError, match="grad_y must have the layout of x"):
        registered._batch_norm_backward(x.contiguous(memory_format=torch.channels_last), x, None, mean, mean, None, True)
    with pytest.raises(RuntimeError, match="grad_y must have the dtype of x"):
        registered._batch_norm_backward(x.double(), x, None, mean, mean, None, True)
    with pytest.raises(RuntimeError, match="mean has an unexpected dtype"):
        registered._batch_norm_backward(x, x, None, mean.float(), mean, None, True)
    with pytest.raises(RuntimeError, match="u must have the shape of x"):
        registered._batch_norm_double_backward(x[:2], None, None, x, x, None, mean, mean, True, True)


def test_through_the_front_to_the_second_derivative(kernel):
    """The derivatives registered for this family of kernels, and what they cost in tensors of zeros: none."""
    x, weight, bias = (t.requires_grad_() for t in problem((3, 4, 5, 5), FIRST, torch.float64)[:3])
    y = batch_norm(x, weight, bias, backend=kernel)[0]
    want = reference.batch_norm(x, weight, bias, 1e-5)[0]
    results = []
    for value in (y, want):
        first = torch.autograd.grad(value.pow(3).sum(), [x, weight, bias], create_graph=True)
        results.append(torch.autograd.grad(sum(t.square().sum() for t in first), [x, weight, bias]))
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 1e-10 * b.norm()


@pytest.mark.parametrize("momentum", [0.3, None], ids=str)
def test_the_layer_takes_this_kernel(kernel, momentum, monkeypatch):
    """ "auto" where the CPU's kernels are missing: the layer's gradients and buffers are PyTorch's, by these kernels' ops."""
    if kernel == "emulated":
        monkeypatch.setitem(_backends.MISSING, "cpu", "it was not built")
    plain = torch.nn.BatchNorm2d(4, momentum=momentum).double()
    ours = sib_fast.nn.BatchNorm2d(4, momentum=momentum).double()
    results = []
    for layer in (plain, ours):
        x = laid_out(draw((5, 4, 3, 6), 0), LAST).requires_grad_()
        for _ in range(2):
            y = layer(x)
        (vjp,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        results.append([y.detach(), vjp.detach(), *torch.autograd.grad(vjp.square().sum(), [x, layer.weight])])
        results[-1] += [layer.running_mean, layer.running_var, layer.num_batches_tracked]
    for k, (a, b) in enumerate(zip(*results, strict=True)):
        assert (a - b).abs().max() <= 1e-10 * b.abs().max(), k
    assert type(y.grad_fn).__name__ != type(plain(x).grad_fn).__name__
    ours.load_state_dict(plain.state_dict())
    assert torch.equal(ours.eval()(x), plain.eval()(x))  # linear in x: PyTorch's own
