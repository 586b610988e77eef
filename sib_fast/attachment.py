"""What `attach` puts on a model: hooks, and what they captured of the latest active forward: the input, or maps.

The hooks hold weak references and copies of them are inert: a model may hold its criterion, be copied and pickled.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sib_fast.network_checks import is_compiled
from sib_fast.place import Candidate, last_map
from sib_fast.vjp import vjp_leaf


def layer_of(op: str, argument: str, model: nn.Module, layer: str | nn.Module) -> nn.Module:
    modules = dict(model.named_modules(remove_duplicate=False))
    found = modules.get(layer) if isinstance(layer, str) else layer
    if not any(found is module for module in modules.values()) or found is model:
        wanted = repr(layer) if isinstance(layer, str) else type(layer).__name__
        names = ", ".join(name for name, _ in model.named_children())
        raise ValueError(
            f"{op}.attach: {argument} must be one of the model's modules, got {wanted}; its first level: {names or 'none'}"
        )
    return found


class Slot:
    """One place of a model, and what was captured there in the latest active forward.

    captured: None before the first; then a function that returns the tensor, or None once nothing needs it. The graph of the
    logits keeps our own leaf alive, so that a weak reference lasts exactly as long as a loss can be made of it.

    A model may change what it is given in place (`x.sub_(mean)`, a first `ReLU(inplace=True)`), which a leaf refuses and the
    caller's tensor must not see. So it is given a copy, and none any more once a loss finds the copy unchanged.
    """

    def __init__(self, what: str) -> None:
        self.what = what  # in messages
        self.captured: Callable[[], Tensor | None] | None = None
        self._hands_copies = True
        self._copy: Tensor | None = None  # of the latest forward pass, until its loss has looked at it

    def handed_on(self, captured: Tensor) -> Tensor:
        """What the model goes on with in the place of what was captured: that itself, or a copy that it may change."""
        if not self._hands_copies:
            return captured
        self._copy = captured.clone()
        return self._copy

    def look_at_copy(self) -> None:
        if self._copy is not None:
            self._hands_copies, self._copy = self._copy._version > 0, None

    def take_map(self, output: Tensor) -> Tensor | None:
        """Captures a module's output; where nothing trained lies below it, a leaf of ours, which the model then goes on with."""
        if output.requires_grad:
            self.captured = lambda: output
            return None
        leaf = vjp_leaf(output)
        handed = self.handed_on(leaf)
        # Layers in place act on the captured map, here as where something trained lies below.
        self.captured = weakref.ref(leaf) if handed is leaf else lambda: handed
        return handed


