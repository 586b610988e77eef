"""foreground_mask: kernels against the reference by the two-part rule of SPEC 7, and everything a caller may do to it."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch

from sib_fast import _backends, foreground_mask
from sib_fast._backends import INTERPRETING_TRITON
from sib_fast.ops.foreground_mask import LIMITS, MaskOptions, mask_with_ranks, rank_window_length, reference, selected_ranks
from sib_fast.testing.assertions import assert_no_worse_than, box_of_gate, exact_orders, rank_pixels_of
from sib_fast.testing.problems import PROBLEMS, Problem, layouts

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NATURAL = PROBLEMS[0]
module = importlib.import_module("sib_fast.ops.foreground_mask")  # whose name in sib_fast.ops is the function's


def interpreted(kernel: str) -> bool:
    """Triton's interpreter takes milliseconds a program, so it gets less of the same: see `sized` and test_gradcheck."""
    return kernel == "triton" and INTERPRETING_TRITON


def sized(problem: Problem, kernel: str) -> Problem:
    """The problem; for an interpreted kernel its first few images, since an image's bits do not depend on its batch."""
    few = (min(problem.shape[0], 3), *problem.shape[1:])
    return dataclasses.replace(problem, shape=few) if interpreted(kernel) else problem


def options_of(problem: Problem, **changes) -> MaskOptions:
    return MaskOptions(problem.window_size, 0.1, 10.0, (0.05, 0.95, 0.8, 0.8), 1e-8)._replace(**changes)


def takes(kernel: str, options: MaskOptions, shape, dtype) -> bool:
    """Whether the backend's kernels rank so long a window."""
    length = rank_window_length(options.temperature, shape[2] * shape[3], dtype)
    return kernel not in LIMITS or length <= LIMITS[kernel].window


def mask_and_grad(function, vjp, cotangent):
    vjp = vjp.detach().requires_grad_()
    mask = function(vjp)
    (grad,) = torch.autograd.grad(mask, vjp, cotangent.to(mask.dtype))
    return mask.detach(), grad


def compare(problem, options, dtype, kernel, seed=0):
    """Kernel, same-precision reference and float64 reference, all with the ranks of the float64 run."""
    vjp, _, cotangent = sized(problem, kernel).make(dtype, seed)
    # The reference runs in the accumulation precision; half inputs differ from it by their rounding only, which all share.
    wide = vjp.double() if dtype == torch.float64 else vjp.float()
    orders = exact_orders(vjp, options)
    ranks = rank_pixels_of(orders, options, dtype)
    got = mask_and_grad(lambda v: mask_with_ranks(v, ranks, options, kernel), vjp, cotangent)
    low = mask_and_grad(lambda v: reference.foreground_mask(v, **options._asdict(), orders=orders), wide, cotangent)
    exact = mask_and_grad(lambda v: reference.foreground_mask(v, **options._asdict(), orders=orders), vjp.double(), cotangent)
    return got, low, exact


# float64 has a rule of its own below: with the truth in the same precision, autograd's own error is 0 by definition.
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.id)
def test_value_and_gradient_are_no_worse_than_autograds(problem, dtype, kernel):
    got, low, exact = compare(problem, options_of(problem), dtype, kernel)
    assert_no_worse_than(got[0], low[0], exact[0], what="mask")
    if dtype in (torch.bfloat16, torch.float16):
        # The gradient comes back in the input's dtype: compare what that rounding leaves of each.
        # A gradient beyond the dtype's range is Inf there, in autograd as in the kernel.
        inside = exact[1].abs() < 0.9 * torch.finfo(dtype).max
        got, low, exact = got[1][inside], low[1].to(dtype)[inside], exact[1][inside]
        assert_no_worse_than(got.float(), low.float(), exact, floor=8 * torch.finfo(dtype).eps / 2**-23, what="grad_vjp")
    else:
        assert_no_worse_than(got[1], low[1], exact[1], what="grad_vjp")


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.id)
def test_float64_agrees_with_the_reference(problem, kernel):
    got, low, _ = compare(problem, options_of(problem), torch.float64, kernel)
    torch.testing.assert_close(got[0], low[0], rtol=1e-10, atol=1e-10)
    assert (got[1] - low[1]).norm() <= 1e-10 * low[1].norm()


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 3.0},
        {"temperature": 1e4},  # all ranks, nearly equal weights: the plain mean
        {"temperature": 1e-6},
        {"slope": 0.5},
        {"quantiles": (0.0, 1.0, 0.5, 0.333)},
        {"quantiles": (0.9, 0.1, 0.8, 0.8)},  # hi < lo: the range is clamped and passes no gradient
        {"window_size": 1},
        {"window_size": 61},
        {"eps": 1e-3},
    ],
    ids=str,
)
def test_every_option_reaches_the_kernel(changes, kernel):
    options = options_of(NATURAL, **changes)
    if not takes(kernel, options, NATURAL.shape, torch.float64):
        with pytest.raises(ValueError, match="temperature must leave a rank window of at most"):
            compare(NATURAL, options, torch.float64, kernel)
        return
    got, low, exact = compare(NATURAL, options, torch.float64, kernel)
    torch.testing.assert_close(got[0], exact[0], rtol=1e-10, atol=1e-12)
    assert (got[1] - low[1]).norm() <= 1e-10 * low[1].norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.id)
