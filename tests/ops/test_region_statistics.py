"""region_statistics: kernels against the reference, and everything a caller may do to it."""

from __future__ import annotations

import itertools

import pytest
import torch

from sib_fast import region_statistics
from sib_fast._backends import INTERPRETING_TRITON
from sib_fast.ops.region_statistics import reference
from sib_fast.testing.assertions import assert_no_worse_than
from sib_fast.testing.problems import PROBLEMS, layouts

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NAMES = ("gram_vjp", "gram_x", "background_variance", "vjp_variance", "background_gram_vjp", "background_gram_x")
INPUTS = ("grad_vjp", "grad_x", "grad_mask")


def interpreted(kernel: str) -> bool:
    """Triton's interpreter takes milliseconds an operation on a block, so it gets less of the same where that loses nothing."""
    return kernel == "triton" and INTERPRETING_TRITON


def run(function, inputs, cotangents):
    """Statistics and the gradients of all three inputs for given cotangents of the statistics."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = [t for t in function(*leaves) if t is not None]
    grads = torch.autograd.grad(out, leaves, cotangents[: len(out)])
    return [t.detach() for t in out], grads


def cotangents_of(images, scale=1.0, seed=1):
    """Not symmetric for the Grams, as an unbiased estimator's raw gradient is not."""
    g = torch.Generator("cpu").manual_seed(seed)
    shapes = [(images, images)] * 2 + [(images,)] * 2 + [(images, images)] * 2
    made = (scale * torch.randn(shape, generator=g, dtype=torch.float64, device="cpu") for shape in shapes)
    return [cotangent.to(torch.get_default_device()) for cotangent in made]


@pytest.mark.parametrize("background_grams", [False, True], ids=["foreground", "both"])
# float64 has a rule of its own below: with the truth in the same precision, autograd's own error is 0 by definition.
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.id)
def test_values_and_gradients_are_no_worse_than_autograds(problem, dtype, background_grams, kernel):
    inputs = problem.make(dtype)
    cotangents = cotangents_of(problem.shape[0])
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def ref(*tensors):
        return reference.region_statistics(*tensors, background_grams=background_grams)

    got = run(lambda *t: region_statistics(*t, background_grams=background_grams, backend=kernel), inputs, cotangents)
    low = run(ref, [t.to(wide) for t in inputs], cotangents)
    exact = run(ref, [t.double() for t in inputs], cotangents)
    eps = torch.finfo(wide).eps
    for name, a, b, c in zip(NAMES, got[0], low[0], exact[0], strict=False):
        assert a.dtype == torch.float64
        floor = 8.0
        if "variance" in name:
            # The truth of a constant map's variance is 0: rounding of R itself is what any method leaves.
            b, floor = b + eps**2 * inputs[0].double().square().mean(), 16.0
        assert_no_worse_than(a, b.to(wide), c, floor=floor, what=name)
    for name, tensor, a, b, c in zip(INPUTS, inputs, got[1], low[1], exact[1], strict=True):
        assert a.dtype == tensor.dtype
        floor = 8.0 * torch.finfo(tensor.dtype).eps / eps
        if dtype == torch.float16:  # beyond its range a float16 gradient is Inf on both sides
            finite = c.abs() < 6e4
            a, b, c = a[finite], b[finite], c[finite]
        assert_no_worse_than(a.to(wide), b.to(tensor.dtype).to(wide), c, floor=floor, what=name)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.id)
def test_float64_agrees_with_the_reference(problem, kernel):
    inputs, cotangents = problem.make(torch.float64), cotangents_of(problem.shape[0])
    got = run(lambda *t: region_statistics(*t, background_grams=True, backend=kernel), inputs, cotangents)
    want = run(lambda *t: region_statistics(*t, background_grams=True, backend="reference"), inputs, cotangents)
    power = inputs[0].square().mean()
    for name, a, b in zip(NAMES, got[0], want[0], strict=True):
        atol = 1e-26 * power.item() if "variance" in name else 1e-10 * b.abs().max().item()
        torch.testing.assert_close(a, b, rtol=1e-10, atol=atol, msg=name)
    for name, a, b in zip(INPUTS, got[1], want[1], strict=True):
        assert (a - b).norm() <= 1e-10 * b.norm(), name


