"""Banks of shared memory that packs meet in, counted under the emulation by their addresses."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from sib_fast import _backends

pytestmark = pytest.mark.skipif(_backends.MISSING["emulated"] is not None, reason=f"{_backends.MISSING['emulated']}")
KINDS = ("copy", "read", "write")
ADJACENT, APART = 15, 16  # of the emulation's probes: packs side by side, and 16 floats apart


@contextmanager
def counted():
    """Collects of each launch inside {kind: (transfers of 128 bytes, times they take)}."""
    banks = torch.ops.sib_fast_emulated._banks
    banks(torch.empty(0), True)
    launches: list[dict[str, tuple[int, int]]] = []
    try:
        yield launches
    finally:
        for row in banks(torch.empty(0), False).tolist():
            launches.append({kind: (row[2 * i], row[2 * i + 1]) for i, kind in enumerate(KINDS)})


@pytest.mark.parametrize(("probe", "times"), [(ADJACENT, 1), (APART, 4)], ids=["adjacent", "apart"])
def test_the_count_itself(probe, times):
    """Eight threads' packs are a transfer; 16 floats apart, they lie in eight banks: four at a time meet."""
    with counted() as launches:
        torch.ops.sib_fast_emulated._probe(torch.arange(64.0), probe)
    assert launches == [{"copy": (0, 0), "read": (8, 8 * times), "write": (8, 8 * times)}]


@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
@pytest.mark.parametrize("images", [16, 32, 64, 128])
def test_the_grams_staging_meets_in_no_bank(images, precision):
    """Whole tiles, so that all lanes do the same. Without the panels' gap a row's quads would lie in the same eight banks."""
    map_, mask = torch.randn(images, 2, 16, 24), torch.rand(images, 1, 16, 24)
    with counted() as launches:
        torch.ops.sib_fast_emulated._region_statistics(map_, map_, mask, False, precision)
    for kind, (transfers, times) in launches[0].items():
        assert times == transfers > 0, kind