def test_selected_pixels_hold_the_values_of_their_ranks(problem, dtype, kernel):
    """Part two of the rule: a float64 value within a few float32 roundings of v_(k), each pixel at most one rank."""
    options = options_of(problem)
    vjp, *_ = sized(problem, kernel).make(dtype)
    _, _, ranks = selected_ranks(vjp, options, kernel)
    wide = vjp.double()
    g = wide.mean(dim=1).flatten(1).abs()
    d = box_of_gate(wide, options).flatten(1)
    want = rank_pixels_of((g.argsort(dim=1, stable=True), d.argsort(dim=1, stable=True)), options, dtype)
    assert ((ranks >= 0) == (want >= 0)).all()
    roundings = 64 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    for level in range(4):
        values = g if level < 3 else d
        inside = ranks[:, level] >= 0
        got = values.gather(1, ranks[:, level].long().clamp_min(0))
        exact = values.gather(1, want[:, level].long().clamp_min(0))
        # d sums window² values of order 1; the cancellation in mean_c R can leave g any size below its summands.
        scale = wide.abs().amax(dim=(1, 2, 3))[:, None] if level < 3 else torch.ones(())
        assert ((got - exact).abs() <= roundings * scale)[inside].all(), f"level {level}"
    for n in range(vjp.shape[0]):
        for level in range(4):
            chosen = ranks[n, level][ranks[n, level] >= 0].tolist()
            assert len(set(chosen)) == len(chosen)


