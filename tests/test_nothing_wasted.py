"""No gradient that nobody reads, and nothing alive longer than a loss needs it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sib_fast import SIBLoss, _needs, prepare, vjp_leaf
from sib_fast.testing.counting import OpLog
from sib_fast.testing.networks import conv_net, image_batch, parameter_gradients

WEIGHTS = {"lambda_fg": 3.0, "lambda_bg": 1000.0, "window_size": 5}


def captured_leaf(net: nn.Module) -> list[Tensor]:
    seen: list[Tensor] = []
    net[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    return seen


class Normalised(nn.Sequential):
    """conv_net behind a normalisation of its input. Shapes: [N, 3, H, W] -> [N, 5]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x - 0.4) / torch.full((1, 3, 1, 1), 0.3))


@pytest.mark.parametrize("normalise", [False, True])
def test_no_gradient_of_a_prepared_convolution_is_computed_that_nobody_reads(normalise):
    x, target = image_batch()
    net = prepare(conv_net())
    if normalise:
        net = Normalised(*net)
    criterion = SIBLoss(**WEIGHTS).attach(net)
    with OpLog() as log:
        criterion(net(x), target).backward()
    # The VJP needs the input gradients of both convolutions; the final backward that of the second alone, and per convolution
    # one weight gradient of the forward and one of the VJP.
    needs = [rest[-3:-1] for name, rest in log.calls if name == "sib_fast_convolution.backward.default"]
    assert needs.count((True, False)) == 2
    assert needs.count((True, True)) == 1
    assert needs.count((False, True)) == 3
    shapes = [shapes for name, shapes in log.ops if name == "sib_fast_convolution.backward.default"]
    stem = [need for need, shape in zip(needs, shapes, strict=True) if shape[1][1] == 3]
    assert sorted(stem) == [(False, True), (False, True), (True, False)]


def test_the_parameters_gradients_are_those_of_the_step_that_wastes(monkeypatch):
    x, target = image_batch()
    x = x.double()
    results = []
    for mark in (_needs.mark_vjp_leaf, lambda leaf: leaf):
        monkeypatch.setattr(_needs, "mark_vjp_leaf", mark)
        net = prepare(conv_net().double())
        criterion = SIBLoss(**WEIGHTS).attach(net)
        criterion(net(x), target).backward()
        results.append([p.grad for p in net.parameters()])
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(got, wanted)


class Scaled(nn.Module):
    """conv_net behind a learned gain and offset of its input. Shapes: [N, 3, H, W] -> [N, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = conv_net()
        self.gain, self.offset = nn.Parameter(torch.full((1, 3, 1, 1), 0.7)), nn.Parameter(torch.zeros(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x * self.gain + self.offset)


def test_what_is_learned_before_a_prepared_stem_gets_its_gradient():
    x, target = image_batch()
    results = []
    for change in (lambda net: net, prepare):
        net = change(Scaled().double())
        criterion = SIBLoss(**WEIGHTS).attach(net)
        criterion(net(x.double()), target).backward()
        results.append({name: p.grad for name, p in net.named_parameters()})
    for name, wanted in results[0].items():
        assert (results[1][name] - wanted).norm() <= 1e-11 * max(w.norm() for w in results[0].values()), name
    assert results[0]["gain"].norm() > 0
    assert results[0]["offset"].norm() > 0


@pytest.mark.parametrize("prepared", [False, True])
def test_the_hidden_leaf_keeps_no_gradient(prepared):
    x, target = image_batch()
    net = prepare(conv_net()) if prepared else conv_net()
    criterion = SIBLoss(**WEIGHTS).attach(net)
    criterion(net(x), target)  # which sees that the model leaves its input alone: from here on it is given the leaf itself
    seen = captured_leaf(net)
    criterion(net(x), target).backward()
    assert seen[0].is_leaf
    assert seen[0].requires_grad
    assert seen[0].grad is None


def penalty(net: nn.Module, leaf: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy and a penalty on its input gradient: no S-IB."""
    loss = nn.functional.cross_entropy(net(leaf), target)
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    return loss + 10 * gradient.square().sum()


@pytest.mark.parametrize("normalise", [False, True])
def test_a_leaf_of_the_users_own_wastes_nothing(normalise):
    x, target = image_batch()
    x = x.double()
    results, stems = [], []
    for make in (lambda x: x.clone().requires_grad_(), vjp_leaf):
        net = prepare(conv_net().double())
        net = Normalised(*net) if normalise else net
        leaf = make(x)
        with OpLog() as log:
            penalty(net, leaf, target).backward()
        calls = [
            (shapes, rest) for (name, shapes), (_, rest) in zip(log.ops, log.calls, strict=True) if "convolution.backward" in name
        ]
        stems.append(sorted(rest[-3:-1] for shapes, rest in calls if shapes[1][1] == 3))
        results.append([p.grad for p in net.parameters()])
        assert (leaf.grad is None) == (make is vjp_leaf)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert stems == [[(False, True), (True, False), (True, True)], [(False, True), (False, True), (True, False)]]


