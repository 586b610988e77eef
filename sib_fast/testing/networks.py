"""Small networks that can be differentiated twice, and one S-IB step in plain PyTorch: what the loss is tested against.

The step is written from SPEC 2-5 alone, after the authors' order of operations: full sorts, avg_pool2d, the normalised map
with its own quantile, explicit centring matrices. It shares no line with the package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_net(channels: int = 3, classes: int = 5, norm: str = "batch", seed: int = 0) -> nn.Sequential:
    """Two convolutions with normalisation and SiLU, a pooled head with a gain that keeps softmax away from uniform.

    Shapes:  [N, channels, H, W] -> [N, classes]; any H, W >= 1. norm: "batch", "group" or "none". The same weights for every
             default device.
    """
    with torch.device("cpu"):
        net = _conv_net(channels, classes, norm, seed)
    return net.to(torch.get_default_device())


def _conv_net(channels: int, classes: int, norm: str, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)

    def normalisation(width: int) -> nn.Module:
        return {"batch": nn.BatchNorm2d(width), "group": nn.GroupNorm(2, width), "none": nn.Identity()}[norm]

    net = nn.Sequential(
        nn.Conv2d(channels, 6, 3, padding=1, bias=norm == "none"),
        normalisation(6),
        nn.SiLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=norm == "none"),
        normalisation(8),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, classes),
    )
    with torch.no_grad():
        net[-1].weight.mul_(3.0)
    return net


class KeywordNet(nn.Module):
    """A network called as Hugging Face's are: `net(pixel_values=x)`. Shapes: [N, 3, H, W] -> [N, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = conv_net(norm="group")

    def forward(self, pixel_values: Tensor, flag: bool = True) -> Tensor:
        return self.body(pixel_values)


class AttentionNet(nn.Module):
    """Patches, one scaled_dot_product_attention, a head. Shapes: [N, 3, 8, 8] -> [N, 5]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 24, 2, stride=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2).contiguous()  # strided tokens would take the math kernel
        query, key, value = tokens.view(*tokens.shape[:2], 1, 24).transpose(1, 2).chunk(3, dim=-1)
        return self.head(F.scaled_dot_product_attention(query, key, value).mean(dim=2).flatten(1))


class CheckpointNet(nn.Module):
    """A network whose body is recomputed in backward. Shapes: [N, 3, H, W] -> [N, 5]."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.body = conv_net(norm="group")
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=self.use_reentrant)


def image_batch(images: int = 6, channels: int = 3, height: int = 12, width: int = 11, classes: int = 5, seed: int = 1):
    """Smooth random images and class indices, the same numbers for every default device.

    Shapes:  float32 [images, channels, height, width], int64 [images].
    """
    like = {"generator": torch.Generator("cpu").manual_seed(seed), "device": "cpu"}
    coarse = torch.randn(images, channels, 4, 4, **like)
    x = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)
    x = x + 0.3 * torch.randn(images, channels, height, width, **like)
    target = torch.randint(0, classes, (images,), **like)
    return x.to(torch.get_default_device()), target.to(torch.get_default_device())


def plain_soft_quantile(values: Tensor, level: float, temperature: float) -> Tensor:
    """Q_q(v) = sum_k softmax_k(-|k - q(P-1)|/temperature) v_(k), by a full sort. Shapes: [N, P] -> [N, 1]."""
    pixels = values.shape[1]
    ranks = torch.arange(pixels, dtype=torch.float64, device=values.device)
    weights = torch.softmax(-(ranks - level * (pixels - 1)).abs() / temperature, dim=0).to(values.dtype)
    return (torch.sort(values, dim=1, stable=True).values * weights).sum(dim=1, keepdim=True)


