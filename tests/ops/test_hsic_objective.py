"""hsic_objective: kernels against the reference and the composed estimators, and everything a caller may do to it."""

from __future__ import annotations

import itertools

import pytest
import torch

from sib_fast._backends import INTERPRETING_TRITON
from sib_fast.estimators import BACKGROUNDS, ESTIMATORS
from sib_fast.loss import OBJECTIVES as COMPOSED_OBJECTIVES
from sib_fast.ops import hsic_objective
from sib_fast.ops.hsic_objective import _BACKWARD, _FORWARD, OBJECTIVES, reference
from sib_fast.types import RegionStatistics

IMAGES = (2, 3, 33, 130)
# Triton's interpreter computes with numpy, which warns where a GPU does not.
NUMPY_WARNS = pytest.mark.filterwarnings("ignore::RuntimeWarning")
NAMES = ("loss", "foreground", "background", "grad_base", "grad_gram_vjp", "grad_gram_x", "grad_background_variance")
WEIGHTS = {"lambda_fg": 0.3, "lambda_bg": 1.7}


def statistics(images, kind="natural", seed=0):
    """Symmetric Grams and variances as the op gets them: VJP rows of any sign, inputs mostly positive."""
    g = torch.Generator("cpu").manual_seed(seed)
    vjp = torch.randn(images, 40, generator=g, dtype=torch.float64, device="cpu")
    x = torch.rand(images, 40, generator=g, dtype=torch.float64, device="cpu") + 0.2
    if kind == "zero rows":
        vjp[0], x[images // 2] = 0.0, 0.0
    if kind == "all zero":
        vjp.zero_()
    if kind == "identical rows":
        vjp[:], x[:] = vjp[0].clone(), x[0].clone()
    if kind == "tiny":  # norms on both sides of the floor of 1e-12
        vjp *= 10.0 ** -torch.linspace(8, 15, images, dtype=torch.float64, device="cpu")[:, None]
    if kind == "far scales":
        vjp, x = 1e-9 * vjp, 1e4 * x
    variance = torch.rand(images, generator=g, dtype=torch.float64, device="cpu")
    return [t.to(torch.get_default_device()) for t in (vjp @ vjp.T, x @ x.T, variance)]


def run(
    backend, problem, *, dtype=torch.float64, base=1.25, cotangents=(0.7, 0.2, -0.9), objective="exp", function=None, **weights
):
    """The three outputs and the gradients of all four inputs."""
    leaves = [torch.tensor(base, dtype=dtype), *problem]
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    options = {**WEIGHTS, **weights, "objective": objective}
    out = function(*leaves, **options) if function else hsic_objective(*leaves, **options, backend=backend)
    grads = torch.autograd.grad(out, leaves, [torch.tensor(c, dtype=dtype) for c in cotangents])
    return [t.detach() for t in out] + list(grads)


def composed(base, gram_vjp, gram_x, variance, *, lambda_fg, lambda_bg, objective):
    """The same from the package's other parts."""
    fg = ESTIMATORS["hsic_biased"](gram_vjp, gram_x)
    bg = BACKGROUNDS["variance"](RegionStatistics(gram_vjp, gram_x, variance, variance))
    loss = COMPOSED_OBJECTIVES[objective](base.double(), fg, bg, lambda_fg, lambda_bg)
    return loss.to(base.dtype), fg.to(base.dtype), bg.to(base.dtype)


def assert_same(got, want, rtol=1e-12):
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert a.shape == b.shape, name
        assert a.dtype == b.dtype, name
        # A float32 result is rounded once; its neighbours are what another order of double sums may give.
        bound = max(rtol, 2 * torch.finfo(a.dtype).eps)
        assert torch.isfinite(a).all(), name
        assert (a - b).norm() <= bound * b.norm(), f"{name}: {((a - b).norm() / b.norm()).item():.2e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("images", IMAGES)
def test_agrees_with_the_reference(images, objective, dtype, kernel):
    problem = statistics(images)
    assert_same(
        run(kernel, problem, dtype=dtype, objective=objective), run("reference", problem, dtype=dtype, objective=objective)
    )


@pytest.mark.parametrize("images", [1024, 1100])
def test_a_large_batch_agrees_with_the_reference(images, kernel):
    """CUDA holds the norms of 1,024 columns at a time, Triton 128; its interpreter is slow."""
    problem = statistics(images // 4 if kernel == "triton" and INTERPRETING_TRITON else images)
    assert_same(run(kernel, problem), run("reference", problem))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("images", [2, 33, 130])
def test_agrees_with_the_composed_estimators(images, objective, kernel):
    problem = statistics(images, seed=1)
    want = run(None, problem, objective=objective, function=composed)
    assert_same(run(kernel, problem, objective=objective), want)
    assert_same(run("reference", problem, objective=objective), want)


@pytest.mark.parametrize("kind", ["zero rows", "tiny", "far scales"])
@pytest.mark.parametrize("images", [2, 33])
def test_degenerate_rows(images, kind, kernel):
    problem = statistics(images, kind)
    got, want = run(kernel, problem), run("reference", problem)
    assert_same(got, want)
    if kind == "far scales":
        return
    # Gradients of rows at the floor are 1e12 to 1e24 times the others, which a norm over all would not see.
    for name, a, b in zip(NAMES[4:6], got[4:6], want[4:6], strict=True):
        scale = problem[NAMES.index(name) - 4].diagonal().clamp_min(1e-24).sqrt()
        a, b = a * scale[:, None] * scale, b * scale[:, None] * scale
        assert (a - b).norm() <= 1e-12 * b.norm(), name


@pytest.mark.parametrize("images", [2, 33])
def test_identical_rows_and_zero_maps_have_no_dependence(images, kernel):
    for kind in ("identical rows", "all zero"):
        loss, fg, _, *grads = run(kernel, statistics(images, kind))
        assert fg.abs() < 1e-14, kind
        assert torch.isfinite(loss), kind
        assert all(torch.isfinite(g).all() for g in grads), kind


def test_closed_form(kernel):
    """Two images: K = [[1, k], [k, 1]], Z K Z = (1 - k)/2·[[1, -1], [-1, 1]], so tr(K Z L Z)/(N-1)² = (1 - k)(1 - l)/1."""
    gram_vjp = torch.tensor([[4.0, 3.0], [3.0, 9.0]], dtype=torch.float64)  # k = 1/2
    gram_x = torch.tensor([[1.0, -1.0], [-1.0, 16.0]], dtype=torch.float64)  # l = -1/4
    variance = torch.tensor([0.5, 1.5], dtype=torch.float64)
    base = torch.tensor(2.0, dtype=torch.float64)
    loss, fg, bg = hsic_objective(
        base, gram_vjp, gram_x, variance, lambda_fg=8.0, lambda_bg=3.0, objective="linear", backend=kernel
    )
    for value, wanted in ((fg, 0.625), (bg, 1.0), (loss, 2.0 + 3.0 - 5.0)):
        torch.testing.assert_close(value, torch.tensor(wanted, dtype=torch.float64), rtol=1e-15, atol=1e-15)


def test_weights_keep_their_digits(kernel):
    """0.01 is no float32: a weight that passed through one would be off by 2e-8."""
    problem = statistics(5)
    for objective in OBJECTIVES:
        for weights in ({"lambda_fg": 0.01, "lambda_bg": 0.0}, {"lambda_fg": 0.0, "lambda_bg": 1e-3 / 3}):
            options = {"objective": objective, "base": 0.0, "cotangents": (1.0, 0.0, 0.0), **weights}
            got, want = run(kernel, problem, **options), run("reference", problem, **options)
            for name, a, b in zip(NAMES, got, want, strict=True):
                assert (a - b).norm() <= 1e-12 * b.norm(), (objective, weights, name)


def test_expm1_keeps_a_small_background(kernel):
    problem = statistics(4)
    problem[2].fill_(1e-9)
    for sign in (1.0, -1.0):
        options = {"base": 0.0, "objective": "expm1", "lambda_fg": 0.0, "lambda_bg": sign}
        got, want = run(kernel, problem, **options)[0], run("reference", problem, **options)[0]
        torch.testing.assert_close(got, want, rtol=1e-14, atol=0)


@NUMPY_WARNS
@pytest.mark.parametrize("background", [0.0, 40.0, 800.0])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_large_backgrounds_overflow_as_the_reference_does(objective, background, kernel):
    problem = statistics(4)
    problem[2].fill_(background)
    leaves = torch.tensor(0.0, dtype=torch.float64), *problem
    got, want = (hsic_objective(*leaves, **WEIGHTS, objective=objective, backend=b)[0] for b in (kernel, "reference"))
    torch.testing.assert_close(got, want, rtol=1e-13, atol=0)
    assert torch.isinf(want) == (background == 800.0 and objective != "linear")


def test_gradcheck(kernel):
    """Through rows, since a Gram is symmetric: what a kernel need not be asked about."""
    rows = [torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    base, variance = (
        torch.randn((), dtype=torch.float64, requires_grad=True),
        torch.rand(3, dtype=torch.float64, requires_grad=True),
    )
    for objective in OBJECTIVES:

        def function(base, vjp, x, variance, objective=objective):
            return hsic_objective(base, vjp @ vjp.T, x @ x.T, variance, **WEIGHTS, objective=objective, backend=kernel)

        assert torch.autograd.gradcheck(function, (base, *rows, variance))


@pytest.mark.parametrize("kept", list(itertools.product([False, True], repeat=3))[1:], ids=str)
def test_cotangents_that_never_come_are_zero(kept, kernel):
    """Each output alone, and each pair: the loss alone is what training asks for."""
    problem = statistics(5)
    grads = []
    for backend in (kernel, "reference"):
        leaves = [t.clone().requires_grad_() for t in (torch.tensor(0.5, dtype=torch.float64), *problem)]
        out = [t for t, keep in zip(hsic_objective(*leaves, **WEIGHTS, backend=backend), kept, strict=True) if keep]
        made = torch.autograd.grad([2.0 * t for t in out], leaves, [torch.ones_like(t) for t in out], allow_unused=True)
        grads.append([torch.zeros_like(t) if g is None else g for g, t in zip(made, leaves, strict=True)])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14 * b.abs().max().item())


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4))[1:], ids=str)
def test_only_the_gradients_asked_for(needs, kernel):
    problem = (torch.tensor(0.5, dtype=torch.float64), *statistics(5))
    full = [t.clone().requires_grad_() for t in problem]
    hsic_objective(*full, **WEIGHTS, backend="reference")[0].backward()
    leaves = [t.clone().requires_grad_(need) for t, need in zip(problem, needs, strict=True)]
    hsic_objective(*leaves, **WEIGHTS, backend=kernel)[0].backward()
    for leaf, other, need in zip(leaves, full, needs, strict=True):
        assert (leaf.grad is not None) == need
        if need:
            torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-11, atol=1e-14 * other.grad.abs().max().item())


