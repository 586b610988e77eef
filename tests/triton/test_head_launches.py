"""What the default head launches, value and gradient: counted by recording, with nothing compiled."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from tests.triton import aot

pytest.importorskip("triton")
if aot.INTERPRETING:
    pytest.skip("TRITON_INTERPRET=1 leaves no launch that could be recorded", allow_module_level=True)

from tests.triton import test_foreground_mask, test_hsic_objective_aot, test_region_statistics

SHAPE = (128, 3, 224, 224)


def test_the_default_head_is_twenty_kernels():
    """docs/measured.md states the count and how it came about."""
    with torch.device("meta"):
        mask = test_foreground_mask.launches_of(SHAPE)
        statistics = test_region_statistics.launches_of(SHAPE, "90")
    objective = test_hsic_objective_aot.launches(128, torch.float32, 0, (True, False, True))
    names = Counter(launch.kernel.__name__ for launch in (*mask, *statistics, *objective))
    assert names == {
        # value
        "mean_map_kernel": 1,
        "narrow_kernel": 1,
        "collect_kernel": 2,
        "rank_kernel": 2,
        "gate_rows_kernel": 1,
        "box_columns_kernel": 1,
        "mask_kernel": 1,
        "gram_partials_kernel": 2,
        "merge_kernel": 1,
        "hsic_rows_kernel": 1,
        "hsic_combine_kernel": 1,
        # gradient
        "hsic_gradient_kernel": 1,
        "symmetrised_kernel": 1,
        "gradient_kernel": 2,
        "area_rows_kernel": 1,
        "gate_columns_kernel": 1,
    }
    assert names.total() == 20