def plain_mask(vjp: Tensor, window_size: int = 31, temperature: float = 0.1, slope: float = 10.0) -> Tensor:
    """SPEC 3 with the normalised map u and its own quantile. Shapes: [N, C, H, W] -> [N, 1, H, W]."""
    images, _, height, width = vjp.shape
    g = vjp.mean(dim=1).abs().reshape(images, -1)
    lo, hi = plain_soft_quantile(g, 0.05, temperature), plain_soft_quantile(g, 0.95, temperature)
    u = (g - lo) / (F.relu(hi - lo) + 1e-8)
    h = torch.sigmoid(slope * (u - plain_soft_quantile(u, 0.8, temperature))).reshape(images, 1, height, width)
    d = F.avg_pool2d(h, window_size, stride=1, padding=window_size // 2, count_include_pad=True)
    t = plain_soft_quantile(d.reshape(images, -1), 0.8, temperature)
    return torch.sigmoid(slope * (d - t.reshape(images, 1, 1, 1)))


def plain_hsic(rows: Tensor, others: Tensor) -> Tensor:
    """tr(K Z L Z)/(N-1)^2 of L2-normalised rows, with the centring matrix Z. Shapes: [N, D], [N, D] -> []."""
    images = rows.shape[0]
    like = {"dtype": rows.dtype, "device": rows.device}
    centring = torch.eye(images, **like) - torch.ones(images, images, **like) / images
    rows, others = F.normalize(rows, dim=1), F.normalize(others, dim=1)
    return torch.trace(rows @ rows.T @ centring @ others @ others.T @ centring) / (images - 1) ** 2


class PlainStep(NamedTuple):
    """What one plain step computes: 0-d terms, and x (its leaf), vjp [N, C, H, W], mask [N, 1, H, W]."""

    loss: Tensor
    base: Tensor
    foreground: Tensor
    background: Tensor
    x: Tensor
    vjp: Tensor
    mask: Tensor


def plain_step(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    target: Tensor,
    *,
    lambda_fg: float = 0.01,
    lambda_bg: float = 1000.0,
    window_size: int = 31,
    mask: Tensor | None = None,
    base_loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> PlainStep:
    """loss = base + lambda_bg exp(bg) + lambda_fg exp(-fg) of the energy VJP, every derivative by autograd.

    Shapes:  x [N, C, H, W], model(x) [N, K], target as base_loss takes it; a given mask [N, 1, H, W] replaces the density.
    """
    x = x.detach().clone().requires_grad_()
    logits = model(x)
    energy = 0.5 * (torch.softmax(logits, dim=1) ** 2).sum()
    (vjp,) = torch.autograd.grad(energy, x, create_graph=True)
    mask = plain_mask(vjp, window_size) if mask is None else mask
    image = x.detach()
    foreground = plain_hsic((vjp * mask).flatten(1), (image * mask).flatten(1))
    background = (vjp * (1 - mask)).flatten(1).var(dim=1, unbiased=True).mean()
    base = base_loss(logits, target)
    loss = base + lambda_bg * torch.exp(background) + lambda_fg * torch.exp(-foreground)
    return PlainStep(loss, base, foreground, background, x, vjp, mask)


class MappedNet(nn.Module):
    """A trunk whose output is a feature map that is 0 where nothing is, and a head. Shapes: [N, 3, H, W] -> [N, classes].

    head: "linear", pooled to 2×2; "bent", with a ReLU between two linear layers; "mean", a global average.
    """

    def __init__(self, head: str = "linear", classes: int = 5, norm: str = "batch", seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        normalise = {"batch": nn.BatchNorm2d, "group": lambda width: nn.GroupNorm(2, width)}[norm]
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, bias=False),
            normalise(6),
            nn.SiLU(),
            nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False),
            normalise(8),
            nn.ReLU(),
        )
        pool: list[nn.Module] = [nn.AdaptiveAvgPool2d(1 if head == "mean" else 2), nn.Flatten()]
        width = 8 if head == "mean" else 32
        bend: list[nn.Module] = [nn.Linear(width, width), nn.ReLU()] if head == "bent" else []
        self.head = nn.Sequential(*pool, *bend, nn.Linear(width, classes))
        with torch.no_grad():
            self.head[-1].weight.mul_(3.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))


def plain_cells(mask: Tensor, height: int, width: int) -> Tensor:
    """The greatest value in every cell, cell i from floor(iH/h) to ceil((i+1)H/h). Shapes: [N, 1, H, W] -> [N, 1, h, w]."""
    rows, columns = mask.shape[2:]
    cells = mask.new_zeros((*mask.shape[:2], height, width))
    for i in range(height):
        for j in range(width):
            down = slice(i * rows // height, -(-(i + 1) * rows // height))
            across = slice(j * columns // width, -(-(j + 1) * columns // width))
            cells[:, :, i, j] = mask[:, :, down, across].amax(dim=(2, 3))
    return cells


def plain_evidence(
    features: Tensor,
    logits: Tensor,
    scalar: Tensor,
    *,
    kind: str,
    form: str,
    x: Tensor | None = None,
    window_size: int = 31,
    mask: Tensor | None = None,
    annotated: Tensor | None = None,
    target_area: float = 0.0,
    normalise: bool = True,
) -> Tensor:
    """SPEC 11 by autograd, image by image: the mean of the area or the background share of the evidence at a map.

    Shapes:  features [N, C, h, w], logits [N, K], scalar 0-d; x [N, C', H, W], where the mask is of its VJP; mask [N, 1, H, W]
             given, for the images that are annotated [N].
    """
    (cotangent,) = torch.autograd.grad(scalar, logits, create_graph=True)
    if normalise:
        cotangent = cotangent / cotangent.detach().norm(dim=1, keepdim=True)
    (vjp,) = torch.autograd.grad(logits, features, cotangent, create_graph=True)
    product = vjp * features
    evidence = {"rectified": F.relu(product.sum(1)), "absolute": product.abs().sum(1), "squared": (vjp * vjp).sum(1)}[form]
    cells = None
    if kind == "share":
        given = None if mask is None else plain_cells(mask.double(), *features.shape[2:])
        own = None
        if given is None or not (annotated is None or bool(annotated.all())):
            (at_image,) = torch.autograd.grad(logits, x, cotangent.detach(), retain_graph=True)
            own = plain_cells(plain_mask(at_image, window_size), *features.shape[2:])
        has = torch.ones(len(logits), dtype=torch.bool) if annotated is None else annotated
        cells = torch.stack([given[i] if given is not None and has[i] else own[i] for i in range(len(logits))])
    values = []
    for i in range(len(logits)):
        if evidence[i].sum() == 0:
            continue
        q = evidence[i] / evidence[i].sum()
        if kind == "share":
            values.append(((1 - cells[i, 0]) * q).sum())
        else:
            values.append(F.relu(1 / (q.numel() * (q * q).sum()) - target_area))
    return sum(values) / len(values)


def parameter_gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """d loss/d parameter for every named parameter, zeros where the loss does not depend on one."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, grads, strict=True)}


def relative_error(got: Tensor, exact: Tensor) -> float:
    """||got - exact||/||exact|| in float64; the absolute norm of got where exact is zero."""
    got, exact = got.detach().double(), exact.detach().double()
    size = float(exact.norm())
    return float((got - exact).norm()) / (size if size > 0 else 1.0)
