"""Mixed precision: the network in half, everything after its logits in float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import sib_fast
from sib_fast import SIBLoss, _backends, vjp_map
from sib_fast.nn.prepare import SWAPS
from sib_fast.testing.networks import conv_net, image_batch, plain_step, relative_error

WEIGHTS = {"lambda_fg": 3.0, "lambda_bg": 1000.0, "window_size": 5}
HALF = (torch.bfloat16, torch.float16)


def cosine(a: Tensor, b: Tensor) -> float:
    return F.cosine_similarity(a.detach().flatten(), b.detach().flatten(), dim=0).item()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("loss_inside", [False, True], ids=["loss outside", "loss inside"])
def test_loss_and_terms_are_float32(backend, dtype, loss_inside):
    x, target = image_batch()
    net = conv_net(norm="group")
    criterion = SIBLoss(**WEIGHTS, backend=backend).attach(net)
    with torch.autocast(torch.get_default_device().type, dtype=dtype):
        logits = net(x)
        assert logits.dtype == dtype
        if loss_inside:
            loss = criterion(logits, target)
    if not loss_inside:
        loss = criterion(logits, target)
    assert loss.dtype == torch.float32
    assert {t.dtype for t in criterion.terms.values()} == {torch.float32}
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in net.parameters())
    exact = plain_step(conv_net(norm="group").double(), x.double(), target, **WEIGHTS)
    # 1000·exp(background) carries 6e-5 of float32's spacing at 1003; the terms show what half precision does.
    for name, tolerance in (("loss", 1e-4), ("base", 1e-2), ("foreground", 0.05), ("background", 0.05)):
        assert relative_error(criterion.terms[name], getattr(exact, name)) < tolerance, name


def test_the_loss_does_not_depend_on_the_autocast_state_around_it(backend):
    x, target = image_batch()
    leaf = x.requires_grad_()
    logits = conv_net(norm="group")(leaf)
    criterion = SIBLoss(**WEIGHTS, backend=backend)
    outside = criterion(logits, target, leaf)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        inside = criterion(logits, target, leaf)
    assert torch.equal(inside, outside)


def test_the_map_does_not_depend_on_the_autocast_state_around_it():
    # autograd.grad runs a float32 network's backward in the caller's autocast state, where its products would be in half.
    x, _ = image_batch()
    leaf = x.requires_grad_()
    logits = conv_net(norm="group")(leaf)
    outside = vjp_map(logits, leaf)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(vjp_map(logits, leaf), outside)


def test_users_own_parts_run_with_autocast_off():
    x, target = image_batch()
    seen = []

    def base_loss(z: Tensor, t: Tensor) -> Tensor:
        seen.append((z @ z.T).dtype)
        return F.cross_entropy(z, t)

    def mask(vjp: Tensor) -> Tensor:
        seen.append((vjp[:, 0] @ vjp[:, 0].mT).dtype)
        return vjp[:, :1].sigmoid()

    leaf = x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        SIBLoss(base_loss=base_loss, mask=mask)(conv_net(norm="group")(leaf), target, leaf)
    assert seen == [torch.float32, torch.float32]


@pytest.mark.parametrize(("dtype", "least"), [(torch.bfloat16, 0.995), (torch.float16, 0.9995)], ids=str)
def test_the_map_is_close_to_float32s(dtype, least):
    x, _ = image_batch()
    net = conv_net(norm="group")
    leaf = x.requires_grad_()
    exact = vjp_map(net(leaf), leaf)
    with torch.autocast("cpu", dtype=dtype):
        got = vjp_map(net(leaf), leaf)
    assert got.dtype == torch.float32
    assert cosine(got, exact) > least


def faint_net() -> nn.Module:
    """A network whose input gradient is of order 1e-7, among float16's subnormal numbers."""
    net = conv_net(norm="none")
    with torch.no_grad():
        net[0].weight.mul_(1e-4)
    return net


def test_the_default_scale_keeps_float16_from_underflowing():
    x, _ = image_batch()
    net, leaf = faint_net(), x.requires_grad_()
    exact = vjp_map(net(leaf), leaf)
    with torch.autocast("cpu", dtype=torch.float16):
        logits = net(leaf)
        default, unscaled = vjp_map(logits, leaf), vjp_map(logits, leaf, scale=1.0)
    # More than 0.999 with AVX-512, 0.9985 with AVX2, where PyTorch's half-precision kernels are others: so what the scale buys.
    assert cosine(default, exact) > 0.99
    assert 1 - cosine(default, exact) < 0.1 * (1 - cosine(unscaled, exact))
    assert cosine(unscaled, exact) < 0.98