def test_closed_form(kernel):
    """Two images of three elements, by hand."""
    vjp = torch.tensor([[1.0, 2.0, 4.0], [0.0, -1.0, 3.0]], dtype=torch.float64).view(2, 1, 1, 3)
    x = torch.tensor([[2.0, 0.0, 1.0], [1.0, 1.0, 1.0]], dtype=torch.float64).view(2, 1, 1, 3)
    mask = torch.tensor([[1.0, 0.5, 0.0], [0.5, 1.0, 0.5]], dtype=torch.float64).view(2, 1, 1, 3)
    # a = (1, 1, 0), (0, -1, 1.5)   b = (2, 0, 0), (.5, 1, .5)   v = (0, 1, 4), (0, 0, 1.5)   c = (0, 0, 1), (.5, 0, .5)
    out = region_statistics(vjp, x, mask, background_grams=True, backend=kernel)
    expected = {
        "gram_vjp": [[2.0, -1.0], [-1.0, 3.25]],
        "gram_x": [[4.0, 1.0], [1.0, 1.5]],
        "background_variance": [13 / 3, 0.75],
        "vjp_variance": [7 / 3, 13 / 3],
        "background_gram_vjp": [[17.0, 6.0], [6.0, 2.25]],
        "background_gram_x": [[1.0, 0.5], [0.5, 0.5]],
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(out, name), torch.tensor(value, dtype=torch.float64), rtol=1e-14, atol=0, msg=name)


def test_grams_are_symmetric_to_the_bit_and_permute_with_the_images(kernel):
    vjp, x, mask = PROBLEMS[2].make(torch.float32)
    out = region_statistics(vjp, x, mask, background_grams=True, backend=kernel)
    order = torch.randperm(vjp.shape[0])
    permuted = region_statistics(vjp[order], x[order], mask[order], background_grams=True, backend=kernel)
    for name in NAMES:
        value, other = getattr(out, name), getattr(permuted, name)
        if value.ndim == 2:
            assert torch.equal(value, value.T), name
            value = value[order][:, order]
        else:
            value = value[order]
        # A permuted pair may sit in another lane of the register tile, with the same products in the same order.
        torch.testing.assert_close(other, value, rtol=1e-6, atol=1e-12 * value.abs().max().item(), msg=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("layout_vjp", "layout_x"), list(itertools.product(layouts(torch.zeros(1, 2, 2, 2)), repeat=2)))
def test_any_pair_of_layouts(layout_vjp, layout_x, dtype, kernel):
    if interpreted(kernel) and (dtype != torch.float32 or layout_vjp != layout_x):
        pytest.skip("each map has launches of its own, which know neither the other's layout nor, under the interpreter, a dtype")
    vjp, x, mask = PROBLEMS[1].make(dtype)
    cotangents = cotangents_of(vjp.shape[0])

    def function(*t):
        return region_statistics(*t, background_grams=True, backend=kernel)

    want = run(function, (vjp, x, mask), cotangents)
    got = run(function, (layouts(vjp)[layout_vjp], layouts(x)[layout_x], mask), cotangents)
    for name, a, b in zip((*NAMES, *INPUTS), (*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        # Another element order regroups the same sums.
        scale = b.abs().max().item()
        eps = torch.finfo(b.dtype if name in INPUTS else torch.float64 if dtype == torch.float64 else torch.float32).eps
        torch.testing.assert_close(a, b, rtol=32 * eps, atol=32 * eps * scale, msg=name)


def test_gradients_keep_the_layout_of_their_inputs(kernel):
    vjp, x, mask = PROBLEMS[1].make(torch.float32)
    vjp = vjp.contiguous(memory_format=torch.channels_last)
    _, grads = run(lambda *t: region_statistics(*t, backend=kernel), (vjp, x, mask), cotangents_of(vjp.shape[0]))
    assert grads[0].is_contiguous(memory_format=torch.channels_last)
    assert grads[1].is_contiguous()


def test_mixed_dtypes_and_masks(kernel):
    vjp, x, mask = PROBLEMS[0].make(torch.float32)
    want = region_statistics(vjp, x, mask, backend="reference")
    half = region_statistics(vjp, x.bfloat16(), mask, backend=kernel)
    want_half = region_statistics(vjp, x.bfloat16(), mask, backend="reference")

    def assert_gram_close(got, exact):  # relative to the rows' norms: a product of two rows may cancel to anything
        assert (got - exact).abs().max() <= 1e-6 * exact.abs().max()

    assert_gram_close(half.gram_vjp, want.gram_vjp)
    assert_gram_close(half.gram_x, want_half.gram_x)
    binary = (mask > 0.5).to(torch.float64)  # a given segmentation may come in any floating dtype
    assert_gram_close(
        region_statistics(vjp, x, binary, backend=kernel).gram_vjp,
        region_statistics(vjp, x, binary, backend="reference").gram_vjp,
    )


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3))[1:], ids=str)
def test_only_the_gradients_asked_for(needs, kernel):
    inputs = PROBLEMS[0].make(torch.float64)
    leaves = [t.clone().requires_grad_(need) for t, need in zip(inputs, needs, strict=True)]
    out = region_statistics(*leaves, backend=kernel)
    (out.gram_vjp.sum() + out.gram_x.sum() + out.background_variance.sum()).backward()
    full = [t.clone().requires_grad_() for t in inputs]
    want = region_statistics(*full, backend="reference")
    (want.gram_vjp.sum() + want.gram_x.sum() + want.background_variance.sum()).backward()
    for leaf, need, other in zip(leaves, needs, full, strict=True):
        assert (leaf.grad is not None) == need
        if need:
            torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-9, atol=1e-14)


