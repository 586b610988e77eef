"""SIBLoss among a trainer's other helpers: GradScaler, gradient accumulation, EMA, layouts, in one loop."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sib_fast
from sib_fast import SIBLoss
from sib_fast.testing.networks import conv_net, image_batch, parameter_gradients

WEIGHTS = {"lambda_fg": 3.0, "lambda_bg": 1000.0, "window_size": 5}


def cosine(got: dict, wanted: dict) -> float:
    a, b = (torch.cat([grads[name].flatten().double() for name in wanted]) for grads in (got, wanted))
    return (torch.dot(a, b) / (a.norm() * b.norm())).item()


@pytest.mark.parametrize("prepared", [False, True])
def test_float16_with_a_grad_scaler(prepared):
    """A scale that overflows: the step is skipped and nothing else is lost; with a fitting one the gradient is the unscaled."""
    x, target = image_batch(images=8)
    unscaled, net = conv_net(norm="group"), conv_net(norm="group")
    if prepared:
        sib_fast.prepare(unscaled)
        sib_fast.prepare(net)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = SIBLoss(**WEIGHTS).attach(unscaled)(unscaled(x), target)
    wanted = parameter_gradients(loss, unscaled)
    criterion = SIBLoss(**WEIGHTS, every=1).attach(net)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, backoff_factor=2.0**-50, growth_interval=1000)
    before = copy.deepcopy(net.state_dict())
    terms = []
    for step in range(2):
        optimiser.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = criterion(net(x), target)
        assert loss.dtype == torch.float32
        scaler.scale(loss).backward()
        scaler.unscale_(optimiser)
        terms.append(dict(criterion.terms))
        if step == 0:
            assert any(not torch.isfinite(p.grad).all() for p in net.parameters())
        else:
            assert cosine({name: p.grad for name, p in net.named_parameters()}, wanted) > 0.9999
        scaler.step(optimiser)
        scaler.update()
        if step == 0:
            assert scaler.get_scale() == 2.0**10
            for name, value in net.state_dict().items():
                assert torch.equal(value, before[name]), name
    # The skipped step's loss was finite and right: only its scaled gradient overflowed.
    assert terms[0] == terms[1]
    assert all(torch.isfinite(value) for value in terms[0].values())
    assert any(not torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_under_autocast_follows_float32(dtype):
    """Ten steps: the loss goes down by the same amount, to a tenth."""

    def train(autocast):
        net = sib_fast.prepare(conv_net())
        criterion = SIBLoss(**WEIGHTS).attach(net)
        optimiser = torch.optim.SGD(net.parameters(), lr=0.02)
        losses = []
        for _ in range(10):
            x, target = image_batch(images=8)
            with torch.autocast("cpu", dtype=dtype, enabled=autocast):
                loss = criterion(net(x), target)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(criterion.terms["base"].item())
        return losses[0] - losses[-1]

    wanted = train(False)
    assert wanted > 0.05
    assert train(True) == pytest.approx(wanted, rel=0.1)


def test_accumulated_gradients_are_the_mean_of_the_micro_batches():
    net = conv_net().double()
    criterion = SIBLoss(**WEIGHTS).attach(net)
    batches = [image_batch(seed=seed) for seed in (1, 2, 3)]
    wanted: dict[str, torch.Tensor] = {}
    for x, target in batches:
        for name, grad in parameter_gradients(criterion(net(x.double()), target), net).items():
            wanted[name] = wanted.get(name, 0) + grad / len(batches)
    net.zero_grad()
    for x, target in batches:
        loss = criterion(net(x.double()), target)
        loss /= len(batches)  # in place, as timm does
        loss.backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-12, atol=1e-14)


def test_an_average_of_the_weights_beside_training():
    net = sib_fast.prepare(conv_net())
    criterion = SIBLoss(**WEIGHTS).attach(net)
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    x, target = image_batch()
    for _ in range(3):
        optimiser.zero_grad()
        criterion(net(x), target).backward()
        optimiser.step()
        average.update_parameters(net)
    counts = [module.num_batches_tracked.item() for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    assert counts == [3] * len(counts)
    average.eval()
    with torch.no_grad():
        assert torch.isfinite(criterion(average(x), target))


def test_channels_last_network_and_images():
    x, target = image_batch()
    exact, net = conv_net().double(), conv_net().double().to(memory_format=torch.channels_last)
    wanted = parameter_gradients(SIBLoss(**WEIGHTS).attach(exact)(exact(x.double()), target), exact)
    sib_fast.prepare(net)
    last = x.double().contiguous(memory_format=torch.channels_last)
    got = parameter_gradients(SIBLoss(**WEIGHTS).attach(net)(net(last), target), net)
    for name, value in wanted.items():
        assert (got[name] - value).norm() <= 1e-9 * value.norm(), name