class HalfOutputs(TorchDispatchMode):
    """The ops that write half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.dtype in HALF:
                self.ops.append(str(func))
        return out


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("estimator", ["hsic_biased", "hsic_gaussian"])
def test_nothing_after_the_logits_is_in_half_precision(backend, dtype, estimator):
    # Only the last cast of this network is in half, so its backward is that cast and nothing else.
    x, target = image_batch()
    leaf = x.requires_grad_()
    logits = conv_net(norm="group")(leaf).to(dtype)
    with torch.autocast(torch.get_default_device().type, dtype=dtype), HalfOutputs() as log:
        SIBLoss(**WEIGHTS, backend=backend, estimator=estimator)(logits, target, leaf)
    assert set(log.ops) <= {"aten._to_copy.default", "aten.detach.default"}, log.ops
    assert log.ops.count("aten._to_copy.default") == 1  # the cotangent, in the dtype that the logits' graph wants


def test_the_detector_of_half_precision_detects():
    with torch.autocast("cpu", dtype=torch.bfloat16), HalfOutputs() as log:
        torch.randn(3, 3) @ torch.randn(3, 3)
    assert "aten.mm.default" in log.ops


def test_half_precision_images(backend):
    x, target = image_batch()
    net = conv_net(norm="group")
    criterion = SIBLoss(**WEIGHTS, backend=backend).attach(net)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        loss = criterion(net(x.bfloat16()), target)
    assert loss.dtype == torch.float32
    loss.backward()
    exact = plain_step(conv_net(norm="group").double(), x.double(), target, **WEIGHTS)
    assert relative_error(criterion.terms["foreground"], exact.foreground) < 0.05


def test_a_network_all_in_bfloat16(backend):
    x, target = image_batch()
    net = conv_net(norm="group").bfloat16()
    criterion = SIBLoss(**WEIGHTS, backend=backend).attach(net)
    loss = criterion(net(x.bfloat16()), target)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


# ---- what autocast says of each layer, on the CPU and on CUDA, where a tensor without data has a dtype too ----------

WIDE_ON_CUDA = (nn.LayerNorm, nn.GroupNorm, nn.Softplus)


def layers_of_every_kind() -> dict[type[nn.Module], tuple[Callable[[], nn.Module], tuple[int, ...]]]:
    given = {
        nn.BatchNorm1d: (lambda: nn.BatchNorm1d(4), (3, 4, 5)),
        nn.BatchNorm2d: (lambda: nn.BatchNorm2d(4), (3, 4, 5, 5)),
        nn.BatchNorm3d: (lambda: nn.BatchNorm3d(4), (3, 4, 2, 3, 3)),
        nn.SyncBatchNorm: (lambda: nn.SyncBatchNorm(4), (3, 4, 5)),
        nn.LayerNorm: (lambda: nn.LayerNorm(6), (3, 4, 6)),
        nn.GroupNorm: (lambda: nn.GroupNorm(2, 4), (3, 4, 5, 5)),
        nn.MultiheadAttention: (lambda: nn.MultiheadAttention(4, 2), (5, 3, 4)),
        nn.Conv1d: (lambda: nn.Conv1d(4, 4, 3), (3, 4, 6)),
        nn.Conv2d: (lambda: nn.Conv2d(4, 4, 3), (3, 4, 6, 6)),
        nn.Conv3d: (lambda: nn.Conv3d(4, 4, 2), (3, 4, 3, 3, 3)),
        nn.MaxPool2d: (lambda: nn.MaxPool2d(2), (3, 4, 6, 6)),
        nn.AvgPool2d: (lambda: nn.AvgPool2d(2), (3, 4, 6, 6)),
    }
    return {kind: given.get(kind, (kind, (3, 4))) for kind in SWAPS}


def output_dtype(layer: nn.Module, x: Tensor, dtype: torch.dtype) -> torch.dtype:
    device = x.device.type
    torch.set_autocast_dtype(device, dtype)  # torch.autocast("cuda") does nothing on a machine without CUDA
    torch.set_autocast_enabled(device, True)
    try:
        y = layer(x, x, x, need_weights=False)[0] if isinstance(layer, nn.MultiheadAttention) else layer(x)
    finally:
        torch.set_autocast_enabled(device, False)
        torch.clear_autocast_cache()
    return y.dtype


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", SWAPS, ids=lambda kind: kind.__name__)
def test_a_prepared_layers_dtype_is_autocasts_own(kind, device, monkeypatch):
    make, shape = layers_of_every_kind()[kind]
    if device == "cuda":  # its kernels are there for tensors without data
        monkeypatch.setitem(_backends.MISSING, "cuda", None)
    before = torch.get_autocast_dtype(device)
    results = []
    try:
        with FakeTensorMode(), torch.device(device):
            for prepared in (False, True):
                layer = sib_fast.prepare(make()) if prepared else make()
                dtypes = []
                for dtype in HALF:
                    for given in (torch.float32, *HALF):
                        x = torch.empty(shape, dtype=given, requires_grad=True)
                        dtypes.append(output_dtype(layer, x, dtype))
                results.append(dtypes)
    finally:
        torch.set_autocast_dtype(device, before)
    assert results[0] == results[1]
    if device == "cuda":
        assert (set(results[1]) == {torch.float32}) == (kind in WIDE_ON_CUDA)