def test_ties_go_to_the_lower_pixel(kernel):
    vjp = torch.zeros(1, 1, 4, 25, dtype=torch.float64)
    vjp[0, 0, 2:] = 1.0
    _, _, ranks = selected_ranks(vjp, options_of(NATURAL, quantiles=(0.2, 0.7, 0.4, 0.8)), kernel)
    for level, rank in enumerate((19, 69, 39)):  # floor(q·99)
        length = ranks.shape[2]
        assert ranks[0, level].tolist() == list(range(rank - length // 2, rank + length // 2 + 1))


def test_mask_in_closed_form(kernel):
    """Window 1, an image of two values: h, d and M follow by hand from SPEC 3."""
    vjp = torch.zeros(1, 2, 10, 10, dtype=torch.float64)
    vjp[0, :, 9] = -3.0  # the top 10 % of pixels; the mean over two channels keeps the value
    mask = foreground_mask(vjp, window_size=1, backend=kernel)
    # lo = 0, hi = 3 (rank 94.05 lies in the top ten), q8 = 0: e = 0 or 3/(3 + 1e-8); t = .5, since rank 79.2 is below.
    h_top = torch.sigmoid(torch.tensor(10 * 3 / (3 + 1e-8), dtype=torch.float64))
    expected_top = torch.sigmoid(10 * (h_top - 0.5))
    torch.testing.assert_close(mask[0, 0, 9], expected_top.expand(10), rtol=1e-12, atol=0)
    torch.testing.assert_close(mask[0, 0, :9], torch.full((9, 10), 0.5, dtype=torch.float64), rtol=1e-12, atol=0)


def test_invariances(kernel):
    vjp, *_ = NATURAL.make(torch.float64)
    mask = foreground_mask(vjp, window_size=9, backend=kernel)
    assert torch.equal(foreground_mask(-vjp, window_size=9, backend=kernel), mask)
    assert torch.equal(foreground_mask(vjp.flip(0), window_size=9, backend=kernel), mask.flip(0))
    # eps = 1e-8 against a range of 1e-4 is what the scale leaves behind.
    torch.testing.assert_close(foreground_mask(1024 * vjp, window_size=9, backend=kernel), mask, rtol=0, atol=1e-3)
    for n in range(vjp.shape[0]):
        assert torch.equal(foreground_mask(vjp[n : n + 1], window_size=9, backend=kernel), mask[n : n + 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", list(layouts(torch.zeros(1, 2, 2, 2))))
def test_any_layout_gives_the_same_bits(layout, dtype, kernel):
    vjp, _, cotangent = PROBLEMS[1].make(dtype)
    want = mask_and_grad(lambda v: foreground_mask(v, window_size=9, backend=kernel), vjp, cotangent)
    got = mask_and_grad(lambda v: foreground_mask(v, window_size=9, backend=kernel), layouts(vjp)[layout], cotangent)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_broadcast_input_and_cotangent(kernel):
    vjp = torch.randn(2, 1, 12, 12, dtype=torch.float64).expand(2, 5, 12, 12).requires_grad_()
    mask = foreground_mask(vjp, window_size=5, backend=kernel)
    (grad,) = torch.autograd.grad(mask.sum(), vjp)  # sum's cotangent is an expanded scalar
    want = foreground_mask(vjp.contiguous(), window_size=5, backend="reference")
    (grad_want,) = torch.autograd.grad(want.sum(), vjp)
    torch.testing.assert_close(grad, grad_want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("window_size", [3, 7])
def test_gradcheck(window_size, kernel):
    vjp = torch.randn(2, 3, 6, 7, dtype=torch.float64, requires_grad=True)
    # τ and slope such that no sigmoid saturates and no rank flips within gradcheck's step.
    assert torch.autograd.gradcheck(
        lambda v: foreground_mask(v, window_size=window_size, temperature=0.3, slope=2.0, backend=kernel),
        vjp,
        eps=1e-7,
        atol=1e-6,
        fast_mode=interpreted(kernel),  # a few random directions instead of every element: minutes against seconds
    )


def test_second_derivative_is_refused_in_words(kernel):
    vjp = torch.randn(2, 3, 8, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(foreground_mask(vjp, window_size=3, backend=kernel).sum(), vjp, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative exists only with backend='reference'"):
        (grad.sum() + vjp.sum()).backward()


def test_reference_has_a_second_derivative():
    vjp = torch.randn(1, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda v: foreground_mask(v, window_size=3, temperature=0.5, slope=2.0, backend="reference"), vjp, eps=1e-7, atol=1e-5
    )


def test_backward_twice_with_vector_cotangents(kernel):
    vjp, _, cotangent = NATURAL.make(torch.float64)
    vjp.requires_grad_()
    mask = foreground_mask(vjp, window_size=5, backend=kernel)
    first, twice, again = (torch.autograd.grad(mask, vjp, factor * cotangent, retain_graph=True)[0] for factor in (1.0, 2.0, 1.0))
    assert torch.equal(first, again)
    torch.testing.assert_close(twice, 2 * first, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.id)
def test_every_element_is_written(problem, dtype, kernel, poisoned_memory):
    vjp, _, cotangent = sized(problem, kernel).make(dtype)
    mask, grad = mask_and_grad(lambda v: foreground_mask(v, window_size=problem.window_size, backend=kernel), vjp, cotangent)
    assert torch.isfinite(mask).all()
    # 1/r of a small VJP takes float16 gradients beyond that dtype's range; nothing may be NaN.
    assert not grad.isnan().any() if dtype == torch.float16 else torch.isfinite(grad).all()


def test_window_that_covers_every_pixel(kernel):
    """d is then one number everywhere: the mask is exactly 1/2, and its gradient is 0 up to the sum's rounding."""
    vjp = torch.randn(2, 3, 6, 9, dtype=torch.float64)
    mask, grad = mask_and_grad(lambda v: foreground_mask(v, window_size=31, backend=kernel), vjp, torch.rand(2, 1, 6, 9))
    assert torch.equal(mask, torch.full_like(mask, 0.5))
    _, grad_without_cancellation = mask_and_grad(
        lambda v: foreground_mask(v, window_size=3, backend=kernel), vjp, torch.rand(2, 1, 6, 9)
    )
    assert grad.norm() <= 1e-13 * grad_without_cancellation.norm()


def test_threads_do_not_change_bits(kernel):
    vjp, _, cotangent = sized(PROBLEMS[2], kernel).make(torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(mask_and_grad(lambda v: foreground_mask(v, window_size=5, backend=kernel), vjp, cotangent))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0])
        assert torch.equal(other[1], results[0][1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values_are_not_hidden(bad, kernel):
    vjp = torch.randn(2, 3, 16, 16)
    vjp[1, 0, 3, 3] = bad
    mask = foreground_mask(vjp, window_size=3, backend=kernel)
    assert torch.isfinite(mask[0]).all()
    if bad != bad:
        assert mask[1].isnan().any()


# 65·65 pixels: beyond 4,096 the Triton kernels narrow the bins of g's histogram further.
@pytest.mark.parametrize("share", [1.0, 0.3], ids=["all", "a third"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's word on Inf - Inf, in Triton's interpreter
def test_ranks_of_what_is_not_finite_are_pixels(dtype, bad, share, kernel, poisoned_memory):
    """A rank window that holds NaN or Inf: its pixels are written all the same, as the sort that puts NaN last orders them."""
    vjp = torch.randn(1, 3, 65, 65, dtype=dtype)
    vjp[:, :, torch.rand(65, 65) < share] = bad
    options = MaskOptions(5, 0.1, 10.0, (0.05, 0.95, 0.8, 0.8), 1e-8)
    mean_map, _, ranks = selected_ranks(vjp, options, kernel)
    order = mean_map.flatten(1).abs().argsort(dim=1, stable=True)
    want = rank_pixels_of((order, order), options, dtype)
    assert torch.equal(ranks[:, :3], want[:, :3])
    area = ranks[:, 3]
    assert torch.equal(area >= 0, want[:, 3] >= 0)
    assert area[area >= 0].unique().numel() == (area >= 0).sum()
    assert area.max() < 65 * 65
    mask, grad = mask_and_grad(lambda v: foreground_mask(v, window_size=5, backend=kernel), vjp, torch.ones(1, 1, 65, 65))
    assert mask.isnan().any()
    assert grad.isnan().any()


def test_opcheck(kernel, registered):
    op = registered
    for dtype in DTYPES:
        vjp = torch.randn(2, 3, 9, 10).to(dtype)
        arguments = (5, 0.1, 10.0, (0.05, 0.95, 0.8, 0.8), 1e-8)
        torch.library.opcheck(op._foreground_mask.default, (vjp, None, *arguments))
        mask, mean_map, levels, ranks = op._foreground_mask(vjp, None, *arguments)
        torch.library.opcheck(
            op._foreground_mask_backward.default, (torch.randn_like(mask), mask, mean_map, levels, ranks, 3, *arguments)
        )


def test_compiles_in_one_graph(kernel):
    def step(vjp):
        return foreground_mask(vjp, window_size=5, backend=kernel)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for images, size in ((3, 12), (5, 9)):  # a second shape, so that a baked-in size would show
        vjp = torch.randn(images, 3, size, size + 1, dtype=torch.float64, requires_grad=True)
        mask, want = compiled(vjp), step(vjp)
        assert torch.equal(mask, want)
        cotangent = torch.randn_like(mask)
        assert torch.equal(torch.autograd.grad(mask, vjp, cotangent)[0], torch.autograd.grad(want, vjp, cotangent)[0])


def test_autocast_changes_nothing(kernel):
    vjp, *_ = NATURAL.make(torch.float32)
    for backend in (kernel, "reference"):
        want = foreground_mask(vjp, window_size=5, backend=backend)
        with torch.autocast(vjp.device.type, dtype=torch.bfloat16):
            got = foreground_mask(vjp, window_size=5, backend=backend)
        assert got.dtype == torch.float32
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", LIMITS)
def test_what_a_backend_does_not_take_is_refused_where_it_is_asked_for(backend):
    limits = LIMITS[backend]
    long, wide = torch.randn(1, 1, 20, 20), torch.randn(1, 1, 1, 1).expand(1, 1, 1, limits.width + 1)
    entries = f"at most {limits.window} entries for backend='{backend}', got 9.0, which takes 309 of torch.float32"
    with pytest.raises(ValueError, match=f"^foreground_mask: temperature must leave a rank window of {entries}"):
        foreground_mask(long, temperature=9.0, backend=backend)
    with pytest.raises(ValueError, match=f"vjp must be at most {limits.width} pixels wide for backend='{backend}'"):
        foreground_mask(wide, backend=backend)


def test_auto_takes_a_backend_that_takes_the_options(monkeypatch):
    """Of two that are usable here the first one is preferred, and left where its kernels would refuse."""
    monkeypatch.setitem(_backends.KERNEL_DEVICES, "triton", "cpu")
    monkeypatch.setitem(_backends.MISSING, "triton", None)
    monkeypatch.setitem(_backends.MISSING, "cpu", None)
    monkeypatch.setattr(module, "KERNELS", ["triton", "cpu"])
    vjp = torch.randn(1, 1, 20, 20)
    assert module._chosen(vjp, options_of(NATURAL), "auto") == "triton"
    assert module._chosen(vjp, options_of(NATURAL, temperature=9.0), "auto") == "cpu"
    monkeypatch.setattr(module, "KERNELS", ["triton"])
    monkeypatch.setattr(_backends, "_warned", set())
    with pytest.warns(UserWarning, match="'auto' runs the reference"):
        assert module._chosen(vjp, options_of(NATURAL, temperature=9.0), "auto") == _backends.REFERENCE
