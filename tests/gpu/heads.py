"""What the GPU tests run: each op and the head, forward and backward, as a function of their inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.baselines import hsic_objective, natural_inputs, our_head
from sib_fast import foreground_mask, region_statistics
from sib_fast.ops.activation import activation
from sib_fast.ops.batch_norm import batch_norm
from sib_fast.ops.layer_norm import group_norm, layer_norm
from sib_fast.ops.softmax import softmax
from tests import selection

WINDOW = 9
Parts = Iterator[list[Tensor]]


def inputs(images: int, channels: int, height: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0):
    """vjp, x, mask, cotangent of the mask: the same numbers on every device."""
    like = {"generator": torch.Generator("cpu").manual_seed(seed), "device": "cpu"}
    noise, x = (torch.randn(images, channels, height, width, **like) for _ in range(2))
    mask, cotangent = torch.rand(images, 1, height, width, **like), torch.randn(images, 1, height, width, **like)
    vjp = 1e-4 * torch.nn.functional.avg_pool2d(noise, 3, stride=1, padding=1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    made = vjp.to(dtype), x.to(dtype), mask.to(wide), cotangent.to(wide)
    return tuple(t.to(torch.get_default_device()) for t in made)


# Each of these yields what a forward pass gives, then what a backward pass does: the parity of one does not run the other.


def mask_parts(vjp: Tensor, x: Tensor, mask: Tensor, cotangent: Tensor, *, backend: str) -> Parts:
    leaf = vjp.detach().requires_grad_()
    out = foreground_mask(leaf, window_size=WINDOW, backend=backend)
    yield [out.detach()]
    yield [*torch.autograd.grad(out, leaf, cotangent.to(out.dtype))]


def statistics_parts(vjp: Tensor, x: Tensor, mask: Tensor, cotangent: Tensor, *, backend: str, **options) -> Parts:
    leaves = [t.detach().requires_grad_() for t in (vjp, x, mask)]
    out = [t for t in region_statistics(*leaves, background_grams=True, backend=backend, **options) if t is not None]
    yield [t.detach() for t in out]
    weights = [torch.cos(torch.arange(t.numel(), dtype=t.dtype, device=t.device)).view(t.shape) for t in out]
    yield [*torch.autograd.grad(out, leaves, weights)]


def objective_parts(vjp: Tensor, x: Tensor, mask: Tensor, cotangent: Tensor, *, backend: str) -> Parts:
    rows = vjp.double().flatten(1), x.double().flatten(1)
    leaves = [(r @ r.mT).requires_grad_() for r in rows] + [rows[0].var(dim=1).requires_grad_()]
    base = torch.ones((), dtype=torch.float64, device=vjp.device)
    out = hsic_objective(base, *leaves, lambda_fg=0.01, lambda_bg=1000.0, backend=backend)
    yield [t.detach() for t in out]
    yield [*torch.autograd.grad(out[0], leaves)]


def head_parts(vjp: Tensor, x: Tensor, mask: Tensor, cotangent: Tensor, *, backend: str) -> Parts:
    leaf = vjp.detach().requires_grad_()
    value = our_head(leaf, x, backend)
    yield [value.detach()]
    yield [*torch.autograd.grad(value, leaf)]


def batch_norm_parts(vjp: Tensor, x: Tensor, mask: Tensor, cotangent: Tensor, *, backend: str) -> Parts:
    """The second part: gradient and double backward; so below."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight, bias = (torch.linspace(a, 2.0, x.shape[1], dtype=wide, device=x.device).requires_grad_() for a in (0.5, -1.0))
    leaf = x.detach().requires_grad_()
    y = batch_norm(leaf, weight, bias, backend=backend)[0]
    yield [y.detach()]
    first = torch.autograd.grad(y, (leaf, weight, bias), 1e4 * vjp, create_graph=True)
    yield [*(t.detach() for t in first), *torch.autograd.grad(first[0], (leaf, weight), torch.cos(x))]