class Attachment:
    """One criterion's hold on one model: the hooks, and what they captured of the latest active forward (only the latest).

    criterion: of which only `active` and its name for messages are read. input: of the model, or of S-IB in feature space a
    layer's map; None if the criterion takes none. map: the map that evidence is read at, or None. image_size: where there is a
    map of either kind, height and width of the image that the latest comes from; None for a model that is given no image.
    """

    def __init__(
        self,
        op: str,
        criterion: nn.Module,
        model: nn.Module,
        *,
        layer: str | nn.Module | None = None,
        takes_input: bool = True,
        takes_map: bool = False,
        at: str | nn.Module | None = None,
    ) -> None:
        # Weak, so that criterion and model do not keep each other alive and a model may hold its criterion as a submodule.
        self.op = op
        self._model = weakref.ref(model)
        self.of_layer = layer is not None
        self.input = Slot("layer" if self.of_layer else "input") if takes_input else None
        self.map = Slot("map") if takes_map else None
        self.map_name: str | None = None
        self.image_size: tuple[int, int] | None = None
        self.is_paused = False
        self.seen: list[Candidate] | None = None  # while the place of the map is being looked for
        self._runs: Counter[int] = Counter()
        handles: list[RemovableHandle] = []
        if takes_map or self.of_layer:
            handles.append(model.register_forward_pre_hook(_Begin(self, criterion), with_kwargs=True))
        if takes_input and not self.of_layer:
            handles.append(model.register_forward_pre_hook(_InputCapture(self, criterion), with_kwargs=True))
        if self.of_layer:
            handles.append(layer_of(op, "layer", model, layer).register_forward_hook(_LayerCapture(self, criterion)))
        self._handles, self._criterion = handles, weakref.ref(criterion)
        if takes_map and at is not None:
            self._watch_map(layer_of(op, "at", model, at))
        elif takes_map:
            self._look_for_map(model)
        # A criterion that goes without remove(), as when a notebook's cell runs again, takes its hooks along.
        self._remove = weakref.finalize(criterion, _remove, handles)
        self._remove.atexit = False

    def training(self) -> bool:
        model = self._model()
        if model is None:
            raise RuntimeError(f"{self.op}: the attached model no longer exists; call remove(), then attach() to the new one")
        return model.training

    def holds(self, model: nn.Module) -> bool:
        return self._model() is model

    def is_held_by_model(self, criterion: nn.Module) -> bool:
        """Whether the criterion is a submodule of the model, so that `model.eval()` reaches it."""
        model = self._model()
        return model is not None and any(module is criterion for module in model.modules())

    # ---- the map that evidence is read at -------------------------------------------------------------------------------

    def _watch_map(self, module: nn.Module) -> None:
        model = self._model()
        names = {id(m): name for name, m in model.named_modules(remove_duplicate=False)}
        self.map_name = names[id(module)]
        for name, outer in model.named_modules():
            inside = name != self.map_name and (self.map_name + ".").startswith(name + "." if name else "")
            # torch.compile'd in place, a module runs its own hooks inside the compiled code too
            if is_compiled(outer) and (inside or (outer is module and not hasattr(outer, "_orig_mod"))):
                raise RuntimeError(
                    f"{self.op}: the map must not be captured inside compiled code, got {self.map_name!r} in a compiled "
                    f"{name or 'model'!r}: compile the layers below the map alone, model.trunk = torch.compile(model.trunk), and "
                    "leave those above it as they are"
                )
        self._handles.append(module.register_forward_hook(_MapCapture(self, self._criterion())))

    def _look_for_map(self, model: nn.Module) -> None:
        self.seen, self._lookers = [], []
        compiled = tuple(name + "." if name else "" for name, module in model.named_modules() if is_compiled(module))
        for name, module in model.named_modules():
            in_place = is_compiled(module) and not hasattr(module, "_orig_mod")
            if not name or in_place or name.startswith(compiled):
                continue
            hook = _Looker(self, self._criterion(), name)
            self._lookers.append(module.register_forward_hook(hook))
        self._handles.extend(self._lookers)

    def found_map(self, logits: Tensor) -> None:
        """After the first captured forward: the place is the last map before pooling, which alone is captured from then on."""
        seen, runs = self.seen, self._runs
        chosen = last_map(self.op, logits, [c for c in seen if runs[id(c.module)] == 1])
        for handle in self._lookers:
            handle.remove()
        self.seen, self._runs, self._lookers = None, Counter(), []
        self._watch_map(chosen.module)
        self.map.captured = lambda: chosen.output

    def map_of(self, logits: Tensor) -> Tensor:
        """The map of the forward pass that made these logits; RuntimeError where there is nothing."""
        if self.seen is not None and self._runs:
            self.found_map(logits)
        self.map.look_at_copy()
        features = self.map.captured() if self.map.captured is not None else None
        if features is None:
            where = f"the map at {self.map_name!r}" if self.map_name else "the last feature map"
            raise RuntimeError(
                f"{self.op}: {where} must have been made since the latest loss, and it has not: a map serves one loss, and the "
                "attached model's forward pass, in training mode with grad enabled, must reach it"
            )
        return features

    # ---- the input ------------------------------------------------------------------------------------------------------

    def input_of(self, logits: Tensor) -> Tensor:
        """What was captured in the forward pass that made these logits; RuntimeError where there is nothing."""
        slot = self.input
        slot.look_at_copy()
        if slot.captured is None and self.of_layer and self.image_size is not None:
            raise RuntimeError(
                f"{self.op}: the attached layer must have run since the latest loss, and it has not: a feature map serves one "
                "loss, and the model's forward pass must reach the layer"
            )
        if slot.captured is None:
            raise RuntimeError(
                f"{self.op}: no input was captured: the attached model has not run forward in training mode with grad enabled "
                "since attach(). Run the model itself (not a copy of it), or pass x"
            )
        x = slot.captured()
        if x is None:
            # Only a graph holds the captured input: its own forward's graph is gone, or was never there.
            if not logits.requires_grad:
                raise RuntimeError(
                    f"{self.op}: logits must have a graph, got logits that do not require grad: run the forward pass "
                    "with grad enabled"
                )
            raise RuntimeError(
                f"{self.op}: logits must be computed by the attached model's latest forward pass in training mode, got "
                "logits of another graph, or the model detaches its input"
            )
        return x

    def release(self) -> None:
        """Lets go of feature maps, which would hold the graph below them until the next forward pass."""
        if self.input is not None:
            self.input.look_at_copy()
            if self.of_layer:
                self.input.captured = None
        if self.map is not None:
            self.map.captured = None

    def begin(self, image_size: tuple[int, int] | None) -> None:
        """A new forward pass: nothing that an earlier one captured is left."""
        self.image_size = image_size
        self.release()
        if self.seen is not None:
            self.seen, self._runs = [], Counter()

    def saw(self, module: nn.Module, name: str, output: object) -> Tensor | None:
        """While the map is looked for: the output of every module, as a candidate. What has no graph starts one here."""
        self._runs[id(module)] += 1
        if not (isinstance(output, Tensor) and output.ndim == 4 and output.is_floating_point()):
            return None
        handed = None
        if not output.requires_grad:
            if not torch.is_grad_enabled():
                return None
            handed = output = vjp_leaf(output).clone()
        self.seen.append(Candidate(name, module, output))
        return handed

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
        slot, key = attachment.input, _image_argument(attachment.op, args, kwargs)
        place = list(args) if isinstance(key, int) else dict(kwargs)
        value = place[key]
        if value.requires_grad:
            slot.captured = lambda: value  # not ours: no graph need hold the tensor itself
        else:
            value = vjp_leaf(value)
            slot.captured = weakref.ref(value)
        place[key] = slot.handed_on(value)
        return (tuple(place), kwargs) if isinstance(place, list) else (args, place)


