"""SyncBatchNorm over two processes against BatchNorm over the whole batch in one: values, both derivatives, statistics."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import sib_fast

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="this torch has no gloo"
)
ROOT = Path(__file__).parent.parent.parent
PARTS = (0, 3, 8)  # 3 and 5 images: a mean of means would be wrong


def network(affine: bool) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6, affine=affine, momentum=0.3),
        nn.SiLU(),
        nn.Conv2d(6, 4, 3, stride=2),
        nn.BatchNorm2d(4, affine=affine, momentum=None),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(64, 5),
    ).double()
    if affine:
        for layer in (net[1], net[4]):
            nn.init.normal_(layer.weight, 1.0, 0.5)
            nn.init.normal_(layer.bias)
    return net


def results(net: nn.Module, begin: int, end: int, second: bool) -> dict[str, torch.Tensor]:
    """One step on images begin … end of a batch of 8, with a sum over images as its loss: sums over processes are the whole's.

    Both the input gradient and those of the parameters are differentiated, so that u, u_weight and u_bias are all there.
    """
    draw = torch.Generator().manual_seed(5)
    x, weight = (torch.randn(8, 3, 10, 10, generator=draw, dtype=torch.float64)[begin:end] for _ in range(2))
    x.requires_grad_()
    logits = net(x)
    energy = 0.5 * (torch.softmax(logits, 1) ** 2).sum()
    (vjp,) = torch.autograd.grad(energy, x, create_graph=True)
    loss = logits.logsumexp(1).sum()
    if second:
        loss = loss + 1e2 * (weight * vjp * vjp.abs()).sum() + 1e3 * (vjp**2).sum()
    loss.backward()
    gradients = {f"grad {name}": p.grad.clone() for name, p in net.named_parameters()}
    return {"logits": logits.detach(), "vjp": vjp.detach(), "grad_x": x.grad, **gradients, **dict(net.named_buffers())}


def process(rank: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    collected = {}
    for affine in (True, False):
        for second in (True, False):
            net = sib_fast.prepare(nn.SyncBatchNorm.convert_sync_batchnorm(network(affine)))
            assert [type(m) for m in net if isinstance(m, nn.SyncBatchNorm)] == [sib_fast.nn.SyncBatchNorm] * 2
            collected[affine, second] = results(net, *PARTS[rank : rank + 2], second)
    # Only the parameters' gradients, differentiated: the paths of u_weight and u_bias alone.
    net = sib_fast.prepare(nn.SyncBatchNorm.convert_sync_batchnorm(network(True)))
    collected["parameters"] = parameter_path(net, *PARTS[rank : rank + 2])
    torch.save(collected, f"{out}.{rank}")
    torch.distributed.destroy_process_group()


def parameter_path(net: nn.Module, begin: int, end: int) -> dict[str, torch.Tensor]:
    """Per-process cotangents of grad_weight and grad_bias: the gradient of a weighted sum of them."""
    draw = torch.Generator().manual_seed(6)
    x = torch.randn(8, 3, 10, 10, generator=draw, dtype=torch.float64)[begin:end].requires_grad_()
    affine = [net[1].weight, net[1].bias]
    first = torch.autograd.grad(net(x).pow(3).sum(), affine, create_graph=True)
    scalar = sum((g * torch.linspace(1, 2, g.numel(), dtype=g.dtype)).sum() for g in first)
    (to_x,) = torch.autograd.grad(scalar, x)
    return {"to_x": to_x}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What each of two processes found, by gloo on this machine."""
    out = tmp_path_factory.mktemp("sync") / "results"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.nn.test_sync_batch_norm import process; process"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", f"{code}({rank}, {port}, {str(out)!r})"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [p.communicate(timeout=300)[1] for p in running]
    assert [p.returncode for p in running] == [0, 0], errors
    return [torch.load(f"{out}.{rank}", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("second", [True, False], ids=["second-order", "first-order"])
def test_two_processes_are_one_with_the_whole_batch(affine, second, two_processes):
    parts = [process[affine, second] for process in two_processes]
    whole = results(network(affine), 0, 8, second)
    # How far the gradients move by the second-order part: 1,000 times the bound at least.
    moved = results(network(affine), 0, 8, not second)
    for name, want in whole.items():
        if name in ("logits", "vjp", "grad_x"):
            got = torch.cat([part[name] for part in parts])
        elif name.startswith("grad "):
            got = parts[0][name] + parts[1][name]
        else:
            got = parts[0][name]
            assert torch.equal(got, parts[1][name]), name
        scale = want.abs().max().clamp(min=1e-9)
        if name == "grad 0.bias" or name == "grad 3.bias":  # zero but for rounding: batch norm takes the mean away
            scale = whole[name.replace("bias", "weight")].abs().max()
        elif name.startswith("grad") and "7" not in name:
            assert (want - moved[name]).abs().max() > 1e-7 * scale, name
        assert (got - want).abs().max() <= 1e-10 * scale, name
    assert whole["4.running_var"].sub(1).abs().max() > 1e-2


def test_cotangents_of_the_parameters_gradients(two_processes):
    """Each process weighs its own part of grad_weight: with equal weights the whole's is the sum."""
    got = torch.cat([process["parameters"]["to_x"] for process in two_processes])
    want = parameter_path(network(True), 0, 8)["to_x"]
    assert want.abs().max() > 1e-3
    assert (got - want).abs().max() <= 1e-10 * want.abs().max()


def test_one_process_is_batch_norm():
    plain = network(True)
    sync = sib_fast.prepare(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain)))
    for key, want in results(plain, 0, 8, True).items():
        torch.testing.assert_close(dict(results(copy.deepcopy(sync), 0, 8, True))[key], want, rtol=1e-9, atol=1e-9, msg=key)


def test_timms_with_an_activation_behind_it(monkeypatch):
    """Of what timm.layers.convert_sync_batchnorm makes of an EfficientNet; over two processes it is the same code as above."""
    norm_act = pytest.importorskip("timm.layers.norm_act", exc_type=ImportError)
    plain = nn.Sequential(norm_act.BatchNormAct2d(3, act_layer="silu")).double()
    sync = norm_act.convert_sync_batchnorm(copy.deepcopy(plain))
    assert type(sync[0]) is norm_act.SyncBatchNormAct
    fast = sib_fast.prepare(sync)
    assert fast[0].differentiable_twice
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-12, atol=1e-12)
    monkeypatch.setattr(fast[0], "_synchronises", lambda: True)
    monkeypatch.setattr(fast[0], "_normalise", lambda input: (input.clone(), input.mean((0, 2, 3)), input.var((0, 2, 3)), 100))
    torch.testing.assert_close(fast(x), nn.functional.silu(x))
    assert type(sib_fast.restore(fast)[0]) is norm_act.SyncBatchNormAct


def test_attach_accepts_a_prepared_one_and_refuses_pytorchs():
    net = nn.SyncBatchNorm.convert_sync_batchnorm(network(True))
    with pytest.raises(RuntimeError, match=r"SyncBatchNorm must not be used: .* sib_fast\.prepare\(model\) first"):
        sib_fast.SIBLoss().attach(net)
    criterion = sib_fast.SIBLoss(window_size=3).attach(sib_fast.prepare(net))
    criterion(net(torch.randn(8, 3, 10, 10).double()), torch.randint(0, 5, (8,))).backward()
    sib_fast.restore(net)
    assert type(net[1]) is nn.SyncBatchNorm
