"""docs/input_gradients.md: its blocks train as the same losses in plain PyTorch do, without `prepare`."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sib_fast
from sib_fast.nn.prepare import SWAPS
from sib_fast.testing.counting import OpLog
from sib_fast.testing.networks import conv_net, image_batch

PAGE = (Path(__file__).parents[1] / "docs/input_gradients.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?```python\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL))


def images(seed: int) -> Tensor:
    return image_batch(seed=seed)[0].double()


def masks(seed: int) -> Tensor:
    return (images(seed)[:, :1] > 0).double()


LOADERS: dict[str, list[tuple[Tensor, ...]]] = {
    "Double backpropagation": [(images(s), image_batch(seed=s)[1]) for s in (1, 2)],
    "Right for the right reasons": [(images(s), image_batch(seed=s)[1], masks(s + 10)) for s in (1, 2)],
    "Gradient penalty of a critic": [(images(s), images(s + 20)) for s in (1, 2)],
}


def double_backpropagation(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    loss = F.cross_entropy(model(x), target)
    return loss + 0.1 * torch.autograd.grad(loss, x, create_graph=True)[0].square().sum()


def right_reasons(model: nn.Module, x: Tensor, target: Tensor, irrelevant: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    log_p = F.log_softmax(model(x), dim=1)
    (gradient,) = torch.autograd.grad(log_p.sum(), x, create_graph=True)
    return F.nll_loss(log_p, target) + 10 * (irrelevant * gradient).square().sum()


def critics(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    mix = torch.rand(len(real), 1, 1, 1, dtype=real.dtype)
    between = (mix * real + (1 - mix) * fake).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    penalty = ((gradient.square().sum((1, 2, 3)).sqrt() - 1) ** 2).mean()
    return critic(fake).mean() - critic(real).mean() + 10 * penalty


PLAIN: dict[str, Callable[..., Tensor]] = {
    "Double backpropagation": double_backpropagation,
    "Right for the right reasons": right_reasons,
    "Gradient penalty of a critic": critics,
}


def test_every_block_is_run():
    assert set(BLOCKS) == set(LOADERS) == set(PLAIN)


@pytest.mark.parametrize("section", BLOCKS)
def test_a_block_trains_as_plain_pytorch_does(section):
    classes = 1 if "critic" in section else 5
    net = conv_net(classes=classes).double()
    plain = copy.deepcopy(net)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)
    torch.manual_seed(3)
    with OpLog() as theirs:
        for batch in LOADERS[section]:
            loss = PLAIN[section](plain, *batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    names = {"sib_fast": sib_fast, "torch": torch, "F": F, "model": net, "critic": net, "loader": LOADERS[section]}
    names["optimizer"] = torch.optim.SGD(net.parameters(), lr=0.05)
    torch.manual_seed(3)
    with OpLog() as ours:
        exec(BLOCKS[section], names)
    assert any(type(module) in SWAPS.values() for module in net.modules())
    assert len(ours.ops) < len(theirs.ops)
    for (name, got), want in zip(net.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, msg=name)
    # The penalty moves the parameters by far more than that.
    start = conv_net(classes=classes).double().state_dict()
    assert max((start[name] - value).abs().max() for name, value in plain.state_dict().items()) > 1e-4
