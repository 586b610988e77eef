"""What a study asks of a trained network besides the maps of `sib_fast.explain`: more maps, the evidence at the last feature
map, and what happens to a prediction when background or object go."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sib_fast.explain import METHODS as EXPLAINERS
from sib_fast.explain import explain
from sib_fast.lab.data import EmbeddedDigits
from sib_fast.lab.study.variants import MAP, centred, others

EARLIER = {"small_conv_net": "features.8", "small_resnet": "features.1"}
"""The last map of the stage before the last: half the image's side, and every term of a loss at the last map is above it."""

CONSTANT = ("constant", "centre")
"""Maps that know no network and no image."""

METHODS = (*EXPLAINERS, "grad_cam_earlier", "occlusion", *CONSTANT)

_OPTIONS: dict[str, dict[str, int]] = {"integrated_gradients": {"n_steps": 16}, "smoothgrad": {"n_samples": 16}}
_BATCH = 100  # images explained at a time; the maps do not depend on it


def method_options(method: str) -> dict[str, int]:
    return _OPTIONS.get(method, {})


def maps_of(model: nn.Module, arch: str, images: Tensor, labels: Tensor, method: str, mean_mask: Tensor) -> Tensor:
    """The maps of a method of :data:`METHODS` for the true class. Shapes: -> [N, 1, H, W], non-negative.

    Args:    mean_mask [1, H, W]: the map ``"constant"``: the mean of the training masks.
    """
    if method in CONSTANT:
        constant = mean_mask if method == "constant" else centred(images.shape[-1])
        return constant.float().expand(len(images), -1, -1, -1)
    batches = zip(images.split(_BATCH), labels.split(_BATCH), strict=True)
    return torch.cat([_explain(model, arch, x, y, method) for x, y in batches])


def _explain(model: nn.Module, arch: str, x: Tensor, y: Tensor, method: str) -> Tensor:
    if method == "occlusion":
        return _occlusion(model, x, y)
    if method == "grad_cam_earlier":
        return explain(model, x, y, "grad_cam", layer=EARLIER[arch])
    return explain(model, x, y, method, **method_options(method))


def _occlusion(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """How far the class's logit falls as a blank square of a quarter of the side covers a pixel, mean over 7×7 places."""
    import captum.attr

    side = x.shape[-1] // 4
    model.eval()
    with torch.no_grad():
        falls = captum.attr.Occlusion(model).attribute(x, (3, side, side), strides=(3, side // 2, side // 2), target=y)
    return falls.mean(dim=1, keepdim=True).relu()


def evidence_map(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Σ_k ∂(logit of the class)/∂A_k · A_k at the last feature map, in eval mode: positive for the class, negative against it.

    Shapes:  x [N, C, H, W], y int64 [N] -> [N, 1, h, w].
    """
    maps: list[Tensor] = []
    model.eval()
    handle = model.get_submodule(MAP).register_forward_hook(lambda module, inputs, output: maps.append(output))
    try:
        with torch.enable_grad():
            logits = model(x.detach().clone().requires_grad_())
            (gradient,) = torch.autograd.grad(logits.gather(1, y[:, None]).sum(), maps[-1])
    finally:
        handle.remove()
    return (gradient * maps[-1]).sum(dim=1, keepdim=True).detach()


def evidence_measures(evidence: Tensor, masks: Tensor) -> dict[str, float]:
    """Where the evidence for and against the class lies. A cell with some object in it is no background.

    Shapes:  evidence [N, 1, h, w] of either sign; masks [N, 1, H, W] bool.
    Returns: means over the images where they are defined; ``negative_images``: how many have evidence against the class.
    """
    outside = F.adaptive_max_pool2d(masks.float(), evidence.shape[-2:]).flatten(1) == 0
    evidence = evidence.double().flatten(1)
    positive, negative, whole = evidence.relu(), (-evidence).relu(), evidence.abs().sum(1)

    def mean(part: Tensor, of: Tensor) -> float:
        return float((part / of)[of > 0].mean())

    return {
        "positive_outside": mean((positive * outside).sum(1), positive.sum(1)),
        "negative_outside": mean((negative * outside).sum(1), negative.sum(1)),
        "negative_background": mean((negative * outside).sum(1), whole),
        "negative_images": int((negative.sum(1) > 0).sum()),
        "effective_area": mean(positive.sum(1) ** 2, evidence.shape[1] * (positive**2).sum(1)),
        "cells": evidence.shape[1],
    }


def background_measures(model: nn.Module, data: EmbeddedDigits, count: int) -> dict[str, float]:
    """What the prediction for the first images owes to the background and to the object.

    Returns: for ``swap`` (the object on the background of another of the images) and ``erase`` (the background alone): the
             share of images whose predicted class changes, and the mean total variation ½ Σ|p − p'| of the probabilities.
    """
    backgrounds = data.backgrounds(count)
    order = others(count, torch.Generator().manual_seed(data.seed))
    model.eval()
    with torch.no_grad():
        before = model(data.images[:count]).softmax(1)
        found: dict[str, Any] = {}
        for name, images in (("swap", data.on(backgrounds[order])), ("erase", backgrounds)):
            after = model(images).softmax(1)
            found[f"{name}_changed"] = float((before.argmax(1) != after.argmax(1)).double().mean())
            found[f"{name}_distance"] = float((before - after).abs().sum(1).double().mean() / 2)
    return found
