"""Fixtures of the whole suite: kernels, seeds, poisoned memory."""

from __future__ import annotations

import hypothesis
import pytest
import torch

from sib_fast import _backends

# The same examples in every run, so that a red CI is a changed project; `--hypothesis-profile=explore` looks further.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.register_profile("explore", max_examples=3000, deadline=None)
hypothesis.settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _usable(name: str) -> str:
    reason = _backends.why_not(name)
    if reason is not None:
        pytest.skip(f"backend {name!r} is not usable here: {reason}")
    return name


@pytest.fixture(params=[name for name in _backends.BACKENDS if name != _backends.REFERENCE])
def kernel(request) -> str:
    """Every kernel backend; one that is not usable here shows as a skip with its reason."""
    return _usable(request.param)


@pytest.fixture(params=_backends.BACKENDS)
def backend(request) -> str:
    """Every backend, the reference among them."""
    return _usable(request.param)


@pytest.fixture
def poisoned_memory():
    """Every uninitialised buffer, in Python and in C++, is filled with NaN (integers: the largest value) inside the test."""
    before, fill = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = fill
