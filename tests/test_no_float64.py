"""A device without float64 (Apple's MPS): a pretend device that refuses it runs the reference, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sib_fast import SIBLoss, _backends, _checks, foreground_mask, prepare, region_statistics, vjp_map
from sib_fast.estimators import BACKGROUNDS, ESTIMATORS
from sib_fast.explain import explain
from sib_fast.loss import OBJECTIVES
from sib_fast.masks import collate
from sib_fast.ops import hsic_objective
from sib_fast.testing.networks import conv_net, image_batch, parameter_gradients, relative_error
from sib_fast.vjp import SCALARS
from tests.pretend import DEVICE, PretendTensor, _pretend  # noqa: F401, the fixture

pytestmark = pytest.mark.skipif(
    torch.__version__ < "2.14", reason="a tensor subclass under the second derivative: the newest torch is enough"
)
WEIGHTS = {"lambda_fg": 3.0, "lambda_bg": 1000.0, "window_size": 5, "backend": "reference"}


@pytest.fixture(autouse=True)
def _without_float64(_pretend, monkeypatch):  # noqa: F811
    make = PretendTensor.__new__

    def refuse(cls, real: Tensor):
        if real.dtype == torch.float64:
            raise TypeError("the device does not support float64")
        return make(cls, real)

    monkeypatch.setattr(PretendTensor, "__new__", staticmethod(refuse))
    monkeypatch.setattr(_checks, "NO_FLOAT64", {DEVICE})
    monkeypatch.setitem(_backends.KERNEL_DEVICES, "cuda", "cuda")  # no kernels either


def problem(device: str = DEVICE) -> tuple[nn.Module, Tensor, Tensor]:
    x, target = image_batch()
    return conv_net().to(device), x.to(device), target.to(device)


def test_the_device_refuses_float64():
    x = problem()[1]
    assert x.device.type == DEVICE
    for widen in (
        lambda: x.double(),
        lambda: torch.zeros(2, dtype=torch.float64, device=DEVICE),
        lambda: x.sum(dtype=torch.float64),
    ):
        with pytest.raises(TypeError, match="does not support float64"):
            widen()


def assert_same_step(prepared: bool = False, target_of=lambda y: y, mask: object = None, **options: object) -> None:
    """Loss, terms and gradients are the CPU's, whose float64 they have too where N×N and N×K are concerned."""
    results = []
    for device in (DEVICE, "cpu"):
        net, x, target = problem(device)
        net = prepare(net) if prepared else net
        leaf = x.requires_grad_()
        criterion = SIBLoss(**{**WEIGHTS, **options})
        given = mask.to(device) if mask is not None else None
        loss = criterion(net(leaf), target_of(target), leaf, given)
        assert {t.device.type for t in (loss, *criterion.terms.values())} == {device}
        results.append([*criterion.terms.values(), *parameter_gradients(loss, net).values()])
    for got, exact in zip(*results, strict=True):
        assert relative_error(got.cpu(), exact) < 1e-6


OPTIONS = [
    *(("scalar", name) for name in SCALARS),
    *(("estimator", name) for name in ESTIMATORS),
    *(("background", name) for name in BACKGROUNDS),
    *(("objective", name) for name in OBJECTIVES),
    ("normalise_cotangent", True),
    ("scalar", lambda z, y: z.log_softmax(1).gather(1, y[:, None]).sum()),
]


@pytest.mark.parametrize(("option", "value"), OPTIONS, ids=lambda v: v if isinstance(v, str) else "function")
def test_the_loss_is_the_cpus(option, value):
    assert_same_step(**{option: value})


@pytest.mark.parametrize("prepared", [False, True])
def test_prepared_networks_given_masks_and_soft_targets(prepared):
    given = collate([None, *torch.ones(5, 12, 11).triu()], 12, 11)
    assert_same_step(prepared, mask=given)
    assert_same_step(
        prepared, target_of=lambda y: torch.softmax(torch.arange(5.0).to(y.device) * y[:, None], 1), scalar="label_logit"
    )


def test_auto_is_the_reference_and_says_so(monkeypatch):
    monkeypatch.setattr(_backends, "_warned", set())
    with pytest.warns(UserWarning, match="'auto' runs the reference on meta tensors"):
        assert_same_step(backend="auto")


def test_the_ops_by_themselves():
    vjp = image_batch(seed=4)[0].to(DEVICE).requires_grad_()
    x = problem()[1]
    mask = foreground_mask(vjp, window_size=5, backend="reference")
    assert (mask.device.type, mask.dtype) == (DEVICE, torch.float32)
    statistics = region_statistics(vjp, x, mask, background_grams=True, backend="reference")
    assert {(s.device.type, s.dtype) for s in statistics} == {("cpu", torch.float64)}
    base = torch.ones((), device=DEVICE, requires_grad=True)
    terms = hsic_objective(base, *statistics[:3], lambda_fg=1.0, lambda_bg=10.0, backend="reference")
    assert {(t.device.type, t.dtype) for t in terms} == {(DEVICE, torch.float32)}
    gradients = torch.autograd.grad(sum(terms), (vjp, base))
    assert all(g.device.type == DEVICE and g.cpu().any() for g in gradients)


def test_the_map_and_its_derivative():
    for scalar in SCALARS:
        got = []
        for device in (DEVICE, "cpu"):
            net, x, target = problem(device)
            x.requires_grad_()
            vjp = vjp_map(net(x), x, scalar, target, normalise_cotangent=True)
            got.append((vjp, *torch.autograd.grad(vjp.square().sum(), (net[0].weight, net[3].weight))))
        for a, b in zip(*got, strict=True):
            assert a.device.type == DEVICE
            assert relative_error(a.cpu(), b) < 1e-5, scalar


def rectified(device: str) -> tuple[nn.Module, Tensor]:
    """With ReLUs, which guided backpropagation asks for."""
    net, x, _ = problem(device)
    net[2], net[5] = nn.ReLU(), nn.ReLU()
    return net, x


@pytest.mark.parametrize("method", ["saliency", "integrated_gradients", "smoothgrad", "input_x_gradient", "guided_backprop"])
def test_explanations(method):
    pytest.importorskip("captum")
    maps = [explain(*rectified(device), method=method) for device in (DEVICE, "cpu")]
    assert maps[0].device.type == DEVICE
    assert relative_error(maps[0].cpu(), maps[1]) < 1e-4


@pytest.mark.parametrize("method", ["grad_cam", "grad_cam_plusplus", "layer_cam"])
def test_class_activation_maps(method):
    pytest.importorskip("pytorch_grad_cam")
    maps = [explain(*rectified(device), method=method, layer="5") for device in (DEVICE, "cpu")]
    assert relative_error(maps[0].cpu(), maps[1]) < 1e-4


def test_controls_and_metrics():
    pytest.importorskip("captum")
    pytest.importorskip("torchmetrics")
    from sib_fast.explain.controls import insertion_deletion, randomisation
    from sib_fast.explain.metrics import localisation

    results = []
    for device in (DEVICE, "cpu"):
        net, x, target = problem(device)
        maps = foreground_mask(x, window_size=5, backend="reference")
        metrics = localisation()
        metrics.update(maps, maps > 0.6)
        # torch.as_tensor places a number below the dispatcher, out of the pretend device's reach.
        blank = torch.zeros((), device=device)
        areas = insertion_deletion(net, x, target, maps, baseline=blank)
        results.append([*areas, randomisation(net, x, target), *metrics.compute().values()])
    for got, exact in zip(*results, strict=True):
        assert relative_error(got.cpu(), exact) < 1e-4
