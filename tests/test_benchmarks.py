"""A benchmark that compares different work is worse than none: the heads must be the same function."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from benchmarks.baselines import HEADS, forward_and_backward, natural_inputs
from benchmarks.provenance import ROOT


@pytest.mark.parametrize("name", [name for name in HEADS if name != "naive"])
@pytest.mark.parametrize("shape", [(4, 3, 48), (5, 8, 33)], ids=str)
def test_heads_compute_the_same_value_and_gradient(name, shape):
    vjp, x = natural_inputs(*shape, dtype=torch.float64)
    want, got = forward_and_backward("naive", vjp, x), forward_and_backward(name, vjp, x)
    torch.testing.assert_close(got[0], want[0], rtol=1e-12, atol=0)
    # The tuned head's rank windows leave out weights of e^-17.
    assert (got[1] - want[1]).norm() <= 1e-6 * want[1].norm()
    assert want[1].norm() > 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_meter_sees_an_allocation():
    """In a process of its own, as the benchmark does it: here the test run's freed memory would be used again, unseen."""
    code = (
        "from benchmarks import head\n"
        "head.HEADS['hungry'] = lambda vjp, x: (vjp.repeat(64, 1, 1, 1) * 2).sum()\n"
        "try:\n"
        "    print(head.peak_extra_bytes_here('hungry', 4, 3, 128))\n"
        "except PermissionError:\n"
        "    print('not permitted')"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    if "not permitted" in result.stdout:
        pytest.skip("/proc/self/clear_refs is not writable here")
    size = 64 * 4 * 3 * 128 * 128 * 4
    # Two copies at least; a page or so of the second may have been resident before.
    assert 1.9 * size < int(result.stdout) < 5 * size
