"""DensityMask: foreground_mask with its settings, as a value that can be compared, copied and pickled."""

from __future__ import annotations

import pickle

import pytest
import torch

from sib_fast import foreground_mask
from sib_fast.masks import MASKS, DensityMask
from sib_fast.testing.networks import plain_mask, relative_error

SETTINGS = {"window_size": 3, "temperature": 0.3, "slope": 4.0, "quantiles": (0.1, 0.9, 0.7, 0.6)}


def test_registered_under_its_name():
    assert {"density": DensityMask} == MASKS


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_reaches_the_op(name):
    vjp = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    changed = {name: SETTINGS[name]}
    plain = {"window_size": 5, **changed}  # a window of twice the image gives a constant mask whatever the rest is
    got = DensityMask(**plain)(vjp)
    assert torch.equal(got, foreground_mask(vjp, **plain))
    assert not torch.equal(got, DensityMask(window_size=5)(vjp))


def test_the_backend_reaches_the_op():
    with pytest.raises(ValueError, match=r"foreground_mask: backend must be one of 'auto', 'reference', .*, got 'abacus'"):
        DensityMask(backend="abacus")(torch.randn(2, 3, 9, 8))


def test_defaults_are_the_authors_mask():
    vjp = torch.randn(2, 3, 40, 36, dtype=torch.float64)
    assert relative_error(DensityMask()(vjp), plain_mask(vjp)) < 1e-10


def test_a_value():
    mask = DensityMask(**SETTINGS)
    assert mask == pickle.loads(pickle.dumps(mask)) != DensityMask()


def test_fullgraph_compile():
    vjp = torch.randn(2, 3, 9, 8, requires_grad=True)
    mask = DensityMask(window_size=3)
    compiled = torch.compile(lambda r: mask(r), backend="aot_eager", fullgraph=True)
    got, exact = (torch.autograd.grad(m(vjp).square().sum(), vjp)[0] for m in (compiled, mask))
    assert torch.allclose(got, exact, rtol=1e-6, atol=0)
