"""Every family of torchvision, prepared: the S-IB loss's gradients are the plain model's, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import sib_fast
from sib_fast.nn.prepare import SWAPS
from sib_fast.testing.models import MODELS, ComposedHardsigmoid, batch_for, differentiable_twice, without_randomness

TOLERANCE = 1e-9


@pytest.fixture(autouse=True)
def _torchvision():
    pytest.importorskip("torchvision.models", reason="torchvision does not import with this torch", exc_type=ImportError)


def gradients(model: nn.Module, x: Tensor, y: Tensor, active: bool = True) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameter gradients of one step, and the buffers after it."""
    model.zero_grad()
    # The background weight brings the terms' gradients to the size of the base loss's at random weights.
    criterion = sib_fast.SIBLoss(1.0, 1e3, window_size=5).attach(model).train(active)
    with sdpa_kernel(SDPBackend.MATH):
        criterion(model(x), y).backward()
    criterion.remove()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    return grads, {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", MODELS)
def test_prepared_models_have_the_plain_models_gradients(name):
    torch.manual_seed(0)
    plain = without_randomness(MODELS[name][0]()).double()
    model = copy.deepcopy(plain)
    hard = any(type(module) is nn.Hardsigmoid for module in plain.modules())
    if hard:
        differentiable_twice(plain)
        if nn.Hardsigmoid not in SWAPS:
            differentiable_twice(model)
    x, y = batch_for(name)
    want, want_buffers = gradients(copy.deepcopy(plain), x, y)
    base, _ = gradients(copy.deepcopy(plain), x, y, active=False)
    assert sib_fast.prepare(model) is model
    assert any(type(module) in SWAPS.values() for module in model.modules())
    assert not hard or nn.Hardsigmoid not in SWAPS or not any(type(m) is ComposedHardsigmoid for m in model.modules())
    got, got_buffers = gradients(model, x, y)
    scale = max(w.norm() for w in want.values())
    for key, value in want.items():
        assert (got[key] - value).norm() <= TOLERANCE * max(value.norm(), 1e-3 * scale), key
    for key, value in want_buffers.items():
        torch.testing.assert_close(got_buffers[key], value, rtol=1e-10, atol=1e-10, msg=key)
    # What the S-IB terms add is far outside the tolerance: a wrong second derivative would show.
    assert max((w - base[key]).norm() for key, w in want.items()) > 1000 * TOLERANCE * scale


def float32_error(model: nn.Module, x: Tensor, y: Tensor, mask: Tensor, exact: Tensor | None) -> tuple[Tensor, float]:
    """All parameter gradients of one step in one vector, and how far it is from the exact one, relative. A given mask: the
    density's ranks would flip, in PyTorch's float32 as in ours."""
    criterion = sib_fast.SIBLoss(1.0, 1e3)
    leaf = x.clone().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        loss = criterion(model(leaf), y, leaf, mask=mask)
        grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    vector = torch.cat([g.double().flatten() for g in grads])
    return vector, 0.0 if exact is None else ((vector - exact).norm() / exact.norm()).item()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", MODELS)
def test_float32_is_no_further_from_float64_than_pytorchs_own(name):
    torch.manual_seed(0)
    plain = without_randomness(MODELS[name][0]())
    exact_model, prepared = copy.deepcopy(plain).double(), sib_fast.prepare(copy.deepcopy(plain))
    for model in (plain, exact_model):
        differentiable_twice(model)
    x, y = batch_for(name)
    mask = (x[:, :1] > 0).double()
    exact, _ = float32_error(exact_model, x, y, mask, None)
    _, low = float32_error(plain, x.float(), y, mask.float(), exact)
    _, got = float32_error(prepared, x.float(), y, mask.float(), exact)
    assert got <= 1.5 * low + 8 * torch.finfo(torch.float32).eps, (got, low)


def test_the_table_holds_the_families_of_the_promise():
    families = ("resnet", "vgg", "densenet", "mobilenet_v2", "mobilenet_v3", "efficientnet", "convnext", "vit", "swin")
    assert all(any(name.startswith(family) for name in MODELS) for family in families)


def test_the_composed_hardsigmoid_is_hardsigmoid():
    x = torch.linspace(-5, 5, 101, dtype=torch.float64, requires_grad=True)
    for a, b in zip(
        *((y, *torch.autograd.grad(y.sum(), x)) for y in (ComposedHardsigmoid()(x), nn.Hardsigmoid()(x))), strict=True
    ):
        torch.testing.assert_close(a, b)
