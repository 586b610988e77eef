"""The mask's mean among `SIBLoss.terms`: taken when it is read, of a mask that is held no longer than the next call."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sib_fast import SIBLoss
from sib_fast.step import compile_step


class Watched:
    """A mask maker that keeps what it made weakly, and its values."""

    def __call__(self, vjp):
        mask = torch.sigmoid(vjp.mean(dim=1, keepdim=True) * 1e3)
        self.storage = weakref.ref(mask.untyped_storage())
        self.mean = mask.detach().double().sum() / mask.numel()

        def hook(*_):  # lives as long as the node does, which takes no weak reference itself
            pass

        mask.grad_fn.register_hook(hook)
        self.graph = weakref.ref(hook)
        return mask


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.mean.default:
            self.shapes.append(args[0].shape)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def problem():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(4 * 36, 5))
    mask = Watched()
    return net, SIBLoss(mask=mask).attach(net), mask, torch.randn(4, 3, 8, 8), torch.randint(5, (4,))


def test_who_does_not_look_pays_no_pass_over_the_mask(problem):
    net, criterion, _, x, target = problem
    with Seen() as seen:
        criterion(net(x), target).backward()
    assert torch.Size((4, 1, 8, 8)) not in seen.shapes
    with Seen() as seen:
        criterion.terms["mask_area"]
        criterion.terms["mask_area"]
    assert seen.shapes == [torch.Size((4, 1, 8, 8))]


def test_read_after_backward_it_is_the_mean_of_the_mask(problem):
    net, criterion, mask, x, target = problem
    criterion(net(x), target).backward()
    terms = criterion.terms
    assert list(terms) == ["loss", "base", "foreground", "background", "mask_area"]
    assert type(terms) is dict
    area = terms["mask_area"]
    assert area.shape == ()
    assert not area.requires_grad
    assert abs(area - mask.mean) <= 1e-6
    assert criterion.terms is terms


def test_the_mask_is_let_go_when_it_is_read_and_at_the_next_call(problem):
    net, criterion, mask, x, target = problem
    criterion(net(x), target).backward()
    assert mask.storage() is not None
    criterion.terms["mask_area"].item()
    gc.collect()
    assert mask.storage() is None, "held after it was read"

    criterion(net(x), target).backward()
    first = mask.storage
    criterion(net(x), target).backward()
    gc.collect()
    assert first() is None, "held beyond the next call"
    criterion.eval()
    second = mask.storage
    criterion(net(x), target)
    gc.collect()
    assert second() is None, "held beyond the next call, which has no mask"
    assert "mask_area" not in criterion.terms


def test_the_graph_is_never_held(problem):
    net, criterion, mask, x, target = problem
    loss = criterion(net(x), target)
    del loss
    gc.collect()
    assert mask.graph() is None
    assert criterion.terms["mask_area"].item() == pytest.approx(mask.mean.item(), abs=1e-6)


def test_a_given_mask_may_change_after_the_call(problem):
    """A loader's buffer is filled again before a logger looks."""
    net, criterion, _, x, target = problem
    given = torch.full((4, 1, 8, 8), 0.25)
    criterion(net(x), target, mask=given).backward()
    given.fill_(1.0)
    assert criterion.terms["mask_area"].item() == 0.25


def test_read_in_inference_mode_it_is_an_ordinary_tensor(problem):
    net, criterion, _, x, target = problem
    criterion(net(x), target).backward()
    with torch.inference_mode():
        area = criterion.terms["mask_area"]
    assert not area.is_inference()


def test_copies_and_pickles_start_without_terms(problem):
    net, _, _, x, target = problem
    criterion = SIBLoss(window_size=3)
    leaf = x.clone().requires_grad_()
    criterion(net(leaf), target, leaf).backward()
    for other in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert other.terms == {}


@pytest.mark.long
def test_a_compiled_step_returns_it():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(4 * 36, 5))
    criterion = SIBLoss(window_size=3)
    step = compile_step(net, criterion)
    out = step(torch.randn(4, 3, 8, 8), torch.randint(5, (4,)))
    assert 0 < out.terms["mask_area"].item() < 1
    assert criterion.terms is out.terms
