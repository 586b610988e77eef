"""timm: a training task. `train.py` of timm >= 1.0.27 works through tasks; older loops need `SIBLoss.attach` alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sib_fast import SIBLoss, prepare
from sib_fast.criterion import Criterion

try:
    from timm.task import ClassificationTask
except ImportError as error:
    raise ImportError(
        "SIBTask: timm must have a task API (timm.task, 1.0.27 and later), got a timm without one. Upgrade "
        "it (pip install 'timm>=1.0.27'), or attach the criterion: SIBLoss(...).attach(model)"
    ) from error

_OP = "SIBTask"


class SIBTask(ClassificationTask):
    """timm's classification task with the S-IB loss: the criterion attached, its terms beside the loss.

    `task(input, target)` returns 'loss', 'output' and the criterion's terms ('base', and while active 'foreground',
    'background', 'mask_area', or an EvidenceLoss's own). Mixup's and CutMix's soft targets, gradient accumulation, EMA and
    `no_sync` work as in timm; `timm.utils.ModelEmaV3` copies the network without the hook. A task does not see the optimiser's
    steps: with `every` > 1 and gradient accumulation give the criterion accumulation_steps. `fast` gives the network the
    package's layers (`sib_fast.prepare`).

    Shapes:  input [N, C, H, W] floating point; target int64 [N] or probabilities [N, K].
    Errors:  TypeError if criterion is neither a SIBLoss nor an EvidenceLoss; RuntimeError for `compile`, for DDP's
             static_graph, and as `SIBLoss.attach`.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion | None = None,
        *,
        fast: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        criterion = SIBLoss() if criterion is None else criterion
        if not isinstance(criterion, Criterion):
            raise TypeError(
                f"{_OP}: criterion must be a SIBLoss or an EvidenceLoss, got {type(criterion).__name__}: timm's own loss goes "
                "inside, SIBLoss(base_loss=...)"
            )
        if fast:
            model = prepare(model)
        super().__init__(model, criterion, device=device, dtype=dtype, verbose=verbose)
        if not criterion.attached:
            criterion.attach(model)

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> SIBTask:
        """As timm's. Errors: RuntimeError for static_graph=True, with which DDP stops synchronising in silence."""
        if ddp_kwargs.get("static_graph"):
            raise RuntimeError(
                f"{_OP}.prepare_distributed: static_graph must be False: with a gradient taken before backward, "
                "DistributedDataParallel(static_graph=True) stops synchronising gradients in silence"
            )
        return super().prepare_distributed(device_ids, **ddp_kwargs)

    def compile(self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any) -> nn.Module:
        """Refused: a compiled network has no second derivative in PyTorch."""
        raise RuntimeError(
            f"{_OP}.compile: the model must not be compiled by itself: compiled code has no second derivative. Train "
            "without --torchcompile, or compile the whole step with sib_fast.compile_step in a loop of your own"
        )

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        result = super().forward(input, target)
        terms = {name: value for name, value in self.criterion.terms.items() if name != "loss"}
        return {**result, **terms}

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """The criterion's state, where it has one, so that a resumed run continues where it stopped."""
        state = self.criterion.state_dict()
        return {} if ema or not state else {"criterion": state}

    def load_task_state(
        self, state: dict[str, Any] | None, strict: bool = True, module: nn.Module | None = None, ema: bool = False
    ) -> None:
        if state and "criterion" in state and not ema:
            self.criterion.load_state_dict(state["criterion"], strict=strict)
