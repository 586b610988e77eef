"""SIBLoss: base loss, VJP, mask, statistics, estimator and objective put together. Composition only."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sib_fast import _checks
from sib_fast.criterion import Criterion
from sib_fast.distributed import global_region_statistics
from sib_fast.estimators import BACKGROUNDS, ESTIMATORS
from sib_fast.evidence import Evidence, EvidenceTerm
from sib_fast.masks import MASKS, DensityMask, GivenMask, resolve_given
from sib_fast.network_checks import check_graph
from sib_fast.ops import hsic_objective, region_statistics
from sib_fast.types import RegionStatistics
from sib_fast.vjp import SCALARS, own_share, vjp_map

_OP = "SIBLoss"


def _exp(base: Tensor, foreground: Tensor, background: Tensor, lambda_fg: float, lambda_bg: float) -> Tensor:
    return base + lambda_bg * torch.exp(background) + lambda_fg * torch.exp(-foreground)


def _linear(base: Tensor, foreground: Tensor, background: Tensor, lambda_fg: float, lambda_bg: float) -> Tensor:
    return base + lambda_bg * background - lambda_fg * foreground


def _expm1(base: Tensor, foreground: Tensor, background: Tensor, lambda_fg: float, lambda_bg: float) -> Tensor:
    return base + lambda_bg * torch.expm1(background) + lambda_fg * torch.expm1(-foreground)


OBJECTIVES = {"exp": _exp, "linear": _linear, "expm1": _expm1}

# Below it a VJP is other images'. An untrained network in small batches is at a quarter.
_OWN_SHARE = 0.1


class _DefaultWeight(float):
    """Tells a default apart from the same number given by the caller."""


_LAMBDA_BG = _DefaultWeight(1000.0)


class SIBLoss(Criterion):
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
             "hsic_unbiased", "cka" or "hsic_gaussian". background: "variance", or "hsic", "relative_variance" or a function
             (give lambda_bg: the default is the variance's). objective: "exp" (the authors' script), "linear" (their README) or
             "expm1" (the gradient of exp, a readable value). mask: "density", with window_size, temperature, slope and quantiles
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
             evidence: an EvidenceTerm beside the S-IB terms, on the last feature map; its own mask is made of S-IB's VJP. None,
             the default, is the published form.
    Attributes: active: whether the next call applies the S-IB terms; known before the forward pass. terms: detached 0-d
             tensors of the latest call: loss, base and, when active, foreground, background and mask_area (mean of the mask), and
             what `EvidenceLoss` has. Nothing is synchronised.
    State:   none; with every > 1 the number of training calls so far (under `one_step`: of steps), in the state_dict, so that
             a resumed run continues.
    Scale:   base as base_loss makes it; the estimator needs a batch, so there is no reduction="none".
    Errors:  see docs/errors.md; with SIB_FAST_DEBUG=1 non-finite values raise FloatingPointError and say where.
    Source:  arXiv 2511.09239 and the authors' script; SPEC 2-6.
    """

    _op = _OP
    _what = "S-IB terms"

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
        evidence: EvidenceTerm | None = None,
    ) -> None:
        super().__init__(
            evidence=evidence,
            base_loss=base_loss,
            gather=gather,
            backend=backend,
            every=every,
            accumulation_steps=accumulation_steps,
            every_weight=every_weight,
            train_in_eval_mode=train_in_eval_mode,
        )
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
        if background not in ("variance", BACKGROUNDS["variance"]) and isinstance(lambda_bg, _DefaultWeight):
            name = getattr(background, "__name__", type(background).__name__) if callable(background) else repr(background)
            orders = {"hsic": "background HSIC is of order 1e-2", "relative_variance": "the relative variance is of order 1"}
            order = "a function has an order of its own" if callable(background) else orders[background]
            raise ValueError(
                f"{_OP}: lambda_bg must be given for background={name}, got the default: 1000 is the weight of a variance of "
                f"order 1e-8, and {order}"
            )
        if normalise_cotangent and background == "variance" and isinstance(lambda_bg, _DefaultWeight):
            raise ValueError(
                f"{_OP}: lambda_bg must be given for normalise_cotangent=True, got the default: 1000 is the weight of a variance "
                "of order 1e-8, and dividing the cotangent by its norm raises it by 1/norm²"
            )
        _checks.require_window(_OP, window_size)
        _checks.require_positive(_OP, "temperature", temperature)
        _checks.require_positive(_OP, "slope", slope)
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
        self.vjp_scale = vjp_scale

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
        return self._attach(model, layer=layer, takes_input=True, whole=True)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        del state["terms"]
        return {**state, "_terms": {}, "_unread_mask": None}

    # ---- the loss ---------------------------------------------------------------------------------------------------

    def _needs_input(self, given: Tensor | GivenMask | None) -> bool:
        return True

    def _roles(self) -> tuple:
        return self.estimator, self.background

    def _check_graph(self, logits: Tensor, x: Tensor | None, features: Tensor | None) -> None:
        check_graph(_OP, logits.grad_fn, x)
        super()._check_graph(logits, x, features)

    def _active_loss(
        self, logits: Tensor, target: Tensor, x: Tensor | None, given: Tensor | GivenMask | None, features: Tensor | None
    ) -> Tensor:
        compute = torch.float64 if torch.float64 in (logits.dtype, x.dtype) else torch.float32
        base = self._base(logits.to(compute), target.to(compute) if target.is_floating_point() else target)
        options = {"scale": self.vjp_scale, "normalise_cotangent": self.normalise_cotangent}
        labels = self._labels(self.scalar, logits, target)
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
        if self.evidence is not None:
            found = self._evidence_beside(logits, target, features, vjp.detach(), mask.detach(), given, compute)
            loss = loss + self._times * self.evidence.weight * found.value
            self.terms |= {"loss": loss.detach().clone(), **found.terms}
        # A compiled step returns the terms, a captured one fills them at every replay, and a given mask is its giver's to change.
        captured = mask.is_cuda and torch.cuda.is_current_stream_capturing()
        if torch.compiler.is_compiling() or captured or not mask.requires_grad:
            self.terms["mask_area"] = mask.detach().mean()
        else:
            self._unread_mask = mask.detach()
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
        weights = (self._times * self.lambda_fg, self._times * self.lambda_bg)
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
        number = _checks.require_number
        foreground = number(_OP, "estimator", self.estimator(statistics.gram_vjp, statistics.gram_x), "the Grams")
        background = number(_OP, "background", self.background(statistics), "the statistics")
        base = base.to(foreground.device).to(foreground.dtype)
        loss = number(_OP, "objective", self.objective(base, foreground, background, *weights), "its arguments")
        return loss, foreground, background

    def _evidence_beside(
        self,
        logits: Tensor,
        target: Tensor,
        features: Tensor,
        vjp: Tensor,
        mask: Tensor,
        given: Tensor | GivenMask | None,
        compute: torch.dtype,
    ) -> Evidence:
        """The evidence term, whose own mask is of S-IB's VJP, since that is there; of the same settings it is S-IB's mask."""
        like = self.mask if isinstance(self.mask, DensityMask) else None
        maker = self.evidence.maker(self.backend, like)

        def own_mask(_: Tensor) -> Tensor:
            if maker == self.mask:
                return mask
            with torch.no_grad():
                return self._made(maker, vjp)

        return self._evidence_of(logits, target, features, given, own_mask, compute)

    def _made(self, maker: Callable[[Tensor], Tensor], vjp: Tensor) -> Tensor:
        image_size = None if self._attachment is None else self._attachment.image_size
        if image_size is not None and isinstance(maker, DensityMask):
            maker = maker.scaled(image_size, vjp.shape[2:])
        return maker(vjp)

    def _mask(self, vjp: Tensor, given: Tensor | GivenMask | None) -> Tensor:
        if given is None:
            mask = self._made(self.mask, vjp)
        else:
            mask, annotated = resolve_given(_OP, given, vjp, None if self._attachment is None else self._attachment.image_size)
            if annotated is not None:
                mask = torch.where(annotated[:, None, None, None], mask, self._made(self.mask, vjp))
        _checks.require_same_shape(_OP, "mask", mask, "x", (vjp.shape[0], 1, *vjp.shape[2:]))
        return mask

    def _warn_of_cross_talk(self, share: float) -> None:
        if share < _OWN_SHARE:
            self._looked_at.add("cross-talk")
            warnings.warn(
                f"{_OP}: the VJP of the image with the least cotangent is its own by {share:.1%} (SIB_FAST_DEBUG=1), the rest "
                "is what train-mode batch norm mixes into it: normalise_cotangent=True, or frozen batch norm",
                stacklevel=2,
            )

    def extra_repr(self) -> str:
        names = {name: getattr(getattr(self, name), "__name__", getattr(self, name)) for name in ("estimator", "background")}
        return (
            f"lambda_fg={self.lambda_fg}, lambda_bg={self.lambda_bg}, scalar={self.scalar!r}, "
            f"{', '.join(f'{k}={v}' for k, v in names.items())}, mask={self.mask}, every={self.every}, "
            f"attached={self.attached}"
        )
