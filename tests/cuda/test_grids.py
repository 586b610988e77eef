"""Launches of the CUDA kernels for maps too large to be run here: recorded under the emulation, whose limits are CUDA's."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from sib_fast import _backends
from sib_fast.ops.foreground_mask import rank_window_length

pytestmark = pytest.mark.skipif(_backends.MISSING["emulated"] is not None, reason=f"{_backends.MISSING['emulated']}")
MASK = (31, 0.1, 10.0, (0.05, 0.95, 0.8, 0.8), 1e-8)


@contextmanager
def recorded():
    """Collects (grid x, y, z, threads, bytes of shared memory) of the launches inside; none of them runs."""
    record = torch.ops.sib_fast_emulated._record
    record(torch.empty(0), True)
    launches: list[tuple[int, ...]] = []
    try:
        yield launches
    finally:
        launches += [tuple(row) for row in record(torch.empty(0), False).tolist()]


# Empty tensors of gigabytes: no page of them is touched, so they take no memory.
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", [(64, 3, 1536, 1536), (160, 64, 256, 256), (200_000, 3, 32, 32)], ids=str)
def test_the_mask_of_a_large_batch(shape, layout):
    images, channels, height, width = shape
    vjp = torch.empty(shape, memory_format=layout)
    plane, levels = torch.empty(images, 1, height, width), torch.empty(images, 4)
    ranks = torch.empty(images, 4, rank_window_length(MASK[1], height * width, torch.float32), dtype=torch.int32)
    ops = torch.ops.sib_fast_emulated
    with recorded() as launches:
        ops._foreground_mask(vjp, None, *MASK)
        ops._foreground_mask_backward(plane, plane, plane.view(images, height, width), levels, ranks, channels, *MASK)
    assert len(launches) == 9
    assert max(x for x, *_ in launches) >= images * height * width / 2**13


@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", [(64, 3, 1536, 1536), (160, 64, 256, 256), (20_000, 3, 32, 32)], ids=str)
def test_the_statistics_of_a_large_batch(shape, layout, precision):
    images, _, height, width = shape
    map_, mask = torch.empty(shape, memory_format=layout), torch.empty(images, 1, height, width)
    gram, vector = (torch.empty(size, dtype=torch.float64) for size in ((images, images), (images,)))
    ops = torch.ops.sib_fast_emulated
    with recorded() as launches:
        ops._region_statistics(map_, map_, mask, False, precision)
        ops._region_statistics_backward(
            gram, gram, vector, vector, None, None, map_, map_, mask, vector, vector, True, True, True, precision
        )
    assert len(launches) >= 5
    assert all(shared <= 227 * 1024 for *_, shared in launches)


def head_launches(images, height, width):
    """Of the default head, (forward, backward): mask, statistics and objective; x needs no gradient."""
    map_, plane = torch.empty(images, 3, height, width), torch.empty(images, 1, height, width)
    gram, vector = (torch.empty(size, dtype=torch.float64) for size in ((images, images), (images,)))
    scalar = torch.zeros(())
    levels = torch.empty(images, 4)
    ranks = torch.empty(images, 4, rank_window_length(MASK[1], height * width, torch.float32), dtype=torch.int32)
    ops = torch.ops.sib_fast_emulated
    with recorded() as forward:
        ops._foreground_mask(map_, None, *MASK)
        ops._region_statistics(map_, map_, plane, False, "tf32x3")
        ops._hsic_objective(scalar, gram, gram, vector, 0.1, 1000.0, 0)
    with recorded() as backward:
        rows, totals = torch.empty(4, images, dtype=torch.float64), torch.empty(4, dtype=torch.float64)
        ops._hsic_objective_backward(scalar, None, None, gram, gram, rows, totals, 0.1, 1000.0, 0, True, True, True)
        ops._region_statistics_backward(
            gram, gram, vector, vector, None, None, map_, map_, plane, vector, vector, True, False, True, "tf32x3"
        )
        ops._foreground_mask_backward(plane, plane, plane.view(images, height, width), levels, ranks, 3, *MASK)
    return len(forward), len(backward)


def test_launches_of_the_default_head():
    assert head_launches(128, 224, 224) == (10, 6)
    assert head_launches(256, 224, 224) == (11, 6)  # the objective of more than 128 images takes two


@pytest.mark.parametrize("multiprocessors", [56, 132, 148])
def test_the_statistics_cuts_follow_the_device(multiprocessors, monkeypatch):
    """Two rounds of blocks, one a multiprocessor: no more than a tenth of the last round idle."""
    monkeypatch.setenv("SIB_FAST_EMULATION_MULTIPROCESSORS", str(multiprocessors))
    map_, mask = torch.empty(128, 3, 224, 224), torch.empty(128, 1, 224, 224)
    with recorded() as launches:
        torch.ops.sib_fast_emulated._region_statistics(map_, map_, mask, False, "tf32x3")
    x, y, z, *_ = launches[0]
    rounds = x * y * z / multiprocessors
    assert 1 <= rounds <= 6
    assert rounds / -(-x * y * z // multiprocessors) > 0.9


@pytest.mark.parametrize("multiprocessors", [56, 132, 148])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [((64, 64, 56, 56), torch.contiguous_format), ((512, 2048, 14, 14), torch.channels_last)],
    ids=str,
)
def test_the_norms_cuts_follow_the_device(shape, layout, multiprocessors, monkeypatch):
    """Sixteen rounds of blocks, one a multiprocessor, or a little less: parts are whole images or rows."""
    monkeypatch.setenv("SIB_FAST_EMULATION_MULTIPROCESSORS", str(multiprocessors))
    with recorded() as launches:
        torch.ops.sib_fast_emulated._batch_norm(torch.empty(shape, memory_format=layout), None, None, 1e-5)
    x, y, *_ = launches[0]
    assert 0.8 < x * y / (16 * multiprocessors) <= 1


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", [(128, 64, 512, 512), (200_000, 64, 14, 14), (2, 100_000, 8, 8)], ids=str)
def test_the_norms_of_a_large_batch(shape, layout):
    x, channels = torch.empty(shape, memory_format=layout), shape[1]
    of_channels = torch.empty(channels, dtype=torch.float64)
    ops = torch.ops.sib_fast_emulated
    rows, groups, length = shape[0] * 2, 2, channels // 2 * shape[2] * shape[3]
    of_rows = torch.empty(rows, dtype=torch.float64)
    with recorded() as launches:
        ops._batch_norm(x, None, None, 1e-5)
        ops._batch_norm_backward(x, x, None, of_channels, of_channels, None, True)
        ops._batch_norm_double_backward(x, None, None, x, x, None, of_channels, of_channels, True, True)
        if layout == torch.contiguous_format:
            spatial = shape[2] * shape[3]
            ops._layer_norm(x, None, None, length, groups, spatial, 1e-5)
            ops._layer_norm_backward(x, x, None, of_rows, of_rows, length, groups, spatial, True, True, True)
            tokens = x.view(-1, shape[3])
            ops._softmax_double_backward(tokens, tokens, tokens, True, True)
    assert len(launches) >= 3
