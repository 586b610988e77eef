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
