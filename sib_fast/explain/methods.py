"""Eight explanation methods behind one call. All but one are Captum's and pytorch-grad-cam's; what is here is the dress.

Guided backpropagation is here: Captum's finds nn.ReLU modules alone, and is the plain gradient of a network without them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from sib_fast import _checks
from sib_fast._copy import copy_of
from sib_fast.network_checks import nodes_of
from sib_fast.nn import restore

_OP = "explain"
# The paper's list of six methods is not public. We report these six; `input_x_gradient` and `layer_cam` are on offer too.
REPORTED = ("saliency", "integrated_gradients", "smoothgrad", "guided_backprop", "grad_cam", "grad_cam_plusplus")


def explain(
    model: nn.Module,
    x: Tensor,
    target: Tensor | int | None = None,
    method: str = "saliency",
    *,
    layer: str | nn.Module | None = None,
    **options: Any,
) -> Tensor:
    """Where the network's evidence for a class lies, by one of `METHODS`: one non-negative map per image.

    The model is not touched: a copy of it is explained, in eval mode, with the package's layers replaced by the PyTorch layers
    they stand for and in-place activations out of place. What the model keeps of earlier forward passes is copied without its
    graph. Works under no_grad and inference_mode, before and after `SIBLoss.attach`, and on models under DDP and torch.compile,
    whose inner module is explained.

    Shapes:  x [N, C, H, W] floating point -> float32 [N, 1, H, W], detached, on x's device.
    Scale:   saliency, smoothgrad, guided_backprop: greatest |gradient| over channels of the class's logit;
             input_x_gradient, integrated_gradients: |sum over channels|; the CAMs: as defined by their papers, resized to the
             image bilinearly. Not normalised: scales differ between methods, images and networks.
    Args:    target: class indices int64 [N], one index for all, or None for the predicted class; of a network with one logit z,
             class 1 is explained by z and class 0 by −z. layer: for the CAMs, a module or
             its name, default `find_layer`; if it runs several times, its last output. options: the method's own.
             integrated_gradients: n_steps=32, baselines=0 (the value that stands for "nothing", 0 is the mean image of
             normalised data), internal_batch_size=max(N, min(8·N, 16)), the images in one pass.
             smoothgrad: n_samples=16, noise=0.15 (standard deviation in units of the range of each image), seed=0.
    Errors:  TypeError, ValueError for bad arguments; UndefinedMethodError, a ValueError, where the method means nothing for this
             network: a CAM without a feature map, guided backpropagation without a rectifier. ImportError that names the extra.
             A warning where guided backpropagation leaves other activations as they are.
    Source:  Simonyan 2013; Shrikumar 2016; Sundararajan 2017; Smilkov 2017; Springenberg 2014; Selvaraju 2017;
             Chattopadhay 2018; Jiang 2021.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_OP}: model must be a torch.nn.Module, got {type(model).__name__}")
    _checks.require_map(_OP, "x", x)
    _checks.require_choice(_OP, "method", method, tuple(METHODS))
    is_cam = method in _CAMS
    if layer is not None and not is_cam:
        raise ValueError(f"{_OP}: layer must be None for method {method!r}, got {layer!r}: only CAMs look at a layer")
    with torch.inference_mode(False), torch.enable_grad():
        name = _name_of(model, layer)
        with _quiet():
            plain = _plain_copy(model)
            x = x.detach().clone()
            labels = _labels(plain, x, target)
        if method == "guided_backprop":
            attribution = METHODS[method](plain, x, labels, **options)
        elif is_cam:
            with _quiet():
                module = plain.get_submodule(_find(plain, x[:1]) if name is None else _require_feature_map(plain, x[:1], name))
                attribution = METHODS[method](plain, x, labels, module, **options)
        else:
            with _quiet():
                attribution = METHODS[method](plain, x, labels, **options)
    return attribution.detach().to(torch.float32)


class UndefinedMethodError(ValueError):
    """The method has no meaning for this network."""


