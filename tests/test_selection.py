"""What the selection of tests leaves out, and that a sample of a grid is no worse than it says."""

from __future__ import annotations

import itertools
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sib_fast import _backends
from tests.selection import sample, unusable

ROOT = Path(__file__).parent.parent
GRID = [
    {"shape": shape, "dtype": dtype, "layout": layout}
    for shape, dtype, layout in itertools.product(range(7), ("double", "float", "half"), ("first", "last"))
    if (dtype, layout) != ("half", "last")
]


def draw(seed):
    return sample(GRID, random.Random(seed))


def test_every_value_of_every_parameter_is_in_the_sample():
    for seed in range(20):
        chosen = draw(seed)
        assert len(chosen) <= 7 + 3 + 2
        for name in GRID[0]:
            assert {GRID[at][name] for at in chosen} == {cell[name] for cell in GRID}


def test_a_seed_draws_the_same_again_and_all_of_them_the_whole_grid():
    assert draw(5) == draw(5)
    assert set().union(*(draw(seed) for seed in range(200))) == set(range(len(GRID)))


def test_a_test_without_a_grid_is_always_in_the_sample():
    assert sample([{"kernel": "emulated"}], random.Random(0)) == {0}


def collected(*options):
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests/ops/test_softmax.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return [line for line in result.stdout.splitlines() if "::" in line], result.stdout


@pytest.mark.skipif(_backends.MISSING["emulated"] is not None, reason="the emulation is not built")
def test_what_is_left_out_is_said_in_a_line_and_the_long_suite_has_it():
    short, said = collected("--sample-seed=3")
    assert "--sample-seed=3" in said
    left_out = int(re.search(r"not run: (\d+) tests, outside the sample", said)[1])
    whole, _ = collected("--long")
    assert len(whole) == len(short) + left_out
    assert set(short) < set(whole)
    assert {name for name in whole if "emulated" not in name} == {name for name in short if "emulated" not in name}
    if unusable("cuda") is not None:
        assert "not run:" in said
        assert "backend 'cuda' is not usable here" in said
        assert not any("[cuda" in name for name in whole)
