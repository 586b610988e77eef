"""torchvision's families, small enough to be differentiated twice in float64 within seconds; what `prepare` is tested on."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ComposedHardsigmoid(nn.Module):
    """relu6(x + 3)/6: nn.Hardsigmoid of operations that PyTorch can differentiate twice."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(x + 3) / 6


def without_randomness(model: nn.Module) -> nn.Module:
    """Dropout and stochastic depth off, in place: two runs must see the same network."""
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.AlphaDropout)) or type(module).__name__ == "StochasticDepth":
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return model


def differentiable_twice(model: nn.Module) -> nn.Module:
    """nn.Hardsigmoid replaced by `ComposedHardsigmoid`, in place: the oracle for models that PyTorch cannot train with S-IB."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is nn.Hardsigmoid:
                setattr(module, name, ComposedHardsigmoid())
    return model


def _named(name: str, **options) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import torchvision.models

        return getattr(torchvision.models, name)(num_classes=7, **options)

    return make


def _vgg() -> nn.Module:
    from torchvision.models.vgg import VGG, cfgs, make_layers

    with torch.device("meta"):  # its own classifier has 120 million weights, a gigabyte in float64
        model = VGG(nn.Identity(), init_weights=False)
    model.features = make_layers(cfgs["A"], batch_norm=True)
    model.classifier = nn.Sequential(nn.Linear(512 * 49, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, 7))
    return model


def _convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    # Layer scale starts at 1e-6, which would leave the blocks' gradients in the rounding of everything else.
    return ConvNeXt(
        [CNBlockConfig(16, 24, 1), CNBlockConfig(24, 32, 2), CNBlockConfig(32, None, 1)], layer_scale=0.3, num_classes=7
    )


def _vision_transformer() -> nn.Module:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=24, mlp_dim=48, num_classes=7)
    # torchvision starts the head at zero, which makes the VJP zero too.
    nn.init.normal_(model.heads.head.weight, std=0.3)
    return model


def _swin() -> nn.Module:
    from torchvision.models import SwinTransformer

    return SwinTransformer([4, 4], 12, depths=[2, 1], num_heads=[2, 3], window_size=[4, 4], num_classes=7)


def _efficientnet() -> nn.Module:
    from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig

    blocks = [
        FusedMBConvConfig(1, 3, 1, 8, 8, 1),
        MBConvConfig(4, 3, 2, 8, 16, 2, 1.0, 1.0),
        MBConvConfig(4, 5, 2, 16, 24, 1, 1.0, 1.0),
    ]
    return EfficientNet(blocks, dropout=0.0, stochastic_depth_prob=0.0, num_classes=7, last_channel=48)


# family -> (how to make it, image size)
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (_named("resnet18"), 64),
    "resnet50": (_named("resnet50"), 64),
    "vgg11_bn": (_vgg, 64),
    "densenet121": (_named("densenet121"), 64),
    "mobilenet_v2": (_named("mobilenet_v2"), 64),
    "mobilenet_v3_small": (_named("mobilenet_v3_small"), 64),
    "efficientnet": (_efficientnet, 48),
    "convnext": (_convnext, 48),
    "vit": (_vision_transformer, 32),
    "swin": (_swin, 32),
}


def batch_for(name: str, images: int = 4) -> tuple[Tensor, Tensor]:
    """Shapes: float64 [images, 3, size, size], int64 [images]."""
    size = MODELS[name][1]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, 3, size, size, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 7, (images,), generator=generator)