@contextmanager
def _quiet() -> Iterator[None]:
    """The libraries' notes on hooks that they set and remove themselves are nobody's business."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def find_layer(model: nn.Module, x: Tensor) -> nn.Module:
    """The module whose output is the last feature map before pooling: what CAMs are taken at unless a layer is named.

    Found by running a copy of the model in eval mode on x [1, C, H, W]: of the modules that run once, the last to finish with
    an output [N, C', H', W'], H'·W' > 1.

    Errors:  UndefinedMethodError, a ValueError, if there is none, or if tokens come after it (transformers have no feature map
             to weight).
    """
    with torch.inference_mode(False), _quiet():
        name = _find(_plain_copy(model), x.detach().clone())
    return {_plain_name(n): module for n, module in _inner(model).named_modules()}[name]


def _find(plain: nn.Module, x: Tensor) -> str:
    names = {module: name for name, module in plain.named_modules()}
    runs = dict.fromkeys(names, 0)
    found: list[tuple[nn.Module, bool]] = []

    def record(module: nn.Module, _: Any, output: Any) -> None:
        runs[module] += 1
        if isinstance(output, Tensor) and output.is_floating_point() and not isinstance(module, _POOLING):
            if output.ndim == 4 and output.shape[2] * output.shape[3] > 1:
                found.append((module, True))
            elif output.ndim == 3:
                found.append((module, False))

    handles = [module.register_forward_hook(record) for module in names if module is not plain]
    try:
        with torch.no_grad():
            plain(x)
    finally:
        for handle in handles:
            handle.remove()
    tokens = found and not found[-1][1]
    # A module that runs several times, such as an activation that all blocks share, is many places of the network.
    once = [module for module, is_map in found if is_map and runs[module] == 1]
    if tokens or not once:
        what = "tokens follow its last feature map" if tokens else "no module that runs once returns [N, C, H, W]"
        raise UndefinedMethodError(
            f"{_OP}: layer must be given for this network, got None and {what}: pass layer=<a module or its name> whose "
            "output is [N, C, H, W], or use a gradient method"
        )
    return names[once[-1]]


# VGG pools to a fixed size: another sampling of the map before it.
_POOLING = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


def _inner(model: nn.Module) -> nn.Module:
    """The user's own module in the wrappers of DDP, DataParallel and torch.compile."""
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
        elif type(model).__name__ == "OptimizedModule":
            model = model._orig_mod
        else:
            return model


def _plain_name(name: str) -> str:
    """A module's name in the copy, where compiled children stand without their wrapper."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _name_of(model: nn.Module, layer: str | nn.Module | None) -> str | None:
    """The layer's name in the model: the copy has a module of that name."""
    if layer is None:
        return None
    modules = dict(_inner(model).named_modules())
    for name, module in modules.items():
        if name and (layer in (name, _plain_name(name)) if isinstance(layer, str) else module is layer):
            return _plain_name(name)
    got = repr(layer) if isinstance(layer, str) else type(layer).__name__
    raise ValueError(f"{_OP}: layer must be one of the model's modules or a name in model.named_modules(), got {got}")


def _require_feature_map(model: nn.Module, x: Tensor, name: str) -> str:
    """The name, of a module whose output must be what a CAM can weight."""
    outputs: list[Any] = []
    module = model.get_submodule(name)
    handle = module.register_forward_hook(lambda _, inputs, output: outputs.append(output))
    try:
        with torch.no_grad():
            model(x)
    finally:
        handle.remove()
    if not outputs:
        raise ValueError(f"{_OP}: layer must run in a forward pass in eval mode, got {name!r}, which does not")
    output = outputs[-1]
    if not isinstance(output, Tensor) or output.ndim != 4 or not output.is_floating_point():
        got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"{_OP}: layer must return a floating-point [N, C, H, W] tensor, got {got} from {name!r}")
    return name


def _plain_copy(model: nn.Module) -> nn.Module:
    model, instead = _inner(model), {}
    for module in model.modules():
        if _inner(module) is not module and id(module) not in instead:
            instead[id(module)] = copy_of(_inner(module), instead)
    plain = restore(copy_of(model, instead)).eval()
    for module in plain.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False
    plain.register_forward_hook(_class_logits)
    return plain


def _class_logits(model: nn.Module, inputs: Any, output: Any) -> Any:
    """One logit z as those of its two classes, −z and z: what speaks for class 0 speaks against z."""
    one = isinstance(output, Tensor) and output.ndim == 2 and output.shape[1] == 1
    return torch.cat([-output, output], dim=1) if one else None


def _labels(model: nn.Module, x: Tensor, target: Tensor | int | None) -> Tensor:
    with torch.no_grad():
        logits = model(x)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != x.shape[0]:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{_OP}: model must return logits [N, classes], got {got}")
    if target is None:
        return logits.argmax(dim=1)
    if isinstance(target, int):
        target = torch.full((x.shape[0],), target)
    _checks.require_tensor(_OP, "target", target)
    if target.dtype != torch.int64:
        raise TypeError(f"{_OP}: target must be int64 class indices, got {target.dtype}")
    _checks.require_same_shape(_OP, "target", target, "x", x.shape[:1])
    if target.min() < 0 or target.max() >= logits.shape[1]:
        raise ValueError(f"{_OP}: target must lie in [0, {logits.shape[1]}), got {int(target.min())} … {int(target.max())}")
    return target.to(x.device)


def _captum() -> Any:
    _checks.require_package(_OP, "captum", "explain")
    import captum.attr

    return captum.attr


def _greatest(gradient: Tensor) -> Tensor:
    return gradient.abs().amax(dim=1, keepdim=True)


