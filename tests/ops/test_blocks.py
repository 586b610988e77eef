"""The kernels' building blocks, every instruction set, against numpy: selection, box mean, sigmoid, rank windows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

blocks = pytest.importorskip(
    "sib_fast._blocks", reason="built on request only (SIB_FAST_BLOCKS=1), for the Python that built it", exc_type=ImportError
)
CAPABILITIES = ["baseline", "avx2", "avx512"]
USABLE = CAPABILITIES[: CAPABILITIES.index(blocks.capability()) + 1]
FLOATS = {"float32": np.float32, "float64": np.float64}


@pytest.fixture(params=USABLE)
def capability(request):
    return request.param


@st.composite
def planes(draw):
    """Values as selection meets them: any count, few distinct ones or many, zeros, huge ranges, subnormals."""
    count = draw(st.integers(1, 400))
    dtype = FLOATS[draw(st.sampled_from(sorted(FLOATS)))]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["normal", "few", "zeros", "range", "subnormal", "constant"]))
    values = rng.standard_normal(count)
    if kind == "few":
        values = np.round(values)
    elif kind == "zeros":
        values[rng.random(count) < 0.5] = 0.0
    elif kind == "range":
        values *= 10.0 ** rng.integers(-30, 30, count)
    elif kind == "subnormal":
        values *= 1e-41 if dtype is np.float32 else 1e-310
    elif kind == "constant":
        values[:] = -1.5
    return values.astype(dtype)


@given(
    values=planes(),
    levels=st.lists(st.floats(0, 1), min_size=1, max_size=3),
    temperature=st.sampled_from([1e-6, 0.1, 1.0, 20.0]),
    capability=st.sampled_from(USABLE),
)
def test_selection_is_a_stable_sort(values, levels, temperature, capability):
    name = values.dtype.name
    got = getattr(blocks, f"select_ranks_{name}")(values, levels, temperature, capability)
    order = np.argsort(np.abs(values), kind="stable")
    for row, level in zip(got, levels, strict=True):
        first, _, weights = blocks.rank_window(level, temperature, len(values), name == "float64")
        ranks = first + np.arange(len(weights))
        inside = (ranks >= 0) & (ranks < len(values))
        assert np.array_equal(row, np.where(inside, order[np.clip(ranks, 0, len(values) - 1)], -1))


def test_selection_puts_nan_last(capability):
    values = np.array([3.0, np.nan, 1.0, np.inf, -2.0], dtype=np.float32)
    order = [blocks.select_ranks_float32(values, [k / 4], 1e-6, capability)[0] for k in range(5)]
    middle = len(order[0]) // 2
    assert [row[middle] for row in order] == [2, 4, 0, 3, 1]


@given(level=st.floats(0, 1), temperature=st.floats(1e-6, 50), pixels=st.integers(1, 3000), is_double=st.booleans())
def test_rank_window_is_the_softmax_over_all_ranks(level, temperature, pixels, is_double):
    first, nearest, weights = blocks.rank_window(level, temperature, pixels, is_double)
    position = level * (pixels - 1)
    exponent = -np.abs(np.arange(pixels) - position) / temperature
    full = np.exp(exponent - exponent.max())
    full /= full.sum()
    window = np.zeros(pixels)
    for j, weight in enumerate(weights):
        if 0 <= first + j < pixels:
            window[first + j] = weight
        else:
            assert weight == 0.0
    # What the window leaves out: e^-40 or e^-17 of the weight (SPEC 3), and the rounding of two sums over `pixels` terms.
    assert np.abs(window - full).sum() < (1e-17 if is_double else 1e-6) + pixels * np.finfo(float).eps
    assert abs(sum(weights) - 1) < 1e-12
    assert first + nearest == math.floor(position + 0.5)


@given(
    height=st.integers(1, 40),
    width=st.integers(1, 70),
    half=st.integers(0, 45),
    name=st.sampled_from(sorted(FLOATS)),
    seed=st.integers(0, 2**32 - 1),
    capability=st.sampled_from(USABLE),
)
def test_box_mean_is_the_sum_over_the_window(height, width, half, name, seed, capability):
    image = np.random.default_rng(seed).random((height, width)).astype(FLOATS[name])
    window = 2 * half + 1
    got = getattr(blocks, f"box_mean_{name}")(image, window, capability)
    padded = np.pad(image.astype(np.float64), half)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (window, window))
    exact = windows.sum(axis=(2, 3)) / window**2
    assert got.dtype == image.dtype
    # Running sums in double: n additions are off by at most n·eps/2 of the largest partial sum, which is that of whole rows.
    largest = padded.sum() / window**2
    rounding = (height + width) * np.finfo(float).eps / 2 * largest
    np.testing.assert_allclose(got, exact, rtol=2 * np.finfo(FLOATS[name]).eps, atol=2 * rounding)


def test_box_mean_is_exact_on_ties(capability):
    """Windows with the same content must tie to the bit, wherever they lie: ranks are decided by it."""
    image = np.tile(np.random.default_rng(0).random((1, 60)).astype(np.float32), (50, 1))
    rows = blocks.box_mean_float32(image, 7, capability)[3:-3]
    assert (rows == rows[0]).all()


@pytest.mark.parametrize("name", sorted(FLOATS))
def test_sigmoid_is_accurate_over_the_whole_range(name, capability):
    dtype = FLOATS[name]
    limit = 87 if name == "float32" else 708
    x = np.concatenate([np.linspace(-limit, limit, 200_001), np.linspace(-1, 1, 100_001)]).astype(dtype)
    got = getattr(blocks, f"sigmoid_{name}")(x, capability)
    wide = x.astype(np.longdouble)
    exact = 1 / (1 + np.exp(-wide))
    ulps = np.abs(got - exact) / (exact * np.finfo(dtype).eps)
    assert ulps.max() < 3
    extreme = getattr(blocks, f"sigmoid_{name}")(np.array([-1e30, 1e30, np.inf, -np.inf, np.nan, 0.0], dtype), capability)
    assert extreme[0] < 1e-37
    assert extreme[1] == extreme[2] == 1.0
    assert extreme[3] < 1e-37
    assert np.isnan(extreme[4])
    assert extreme[5] == 0.5
