"""What every framework's test compares with: the explicit form, called by hand, step by step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sib_fast import SIBLoss, prepare
from sib_fast.criterion import Criterion
from sib_fast.testing.networks import conv_net, image_batch

WEIGHTS = {"lambda_fg": 3.0, "lambda_bg": 1000.0, "window_size": 5}


def explicit_steps(
    batches: list[tuple[Tensor, Tensor]],
    lr: float,
    *,
    every: int = 1,
    fast: bool = True,
    training: bool = True,
    criterion: Criterion | None = None,
    **weights: float,
) -> nn.Module:
    """Plain SGD with the explicit criterion; an optimiser step after each `every` batches, whose losses are averaged.

    training: the network's mode. criterion: in the place of a SIBLoss.
    """
    net = prepare(conv_net()) if fast else conv_net()
    criterion = criterion or SIBLoss(**{**WEIGHTS, **weights})
    optimiser = torch.optim.SGD(net.parameters(), lr=lr)
    net.train(training)
    for i, (x, target) in enumerate(batches):
        leaf = x.clone().requires_grad_()
        features = net[:6](leaf)
        maps = {} if criterion.evidence is None else {"features": features}
        (criterion(net[6:](features), target, leaf, **maps) / every).backward()
        if (i + 1) % every == 0:
            optimiser.step()
            optimiser.zero_grad()
    return net


def batches_of(count: int) -> list[tuple[Tensor, Tensor]]:
    return [image_batch(seed=seed) for seed in range(1, count + 1)]


def assert_same_parameters(got: nn.Module, wanted: nn.Module) -> None:
    """Bit for bit: the same operations on the same numbers, whoever calls them."""
    got, wanted = dict(got.state_dict()), dict(wanted.state_dict())
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(got[name], value), name
