"""What `SIBLoss.attach` puts on a model: hooks, and the input or feature map of the latest active forward that they captured.

The hooks hold weak references and copies of them are inert: a model may hold its criterion, be copied and pickled.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sib_fast.vjp import vjp_leaf

_OP = "SIBLoss"


def layer_of(model: nn.Module, layer: str | nn.Module) -> nn.Module:
    modules = dict(model.named_modules(remove_duplicate=False))
    found = modules.get(layer) if isinstance(layer, str) else layer
    if not any(found is module for module in modules.values()) or found is model:
        wanted = repr(layer) if isinstance(layer, str) else type(layer).__name__
        names = ", ".join(name for name, _ in model.named_children())
        raise ValueError(
            f"{_OP}.attach: layer must be one of the model's modules, got {wanted}; its first level: {names or 'none'}"
        )
    return found


class Attachment:
    """One criterion's hold on one model: the hooks, and the input of the latest active forward (only the latest).

    criterion: a SIBLoss, of which only `active` is read.
    captured: None before the first; then a function that returns the input, or None once nothing needs it. The graph of the
    logits keeps our own leaf alive, so that a weak reference lasts exactly as long as a loss can be made of it. image_size:
    with a layer, height and width of the image that the latest feature map comes from.

    A model may change what it is given in place (`x.sub_(mean)`, a first `ReLU(inplace=True)`), which a leaf refuses and the
    caller's tensor must not see. So it is given a copy, and none any more once a loss finds the copy unchanged.
    """

    def __init__(self, criterion: nn.Module, model: nn.Module, layer: nn.Module | None = None) -> None:
        # Weak, so that criterion and model do not keep each other alive and a model may hold its criterion as a submodule.
        self._model = weakref.ref(model)
        self.of_layer = layer is not None
        self.captured: Callable[[], Tensor | None] | None = None
        self.image_size: tuple[int, int] | None = None
        self.is_paused = False
        self._hands_copies = True
        self._copy: Tensor | None = None  # of the latest forward pass, until its loss has looked at it
        if layer is None:
            handles = [model.register_forward_pre_hook(_InputCapture(self, criterion), with_kwargs=True)]
        else:
            handles = [
                model.register_forward_pre_hook(_ImageSize(self, criterion), with_kwargs=True),
                layer.register_forward_hook(_FeatureCapture(self, criterion)),
            ]
        # A criterion that goes without remove(), as when a notebook's cell runs again, takes its hooks along.
        self._remove = weakref.finalize(criterion, _remove, handles)
        self._remove.atexit = False

    def training(self) -> bool:
        model = self._model()
        if model is None:
            raise RuntimeError(f"{_OP}: the attached model no longer exists; call remove(), then attach() to the new one")
        return model.training

    def holds(self, model: nn.Module) -> bool:
        return self._model() is model

    def is_held_by_model(self, criterion: nn.Module) -> bool:
        """Whether the criterion is a submodule of the model, so that `model.eval()` reaches it."""
        model = self._model()
        return model is not None and any(module is criterion for module in model.modules())

    def handed_on(self, captured: Tensor) -> Tensor:
        """What the model goes on with in the place of what was captured: that itself, or a copy that it may change."""
        if not self._hands_copies:
            return captured
        self._copy = captured.clone()
        return self._copy

    def input_of(self, logits: Tensor) -> Tensor:
        """What was captured in the forward pass that made these logits; RuntimeError where there is nothing."""
        if self._copy is not None:
            self._hands_copies, self._copy = self._copy._version > 0, None
        if self.captured is None and self.image_size is not None:
            raise RuntimeError(
                f"{_OP}: the attached layer must have run since the latest loss, and it has not: a feature map serves one loss, "
                "and the model's forward pass must reach the layer"
            )
        if self.captured is None:
            raise RuntimeError(
                f"{_OP}: no input was captured: the attached model has not run forward in training mode with grad enabled "
                "since attach(). Run the model itself (not a copy of it), or pass x"
            )
        x = self.captured()
        if x is None:
            # Only a graph holds the captured input: its own forward's graph is gone, or was never there.
            if not logits.requires_grad:
                raise RuntimeError(
                    f"{_OP}: logits must have a graph, got logits that do not require grad: run the forward pass "
                    "with grad enabled"
                )
            raise RuntimeError(
                f"{_OP}: logits must be computed by the attached model's latest forward pass in training mode, got "
                "logits of another graph, or the model detaches its input"
            )
        return x

    def release(self) -> None:
        """Lets go of a feature map, which would hold the graph below it until the next forward pass."""
        if self.of_layer:
            self.captured = None

    def remove(self) -> None:
        self._remove()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within it nothing is captured: the caller passes x itself."""
        self.is_paused = True
        try:
            yield
        finally:
            self.is_paused = False


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


