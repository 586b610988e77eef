"""What every criterion here is made of: attached to a model, active at some steps, a base loss and what it needs checked."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sib_fast import _checks
from sib_fast._backends import BACKENDS
from sib_fast.attachment import Attachment
from sib_fast.evidence import Evidence, EvidenceTerm
from sib_fast.masks import GivenMask, check_given
from sib_fast.network_checks import check_graph, check_module
from sib_fast.place import check_place
from sib_fast.vjp import LABEL_SCALARS

_CALLS = "calls"  # key of the counter in a state_dict

# Probabilities of a row sum to one at most; label smoothing in half precision is off by this little, a second label by 1.
_SUM_SLACK = 0.05


def _is_on_the_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


class Criterion(nn.Module):
    """A base loss and terms on derivatives of the network. `SIBLoss` and `EvidenceLoss` say which terms.

    Attributes: evidence: the EvidenceTerm, or None. active: whether the next call applies the terms. terms: of the latest call.
    """

    _op = "Criterion"
    _what = "terms"  # in messages
    scalar: str | Callable | None = None

    def __init__(
        self,
        *,
        evidence: EvidenceTerm | None,
        base_loss: Callable[[Tensor, Tensor], Tensor] | None,
        gather: bool,
        backend: str,
        every: int,
        accumulation_steps: int,
        every_weight: str,
        train_in_eval_mode: bool,
    ) -> None:
        super().__init__()
        op = self._op
        if evidence is not None and not isinstance(evidence, EvidenceTerm):
            raise TypeError(f"{op}: evidence must be an EvidenceTerm, got {type(evidence).__name__}")
        _checks.require_choice(op, "backend", backend, ("auto", *BACKENDS))
        for name, count in (("every", every), ("accumulation_steps", accumulation_steps)):
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise ValueError(f"{op}: {name} must be an int of at least 1, got {count!r}")
        _checks.require_choice(op, "every_weight", every_weight, ("sum", "mean"))
        if base_loss is not None and not callable(base_loss):
            raise TypeError(f"{op}: base_loss must be callable, got {type(base_loss).__name__}")
        self.evidence = evidence
        self.base_loss = nn.CrossEntropyLoss() if base_loss is None else base_loss
        self.gather = bool(gather)
        self.backend = backend
        self.every, self.accumulation_steps, self.every_weight = every, accumulation_steps, every_weight
        self.train_in_eval_mode = bool(train_in_eval_mode)
        self._calls = 0  # in training, counted only if every > 1: with every = 1 the criterion has no state
        self._open_step: bool | None = None  # inside `one_step`: whether a training call was made there
        self._warned_of_eval_mode = False
        self.terms: dict[str, Tensor] = {}
        self._debug = os.environ.get("SIB_FAST_DEBUG") == "1"
        self._attachment: Attachment | None = None
        self._graph_checked = False
        self._looked_at: set[str] = set()  # arguments on a device whose values the first batch's check has read

    # ---- attaching --------------------------------------------------------------------------------------------------

    def _attach(self, model: nn.Module, *, layer: str | nn.Module | None = None, takes_input: bool, whole: bool) -> Self:
        op = self._op
        if not isinstance(model, nn.Module):
            raise TypeError(f"{op}.attach: model must be a torch.nn.Module, got {type(model).__name__}")
        if self._attachment is not None:
            raise RuntimeError(f"{op}.attach: the criterion is attached to a model already; call remove() first")
        check_module(f"{op}.attach", model, whole=whole)
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        at = None if self.evidence is None else self.evidence.at
        self._attachment = Attachment(
            op, self, inner, layer=layer, takes_input=takes_input, takes_map=self.evidence is not None, at=at
        )
        self._graph_checked = False
        return self

    @property
    def attached(self) -> bool:
        """Whether a model is being watched."""
        return self._attachment is not None

    def remove(self) -> None:
        """Undoes `attach`; does nothing if not attached."""
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.every > 1:
            destination[prefix + _CALLS] = torch.tensor(self._calls)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Neither a checkpoint without the counter nor one with it is refused when `every` was changed in between.
        calls = state_dict.pop(prefix + _CALLS, None)
        if calls is not None and self.every > 1:
            self._calls = int(calls)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        # A hook cannot travel: a copy starts detached.
        fresh = {"_attachment": None, "terms": {}, "_graph_checked": False, "_looked_at": set(), "_open_step": None}
        return {**self.__dict__, **fresh}

    # ---- the loss ---------------------------------------------------------------------------------------------------

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        x: Tensor | None = None,
        mask: Tensor | GivenMask | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """The loss of one batch. Unless attached, x and, for an evidence term, features are needed: the image and the map that
        evidence is read at, both of this forward pass. mask replaces the criterion's own (see `sib_fast.masks`)."""
        _checks.require_tensor(self._op, "logits", logits)
        if self.active:
            if x is None and self._needs_input(mask):
                x = self._input_of(logits)
            if features is None and self.evidence is not None:
                features = self._map_of(logits)
            loss = self.active_loss(logits, target, x, mask, features)
            if self._attachment is not None:
                self._attachment.release()
        else:
            loss = self.plain_loss(logits, target)
            if not torch.compiler.is_compiling():
                self.warn_if_trained(loss)
        self.count_call()
        return loss

    @contextmanager
    def one_step(self, number: int | None = None) -> Iterator[None]:
        """All training calls inside are of one step, so that `every` applies the terms in all of them or in none.

            with criterion.one_step():
                optimizer.step(closure)      # LBFGS; or SAM's two passes, a mixup of two losses, all micro-batches

        A block without a training call, or that raised, is no step; a block inside a block belongs to the outer one. Calls
        outside are a step each, as ever.

        Args:    number: of this step, where the trainer counts steps itself and keeps the count.
        Errors:  ValueError with accumulation_steps > 1, which says that calls are counted.
        """
        if self.accumulation_steps > 1:
            raise ValueError(
                f"{self._op}.one_step: accumulation_steps must be 1, got {self.accumulation_steps}: put all "
                "micro-batches of a step "
                "into the block, or leave the block out"
            )
        if self._open_step is not None:
            yield
            return
        if number is not None:
            self._calls = int(number)
        self._open_step = False
        try:
            yield
            self._calls += self._open_step
        finally:
            self._open_step = None

    @property
    def active(self) -> bool:
        """Whether the next call applies the terms, as grad mode, training modes and `every` stand now."""
        return self._training() and (self.every == 1 or self._calls // self.accumulation_steps % self.every == 0)

    def _training(self) -> bool:
        if not (torch.is_grad_enabled() and self.training):
            return False
        return self._attachment is None or self._attachment.training() or self.train_in_eval_mode

    def count_call(self) -> None:
        """Counts one training call, where there is a schedule. `forward` does; a caller of the two losses below must."""
        if self.every > 1 and self._training():
            if self._open_step is None:
                self._calls += 1
            else:
                self._open_step = True

    def warn_if_trained(self, loss: Tensor) -> None:
        """Lets the first backward pass through a base loss warn, where only the model's eval mode left the terms out.

        A validation pass has no backward. `forward` does it; a caller of `plain_loss` must.
        """
        attachment = self._attachment
        if self._warned_of_eval_mode or attachment is None or not loss.requires_grad or attachment.training():
            return
        if self.training and not self.train_in_eval_mode:
            message = (
                f"{self._op}: the attached model must be in training mode for the {self._what}, got one in "
                "eval mode: this backward "
                f"pass trains the base loss alone. Call model.train(); or give {self._op}(train_in_eval_mode=True), to fine-tune "
                "with frozen batch norm; or call criterion.eval(), if the base loss is meant"
            )
        elif not self.training and attachment.is_held_by_model(self):
            message = (
                f"{self._op}: the criterion must be in training mode for the {self._what}, got eval mode "
                "together with the model that "
                "holds it: this backward pass trains the base loss alone. Call train() of both; to fine-tune with frozen batch "
                f"norm give {self._op}(train_in_eval_mode=True) and call criterion.train() after model.eval()"
            )
        else:
            return
        criterion = weakref.ref(self)

        def warn(_: Tensor) -> None:
            self = criterion()
            if self is not None and not self._warned_of_eval_mode:
                self._warned_of_eval_mode = True
                warnings.warn(message, stacklevel=2)

        loss.register_hook(warn)

    def plain_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """The base loss alone, whatever `active` says."""
        loss = self._base(logits, target)
        value = loss.detach().clone()  # trainers divide the loss in place (timm: loss /= accumulation_steps)
        self.terms = {"loss": value, "base": value}
        return loss

    def active_loss(
        self,
        logits: Tensor,
        target: Tensor,
        x: Tensor | None,
        mask: Tensor | GivenMask | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """The loss with its terms, whatever `active` says."""
        self._check_batch(logits, target, x, features)
        if not torch.compiler.is_compiling() and not self._graph_checked:
            self._check_graph(logits, x, features)
            self._graph_checked = True
        if not torch.compiler.is_compiling():
            self.check_values(target, mask)
        with torch.autocast(logits.device.type, enabled=False):
            return self._active_loss(logits, target, x, mask, features)

    def _active_loss(
        self, logits: Tensor, target: Tensor, x: Tensor | None, given: Tensor | GivenMask | None, features: Tensor | None
    ) -> Tensor:
        raise NotImplementedError

    def _needs_input(self, given: Tensor | GivenMask | None) -> bool:
        """Whether this call needs the input, which `given` may spare it."""
        raise NotImplementedError

    def _check_graph(self, logits: Tensor, x: Tensor | None, features: Tensor | None) -> None:
        """What lies above the map that evidence is read at. A criterion that differentiates twice down to x adds that."""
        if self.evidence is None:
            return
        attachment = self._attachment
        name, size = (None, None) if attachment is None else (attachment.map_name, attachment.image_size)
        size = tuple(x.shape[2:]) if size is None and x is not None else size
        check_graph(self._op, logits.grad_fn, features)
        check_place(self._op, logits, features, self.evidence.evidence == "rectified", name, size)

    def _evidence_of(
        self,
        logits: Tensor,
        target: Tensor,
        features: Tensor,
        given: Tensor | GivenMask | None,
        own_mask: Callable[[Tensor], Tensor],
        compute: torch.dtype,
    ) -> Evidence:
        term = self.evidence
        labels = self._labels(term.scalar, logits, target)
        found = term.of(self._op, logits, labels, features, given, own_mask, compute, self.gather)
        if term.evidence == "squared" and "constant" not in self._looked_at:  # once a network, as the graph
            self._looked_at.add("constant")
            if (found.vjp == found.vjp[..., :1, :1]).all():
                raise ValueError(
                    f"{self._op}: evidence must not be 'squared' directly below a global average, got a VJP that is the same in "
                    "every cell: Σ R² is constant there whatever the network does. Use 'rectified' or 'absolute', or an earlier "
                    "map with at=..."
                )
        return found

    @property
    def _times(self) -> int:
        """What the weights are multiplied by for the steps between."""
        return self.every if self.every_weight == "sum" else 1

    def check_values(self, target: Tensor, mask: Tensor | GivenMask | None = None) -> None:
        """Raises ValueError for values that would give another answer than asked for: a mask that is none, several labels for a
        scalar of one. Looks where that costs no synchronisation: on the CPU; on a device at the first batch, and always under
        SIB_FAST_DEBUG=1. `active_loss` does this by itself, but not while it is compiled.
        """
        given = mask.values if isinstance(mask, GivenMask) else mask
        if self._may_look_at("mask", given):
            check_given(self._op, mask)
        scalars = (self.scalar, None if self.evidence is None else self.evidence.scalar)
        scalar = next((s for s in scalars if s in LABEL_SCALARS), None)
        asks = scalar is not None and isinstance(target, Tensor) and target.ndim == 2 and target.shape[1] > 1
        if asks and target.is_floating_point() and self._may_look_at("target", target):
            sums = target.detach().to(torch.float32).sum(dim=1)
            if ((sums > 1 + _SUM_SLACK) | (sums == 0)).any():
                raise ValueError(
                    f"{self._op}: target must hold one label per image for scalar={scalar!r}, got rows that sum to "
                    f"{sums.min():g} … {sums.max():g}: scalar='multilabel_energy' is for heads with several labels, or pass a "
                    "function of the logits"
                )

    def _may_look_at(self, name: str, value: object) -> bool:
        if not isinstance(value, Tensor) or value.is_meta:
            return False
        free = _is_on_the_host(value) or self._debug or name not in self._looked_at
        self._looked_at.add(name)
        return free

    def _labels(self, scalar: str | Callable, logits: Tensor, target: Tensor) -> Tensor | None:
        """What the scalar is told of the target: class indices [N], None where it does not ask.

        A function gets a multi-hot target as it is: integers or bools [N, K] are no probabilities, whose argmax is a label.
        """
        if not callable(scalar) and scalar not in LABEL_SCALARS:
            return None
        if logits.shape[1] == 1:
            target = target.reshape(-1)
            return (target > 0.5 if target.is_floating_point() else target).to(torch.int64)
        if target.ndim == 1:
            return target
        if target.is_floating_point():
            return target.argmax(dim=1)
        if callable(scalar):
            return target
        raise TypeError(
            f"{self._op}: target must be class indices or floating-point probabilities for scalar={scalar!r}, got {target.dtype} "
            f"{list(target.shape)}: scalar='multilabel_energy' is for heads with several labels, or pass a function of the logits"
        )

    def _target_of_base(self, logits: Tensor, target: Tensor) -> Tensor:
        """The target as base_loss wants it: binary cross-entropy neither takes integers and bools nor [N] for one logit."""
        if not isinstance(target, Tensor) or logits.ndim != 2:
            return target
        if isinstance(self.base_loss, nn.CrossEntropyLoss) or self.base_loss is F.cross_entropy:
            if logits.shape[1] == 1:
                raise ValueError(
                    f"{self._op}: base_loss must not be cross-entropy for one logit, got logits "
                    f"{list(logits.shape)}: the softmax "
                    "of one logit is 1 and its loss 0. Use base_loss=nn.BCEWithLogitsLoss(), or two logits"
                )
            if target.ndim == 2 and not target.is_floating_point():
                raise TypeError(
                    f"{self._op}: target must be class indices or floating-point probabilities for "
                    f"cross-entropy, got {target.dtype} "
                    f"{list(target.shape)}: several labels per image want base_loss=nn.BCEWithLogitsLoss(), one-hot rows .float()"
                )
            return target
        binary = isinstance(self.base_loss, nn.BCEWithLogitsLoss)
        if binary and logits.shape[1] == 1 and target.ndim == 1:
            target = target[:, None]
        takes_indices = isinstance(self.base_loss, nn.MultiLabelMarginLoss)
        whole = target.ndim == 2 and not target.is_floating_point() and not takes_indices
        return target.to(logits.dtype) if whole else target

    def _base(self, logits: Tensor, target: Tensor) -> Tensor:
        loss = self.base_loss(logits, self._target_of_base(logits, target))
        if loss.ndim != 0:
            raise ValueError(
                f"{self._op}: base_loss must return a 0-d tensor (reduction='mean' or 'sum'), got shape {list(loss.shape)}; the "
                "S-IB terms are defined for a batch, so there is no loss per image"
            )
        return loss

    def _input_of(self, logits: Tensor) -> Tensor:
        if self._attachment is None:
            raise RuntimeError(
                f"{self._op}: x must be given while the loss is active: call criterion(logits, target, x) "
                "with x.requires_grad_() "
                "before the forward pass, or criterion.attach(model) once"
            )
        return self._attachment.input_of(logits)

    def _map_of(self, logits: Tensor) -> Tensor:
        if self._attachment is None:
            raise RuntimeError(
                f"{self._op}: features must be given while the loss is active: call criterion(logits, target, "
                "features=features) with the map that the logits were made of, or criterion.attach(model) once"
            )
        return self._attachment.map_of(logits)

    def _roles(self) -> tuple:
        """What needs a batch of some size, by an attribute `minimum_batch`."""
        return ()

    def _check_batch(self, logits: Tensor, target: Tensor, x: Tensor | None, features: Tensor | None = None) -> None:
        _checks.require_floating(self._op, "logits", logits)
        if logits.ndim != 2:
            raise ValueError(
                f"{self._op}: logits must have shape [N, classes], got {list(logits.shape)}: one logit per "
                "image is logits[:, None]"
            )
        images = logits.shape[0]
        for name, tensor in (("x", x), ("features", features)):
            if tensor is None:
                continue
            _checks.require_map(self._op, name, tensor)
            _checks.require_same_device(self._op, name, tensor, "logits", logits)
            if tensor.shape[0] != images:
                raise ValueError(f"{self._op}: {name} must hold the {images} images of logits, got {tensor.shape[0]}")
        _checks.require_tensor(self._op, "target", target)
        if list(target.shape) not in ([images], list(logits.shape)):
            raise ValueError(
                f"{self._op}: target must be class indices [{images}] or probabilities {list(logits.shape)}, "
                f"got {list(target.shape)}"
            )
        for role in self._roles():
            minimum = getattr(role, "minimum_batch", 1)
            if images < minimum:
                name = getattr(role, "__name__", type(role).__name__)
                raise ValueError(
                    f"{self._op}: the batch must hold N >= {minimum} images for {name}, got {images}: drop the last "
                    "partial batch, DataLoader(drop_last=True)"
                )

    def _check_finite(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise FloatingPointError(f"{self._op}: {name} must be finite (SIB_FAST_DEBUG=1), got NaN or Inf")