def test_second_derivative_is_refused_in_words(kernel):
    base, gram_vjp, gram_x, variance = (torch.tensor(0.5, dtype=torch.float64), *statistics(4))
    for leaf in (gram_vjp, gram_x, variance):
        leaf.requires_grad_()
        (grad,) = torch.autograd.grad(
            hsic_objective(base, gram_vjp, gram_x, variance, **WEIGHTS, backend=kernel)[0], leaf, create_graph=True
        )
        with pytest.raises(NotImplementedError, match="second derivative exists only with backend='reference'"):
            (grad.sum() + leaf.sum()).backward()
        leaf.requires_grad_(False)


def test_a_linear_base_has_no_second_derivative_to_refuse(kernel):
    leaf = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    loss = hsic_objective(leaf.square(), *statistics(4), **WEIGHTS, backend=kernel)[0]
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    (second,) = torch.autograd.grad(grad, leaf)
    assert (grad.item(), second.item()) == (1.0, 2.0)


def test_reference_has_a_second_derivative():
    rows = [torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    base, variance = (
        torch.tensor(0.5, dtype=torch.float64, requires_grad=True),
        torch.rand(4, dtype=torch.float64, requires_grad=True),
    )
    assert torch.autograd.gradgradcheck(
        lambda b, r, x, v: hsic_objective(b, r @ r.T, x @ x.T, v, **WEIGHTS, backend="reference"), (base, *rows, variance)
    )


def test_backward_twice_with_other_cotangents(kernel):
    leaves = [t.requires_grad_() for t in (torch.tensor(0.5, dtype=torch.float64), *statistics(5))]
    out = hsic_objective(*leaves, **WEIGHTS, backend=kernel)
    first, twice, again = (
        torch.autograd.grad(out, leaves, [torch.tensor(f * c, dtype=torch.float64) for c in (0.7, 0.3, -2.0)], retain_graph=True)
        for f in (1.0, 2.0, 1.0)
    )
    for a, b, c in zip(first, twice, again, strict=True):
        assert torch.equal(a, c)
        torch.testing.assert_close(b, 2 * a, rtol=1e-14, atol=0)


@pytest.mark.parametrize("images", IMAGES)
def test_every_element_is_written(images, kernel, poisoned_memory):
    for value in run(kernel, statistics(images)):
        assert torch.isfinite(value).all()


@pytest.mark.parametrize("images", [33, 130])
def test_equal_inputs_give_equal_bits(images, kernel):
    problem = statistics(images)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(kernel, problem))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@NUMPY_WARNS
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("where", ["gram_vjp diagonal", "gram_vjp", "gram_x diagonal", "gram_x", "variance", "base"])
def test_non_finite_values_show(where, bad, kernel):
    """Loss and its own term show it, and no gradient is finite that the reference's is not."""
    gram_vjp, gram_x, variance = statistics(6)
    base = torch.tensor(0.5, dtype=torch.float64)
    if where == "base":
        base.fill_(bad)
    elif where == "variance":
        variance[3] = bad
    else:
        gram = gram_vjp if "vjp" in where else gram_x
        gram[(3, 3) if "diagonal" in where else (3, 1)] = bad
        gram[(3, 3) if "diagonal" in where else (1, 3)] = bad
    results = []
    for backend in (kernel, "reference"):
        leaves = [t.clone().requires_grad_() for t in (base, gram_vjp, gram_x, variance)]
        out = hsic_objective(*leaves, **WEIGHTS, backend=backend)
        results.append([*out, *torch.autograd.grad(out[0], leaves)])
    assert not torch.isfinite(results[0][0])
    assert torch.isfinite(results[0][1]) == ("gram" not in where)
    assert torch.isfinite(results[0][2]) == (where != "variance")
    for name, a, b in zip(NAMES, *results, strict=True):
        assert torch.equal(torch.isfinite(a), torch.isfinite(b)), name


