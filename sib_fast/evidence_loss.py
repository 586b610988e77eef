"""EvidenceLoss: the base loss and a term on the evidence at the last feature map."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sib_fast.criterion import Criterion
from sib_fast.evidence import EvidenceTerm, image_mask
from sib_fast.masks import GivenMask, is_fully_annotated

_OP = "EvidenceLoss"


class EvidenceLoss(Criterion):
    """Base loss plus a ratio on the evidence map at the last feature map before pooling (SPEC 11).

        criterion = sib_fast.EvidenceLoss("area").attach(model)      # then train as before: criterion(logits, target)
        loss = criterion(logits, target, mask=masks)                 # "share": given masks, boxes, partial annotation
        loss = EvidenceLoss("area")(logits, target, features=A)      # explicit: A as the forward pass made it
        loss = EvidenceLoss("share")(logits, target, x, features=A)  # x.requires_grad_() before the forward pass

    "area" lowers the part of the map that the evidence takes up, "share" the part of the evidence that lies on the background,
    1 − M; see `EvidenceTerm`, whose arguments these are. Only what lies between A and the logits is differentiated twice: a step
    with "area", or with given masks and mask="given", costs a plain one, nothing is captured at the image, and the layers below
    A may be compiled (`model.trunk = torch.compile(model.trunk)`). The own mask of "share" adds one backward pass from A to the
    image, without weight gradients and without a graph: a third of a plain step by its flops, up to a half in time on a CPU
    (benchmarks/results/amd-epyc-2-cores/step_evidence.json), and with a frozen trunk, whose step has no backward pass of its
    own there, the dearer part of it.

    Active as `SIBLoss` is, with the same `every`, `accumulation_steps`, `one_step`, `train_in_eval_mode` and state; otherwise it
    is the base loss alone.

    Shapes:  logits, target, mask as `SIBLoss`'s, mask of any size that is not below A's; features [N, C, h, w];
             x [N, C', H, W] -> 0-d loss, float32, or float64 if logits or features are. Runs with autocast off.
    Args:    kind … quantiles: `EvidenceTerm`'s. base_loss, every, every_weight, accumulation_steps, train_in_eval_mode, backend:
             as `SIBLoss`'s. gather: the mean is over the images of all ranks that have evidence (torch.distributed); without it
             every rank's own, which DDP averages: the same where all have equally many.
    Attributes: evidence: the term. active: as `SIBLoss`'s. terms: detached 0-d tensors of the latest call: loss, base and, when
             active, "area" (without the hinge) or "share" ("evidence" for a function), evidence_dead (how many images had no
             evidence and count in no mean) and with a mask object_cells (its mean over A's cells). Nothing is synchronised.
    Scale:   a mean over images, in [0, 1].
    Errors:  see docs/errors.md. Refused with the reason: "rectified" evidence below non-linear layers; the map before a
             normalisation; tokens; one cell. Fewer than 7×7 cells warn once.
    Source:  SPEC 11.
    """

    _op = _OP
    _what = "evidence term"

    def __init__(
        self,
        kind: str | Callable[[Tensor, Tensor | None], Tensor] = "area",
        *,
        evidence: str | Callable[[Tensor, Tensor], Tensor] | None = EvidenceTerm.evidence,
        weight: float = EvidenceTerm.weight,
        at: str | nn.Module | None = None,
        scalar: str | Callable = EvidenceTerm.scalar,
        normalise_cotangent: bool | None = EvidenceTerm.normalise_cotangent,
        target_area: float = EvidenceTerm.target_area,
        mask: str | Callable[[Tensor], Tensor] | None = EvidenceTerm.mask,
        window_size: int | None = None,
        temperature: float | None = None,
        slope: float | None = None,
        quantiles: Sequence[float] | None = None,
        base_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        gather: bool = False,
        backend: str = "auto",
        every: int = 1,
        accumulation_steps: int = 1,
        every_weight: str = "sum",
        train_in_eval_mode: bool = False,
    ) -> None:
        super().__init__(
            evidence=EvidenceTerm(
                kind,
                evidence=evidence,
                weight=weight,
                at=at,
                scalar=scalar,
                normalise_cotangent=normalise_cotangent,
                target_area=target_area,
                mask=mask,
                window_size=window_size,
                temperature=temperature,
                slope=slope,
                quantiles=quantiles,
            ),
            base_loss=base_loss,
            gather=gather,
            backend=backend,
            every=every,
            accumulation_steps=accumulation_steps,
            every_weight=every_weight,
            train_in_eval_mode=train_in_eval_mode,
        )

    def attach(self, model: nn.Module) -> EvidenceLoss:
        """Captures the map, and the image where a mask may have to be made of it, so that `criterion(logits, target)` suffices.

        Where A is not named with `at`, it is found at the first training forward: the last module before pooling that runs once
        and returns a [N, C, H, W] map, which then alone is watched. What `SIBLoss.attach` says of images, copies and pickles
        holds here. Returns self.

        Errors:  TypeError if model is no module; ValueError for a name that is none of the model's; RuntimeError if already
                 attached, for DistributedDataParallel(static_graph=True), DataParallel, a map inside compiled code.
        """
        return self._attach(model, takes_input=self.evidence.makes_mask, whole=False)

    def _needs_input(self, given: Tensor | GivenMask | None) -> bool:
        if not self.evidence.makes_mask:
            return False
        annotated = given.annotated if isinstance(given, GivenMask) else None
        covers = given is not None and (annotated is None or (isinstance(annotated, Tensor) and is_fully_annotated(annotated)))
        return not covers and self._attachment is not None

    def _active_loss(
        self, logits: Tensor, target: Tensor, x: Tensor | None, given: Tensor | GivenMask | None, features: Tensor | None
    ) -> Tensor:
        term = self.evidence
        if given is not None and not term.uses_mask:
            raise ValueError(
                f"{_OP}: mask must not be given for kind={term.kind!r} and mask={term.mask!r}, got one: nothing reads it"
            )
        compute = torch.float64 if torch.float64 in (logits.dtype, features.dtype) else torch.float32
        base = self._base(logits.to(compute), target.to(compute) if target.is_floating_point() else target).to(compute)
        own_mask = image_mask(_OP, features, x, term.maker(self.backend)) if term.makes_mask else None
        found = self._evidence_of(logits, target, features, given, own_mask, compute)
        loss = base + self._times * term.weight * found.value
        self.terms = {"loss": loss.detach().clone(), "base": base.detach(), **found.terms}
        if self._debug:
            tensors = {"logits": logits, "features": features, "vjp": found.vjp, "mask": found.mask, **self.terms}
            tensors["loss"] = tensors.pop("loss")  # last: the first bad tensor in the order of computation is the one that helps
            self._check_finite({name: tensor for name, tensor in tensors.items() if tensor is not None})
        return loss

    def extra_repr(self) -> str:
        return f"{self.evidence}, every={self.every}, attached={self.attached}"