@pytest.mark.parametrize("normalise", [False, True])
def test_a_marked_leaf_gives_its_gradient_to_whoever_asks(normalise):
    """In every way of asking but a plain backward pass: of the leaf, of what was made of it, with parameters, twice."""
    x, target = image_batch()
    net = prepare(conv_net())
    plain = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(nn.functional.cross_entropy(net(plain), target), plain)
    leaf = vjp_leaf(x)
    inner = (leaf - 0.0) * 1.0 if normalise else leaf
    loss = nn.functional.cross_entropy(net(inner), target)
    parameters = list(net.parameters())
    for asked in ([leaf], [leaf, *parameters], [inner], [inner, leaf]):
        for got in torch.autograd.grad(loss, asked, retain_graph=True)[: 1 if len(asked) > 2 else len(asked)]:
            assert torch.equal(got, want)
    for got, value in zip(torch.autograd.grad(loss, parameters), parameters, strict=True):
        assert got.shape == value.shape


def test_a_leaf_must_be_of_floats():
    with pytest.raises(TypeError, match="vjp_leaf: x must be"):
        vjp_leaf(torch.zeros(2, dtype=torch.int64))
    with torch.inference_mode():
        x = torch.ones(2)
    assert vjp_leaf(x).requires_grad
    assert vjp_leaf(x).data_ptr() != x.data_ptr()


@pytest.mark.parametrize("prepared", [False, True])
def test_an_input_of_the_users_gets_its_gradient(prepared):
    x, target = image_batch()
    net = prepare(conv_net()) if prepared else conv_net()
    criterion = SIBLoss(**WEIGHTS).attach(net)
    x.requires_grad_()
    criterion(net(x), target).backward()
    assert x.grad.abs().sum() > 0


def test_the_vjp_can_be_taken_again_after_the_loss():
    # The mark is read only while a VJP is taken: a second loss on the same forward takes another one.
    x, target = image_batch()
    net, plain = prepare(conv_net(norm="group")), conv_net(norm="group")
    criterion = SIBLoss(**WEIGHTS).attach(net)
    logits = net(x)
    criterion(logits, target)
    leaf = x.clone().requires_grad_()
    exact = SIBLoss(**WEIGHTS)(plain(leaf), target, leaf)
    again = criterion(logits, target)
    wanted = parameter_gradients(exact, plain)
    for name, got in parameter_gradients(again, net).items():
        torch.testing.assert_close(got, wanted[name], msg=name)


def test_the_captured_input_lives_as_long_as_its_graph():
    x, target = image_batch()
    x = x + 0
    alive = weakref.ref(x.untyped_storage())
    net = conv_net()
    criterion = SIBLoss(**WEIGHTS).attach(net)
    logits = net(x)
    del x
    gc.collect()
    assert alive() is not None
    loss = criterion(logits, target)
    loss.backward()
    del logits, loss
    assert alive() is None  # no garbage collection needed: there is no cycle


def test_a_forward_whose_graph_is_gone_says_so():
    x, target = image_batch()
    net = conv_net()
    criterion = SIBLoss(**WEIGHTS).attach(net)
    net(x)
    with pytest.raises(RuntimeError, match="SIBLoss: logits must be computed by the attached model's latest forward pass"):
        criterion(conv_net()(x), target)


@pytest.mark.parametrize("prepared", [False, True])
def test_after_backward_only_the_results_are_alive(prepared):
    x, target = image_batch(height=24, width=24)
    net = prepare(conv_net()) if prepared else conv_net()
    criterion = SIBLoss(**WEIGHTS).attach(net)
    criterion(net(x), target).backward()
    with OpLog() as log:
        logits = net(x)
        loss = criterion(logits, target)
        map_bytes = x[:, :1].numel() * 4
        during = len(log.alive(map_bytes))
        loss.backward()
    # The smallest map of the step is the mask; parameters and their gradients are smaller.
    assert max(p.numel() for p in net.parameters()) * 4 < map_bytes

    def held() -> list:
        return [storage for storage in log.alive(map_bytes) if storage.data_ptr() != x.untyped_storage().data_ptr()]

    assert during > 10
    assert len(held()) == 1  # the mask, whose mean is taken when the terms are read
    assert criterion.terms["mask_area"] > 0
    assert held() == []
    assert loss.requires_grad
    assert logits.requires_grad


class Checkpointed(nn.Module):
    """conv_net, its first half recomputed in every backward. Shapes: [N, 3, H, W] -> [N, 5]."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.body = conv_net(norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.body[4:](checkpoint(self.body[:4], x, use_reentrant=False))


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("prepared", [False, True])
def test_activation_checkpointing_has_the_same_gradients(norm, prepared):
    x, target = image_batch()
    x = x.double()
    net, plain = Checkpointed(norm).double(), conv_net(norm=norm).double()
    if prepared:
        prepare(net)
    criterion = SIBLoss(**WEIGHTS).attach(net)
    loss = criterion(net(x), target)
    leaf = x.clone().requires_grad_()
    exact = SIBLoss(**WEIGHTS)(plain(leaf), target, leaf)
    wanted = parameter_gradients(exact, plain)
    torch.testing.assert_close(loss, exact, rtol=1e-12, atol=0)
    scale = max(w.norm() for w in wanted.values())
    for name, got in parameter_gradients(loss, net.body).items():
        assert (got - wanted[name]).norm() <= 1e-11 * scale, name
