"""The `measure` fixture: one call of a function, with bytes moved and provenance beside the time."""

from __future__ import annotations

import pytest

from benchmarks.provenance import provenance


@pytest.fixture
def measure(benchmark):
    """measure(function, bytes_moved): pedantic rounds after a warm-up; bytes_moved is the floor (inputs once, outputs once)."""

    def run(function, *, bytes_moved: int, rounds: int = 15) -> None:
        benchmark.pedantic(function, rounds=rounds, warmup_rounds=2)
        best = benchmark.stats.stats.min
        benchmark.extra_info.update(provenance(), floor_bytes=bytes_moved, gb_per_s_of_floor=round(bytes_moved / best / 1e9, 2))

    return run