def _saliency(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    return _greatest(_captum().Saliency(model).attribute(x, target=labels, abs=False))


def _input_x_gradient(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    return _captum().InputXGradient(model).attribute(x, target=labels).sum(dim=1, keepdim=True).abs()


def _integrated_gradients(
    model: nn.Module, x: Tensor, labels: Tensor, n_steps: int = 32, baselines: Any = 0, internal_batch_size: int | None = None
) -> Tensor:
    method = _captum().IntegratedGradients(model)
    # A pass keeps its graph: 64 images of 224 px through EfficientNet-Lite0 took 5.7 GB of a CPU's memory.
    at_once = internal_batch_size or max(len(x), min(len(x) * 8, 16))
    maps = method.attribute(x, baselines, target=labels, n_steps=n_steps, internal_batch_size=at_once)
    return maps.sum(dim=1, keepdim=True).abs()


def _smoothgrad(model: nn.Module, x: Tensor, labels: Tensor, n_samples: int = 16, noise: float = 0.15, seed: int = 0) -> Tensor:
    captum = _captum()
    spread = noise * (x.amax(dim=(1, 2, 3)) - x.amin(dim=(1, 2, 3)))
    maps = torch.zeros_like(x)
    with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
        torch.manual_seed(seed)
        # Captum's noise is float32 and would make a half-precision image float32.
        tunnel = captum.NoiseTunnel(captum.Saliency(lambda noisy: model(noisy.to(x.dtype))))
        # Captum takes one deviation for the batch; ours is relative to each image.
        for i in range(len(x)):
            maps[i : i + 1] = tunnel.attribute(
                x[i : i + 1],
                nt_type="smoothgrad",
                nt_samples=n_samples,
                stdevs=float(spread[i]),
                target=labels[i : i + 1],
                abs=False,
            )
    return _greatest(maps)


# Names of autograd nodes. Of a rectifier the derivative is 0 or 1, so that only "positive gradients pass" is left to add.
_RECTIFIERS = ("ReluBackward", "HardtanhBackward", "ThresholdBackward")
_OTHER_ACTIVATIONS = tuple(
    f"{name}Backward"
    for name in (
        "LeakyRelu",
        "PreluKernel",
        "RreluWithNoise",
        "Elu",
        "Gelu",
        "Silu",
        "Mish",
        "Softplus",
        "Hardswish",
        "LogSigmoid",
    )
)


def _guided_backprop(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """In the autograd graph, where a rectifier is one whether a module or a function made it."""
    x.requires_grad_()
    logits = model(x).gather(1, labels[:, None]).sum()
    nodes = {node: node.name() for node in nodes_of(logits.grad_fn)}
    guided = [node for node, name in nodes.items() if name.startswith(_RECTIFIERS)]
    others = sorted({name.partition("Backward")[0] for name in nodes.values() if name.startswith(_OTHER_ACTIVATIONS)})
    if not guided:
        got = ", ".join(others) or "none"
        raise UndefinedMethodError(
            f"{_OP}: model must run ReLU, ReLU6, Hardtanh or Threshold for method 'guided_backprop', got {got}: without a "
            "rectifier it would be the plain gradient, which is method 'saliency'"
        )
    if others:
        warnings.warn(
            f"{_OP}: guided_backprop is defined for rectifiers only: {', '.join(others)} pass the plain gradient", stacklevel=3
        )
    for node in guided:
        node.register_prehook(lambda gradients: tuple(None if g is None else g.relu() for g in gradients))
    return _greatest(torch.autograd.grad(logits, x)[0])


def _cam(name: str) -> Callable[[nn.Module, Tensor, Tensor, nn.Module], Tensor]:
    def compute(model: nn.Module, x: Tensor, labels: Tensor, layer: nn.Module) -> Tensor:
        _checks.require_package(_OP, "grad-cam", "explain", "pytorch_grad_cam")
        import pytorch_grad_cam
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        targets = [ClassifierOutputTarget(int(label)) for label in labels]
        with getattr(pytorch_grad_cam, name)(model=model, target_layers=[layer]) as cam:
            # Not cam(x, targets): that shifts and stretches every map to [0, 1] by its own range, which moves the zero.
            # The features of a frozen network have a gradient only if the image has.
            outputs = cam.activations_and_grads(x.requires_grad_())
            sum(target(output) for target, output in zip(targets, outputs, strict=True)).backward()
            recorded = cam.activations_and_grads
            # Both lists are in the order of the forward pass, one entry for each time that the module ran.
            parts = (recorded.activations[-1], recorded.gradients[-1])
            activations, gradients = (
                part.detach().to("cpu", torch.promote_types(part.dtype, torch.float32)).numpy() for part in parts
            )
            maps = torch.as_tensor(cam.get_cam_image(x, layer, targets, activations, gradients, False), device=x.device)
        return F.interpolate(maps.relu()[:, None], x.shape[2:], mode="bilinear", align_corners=False)

    return compute


_CAMS = ("grad_cam", "grad_cam_plusplus", "layer_cam")
METHODS: dict[str, Callable] = {
    "saliency": _saliency,
    "input_x_gradient": _input_x_gradient,
    "integrated_gradients": _integrated_gradients,
    "smoothgrad": _smoothgrad,
    "guided_backprop": _guided_backprop,
    "grad_cam": _cam("GradCAM"),
    "grad_cam_plusplus": _cam("GradCAMPlusPlus"),
    "layer_cam": _cam("LayerCAM"),
}
