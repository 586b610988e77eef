"""Layers of torch and torchvision, differentiated twice: exactly those that raise are named before they do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sib_fast
from sib_fast import SIBLoss, network_checks
from sib_fast.nn import inspect
from sib_fast.testing.networks import image_batch

NO_TORCHVISION = "torchvision is not installed"
VECTORS, SEQUENCES, IMAGES, VOLUMES = (2, 8), (2, 4, 6), (2, 4, 6, 6), (2, 4, 4, 4, 4)
BY_RANK = {1: SEQUENCES, 2: IMAGES, 3: VOLUMES}


def _modules():
    """(name, layer, shape of its input): the layers of torch.nn that take one map."""
    for kind in (
        nn.ReLU, nn.ReLU6, nn.ELU, nn.SELU, nn.CELU, nn.LeakyReLU, nn.RReLU, nn.PReLU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus,
        nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Softsign, nn.LogSigmoid,
        nn.Sigmoid, nn.Tanh, nn.GLU, nn.Softmax2d, nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Identity, nn.Flatten,
    ):  # fmt: skip
        yield kind.__name__, kind(), IMAGES
    for kind, arguments in {
        "Conv": (4, 3, 2), "ConvTranspose": (4, 3, 2), "BatchNorm": (4,), "InstanceNorm": (4,), "MaxPool": (2,), "AvgPool": (2,),
        "LPPool": (2, 2), "AdaptiveAvgPool": (2,), "AdaptiveMaxPool": (2,), "ReflectionPad": (1,), "ReplicationPad": (1,),
        "CircularPad": (1,), "ZeroPad": (1,), "ConstantPad": (1, 0.5), "Dropout": (0.5,),
    }.items():  # fmt: skip
        for rank, shape in BY_RANK.items():
            yield f"{kind}{rank}d", getattr(nn, f"{kind}{rank}d")(*arguments), shape
    for name, layer, shape in (
        ("Linear", nn.Linear(6, 3), IMAGES),
        ("GroupNorm", nn.GroupNorm(2, 4), IMAGES),
        ("LayerNorm", nn.LayerNorm(6), IMAGES),
        ("RMSNorm", nn.RMSNorm(6), IMAGES),
        ("LocalResponseNorm", nn.LocalResponseNorm(2), IMAGES),
        ("CrossMapLRN2d", nn.CrossMapLRN2d(2), IMAGES),
        ("PixelShuffle", nn.PixelShuffle(2), IMAGES),
        ("PixelUnshuffle", nn.PixelUnshuffle(2), IMAGES),
        ("ChannelShuffle", nn.ChannelShuffle(2), IMAGES),
        ("Unfold", nn.Unfold(2), IMAGES),
        ("Threshold", nn.Threshold(0.5, 0.1), IMAGES),
        ("Softmax", nn.Softmax(1), IMAGES),
        ("LogSoftmax", nn.LogSoftmax(1), IMAGES),
        ("FractionalMaxPool2d", nn.FractionalMaxPool2d(2, output_size=3), IMAGES),
        ("FractionalMaxPool3d", nn.FractionalMaxPool3d(2, output_size=2), VOLUMES),
        ("LSTM", nn.LSTM(6, 5), SEQUENCES),
        ("GRU", nn.GRU(6, 5), SEQUENCES),
        ("RNN", nn.RNN(6, 5), SEQUENCES),
        ("LSTMCell", nn.LSTMCell(8, 5), VECTORS),
        ("GRUCell", nn.GRUCell(8, 5), VECTORS),
        ("RNNCell", nn.RNNCell(8, 5), VECTORS),
        ("TransformerEncoderLayer", nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), SEQUENCES),
        ("weight_norm", nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 3, 2)), IMAGES),
        ("spectral_norm", nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 3, 2)), IMAGES),
    ):
        yield name, layer, shape


def _calls():
    """(name, function, shape): what networks call of torch and torchvision, and have no layer for."""
    for mode, shape in (
        *((mode, IMAGES) for mode in ("nearest", "nearest-exact", "bilinear", "bicubic", "area")),
        ("linear", SEQUENCES),
        ("trilinear", VOLUMES),
    ):
        yield f"interpolate {mode}", lambda x, mode=mode: F.interpolate(x, scale_factor=2, mode=mode), shape
    for mode in ("bilinear", "bicubic"):
        yield f"antialias {mode}", lambda x, mode=mode: F.interpolate(x, scale_factor=0.5, mode=mode, antialias=True), IMAGES
    grid = torch.rand(2, 3, 3, 2, dtype=torch.float64) - 0.5
    for mode in ("bilinear", "nearest", "bicubic"):
        yield f"grid_sample {mode}", lambda x, mode=mode: F.grid_sample(x, grid + x.mean(), mode, align_corners=False), IMAGES
    yield "affine_grid", lambda x: F.affine_grid(x[:, :2, 0, :3], [2, 1, 4, 4], align_corners=False), IMAGES
    yield "max_unpool2d", lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), IMAGES
    yield "fold", lambda x: F.fold(x.flatten(2), (6, 6), (1, 1)), IMAGES
    yield "hardsigmoid", F.hardsigmoid, IMAGES
    yield "gumbel_softmax", F.gumbel_softmax, VECTORS
    yield "attention", lambda x: F.scaled_dot_product_attention(x, x, x), IMAGES
    yield "masked_softmax", lambda x: torch._masked_softmax(x, torch.zeros(x.shape, dtype=torch.bool), -1, 2), IMAGES
    yield "segment_reduce", lambda x: torch.segment_reduce(x, "mean", lengths=torch.tensor([1, 1]), axis=0), IMAGES
    bags, table = torch.arange(4).view(2, 2), torch.rand(4, 3, dtype=torch.float64)
    yield "embedding_bag", lambda x: F.embedding_bag(bags, table, per_sample_weights=x[:, :2], mode="sum"), VECTORS
    step, zero = torch.tensor([0.1], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    yield "fake_quantize", lambda x: torch._fake_quantize_learnable_per_tensor_affine(x, step, zero, 0, 255), IMAGES
    yield "multi_margin_loss", lambda x: F.multi_margin_loss(x, torch.tensor([0, 1])), VECTORS
    yield "multilabel_margin_loss", lambda x: F.multilabel_margin_loss(x, torch.tensor([[0, 1, -1, 0, 0, 0, 0, 0]] * 2)), VECTORS
    labels, lengths = torch.ones(2, 2, dtype=torch.int64), (torch.tensor([4, 4]), torch.tensor([2, 2]))
    yield "ctc_loss", lambda x: F.ctc_loss(x.log_softmax(-1).permute(1, 0, 2), labels, *lengths), SEQUENCES
    for p in (1.0, 2.0, 3.0):
        yield f"cdist {p}", lambda x, p=p: torch.cdist(x, 1.1 * x.flip(0), p), SEQUENCES
        yield f"pdist {p}", lambda x, p=p: F.pdist(x, p), VECTORS
    for name, function in {
        "fft": lambda x: torch.fft.rfft2(x).abs(), "svdvals": torch.linalg.svdvals, "inverse": torch.linalg.inv,
        "sort": lambda x: x.sort(1)[0], "cumprod": lambda x: x.cumprod(1), "logcumsumexp": lambda x: x.logcumsumexp(1),
    }.items():  # fmt: skip
        yield name, function, IMAGES
    try:
        from torchvision import ops
    except ImportError:
        return
    boxes = torch.tensor([[0.0, 0, 0, 4, 4]], dtype=torch.float64)
    for name in ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool"):
        yield name, lambda x, name=name: getattr(ops, name)(x, boxes, (2, 2)), IMAGES
    offset, weight = torch.zeros(2, 18, 4, 4, dtype=torch.float64), torch.rand(2, 4, 3, 3, dtype=torch.float64)
    yield "deform_conv2d", lambda x: ops.deform_conv2d(x, offset, weight), IMAGES
    yield "drop_block2d", lambda x: ops.drop_block2d(x, 0.3, 3), IMAGES
    yield "stochastic_depth", lambda x: ops.stochastic_depth(x, 0.5, "row"), IMAGES
    yield "SqueezeExcitation", ops.SqueezeExcitation(4, 2).double(), IMAGES
    yield "FrozenBatchNorm2d", ops.FrozenBatchNorm2d(4).double(), IMAGES


TABLE = {
    name: (layer.double() if isinstance(layer, nn.Module) else layer, shape) for name, layer, shape in (*_modules(), *_calls())
}
# By hand, so that a table whose every entry passes is no proof of itself.
WITHOUT = {"Hardsigmoid", "hardsigmoid", "attention", "embedding_bag", "multi_margin_loss", "ctc_loss", "CrossMapLRN2d"}


def _output(name: str) -> tuple[Tensor, Tensor]:
    layer, shape = TABLE[name]
    x = torch.rand(shape, dtype=torch.float64).requires_grad_()
    out = layer(x)
    return (out[0] if isinstance(out, tuple) else out), x


def _differentiates_twice(out: Tensor, x: Tensor) -> bool:
    try:
        (gradient,) = torch.autograd.grad((out * torch.rand_like(out)).sum() + out.square().sum(), x, create_graph=True)
        if gradient.requires_grad:
            torch.autograd.grad(gradient.square().sum(), x, allow_unused=True)
    except RuntimeError:
        return False
    return True


@pytest.mark.filterwarnings("ignore")  # legacy layers say that they are
@pytest.mark.parametrize("name", TABLE)
def test_what_cannot_be_differentiated_twice_is_named_and_nothing_else(name):
    out, x = _output(name)
    named = next(network_checks.obstacles_in_graph(out.grad_fn, x), None) is not None
    assert named is not _differentiates_twice(out, x)
    assert named or name not in WITHOUT


class Gated(nn.Module):
    """A body with a gate that has no second derivative, and a head behind it. [N, 3, H, W] -> [N, 5]."""

    def __init__(self, gate: nn.Module):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), gate)
        self.after = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Tanh())
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.after(self.body(x)).mean(dim=(2, 3)))


class Functional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.hardsigmoid(x)


@pytest.mark.parametrize("gate", [nn.Hardsigmoid, Functional])
def test_hardsigmoid_is_named_at_the_first_loss(gate):
    x, target = image_batch()
    model = Gated(gate())
    criterion = SIBLoss(window_size=5).attach(model)
    with pytest.raises(RuntimeError, match=r"SIBLoss: Hardsigmoid must not be used: .*sib_fast\.prepare\(model\).*relu6"):
        criterion(model(x), target)
    report = inspect(model, x)
    assert [(entry.kind, entry.fix.split(" ")[1]) for entry in report.of("obstacle")] == [
        ("HardsigmoidBackward0", "sib_fast.prepare(model)")
    ]
    assert report.twice_differentiable is False
    sib_fast.prepare(model)
    assert inspect(model, x).twice_differentiable is (gate is nn.Hardsigmoid)
    if gate is nn.Hardsigmoid:
        criterion(model(x), target).backward()


@pytest.mark.parametrize("beside", [False, True])
def test_an_obstacle_that_the_vjp_does_not_pass_is_none(beside):
    """Below the layer that the criterion is attached to, or in a branch around it: the second derivative is never asked for."""

    class Beside(Gated):
        def forward(self, x: Tensor) -> Tensor:
            h = self.body[0](x)
            return self.head(self.after(h).mean(dim=(2, 3)) * self.body[1](h.detach()).mean(dim=(2, 3)))

    x, target = image_batch()
    model = (Beside if beside else Gated)(nn.Hardsigmoid())
    SIBLoss(window_size=5).attach(model, None if beside else "body")(model(x), target).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_mobilenet_v3_is_told_of_prepare():
    models = pytest.importorskip("torchvision.models", reason=NO_TORCHVISION, exc_type=ImportError)
    model = models.mobilenet_v3_small(num_classes=5)  # that a prepared one trains: tests/nn/test_models.py
    criterion = SIBLoss(window_size=5).attach(model)
    x, target = image_batch(height=32, width=32)
    logits = model(x)
    with pytest.raises(RuntimeError, match=r"Call sib_fast\.prepare\(model\) first"):
        criterion(logits, target)
