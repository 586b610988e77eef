"""Hugging Face: a mix-in for `transformers.Trainer`, whose `compute_loss_func` is not given the input and so cannot be used; and
an attention that can be differentiated twice, which importing this module registers as `attn_implementation="sib_fast"`."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Trainer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sib_fast import SIBLoss, prepare
from sib_fast.criterion import Criterion
from sib_fast.integrations._terms import TermAverage
from sib_fast.nn._functional import scaled_dot_product_attention

_OP = "SIBTrainer"
ATTENTION = "sib_fast"


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of transformers' models that can be differentiated twice: products and a fused softmax for attention without a
    mask, with gradients, as in a ViT. Every other call is that of "sdpa", which may have no second derivative.

    Shapes:  query [N, heads, L, E], key [N, heads, S, E], value [N, heads, S, F] -> [N, L, heads, F], and None for the weights.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    asked = options.get("position_bias") is not None or options.get("softcap") is not None or options.get("output_attentions")
    if attention_mask is None and not causal and query.shape[1] == key.shape[1] and not asked:
        out = scaled_dot_product_attention(query, key, value, None, dropout, scale=scaling)
        return out.transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **options)


AttentionInterface.register(ATTENTION, attention_forward)
try:
    from transformers import AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask
except ImportError:  # older ones have no masks by implementation
    pass
else:
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


class SIBTrainerMixin:
    """Gives a `transformers.Trainer` the S-IB loss: put it before the Trainer in the bases.

    The model's own loss is not used: labels are kept from it, its logits go to the criterion. The loss is a per-batch mean,
    and the Trainer is told so, so that gradient accumulation divides it. Evaluation, which runs without gradients, sees the
    base loss. Terms are averaged between log lines and logged as "sib/<term>". With `every` > 1 a step is the Trainer's
    `state.global_step`, whatever the gradient accumulation and after a restart too, unless the criterion was given
    accumulation_steps > 1.

    Shapes:  inputs["pixel_values"] [N, C, H, W] floating point; inputs["labels"] int64 [N], probabilities [N, K], or for a
             multi-label model multi-hot [N, K].
    Args:    criterion: a SIBLoss or an EvidenceLoss, default SIBLoss(), or with the multi-label energy and binary
             cross-entropy if the model's problem_type is "multi_label_classification". fast: give the network the package's
             layers (`sib_fast.prepare`).
    Errors:  TypeError if criterion is neither; ValueError for a model that was loaded with fused attention, for
             compute_loss_func, label_smoothing_factor (put it into the criterion's base loss), torch_compile, and a
             cross-entropy criterion for several labels.
    """

    # The loss is a mean over the batch: without this the Trainer may take it for one that is summed over the accumulation.
    loss_is_scaled_for_ga = False

    def __init__(self, *args: Any, criterion: Criterion | None = None, fast: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        several = getattr(self.model.config, "problem_type", None) == "multi_label_classification"
        if criterion is None:
            criterion = SIBLoss(scalar="multilabel_energy", base_loss=nn.BCEWithLogitsLoss()) if several else SIBLoss()
        if not isinstance(criterion, Criterion):
            raise TypeError(f"{_OP}: criterion must be a SIBLoss or an EvidenceLoss, got {type(criterion).__name__}")
        if several and isinstance(criterion.base_loss, nn.CrossEntropyLoss):
            raise ValueError(
                f"{_OP}: the criterion's base_loss must not be cross-entropy for problem_type "
                "'multi_label_classification', got one: SIBLoss(scalar='multilabel_energy', base_loss=nn.BCEWithLogitsLoss())"
            )
        if self.compute_loss_func is not None:
            raise ValueError(f"{_OP}: compute_loss_func must be None, got a function: the criterion computes the loss")
        if self.args.label_smoothing_factor:
            raise ValueError(
                f"{_OP}: label_smoothing_factor must be 0, got {self.args.label_smoothing_factor}: give the criterion "
                "base_loss=nn.CrossEntropyLoss(label_smoothing=...)"
            )
        if self.args.torch_compile:
            raise ValueError(f"{_OP}: torch_compile must be False, got True: a compiled model has no second derivative")
        attention = getattr(self.model.config, "_attn_implementation", None)
        if attention not in (None, "eager", ATTENTION):
            raise ValueError(
                f"{_OP}: the model's attention must be 'sib_fast' or 'eager', got {attention!r}: fused attention has no second "
                "derivative. Load it with from_pretrained(..., attn_implementation='sib_fast'), or call "
                "model.set_attn_implementation('sib_fast')"
            )
        # Older Trainers have no loss_is_scaled_for_ga; they ask whether the model takes num_items_in_batch instead.
        self.model_accepts_loss_kwargs = False
        self.criterion = criterion if criterion.attached else criterion.attach(prepare(self.model) if fast else self.model)
        self._terms = TermAverage()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        if "labels" not in inputs:
            raise ValueError(
                f"{_OP}: inputs must hold 'labels', got {sorted(inputs)}: rename the column, or set remove_unused_columns=False"
            )
        labels = inputs["labels"]
        counted = self.criterion.accumulation_steps == 1
        with self.criterion.one_step(self.state.global_step) if counted else nullcontext():
            outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
            logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
            loss = self.criterion(logits, labels)
        if torch.is_grad_enabled():  # a training step, whatever the model's mode
            self._terms.update(self.criterion)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:  # a line of training, not of evaluation
            logs = {**logs, **self._terms.read("sib/")}
        super().log(logs, *args, **kwargs)


class SIBTrainer(SIBTrainerMixin, Trainer):
    """`transformers.Trainer` with the S-IB loss. See `SIBTrainerMixin`."""
