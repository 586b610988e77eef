"""What the selection of tests leaves out, and that a sample of a grid is no worse than it says."""

from __future__ import annotations

import itertools
import os
import random
from collections import Counter
from pathlib import Path

import pytest

from sib_fast import _backends
from tests import selection
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


def test_items_of_a_test_are_drawn_by_what_they_are(drawn, request):
    items = [(kernel, size) for kernel in "abc" for size in range(20)]
    chosen = drawn(items, lambda item: item[0])
    assert {kernel for kernel, _ in chosen} == set("abc")
    assert chosen == drawn(items, lambda item: item[0])
    assert len(chosen) == (len(items) if request.config.option.long else 3)


@pytest.mark.sampled(2, always="b")
@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("word", ["a", "b", "c"])
def test_a_grid_of_which_some_are_drawn(word, number):
    """Named by the test below."""


@pytest.fixture
def collected(monkeypatch, capfd):
    """What pytest selects of a file, run inside this process: its names, and what it prints."""
    monkeypatch.setattr(selection, "_counts", Counter())
    monkeypatch.chdir(ROOT)
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:  # of the worker that this test runs in
        monkeypatch.delenv(name)

    def collect(*options, file="tests/ops/test_softmax.py"):
        selection._counts.clear()
        command = ["--collect-only", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(ROOT / file), *options]
        assert pytest.main(command) == 0
        said = capfd.readouterr().out
        return [line for line in said.splitlines() if "::" in line], said

    return collect


@pytest.mark.skipif(_backends.MISSING["emulated"] is not None, reason="the emulation is not built")
def test_what_is_left_out_is_said_in_a_line_and_the_long_suite_has_it(collected):
    not_here = [backend for backend in ("cpu", "cuda") if unusable(backend) is not None]
    short, said = collected("--sample-seed=3")
    assert "--sample-seed=3" in said
    every, _ = collected("--long", "--every-backend")
    emulated = {name for name in every if "emulated" in name}
    left_out = emulated - set(short)
    assert left_out
    assert f"not run: {len(left_out)} tests, outside the sample" in said
    assert set(short) - emulated == {name for name in every if not any(b in name for b in ("emulated", *not_here))}
    for backend in not_here:
        assert f"tests, backend {backend!r} is not usable here" in said


def test_of_a_marked_grid_the_named_cells_and_some_others_run(collected):
    draws = []
    for seed in (1, 2):
        names, _ = collected(f"--sample-seed={seed}", file="tests/test_selection.py")
        drawn = {name.partition("[")[2] for name in names if "some_are_drawn[" in name}
        assert {cell for cell in drawn if cell.startswith("b")} == {f"b-{n}]" for n in range(5)}
        draws.append(drawn)
        assert len(drawn) == 5 + 2
    assert draws[0] != draws[1]