class _Capture:
    """A hook of an attachment. A deep copy or an unpickled one is inert: it belongs to a model that nobody attached."""

    def __init__(self, attachment: Attachment | None = None, criterion: nn.Module | None = None) -> None:
        self._attachment = None if attachment is None else weakref.ref(attachment)
        self._criterion = None if criterion is None else weakref.ref(criterion)

    def __deepcopy__(self, memo: dict) -> _Capture:
        return type(self)()

    def __reduce__(self) -> tuple:
        return type(self), ()

    def attachment(self) -> Attachment | None:
        """The attachment, if this forward pass is one whose loss will need what the hook captures."""
        attachment = self._attachment() if self._attachment is not None else None
        criterion = self._criterion() if self._criterion is not None else None
        if attachment is None or criterion is None or attachment.is_paused or not criterion.active:
            return None
        return attachment


class _InputCapture(_Capture):
    """Forward pre-hook of the model: replaces its image by a leaf of ours, or takes one that is in a graph already."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        attachment = self.attachment()
        if attachment is None:
            return None
        key = _image_argument(args, kwargs)
        place = list(args) if isinstance(key, int) else dict(kwargs)
        value = place[key]
        if value.requires_grad:
            attachment.captured = lambda: value  # not ours: no graph need hold the tensor itself
        else:
            value = vjp_leaf(value)
            attachment.captured = weakref.ref(value)
        place[key] = attachment.handed_on(value)
        return (tuple(place), kwargs) if isinstance(place, list) else (args, place)


class _ImageSize(_Capture):
    """Forward pre-hook of the model, with a layer: the size of the image, and the start of a new forward pass."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        attachment = self.attachment()
        if attachment is None:
            return
        key = _image_argument(args, kwargs)
        attachment.image_size = tuple((args[key] if isinstance(key, int) else kwargs[key]).shape[2:])
        attachment.captured = None


class _FeatureCapture(_Capture):
    """Forward hook of the layer: takes its output. One that nothing trained lies below becomes a leaf of ours."""

    def __call__(self, module: nn.Module, args: tuple, output: object) -> Tensor | None:
        # Activation checkpointing runs the layer again inside backward passes: that map is not the loss's.
        attachment = None if torch._C._current_graph_task_id() != -1 else self.attachment()
        if attachment is None:
            return None
        if not (isinstance(output, Tensor) and output.ndim == 4 and output.is_floating_point()):
            raise RuntimeError(
                f"{_OP}: the attached layer must return a floating-point [N, C, H, W] tensor, got {_describe(output)}: "
                "choose a layer whose output is a feature map"
            )
        if attachment.captured is not None:
            raise RuntimeError(
                f"{_OP}: the attached layer must run once in a forward pass, got a second call: choose one that is not shared"
            )
        if output.requires_grad:
            attachment.captured = lambda: output
            return None
        leaf = vjp_leaf(output)
        handed = attachment.handed_on(leaf)
        # Layers in place act on the captured map, here as where something trained lies below.
        attachment.captured = weakref.ref(leaf) if handed is leaf else lambda: handed
        return handed


def _image_argument(args: tuple, kwargs: dict) -> int | str:
    """Place or name of the model's first floating-point [N, C, H, W] argument."""
    for key, value in (*enumerate(args), *kwargs.items()):
        if isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point():
            return key
    raise RuntimeError(
        f"{_OP}: the attached model must be called with a floating-point [N, C, H, W] tensor, got "
        f"{[_describe(v) for v in (*args, *kwargs.values())]}: {_advice([*args, *kwargs.values()])}"
    )


def _advice(arguments: list) -> str:
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    if any(tensor.ndim == 4 for tensor in tensors):
        return "convert integer images to float before the model"
    if tensors:
        return (
            "the rank is another: give a single image a batch dimension, x[None], and fold the slices or frames of "
            "[N, C, D, H, W] into the images or the channels"
        )
    return "pass the image as an argument of its own, not inside a list or dict, or use the explicit form"


def _describe(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