def test_strided_inputs_give_the_same_numbers(kernel):
    problem = statistics(7)
    want = run(kernel, problem)
    wide = [torch.stack([t, torch.full_like(t, 9.0)], dim=-1)[..., 0] for t in problem]
    assert not any(t.is_contiguous() for t in wide)
    leaves = [torch.tensor(1.25, dtype=torch.float64), *wide]
    leaves = [t.detach().requires_grad_() for t in leaves]
    out = hsic_objective(*leaves, **WEIGHTS, backend=kernel)
    cotangents = [torch.tensor(c, dtype=torch.float64) for c in (0.7, 0.2, -0.9)]
    for a, b in zip((*out, *torch.autograd.grad(out, leaves, cotangents)), want, strict=True):
        assert torch.equal(a, b)


def test_opcheck(kernel):
    forward, backward = _FORWARD[kernel], _BACKWARD[kernel]
    gram_vjp, gram_x, variance = statistics(5)
    for dtype in (torch.float64, torch.float32):
        base = torch.tensor(0.5, dtype=dtype)
        weights = (0.3, 1.7, OBJECTIVES["expm1"])
        torch.library.opcheck(forward, (base, gram_vjp, gram_x, variance, *weights))
        rows, totals = forward(base, gram_vjp, gram_x, variance, *weights)[3:]
        for needs in ((True, True, True), (True, False, False), (False, True, True)):
            cotangents = (base, None, base) if needs[0] else (None, base, None)
            torch.library.opcheck(backward, (*cotangents, gram_vjp, gram_x, rows, totals, *weights, *needs))