class _Begin(_Capture):
    """Forward pre-hook of the model, where a map is captured: the size of the image, and the start of a new forward pass."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        attachment = self.attachment()
        if attachment is None:
            return
        try:
            key = _image_argument(attachment.op, args, kwargs)
        except RuntimeError:
            if attachment.of_layer:  # S-IB scales its window by the image's size; evidence only says what it would be
                raise
            attachment.begin(None)
        else:
            attachment.begin(tuple((args[key] if isinstance(key, int) else kwargs[key]).shape[2:]))


class _OutputCapture(_Capture):
    """A hook of a module whose output is captured."""

    def attachment(self) -> Attachment | None:
        # Activation checkpointing runs the layer again inside backward passes: that map is not the loss's.
        return None if torch._C._current_graph_task_id() != -1 else super().attachment()


class _LayerCapture(_OutputCapture):
    """Forward hook of the layer: takes its output. One that nothing trained lies below becomes a leaf of ours."""

    def __call__(self, module: nn.Module, args: tuple, output: object) -> Tensor | None:
        attachment = self.attachment()
        if attachment is None:
            return None
        op, slot = attachment.op, attachment.input
        if not (isinstance(output, Tensor) and output.ndim == 4 and output.is_floating_point()):
            raise RuntimeError(
                f"{op}: the attached layer must return a floating-point [N, C, H, W] tensor, got {_describe(output)}: "
                "choose a layer whose output is a feature map"
            )
        if slot.captured is not None:
            raise RuntimeError(
                f"{op}: the attached layer must run once in a forward pass, got a second call: choose one that is not shared"
            )
        return slot.take_map(output)


class _MapCapture(_OutputCapture):
    """Forward hook of the module that makes the map of the evidence: takes its output as `_LayerCapture` does."""

    def __call__(self, module: nn.Module, args: tuple, output: object) -> Tensor | None:
        attachment = self.attachment()
        if attachment is None:
            return None
        op, slot, name = attachment.op, attachment.map, attachment.map_name
        if not (isinstance(output, Tensor) and output.ndim == 4 and output.is_floating_point()):
            tokens = isinstance(output, Tensor) and output.ndim == 3
            why = (
                "tokens are no map, and of those after the last attention only the class token is read, so that there is no "
                "evidence at a patch"
                if tokens
                else "choose a module whose output is a feature map"
            )
            raise RuntimeError(f"{op}: {name!r} must return a floating-point [N, C, H, W] map, got {_describe(output)}: {why}")
        if slot.captured is not None:
            raise RuntimeError(
                f"{op}: {name!r} must run once in a forward pass, got a second call: choose a module that is not shared"
            )
        return slot.take_map(output)


class _Looker(_OutputCapture):
    """Forward hook of every module until the first loss, where the place of the map is to be found."""

    def __init__(self, attachment: Attachment | None = None, criterion: nn.Module | None = None, name: str = "") -> None:
        super().__init__(attachment, criterion)
        self._name = name

    def __call__(self, module: nn.Module, args: tuple, output: object) -> Tensor | None:
        attachment = self.attachment()
        return None if attachment is None or attachment.seen is None else attachment.saw(module, self._name, output)


def _image_argument(op: str, args: tuple, kwargs: dict) -> int | str:
    """Place or name of the model's first floating-point [N, C, H, W] argument."""
    for key, value in (*enumerate(args), *kwargs.items()):
        if isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point():
            return key
    raise RuntimeError(
        f"{op}: the attached model must be called with a floating-point [N, C, H, W] tensor, got "
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
