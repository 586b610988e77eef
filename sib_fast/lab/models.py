"""Networks small enough to be trained on a CPU while one waits."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SmallConvNet(nn.Module):
    """Five 3x3 convolutions with batch norm and ReLU in three stages, global average pooling and a linear layer.

    Stages are joined by strided convolutions, not by max pooling, whose input gradient sits on one pixel in four.

    Args:
        num_classes: number of logits.
        width: channels of the first stage; the second and third have twice and four times as many.

    Shapes:  image [N, 3, H, W] -> logits [N, num_classes]; any H, W >= 1.
    """

    def __init__(self, num_classes: int = 10, width: int = 16):
        super().__init__()
        if width < 1:
            raise ValueError(f"SmallConvNet: width must be at least 1, got {width}")
        layers: list[nn.Module] = []
        channels = 3
        # one convolution at full resolution: a second would cost as much as all the others in an S-IB step
        stages = ((width, 1), (2 * width, 2), (2 * width, 1), (4 * width, 2), (4 * width, 1))
        for out_channels, stride in stages:
            layers += [
                nn.Conv2d(channels, out_channels, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(out_channels),
                nn.ReLU(inplace=True),
            ]
            channels = out_channels
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(image)).flatten(1))


class _Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, channels: int, out_channels: int, stride: int):
        super().__init__()
        self.first = nn.Conv2d(channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(out_channels)
        self.second = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        # guided backpropagation hooks modules, and a module that runs twice confuses the libraries
        self.out_relu = nn.ReLU()
        self.shortcut = nn.Identity()
        if stride > 1 or channels != out_channels:
            projection = nn.Conv2d(channels, out_channels, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.first_norm(self.first(x)))
        return self.out_relu(self.second_norm(self.second(y)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """The residual network for small images: a 3x3 convolution, three stages of residual blocks, pooling, a linear layer.

    Args:
        num_classes: number of logits.
        width: channels of the first stage; the second and third have twice and four times as many, at half the sides.
        blocks: residual blocks of a stage; 1 makes the eight-layer network.

    Shapes:  image [N, 3, H, W] -> logits [N, num_classes]; any H, W >= 1.
    Source:  He et al. 2016, section 4.2, with projections as shortcuts.
    """

    def __init__(self, num_classes: int = 10, width: int = 16, blocks: int = 1):
        super().__init__()
        for name, value in (("width", width), ("blocks", blocks)):
            if value < 1:
                raise ValueError(f"SmallResNet: {name} must be at least 1, got {value}")
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        stages: list[nn.Module] = []
        channels = width
        for stage in range(3):
            for block in range(blocks):
                out_channels = width << stage
                stages.append(_Residual(channels, out_channels, 2 if stage > 0 and block == 0 else 1))
                channels = out_channels
        self.features = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(self.stem(image))).flatten(1))


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0: inverted residual blocks with ReLU6, no squeeze-and-excitation; every activation a module of its own.

    Parameters have the names of PyPI's ``efficientnet-lite-pytorch`` without its underscores, so that the published ImageNet
    weights fit; its layers are torch's own, so that `prepare` knows them all.

    Args:
        num_classes: number of logits.

    Shapes:  image [N, 3, H, W] -> logits [N, num_classes]; padded as TensorFlow pads: a side of n becomes ⌈n / 2⌉, five times.
    Source:  Tan and Le 2019 and the README of TensorFlow's ``efficientnet/lite``; batch norm and stochastic depth as there.
    """

    # kernel, stride, expansion, channels, blocks
    _STAGES = (
        (3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3), (5, 2, 6, 192, 4),
        (3, 1, 6, 320, 1),
    )  # fmt: skip

    def __init__(self, num_classes: int = 1000):
        super().__init__()
        self.conv_stem = _same_padded(3, 32, 3, 2)
        self.bn0 = _lite_norm(32)
        self.act0 = nn.ReLU6()
        total, channels = sum(count for *_, count in self._STAGES), 32
        blocks: list[nn.Module] = []
        for kernel, stride, expansion, out_channels, count in self._STAGES:
            for i in range(count):
                drop = 0.2 * len(blocks) / total
                blocks.append(_InvertedResidual(channels, out_channels, kernel, stride if i == 0 else 1, expansion, drop))
                channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.conv_head = nn.Conv2d(channels, 1280, 1, bias=False)
        self.bn1 = _lite_norm(1280)
        self.act1 = nn.ReLU6()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(1280, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        x = self.blocks(self.act0(self.bn0(self.conv_stem(image))))
        x = self.act1(self.bn1(self.conv_head(x)))
        return self.fc(self.dropout(self.pool(x).flatten(1)))


class _InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, projection; beside a shortcut where the shape stays."""

    def __init__(self, channels: int, out_channels: int, kernel: int, stride: int, expansion: int, drop: float):
        super().__init__()
        wide = channels * expansion
        if expansion > 1:
            self.expand_conv = nn.Conv2d(channels, wide, 1, bias=False)
            self.bn0 = _lite_norm(wide)
            self.act0 = nn.ReLU6()
        self.depthwise_conv = _same_padded(wide, wide, kernel, stride, groups=wide)
        self.bn1 = _lite_norm(wide)
        self.act1 = nn.ReLU6()
        self.project_conv = nn.Conv2d(wide, out_channels, 1, bias=False)
        self.bn2 = _lite_norm(out_channels)
        self.expands, self.residual = expansion > 1, stride == 1 and channels == out_channels
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        y = self.act0(self.bn0(self.expand_conv(x))) if self.expands else x
        y = self.bn2(self.project_conv(self.act1(self.bn1(self.depthwise_conv(y)))))
        if not self.residual:
            return y
        if self.training and self.drop > 0:
            kept = torch.empty(len(y), 1, 1, 1, dtype=y.dtype, device=y.device).bernoulli_(1 - self.drop)
            y = y * (kept / (1 - self.drop))
        return x + y


def _lite_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


def _same_padded(channels: int, out_channels: int, kernel: int, stride: int, groups: int = 1) -> nn.Conv2d:
    """TensorFlow's "same": at stride 2 and even sides one pixel less on the left, which no `padding` of torch's says. A hook pads
    and the layer is torch's own, so that `prepare` may swap it."""
    same = kernel // 2 if stride == 1 else 0
    conv = nn.Conv2d(channels, out_channels, kernel, stride, padding=same, groups=groups, bias=False)
    if stride > 1:
        conv.register_forward_pre_hook(_pad_same)
    return conv


def _pad_same(conv: nn.Module, arguments: tuple[Tensor]) -> Tensor:
    (x,) = arguments
    padding = []
    for size, kernel, stride in zip(x.shape[:1:-1], conv.kernel_size[::-1], conv.stride[::-1], strict=True):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        padding += [total // 2, total - total // 2]
    return nn.functional.pad(x, padding)