def layer_norm_parts(vjp: Tensor, x: Tensor, mask: Tensor, cotangent: Tensor, *, backend: str) -> Parts:
    """A group norm, and layer norms over the channels, the width and an image."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    made = []
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
        made.append((y, leaf, weight, bias, maps))
    yield [y.detach() for y, *_ in made]
    found = []
    for y, leaf, weight, bias, maps in made:
        first = torch.autograd.grad(y, (leaf, weight, bias), maps[1], create_graph=True)
        found += [*(t.detach() for t in first), *torch.autograd.grad(first[0], (leaf, weight), maps[2])]
    yield found


def softmax_parts(vjp: Tensor, x: Tensor, mask: Tensor, cotangent: Tensor, *, backend: str) -> Parts:
    """Along short rows and long ones. The first two passes are PyTorch's: only the double backward has a kernel."""
    leaves = [rows.detach().requires_grad_() for rows in (x, x.flatten(1))]
    made = [softmax(leaf, backend=backend) for leaf in leaves]
    yield [y.detach() for y in made]
    found = []
    for leaf, y in zip(leaves, made, strict=True):
        (first,) = torch.autograd.grad(y, leaf, 1e4 * vjp.reshape(y.shape), create_graph=True)
        found += torch.autograd.grad(first, leaf, torch.cos(leaf.detach()))
    yield found


def activation_parts(vjp: Tensor, x: Tensor, mask: Tensor, cotangent: Tensor, *, backend: str) -> Parts:
    """Forward, backward and double backward by bits; the double backward of the rest."""
    grad, made = (1e4 * vjp).requires_grad_(), []
    for kind, parameters in (("relu", ()), ("hardtanh", (0.0, 1.0)), ("leaky_relu", (0.1,))):
        leaf = x.detach().requires_grad_()
        made.append((activation(leaf, kind, *parameters, backend=backend), leaf, grad))
    yield [y.detach() for y, *_ in made]
    for kind in ("silu", "gelu", "softplus"):
        leaf = x.detach().requires_grad_()
        parameters = (1.0, 20.0) if kind == "softplus" else ()
        made.append((activation(leaf, kind, *parameters, backend=backend), leaf, leaf))
    found = []
    for y, leaf, of in made:
        (first,) = torch.autograd.grad(y, leaf, grad, create_graph=True)
        found += [first.detach(), *torch.autograd.grad(first, of, torch.cos(x))]
    yield found


def whole(parts: Callable[..., Parts]) -> Callable[..., list[Tensor]]:
    """Both parts, one after the other."""
    return lambda *inputs, **options: [tensor for part in parts(*inputs, **options) for tensor in part]


PARTS: dict[str, Callable[..., Parts]] = {
    "foreground_mask": mask_parts,
    "region_statistics": statistics_parts,
    "head": head_parts,
    **({} if hsic_objective is None else {"hsic_objective": objective_parts}),
    # of sib_fast.nn
    "batch_norm": batch_norm_parts,
    "activation": activation_parts,
    "layer_norm": layer_norm_parts,
    "softmax": softmax_parts,
}
LAYERS = ("batch_norm", "activation", "layer_norm", "softmax")
statistics_step = whole(statistics_parts)
STEPS = {name: whole(parts) for name, parts in PARTS.items() if name not in LAYERS}


def has_kernels(backend: str, part: str) -> bool:
    """Whether `backend` has a kernel of this op, or of every op of the head."""
    return backend in selection.kernels_of(*(selection.HEAD if part == "head" else (part,)))


def steps(backend: str) -> dict[str, Callable[..., list[Tensor]]]:
    """Every step that has a kernel of this backend."""
    return {name: whole(parts) for name, parts in PARTS.items() if has_kernels(backend, name)}


__all__ = ["LAYERS", "PARTS", "STEPS", "WINDOW", "has_kernels", "inputs", "natural_inputs", "statistics_step", "steps"]