def test_compiles_in_one_graph(kernel):
    def step(base, vjp, x, variance):
        loss, fg, _ = hsic_objective(base, vjp @ vjp.T, x @ x.T, variance, **WEIGHTS, backend=kernel)
        return loss + fg.square()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for images in (3, 5):
        inputs = [torch.randn(images, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        base, variance = torch.tensor(0.5, dtype=torch.float64, requires_grad=True), torch.rand(images, dtype=torch.float64)
        leaves = [base, *inputs, variance.requires_grad_()]
        got, want = compiled(*leaves), step(*leaves)
        assert torch.equal(got, want)
        for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-16)


def test_autocast_changes_nothing(kernel):
    problem = (torch.tensor(0.5), *statistics(4))
    device = problem[0].device.type
    for backend in (kernel, "reference"):
        want = hsic_objective(*problem, **WEIGHTS, backend=backend)
        with torch.autocast(device, dtype=torch.bfloat16):
            got = hsic_objective(*problem, **WEIGHTS, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


EYE = torch.eye(3, dtype=torch.float64, device="cpu")
ONES = torch.ones(3, dtype=torch.float64, device="cpu")
ZERO = torch.zeros((), device="cpu")


@pytest.mark.parametrize(
    ("arguments", "changed", "error", "message"),
    [
        ((1.0, EYE, EYE, ONES), {}, TypeError, "hsic_objective: base must be a tensor, got float"),
        ((ONES, EYE, EYE, ONES), {}, ValueError, r"hsic_objective: base must be 0-d, got shape \[3\]"),
        ((ZERO.bfloat16(), EYE, EYE, ONES), {}, TypeError, "base must be float32 or float64, got torch.bfloat16"),
        ((ZERO, ONES, EYE, ONES), {}, ValueError, r"gram_vjp must have shape \[N, N\], got \[3\]"),
        ((ZERO, EYE, EYE[:2], ONES), {}, ValueError, r"gram_x must have shape \[N, N\], got \[2, 3\]"),
        ((ZERO, EYE, EYE[:2, :2], ONES), {}, ValueError, r"gram_x must have shape \[3, 3\] to go with gram_vjp, got \[2, 2\]"),
        ((ZERO, EYE, EYE, ONES[:2]), {}, ValueError, r"background_variance must have shape \[3\] to go with gram_vjp, got \[2\]"),
        ((ZERO, EYE.float(), EYE, ONES), {}, TypeError, "gram_vjp must be float64, got torch.float32"),
        ((ZERO, EYE, EYE, ONES.float()), {}, TypeError, "background_variance must be float64, got torch.float32"),
        ((ZERO, EYE, EYE.to("meta"), ONES), {}, RuntimeError, r"gram_x must be on the device of base \(cpu\), got meta"),
        ((ZERO, EYE[:1, :1], EYE[:1, :1], ONES[:1]), {}, ValueError, "the batch must hold N >= 2 images, got 1"),
        (
            (ZERO, EYE, EYE, ONES),
            {"objective": "log"},
            ValueError,
            "objective must be one of 'exp', 'linear', 'expm1', got 'log'",
        ),
        ((ZERO, EYE, EYE, ONES), {"backend": "abacus"}, ValueError, "backend must be one of .* got 'abacus'"),
    ],
    ids=lambda v: v[-40:] if isinstance(v, str) else "",
)
def test_bad_arguments(arguments, changed, error, message):
    with pytest.raises(error, match=message):
        hsic_objective(*arguments, **{**WEIGHTS, **changed})


def test_the_reference_is_the_formula_with_the_centring_matrix():
    gram_vjp, gram_x, _ = statistics(6)
    z = torch.eye(6, dtype=torch.float64) - 1 / 6
    kernels = [g / (g.diagonal().sqrt()[:, None] * g.diagonal().sqrt()) for g in (gram_vjp, gram_x)]
    want = torch.trace(kernels[0] @ z @ kernels[1] @ z) / 25
    got = reference.hsic_objective(
        torch.tensor(0.0).double(), gram_vjp, gram_x, torch.ones(6).double(), **WEIGHTS, objective="exp"
    )[1]
    torch.testing.assert_close(got, want, rtol=1e-13, atol=0)