def test_unused_statistics_have_no_gradient(kernel):
    """Cotangents that never come are zero, for every statistic alone."""
    inputs = PROBLEMS[0].make(torch.float64)
    for name in NAMES:
        grads = []
        for backend in (kernel, "reference"):
            leaves = [t.clone().requires_grad_() for t in inputs]
            value = getattr(region_statistics(*leaves, background_grams=True, backend=backend), name).square().sum()
            grads.append(
                [
                    torch.zeros_like(t) if g is None else g
                    for t, g in zip(leaves, torch.autograd.grad(value, leaves, allow_unused=True), strict=True)
                ]
            )
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * b.abs().max().item() + 1e-300, msg=name)


@pytest.mark.parametrize("background_grams", [False, True])
def test_gradcheck(background_grams, kernel):
    inputs = [torch.randn(3, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    mask = torch.rand(3, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    names = NAMES if background_grams else NAMES[:4]
    assert torch.autograd.gradcheck(
        lambda *t: tuple(getattr(region_statistics(*t, background_grams=background_grams, backend=kernel), n) for n in names),
        (*inputs, mask),
        fast_mode=interpreted(kernel),  # a few random directions instead of every element: minutes against seconds
    )


def test_second_derivative_is_refused_in_words(kernel):
    vjp = torch.randn(3, 2, 4, 4, requires_grad=True)
    out = region_statistics(vjp, torch.randn(3, 2, 4, 4), torch.rand(3, 1, 4, 4), backend=kernel)
    (grad,) = torch.autograd.grad(out.gram_vjp.sum(), vjp, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative exists only with backend='reference'"):
        (grad.sum() + vjp.sum()).backward()


def test_reference_has_a_second_derivative():
    vjp = torch.randn(2, 1, 2, 3, dtype=torch.float64, requires_grad=True)
    x, mask = torch.randn_like(vjp), torch.rand_like(vjp)
    assert torch.autograd.gradgradcheck(lambda v: tuple(region_statistics(v, x, mask, backend="reference")[:4]), vjp)


def test_backward_twice_with_vector_cotangents(kernel):
    inputs = [t.requires_grad_() for t in PROBLEMS[0].make(torch.float64)]
    out = region_statistics(*inputs, backend=kernel)[:4]
    cotangents = cotangents_of(inputs[0].shape[0])[:4]
    first, twice, again = (
        torch.autograd.grad(out, inputs, [f * c for c in cotangents], retain_graph=True) for f in (1.0, 2.0, 1.0)
    )
    for a, b, c in zip(first, twice, again, strict=True):
        assert torch.equal(a, c)
        torch.testing.assert_close(b, 2 * a, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.id)
def test_every_element_is_written(problem, dtype, kernel, poisoned_memory):
    inputs = problem.make(dtype)
    small = cotangents_of(problem.shape[0], scale=1e-6)
    values, grads = run(lambda *t: region_statistics(*t, background_grams=True, backend=kernel), inputs, small)
    for tensor in (*values, *grads):
        assert torch.isfinite(tensor).all()


def test_threads_do_not_change_bits(kernel):
    inputs, cotangents = PROBLEMS[1].make(torch.float32), cotangents_of(3)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            values, grads = run(lambda *t: region_statistics(*t, background_grams=True, backend=kernel), inputs, cotangents)
            results.append([*values, *grads])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_gram_sums_do_not_lose_digits(kernel):
    """SPEC 7: float32 partial sums of at most 1,024 products, added in float64. A plain float32 sum of these is 50× off."""
    vjp = torch.rand(2, 3, 200, 200) + 1.0  # positive, so that a long float32 sum rounds the same way at every step
    mask = torch.ones(2, 1, 200, 200)
    exact = vjp.double().flatten(1) @ vjp.double().flatten(1).T
    # IEEE: tensor cores truncate, which does not average out (tests/cuda and tests/triton hold tf32x3 to its own bound).
    got = region_statistics(vjp, vjp, mask, backend=kernel, precision="ieee").gram_vjp
    assert ((got - exact).abs() / exact).max() < 2e-8


def test_variance_of_tiny_values_on_a_large_mean(kernel):
    """mean² − mean of squares would cancel to nothing here; R² alone would underflow float32."""
    vjp = (1e-21 * (1000 + torch.randn(3, 2, 20, 20, dtype=torch.float64))).float()
    out = region_statistics(vjp, vjp, torch.zeros(3, 1, 20, 20), backend=kernel)
    exact = vjp.double().flatten(1).var(dim=1)
    torch.testing.assert_close(out.vjp_variance, exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(out.background_variance, exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (130, 3, 5, 5), (5, 300, 2, 2), (3, 1, 1, 2), (2, 2, 300, 7)], ids=str)
def test_shapes_at_the_edges_of_the_blocks(shape, kernel):
    vjp, x = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    mask = torch.rand(shape[0], 1, *shape[2:], dtype=torch.float64)
    cotangents = cotangents_of(shape[0])
    got = run(lambda *t: region_statistics(*t, background_grams=True, backend=kernel), (vjp, x, mask), cotangents)
    want = run(lambda *t: region_statistics(*t, background_grams=True, backend="reference"), (vjp, x, mask), cotangents)
    for a, b in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        assert (a - b).norm() <= 1e-10 * b.norm()


def test_non_finite_values_are_not_hidden(kernel):
    vjp = torch.randn(3, 2, 8, 8)
    vjp[1, 0, 0, 0] = float("nan")
    out = region_statistics(vjp, torch.randn(3, 2, 8, 8), torch.rand(3, 1, 8, 8), backend=kernel)
    assert out.gram_vjp[1].isnan().all()
    assert torch.isfinite(out.gram_vjp[0, 0])
    assert out.background_variance[1].isnan()


def test_opcheck(kernel, registered):
    op = registered
    for dtype in DTYPES:
        vjp, x = (
            torch.randn(3, 2, 5, 6).to(dtype),
            torch.randn(3, 2, 5, 6).to(dtype).contiguous(memory_format=torch.channels_last),
        )
        mask = torch.rand(3, 1, 5, 6, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        for background_grams in (False, True):
            torch.library.opcheck(op._region_statistics.default, (vjp, x, mask, background_grams, "ieee"))
            out = op._region_statistics(vjp, x, mask, background_grams, "ieee")
            grams = cotangents_of(3)
            background = grams[4:] if background_grams else (None, None)
            torch.library.opcheck(
                op._region_statistics_backward.default,
                (*grams[:4], *background, vjp, x, mask, out[4], out[5], True, background_grams, True, "ieee"),
            )


def test_compiles_in_one_graph(kernel):
    def step(vjp, x, mask):
        out = region_statistics(vjp, x, mask, background_grams=True, backend=kernel)
        return out.gram_vjp.sum() + out.gram_x.square().sum() + out.background_variance.sum() + out.background_gram_x.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for images, size in ((3, 12), (5, 9)):
        inputs = [torch.randn(images, 2, size, size, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        mask = torch.rand(images, 1, size, size, dtype=torch.float64, requires_grad=True)
        got, want = compiled(*inputs, mask), step(*inputs, mask)
        assert torch.equal(got, want)
        for a, b in zip(torch.autograd.grad(got, [*inputs, mask]), torch.autograd.grad(want, [*inputs, mask]), strict=True):
            assert torch.equal(a, b)


def test_autocast_changes_nothing(kernel):
    vjp, x, mask = PROBLEMS[0].make(torch.float32)
    for backend in (kernel, "reference"):
        want = region_statistics(vjp, x, mask, backend=backend)
        with torch.autocast(vjp.device.type, dtype=torch.bfloat16):
            got = region_statistics(vjp, x, mask, backend=backend)
        assert torch.equal(got.gram_vjp, want.gram_vjp)
