"""Property tests: any shape, layout and option, kernel against reference in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from sib_fast import region_statistics
from sib_fast._backends import INTERPRETING_TRITON
from sib_fast.ops.foreground_mask import MaskOptions, mask_with_ranks, reference
from sib_fast.testing.assertions import exact_orders, rank_pixels_of
from sib_fast.testing.problems import layouts
from tests.ops.test_foreground_mask import takes

LAYOUTS = sorted(layouts(torch.zeros(1, 1, 1, 1)))
shapes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 24), st.integers(1, 24))
quantile = st.floats(0, 1)
# Triton's interpreter takes a second an example.
examples = {"max_examples": 12} if INTERPRETING_TRITON else {}
relaxed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], **examples)


@relaxed
@given(
    shape=shapes,
    half=st.integers(0, 12),
    temperature=st.sampled_from([0.05, 0.1, 1.0, 30.0]),
    slope=st.floats(0.5, 10),
    quantiles=st.tuples(quantile, quantile, quantile, quantile),
    layout=st.sampled_from(LAYOUTS),
    coarse=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_foreground_mask(kernel, shape, half, temperature, slope, quantiles, layout, coarse, seed):
    like = {"generator": torch.Generator("cpu").manual_seed(seed), "dtype": torch.float64, "device": "cpu"}
    vjp = torch.randn(shape, **like).to(torch.get_default_device())
    vjp = (2 * vjp).round() if coarse else vjp
    options = MaskOptions(2 * half + 1, temperature, slope, quantiles, 1e-3)
    assume(takes(kernel, options, shape, torch.float64))
    orders = exact_orders(vjp, options)
    cotangent = torch.randn(shape[0], 1, *shape[2:], **like).to(vjp.device)

    def run(function, value):
        value = value.detach().requires_grad_()
        mask = function(value)
        return mask.detach(), torch.autograd.grad(mask, value, cotangent)[0]

    ranks = rank_pixels_of(orders, options, torch.float64)
    got = run(lambda v: mask_with_ranks(v, ranks, options, kernel), layouts(vjp)[layout])
    want = run(lambda v: reference.foreground_mask(v, **options._asdict(), orders=orders), vjp)
    torch.testing.assert_close(got[0], want[0], rtol=1e-9, atol=1e-9)
    # eps = 1e-3 bounds 1/r, and so what a gradient that cancels is made of.
    torch.testing.assert_close(got[1], want[1], rtol=1e-8, atol=1e-8)


@relaxed
@given(
    shape=shapes,
    layout_vjp=st.sampled_from(LAYOUTS),
    layout_x=st.sampled_from(LAYOUTS),
    background_grams=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_region_statistics(kernel, shape, layout_vjp, layout_x, background_grams, seed):
    if shape[1] * shape[2] * shape[3] < 2:
        with pytest.raises(ValueError, match="C·H·W >= 2"):
            region_statistics(torch.ones(shape), torch.ones(shape), torch.ones(shape[0], 1, 1, 1), backend=kernel)
        return
    like = {"generator": torch.Generator("cpu").manual_seed(seed), "dtype": torch.float64, "device": "cpu"}
    made = torch.randn(shape, **like), torch.randn(shape, **like), torch.rand((shape[0], 1, *shape[2:]), **like)
    vjp, x, mask = (t.to(torch.get_default_device()) for t in made)

    def run(backend, *inputs):
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = region_statistics(*leaves, background_grams=background_grams, backend=backend)
        total = sum((t * torch.arange(t.numel()).view(t.shape).cos()).sum() for t in out if t is not None)
        return [t.detach() for t in out if t is not None], torch.autograd.grad(total, leaves)

    got = run(kernel, layouts(vjp)[layout_vjp], layouts(x)[layout_x], mask)
    want = run("reference", vjp, x, mask)
    for a, b in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
