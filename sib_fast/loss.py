"""SIBLoss: base loss, VJP, mask, statistics, estimator and objective put together. Composition only."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sib_fast import _checks
from sib_fast._backends import BACKENDS
from sib_fast.attachment import Attachment, layer_of
from sib_fast.distributed import global_region_statistics
from sib_fast.estimators import BACKGROUNDS, ESTIMATORS
from sib_fast.masks import MASKS, DensityMask, GivenMask, check_given, resolve_given
from sib_fast.network_checks import check_graph, check_module
from sib_fast.ops import hsic_objective, region_statistics
from sib_fast.types import RegionStatistics
from sib_fast.vjp import LABEL_SCALARS, SCALARS, own_share, vjp_map

_OP = "SIBLoss"
_CALLS = "calls"  # key of the counter in a state_dict


def _exp(base: Tensor, foreground: Tensor, background: Tensor, lambda_fg: float, lambda_bg: float) -> Tensor:
    return base + lambda_bg * torch.exp(background) + lambda_fg * torch.exp(-foreground)


def _linear(base: Tensor, foreground: Tensor, background: Tensor, lambda_fg: float, lambda_bg: float) -> Tensor:
    return base + lambda_bg * background - lambda_fg * foreground


def _expm1(base: Tensor, foreground: Tensor, background: Tensor, lambda_fg: float, lambda_bg: float) -> Tensor:
    return base + lambda_bg * torch.expm1(background) + lambda_fg * torch.expm1(-foreground)


OBJECTIVES = {"exp": _exp, "linear": _linear, "expm1": _expm1}

# Probabilities of a row sum to one at most; label smoothing in half precision is off by this little, a second label by 1.
_SUM_SLACK = 0.05
# Below it a VJP is other images'. An untrained network in small batches is at a quarter.
_OWN_SHARE = 0.1


def _is_on_the_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


class _DefaultWeight(float):
    """Tells a default apart from the same number given by the caller."""


_LAMBDA_BG = _DefaultWeight(1000.0)


class SIBLoss(nn.Module):
    """Spatial Information Bottleneck loss: the base loss plus two terms on the VJP of the network (SPEC 5).

        loss = base + lambda_bg·exp(background) + lambda_fg·exp(−foreground)

    foreground: dependence between VJP and input where the VJP is dense, raised; background: the VJP's variance elsewhere,
    lowered. Either explicitly, `x.requires_grad_(); logits = model(x); loss = criterion(logits, target, x)`, or attached
    once, `criterion = SIBLoss(...).attach(model)`, after which the trainer goes on calling `criterion(logits, target)`.

    Active if and only if grad is enabled, the criterion is in training mode, (attached) so is the model or `train_in_eval_mode`
    is set, and this training step is one of every `every`; otherwise it is the base loss alone, so that validation loops and
    inference_mode work unchanged. `criterion.eval()` always means the base loss. A backward pass through a loss whose terms only
    the model's eval mode left out warns, once a criterion.

    Shapes:  logits [N, K]; target int64 [N], probabilities [N, K], or for binary cross-entropy labels of any dtype, [N, K], and
             [N] or [N, 1] for one logit; x [N, C, H, W] -> 0-d loss, float32, or float64 if logits or x are. Runs with
             autocast off.
    Args:    lambda_fg, lambda_bg: weights of the two terms. scalar: of the VJP, see `vjp_map`; its labels are the target's
             likeliest class, for one logit target > 0.5. normalise_cotangent: `vjp_map`'s, against what train-mode batch norm
             mixes into confident images (give lambda_bg: the default is the plain form's). estimator: "hsic_biased",
             "hsic_unbiased", "cka" or "hsic_gaussian". background: "variance", "hsic" (give lambda_bg: the default is the
             variance's) or "relative_variance". objective: "exp" (the authors' script), "linear" (their README) or "expm1"
             (the gradient of exp, a readable value). mask: "density", with window_size, temperature, slope and quantiles
             as in `foreground_mask`. base_loss: called as base_loss(logits, target), default nn.CrossEntropyLoss(); label
             smoothing goes there. vjp_scale: `vjp_map`'s scale. gather: take the statistics over the images of all ranks
             (torch.distributed), see docs/trainers.md. backend: one of `sib_fast.BACKENDS`, or "auto".
             train_in_eval_mode: apply the terms while the attached model is in eval mode too, for fine-tuning with frozen batch
             norm; a validation pass then needs no_grad or criterion.eval().
             every: lazy S-IB: the terms apply at training steps 0, k, 2k, …, and a step between costs a plain step.
             accumulation_steps: micro-batches (calls of the criterion in training) that make one step; where a step's calls are
             not a fixed number, see `one_step`. every_weight: "sum"
             multiplies both weights by `every`, so that their sum over the steps is that of every=1; "mean" does not.
             scalar, estimator, background, objective and mask also take functions: scalar(logits, labels) -> 0-d,
             estimator(gram_vjp, gram_x) -> 0-d, background(RegionStatistics) -> 0-d, objective(base, foreground,
             background, lambda_fg, lambda_bg) -> 0-d, mask(vjp) -> [N, 1, H, W].
    Attributes: active: whether the next call applies the S-IB terms; known before the forward pass. terms: detached 0-d
             tensors of the latest call: loss, base and, when active, foreground, background and mask_area (mean of the mask).
             Nothing is synchronised.
    State:   none; with every > 1 the number of training calls so far (under `one_step`: of steps), in the state_dict, so that
             a resumed run continues.
    Scale:   base as base_loss makes it; the estimator needs a batch, so there is no reduction="none".
    Errors:  see docs/errors.md; with SIB_FAST_DEBUG=1 non-finite values raise FloatingPointError and say where.
    Source:  arXiv 2511.09239 and the authors' script; SPEC 2-6.
    """

    def __init__(
        self,
        lambda_fg: float = 0.01,
        lambda_bg: float = _LAMBDA_BG,
        *,
        scalar: str | Callable = "energy",
        normalise_cotangent: bool = False,
        estimator: str | Callable = "hsic_biased",
        background: str | Callable = "variance",
        objective: str | Callable = "exp",
        mask: str | Callable = "density",
        window_size: int = 31,
        temperature: float = 0.1,
        slope: float = 10.0,
        quantiles: Sequence[float] = (0.05, 0.95, 0.8, 0.8),
        base_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        vjp_scale: float | None = None,
        gather: bool = False,
        backend: str = "auto",
        every: int = 1,
        accumulation_steps: int = 1,
        every_weight: str = "sum",
        train_in_eval_mode: bool = False,
    ) -> None:
        super().__init__()
        for name, weight in (("lambda_fg", lambda_fg), ("lambda_bg", lambda_bg)):
            if not weight >= 0:
                raise ValueError(f"{_OP}: {name} must be at least 0, got {weight!r}")
        choices = {
            "scalar": (scalar, SCALARS),
            "estimator": (estimator, tuple(ESTIMATORS)),
            "background": (background, tuple(BACKGROUNDS)),
            "objective": (objective, tuple(OBJECTIVES)),
            "mask": (mask, tuple(MASKS)),
        }
        for name, (value, known) in choices.items():
            _checks.require_choice(_OP, name, value, known, or_callable=True)
        if background == "hsic" and isinstance(lambda_bg, _DefaultWeight):
            raise ValueError(
                f"{_OP}: lambda_bg must be given for background='hsic', got the default: 1000 is the weight of a variance "
                "of order 1e-8, and background HSIC is of order 1e-2"
            )
        if normalise_cotangent and background == "variance" and isinstance(lambda_bg, _DefaultWeight):
            raise ValueError(
                f"{_OP}: lambda_bg must be given for normalise_cotangent=True, got the default: 1000 is the weight of a variance "
                "of order 1e-8, and dividing the cotangent by its norm raises it by 1/norm²"
            )
        _checks.require_choice(_OP, "backend", backend, ("auto", *BACKENDS))
        _checks.require_window(_OP, window_size)
        _checks.require_positive(_OP, "temperature", temperature)
        _checks.require_positive(_OP, "slope", slope)
        for name, count in (("every", every), ("accumulation_steps", accumulation_steps)):
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise ValueError(f"{_OP}: {name} must be an int of at least 1, got {count!r}")
        _checks.require_choice(_OP, "every_weight", every_weight, ("sum", "mean"))
        if base_loss is not None and not callable(base_loss):
            raise TypeError(f"{_OP}: base_loss must be callable, got {type(base_loss).__name__}")
        self.lambda_fg, self.lambda_bg = float(lambda_fg), float(lambda_bg)
        self.scalar = scalar
        self.normalise_cotangent = bool(normalise_cotangent)
        self.estimator = ESTIMATORS[estimator] if isinstance(estimator, str) else estimator
        self.background = BACKGROUNDS[background] if isinstance(background, str) else background
        self.objective = OBJECTIVES[objective] if isinstance(objective, str) else objective
        if isinstance(mask, str):
            mask = MASKS[mask](
                window_size=window_size,
                temperature=temperature,
                slope=slope,
                quantiles=_checks.require_quantiles(_OP, quantiles),
                backend=backend,
            )
        self.mask = mask
        self.base_loss = nn.CrossEntropyLoss() if base_loss is None else base_loss
        self.vjp_scale = vjp_scale
        self.gather = bool(gather)
        self.backend = backend
        self.every, self.accumulation_steps, self.every_weight = every, accumulation_steps, every_weight
        self.train_in_eval_mode = bool(train_in_eval_mode)
        self._calls = 0  # in training, counted only if every > 1: with every = 1 the criterion has no state
        self._open_step: bool | None = None  # inside `one_step`: whether a training call was made there
        self._warned_of_eval_mode = False
        self.terms = {}
        self._debug = os.environ.get("SIB_FAST_DEBUG") == "1"
        self._attachment: Attachment | None = None
        self._graph_checked = False
        self._looked_at: set[str] = set()  # arguments on a device whose values the first batch's check has read

    @property
    def terms(self) -> dict[str, Tensor]:
        """Detached 0-d tensors of the latest call. The mask's mean is taken when they are read, so that who does not look pays no
        pass over the mask: until then, or until the next call, the mask is held (detached, without its graph)."""
        if self._unread_mask is not None:
            with torch.inference_mode(False):
                self._terms["mask_area"], self._unread_mask = self._unread_mask.mean(), None
        return self._terms

    @terms.setter
    def terms(self, terms: dict[str, Tensor]) -> None:
        self._terms, self._unread_mask = terms, None

    # ---- attaching --------------------------------------------------------------------------------------------------

    def attach(self, model: nn.Module, layer: str | nn.Module | None = None) -> SIBLoss:
        """Captures the model's input, or a layer's feature map, so that `criterion(logits, target)` suffices. Returns self.

        A forward pre-hook hands the (inner) module a differentiable view of its first floating-point [N, C, H, W] argument,
        positional or keyword; the caller's tensor stays as it is and gets no `.grad`, also where the model changes its input in
        place. Copies and pickles of the model carry no live hook, and copies of the criterion are not attached.

        With a layer, the VJP and the statistics are taken at that layer's output [N, C', H', W'], detached in the statistics
        as the image is: S-IB in feature space. Only the network above it is differentiated twice. `window_size` is meant for
        the image and scaled to the map (nearest odd number, at least 1); given masks of the image's size are averaged down
        to it. The weights are the caller's: a VJP of features has a scale of its own. In-place layers that follow act on the
        captured map.

        Args:    layer: a name as in `model.named_modules()`, or the module itself.
        Errors:  TypeError if model is no module; ValueError for a layer that is none of the model's; RuntimeError if already
                 attached, or if the model cannot be differentiated twice (torch.compile, SyncBatchNorm,
                 DistributedDataParallel(static_graph=True), DataParallel).
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"{_OP}.attach: model must be a torch.nn.Module, got {type(model).__name__}")
        if self._attachment is not None:
            raise RuntimeError(f"{_OP}.attach: the criterion is attached to a model already; call remove() first")
        check_module(f"{_OP}.attach", model)
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        self._attachment = Attachment(self, inner, None if layer is None else layer_of(inner, layer))
        self._graph_checked = False
        return self

    @property
    def attached(self) -> bool:
        """Whether a model's input is being captured."""
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
        fresh = {
            "_attachment": None,
            "_terms": {},
            "_unread_mask": None,
            "_graph_checked": False,
            "_looked_at": set(),
            "_open_step": None,
        }
        return {**self.__dict__, **fresh}

    # ---- the loss ---------------------------------------------------------------------------------------------------

    def forward(self, logits: Tensor, target: Tensor, x: Tensor | None = None, mask: Tensor | GivenMask | None = None) -> Tensor:
        """The loss of one batch. x is needed unless attached; mask replaces the criterion's own (see `sib_fast.masks`)."""
        _checks.require_tensor(_OP, "logits", logits)
        if self.active:
            loss = self.active_loss(logits, target, self._input_of(logits) if x is None else x, mask)
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
                f"{_OP}.one_step: accumulation_steps must be 1, got {self.accumulation_steps}: put all micro-batches of a step "
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
        """Whether the next call applies the S-IB terms, as grad mode, training modes and `every` stand now."""
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
                f"{_OP}: the attached model must be in training mode for the S-IB terms, got one in eval mode: this backward "
                "pass trains the base loss alone. Call model.train(); or give SIBLoss(train_in_eval_mode=True), to fine-tune "
                "with frozen batch norm; or call criterion.eval(), if the base loss is meant"
            )
        elif not self.training and attachment.is_held_by_model(self):
            message = (
                f"{_OP}: the criterion must be in training mode for the S-IB terms, got eval mode together with the model that "
                "holds it: this backward pass trains the base loss alone. Call train() of both; to fine-tune with frozen batch "
                "norm give SIBLoss(train_in_eval_mode=True) and call criterion.train() after model.eval()"
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

    def active_loss(self, logits: Tensor, target: Tensor, x: Tensor, mask: Tensor | GivenMask | None = None) -> Tensor:
        """The loss with its S-IB terms, whatever `active` says."""
        self._check_batch(logits, target, x)
        if not torch.compiler.is_compiling() and not self._graph_checked:
            check_graph(_OP, logits.grad_fn, x)
            self._graph_checked = True
        if not torch.compiler.is_compiling():
            self.check_values(target, mask)
        with torch.autocast(logits.device.type, enabled=False):
            return self._active_loss(logits, target, x, mask)

    def check_values(self, target: Tensor, mask: Tensor | GivenMask | None = None) -> None:
        """Raises ValueError for values that would give another answer than asked for: a mask that is none, several labels for a
        scalar of one. Looks where that costs no synchronisation: on the CPU; on a device at the first batch, and always under
        SIB_FAST_DEBUG=1. `active_loss` does this by itself, but not while it is compiled.
        """
        given = mask.values if isinstance(mask, GivenMask) else mask
        if self._may_look_at("mask", given):
            check_given(_OP, mask)
        asks = self.scalar in LABEL_SCALARS and isinstance(target, Tensor) and target.ndim == 2 and target.shape[1] > 1
        if asks and target.is_floating_point() and self._may_look_at("target", target):
            sums = target.detach().to(torch.float32).sum(dim=1)
            if ((sums > 1 + _SUM_SLACK) | (sums == 0)).any():
                raise ValueError(
                    f"{_OP}: target must hold one label per image for scalar={self.scalar!r}, got rows that sum to "
                    f"{sums.min():g} … {sums.max():g}: scalar='multilabel_energy' is for heads with several labels, or pass a "
                    "function of the logits"
                )

    def _may_look_at(self, name: str, value: object) -> bool:
        if not isinstance(value, Tensor) or value.is_meta:
            return False
        free = _is_on_the_host(value) or self._debug or name not in self._looked_at
        self._looked_at.add(name)
        return free

    def _active_loss(self, logits: Tensor, target: Tensor, x: Tensor, given: Tensor | GivenMask | None) -> Tensor:
        compute = torch.float64 if torch.float64 in (logits.dtype, x.dtype) else torch.float32
        base = self._base(logits.to(compute), target.to(compute) if target.is_floating_point() else target)
        options = {"scale": self.vjp_scale, "normalise_cotangent": self.normalise_cotangent}
        labels = self._labels(logits, target)
        vjp = vjp_map(logits, x, self.scalar, labels, create_graph=True, **options).to(compute)
        if not vjp.requires_grad:
            raise RuntimeError(
                f"{_OP}: the VJP must depend on the network's parameters, but it came back without a graph: a layer "
                "(compiled code, a custom autograd.Function) cuts it, or every parameter is frozen"
            )
        mask = self._mask(vjp, given)
        # The input is data: the statistics see it without its gradient.
        data = x.detach() if (x.dtype == torch.float64) == (compute == torch.float64) else x.detach().to(compute)
        statistics = (global_region_statistics if self.gather else region_statistics)(
            vjp,
            data,
            mask,
            background_grams=getattr(self.background, "needs_background_grams", False),
            backend=self.backend,
        )
        loss, foreground, background = self._finalise(statistics, base.to(compute))
        loss, foreground, background = (t.to(compute).to(logits.device) for t in (loss, foreground.detach(), background.detach()))
        self.terms = {
            "loss": loss.detach().clone(),
            "base": base.detach(),
            "foreground": foreground,
            "background": background,
        }
        self._unread_mask = mask.detach()
        # A compiled step returns the terms, a captured one fills them at every replay, and a given mask is its giver's to change.
        captured = mask.is_cuda and torch.cuda.is_current_stream_capturing()
        if torch.compiler.is_compiling() or captured or not mask.requires_grad:
            self.terms  # noqa: B018
        if self._debug and not torch.compiler.is_compiling():
            # The loss last: the first bad tensor in the order of computation is the one that helps.
            loss_last = dict(sorted(self.terms.items(), key=lambda term: term[0] == "loss"))
            self._check_finite({"logits": logits, "x": x, "vjp": vjp, "mask": mask, **loss_last})
            if "cross-talk" not in self._looked_at:
                self._warn_of_cross_talk(own_share(logits, x, self.scalar, labels, **options))
        return loss

    def _finalise(self, statistics: RegionStatistics, base: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Statistics and base loss -> loss, foreground, background: everything that is N×N or smaller.

        One fused op for the default estimator and background and every built-in objective.
        """
        times = self.every if self.every_weight == "sum" else 1
        weights = (times * self.lambda_fg, times * self.lambda_bg)
        objective = next((name for name, function in OBJECTIVES.items() if function is self.objective), None)
        if objective and self.estimator is ESTIMATORS["hsic_biased"] and self.background is BACKGROUNDS["variance"]:
            return hsic_objective(
                base,
                statistics.gram_vjp,
                statistics.gram_x,
                statistics.background_variance,
                lambda_fg=weights[0],
                lambda_bg=weights[1],
                objective=objective,
                backend=self.backend,
            )
        foreground = self.estimator(statistics.gram_vjp, statistics.gram_x)
        background = self.background(statistics)
        base = base.to(foreground.device).to(foreground.dtype)
        return self.objective(base, foreground, background, *weights), foreground, background

    def _labels(self, logits: Tensor, target: Tensor) -> Tensor | None:
        """What the scalar is told of the target: class indices [N], None where it does not ask.

        A function gets a multi-hot target as it is: integers or bools [N, K] are no probabilities, whose argmax is a label.
        """
        if not callable(self.scalar) and self.scalar not in LABEL_SCALARS:
            return None
        if logits.shape[1] == 1:
            target = target.reshape(-1)
            return (target > 0.5 if target.is_floating_point() else target).to(torch.int64)
        if target.ndim == 1:
            return target
        if target.is_floating_point():
            return target.argmax(dim=1)
        if callable(self.scalar):
            return target
        raise TypeError(
            f"{_OP}: target must be class indices or floating-point probabilities for scalar={self.scalar!r}, got {target.dtype} "
            f"{list(target.shape)}: scalar='multilabel_energy' is for heads with several labels, or pass a function of the logits"
        )

    def _target_of_base(self, logits: Tensor, target: Tensor) -> Tensor:
        """The target as base_loss wants it: binary cross-entropy neither takes integers and bools nor [N] for one logit."""
        if not isinstance(target, Tensor) or logits.ndim != 2:
            return target
        if isinstance(self.base_loss, nn.CrossEntropyLoss) or self.base_loss is F.cross_entropy:
            if logits.shape[1] == 1:
                raise ValueError(
                    f"{_OP}: base_loss must not be cross-entropy for one logit, got logits {list(logits.shape)}: the softmax "
                    "of one logit is 1 and its loss 0. Use base_loss=nn.BCEWithLogitsLoss(), or two logits"
                )
            if target.ndim == 2 and not target.is_floating_point():
                raise TypeError(
                    f"{_OP}: target must be class indices or floating-point probabilities for cross-entropy, got {target.dtype} "
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
                f"{_OP}: base_loss must return a 0-d tensor (reduction='mean' or 'sum'), got shape {list(loss.shape)}; the "
                "S-IB terms are defined for a batch, so there is no loss per image"
            )
        return loss

    def _mask(self, vjp: Tensor, given: Tensor | GivenMask | None) -> Tensor:
        maker, image_size = self.mask, None if self._attachment is None else self._attachment.image_size
        if image_size is not None and isinstance(maker, DensityMask):
            maker = maker.scaled(image_size, vjp.shape[2:])
        if given is None:
            mask = maker(vjp)
        else:
            mask, annotated = resolve_given(_OP, given, vjp, image_size)
            if annotated is not None:
                mask = torch.where(annotated[:, None, None, None], mask, maker(vjp))
        _checks.require_same_shape(_OP, "mask", mask, "x", (vjp.shape[0], 1, *vjp.shape[2:]))
        return mask

    def _input_of(self, logits: Tensor) -> Tensor:
        if self._attachment is None:
            raise RuntimeError(
                f"{_OP}: x must be given while the loss is active: call criterion(logits, target, x) with x.requires_grad_() "
                "before the forward pass, or criterion.attach(model) once"
            )
        return self._attachment.input_of(logits)

    def _check_batch(self, logits: Tensor, target: Tensor, x: Tensor) -> None:
        _checks.require_floating(_OP, "logits", logits)
        if logits.ndim != 2:
            raise ValueError(
                f"{_OP}: logits must have shape [N, classes], got {list(logits.shape)}: one logit per image is logits[:, None]"
            )
        _checks.require_map(_OP, "x", x)
        _checks.require_same_device(_OP, "x", x, "logits", logits)
        _checks.require_tensor(_OP, "target", target)
        images = logits.shape[0]
        if x.shape[0] != images:
            raise ValueError(f"{_OP}: x must hold the {images} images of logits, got {x.shape[0]}")
        if list(target.shape) not in ([images], list(logits.shape)):
            raise ValueError(
                f"{_OP}: target must be class indices [{images}] or probabilities {list(logits.shape)}, got {list(target.shape)}"
            )
        for role in (self.estimator, self.background):
            minimum = getattr(role, "minimum_batch", 1)
            if images < minimum:
                name = getattr(role, "__name__", type(role).__name__)
                raise ValueError(
                    f"{_OP}: the batch must hold N >= {minimum} images for {name}, got {images}: drop the last "
                    "partial batch, DataLoader(drop_last=True)"
                )

    def _warn_of_cross_talk(self, share: float) -> None:
        if share < _OWN_SHARE:
            self._looked_at.add("cross-talk")
            warnings.warn(
                f"{_OP}: the VJP of the image with the least cotangent is its own by {share:.1%} (SIB_FAST_DEBUG=1), the rest "
                "is what train-mode batch norm mixes into it: normalise_cotangent=True, or frozen batch norm",
                stacklevel=2,
            )

    @staticmethod
    def _check_finite(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise FloatingPointError(f"{_OP}: {name} must be finite (SIB_FAST_DEBUG=1), got NaN or Inf")

    def extra_repr(self) -> str:
        names = {name: getattr(getattr(self, name), "__name__", getattr(self, name)) for name in ("estimator", "background")}
        return (
            f"lambda_fg={self.lambda_fg}, lambda_bg={self.lambda_bg}, scalar={self.scalar!r}, "
            f"{', '.join(f'{k}={v}' for k, v in names.items())}, mask={self.mask}, every={self.every}, "
            f"attached={self.attached}"
        )
