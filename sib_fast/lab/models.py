"""Networks small enough to be trained on a CPU while one waits."""

from __future__ import annotations

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
