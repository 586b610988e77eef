"""What the GPU tests run: each op and the head, forward and backward, as a function of their inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.baselines import hsic_objective, natural_inputs, our_head
from sib_fast import foreground_mask, region_statistics
from sib_fast.ops.activation import activation
from sib_fast.ops.batch_norm import batch_norm
from sib_fast.ops.layer_norm import group_norm, layer_norm
from sib_fast.ops.softmax import softmax

WINDOW = 9


def inputs(images: int, channels: int, height: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0):
    """vjp, x, mask, cotangent of the mask: the same numbers on every device."""
    like = {"generator": torch.Generator("cpu").manual_seed(seed), "device": "cpu"}
    noise, x = (torch.randn(images, channels, height, width, **like) for _ in range(2))
    mask, cotangent = torch.rand(images, 1, height, width, **like), torch.randn(images, 1, height, width, **like)
    vjp = 1e-4 * torch.nn.functional.avg_pool2d(noise, 3, stride=1, padding=1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    made = vjp.to(dtype), x.to(dtype), mask.to(wide), cotangent.to(wide)
    return tuple(t.to(torch.get_default_device()) for t in made)


def mask_step(vjp: Tensor, x: Tensor, mask: Tensor, cotangent: Tensor, *, backend: str) -> list[Tensor]:
    leaf = vjp.detach().requires_grad_()
    out = foreground_mask(leaf, window_size=WINDOW, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, leaf, cotangent.to(out.dtype))]


def statistics_step(vjp: Tensor, x: Tensor, mask: Tensor, cotangent: Tensor, *, backend: str, **options) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (vjp, x, mask)]
    out = [t for t in region_statistics(*leaves, background_grams=True, backend=backend, **options) if t is not None]
    weights = [torch.cos(torch.arange(t.numel(), dtype=t.dtype, device=t.device)).view(t.shape) for t in out]
    return [*(t.detach() for t in out), *torch.autograd.grad(out, leaves, weights)]


def objective_step(vjp: Tensor, x: Tensor, mask: Tensor, cotangent: Tensor, *, backend: str) -> list[Tensor]:
    rows = vjp.double().flatten(1), x.double().flatten(1)
    leaves = [(r @ r.mT).requires_grad_() for r in rows] + [rows[0].var(dim=1).requires_grad_()]
    base = torch.ones((), dtype=torch.float64, device=vjp.device)
    out = hsic_objective(base, *leaves, lambda_fg=0.01, lambda_bg=1000.0, backend=backend)
    return [*(t.detach() for t in out), *torch.autograd.grad(out[0], leaves)]


def head_step(vjp: Tensor, x: Tensor, mask: Tensor, cotangent: Tensor, *, backend: str) -> list[Tensor]:
    leaf = vjp.detach().requires_grad_()
    value = our_head(leaf, x, backend)
    return [value.detach(), *torch.autograd.grad(value, leaf)]


def batch_norm_step(vjp: Tensor, x: Tensor, mask: Tensor, cotangent: Tensor, *, backend: str) -> list[Tensor]:
    """Forward, gradient and double backward."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight, bias = (torch.linspace(a, 2.0, x.shape[1], dtype=wide, device=x.device).requires_grad_() for a in (0.5, -1.0))
    leaf = x.detach().requires_grad_()
    y = batch_norm(leaf, weight, bias, backend=backend)[0]
    first = torch.autograd.grad(y, (leaf, weight, bias), 1e4 * vjp, create_graph=True)
    return [y.detach(), *(t.detach() for t in first), *torch.autograd.grad(first[0], (leaf, weight), torch.cos(x))]


def layer_norm_step(vjp: Tensor, x: Tensor, mask: Tensor, cotangent: Tensor, *, backend: str) -> list[Tensor]:
    """Forward, gradient and double backward of a group norm and of layer norms over the channels, the width and an image."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    found = []
    for size in (x.shape[1], x.shape[3], x[0].numel(), None):
        columns = x.shape[1] if size is None else size
        weight, bias = (torch.linspace(a, 2.0, columns, dtype=wide, device=x.device).requires_grad_() for a in (0.5, -1.0))
        maps = [t.movedim(1, -1) if size == x.shape[1] else t for t in (x, 1e4 * vjp, torch.cos(x))]
        maps = [t.flatten(1) if size == x[0].numel() else t for t in maps]
        leaf = maps[0].detach().requires_grad_()
        if size is None:
            y = group_norm(leaf, 1, weight, bias, backend=backend)
        else:
            y = layer_norm(leaf, (size,), weight, bias, backend=backend)
        first = torch.autograd.grad(y, (leaf, weight, bias), maps[1], create_graph=True)
        found += [y.detach(), *(t.detach() for t in first), *torch.autograd.grad(first[0], (leaf, weight), maps[2])]
    return found


def softmax_step(vjp: Tensor, x: Tensor, mask: Tensor, cotangent: Tensor, *, backend: str) -> list[Tensor]:
    """Double backward along short rows and long ones."""
    found = []
    for rows in (x, x.flatten(1)):
        leaf = rows.detach().requires_grad_()
        y = softmax(leaf, backend=backend)
        (first,) = torch.autograd.grad(y, leaf, 1e4 * vjp.reshape(rows.shape), create_graph=True)
        found += torch.autograd.grad(first, leaf, torch.cos(rows))
    return found


def activation_step(vjp: Tensor, x: Tensor, mask: Tensor, cotangent: Tensor, *, backend: str) -> list[Tensor]:
    """Double backward; and forward, backward and double backward by bits."""
    found = []
    for kind, parameters in (("relu", ()), ("hardtanh", (0.0, 1.0)), ("leaky_relu", (0.1,))):
        leaf, grad = x.detach().requires_grad_(), (1e4 * vjp).requires_grad_()
        y = activation(leaf, kind, *parameters, backend=backend)
        (first,) = torch.autograd.grad(y, leaf, grad, create_graph=True)
        found += [y.detach(), first.detach(), *torch.autograd.grad(first, grad, torch.cos(x))]
    for kind in ("silu", "gelu", "softplus"):
        leaf = x.detach().requires_grad_()
        parameters = (1.0, 20.0) if kind == "softplus" else ()
        (first,) = torch.autograd.grad(activation(leaf, kind, *parameters, backend=backend), leaf, 1e4 * vjp, create_graph=True)
        found += torch.autograd.grad(first, leaf, torch.cos(x))
    return found


STEPS: dict[str, Callable[..., list[Tensor]]] = {"mask": mask_step, "statistics": statistics_step, "head": head_step}
if hsic_objective is not None:
    STEPS["objective"] = objective_step
# of sib_fast.nn; these ops have no Triton kernels
LAYER_STEPS = {
    "batch_norm": batch_norm_step,
    "activation": activation_step,
    "layer_norm": layer_norm_step,
    "softmax": softmax_step,
}


def steps(backend: str) -> dict[str, Callable[..., list[Tensor]]]:
    """Every step that has a kernel of this backend."""
    return STEPS if backend == "triton" else STEPS | LAYER_STEPS


__all__ = ["STEPS", "WINDOW", "inputs", "natural_inputs", "steps"]
