"""Accuracy of a network, and where its input gradient lies."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sib_fast import vjp_map
from sib_fast.lab.data import EmbeddedDigits

_BATCH = 250  # images at a time; in eval mode the batch does not enter the numbers


def accuracy(model: nn.Module, data: EmbeddedDigits) -> float:
    """Share of images whose largest logit is the label's, in eval mode."""
    model.eval()
    device = next(model.parameters()).device
    with torch.no_grad():
        correct = sum(
            int((model(images.to(device)).argmax(dim=1).cpu() == labels).sum())
            for images, labels in zip(data.images.split(_BATCH), data.labels.split(_BATCH), strict=True)
        )
    return correct / len(data)


def gradient_map(model: nn.Module, images: Tensor) -> Tensor:
    """|mean_c R| of the softmax energy, in eval mode.

    Shapes:  images [N, C, H, W] -> [N, 1, H, W], on the CPU.
    Scale:   R is each image's own input gradient: eval-mode batch norm does not mix images.
    """
    model.eval()
    device = next(model.parameters()).device
    maps = []
    for batch in images.split(_BATCH):
        x = batch.to(device, copy=True).requires_grad_()
        vjp = vjp_map(model(x), x, create_graph=False)
        maps.append(vjp.mean(dim=1, keepdim=True).abs().cpu())
    return torch.cat(maps)


def inside_share(gradient: Tensor, mask: Tensor) -> Tensor:
    """Share of every map's mass that lies inside its mask; NaN where the map is zero, as no share is defined there.

    Shapes:  gradient [N, 1, H, W], non-negative; mask [N, 1, H, W] bool -> [N] float64.
    """
    gradient = gradient.double().flatten(1)
    return (gradient * mask.flatten(1)).sum(dim=1) / gradient.sum(dim=1)
