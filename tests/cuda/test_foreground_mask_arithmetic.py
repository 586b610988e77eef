"""The parts of the CUDA mask kernels that need no thread, through _blocks: keys, bins, chunks, fixed point."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

blocks = pytest.importorskip(
    "sib_fast._blocks", reason="built on request only (SIB_FAST_BLOCKS=1), for the Python that built it", exc_type=ImportError
)
FLOATS = {"float32": np.float32, "float64": np.float64}


@given(pixels=st.integers(1, 2**31 - 1))
def test_chunks_are_equal(pixels):
    """Whole batches of 1,024 pixels, at most 8,192, no more chunks than that needs, and shares that differ by a batch at most."""
    chunk, chunks = blocks.cuda_cut(pixels)
    assert chunk % 1024 == 0
    assert chunk <= 8192
    assert chunks * chunk >= pixels > (chunks - 1) * chunk
    assert chunks <= -(-pixels // 8192)
    assert chunk - 1024 < pixels / -(-pixels // 8192)


def test_chunks_of_an_image():
    assert blocks.cuda_cut(224 * 224) == (7168, 7)


@pytest.mark.parametrize("name", sorted(FLOATS))
def test_keys_order_like_magnitudes_and_nan_is_last(name):
    dtype = FLOATS[name]
    tiny = np.finfo(dtype).smallest_subnormal
    ascending = np.array([0.0, tiny, 2 * tiny, 1e-30, 1.0, np.nextafter(dtype(1), dtype(2)), 1e30, np.inf, np.nan], dtype)
    keys = getattr(blocks, f"cuda_magnitude_keys_{name}")(ascending).astype(object)
    assert (keys[1:] > keys[:-1]).all()
    assert (keys == getattr(blocks, f"cuda_magnitude_keys_{name}")(-ascending)).all()


@given(
    a=st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1)),
    b=st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1)),
)
def test_ties_go_to_the_lower_pixel(a, b):
    assert blocks.cuda_compound_less(*a, *b) == (a < b)
    assert blocks.cuda_compound_less(a[0], a[1], a[0], b[1]) == (a[1] < b[1])


@given(span=st.integers(0, 2**64 - 1), log2_bins=st.integers(1, 13))
def test_every_key_has_a_bin_and_half_of_them_are_used(span, log2_bins):
    shift = blocks.cuda_bin_shift(span, log2_bins)
    assert span >> shift < 2**log2_bins
    assert shift == 0 or span >> shift >= 2 ** (log2_bins - 1)


def test_bins_fit_the_shared_memory_that_needs_no_asking():
    assert [blocks.cuda_log2_bins(p) for p in (1, 2048, 2049, 224 * 224, 1024 * 1024, 2**31 - 1)] == [6, 6, 7, 11, 13, 13]


@given(
    height=st.integers(1, 5000),
    width=st.integers(1, 5000),
    half=st.integers(0, 6000),
    sum_bits=st.sampled_from([32, 64]),
    most=st.sampled_from([24, 30, 52]),
)
def test_a_window_of_ones_does_not_overflow(height, width, half, sum_bits, most):
    count = blocks.cuda_window_pixels(height, width, 2 * half + 1)
    assert count == min(2 * half + 1, height) * min(2 * half + 1, width)
    bits = blocks.cuda_fraction_bits(count, sum_bits, most)
    assert count * 2**bits < 2**sum_bits - 1 or count == 1  # the largest value of all marks "no item"
    # No more than one bit is given away.
    assert bits == most or count * 2 ** (bits + 1) > 2 ** (sum_bits - 1)


def test_the_default_window_has_22_bits():
    assert blocks.cuda_fraction_bits(31 * 31, 32, 24) == 22
